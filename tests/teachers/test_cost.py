"""The teacher's costs: what they count is what it then spends."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fastattr.generators.generator import Generator
from fastattr.pipeline.config import load_config
from fastattr.pipeline.stages import STAGES
from fastattr.teachers.config import TeacherConfig
from fastattr.teachers.cost import Probe, Sizes, Step, teacher_plan
from tests.sizes import sizes_of_run

NOTHING = Probe(loaded=0, backward=0)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"linearised": ()},
        {"linearised": ("train", "validation", "test"), "gradients": "stored", "gradient_width": 8},
        {"curvature": "diagonal", "symmetric": True, "mirrored": True, "captions": "all"},
        {"unlearning_steps": 2, "memory_gb": 1e-4},
        {"method": "d-trak", "gradient_width": 8},
        {"method": "averaged", "memory_gb": 1e-9, "gradient_width": 8},
    ],
)
def test_planned_evaluations_are_those_spent(tiny_run: Path, tiny_config: Path, tmp_path: Path, changed: dict[str, object]):
    """A plan that forgets a pass would promise days for weeks."""
    run_dir = tmp_path / "run"
    shutil.copytree(tiny_run, run_dir)
    for stage in ("scores", "ekfac", "base_loss"):
        shutil.rmtree(run_dir / stage)
    config = load_config(tiny_config)
    teacher = replace(config.teacher, **changed)
    generator = Generator.from_pretrained(run_dir / "generator")
    steps = teacher_plan(teacher, sizes_of_run(teacher, run_dir, generator), NOTHING)
    spent = STAGES["teach"](replace(config, teacher=teacher), run_dir)["evaluations"]
    planned = {name: sum(getattr(step, name) for step in steps) for name in ("forward", "backward")}
    assert spent == planned


def test_memory_grows_with_what_is_held():
    """Each array must count once: the corpus, and the steps of the queries that share a pass."""
    sizes = Sizes(
        images=1000,
        captions=1000,
        latent=100,
        conditioning=50,
        parameters=10_000,
        factors=0,
        exact=(),
        linearised=(500,) * 80,
        union=900,
    )
    config = TeacherConfig(linearised=("train",), gradients="contracted", batch_size=4)

    def last(config: TeacherConfig, sizes: Sizes) -> Step:
        return teacher_plan(config, sizes, NOTHING)[-1]

    held = last(config, sizes).memory
    assert last(config, replace(sizes, latent=200)).memory - held == 1000 * 100 * 4
    assert last(config, replace(sizes, linearised=(500,) * 81)).memory - held == 10_000 * 4 + 900 * 4 + 8 * 512
    one_at_a_time = last(replace(config, memory_gb=1e-6), sizes)
    assert held - one_at_a_time.memory == 79 * (10_000 * 4 + 900 * 4 + 8 * 512)
    assert one_at_a_time.forward == 80 * (config.query_draws + 900 * config.loss_draws)
