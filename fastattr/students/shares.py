"""Shares: how a query's positive influence divides among creators, collections or any other column.

A name's share is what its images hold beyond what as many unrelated images would hold; the remainder cannot be attributed to
one of them. Near-duplicates (the catalogue's `family`) count once together: each of n has weight 1 / n. Intervals are
bootstraps over validation queries and families of images, widened by the calibration's factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastattr.students.calibration import Calibration


@dataclass(frozen=True)
class Shares:
    """How a query's positive influence divides among G names."""

    names: np.ndarray
    """(G,)."""
    share: np.ndarray
    """(G,) beyond what as many unrelated images would hold; not negative."""
    low: np.ndarray
    high: np.ndarray
    """(G,) ends of the 95% intervals."""
    images: np.ndarray
    """(G,) images with more than an unrelated image's part."""
    unassigned: tuple[float, float, float]
    """What is no one's in particular, with its interval; the shares and this sum to 1."""


def estimate_shares(
    calibration: Calibration,
    similarity: np.ndarray,
    names: np.ndarray,
    families: np.ndarray,
    *,
    family_sizes: np.ndarray,
    beyond: int = 0,
    seed: int = 0,
    beyond_unrelated: bool = True,
) -> Shares:
    """Divide a query's positive influence among the names of its images.

    Args:
        calibration: the curves.
        similarity: (M,) of the M most similar images.
        names: (M,) whose each image is, '' for no one's.
        families: (M,) near-duplicates share one; their members count once together.
        family_sizes: (M,) how many images of the corpus share each image's family.
        beyond: images of the corpus that are less similar than all of these; they count as unrelated.
        seed: of the bootstrap over families.
        beyond_unrelated: whether to count only what exceeds an unrelated image's influence; else shares are of the
            influence as it is, and nothing but `beyond` is unassigned.
    """
    weight = 1.0 / family_sizes
    level = calibration.unrelated if beyond_unrelated else np.zeros_like(calibration.unrelated)
    influence = calibration.influence_of(similarity)
    _, family = np.unique(families, return_inverse=True)
    found, of_name = np.unique(names, return_inverse=True)
    excess = weight * np.maximum(influence - level[0], 0.0)
    rest = beyond * min(float(influence.min()), calibration.unrelated[0])
    total = float((weight * influence).sum()) + rest
    share = np.bincount(of_name, weights=excess, minlength=len(found)) / max(total, 1e-12)

    rng = np.random.default_rng(seed)
    resamples = len(calibration.influence_draws)
    luck = rng.standard_exponential((resamples, int(family.max()) + 1), dtype=np.float32)[:, family]  # Bayesian bootstrap
    drawn = calibration.draws_of(similarity).astype(np.float32)
    luck *= weight.astype(np.float32)
    totals = (luck * drawn).sum(axis=1) + rest
    luck *= np.maximum(drawn - level[1:, None].astype(np.float32), 0.0)
    order = np.argsort(of_name, kind="stable")
    starts = np.searchsorted(of_name[order], np.arange(len(found)))
    draws = np.add.reduceat(luck[:, order], starts, axis=1) / np.maximum(totals, 1e-12)[:, None]

    def ends(middle: np.ndarray, of_draw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.quantile(of_draw, [0.025, 0.975], axis=0)
        low, high = np.minimum(low, middle), np.maximum(high, middle)
        widened = middle - calibration.widening * (middle - low), middle + calibration.widening * (high - middle)
        return np.clip(widened[0], 0, 1), np.clip(widened[1], 0, 1)

    named = found != ""
    low, high = ends(share, draws)
    free = np.array([1 - share[named].sum()])
    free_low, free_high = ends(free, 1 - draws[:, named].sum(axis=1, keepdims=True))
    return Shares(
        names=found[named],
        share=share[named],
        low=low[named],
        high=high[named],
        images=np.bincount(of_name, weights=excess > 0, minlength=len(found)).astype(np.int64)[named],
        unassigned=(float(free[0]), float(free_low[0]), float(free_high[0])),
    )


def teacher_shares(influence: np.ndarray, weights: np.ndarray, names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(G,) names and their shares of the positive influence; (C,) weights of the images, summing to anything."""
    found, of_name = np.unique(names, return_inverse=True)
    positive = np.maximum(influence.astype(np.float64), 0.0) * weights
    shares: np.ndarray = np.bincount(of_name, weights=positive, minlength=len(found)) / max(positive.sum(), 1e-12)
    return found, shares


def families_of(column: Sequence[str]) -> np.ndarray:
    """(N,) number of each image's family; an image without one is a family of its own."""
    names = np.array([name or f"\0{row}" for row, name in enumerate(column)])
    _, numbers = np.unique(names, return_inverse=True)
    return numbers
