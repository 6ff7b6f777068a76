"""The student's benchmark on the tiny line."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from fastattr import FastAttributor
from fastattr.core.errors import InputError
from fastattr.core.files import read_json, write_json
from fastattr.publishing.cards import benchmark_tables

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("student")
    sys.path.remove(str(BENCHMARKS))


def test_the_check_is_measured_and_fills_the_document(benchmark, tiny_run: Path, monkeypatch):
    """A benchmark that fails at its end has cost hours."""
    real = benchmark.read_features  # six training queries are too few for the density of own images
    monkeypatch.setattr(benchmark, "read_features", lambda paths, ids: np.concatenate([real(paths, ids)] * 2))
    results = benchmark.measure_foreign(tiny_run, seed=0)
    assert {"foreign_false_alarms", "foreign_missed_noise"} <= set(results)
    assert not [name for name, value in results.items() if not isinstance(value, str | int | float | bool)]
    facts = {"command": "x", "seed": 0, "cpu": "x", "cores": 2, "date": "2026-01-01T00:00:00"}
    lines = benchmark.parts_of({**results, **facts})
    document = (BENCHMARKS.parent / "docs" / "student.md").read_text(encoding="utf-8")
    for name in lines:
        assert f"<!-- {name} -->" in document
        assert f"<!-- end {name} -->" in document


def test_the_card_shows_the_benchmarks_figures_once(benchmark, tiny_run: Path, tmp_path: Path):
    """A card of last month's figures beside this month's, or an attributor that no longer opens, would help no one."""
    card, folder = benchmark, tmp_path / "attributor"
    shutil.copytree(tiny_run / "attributor", folder)
    results = {key: 0.5 + number / 100 for number, key in enumerate(card.MEANINGS)} | {"seed": 7, "date": "2026-01-02T00:00:00"}
    for found in (results | {"gap_closed_lds": 0.1}, results):
        write_json(tmp_path / "results.json", found)
        card.main(["--card", str(folder), "--json", str(tmp_path / "results.json")])
    metrics = FastAttributor.from_pretrained(folder).info()["metrics"]
    assert [run["command"] for run in metrics["benchmarks"]] == [card.COMMAND]
    assert {**metrics, "benchmarks": []} == {**read_json(tiny_run / "attributor" / "metrics.json"), "benchmarks": []}
    text = "\n".join(benchmark_tables(metrics))
    assert f"`{card.COMMAND}`, seed 7, 2026-01-02" in text
    assert all(f"| `{key}` | {results[key]:.4g} | {meaning} |" in text for key, meaning in card.MEANINGS.items())
    del results["gap_closed_lds"]
    with pytest.raises(InputError, match="lack gap_closed_lds"):
        card.write_card(folder, results)
