"""Encoder: what every frozen encoder of images and captions offers, in NumPy.

An encoder is named by a specification, KIND:REF. REF is a model name of open_clip ('ViT-B-32/laion2b_s34b_b79k'), a Hub id
('org/name[@revision]'), a local folder, or the name of an embedded model ('emoji'); fastattr.features.kinds lists the kinds.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from fastattr.core.errors import NonFiniteError

if TYPE_CHECKING:
    import torch

PROBES = (  # texts that show how a tokenizer cleans, splits, cuts and pads
    "Red heart, openmoji style",
    "  Caf&eacute;  AU   lait 123,456.7 (50%) \N{THUMBS UP SIGN} don't & can't!",
    '\N{LATIN SMALL LETTER SHARP S}\N{LATIN CAPITAL LETTER E WITH ACUTE} \N{CJK UNIFIED IDEOGRAPH-732B}_x-y/z\t"quoted"',
    "the quick brown fox jumps over the lazy dog " * 12,
)


@dataclass(frozen=True)
class Options:
    """How an encoder is opened."""

    folder: Path | None  # where a REF of 'encoder', 'generator' or 'gradients' is found: a run folder or an attributor's folder
    captions: str  # 'first' or 'mean': how several captions of one image become one text feature
    device: str
    dtype: torch.dtype  # of weights and activations; features are float32 in any case


class Encoder(Protocol):
    """A frozen encoder of images or of captions."""

    specification: str
    fingerprint: str  # identifies what determines the features: weights, preprocessing, vocabulary; see `encoder_fingerprint`
    former: str  # the fingerprint that earlier versions gave the same encoder

    def encode(self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> np.ndarray:
        """(B, F) float32 unit vectors; an image encoder ignores the captions, a text encoder the images."""
        ...


def encoder_fingerprint(settings: Mapping[str, Any], weights: Iterable[np.ndarray]) -> str:
    """16 hex digits of what determines an encoder's features, and of nothing else: no names of classes, files or layers.
    `settings` are `image_settings` or `text_settings`; `weights`, in any order, are those that the features depend on.
    """
    halves = (np.ascontiguousarray(value, dtype=np.float16) for value in weights)  # a half-precision copy is the same
    digests = [hashlib.sha256(f"{value.shape}".encode() + value.tobytes()).hexdigest() for value in halves]
    described = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256("\n".join([described, *sorted(digests)]).encode()).hexdigest()[:16]


def former_fingerprint(printed: str, weights: Mapping[str, np.ndarray]) -> str:
    """What earlier versions identified an encoder by: its preprocessing as a library prints it, and all weights by name."""
    digest = hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", printed).encode())
    for name, value in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value, dtype=np.float16).tobytes())
    return digest.hexdigest()[:16]


def tower(weights: Mapping[str, np.ndarray], modality: str) -> dict[str, np.ndarray]:
    """The weights of an open_clip model that the features of one modality depend on."""
    names = {name for name in weights if name.startswith("visual.")}
    if modality == "text":
        names = set(weights) - names - {"logit_scale", "logit_bias"}
    return {name: weights[name] for name in weights if name in names}


def image_settings(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """What an image's preparation depends on, of open_clip's description of it."""
    kept = {name: preprocessing[name] for name in ("size", "mode", "mean", "std", "interpolation", "resize_mode")}
    kept |= {name: [*kept[name]] for name in ("size", "mean", "std")}
    return kept | ({"fill_color": preprocessing["fill_color"]} if kept["resize_mode"] == "longest" else {})


def text_settings(captions: str, vocabulary: Mapping[str, int], tokenize: Callable[[list[str]], Any]) -> dict[str, Any]:
    """What a caption's preparation depends on: 'first' or 'mean', token -> id, and what `tokenize` makes of `PROBES`."""
    words = hashlib.sha256(json.dumps(sorted(vocabulary.items()), separators=(",", ":")).encode()).hexdigest()
    return {"captions": captions, "vocabulary": words, "probes": [[int(token) for token in row] for row in tokenize([*PROBES])]}


def require_directions(features: np.ndarray, names: Sequence[str], specification: str) -> None:
    """Raise NonFiniteError, which names the first such image, if any of (B, F) features is NaN, infinite or all zeros."""
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.linalg.norm(features.astype(np.float64), axis=1)
    bad = np.flatnonzero(~np.isfinite(lengths) | (lengths < 1e-6))
    if len(bad):
        what = f"features that are not finite or all zeros ({len(bad)} of {len(names)} in this batch)"
        fix = "Check the picture and caption; with `features.dtype: float16` take bfloat16 or float32."
        raise NonFiniteError(f"{specification} gives {names[bad[0]]!r} {what}. {fix}")


def modality(specification: str) -> str:
    """What an encoder looks at: 'image', 'text', or 'both' for a kind that names neither."""
    ending = specification.partition(":")[0].rpartition("-")[2]
    return ending if ending in {"image", "text"} else "both"


def encode_captions(
    captions: Sequence[Sequence[str]], encode: Callable[[list[str]], np.ndarray], *, average: bool
) -> np.ndarray:
    """(B, F) unit text features of images with several captions each: averaged and normalised again, or only the first's."""
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
    ids: Sequence[str] | None = None,
) -> np.ndarray:
    """(N, F) float16 features of `rows`, or of all; `images` gives one row's, so that only one batch is in memory. `captions`
    and `ids` are of all rows. Raises NonFiniteError, which names the id, as `require_directions`.
    """
    rows = range(len(captions)) if rows is None else rows
    parts = []
    for start in range(rows.start, rows.stop, batch_size):
        batch = range(start, min(start + batch_size, rows.stop))
        features = encoder.encode([images(row) for row in batch], [captions[row] for row in batch])
        require_directions(features, [ids[row] if ids else f"row {row}" for row in batch], encoder.specification)
        parts.append(features.astype(np.float16))
    return np.concatenate(parts)
