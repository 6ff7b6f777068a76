"""Images: any picture as 8-bit RGB. `to_rgb` is the one way for files, bytes, uploads and Pillow images (first frames)."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastattr.core.errors import InputError

FORMATS = (  # Pillow's names of the formats that are read; none that runs a program (EPS) or a network request
    *("PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000"),
    *("TGA", "DIB", "ICO", "ICNS", "DDS", "QOI", "PCX", "PSD", "SGI"),
)
IMAGE_SUFFIXES = {  # file names that promise a picture; one that cannot be read is reported as such
    *(".apng", ".avif", ".avifs", ".bmp", ".dds", ".dib", ".gif", ".heic", ".heif", ".icns", ".ico", ".j2c", ".j2k", ".jfif"),
    *(".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".psd"),
    *(".qoi", ".sgi", ".svg", ".tga", ".tif", ".tiff", ".webp"),
}


def load_rgb(data: bytes | str | Path) -> Image.Image:
    """Decode an image file, given as bytes or by its path, as `to_rgb` does. Raises UnidentifiedImageError if it is in none of
    `FORMATS`; OSError, SyntaxError or ValueError if it is damaged.
    """
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB, upright as its EXIF block says, transparency laid on white.

    Deeper pixels are scaled. Integers of 32 bits and floats do not say what their white is: a float picture with no value above
    1 has its white at 1; otherwise white is 255 if no value is above that, or else 65535. Raises InputError if pixels are
    negative, not finite or above 65535.
    """
    image = _upright(image)
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
    if image.mode == "F" or image.mode.startswith("I"):
        return _scaled(image)
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; as it is stored if it has none or its EXIF block is damaged."""
    try:
        if image.getexif().get(0x0112, 1) == 1:  # the orientation
            return image
    except Exception:  # Pillow raises many types on a damaged block, which other programs ignore
        return image
    return ImageOps.exif_transpose(image)


def _scaled(image: Image.Image) -> Image.Image:
    """A grey image of more than 8 bits as RGB; the one grey value that a file may declare transparent becomes white."""
    values = np.asarray(image, dtype=np.float64)
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if not (low >= 0 and high <= 65535):  # also false for NaN
        raise InputError(f"the pixels go from {low:g} to {high:g}; save the image with 8 or 16 bits.")
    white = 65535 if image.mode.startswith("I;16") or high > 255 else 1 if image.mode == "F" and high <= 1 else 255
    grey = (values * (255 / white)).round()
    if isinstance(clear := image.info.get("transparency"), int):
        grey[values == clear] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def check_image(data: bytes) -> str:
    """Why these bytes are no usable image, or '' if they are."""
    if not data:
        return "not a readable image (no bytes: the file is missing, empty or may not be read)"
    try:
        load_rgb(data)
    except UnidentifiedImageError:  # its text holds a memory address, and the report must be the same every time
        return "not a readable image (unknown format)"
    except Exception as error:  # Pillow raises many types on damaged files; each means the same to us
        return f"not a readable image ({type(error).__name__}: {error})"
    return ""


def looks_like_an_image(path: Path) -> bool:
    """Whether the file's first bytes are those of an image, whatever its name."""
    try:
        with Image.open(path, formats=[name for name in FORMATS if name not in {"TGA", "PCX", "PPM"}]):
            return True
    except Exception:  # whatever Pillow says, it is no image
        return False


def read_bytes(path: Path) -> bytes:
    """The file's bytes; none if it cannot be read or is no regular file, which `check_image` then reports."""
    try:
        return path.read_bytes() if path.is_file() else b""
    except (OSError, ValueError):  # ValueError: it is no path at all
        return b""
