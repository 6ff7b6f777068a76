"""What a generator is told about a training image while it learns: one of its captions, in part, or written differently.

A visitor writes 'a dog', 'Dogs' or 'dgo', not 'dog face, openmoji style'. So each training image is shown under all of its
captions, with and without their style, with articles, plurals and slips of the keyboard; and sometimes under nothing, for
classifier-free guidance (arXiv:2207.12598).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from fastattr.core.captions import split_caption
from fastattr.generators.scratch.denoiser import GeneratorConfig

ARTICLES = ("a", "the", "one", "some", "my")
FRAMES = ("a picture of", "a drawing of a", "an emoji of a", "a photo of the", "a piece of", "a pair of")
ADJECTIVES = ("small", "cute", "a new", "a nice", "funny", "a lovely", "tiny", "great", "a sweet", "strange", "a tired", "wild")
AFTER = ("on a table", "at night", "in the garden", "on the street", "with friends", "in my hand", "for you", "in summer")
"""What visitors write around a subject, and what says nothing that the images show."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def draw_prompt(captions: Sequence[str], config: GeneratorConfig, random: np.random.Generator) -> tuple[str, str]:
    """A prompt for the training image of these captions, the main one first.

    Returns:
        The prompt, and what it asks for if its style was left out ('red heart' of 'a rde heart'), else ''.
    """
    lot = random.random(5)
    if lot[0] < config.caption_dropout:
        return "", ""
    if lot[0] < config.caption_dropout + config.subject_dropout:
        return split_caption(captions[0])[1], ""
    caption = captions[0]
    if len(captions) > 1 and lot[1] < config.other_captions:
        weights = 1 / np.arange(1, len(captions))
        caption = captions[1 + random.choice(len(weights), p=weights / weights.sum())]
    subject, style = split_caption(caption)
    written = rewrite(subject, random) if lot[3] < config.rewritten else subject
    if not style:
        return written, ""
    return (written, subject) if lot[2] < config.style_dropout else (f"{written}, {style}", "")


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
    before, after = random.choice(FRAMES + ADJECTIVES), random.choice(AFTER)
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
