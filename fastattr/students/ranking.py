"""Ranking metrics: pure functions on arrays; all are higher = better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from fastattr.core.errors import InputError


def average_precision(scores: np.ndarray, relevant: np.ndarray) -> float:
    """Average precision of a ranking; InputError if nothing is relevant.

    Of (N,) scores the higher are ranked earlier, equal ones pessimistically, irrelevant first; `relevant` is (N,) bool.
    """
    if not relevant.any():
        raise InputError("average precision needs at least one relevant item.")
    hits = relevant[np.lexsort((relevant, -scores))]
    return float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())


def teacher_average_precision(student: np.ndarray, teacher: np.ndarray, *, positives: int) -> float:
    """AP of the student's whole ranking with the teacher's first `positives` (L <= N) as relevant: one term of mAP(L).

    `student` (N,) are the scores to judge, `teacher` (N,) influence scores, higher = more influential. Source:
    arXiv:2511.10721, sec. 5.
    """
    if not 1 <= positives <= len(teacher):
        raise InputError(f"positives must be between 1 and {len(teacher)}, got {positives}")
    relevant = np.zeros(len(teacher), dtype=bool)
    relevant[np.argsort(-teacher, kind="stable")[:positives]] = True
    return average_precision(student, relevant)


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation; 0 where one of them is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(spearmanr(first, second).statistic)


def top_k_overlap(first: np.ndarray, second: np.ndarray, k: int) -> float:
    """Share of the k highest of one that are among the k highest of the other."""
    if not 1 <= k <= len(first):
        raise InputError(f"k must be between 1 and {len(first)}, got {k}")
    return len(set(np.argsort(-first, kind="stable")[:k]) & set(np.argsort(-second, kind="stable")[:k])) / k


def ndcg(scores: np.ndarray, relevance: np.ndarray, *, k: int | None = None) -> float:
    """Normalised discounted cumulative gain: the discounted relevance of a ranking over that of the best one.

    Of (N,) scores the higher are ranked earlier, equal ones pessimistically; (N,) relevance is not negative, say
    max(influence, 0). Only the first k places count; None counts all. InputError if a relevance is negative, none is positive,
    or k is out of range. Source: Järvelin and Kekäläinen, ACM TOIS 20 (2002), with linear gain and the discount 1 / log2(place
    + 1).
    """
    if (relevance < 0).any() or not (relevance > 0).any():
        raise InputError("relevance must not be negative, and somewhere positive.")
    k = len(scores) if k is None else k
    if not 1 <= k <= len(scores):
        raise InputError(f"k must be between 1 and {len(scores)}, got {k}")
    discount = 1 / np.log2(np.arange(k) + 2)
    gained = relevance[np.lexsort((relevance, -scores))][:k] @ discount
    return float(gained / (np.sort(relevance)[::-1][:k] @ discount))


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of (Q,) values; 0 for a single one."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def paired_bootstrap(
    first: np.ndarray, second: np.ndarray, *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of first - second over the same queries, with the 2.5% and 97.5% quantiles of its bootstrap."""
    difference = first - second
    rng = np.random.default_rng(seed)
    means = difference[rng.integers(0, len(difference), size=(resamples, len(difference)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def no_better_than_untuned(metrics: Mapping[str, Any]) -> str:
    """A warning where a student's gain over the untuned features may be none, '' where it is certain or not measured.

    In an attributor's metrics.json 'map_gain' holds the paired gain in mAP with its 95% interval.
    """
    gain = metrics.get("map_gain")
    if not isinstance(gain, Mapping) or not {"mean", "low", "high"} <= set(gain) or gain["low"] > 0:
        return ""
    return (
        f"the student is not certainly better than the untuned features: it gains {gain['mean']:.3f} [{gain['low']:.3f}, "
        f"{gain['high']:.3f}] in mAP on {metrics.get('queries', '?')} {metrics.get('split', 'test')} queries. "
        "Its order may be no nearer to influence than plain similarity is; give the teacher more queries (queries.train)."
    )
