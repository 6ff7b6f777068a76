"""The NumPy student against the one that torch trains."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from fastattr.core.errors import ArtifactDamagedError
from fastattr.students.distill import load_student, save_student
from fastattr.students.light import LightStudent
from fastattr.students.student import Student, StudentConfig, embed


@pytest.mark.parametrize(
    "shape",
    [
        StudentConfig(embed_dim=6, hidden=(10, 9)),
        StudentConfig(embed_dim=6, hidden=(), linear_path=False, input_norm=True),
        StudentConfig(embed_dim=6, hidden=(10,), dropout=0.3),
    ],
)
def test_light_student_is_the_student_that_torch_trains(shape: StudentConfig, tmp_path: Path):
    """The index holds torch's embeddings; every path of the network must be used."""
    torch.manual_seed(0)
    student = Student(7, shape)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    save_student(student, tmp_path / "model.safetensors")
    light = LightStudent(tmp_path / "model.safetensors", feature_dim=7, config=json.loads(json.dumps(asdict(shape))))
    original = load_student(tmp_path / "model.safetensors", feature_dim=7, config=shape)
    features = np.random.default_rng(1).normal(size=(5, 7)).astype(np.float32)
    np.testing.assert_allclose(light.embed(features), embed(original, features), atol=1e-6)
    similarity = np.linspace(-1, 1, 5)
    expected = torch.sigmoid(original.logits(torch.from_numpy(similarity))).detach().numpy()
    np.testing.assert_allclose(light.closeness(similarity), expected, atol=1e-6)


def test_light_student_refuses_a_file_of_another_shape(tmp_path: Path):
    """Missing or extra weights that are passed over would answer with another network."""
    save_student(Student(7, StudentConfig(embed_dim=6, hidden=(10,))), tmp_path / "model.safetensors")
    for other in (StudentConfig(embed_dim=6, hidden=(10, 10)), StudentConfig(embed_dim=6, hidden=(10,), linear_path=False)):
        with pytest.raises(ArtifactDamagedError, match="not the student"):
            LightStudent(tmp_path / "model.safetensors", feature_dim=7, config=asdict(other))
