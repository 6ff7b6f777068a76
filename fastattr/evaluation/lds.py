"""LDS: do a method's scores foretell how a model changes once it is retrained on a part of its images?

Pure functions on arrays. Axis letters: M retrained models, Q queries, N training images, G groups of them. A method's scores
s_qi predict of a model m, trained on the images S_m, g_mq = sum of s_qi over i in S_m; its output is f_mq = -log(loss of q
under m). The linear datamodeling score (LDS, arXiv:2303.14186) of q is Spearman's correlation of g_mq and f_mq over the models.
Some subsets, and some images, are better for every query; the residual LDS, ours, takes both away. It is the same of

    f'_mq = f_mq - mean over m - mean over q + mean over both
    s'_qi = z_qi - mean of z_ri over the other queries r,      z the scores of each query standardised over the images.

A method whose scores are the same for every query has s' = 0 and residual LDS 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import rankdata

from fastattr.core.errors import InputError


def outputs_of(losses: np.ndarray) -> np.ndarray:
    """(M, Q) positive losses -> (M, Q) outputs, -log(loss): higher = the model knows the query better."""
    if not (losses > 0).all():
        raise InputError("losses must be positive and finite.")
    return -np.log(losses)


def predictions_of(scores: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(M, Q) what (Q, N) scores, higher = more influential, predict: their sums over the (M, N) kept images of each model."""
    if scores.ndim != 2 or kept.ndim != 2 or scores.shape[1] != kept.shape[1]:
        raise InputError(f"scores (Q, N) and kept (M, N) must agree in N, got {scores.shape} and {kept.shape}")
    if not np.isfinite(scores).all():
        raise InputError(f"{int((~np.isfinite(scores)).sum())} scores are not finite.")
    return kept.astype(np.float64) @ scores.astype(np.float64).T


def residual_outputs(outputs: np.ndarray) -> np.ndarray:
    """(M, Q) outputs less each query's mean over the models and each model's mean over the queries."""
    centred = outputs - outputs.mean(axis=0)
    return centred - centred.mean(axis=1, keepdims=True)


def residual_scores(scores: np.ndarray) -> np.ndarray:
    """(Q, N) scores, standardised for each query, less each image's mean over the other queries; equal scores give zeros."""
    if len(scores) < 2:
        raise InputError("residual scores need at least two queries.")
    residual = _standard(scores) - popularity(scores)
    residual[np.abs(residual) < 1e-9] = 0.0  # rounding errors of scores that are the same for every query have ranks too
    return residual


def _standard(scores: np.ndarray) -> np.ndarray:
    """(Q, N) scores, standardised for each query; of equal ones zeros."""
    values = scores.astype(np.float64)
    spread = values.std(axis=1, keepdims=True)
    return (values - values.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1.0)


def popularity(scores: np.ndarray) -> np.ndarray:
    """(Q, N) each image's mean standardised score over the other queries: the null that ignores the query.

    Its residual is proportional to minus that of `scores`, since the query that is left out of the mean is all that differs.
    """
    standard = _standard(scores)
    return (standard.sum(axis=0) - standard) / (len(scores) - 1)


def rank_correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(Q,) Spearman's correlation of each column of two (M, Q) arrays; equal values share their mean rank, constants give 0."""
    return (_unit_ranks(first) * _unit_ranks(second)).sum(axis=0)


def _unit_ranks(values: np.ndarray) -> np.ndarray:
    """(M, Q) ranks of each column, centred and of length 1; of a constant column zeros."""
    ranks = rankdata(values, axis=0)
    ranks = ranks - ranks.mean(axis=0)
    length = np.sqrt((ranks**2).sum(axis=0))
    return ranks / np.where(length > 0, length, 1.0)


def lds_residual(scores: np.ndarray, kept: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """(Q,) residual LDS of (Q, N) scores, (M, N) kept images and (M, Q) losses, as the module's text defines it."""
    return rank_correlations(predictions_of(residual_scores(scores), kept), residual_outputs(outputs_of(losses)))


def bootstrap(
    predictions: Mapping[str, np.ndarray], outputs: np.ndarray, subsets: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """Mean rank correlation under resampling of models and of queries: by method (R,) means over the drawn queries.

    All methods share the draws, so differences of two are paired.

    Args:
        predictions: by method (M, Q).
        outputs: (M, Q), to be predicted.
        subsets: (M,) what each model was trained on; models that share it are drawn together, as they are no two facts.
        resamples: R.
        seed: of the draws.
    """
    names, subset = np.unique(list(subsets), return_inverse=True)
    members = [np.flatnonzero(subset == index) for index in range(len(names))]
    rng = np.random.default_rng(seed)
    means = {name: np.empty(resamples) for name in predictions}
    for resample in range(resamples):
        models = np.concatenate([members[index] for index in rng.integers(0, len(members), len(members))])
        queries = rng.integers(0, outputs.shape[1], outputs.shape[1])
        ranks = _unit_ranks(outputs[models])
        for name, predicted in predictions.items():
            means[name][resample] = (_unit_ranks(predicted[models]) * ranks).sum(axis=0)[queries].mean()
    return means


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 2.5% and 97.5% quantiles of (R,) bootstrap values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def noise_ceiling(first: np.ndarray, second: np.ndarray) -> float:
    """The correlation that knowing each subset's true mean output would reach with the outputs of single models.

    It is the root of the Pearson correlation of (S, Q) outputs, plain or residual, of S subsets under two training seeds,
    once each query's mean is removed; 0 where that is negative. (Two outputs correlate by the truth's share of the variance,
    each with the truth by the root of that share.)
    """
    a, b = (values - values.mean(axis=0) for values in (first, second))
    reliability = float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))
    return float(max(reliability, 0.0) ** 0.5)


def group_shares(scores: np.ndarray, members: np.ndarray) -> np.ndarray:
    """(Q, G) shares of each query's positive (Q, N) scores that groups of (G, N) members hold; zeros where none is positive."""
    positive = np.maximum(scores.astype(np.float64), 0.0)
    total = positive.sum(axis=1, keepdims=True)
    return (positive @ members.T.astype(np.float64)) / np.where(total > 0, total, 1.0)
