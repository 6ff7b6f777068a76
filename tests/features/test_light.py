"""The NumPy encoders and students against open_clip and torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastattr.core.errors import ArtifactDamagedError
from fastattr.core.models import ASSETS
from fastattr.features.features import OpenClipEncoder
from fastattr.features.light import CONFIG, LightClip, LightStudent, supports
from fastattr.students.distill import load_student, save_student
from fastattr.students.student import Student, StudentConfig, embed

EMOJI = ASSETS / "emoji" / "attributor" / "encoder"
SIZES = [(64, 64), (100, 37), (31, 200)]
TEXTS = [["red heart, openmoji style", "heart"], ["Caf&eacute;  au   lait 👍"], ["a very long caption " * 20, "x", "y z"]]


@pytest.mark.parametrize("captions", ["first", "mean"])
@pytest.mark.parametrize("modality", ["image", "text"])
def test_light_clip_is_the_clip_that_open_clip_loads(modality: str, captions: str):
    """The corpus was encoded by open_clip: a query encoded a little otherwise would be ranked against shifted features."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]
    light, original = LightClip(EMOJI, modality, captions=captions), OpenClipEncoder(str(EMOJI), modality, captions=captions)
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


@pytest.mark.parametrize(
    "shape",
    [
        StudentConfig(embed_dim=6, hidden=(10, 9)),
        StudentConfig(embed_dim=6, hidden=(), linear_path=False, input_norm=True),
        StudentConfig(embed_dim=6, hidden=(10,), separate_heads=True, popularity=True, dropout=0.3),
    ],
)
def test_light_student_is_the_student_that_torch_trains(shape: StudentConfig, tmp_path: Path):
    """The index holds torch's embeddings; the query head alone must be used for queries, and every path of the network."""
    torch.manual_seed(0)
    student = Student(7, shape)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    save_student(student, tmp_path / "model.safetensors")
    light = LightStudent(tmp_path / "model.safetensors", feature_dim=7, config=json.loads(json.dumps(asdict(shape))))
    original = load_student(tmp_path / "model.safetensors", feature_dim=7, config=shape)
    features = np.random.default_rng(1).normal(size=(5, 7)).astype(np.float32)
    np.testing.assert_allclose(light.embed_queries(features), embed(original, features, query=True), atol=1e-6)
    np.testing.assert_allclose(light.embed_images(features), embed(original, features), atol=1e-6)
    similarity = np.linspace(-1, 1, 5)
    expected = torch.sigmoid(original.logits(torch.from_numpy(similarity))).detach().numpy()
    np.testing.assert_allclose(light.closeness(similarity), expected, atol=1e-6)


def test_light_student_refuses_a_file_of_another_shape(tmp_path: Path):
    """Missing or extra weights that are passed over would answer with another network."""
    save_student(Student(7, StudentConfig(embed_dim=6, hidden=(10,))), tmp_path / "model.safetensors")
    for other in (StudentConfig(embed_dim=6, hidden=(10, 10)), StudentConfig(embed_dim=6, hidden=(10,), linear_path=False)):
        with pytest.raises(ArtifactDamagedError, match="not the student"):
            LightStudent(tmp_path / "model.safetensors", feature_dim=7, config=asdict(other))


def test_an_answer_of_the_embedded_model_imports_neither_torch_nor_open_clip():
    """One import at the top of a module on the way would cost every first answer seconds, and no test would fail."""
    code = """
import sys
from PIL import Image
from fastattr import FastAttributor
answer = FastAttributor.from_pretrained("emoji").attribute(Image.new("RGB", (64, 64), "red"), "red heart", k=3)
answer.shares()
print([name for name in ("torch", "open_clip", "diffusers", "transformers", "datasets", "accelerate") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
