"""Two processes of `accelerate launch` give what one gives."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from fastattr.core.files import read_json
from fastattr.core.processes import split_between
from fastattr.features import stage as features
from fastattr.features.candidates import read_candidates
from fastattr.generators.queries import Queries
from fastattr.pipeline.config import load_config
from fastattr.teachers.scores import read_scores
from tests.launch import on_two_processes

LAUNCH = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
"""`--cpu --num_processes 2` would silently run one process; with ACCELERATE_USE_CPU this runs two, by gloo."""


def test_a_build_on_two_processes_makes_what_one_makes(tiny_run: Path, tiny_config: Path, tmp_path: Path):
    """A query lost between processes, noise drawn per process, or a student that depends on their number would only show at
    scale. The trainings, whose draws depend on the number of processes, are taken over.
    """
    again = tmp_path / "run"
    kept = ("autoencoder", "generator", "encoder", "corpus")
    shutil.copytree(tiny_run, again, ignore=lambda folder, names: set(names) - set(kept) if Path(folder) == tiny_run else set())
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH.split(), "-m", "fastattr"]
    command += ["build", str(tiny_config), "--run", str(again), "--no-plan"]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    assert read_json(again / "scores" / "manifest.json")["processes"] == 2
    ours, theirs = Queries(again / "queries"), Queries(tiny_run / "queries")
    assert ours.table.drop_columns(["image"]).equals(theirs.table.drop_columns(["image"]))
    assert read_candidates(again / "candidates").keys() == read_candidates(tiny_run / "candidates").keys()
    for one, other in zip(read_scores(again / "scores"), read_scores(tiny_run / "scores"), strict=True):
        assert (one.query_id, one.image_ids) == (other.query_id, other.image_ids)
        np.testing.assert_allclose(one.influence, other.influence, atol=1e-5)
        assert np.abs(one.influence).max() > 0
    students = [load_file(folder / "student" / "model.safetensors") for folder in (again, tiny_run)]
    for name, value in students[0].items():
        np.testing.assert_allclose(value, students[1][name], atol=2e-3)
    assert (again / "report" / "index.html").exists()


def _encode_features(config_path: str, run_dir: str) -> None:
    features.PART_ROWS = 20  # 48 images: three parts
    features.run(load_config(Path(config_path)).features, Path(run_dir))


def test_features_are_the_same_to_the_bit_on_two_processes(tiny_run: Path, tiny_config: Path, tmp_path: Path, monkeypatch):
    """Rows of two processes put together in another order would give every image another's features."""
    monkeypatch.setattr(features, "PART_ROWS", features.PART_ROWS)  # put back afterwards
    for name in ("one", "two"):
        shutil.copytree(tiny_run, tmp_path / name, ignore=shutil.ignore_patterns("features", "query_features", "encoded"))
    _encode_features(str(tiny_config), str(tmp_path / "one"))
    on_two_processes(_encode_features, tiny_config, tmp_path / "two")
    for folder in sorted((tmp_path / "one" / "features").iterdir()):
        other = tmp_path / "two" / "features" / folder.name
        assert [read_json(each / "manifest.json")["processes"] for each in (folder, other)] == [1, 2]
        np.testing.assert_array_equal(np.load(folder / "features.npy"), np.load(other / "features.npy"))
        assert (folder / "ids.parquet").read_bytes() == (other / "ids.parquet").read_bytes()


class TwoProcesses:
    """The second of two processes; the first does its part of the work as soon as both have come to a meeting."""

    def __init__(self, done: set[int]) -> None:
        self.done = done
        self.meetings = 0

    def wait_for_everyone(self) -> None:
        self.meetings += 1
        if self.meetings == 1:
            self.done |= {0, 1}

    @contextmanager
    def split_between_processes(self, todo: list[int]):
        yield todo[len(todo) // 2 :]


def test_nobody_starts_before_all_have_listed_the_work():
    """A process that lists what is missing after another has begun would take another's part, and leave its own undone."""
    done: set[int] = set()
    everything = TwoProcesses(done)
    with split_between(everything, [item for item in range(4) if item not in done]) as mine:
        assert everything.meetings == 1
        done |= set(mine)
    assert done == {0, 1, 2, 3}
    assert everything.meetings == 2
    with split_between(None, [1, 2]) as mine:
        assert mine == [1, 2]
