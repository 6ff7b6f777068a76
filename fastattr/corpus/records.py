"""Records: what the readers of a corpus yield, training images and what they had to skip."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastattr.corpus.images import check_image

ROWS_AT_ONCE = 1000
"""Images that are held in memory at once while a part is written, and rows of a parquet row group."""
TEXT_COLUMNS = ("creator", "license", "source", "url", "group", "subgroup", "family", "nsfw", "similarity")


@dataclass(frozen=True, kw_only=True)
class TrainingImage:
    """One image of the corpus with its captions and provenance."""

    image_id: str
    """Stable name, unique in the corpus."""
    image: bytes
    """An encoded image file (PNG, JPEG, WebP, ...)."""
    captions: list[str]
    """At least one; the first is the main caption."""
    creator: str = ""
    license: str = ""
    source: str = ""
    """The set or site it comes from."""
    url: str = ""
    group: str = ""
    """Coarse subject class, where the corpus has one."""
    subgroup: str = ""
    """Fine subject class."""
    family: str = ""
    """Shared by near-duplicates (skin tones of one design, crops of one photo)."""
    nsfw: str = ""
    """LAION's word for it: UNLIKELY, UNSURE, NSFW, or empty."""
    similarity: str = ""
    """LAION's cosine of image and caption, as it was given."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """Something found that did not become a training image."""

    name: str
    reason: str
    url: str = ""


@dataclass(frozen=True)
class Part:
    """A piece of a source that is read on its own, by one process."""

    name: str
    """What it is of; another name is another part, so it holds sizes and times of files, too."""
    read: partial[Iterator[TrainingImage | Skipped]]


def as_text(value: Any) -> str:
    """A metadata value as text; '' only for a missing one, as 0 may be a class or an id."""
    return "" if value is None else str(value)


def as_captions(value: Any) -> list[str]:
    """The non-empty captions in a string or a list of strings."""
    values = [value] if isinstance(value, str) else list(value or [])
    return [text.strip() for text in values if isinstance(text, str) and text.strip()]


def as_training_image(*, image_id: str, image: bytes, captions: list[str], metadata: dict[str, Any]) -> TrainingImage | Skipped:
    """A training image, or why there is none; of the metadata, what `TEXT_COLUMNS` names is kept."""
    problem = check_image(image) if captions else "no caption"
    if problem:
        return Skipped(name=image_id, reason=problem, url=as_text(metadata.get("url")))
    text = {column: as_text(metadata.get(column)) for column in TEXT_COLUMNS}
    return TrainingImage(image_id=image_id, image=image, captions=captions, **text)
