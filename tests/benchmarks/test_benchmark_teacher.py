"""The teacher's benchmark: its measures on cases known by hand, and that it runs the processes it says."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import teacher as benchmark

from fastattr.teachers.config import TeacherConfig
from fastattr.teachers.cost import Probe, Sizes as PlanSizes, teacher_plan


def test_agreement_of_equal_and_of_opposite_orders():
    """A sign or an axis lost here would be reported as a failing teacher, or as a perfect one."""
    scores = np.random.default_rng(0).normal(size=(5, 400))
    same = benchmark.agreement("x", scores, 3 * scores + 1, seed=0)
    assert same["spearman_x"] == same["spearman_x_low"] == pytest.approx(1)
    assert same["top1pct_overlap_x"] == 1
    assert same["queries_x"] == 5
    opposite = benchmark.agreement("x", scores, -scores, seed=0)
    assert opposite["spearman_x"] == pytest.approx(-1)
    assert opposite["top1pct_overlap_x"] == 0


def test_top_1_percent_counts_the_shared_part():
    first = np.arange(200.0)[None]
    second = first.copy()
    second[0, 198] = -1  # of the two best, one stays
    assert benchmark.agreement("x", first, second, seed=0)["top1pct_overlap_x"] == 0.5


def evaluations(config: TeacherConfig, sizes: PlanSizes) -> int:
    """Latents through the network, forward or backward, for all queries, without fitting the curvature."""
    steps = teacher_plan(config, sizes, Probe(loaded=0, backward=0))
    return sum(step.forward + step.backward for step in steps if step.name != "factors")


def test_evaluations_are_counted_forward_and_backward():
    """10 queries of 30 images: exact 10 x (2 x 5 + 30 x 4) and the base loss of 100 x 4; first order one pass and the steps."""
    config = TeacherConfig(query_draws=5, loss_draws=4)
    shape = {"images": 100, "captions": 100, "latent": 1, "conditioning": 1, "parameters": 1, "factors": 0}
    exact = PlanSizes(**shape, exact=(30,) * 10, linearised=(), union=0)
    assert evaluations(config, exact) == 100 * 4 + 10 * (2 * 5 + 30 * 4)
    first = PlanSizes(**shape, exact=(), linearised=(30,) * 10, union=70)
    assert evaluations(config, first) == 2 * (10 * 5 + 70 * 4)
