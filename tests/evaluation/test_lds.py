"""Ground truth: LDS plain and residual, ceilings, intervals and shares, by hand and in a world whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from fastattr.core.errors import InputError
from fastattr.evaluation.lds import (
    bootstrap,
    group_shares,
    interval,
    lds_residual,
    noise_ceiling,
    outputs_of,
    popularity,
    predictions_of,
    rank_correlations,
    residual_outputs,
    residual_scores,
)

MODELS, QUERIES, IMAGES = 60, 30, 80


def lds(scores: np.ndarray, kept: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """(Q,) plain LDS, as arXiv:2303.14186, sec. 2, defines it."""
    return rank_correlations(predictions_of(scores, kept), outputs_of(losses))


class World:
    """Log losses are sums of image effects: the query's own, the image's for all queries, and each model's luck."""

    def __init__(self, *, noise: float, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.own = rng.standard_normal((QUERIES, IMAGES))
        self.popular = 3 * rng.standard_normal(IMAGES)
        self.kept = np.stack([rng.permutation(IMAGES) < IMAGES // 2 for _ in range(MODELS)])
        self.luck = 2 * rng.standard_normal((MODELS, 1))
        self.noise = noise
        self._rng = rng

    def losses(self) -> np.ndarray:
        """(M, Q), with new noise at each call."""
        known = self.kept @ (self.own + self.popular).T
        return np.exp(-0.05 * (known + self.luck + self.noise * self._rng.standard_normal((MODELS, QUERIES))))


@pytest.fixture(scope="module")
def world() -> World:
    return World(noise=0.5)


def test_predictions_sum_the_scores_of_the_kept_images():
    """Summing the removed ones instead flips every sign."""
    scores = np.array([[1.0, 2.0, 4.0], [0.0, 0.0, 1.0]])
    kept = np.array([[True, False, True], [False, True, False]])
    assert predictions_of(scores, kept).tolist() == [[5, 1], [2, 0]]


def test_lds_of_a_hand_computed_case():
    """Three models keep one image each; the losses fall as the scores rise for query 0, one pair is swapped for query 1."""
    kept = np.eye(3, dtype=bool)
    scores = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    losses = np.array([[0.9, 0.9], [0.5, 0.1], [0.1, 0.5]])
    assert lds(scores, kept, losses).tolist() == pytest.approx([1.0, 0.5])  # 1 - 6 * 2 / (3 * 8)


def test_rank_correlations_equal_scipy():
    """An independent implementation, with ties."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 5, (20, 7)), rng.standard_normal((20, 7))
    expected = [spearmanr(first[:, column], second[:, column]).statistic for column in range(7)]
    np.testing.assert_allclose(rank_correlations(first, second), expected)


def test_residual_outputs_have_no_row_and_no_column_means():
    """[[1, 2], [3, 8]] has row means 1.5 and 5.5, column means 2 and 5, mean 3.5."""
    residual = residual_outputs(np.array([[1.0, 2.0], [3.0, 8.0]]))
    np.testing.assert_allclose(residual, [[1, -1], [-1, 1]])


def test_residual_scores_take_away_the_mean_over_the_other_queries():
    """Two queries, standardised to (-1, 1) and (1, -1): each loses the other one."""
    np.testing.assert_allclose(residual_scores(np.array([[0.0, 10.0], [7.0, 3.0]])), [[-2, 2], [2, -2]])


def test_the_truth_scores_near_one_plain_and_residual(world):
    """A wrong sign or a transposed mask would leave these near 0 or -1."""
    truth = world.own + world.popular
    assert lds(truth, world.kept, world.losses()).mean() > 0.9
    assert lds_residual(truth, world.kept, world.losses()).mean() > 0.9


def test_residual_removes_popularity(world):
    """Scores that are the same for every query look good plainly and must count for nothing once residual."""
    same = np.tile(world.popular, (QUERIES, 1))
    assert lds(same, world.kept, world.losses()).mean() > 0.6
    np.testing.assert_array_equal(lds_residual(same, world.kept, world.losses()), 0.0)


def test_popularity_null_is_minus_the_methods_residual(world):
    """What docs/truth.md says of that null; it holds where scores are standardised."""
    null = residual_scores(popularity(world.own))
    correlation = np.corrcoef(null.ravel(), residual_scores(world.own).ravel())[0, 1]
    assert correlation < -0.99


@pytest.mark.parametrize("measure", [lds, lds_residual])
def test_random_scores_have_an_interval_around_zero(world, measure):
    """A leak of the outputs into the prediction would lift chance above 0."""
    scores = np.random.default_rng(5).standard_normal((QUERIES, IMAGES))
    values = measure(scores, world.kept, world.losses())
    assert abs(values.mean()) < 0.1


def test_other_queries_scores_do_not_pass_for_ones_own(world):
    """A teacher shuffled over queries keeps all popularity: plain LDS stays, residual LDS must go."""
    shuffled = np.roll(world.own, 1, axis=0) + world.popular
    assert lds(shuffled, world.kept, world.losses()).mean() > 0.5
    assert lds_residual(shuffled, world.kept, world.losses()).mean() < 0.1


def test_noise_ceiling_is_what_the_true_outputs_reach():
    """With noise as strong as the signal a perfect method reaches about the ceiling, not 1."""
    world = World(noise=5.0)
    truth = residual_outputs((world.kept @ world.own.T).astype(float))
    first, second = (residual_outputs(outputs_of(world.losses())) for _ in range(2))
    ceiling = noise_ceiling(first, second)
    reached = np.corrcoef(truth.ravel(), first.ravel())[0, 1]
    assert 0.5 < ceiling < 0.9
    assert ceiling == pytest.approx(reached, abs=0.05)


def test_noise_ceiling_of_unrelated_outputs_is_zero_and_of_equal_ones_one():
    """The two ends of the scale."""
    values = np.array([[1.0, -1.0], [-1.0, 1.0]])
    assert noise_ceiling(values, values) == 1
    assert noise_ceiling(values, -values) == 0


def test_bootstrap_is_paired_and_covers_a_planted_gain(world):
    """Unpaired draws would hide a small gain behind the spread of queries and models."""
    outputs = residual_outputs(outputs_of(world.losses()))
    good = predictions_of(residual_scores(world.own), world.kept)
    worse = good + 2 * np.random.default_rng(6).standard_normal(good.shape)
    subsets = [str(row) for row in range(MODELS)]
    drawn = bootstrap({"good": good, "worse": worse, "again": good}, outputs, subsets, resamples=200)
    low, high = interval(drawn["good"] - drawn["worse"])
    gain = (rank_correlations(good, outputs) - rank_correlations(worse, outputs)).mean()
    assert 0 < low < gain < high
    np.testing.assert_array_equal(drawn["good"], drawn["again"])


def test_bootstrap_draws_models_of_one_subset_together(world):
    """A second seed is no second subset: taken for one it would make intervals too narrow."""
    outputs = outputs_of(world.losses())
    predicted = predictions_of(world.own + world.popular, world.kept)
    names = [str(row) for row in range(MODELS)]
    once = bootstrap({"m": predicted}, outputs, names, resamples=300)["m"]
    twice = bootstrap({"m": np.tile(predicted, (2, 1))}, np.tile(outputs, (2, 1)), names * 2, resamples=300)["m"]
    np.testing.assert_allclose(once, twice)


def test_bootstrap_spread_falls_with_more_models():
    """Resampling queries alone would not see how few models there are."""
    rng = np.random.default_rng(7)
    spreads = []
    for models in (10, 160):
        shared = rng.standard_normal((models, 1))  # a method that is right or wrong for a model, not for a query
        outputs = shared + 0.1 * rng.standard_normal((models, 40))
        predicted = shared + rng.standard_normal((models, 1)) + 0.1 * rng.standard_normal((models, 40))
        names = [str(row) for row in range(models)]
        spreads.append(bootstrap({"m": predicted}, outputs, names, resamples=200)["m"].std())
    assert spreads[0] > 2 * spreads[1]


def test_group_shares_of_a_hand_computed_case():
    """Negative scores count as nothing; what is in no group is missing from the sum."""
    scores = np.array([[3.0, -5.0, 1.0, 4.0], [-1.0, -1.0, -1.0, -1.0]])
    members = np.array([[True, True, False, False], [False, False, True, False]])
    assert group_shares(scores, members).tolist() == [[0.375, 0.125], [0.0, 0.0]]


def test_bad_input_is_refused():
    """Each would give a number."""
    kept = np.ones((2, 3), dtype=bool)
    with pytest.raises(InputError, match="agree in N"):
        predictions_of(np.zeros((2, 4)), kept)
    with pytest.raises(InputError, match="1 scores are not finite"):
        predictions_of(np.array([[0.0, np.nan, 1.0]]), kept)
    with pytest.raises(InputError, match="positive"):
        outputs_of(np.array([[1.0, 0.0]]))
    with pytest.raises(InputError, match="two queries"):
        residual_scores(np.zeros((1, 3)))
