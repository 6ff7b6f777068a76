"""Captions: split 'SUBJECT, STYLE' into its parts, and put a subject into another style."""

from __future__ import annotations

from collections.abc import Sequence


def split_caption(caption: str) -> tuple[str, str]:
    """'red heart, openmoji style' -> ('red heart', 'openmoji style'); a caption without comma is a subject without style."""
    subject, _, style = caption.rpartition(", ")
    return (subject, style) if subject else (caption, "")


def recombinations(captions: Sequence[str]) -> list[tuple[int, str]]:
    """All (row, style), by subject and style, such that no caption has that row's subject in that style. `captions` are (N,)
    'SUBJECT, STYLE', or a subject alone; a row is its subject's first.
    """
    rows: dict[str, int] = {}
    known: dict[str, set[str]] = {}
    for row, caption in enumerate(captions):
        subject, style = split_caption(caption)
        rows.setdefault(subject, row)
        known.setdefault(subject, set()).add(style)
    styles = sorted(set().union(*known.values()) - {""})
    return [(rows[subject], style) for subject in sorted(rows) for style in styles if style not in known[subject]]


def recombine(caption: str, style: str) -> str:
    """'red heart, openmoji style', 'noto style' -> 'red heart, noto style'."""
    return f"{split_caption(caption)[0]}, {style}"
