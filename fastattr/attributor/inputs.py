"""Inputs: pictures, features and metadata as callers give them, checked and opened."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastattr.attributor.catalogue import COLUMNS
from fastattr.core.errors import InputError
from fastattr.corpus.images import load_rgb, to_rgb

ImageLike = Image.Image | np.ndarray | str | Path


def open_image(image: ImageLike | Any) -> Image.Image:
    """An RGB image from a Pillow image, an (H, W, 3) uint8 array or a file.

    Raises:
        InputError: it is none of these, or can't be read.
    """
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InputError(f"an image array must be (H, W, 3) uint8, got {image.shape} {image.dtype}.")
        return Image.fromarray(image)
    path = Path(image)
    if not path.is_file():
        raise InputError(f"there is no image file {str(path)!r}.")
    try:
        return load_rgb(path)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{str(path)!r} can't be read as an image ({type(error).__name__}); give a PNG, JPEG or WebP file."
        ) from error


def image_sha256(image: Image.Image, prompt: str) -> str:
    """Hex SHA-256 of an image's size and RGB pixels, and its prompt."""
    rgb = to_rgb(image)
    digest = hashlib.sha256(f"{rgb.width}x{rgb.height}\n".encode())
    digest.update(rgb.tobytes())
    digest.update(prompt.encode())
    return digest.hexdigest()


def features_sha256(features: np.ndarray, prompt: str) -> str:
    """Hex SHA-256 of (F,) features in float32 and the prompt."""
    return hashlib.sha256(np.asarray(features, dtype="<f4").tobytes() + prompt.encode()).hexdigest()


def checked_metadata(fields: Mapping[str, str]) -> dict[str, str]:
    """Metadata of an image, once its columns and values have been looked at."""
    known = {*COLUMNS, "date"}
    for name, value in fields.items():
        if name not in known or not isinstance(value, str):
            raise InputError(f"metadata are texts in the columns {', '.join(sorted(known))}; got {name!r}: {value!r}.")
    return dict(fields)
