"""Text: captions and metadata as people's files hold them, read as what was written or refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fastattr.core.errors import InputError

BOMS = ((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


def decode_text(data: bytes) -> str:
    """The text of a file in UTF-8, UTF-16, UTF-32 or Windows-1252 (Latin-1), without its mark; InputError for another encoding.

    Windows-1252 has no mark. Bytes count as such if no three accented letters and no four bytes beyond ASCII follow
    each other, as they do in Cyrillic, Greek or Chinese encodings.
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
