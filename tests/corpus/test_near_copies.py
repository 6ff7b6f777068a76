"""Near-copies: found as a slow loop finds them, and only those."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from fastattr.corpus import near_copies as module
from fastattr.corpus.near_copies import MAX_BITS, MAX_COLOUR, Looks, look_of, looks_of, near_copies, originals
from fastattr.corpus.stage import CorpusConfig, run
from fastattr.corpus.store import Corpus
from tests.tiny import COLOURS, SHAPES, STYLES, draw


def pictures() -> list[Image.Image]:
    """Smooth random pictures of 64 pixels."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (6, 7, 7, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize((64, 64), Image.Resampling.BICUBIC) for one in small]


def retouched(image: Image.Image) -> Image.Image:
    """Squeezed, brightened and saved as a JPEG."""
    buffer = io.BytesIO()
    ImageEnhance.Brightness(image.resize((50, 60))).enhance(1.04).save(buffer, "JPEG", quality=75)
    return Image.open(buffer).convert("RGB")


@pytest.mark.parametrize("at_once", [7, 1024])
def test_pairs_are_those_of_a_slow_loop(monkeypatch: pytest.MonkeyPatch, at_once: int):
    """Multi-index hashing with too few bands would lose pairs without an error."""
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    rng = np.random.default_rng(1)
    signs = np.repeat(rng.integers(0, 256, (12, 8), dtype=np.uint8), 5, axis=0)
    for row in range(len(signs)):
        for bit in rng.choice(64, rng.integers(0, 6), replace=False):
            signs[row, bit // 8] ^= 1 << (bit % 8)
    colours = rng.integers(0, MAX_COLOUR + 6, (60, 192), dtype=np.uint8)
    looks = Looks(signs, colours)
    bits = np.unpackbits(signs[:, None] ^ signs[None], axis=2).sum(axis=2)
    apart = np.abs(colours[:, None].astype(int) - colours[None].astype(int)).max(axis=2)
    expected = (bits <= MAX_BITS) & (apart <= MAX_COLOUR)
    assert 60 < expected.sum() < 300  # neither all nor only themselves
    for row, found in enumerate(near_copies(looks, looks)):
        assert set(found) == set(np.flatnonzero(expected[row]))
        assert found[0] == row  # the likest


def test_a_retouched_picture_is_a_near_copy_and_another_is_none():
    """Either mistake would fill, or empty, the list of copies."""
    images = pictures()
    looks = looks_of([look_of(image) for image in images])
    again = looks_of([look_of(retouched(image)) for image in images])
    assert [list(found) for found in near_copies(again, looks)] == [[row] for row in range(len(images))]


def test_like_pictures_of_other_colours_and_shapes_are_no_copies():
    """A hash of brightness alone takes a yellow circle for an orange one, and leaves one of them out of the corpus."""
    drawn = [draw(colour, shape, style) for colour in COLOURS for shape in SHAPES for style in STYLES]
    looks = looks_of([look_of(image) for image in drawn])
    assert [list(found) for found in near_copies(looks, looks)] == [[row] for row in range(len(drawn))]


def test_the_first_of_its_kind_is_the_original():
    """Chains would make one family of a whole film, each still like the next."""
    signs = np.zeros((4, 8), dtype=np.uint8)
    signs[1, 0] = 0b111110  # 5 bits from the first
    signs[2, :2] = (0b111110, 0b11111)  # 5 from the second, 10 from the first
    signs[3, :2] = (0b111110, 0b11110)
    looks = Looks(signs, np.zeros((4, 192), dtype=np.uint8))
    assert originals(looks).tolist() == [0, 0, 2, 2]
    assert len(originals(looks[:0])) == 0


TONES = ("#f7dece", "#f3d2a2", "#d5ab88", "#af7e57", "#7c533e")
"""Skin tones of Twemoji, light to dark."""


def face(tone: str, *, hand: bool = False, sign: str = "") -> Image.Image:
    picture = Image.new("RGB", (64, 64), "white")
    drawing = ImageDraw.Draw(picture)
    drawing.ellipse((24, 4, 40, 20), fill=tone)
    drawing.rectangle((16, 22, 48, 60), fill="#4289c1")
    if hand:
        drawing.ellipse((46, 36, 56, 46), fill=tone)
    drawing.text((28, 34), sign, fill="white")
    return picture


@pytest.mark.parametrize("changed", [{"hand": True}, {"sign": "1"}, {"sign": "7"}])
def test_another_sign_or_gesture_in_the_same_picture_is_no_copy(changed):
    """Keycaps and flags differ in a few cells; they were left out as copies of each other."""
    looks = looks_of([look_of(face(TONES[0])), look_of(face(TONES[0], **changed)), look_of(retouched(face(TONES[0])))])
    assert [list(found) for found in near_copies(looks[:1], looks)] == [[0, 2]]


def test_no_skin_tone_is_left_out(tmp_path):
    """Of five skin tones one stayed in the corpus, and whoever drew the others was never named."""
    for number, tone in enumerate(TONES):
        face(tone).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"a person, tone {number}")
    retouched(face(TONES[0])).save(tmp_path / "again.png")
    (tmp_path / "again.txt").write_text("a person, tone 0")
    manifest = run(CorpusConfig(kind="folder", path=str(tmp_path)), tmp_path / "run" / "corpus")
    assert Corpus(tmp_path / "run" / "corpus").image_ids == ["0", "1", "2", "3", "4"]
    assert manifest["skipped"] == {"near-copy of another image": 1}
