"""What a generator is told about a training image while it learns: one of its captions, in part, or written differently.

A visitor writes 'a dog', 'Dogs' or 'dgo', not 'dog face, openmoji style'. So each training image is shown under all of its
captions, with and without their style, with articles, plurals and slips of the keyboard; and sometimes under nothing, for
classifier-free guidance (arXiv:2207.12598).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastattr.core.captions import split_caption

ARTICLES = ("a", "the", "one", "some", "my")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How often a training image is shown under what; the last three are shares of what the first two leave."""

    empty: float
    style_alone: float
    other_captions: float
    """Earlier ones more often."""
    subject_alone: float
    rewritten: float


def draw_prompt(captions: Sequence[str], shares: Shares, random: np.random.Generator) -> str:
    """A prompt for the training image of these captions, the main one first."""
    lot = random.random(5)
    if lot[0] < shares.empty:
        return ""
    if lot[0] < shares.empty + shares.style_alone:
        return split_caption(captions[0])[1]
    caption = captions[0]
    if len(captions) > 1 and lot[1] < shares.other_captions:
        weights = 1 / np.arange(1, len(captions))
        caption = captions[1 + random.choice(len(weights), p=weights / weights.sum())]
    subject, style = split_caption(caption)
    if lot[3] < shares.rewritten:
        subject = rewrite(subject, random)
    return subject if not style or lot[2] < shares.subject_alone else f"{subject}, {style}"


def rewrite(subject: str, random: np.random.Generator) -> str:
    """'red heart' -> 'a red heart', 'red hearts' or 'rde heart'."""
    kind = random.integers(3)
    if kind == 0:
        return f"{random.choice(ARTICLES)} {subject}"
    if kind == 1:
        return subject + ("es" if subject.endswith(("s", "x", "ch", "sh")) else "s")
    return mistype(subject, random)


def mistype(text: str, random: np.random.Generator) -> str:
    """Leave out, double, replace or swap one letter of a word with more than three."""
    places = [at for at in range(len(text) - 1) if text[at : at + 2].isalpha()]
    if len(text) < 4 or not places:
        return text
    at = int(random.choice(places))
    slips = (
        text[at + 1],
        text[at] * 2 + text[at + 1],
        str(random.choice(list(LETTERS))) + text[at + 1],
        text[at + 1] + text[at],
    )
    return text[:at] + slips[random.integers(4)] + text[at + 2 :]
