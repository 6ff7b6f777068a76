"""Images: read any image file as 8-bit RGB, one way for files, bytes and Pillow images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def check_image(data: bytes) -> str:
    """Why these bytes are no usable image, or '' if they are."""
    if not data:
        return "not a readable image (no bytes: the file is missing, empty or may not be read)"
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except UnidentifiedImageError:  # its text holds a memory address, and the report must be the same every time
        return "not a readable image (unknown format)"
    except Exception as error:  # Pillow raises many types on damaged files; each means the same to us
        return f"not a readable image ({type(error).__name__}: {error})"
    return ""


def load_rgb(data: bytes | Path) -> Image.Image:
    """Decode an image file as RGB; transparency is laid on white, EXIF rotation applied."""
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB, transparency laid on white."""
    if image.mode in {"I;16", "I;16B", "I"}:
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def read_bytes(path: Path) -> bytes:
    """The file's bytes; none if it cannot be read, which `check_image` then reports."""
    try:
        return path.read_bytes()
    except OSError:
        return b""
