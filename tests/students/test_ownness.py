"""Own or foreign: on made features and pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fastattr.students import ownness
from fastattr.students.ownness import LEAST_HELD_OUT, Density, Match, Ownness, fit_ownness, measures_of, words_of
from tests.tiny import draw, unit

IMAGE = np.arange(32) < 16


def pairs(seed: int, count: int) -> np.ndarray:
    """(count, 32) features of pictures and prompts that go together: a prompt's are its picture's, a little moved."""
    rng = np.random.default_rng(seed)
    picture = unit(rng, count, 16)
    prompt = picture + 0.15 * rng.standard_normal((count, 16))
    return np.concatenate([picture, prompt / np.linalg.norm(prompt, axis=1, keepdims=True)], axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def fitted() -> Ownness:
    pictures = [draw(colour, shape, "plain") for colour in ("red", "green") for shape in ("ring", "circle", "square")]
    return fit_ownness(
        pairs(0, 600),
        pairs(1, 100),
        image=IMAGE,
        text=~IMAGE,
        measures=np.stack([measures_of(picture) for picture in pictures]),
        captions=["red ring", "a green circle, plain style"],
        false_alarms=0.05,
    )


def doubted(checks: Ownness, features: np.ndarray, prompt: str = "red ring") -> np.ndarray:
    return np.array([bool(reasons) for reasons in checks.doubts(features, [prompt] * len(features))])


def test_pictures_with_other_prompts_are_flagged_and_own_pairs_are_not(fitted: Ownness):
    """A check that flags everything, or nothing, would pass a test of one side."""
    own = pairs(2, 400)
    exchanged = np.concatenate([own[:, :16], np.roll(own, 7, axis=0)[:, 16:]], axis=1)
    assert 0.01 < doubted(fitted, own).mean() < 0.1
    assert doubted(fitted, exchanged).mean() > 0.9
    assert not doubted(fitted, exchanged, prompt="").any()  # nothing was said that could be another's


def test_features_of_different_widths_are_compared_too(fitted: Ownness):
    """DINO for pictures and CLIP for words are the paper's choice."""
    turn = np.random.default_rng(3).standard_normal((16, 24)).astype(np.float32) / 4
    widened = [
        np.concatenate([part[:, :16] @ turn, part[:, 16:]], axis=1) for part in (pairs(0, 600), pairs(1, 100), pairs(2, 400))
    ]
    image = np.arange(40) < 24
    match = ownness.fit_match(widened[0], widened[1], image=image, text=~image, false_alarms=0.05)
    exchanged = np.where(image, widened[2], np.roll(widened[2], 7, axis=0))
    assert (match.distance(widened[2]) > match.threshold).mean() < 0.1
    assert (match.distance(exchanged) > match.threshold).mean() > 0.8


@pytest.mark.parametrize(
    ("picture", "named"),
    [
        (Image.new("RGB", (64, 64), "#808080"), "contrast"),
        (Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "roughness"),
    ],
    ids=["one colour", "noise"],
)
def test_pictures_unlike_any_own_are_flagged(fitted: Ownness, picture: Image.Image, named: str):
    """Noise and one colour resemble some training image in feature space; nobody is to be named for them."""
    [reasons] = fitted.doubts(pairs(2, 1), ["red ring"], [measures_of(picture)])
    assert any(named in reason for reason in reasons)
    for own in (draw("red", "ring", "plain"), draw("green", "circle", "plain").resize((200, 200))):
        assert not any("picture are" in reason for reason in fitted.doubts(pairs(2, 1), ["red ring"], [measures_of(own)])[0])


def test_prompts_of_unknown_words_are_flagged(fitted: Ownness):
    """A generator draws something for any word; the answer would name who drew what it fell back on."""
    features = pairs(2, 1)
    for prompt, expected in (
        ("glimmering zorp", True),
        ("green zorp", True),
        ("red circle, plain style, zorp", False),
        ("ring", False),
    ):
        assert any("no training caption" in reason for reason in fitted.doubts(features, [prompt])[0]) == expected
    assert "'glimmering', 'zorp'" in fitted.doubts(features, ["glimmering zorp"])[0][0]
    assert words_of(["A red-hot café, 12!"]) == {"red", "hot", "café"}


def test_too_few_queries_are_not_taken_for_a_calibrated_check():
    """A threshold of three pictures calls a third of the generator's own foreign."""
    options = {"image": IMAGE, "text": ~IMAGE, "measures": np.zeros((1, 4)), "captions": ["x"], "false_alarms": 0.05}
    assert fit_ownness(pairs(0, 600), pairs(1, LEAST_HELD_OUT - 1), **options).match is None
    assert fit_ownness(pairs(0, 20), pairs(1, 100), **options).match is None


def test_checks_survive_a_file_and_other_shapes_do_not(fitted: Ownness):
    """A check that is read with another width would look at other features."""
    held = fitted.tensors()
    again = Ownness.read(held, 32)
    features = pairs(4, 50)
    assert again.doubts(features, ["glimmering"] * 50) == fitted.doubts(features, ["glimmering"] * 50)
    assert isinstance(again.match, Match)
    for broken in ({**held, "match.hidden": held["match.hidden"][1:]}, {**held, "match.more": held["own.ranges"]}):
        with pytest.raises((ValueError, TypeError)):
            Ownness.read(broken, 32)
    with pytest.raises((ValueError, IndexError)):
        Ownness.read(held, 31)
    assert Ownness.read({}, 32) is None


def test_a_density_of_format_1_still_tells_far_from_near():
    """Attributors on people's disks have it."""
    mean, axes = np.zeros(6, np.float32), np.eye(6, dtype=np.float32)[:2]
    density = {"mean": mean, "axes": axes, "variances": np.ones(2), "rest": np.array(0.5), "threshold": np.array(1.0)}
    checks = Ownness.read({f"density.{name}": value for name, value in density.items()}, 6)
    assert isinstance(checks.match, Density)
    assert doubted(checks, np.array([[1.0, 1, 0, 0, 0, 0], [3, 3, 0, 0, 0, 0], [0, 0, 2, 2, 0, 0]])).tolist() == [
        False,
        True,
        True,
    ]
