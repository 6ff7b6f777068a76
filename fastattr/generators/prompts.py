"""Prompts: which of their words a generator has seen in training."""

from __future__ import annotations

import re
from collections.abc import Collection

WORDS = "words.txt"
"""File of a generator folder: the words of its training captions, one a line."""


def words_of(text: str) -> list[str]:
    """Its words in lower case, in order: runs of letters, and of digits."""
    return re.findall(r"[^\W\d_]+|\d+", text.lower())


def unknown_words(prompt: str, known: Collection[str]) -> list[str]:
    """Words of a prompt, in order and once each, that are not `known`, nor are as a plural; articles and the like are."""
    return [word for word in dict.fromkeys(words_of(prompt)) if not _is_known(word, known)]


LITTLE_WORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "some",
        "one",
        "my",
        "of",
        "in",
        "on",
        "at",
        "to",
        "for",
        "with",
        "and",
        "or",
        "is",
        "are",
        "it",
        "its",
        "this",
        "that",
        "by",
        "from",
        "as",
    ]
)


def _is_known(word: str, known: Collection[str]) -> bool:
    forms = [word, word.removesuffix("s"), word.removesuffix("es")]
    if word.endswith("ies"):
        forms.append(word.removesuffix("ies") + "y")
    return word in LITTLE_WORDS or any(form in known for form in forms)
