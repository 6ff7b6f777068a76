"""The embedded emoji models: present, whole, in colour, and within their size."""

from __future__ import annotations

import colorsys
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from fastattr import FastAttributor, Generator
from fastattr.core.models import ASSETS
from fastattr.corpus.images import load_rgb
from fastattr.generators.scratch.autoencoder import pixel_tensor


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator.from_pretrained("emoji")


@pytest.fixture(scope="module")
def attributor() -> FastAttributor:
    return FastAttributor.from_pretrained("emoji")


@pytest.mark.parametrize(
    "colour", ["#e60000", "#cc1020", "#ff3020", "#0010e6", "#1040d0", "#2060ff", "#00a000", "#10c030", "#40d020"]
)
def test_autoencoder_keeps_saturated_hues(generator: Generator, colour: str):
    """Muddy latents turn red into orange, and every attribution of a red thing with it."""
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((8, 8, 55, 55), fill=colour)
    vae = generator.pipeline.vae
    with torch.no_grad():
        back = vae(pixel_tensor(np.array(image)[None])).sample
    middle = ((back[0, :, 24:40, 24:40].mean(dim=(1, 2)).clamp(-1, 1) + 1) / 2).tolist()
    wanted, found = colorsys.rgb_to_hsv(*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))), colorsys.rgb_to_hsv(*middle)
    turn = abs(wanted[0] - found[0])
    assert min(turn, 1 - turn) * 360 < 12
    assert found[1] > 0.75 * wanted[1]


def test_generator_and_attributor_belong_together(generator: Generator, attributor: FastAttributor):
    """An attributor distilled from another generator answers fluently and wrongly."""
    assert attributor.config["generator_fingerprint"] == generator.fingerprint


def test_a_training_image_finds_itself(attributor: FastAttributor):
    """Thumbnails are lossy, so the first three places count here; the benchmark takes the originals."""
    catalog = attributor.catalog.to_pylist()
    rows = np.random.default_rng(0).choice(len(catalog), 20, replace=False)
    found = 0
    for row in rows:
        record = catalog[row]
        answer = attributor.attribute(load_rgb(record["thumbnail"]), record["caption"], k=3)
        found += record["image_id"] in {result.image_id for result in answer.results}
    assert found >= 17


def test_assets_are_at_most_40_mb_and_hold_no_pickle():
    """They are part of the package that everyone downloads."""
    files = [path for path in (ASSETS / "emoji").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert not {path.suffix for path in files} & {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


def test_every_stage_is_in_the_manifest():
    """'Rebuilt by one command, with a manifest of how'."""
    manifest = json.loads((ASSETS / "emoji" / "manifest.json").read_text())
    assert manifest["command"].startswith("fastattr build hub_scripts/configs/emoji.yaml")
    assert set(manifest["stages"]) >= {
        "corpus",
        "autoencoder",
        "generator",
        "encoder",
        "queries",
        "candidates",
        "scores",
        "student",
        "evaluation",
    }


def test_every_training_image_has_creator_licence_and_source(attributor: FastAttributor):
    """An image without a name can't be credited."""
    for column in ("image_id", "caption", "creator", "license", "source"):
        assert "" not in attributor.catalog[column].to_pylist()


def test_command_line_attributes_with_the_embedded_model(tmp_path: Path):
    """A fresh process, as a user starts it: JSON on stdout, nothing else there."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "x.png")
    command = [sys.executable, "-m", "fastattr", "attribute", "emoji", "--image", str(tmp_path / "x.png")]
    command += ["--prompt", "red heart, openmoji style", "--top-k", "10", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)["results"]) == 10
