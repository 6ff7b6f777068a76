"""Text: captions and metadata as people's files hold them, read as what was written or refused."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastattr.core.errors import InputError

BOMS = ((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


def decode_text(data: bytes) -> str:
    """The text of a file in UTF-8, UTF-16, UTF-32 or Windows-1252 (Latin-1), without its byte order mark.

    Windows-1252 has no mark. Bytes count as such if no three accented letters and no four bytes beyond ASCII follow
    each other, as they do in Cyrillic, Greek or Chinese encodings.

    Raises:
        InputError: the encoding is another one.
    """
    try:
        for mark, encoding in BOMS:
            if data.startswith(mark):
                return data.decode(encoding)
        if b"\0" in data:
            return data.decode("utf-16-le" if data[1::2].count(0) >= data[::2].count(0) else "utf-16-be")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\0" in data or data.startswith((b"\xff\xfe", b"\xfe\xff")) or re.search(rb"[\xc0-\xff]{3}|[\x80-\xff]{4}", data):
            raise InputError(f"the text is in no known encoding ({error}); save it as UTF-8.") from error
    try:
        return data.decode("cp1252")
    except UnicodeDecodeError as error:
        raise InputError(f"the text is in no known encoding ({error}); save it as UTF-8.") from error


def read_rows(path: Path) -> list[tuple[int, str, dict[str, Any] | None]]:
    """(line, '', row), or (line, what is wrong with it, None), of a table in CSV, TSV, JSON lines, or JSON: a list of rows.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        text = decode_text(path.read_bytes())
        if path.suffix.lower() in {".csv", ".tsv"}:
            head = text.split("\n", 1)[0]
            reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count))
            return [
                (reader.line_num, "more values than columns", None) if None in row else (reader.line_num, "", row)
                for row in reader
            ]
        if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
            return [(number, *_as_row(row)) for number, row in enumerate(json.loads(text), start=1)]
    except (ValueError, OSError, csv.Error) as error:  # InputError is a ValueError
        raise InputError(f"{path} cannot be read: {error}") from error
    rows: list[tuple[int, str, dict[str, Any] | None]] = []
    for number, line in enumerate(text.split("\n"), start=1):  # captions may hold U+2028
        if line.strip():
            try:
                rows.append((number, *_as_row(json.loads(line))))
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
