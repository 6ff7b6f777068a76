"""Pictures that the judge is trained on: the corpus', and those of four older sets that nothing else uses.

The older sets are named as the corpus names them; what the judge is to be asked is left out, with all that would give it away.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import judge as judging
import numpy as np
from PIL import Image

from fastattr.core.captions import split_caption
from fastattr.core.files import atomic_path
from fastattr.corpus import emoji
from fastattr.corpus.near_copies import look_of, looks_of, near_copies
from fastattr.corpus.store import Corpus

RESOLUTION = 64
OLDER_SETS = (
    emoji.EmojiSet(
        "emojione",
        "@iconify-json/emojione@1.2.3",
        "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "CC-BY-4.0",
        "Emoji One",
        "https://github.com/EmojiTwo/emojitwo",
    ),
    emoji.EmojiSet(
        "emojione-v1",
        "@iconify-json/emojione-v1@1.2.3",
        "sha512-UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww==",
        "CC-BY-SA-4.0",
        "Emoji One",
        "https://github.com/joypixels/emojione-legacy",
    ),
    emoji.EmojiSet(
        "noto-v1",
        "@iconify-json/noto-v1@1.2.5",
        "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Apache-2.0",
        "Google",
        "https://github.com/googlefonts/noto-emoji",
    ),
    emoji.EmojiSet(
        "fxemoji",
        "@iconify-json/fxemoji@1.2.2",
        "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        "Apache-2.0",
        "Mozilla",
        "https://github.com/mozilla/fxemoji",
    ),
)
MAKERS = {"noto-v1": "noto"}
"""Older sets whose pictures may be like those of a set of the corpus; the others are their own makers'."""


@dataclass(frozen=True)
class Pictures:
    """Real images with their set and subject."""

    images: np.ndarray
    """(N, 64, 64, 3) uint8."""
    sets: np.ndarray
    """(N,) names."""
    subjects: np.ndarray
    """(N,) names, as the corpus names them."""

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: np.ndarray) -> Pictures:
        return Pictures(self.images[rows], self.sets[rows], self.subjects[rows])


def spelling(name: str) -> str:
    """A name without what sets spell differently: 'flag-for-flag-norway' and 'flag: norway' are one."""
    name = re.sub(r"^flag-for-(flag-)?", "flag", name.lower()).replace("&", "and")
    return re.sub(r"[^a-z0-9]", "", unicodedata.normalize("NFKD", name))


def other_pictures(corpus: Corpus) -> Pictures:
    """Pictures of the corpus' subjects that are not in it: of the older sets, and flags of countries in OpenMoji's style."""
    named, by_code, present = {}, {}, set(corpus.image_ids)
    for image_id, captions in zip(corpus.image_ids, corpus.captions, strict=True):
        subject = split_caption(captions[0])[0]
        named[spelling(subject)] = subject
        by_code[emoji.plain_code(image_id.partition("-")[2])] = subject
    drawn: list[tuple[Image.Image, str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for drawing in emoji.openmoji_drawings(emoji.fetch_package(emoji.OPENMOJI, folder)):
            subject = by_code.get(emoji.plain_code(drawing.image.image_id.partition("-")[2]))
            if subject and drawing.image.image_id not in present:
                drawn.append((_drawn(drawing.svg), "openmoji", subject))
        for emoji_set in emoji.ICONIFY:
            with tarfile.open(emoji.fetch_package(emoji_set, folder)) as tar:
                characters = json.loads(tar.extractfile("package/chars.json").read())  # type: ignore[union-attr]
            for code, icon in characters.items():
                if subject := by_code.get(emoji.plain_code(code)):
                    named.setdefault(spelling(icon), subject)
        for emoji_set in OLDER_SETS:
            found = {}
            for icon, svg in emoji.iconify_svgs(emoji.fetch_package(emoji_set, folder)):
                found.setdefault(named.get(spelling(icon), ""), svg)
            drawn += [(_drawn(svg), emoji_set.name, subject) for subject, svg in found.items() if subject]
    images, sets, subjects = zip(*drawn, strict=True)
    return Pictures(np.stack([np.asarray(image) for image in images]), np.array(sets), np.array(subjects))


def _drawn(svg: str) -> Image.Image:
    return Image.open(io.BytesIO(emoji.draw(svg, resolution=RESOLUTION))).convert("RGB")


def gather(corpus: Corpus, images: np.ndarray, kept: Path, held_out_share: float, once_share: float) -> Pictures:
    """All that the judge is trained on; the pictures that are not in the corpus are kept in the file `kept`."""
    if not kept.exists():
        others = other_pictures(corpus)
        with atomic_path(kept) as temporary, temporary.open("wb") as file:
            np.savez(file, images=others.images, sets=others.sets, subjects=others.subjects)
    with np.load(kept) as arrays:
        others = Pictures(arrays["images"], arrays["sets"], arrays["subjects"])
    known = Pictures(images, np.array(corpus.column("source")), np.array(judging.subjects_of(corpus)))
    unseen, once = judging.held_out_rows(corpus, held_out_share, once_share)
    away = unseen | once
    once_subjects = set(known.subjects[once].tolist())
    hidden = set(zip(known.sets[unseen].tolist(), known.subjects[unseen].tolist(), strict=True))
    makers = [MAKERS.get(name, name) for name in others.sets]
    allowed = np.array([
        subject not in once_subjects and (maker, subject) not in hidden
        for maker, subject in zip(makers, others.subjects, strict=True)
    ])  # fmt: skip
    joined = Pictures(*(np.concatenate([getattr(known, name), getattr(others, name)]) for name in vars(known)))
    looks = looks_of([look_of(Image.fromarray(image)) for image in joined.images])
    copies = near_copies(looks[np.flatnonzero(away)], looks) if away.any() else []
    kept_rows = np.concatenate([~away, allowed])
    kept_rows[[row for found in copies for row in found]] = False
    return joined[kept_rows]
