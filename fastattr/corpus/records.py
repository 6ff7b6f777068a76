"""Records: what the readers of a corpus yield, and how they read text as people's files hold it."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from fastattr.core.errors import InputError
from fastattr.corpus.images import check_image

ROWS_AT_ONCE = 1000  # images that are held in memory at once while a part is written, and rows of a parquet row group
TEXT_COLUMNS = ("creator", "license", "source", "url", "group", "subgroup", "family", "nsfw", "similarity", "metadata")
CAPTION_COLUMNS = ("captions", "caption", "text", "alt", "prompt")
SYNONYMS = {  # names that sources give our columns, in any case of letters; the first that has a value counts
    "creator": ("artist", "author", "photographer", "illustrator", "painter", "creators", "artists", "authors"),
    "license": ("licence",),
}
KNOWN = {*CAPTION_COLUMNS, *TEXT_COLUMNS, *SYNONYMS["creator"], *SYNONYMS["license"]}
# Columns that say which image a row is of are read, but not kept.
USED = frozenset({"image_id", "image", "bytes", "path", "file_name", "filename", "file", "key", "status", "error_message"})
LONGEST = 4000  # characters of a value in `metadata`; longer ones (embeddings, whole EXIF blocks) are left out
BOMS = ((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


@dataclass(frozen=True, kw_only=True)
class TrainingImage:
    """One image of the corpus with its captions and provenance."""

    image_id: str  # stable name, unique in the corpus
    image: bytes  # an encoded image file (PNG, JPEG, WebP, ...)
    captions: list[str]  # at least one; the first is the main caption
    creator: str = ""
    license: str = ""
    source: str = ""  # the set or site it comes from
    url: str = ""
    group: str = ""  # coarse subject class, where the corpus has one
    subgroup: str = ""  # fine subject class
    family: str = ""  # shared by near-duplicates (skin tones of one design, crops of one photo)
    nsfw: str = ""  # LAION's word for it: UNLIKELY, UNSURE, NSFW, or empty
    similarity: str = ""  # LAION's cosine of image and caption, as it was given
    metadata: str = ""  # JSON object of the source's other columns, or empty
    columns: tuple[tuple[str, str], ...] = ()
    """(column of the source, what became of it): one of our columns, 'metadata' or 'left out'. Reported, not stored."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """Something found that did not become a training image."""

    name: str
    reason: str
    url: str = ""


Found = TrainingImage | Skipped


@dataclass(frozen=True)
class Part:
    """A piece of a source that is read on its own, by one process."""

    name: str  # what it is of; another name is another part, so it holds sizes and times of files, too
    read: partial[Iterator[Found]]


def state_of(path: Path) -> tuple[int, int] | None:
    """Size in bytes and time of change in nanoseconds of a file; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def as_training_image(*, image_id: str, image: bytes, captions: Sequence[str], metadata: Mapping[str, Any]) -> Found:
    """A training image, or why there is none. Columns of the source's row, `metadata`, that `TEXT_COLUMNS` and `SYNONYMS` name
    go to their place, other texts and numbers to `TrainingImage.metadata`.
    """
    fields, columns = _sort_columns(metadata)
    problem = check_image(image) if captions else "no caption"
    if problem:
        return Skipped(name=image_id, reason=problem, url=fields.get("url", ""))
    return TrainingImage(image_id=image_id, image=image, captions=list(captions), columns=columns, **fields)


def take_captions(row: dict[str, Any]) -> list[str]:
    """The captions in the first of `CAPTION_COLUMNS` that has one; the column is taken out of the row."""
    lower = {name.lower(): name for name in row}
    for name in CAPTION_COLUMNS:
        if name in lower and (captions := as_captions(row[lower[name]])):
            del row[lower[name]]
            return captions
    return []


def _sort_columns(row: Mapping[str, Any]) -> tuple[dict[str, str], tuple[tuple[str, str], ...]]:
    """The row's values by our column names, and (column of the row, what became of it) for each column with a value."""
    texts = {name: as_text(value) for name, value in row.items() if name.lower() not in USED and _is_plain(value)}
    texts = {name: text for name, text in texts.items() if text}
    lower = {name.lower(): name for name in texts}
    places = {name: "left out" for name, value in row.items() if name.lower() not in USED and not _is_plain(value)}
    fields: dict[str, str] = {}
    for ours in TEXT_COLUMNS[:-1]:
        for name in (ours, *SYNONYMS.get(ours, ())):
            if name in lower and ours not in fields:
                fields[ours] = texts[lower[name]]
                places[lower[name]] = ours
    if more := {name: text for name, text in texts.items() if name not in places and len(text) <= LONGEST}:
        fields["metadata"] = json.dumps(more, ensure_ascii=False, sort_keys=True)
    places |= {name: "metadata" if name in more else "left out" for name in texts if name not in places}
    return fields, tuple(sorted(places.items()))


def _is_plain(value: Any) -> bool:
    """Whether a value is a text, a number, a date, or made of such: no bytes, no picture."""
    if isinstance(value, Mapping | list | tuple):
        return all(map(_is_plain, value.values() if isinstance(value, Mapping) else value))
    return value is None or isinstance(value, str | int | float | Decimal | date)


def decode_text(data: bytes) -> str:
    """The text of a file in UTF-8, UTF-16, UTF-32 or Windows-1252 (Latin-1), without its mark; InputError for another encoding.
    Windows-1252 has no mark. Bytes count as such if no three accented letters and no four bytes beyond ASCII follow each other,
    as they do in Cyrillic, Greek or Chinese encodings.
    """
    try:
        for mark, encoding in BOMS:
            if data.startswith(mark):
                return data.decode(encoding)
        if b"\0" in data:
            return data.decode("utf-16-le" if data[1::2].count(0) >= data[::2].count(0) else "utf-16-be")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        marked = b"\0" in data or data.startswith((b"\xff\xfe", b"\xfe\xff"))
        if marked or re.search(rb"[\xc0-\xff]{3}|[\x80-\xff]{4}|[\x81\x8d\x8f\x90\x9d]", data):  # the last: none of cp1252
            raise InputError(f"the text is in no known encoding ({error}); save it as UTF-8.") from error
    return data.decode("cp1252")


def read_rows(path: Path) -> list[tuple[int, str, dict[str, Any] | None]]:
    """(line, '', row), or (line, what is wrong with it, None), of a table in CSV, TSV, JSON lines, or JSON: a list of rows.
    InputError if the file cannot be read.
    """
    try:
        text = decode_text(path.read_bytes())
        if path.suffix.lower() in {".csv", ".tsv"}:
            head = text.split("\n", 1)[0]
            reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count))
            wrong = "more values than columns"
            return [(reader.line_num, wrong, None) if None in row else (reader.line_num, "", row) for row in reader]
        if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
            return [(number, *_as_row(row)) for number, row in enumerate(json.loads(text), start=1)]
    except (ValueError, OSError, csv.Error) as error:  # InputError is a ValueError
        raise InputError(f"{path} cannot be read: {error}") from error
    rows: list[tuple[int, str, dict[str, Any] | None]] = []
    for number, line in enumerate(text.split("\n"), start=1):  # captions may hold U+2028
        try:
            rows += [(number, *_as_row(json.loads(line)))] if line.strip() else []
        except ValueError as error:
            rows.append((number, f"{type(error).__name__}: {error}", None))
    return rows


def _as_row(value: Any) -> tuple[str, dict[str, Any] | None]:
    return ("", value) if isinstance(value, dict) else ("not a JSON object", None)


def as_text(value: Any) -> str:
    """A metadata value as text: '' only for a missing one, as 0 may be a class; the values of a list joined by ', '."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, Mapping):
        return without_surrogates(json.dumps(value, ensure_ascii=False, default=str))
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(dict.fromkeys(filter(None, map(as_text, value))))
    return without_surrogates(str(value)).strip().removeprefix("\ufeff").strip()


def as_captions(value: Any) -> list[str]:
    """The distinct captions in a text, a number or a list of either."""
    values = value if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else [value]
    return list(dict.fromkeys(filter(None, map(as_text, values))))


def without_surrogates(text: str) -> str:
    """The text without halves of characters, which no file can hold: a caption was cut inside an emoji."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")
