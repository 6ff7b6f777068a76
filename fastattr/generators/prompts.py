"""Prompts: which of their words a generator has seen in training."""

from __future__ import annotations

import re
from collections.abc import Collection

WORDS = "words.txt"
"""File of a generator folder: the words of its training captions, one a line."""
LITTLE_WORDS = re.compile("a|an|the|some|one|my|of|in|on|at|to|for|with|and|or|is|are|it|its|this|that|by|from|as")


def words_of(text: str) -> list[str]:
    """Its words in lower case, in order: runs of letters, and of digits."""
    return re.findall(r"[^\W\d_]+|\d+", text.lower())


def unknown_words(prompt: str, known: Collection[str]) -> list[str]:
    """Words of a prompt, once each, that are not `known`, nor are in the singular; articles and the like are known."""
    unknown = []
    for word in dict.fromkeys(words_of(prompt)):
        forms = {word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word)}
        if not LITTLE_WORDS.fullmatch(word) and not any(form in known for form in forms):
            unknown.append(word)
    return unknown
