"""Inputs: pictures, features, metadata and restrictions as callers give them, checked and opened."""

from __future__ import annotations

import calendar
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import PIL.WebPImagePlugin  # noqa: F401  # of thumbnails: unloaded, Pillow would load forty formats to find it
from PIL import Image, ImageOps, UnidentifiedImageError

from fastattr.core.errors import InputError
from fastattr.corpus.images import load_rgb, to_rgb
from fastattr.corpus.records import without_surrogates

COLUMNS = ("image_id", "caption", "creator", "license", "source", "url", "group", "subgroup", "family")
ImageLike = Image.Image | np.ndarray | bytes | str | Path
"""A picture: Pillow image, array, encoded bytes or a file; tensors and open files are taken as well."""
Metadata = Sequence[Mapping[str, str]]
Captions = Sequence[str | Sequence[str]]
Thumbnails = Sequence[bytes] | None  # small WebP files
Images = ImageLike | Sequence[ImageLike]
Prompts = str | Sequence[str | None] | None


def open_image(image: ImageLike | Any) -> Image.Image:
    """An upright RGB image from a Pillow image, bytes, a file, or an array (H, W, 3) or (3, H, W) of uint8 or floats to 1."""
    if isinstance(image, Image.Image):
        picture = image
        return _read(lambda: to_rgb(ImageOps.exif_transpose(picture)), "the image")
    if hasattr(image, "read"):
        image = image.read()
    image = without_torch(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, bytes | bytearray | memoryview):
        return _read(lambda: load_rgb(bytes(image)), f"{len(image)} bytes")
    if not isinstance(image, str | os.PathLike):
        raise InputError(f"a {type(image).__name__} is no image; give a Pillow image, an array, bytes or a file.")
    if re.match(r"(?i)[a-z]+://", str(image)):
        raise InputError(f"{image!s:.100} is an address; fetch the picture, and give its bytes or a file.")
    path = Path(image)
    try:
        there = path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if not there:
        raise InputError(f"there is no image file {str(path)[:300]!r}.")
    return _read(lambda: load_rgb(path), repr(str(path)))


def without_torch(values: Any) -> Any:
    """A tensor as an array, with floats of 32 bits, since NumPy has no bfloat16; anything else as it is."""
    if not hasattr(values, "detach"):
        return values
    values = values.detach().cpu()
    return (values.float() if values.is_floating_point() else values).numpy()


def _read(load: Callable[[], Image.Image], what: str) -> Image.Image:
    try:
        return load()
    except InputError as error:
        raise InputError(f"{what} can't be read as an image: {error}") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = f"{what} can't be read as an image ({type(error).__name__}); give a PNG, JPEG or WebP file."
        raise InputError(reason) from error


def _from_array(array: np.ndarray) -> Image.Image:
    """An RGB image from an array."""
    values = array[0] if array.ndim == 4 and len(array) == 1 else array
    if values.ndim == 3 and values.shape[2] != 3 and values.shape[0] == 3:
        values = values.transpose(1, 2, 0)
    whole = values.ndim == 3 and values.shape[2] == 3 and values.size > 0
    if whole and np.issubdtype(values.dtype, np.floating) and values.min() >= 0 and values.max() <= 1:
        values = (values * 255).round().astype(np.uint8)
    if not whole or values.dtype != np.uint8:
        wanted = "(H, W, 3) or (3, H, W), of uint8 or of floats from 0 to 1"
        raise InputError(f"an image array must be {wanted}, got {array.shape} {array.dtype}.")
    return Image.fromarray(np.ascontiguousarray(values))


def image_sha256(image: Image.Image, prompt: str) -> str:
    """Hex SHA-256 of an image's size and RGB pixels, and its prompt."""
    rgb = to_rgb(image)
    digest = hashlib.sha256(f"{rgb.width}x{rgb.height}\n".encode())
    digest.update(rgb.tobytes())
    digest.update(prompt.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def features_sha256(features: np.ndarray, prompt: str) -> str:
    """Hex SHA-256 of (F,) features in float32 and the prompt."""
    return hashlib.sha256(np.asarray(features, dtype="<f4").tobytes() + prompt.encode("utf-8", "surrogatepass")).hexdigest()


def checked_metadata(fields: Mapping[str, str]) -> dict[str, str]:
    """Metadata of an image; InputError if there is no such column, a value is no text, or a date is no date."""
    known = {*COLUMNS, "date"}
    for name, value in fields.items():
        if name not in known or not isinstance(value, str):
            raise InputError(f"metadata are texts in the columns {', '.join(sorted(known))}; got {name!r}: {value!r:.100}.")
        if "\0" in value or without_surrogates(value) != value:
            raise InputError(f"metadata are texts without NUL that UTF-8 can hold; {name!r} is {value!r:.100}.")
        if name == "date" and value:
            if not DAY.match(value):
                raise InputError(f"{value!r} is no date; write it as YYYY-MM-DD, e.g. 2026-03-31.")
            bound_of(value, last=False)
    return dict(fields)


def checked_features(features: Any, count: int, width: int) -> np.ndarray:
    """(count, width) features as an array; InputError if they have another shape, or are not finite."""
    try:
        features = np.asarray(without_torch(features))
    except ValueError as error:  # rows of several widths
        raise InputError(f"features must be ({count}, {width}), one row a prompt ({error}).") from error
    if features.ndim != 2 or features.shape[1] != width or len(features) != count:
        raise InputError(f"features must be ({count}, {width}), one row a prompt, got {features.shape}.")
    if not np.can_cast(features.dtype, np.float64, "same_kind") or not np.isfinite(features).all():
        raise InputError("features must be finite numbers; some are NaN or infinite.")
    found: np.ndarray = features
    return found


FILTERS = ("creator", "license", "source", "group", "subgroup", "family", "date")  # columns that a search can be restricted by
DAY = re.compile(r"(\d{4})-(\d\d)-(\d\d)")  # how a date is kept; a time after it is allowed, and ignored

Where = Mapping[str, "str | Sequence[str]"]
"""Values by column (one of `FILTERS`); 'since' and 'until' bound the column 'date', both included."""


@dataclass(frozen=True)
class Restriction:
    """A `Where`, checked."""

    values: dict[str, list[str]]  # allowed values by column
    since: str
    until: str  # days, both included
    dated: bool  # whether images without a date are left out

    def allows(self, record: Mapping[str, str]) -> bool:
        """Whether an image with these fields may be named."""
        if not all(record.get(name, "") in values for name, values in self.values.items()):
            return False
        found = DAY.match(record.get("date") or "") if self.dated else None
        return not self.dated or (found is not None and self.since <= found[0] <= self.until)


def restriction_of(where: Where) -> Restriction:
    """Check a restriction; InputError if it names another column, or a bound is no date."""
    if not isinstance(where, Mapping):
        raise InputError(f"a restriction is a mapping of columns to values, got {where!r:.100}.")
    values: dict[str, list[str]] = {}
    for name, value in where.items():
        if name in {"since", "until"}:
            continue
        if name not in FILTERS:
            raise InputError(f"a search can be restricted by {', '.join(FILTERS)}, since and until, not by {name!r}.")
        values[name] = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [value]
        if not all(isinstance(each, str) and without_surrogates(each) == each for each in values[name]):
            raise InputError(f"a restriction names texts that UTF-8 can hold; {name} is to be {value!r:.100}.")
    since, until = (bound_of(str(where[name]), last=name == "until") if where.get(name) else "" for name in ("since", "until"))
    return Restriction(values, since, until or "9999-12-31", bool(since or until))


def bound_of(text: str, *, last: bool) -> str:
    """The first or the last day of a date that is written YYYY-MM-DD, YYYY-MM or YYYY; InputError for another one."""
    parts = re.fullmatch(r"(\d{4})(?:-(\d\d))?(?:-(\d\d))?(?:[T ].*)?", text)
    try:
        if parts is None:
            raise ValueError
        year, month = int(parts[1]), int(parts[2] or (12 if last else 1))
        day = int(parts[3] or (calendar.monthrange(year, month)[1] if last else 1))
        return date(year, month, day).isoformat()
    except ValueError as error:
        raise InputError(f"{text!r} is no date; write it as YYYY-MM-DD, YYYY-MM or YYYY, e.g. 2026-03-31.") from error
