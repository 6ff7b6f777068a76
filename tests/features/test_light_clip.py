"""The NumPy CLIP against open_clip."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastattr.core.models import ASSETS
from fastattr.features.light_clip import CONFIG, LightClip, supports
from fastattr.features.pretrained import DEFAULTS, open_clip_encoder

EMOJI = ASSETS / "emoji" / "attributor" / "encoder"
SIZES = [(64, 64), (100, 37), (31, 200)]
TEXTS = [["red heart, openmoji style", "heart"], ["Caf&eacute;  au   lait 👍"], ["a very long caption " * 20, "x", "y z"]]


@pytest.mark.parametrize("captions", ["first", "mean"])
@pytest.mark.parametrize("modality", ["image", "text"])
def test_light_clip_is_the_clip_that_open_clip_loads(modality: str, captions: str):
    """The corpus was encoded by open_clip: a query encoded a little otherwise would be ranked against shifted features."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]
    light, original = (
        LightClip(EMOJI, modality, captions=captions),
        open_clip_encoder(str(EMOJI), modality, replace(DEFAULTS, captions=captions)),
    )
    np.testing.assert_allclose(light.encode(images, TEXTS), original.encode(images, TEXTS), atol=1e-6)
    assert light.fingerprint == original.fingerprint


@pytest.mark.parametrize(
    ("part", "changed"), [("model_cfg", {"quick_gelu": True}), ("preprocess_cfg", {"resize_mode": "shortest"})]
)
def test_light_clip_leaves_other_shapes_to_open_clip(part: str, changed: dict[str, object], tmp_path: Path):
    """A setting that is not computed here must not be ignored."""
    shutil.copytree(EMOJI, tmp_path / "encoder")
    config = json.loads((EMOJI / CONFIG).read_text(encoding="utf-8"))
    config[part] |= changed
    (tmp_path / "encoder" / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    assert supports(EMOJI)
    assert not supports(tmp_path / "encoder")


def test_an_answer_of_the_embedded_model_imports_neither_torch_nor_open_clip():
    """One import at the top of a module on the way would cost every first answer seconds, and no test would fail."""
    code = """
import sys
from PIL import Image
from fastattr import FastAttributor
answer = FastAttributor.from_pretrained("emoji").attribute(Image.new("RGB", (64, 64), "red"), "red heart", k=3)
light = [name for name in ("pandas", "scipy.special", "pyarrow.dataset", "PIL.TiffImagePlugin") if name in sys.modules]
answer.shares()
heavy = ("torch", "open_clip", "diffusers", "transformers", "datasets", "accelerate")
print(light + [name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
