"""fastattr/attributor/inputs.py: a picture is the same in whatever form it comes; what is none is refused in words."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastattr import FastAttributor, InputError
from fastattr.attributor.inputs import open_image
from tests.made import QUERY, WIDTH, write_attributor

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
FLOATS = torch.tensor(PIXELS).permute(2, 0, 1).float() / 255


def encoded() -> bytes:
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def attributor(tmp_path: Path) -> FastAttributor:
    return FastAttributor.from_pretrained(write_attributor(tmp_path / "attributor"))


FORMS = {
    "picture": lambda _: PICTURE,
    "array": lambda _: PIXELS,
    "array of floats": lambda _: PIXELS / 255.0,
    "channels first": lambda _: PIXELS.transpose(2, 0, 1),
    "tensor": lambda _: torch.tensor(PIXELS),
    "tensor of floats": lambda _: FLOATS,
    "tensor with a gradient": lambda _: FLOATS.clone().requires_grad_(),
    "batch of one": lambda _: FLOATS[None],
    "bytes": lambda _: encoded(),
    "bytearray": lambda _: bytearray(encoded()),
    "BytesIO": lambda _: io.BytesIO(encoded()),
    "open file": lambda path: path.open("rb"),
    "buffered": lambda path: io.BufferedReader(path.open("rb", buffering=0)),
    "path": lambda path: path,
    "name": str,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_a_picture_is_that_picture(tmp_path, form):
    """An open file has a method `detach`, as tensors have: it ended in a traceback."""
    (tmp_path / "x.png").write_bytes(encoded())
    np.testing.assert_array_equal(np.asarray(open_image(form(tmp_path / "x.png"))), PIXELS)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_tensors_in_half_precision_are_pictures(kind):
    """NumPy has no bfloat16, which pipelines draw in."""
    assert np.abs(np.asarray(open_image(FLOATS.to(kind)), dtype=int) - PIXELS).max() <= 1


@pytest.mark.parametrize(
    "what",
    [
        *(None, 5, {}, b"", b"junk", io.BytesIO(b"junk")),
        *("https://x.example/y.png", "no.png", "a\0b", "\ud83d.png", "x" * 5000),
        *(PIXELS[..., 0], np.zeros((0, 0, 3), np.uint8), PIXELS / 127.5 - 1, np.full((4, 4, 3), np.nan), np.array([None])),
    ],
)
def test_what_is_no_picture_is_refused_in_words(what):
    """A visitor's mistake is not the library's."""
    with pytest.raises(InputError, match=r"image|is an address"):
        open_image(what)


@pytest.mark.parametrize(
    "features",
    [[QUERY.tolist()], torch.tensor(QUERY)[None], torch.tensor(QUERY)[None].bfloat16(), QUERY[None].astype(np.float64)],
)
def test_features_come_as_lists_arrays_and_tensors(attributor, features):
    """The nearest image is the same for all of them."""
    expected = attributor.attribute_features(QUERY[None], ["x"], 1)[0][0].image_id
    assert attributor.attribute_features(features, ["x"], 1)[0][0].image_id == expected


@pytest.mark.parametrize(
    "features",
    [[[1.0] * WIDTH, [1.0]], [["a"] * WIDTH], [[None] * WIDTH], np.ones((1, WIDTH)) * 1j, np.ones(WIDTH), [[np.nan] * WIDTH]],
)
def test_features_that_are_none_are_refused_in_words(attributor, features):
    """Ragged lists and complex numbers ended in a traceback, or in a wrong answer."""
    with pytest.raises(InputError, match="features must be"):
        attributor.attribute_features(features, ["x"] * len(features), 1)


@pytest.mark.parametrize(
    "where", ["creator", [("creator", "Ada")], {"creator": "\ud83d"}, {"creator": 5}, {"since": "yesterday"}]
)
def test_a_restriction_that_is_none_is_refused_in_words(attributor, where):
    with pytest.raises(InputError, match=r"restriction|is no date"):
        attributor.attribute_features(QUERY[None], ["x"], 1, where=where)


@pytest.mark.parametrize("prompts", ["x", [None], [5]])
def test_prompts_of_features_are_texts(attributor, prompts):
    with pytest.raises(InputError, match="list of prompts"):
        attributor.attribute_features(QUERY[None], prompts, 1)


@pytest.mark.parametrize("ids", [[5], [None], ["base-1", b"x"]])
def test_ids_to_remove_are_texts(attributor, ids):
    """Nothing is removed of a list that is wrong in part."""
    with pytest.raises(InputError, match="ids are texts"):
        attributor.remove(ids)
    assert len(attributor) == 60


def test_thumbnails_are_as_many_as_images(attributor):
    with pytest.raises(InputError, match="as many thumbnails"):
        attributor.add_features(QUERY[None], ["c"], [{"image_id": "new"}], thumbnails=[])
