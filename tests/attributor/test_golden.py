"""Attributors of earlier versions load unchanged: a tiny one of 2026-11-28 that is kept here, and the embedded one.

    python -m tests.attributor.test_golden

records the embedded attributor's answer anew; do that only after it was made anew.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastattr import FastAttributor
from fastattr.core.models import ASSETS
from tests.tiny import COLOURS, SHAPES, STYLES, draw

GOLDEN = Path(__file__).parent / "golden"
RECORDED = GOLDEN / "answers.json"


def answer(attributor: FastAttributor, image: Image.Image, prompt: str) -> dict[str, Any]:
    """What must not change of an answer."""
    found = attributor.attribute(image, prompt, k=10)
    results = [[row.image_id, round(row.similarity, 4), round(row.percentile, 3)] for row in found.results]
    return {"sha256": found.query["sha256"], "results": results}


def embedded_answer() -> dict[str, Any]:
    """The embedded attributor's answer to the first of its recorded drawings."""
    attributor = FastAttributor.from_pretrained("emoji")
    drawing = pq.read_table(ASSETS / "emoji" / "attributor" / "generated.parquet").slice(0, 1).to_pylist()[0]
    image = Image.open(io.BytesIO(drawing["image"])).convert("RGB")
    facts = {"seal": attributor.config["seal"], "images": len(attributor), "prompt": drawing["prompt"]}
    return {**facts, **answer(attributor, image, drawing["prompt"])}


def assert_same(found: dict[str, Any], recorded: dict[str, Any]) -> None:
    """The same ids in the same order, similarities and percentiles up to rounding."""
    assert [row[0] for row in found["results"]] == [row[0] for row in recorded["results"]]
    for ours, theirs in zip(found["results"], recorded["results"], strict=True):
        assert ours[1:] == pytest.approx(theirs[1:], abs=2e-3)
    assert {key: value for key, value in found.items() if key != "results"} == {
        key: value for key, value in recorded.items() if key != "results"
    }


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_a_tiny_attributor_of_an_earlier_version_answers_as_it_did(backend: str):
    """A fingerprint that another version computes otherwise would refuse every attributor that people have."""
    attributor = FastAttributor.from_pretrained(GOLDEN / "tiny", backend=backend)
    names = [f"{colour}-{shape}-{style}" for colour in COLOURS for shape in SHAPES for style in STYLES]
    assert sorted(attributor.catalog["image_id"].to_pylist()) == sorted(names)
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))["tiny"]
    assert_same(answer(attributor, draw("red", "circle", "plain"), "red circle, plain style"), recorded)


def test_the_embedded_attributor_answers_as_recorded():
    """A change of code that moves the answers of a model that did not change would go unseen."""
    found, recorded = embedded_answer(), json.loads(RECORDED.read_text(encoding="utf-8"))["emoji"]
    if found["seal"] != recorded["seal"]:
        pytest.fail(
            "the embedded attributor was made anew: look at its answers, then run `python -m tests.attributor.test_golden`"
        )
    assert_same(found, recorded)


if __name__ == "__main__":
    every = json.loads(RECORDED.read_text(encoding="utf-8"))
    RECORDED.write_text(
        json.dumps({**every, "emoji": embedded_answer()}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
