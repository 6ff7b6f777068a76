"""Encoder: what every frozen encoder of images and captions offers, in NumPy.

An encoder is named by a specification, KIND:REF. REF is a model name of open_clip ('ViT-B-32/laion2b_s34b_b79k'), a Hub id
('org/name[@revision]'), a local folder, or the name of an embedded model ('emoji'); fastattr.features.kinds lists the kinds.
Source: arXiv:2511.10721, sec. 4 (image and text features, concatenated).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from PIL import Image


class Encoder(Protocol):
    """A frozen encoder of images or of captions."""

    specification: str
    fingerprint: str
    """Identifies weights and preprocessing."""

    def encode(self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> np.ndarray:
        """(B, F) float32 unit vectors; an image encoder ignores the captions, a text encoder the images."""
        ...


def modality(specification: str) -> str:
    """What an encoder looks at: 'image', 'text', or 'both' for a kind that names neither."""
    ending = specification.partition(":")[0].rpartition("-")[2]
    return ending if ending in {"image", "text"} else "both"


def encode_captions(
    captions: Sequence[Sequence[str]], encode: Callable[[list[str]], np.ndarray], *, average: bool
) -> np.ndarray:
    """(B, F) unit text features of images that may have several captions each.

    Args:
        captions: B lists of captions, none empty.
        encode: texts -> (len(texts), F) unit vectors.
        average: average all captions of an image and normalise again, instead of taking the first.
    """
    if not average:
        return encode([texts[0] for texts in captions])
    vectors = encode([text for texts in captions for text in texts])
    ends = np.cumsum([len(texts) for texts in captions])
    return unit_vectors(np.stack([part.mean(axis=0) for part in np.split(vectors, ends[:-1])]))


def unit_vectors(values: np.ndarray) -> np.ndarray:
    """(B, F) values as unit vectors."""
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def encode_all(
    encoder: Encoder,
    images: Callable[[int], Image.Image],
    captions: Sequence[Sequence[str]],
    *,
    batch_size: int,
    rows: range | None = None,
) -> np.ndarray:
    """(N, F) float16 features of `rows`, or of all.

    Args:
        encoder: which.
        images: row -> image, so that only one batch is in memory.
        captions: of all rows.
        batch_size: images at once.
        rows: which; None is all of them.
    """
    rows = range(len(captions)) if rows is None else rows
    parts = []
    for start in range(rows.start, rows.stop, batch_size):
        batch = range(start, min(start + batch_size, rows.stop))
        parts.append(encoder.encode([images(row) for row in batch], [captions[row] for row in batch]).astype(np.float16))
    return np.concatenate(parts)
