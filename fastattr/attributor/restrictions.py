"""Restrictions: which images an answer may name, by values of the catalogue's columns and by date."""

from __future__ import annotations

import calendar
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date

from fastattr.core.errors import InputError
from fastattr.corpus.text import without_surrogates

FILTERS = ("creator", "license", "source", "group", "subgroup", "family", "date")
"""Columns that a search can be restricted by."""
DAY = re.compile(r"(\d{4})-(\d\d)-(\d\d)")
"""How a date is kept; a time after it is allowed, and ignored."""

Where = Mapping[str, "str | Sequence[str]"]
"""Values by column (one of `FILTERS`); 'since' and 'until' bound the column 'date', both included."""


@dataclass(frozen=True)
class Restriction:
    """A `Where`, checked."""

    values: dict[str, list[str]]
    """Allowed values by column."""
    since: str
    until: str
    """Days, both included; '' where there is no bound."""

    @property
    def dated(self) -> bool:
        """Whether images without a date are left out."""
        return bool(self.since or self.until)

    def allows(self, record: Mapping[str, str]) -> bool:
        """Whether an image with these fields may be named."""
        if not all(record.get(name, "") in values for name, values in self.values.items()):
            return False
        found = DAY.match(record.get("date") or "") if self.dated else None
        return not self.dated or (found is not None and self.since <= found[0] <= (self.until or "9999-12-31"))


def restriction_of(where: Where) -> Restriction:
    """Check a restriction.

    Raises:
        InputError: it names another column, or a bound is no date.
    """
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
    bounds = {name: where.get(name) for name in ("since", "until")}
    return Restriction(
        values, *("" if bound in (None, "") else bound_of(str(bound), last=name == "until") for name, bound in bounds.items())
    )


def bound_of(text: str, *, last: bool) -> str:
    """The first or the last day of a date that is written YYYY-MM-DD, YYYY-MM or YYYY.

    Raises:
        InputError: it is written in another way, or there is no such day.
    """
    parts = re.fullmatch(r"(\d{4})(?:-(\d\d))?(?:-(\d\d))?(?:[T ].*)?", text)
    try:
        if parts is None:
            raise ValueError
        year, month = int(parts[1]), int(parts[2] or (12 if last else 1))
        day = int(parts[3] or (calendar.monthrange(year, month)[1] if last else 1))
        return date(year, month, day).isoformat()
    except ValueError as error:
        raise InputError(f"{text!r} is no date; write it as YYYY-MM-DD, YYYY-MM or YYYY, e.g. 2026-03-31.") from error


def checked_day(text: str) -> str:
    """A date as it may stand in a catalogue: YYYY-MM-DD, or ''.

    Raises:
        InputError: it is none.
    """
    if text and not DAY.match(text):
        raise InputError(f"{text!r} is no date; write it as YYYY-MM-DD, e.g. 2026-03-31.")
    if text:
        bound_of(text, last=False)
    return text
