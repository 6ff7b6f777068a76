"""fastattr/attributor/attribution.py: an answer as people use it, whatever strangers wrote into its catalogue."""

from __future__ import annotations

import csv
import html
import io
import json

import pytest
from PIL import Image

from fastattr import Attribution, FastAttributor, InputError, to_csv
from fastattr.attributor.attribution import Influence
from fastattr.corpus.images import load_rgb


def answer_with(*names: str) -> Attribution:
    """An answer of a training image for each name, which is its creator and its caption."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "WEBP")
    results = [
        Influence(rank, f"image-{rank}", 0.9 - rank / 10, name, name, "MIT", "set", "", "") for rank, name in enumerate(names)
    ]
    return Attribution(results, "a prompt", {}, {}, _thumbnails={result.image_id: buffer.getvalue() for result in results})


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "+1+1", "-2", "@SUM(1)", "\t=1", "\r=1", '=HYPERLINK("x")', "=1\r=2"])
def test_no_cell_is_a_formula(name):
    """A spreadsheet runs what begins like one."""
    rows = list(csv.DictReader(io.StringIO(to_csv(answer_with(name).to_pandas()), newline="")))
    assert rows[0]["creator"] == rows[0]["caption"] == f"'{name}".replace("\r", " ")
    assert float(rows[0]["similarity"]) == 0.9


@pytest.mark.parametrize("name", [r"$\frac{$", "$$", "a $x$ b", "$_^{", "\\", "n" * 10_000, "\ud83d", "a\nb\0c"])
def test_a_figure_shows_names_and_computes_none(name, tmp_path):
    """Two dollar signs are a formula to matplotlib, which ended the figure."""
    answer_with(name.replace("\ud83d", "?"), "Ada").save(tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").width > 100


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '"><img src=x>', "a & b", "javascript:alert(1)", "n" * 10_000])
def test_a_notebook_shows_names_as_text(name):
    shown = answer_with(name)._repr_html_()
    assert html.escape(name[:20]) in shown
    assert "<script" not in shown
    assert shown.count("<img") == 1
    assert len(shown) < 2000


def test_an_answer_is_a_sequence_with_a_short_name():
    """A result of 500 images printed 200,000 characters into a notebook."""
    answer = answer_with(*"abcdef")
    assert [result.creator for result in answer] == list("abcdef")
    assert (len(answer), answer[0].image_id, answer[-1].image_id) == (6, "image-0", "image-5")
    assert repr(answer) == "Attribution(6 training images: image-0, image-1, image-2, ...)"
    assert repr(answer_with()) == "Attribution(0 training images: )"
    assert answer_with().figure().axes


@pytest.mark.parametrize("name", ["x.json", "x.csv", "x.parquet", "x.PNG", "x.svg", "x.pdf", "x.jpeg", "x.webp"])
def test_an_answer_is_saved_as_its_suffix_says(tmp_path, name):
    answer_with("Ada").save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    begins = {"json": b"{", "csv": b"rank", "parquet": b"PAR1", "png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert data.startswith(begins.get(name[2:].lower(), data[:4]))
    if name == "x.json":
        assert json.loads(data)["results"][0]["creator"] == "Ada"


@pytest.mark.parametrize("name", ["x", "x.txt", "x.exe", ".png"])
def test_an_unknown_suffix_is_refused_in_words(tmp_path, name):
    with pytest.raises(InputError, match="needs a suffix"):
        answer_with("Ada").save(tmp_path / name)


def as_jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return load_rgb(buffer.getvalue())


@pytest.mark.parametrize("change", [lambda image: image, as_jpeg, lambda image: image.resize((96, 96))])
@pytest.mark.parametrize("name", ["openmoji-1f98a", "noto-1f352", "twemoji-1f682"])
def test_a_copy_under_another_prompt_is_said_to_be_one(name, change):
    """It ranked 22nd of 293, and no answer said that it is a copy."""
    attributor = FastAttributor.from_pretrained("emoji")
    row = attributor.catalog["image_id"].to_pylist().index(name)
    picture = load_rgb(attributor.catalog["thumbnail"][row].as_py())
    assert attributor.attribute(change(picture), "a bowl of noodles, fluent style", k=3).near_copy_of == name
