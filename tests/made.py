"""For tests of what finds images: an attributor without encoders whose student passes made features on as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from fastattr import FastAttributor
from fastattr.attributor.folder import write_table
from fastattr.attributor.inputs import COLUMNS
from fastattr.attributor.make import seal_folder
from fastattr.core.files import write_json
from fastattr.index.build import build
from fastattr.index.choose import IndexConfig
from fastattr.students.student import Student, StudentConfig
from tests.tiny import unit

WIDTH = 12
QUERY = unit(np.random.default_rng(99), WIDTH)


def write_attributor(folder: Path, *, rows: int = 60, factory: str = "SQfp16", shard_rows: int = 0, seed: int = 0) -> Path:
    """An attributor without encoders on made features: its student passes them on as they are."""
    config = IndexConfig(factory=factory, shard_rows=shard_rows)
    return attributor_of(base_features(rows, seed=seed), folder, config)


def attributor_of(
    embeddings: np.ndarray, folder: Path, index: IndexConfig, *, name: str = "base-{}", caption: str = "caption {}"
) -> Path:
    """The same on these (N, D) unit vectors; `name` and `caption` say what image number n is called."""
    import torch

    from fastattr.students.distill import save_student

    folder.mkdir(parents=True)
    rows, width = embeddings.shape
    config = StudentConfig(embed_dim=width, hidden=())
    student = Student(width, config)
    with torch.no_grad():
        student.linear.weight.copy_(torch.eye(width))
        student.linear.bias.zero_()
        student.mlp[-1].weight.zero_()
    save_student(student, folder / "model.safetensors")
    built = build(lambda start, stop: embeddings[start:stop], rows, width, index, folder)
    table = {name: [""] * rows for name in COLUMNS} | {
        "image_id": [name.format(row) for row in range(rows)],
        "creator": ["Ada" if row % 2 else "Bob" for row in range(rows)],
        "caption": [caption.format(row) for row in range(rows)],
    }
    files = {"catalog": write_table(pa.table(table), folder, "catalog")}
    write_json(folder / "metrics.json", {})
    seal_folder(
        folder,
        encoders=[],
        encoder_fingerprints=[],
        captions="first",
        feature_dim=width,
        student=vars(config),
        files=files,
        **built,
        corpus_fingerprint="made",
        generator_fingerprint="",
        teacher="none",
    )
    return folder


def base_features(rows: int, *, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed), rows, WIDTH)


def names(attributor: FastAttributor, feature: np.ndarray, k: int, **options: object) -> list[str]:
    """The image ids of an answer."""
    return [result.image_id for result in attributor.attribute_features(feature[None], ["x"], k, **options)[0].results]


def everything(attributor: FastAttributor, feature: np.ndarray) -> dict[str, float]:
    """All images with their similarities."""
    answer = attributor.attribute_features(feature[None], ["x"], len(attributor))[0]
    return {result.image_id: result.similarity for result in answer.results}
