"""What a generator is told about a training image while it learns: one of its captions, in part, or written differently.

A visitor writes 'a dog', 'Dogs' or 'dgo', not 'dog face, openmoji style'. So each training image is shown under all of its
captions, with and without their style, with articles, plurals and slips of the keyboard; and sometimes under nothing, for
classifier-free guidance (arXiv:2207.12598).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastattr.core.captions import split_caption

ARTICLES = ("a", "the", "one", "some", "my")
BEFORE = (
    *("a picture of", "a drawing of a", "an emoji of a", "a photo of the", "a piece of", "a pair of"),
    *(
        "small",
        "cute",
        "a new",
        "a nice",
        "funny",
        "a lovely",
        "tiny",
        "great",
        "a sweet",
        "pretty",
        "strange",
        "a tired",
        "wild",
    ),
)
AFTER = ("on a table", "at night", "in the garden", "on the street", "with friends", "in my hand", "for you", "in summer")
"""What visitors write around a subject, and what says nothing that the images show."""
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


def draw_prompt(captions: Sequence[str], shares: Shares, random: np.random.Generator) -> tuple[str, str]:
    """A prompt for the training image of these captions, the main one first.

    Returns:
        The prompt, and what it asks for if it names no style ('red heart' of 'a rde heart'), else ''.
    """
    lot = random.random(5)
    if lot[0] < shares.empty:
        return "", ""
    if lot[0] < shares.empty + shares.style_alone:
        return split_caption(captions[0])[1], ""
    caption = captions[0]
    if len(captions) > 1 and lot[1] < shares.other_captions:
        weights = 1 / np.arange(1, len(captions))
        caption = captions[1 + random.choice(len(weights), p=weights / weights.sum())]
    subject, style = split_caption(caption)
    written = rewrite(subject, random) if lot[3] < shares.rewritten else subject
    return (written, subject) if not style or lot[2] < shares.subject_alone else (f"{written}, {style}", "")


def rows_without_style(captions: Sequence[Sequence[str]]) -> dict[str, int]:
    """The row that answers a prompt which names no style, by what it asks for.

    A subject is drawn as one of its images, chosen by the subject's hash, so that 'a dog' is one dog and not a blend of
    four; a keyword of several subjects stands for the one that it tells most of.
    """
    of_subject: dict[str, list[int]] = {}
    best: dict[str, tuple[int, int, str]] = {}
    for row, of_image in enumerate(captions):
        subject = split_caption(of_image[0])[0]
        of_subject.setdefault(subject, []).append(row)
        for place, caption in enumerate(of_image):
            text = split_caption(caption)[0]
            best[text] = min(best.get(text, (place, len(subject), subject)), (place, len(subject), subject))
    chosen = {name: rows[hashlib.sha256(name.encode()).digest()[0] % len(rows)] for name, rows in of_subject.items()}
    return {text: chosen[subject] for text, (_, _, subject) in best.items()}


def rewrite(subject: str, random: np.random.Generator) -> str:
    """'red heart' -> 'a red heart', 'red hearts', 'rde heart', 'a drawing of a lovely red heart'."""
    kind = random.integers(4)
    if kind == 0:
        return f"{random.choice(ARTICLES)} {subject}"
    if kind == 1:
        return subject + ("es" if subject.endswith(("s", "x", "ch", "sh")) else "s")
    if kind == 2:
        return mistype(subject, random)
    before, after = random.choice(BEFORE), random.choice(AFTER)
    return f"{before} {subject}" if random.random() < 0.6 else f"{random.choice(ARTICLES)} {subject} {after}"


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
