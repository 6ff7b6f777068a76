"""What the documents show of benchmarks: tables in Markdown, put between two marks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastattr.core.errors import InputError
from fastattr.core.files import atomic_path


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def span(values: Mapping[str, Any], key: str = "", *, factor: float = 1.0, digits: int = 3) -> str:
    """'0.434 [0.359, 0.486]': `key` with `key_low` and `key_high`, or 'mean' with 'low' and 'high' where there is no key."""
    names = (key, f"{key}_low", f"{key}_high") if key else ("mean", "low", "high")
    value, low, high = (f"{values[name] * factor:.{digits}f}" for name in names)
    return f"{value} [{low}, {high}]"


def with_error(values: Mapping[str, Any], key: str, *, factor: float = 1.0, digits: int = 3) -> str:
    """'34.67 ± 4.24': a value with its standard error `key_se`; nothing where it was not measured."""
    if values[key] is None:
        return ""
    return f"{values[key] * factor:.{digits}f} ± {values[f'{key}_se'] * factor:.{digits}f}"


def number(value: float | None, digits: int = 3) -> str:
    """A number, nothing where there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def pairs(results: Mapping[str, Any], *names: str) -> list[str]:
    """A table of keys and what was measured; keys that were not are left out."""
    rows = [[f"`{name}`", _short(results[name])] for name in names if name in results]
    return table(["key", "measured"], rows)


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def where(results: Mapping[str, Any]) -> str:
    """By which command, with which seed, on which machine and when."""
    return (
        f"`{results['command']}`, seed {results['seed']}, {results['cpu']}, {results['cores']} cores, {results['date'][:10]}."
    )


def fill(path: Path, parts: Mapping[str, Iterable[str]]) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- end NAME -->` in a document.

    Raises:
        InputError: the document lacks a pair of marks.
    """
    text = path.read_text(encoding="utf-8")
    for name, lines in parts.items():
        opening, closing = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        before, found, rest = text.partition(opening)
        _, ended, after = rest.partition(closing)
        if not found or not ended:
            raise InputError(f"{path} lacks the marks {opening.strip()} and {closing}.")
        text = before + opening + "\n".join(lines) + "\n" + closing + after
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
