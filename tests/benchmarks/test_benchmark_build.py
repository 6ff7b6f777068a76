"""The build's benchmark: its config is a user's, and its comparisons notice what they are to notice."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import build as benchmark

from fastattr.corpus.emoji import ICONIFY, OPENMOJI
from fastattr.pipeline.config import load_config


@pytest.mark.parametrize("sizes", [benchmark.FULL, benchmark.QUICK])
def test_the_config_has_ten_lines_and_is_valid(tmp_path: Path, sizes: dict[str, int]):
    """The promise is ten lines, and a config that is refused would show only after the LoRA is trained."""
    text = benchmark.CONFIG.format(folder=tmp_path, **sizes)
    (tmp_path / "studio.yaml").write_text(text)
    assert len(text.splitlines()) == 10
    assert load_config(tmp_path / "studio.yaml").generator.unlearn == "lora"


def test_the_pictures_are_none_that_the_generator_was_made_from():
    """A generator that knows the pictures already would make the LoRA's attribution look easy."""
    packages = {each.package.rpartition("@")[0] for each in (OPENMOJI, *ICONIFY)}
    assert not packages & {each.package.rpartition("@")[0] for each in benchmark.SETS}


def test_a_changed_byte_or_score_is_noticed(tiny_run: Path, tmp_path: Path):
    """'Identical after a kill' must not be said of folders that differ."""
    shutil.copytree(tiny_run / "scores", tmp_path / "scores")
    same = benchmark.same_scores(tmp_path, tiny_run)
    assert same == {"same_rows": True, "difference": 0.0}
    assert benchmark.contents(tmp_path / "scores") == benchmark.contents(tiny_run / "scores")
    path = next((tmp_path / "scores").glob("test-*.parquet"))
    table = pq.read_table(path)
    influence = pa.array([[1.01 * value for value in row] for row in table["influence"].to_pylist()], pa.list_(pa.float32()))
    pq.write_table(table.set_column(table.schema.get_field_index("influence"), "influence", influence), path)
    assert benchmark.same_scores(tmp_path, tiny_run)["difference"] > 0
    assert benchmark.contents(tmp_path / "scores") != benchmark.contents(tiny_run / "scores")
