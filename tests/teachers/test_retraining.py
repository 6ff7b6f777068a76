"""Retraining: models without some images correct a teacher, and only as far as they foretell models that are left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastattr import InputError
from fastattr.teachers.kernels import Retrained, cross_fitted, read_retrained, retraining_scores, ridge_scores

Q, N = 12, 20


def world(models: int, *, noise: float, seed: int = 0) -> tuple[np.ndarray, Retrained]:
    """(Q, N) true scores, and models whose log losses they determine but for noise."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(Q, N))
    truth -= truth.mean(axis=0)
    kept = rng.random((models, N)) < 0.5
    outputs = 0.05 * (kept @ truth.T + noise * rng.normal(size=(models, Q)))
    return truth, Retrained(kept, np.exp(-outputs), [str(model) for model in range(models)])


def agreement(scores: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([np.corrcoef(one, other)[0, 1] for one, other in zip(scores, truth, strict=True)]))


def test_many_models_find_what_no_teacher_knew():
    """Losses instead of their negative logs would turn every score round."""
    truth, retrained = world(200, noise=0.5)
    found, _ = retraining_scores(np.random.default_rng(1).normal(size=(Q, N)), retrained)
    assert agreement(found, truth) > 0.97


def test_a_good_teacher_is_kept_where_models_are_few():
    """Without the prior a handful of models says less than the teacher that they should correct."""
    truth, retrained = world(12, noise=2.0)
    teacher = truth + 0.5 * np.random.default_rng(2).normal(size=truth.shape)
    alone, _ = retraining_scores(teacher, retrained, priors=(0.0,))
    found, chosen = retraining_scores(teacher, retrained)
    assert chosen["prior"] > 0
    assert agreement(found, truth) > agreement(alone, truth) + 0.2
    more, _ = retraining_scores(teacher, world(200, noise=2.0)[1])
    assert agreement(more, truth) > agreement(teacher, truth)


def test_scores_are_those_of_the_dense_formula():
    """The dual form, over models, must give the primal one's numbers, prior and centring included."""
    truth, retrained = world(9, noise=1.0)
    memberships = retrained.kept - retrained.kept.mean(axis=0)
    outputs = -np.log(retrained.losses)
    outputs = outputs - outputs.mean(axis=0)
    scale = 0.7 * np.trace(memberships @ memberships.T) / 9
    found = ridge_scores(truth, retrained.kept.astype(float), outputs, 0.5, 0.7)
    for query in range(Q):
        foretold = memberships @ truth[query]
        factor = 0.5 * outputs[:, query].std() / foretold.std()
        rest = np.linalg.solve(
            memberships.T @ memberships + scale * np.eye(N), memberships.T @ (outputs[:, query] - factor * foretold)
        )
        np.testing.assert_allclose(found[query], factor * truth[query] + rest, rtol=1e-8, atol=1e-12)


def test_models_of_one_part_are_left_out_together():
    """A second seed of a part that was fitted on would be foretold by its twin."""
    truth, retrained = world(20, noise=1.0)
    twice = Retrained(
        np.concatenate([retrained.kept] * 2), np.concatenate([retrained.losses] * 2), [*retrained.subsets, *retrained.subsets]
    )
    for held in twice.folds():
        left = twice.without(held)
        assert set(left.subsets).isdisjoint({twice.subsets[row] for row in np.flatnonzero(held)})
        assert len(left.subsets) + held.sum() == 40
    assert np.sum(twice.folds(), axis=0).tolist() == [1] * 40
    foretold, outputs = cross_fitted(truth, twice), -np.log(twice.losses)
    assert agreement(foretold.T, (outputs - outputs.mean(axis=1, keepdims=True)).T) > 0.5


def test_models_are_read_by_id_and_only_with_all_losses(tmp_path: Path):
    """A column of another query or a row of another model would look like a loss."""
    models = [
        {"model_id": "b", "kind": "half", "subset": "s2", "removed_image_ids": ["y"]},
        {"model_id": "a", "kind": "half", "subset": "s1", "removed_image_ids": ["x", "z"]},
        {"model_id": "c", "kind": "half", "subset": "s3", "removed_image_ids": []},
        {"model_id": "d", "kind": "full", "subset": "", "removed_image_ids": []},
    ]
    losses = [
        {"model_id": model, "query_id": query, "loss": value}
        for model, query, value in (("a", "q2", 2.0), ("b", "q1", 3.0), ("a", "q1", 1.0), ("b", "q2", 4.0), ("c", "q1", 5.0))
    ]
    pq.write_table(pa.Table.from_pylist(models), tmp_path / "models.parquet")
    pq.write_table(pa.Table.from_pylist(losses), tmp_path / "losses.parquet")
    found = read_retrained(tmp_path, ["x", "y", "z"], ["q1", "q2"])
    assert found.subsets == ["s2", "s1"]
    np.testing.assert_array_equal(found.losses, [[3.0, 4.0], [1.0, 2.0]])
    np.testing.assert_array_equal(found.kept, [[True, False, True], [False, True, False]])
    with pytest.raises(InputError, match="no model of kind 'half'"):
        read_retrained(tmp_path, ["x"], ["q9"])


def test_shapes_that_do_not_agree_are_refused():
    truth, retrained = world(6, noise=1.0)
    with pytest.raises(InputError, match="must agree"):
        retraining_scores(truth[:, :3], retrained)
    with pytest.raises(InputError, match="at least two parts"):
        retraining_scores(truth, Retrained(retrained.kept, retrained.losses, ["s"] * 6))
