"""What the page shows beyond an attributor's answers: drawings on record and queries drawn by retrained models."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastattr import ArtifactDamagedError, FastAttributor, Generator, MissingFileError
from fastattr.attributor.load import read_info
from fastattr.core.stages import write_manifest
from fastattr.evaluation.showcase import (
    COUNTERFACTUALS,
    COUNTERFACTUALS_FILE,
    GENERATED,
    GENERATED_FILE,
    main,
    pack_counterfactuals,
    read_table,
)
from fastattr.evaluation.truth import LOSSES, MODELS, GroundTruth, counterfactuals_schema, write_table
from fastattr.generators.queries import query_schema

QUERIES = ("test-000000", "test-000001", "test-000002")


def _picture(number: int) -> bytes:
    """A PNG that is known by its colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 2 * number, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def _colour(picture: bytes) -> int:
    return Image.open(io.BytesIO(picture)).getpixel((0, 0))[0]


@pytest.fixture
def truth(tmp_path: Path) -> GroundTruth:
    """A ground truth of three queries: all three drawn again without each method's images, but the last not by 'student'."""
    folder = tmp_path / "truth"
    folder.mkdir()
    pq.write_table(pa.table({"image_id": [f"image-{i}" for i in range(10)]}), folder / "images.parquet")
    queries = [
        {"query_id": query, "prompt": f"prompt {row}", "image": {"bytes": _picture(row), "path": None}, "seed": 100 + row}
        | {"steps": 2, "guidance": 2.0, "scheduler": "", "generator": "", "split": "test", "kind": "caption"}
        for row, query in enumerate(QUERIES)
    ]
    pq.write_table(pa.Table.from_pylist(queries, schema=query_schema()), folder / "queries.parquet")
    models = [{"model_id": "full", "kind": "full", "seed": 0, "subset": "full", "method": "", "removed_image_ids": []}]
    drawn = []
    for number, method in enumerate(("student", "similarity_both", "random-01", "random-00")):
        for row, query in enumerate(QUERIES):
            model = method if method.startswith("random") else f"{method}-{query}"
            if (method, row) == ("student", 2):
                continue
            if model not in {known["model_id"] for known in models}:
                removed = [f"image-{i}" for i in range(number + 1)]
                models.append(
                    {"model_id": model, "kind": "x", "seed": 0, "subset": model, "method": "", "removed_image_ids": removed}
                )
            drawn.append(
                {
                    "model_id": model,
                    "method": method.split("-")[0],
                    "query_id": query,
                    "loss": 1.0 + number + row / 10,
                    "mse": 0.0,
                    "similarity": 0.0,
                    "image": {"bytes": _picture(10 * (number + 1) + row), "path": None},
                }
            )
    write_table(folder / "models.parquet", models, MODELS)
    losses = [{"model_id": "full", "query_id": query, "loss": 0.5 + row / 10} for row, query in enumerate(QUERIES)]
    write_table(folder / "losses.parquet", losses, LOSSES)
    write_table(folder / "counterfactuals.parquet", drawn, counterfactuals_schema())
    write_manifest(folder, stage="ground_truth", config={}, inputs={}, corpus_fingerprint="x")
    return GroundTruth(folder)


def test_counterfactuals_keep_each_image_with_its_own_model_and_loss(truth: GroundTruth):
    """A row joined by position instead of by query and method would show the wrong model's picture."""
    found = {(row["method"], row["query_id"]): row for row in pack_counterfactuals(truth).to_pylist()}
    assert [key[1] for key in found] == [QUERIES[0]] * 3 + [QUERIES[1]] * 3
    for number, method in ((0, "influence"), (1, "similarity"), (3, "random")):
        for row, query in enumerate(QUERIES[:2]):
            expected = {
                "query_id": query,
                "prompt": f"prompt {row}",
                "seed": 100 + row,
                "method": method,
                "removed": number + 1,
                "of": 10,
                "loss_before": pytest.approx(0.5 + row / 10),
                "loss_after": pytest.approx(1.0 + number + row / 10),
            }
            own = dict(found[method, query])
            assert (_colour(own.pop("original")), _colour(own.pop("image"))) == (row, 10 * (number + 1) + row)
            assert own == expected


def test_ground_truth_without_images_is_refused_in_words(truth: GroundTruth):
    """The first ground truths kept distances only; an empty section would look like a result."""
    truth.counterfactuals = truth.counterfactuals.drop(columns="image")
    with pytest.raises(MissingFileError, match="no column 'image'"):
        pack_counterfactuals(truth)


def test_unknown_method_is_refused_in_words(truth: GroundTruth):
    """A misspelt method must not leave out a column."""
    with pytest.raises(MissingFileError, match="no query"):
        pack_counterfactuals(truth, {"influence": "studnet", "random": "random"})


def test_attached_files_travel_with_the_attributor(truth: GroundTruth, tiny_run: Path, tmp_path: Path):
    """A file without a checksum in config.json is neither pushed nor saved nor fetched."""
    folder = tmp_path / "attributor"
    shutil.copytree(tiny_run / "attributor", folder)
    assert main(["counterfactuals", str(folder), "--truth", str(truth.folder)]) == 0
    assert COUNTERFACTUALS_FILE in read_info(folder)["files"]
    attributor = FastAttributor.from_pretrained(folder)
    attributor.save_pretrained(tmp_path / "saved")
    path = FastAttributor.from_pretrained(tmp_path / "saved").file(COUNTERFACTUALS_FILE)
    assert path is not None
    assert read_table(path, COUNTERFACTUALS).equals(pack_counterfactuals(truth))
    assert FastAttributor.from_pretrained(tiny_run / "attributor").file(COUNTERFACTUALS_FILE) is None
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactDamagedError):
        FastAttributor.from_pretrained(tmp_path / "saved")


def test_drawings_on_record_can_be_made_again(tiny_run: Path, tmp_path: Path):
    """A ranking kept beside another prompt, seed or image would say that a training image influences what it does not."""
    folder = tmp_path / "attributor"
    shutil.copytree(tiny_run / "attributor", folder)
    assert main(["generated", str(folder), "--generator", str(tiny_run / "generator"), "--count", "5", "--first", "7"]) == 0
    attributor = FastAttributor.from_pretrained(folder)
    rows = read_table(attributor.file(GENERATED_FILE), GENERATED).to_pylist()
    assert len({row["prompt"] for row in rows}) == 5
    generator = Generator.from_pretrained(tiny_run / "generator")
    for row in rows:
        image = generator.generate(row["prompt"], seed=row["seed"], steps=row["steps"], guidance=row["guidance"])
        expected = [result.image_id for result in attributor.attribute(image, row["prompt"], k=7).results]
        # Alone or in a batch the last bit may differ, and with it the order of two near-equals.
        assert len(set(row["image_ids"]) & set(expected)) >= 6
        kept = np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB"), dtype=float)
        assert np.abs(kept - np.asarray(image, dtype=float)).mean() < 25  # WebP of a small noisy image


def test_file_of_another_kind_is_refused(tmp_path: Path):
    """A file swapped for another would fail later, at a visitor's click."""
    pq.write_table(pa.table({"x": [1]}), tmp_path / GENERATED_FILE)
    with pytest.raises(ArtifactDamagedError, match="has the columns"):
        read_table(tmp_path / GENERATED_FILE, GENERATED)
