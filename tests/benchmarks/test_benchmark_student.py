"""The student's benchmarks: reliability by hand, both ways of training on the same pairs, and every part on the tiny line."""

from __future__ import annotations

import importlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastattr import FastAttributor
from fastattr.core.errors import InputError
from fastattr.core.files import read_json, write_json
from fastattr.publishing.tables import benchmark_tables
from fastattr.students.student import Student, StudentConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("student")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def study(benchmark):
    return importlib.import_module("distill_study")


def test_reliability_of_a_hand_computed_case(benchmark):
    """Two bins of equal weight: (0.1, 0.2) foretold and (0.3, 0.0) found, then 0.6 foretold and 0.9 found."""
    expected, actual = np.array([0.1, 0.2, 0.6]), np.array([0.3, 0.0, 0.9])
    points, error = benchmark.reliability(expected, actual, np.array([1.0, 1.0, 2.0]), bins=2)
    np.testing.assert_allclose(points[:, :2], [[0.15, 0.15], [0.6, 0.9]])
    assert error == pytest.approx(0.5 * 0.0 + 0.5 * 0.3)


def test_both_ways_of_training_take_the_same_step_on_the_same_pairs(benchmark):
    """Speeds of two different losses would compare nothing."""
    rng = np.random.default_rng(0)
    queries, images = (torch.from_numpy(rng.standard_normal((count, 8)).astype(np.float32)) for count in (3, 5))
    targets = torch.from_numpy(rng.random((3, 5)).astype(np.float32))
    students = []
    for _ in range(2):
        torch.manual_seed(0)
        student = Student(8, StudentConfig(embed_dim=4, hidden=(6,), linear_path=False))
        students.append((student, torch.optim.SGD(student.parameters(), lr=1.0)))
    benchmark.pair_step(*students[0], queries.repeat_interleave(5, 0), images.repeat(3, 1), targets.flatten())
    benchmark.block_step(*students[1], queries, images, targets, torch.ones(3, 5))
    for first, second in zip(students[0][0].parameters(), students[1][0].parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


def test_every_part_runs_and_fills_the_document(benchmark, tiny_run: Path, tmp_path: Path):
    """A part that fails after hours of the others has cost them, too."""
    tables = benchmark.open_tables(tiny_run, tmp_path)
    sizes = replace(benchmark.QUICK, steps=2, paper_seconds=0.2, speed_images=300, speed_candidates=40, speed_width=16)
    results = benchmark.measure_tables(tables, sizes, tmp_path)
    results |= benchmark.measure_time_to_equal(tables, replace(sizes, steps=20))
    for space in tables.images:  # six training queries are too few for the density of own images
        tables.queries[space, "train"] = np.concatenate([tables.queries[space, "train"]] * 2)
    best = tables.students[results["best_student"]]
    results |= benchmark.measure_degrees(tables, best, tiny_run, sizes, tmp_path)
    promised = {"map_half_pct", "map_1pct", "map_4pct", "time_to_equal_map_ratio", "share_calibration_error"}
    assert promised <= set(results)
    assert not [name for name, value in results.items() if not isinstance(value, str | int | float | bool)]
    assert (tmp_path / "student-shares.png").exists()
    facts = {"command": "x", "seed": 0, "cpu": "x", "cores": 2, "date": "2026-01-01T00:00:00"}
    speed = {"pairs_per_second_paper": 1.0, "pairs_per_second_ratio": 2.0}
    lines = benchmark.lines_of({**results, **speed, **facts})
    document = (BENCHMARKS.parent / "docs" / "student.md").read_text(encoding="utf-8")
    assert set(lines) == {"speed", "tables", "equal", "hubs", "degrees", "foreign"}
    for name in lines:
        assert f"<!-- {name} -->" in document
        assert f"<!-- end {name} -->" in document


def test_the_card_shows_the_benchmarks_figures_once(benchmark, tiny_run: Path, tmp_path: Path):
    """A card of last month's figures beside this month's, or an attributor that no longer opens, would help no one."""
    card, folder = importlib.import_module("card"), tmp_path / "attributor"
    shutil.copytree(tiny_run / "attributor", folder)
    results = {key: 0.5 + number / 100 for number, key in enumerate(card.MEANINGS)} | {"seed": 7, "date": "2026-01-02T00:00:00"}
    for found in (results | {"gap_closed_lds": 0.1}, results):
        write_json(tmp_path / "results.json", found)
        card.main([str(folder), "--results", str(tmp_path / "results.json")])
    metrics = FastAttributor.from_pretrained(folder).info()["metrics"]
    assert [run["command"] for run in metrics["benchmarks"]] == [card.COMMAND]
    assert {**metrics, "benchmarks": []} == {**read_json(tiny_run / "attributor" / "metrics.json"), "benchmarks": []}
    text = "\n".join(benchmark_tables(metrics))
    assert f"`{card.COMMAND}`, seed 7, 2026-01-02" in text
    assert all(f"| `{key}` | {results[key]:.4g} | {meaning} |" in text for key, meaning in card.MEANINGS.items())
    del results["map_1pct"]
    with pytest.raises(InputError, match="lacks map_1pct"):
        card.card_rows(results)


def test_the_best_student_is_chosen_without_the_test_queries(benchmark, tiny_run: Path, tmp_path: Path):
    """The best of fourteen on the test queries would look better than it is."""
    sizes = replace(benchmark.QUICK, steps=2)
    chosen = []
    for shuffled in (False, True):
        tables = benchmark.open_tables(tiny_run, tmp_path)
        if shuffled:
            tables.scored["test"] = [replace(query, influence=query.influence[::-1].copy()) for query in tables.scored["test"]]
        results = benchmark.measure_tables(tables, sizes, tmp_path)
        chosen.append((results["best_student"], {key: value for key, value in results.items() if key.startswith("validation")}))
    assert chosen[0] == chosen[1]


def test_a_study_cuts_queries_and_candidates_as_its_label_says(benchmark, study, tiny_run: Path, tmp_path: Path):
    """A point at '125 candidates' that saw them all would draw a flat curve."""
    tables = benchmark.open_tables(tiny_run, tmp_path)
    sizes = replace(benchmark.QUICK, steps=2)
    all_cases = study.cases(tables, sizes)
    assert {case.study for case in all_cases} == set(study.STUDIES) - {"queries", "candidates", "budget"}  # too few here
    query, rows = tables.scored["train"][0], tables.rows["train"][0]
    few = replace(all_cases[0], candidates=5)
    part, kept = study.cut(query, rows, few, np.random.default_rng(0))
    assert len(part.image_ids) == len(kept) == len(part.influence) == 5
    influence = dict(zip(query.image_ids, query.influence.tolist(), strict=True))
    assert [influence[image_id] for image_id in part.image_ids] == part.influence.tolist()
    assert [tables.corpus.image_ids[row] for row in kept] == part.image_ids
    without = next(case for case in all_cases if not case.keep_outsiders)
    assert not study.cut(query, rows, without, np.random.default_rng(0))[0].is_outsider.any()
    results = {f"{case.study}/{case.label}/0": study.run_case(tables, case, 0) for case in all_cases[:2]}
    found = study.summary(tables, results)
    study.figure(found, all_cases, tmp_path / "study.png")
    assert found["features_image_map_1pct"] == results["features/image/0"]["1pct"]
