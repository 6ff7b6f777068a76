"""Ownness: do an image and its prompt look like what this generator makes?

An attribution names the training images that influenced a *generated* image. For a photograph, or a drawing with another
prompt than its own, it would name what merely resembles it. The check is a density of the generator's own queries (image
and prompt together) in feature space: a Gaussian with a few principal axes and one variance for all the rest, as in
probabilistic principal component analysis (Tipping and Bishop, 1999). Fitted on training queries; the threshold is a
quantile over validation queries, which says how many of the generator's own images are called foreign.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastattr.core.errors import InputError

AXES = 64
"""Principal axes at most; their number is also bounded by a quarter of the images."""
SHRINKAGE = 0.3
"""Weight of the mean variance in that of a direction: chosen on emoji training queries and foreign ones (docs/student.md)."""


@dataclass(frozen=True)
class Density:
    """A Gaussian over features of own images with their prompts, and how far from it own ones come."""

    mean: np.ndarray
    """(F,) float32."""
    axes: np.ndarray
    """(P, F) float32, orthonormal."""
    variances: np.ndarray
    """(P,) float32, along the axes."""
    rest: float
    """Variance along each of the other directions."""
    threshold: float
    """Distances above it are called foreign."""

    def distance(self, features: np.ndarray) -> np.ndarray:
        """(Q,) squared distance of (Q, F) features, in (shrunken) standard deviations, divided by F."""
        centred = features - self.mean
        along = centred @ self.axes.T
        within = (along**2 / self.variances).sum(axis=1)
        beyond = np.maximum((centred**2).sum(axis=1) - (along**2).sum(axis=1), 0.0) / self.rest
        distances: np.ndarray = (within + beyond) / features.shape[1]
        return distances

    def is_foreign(self, features: np.ndarray) -> np.ndarray:
        """(Q,) bool: farther than own images come."""
        foreign: np.ndarray = self.distance(features) > self.threshold
        return foreign


def fit_density(own: np.ndarray, held_out: np.ndarray, *, false_alarms: float) -> Density:
    """Fit the density of a generator's own images with their prompts.

    Args:
        own: (M, F) features of generated images and prompts, at least 8.
        held_out: (V, F) of others, on which the threshold is set.
        false_alarms: part of own images that may be called foreign, in (0, 1); with V held-out ones no less than 1 / V.

    Raises:
        InputError: there are too few.
    """
    if len(own) < 8 or len(held_out) < 1:
        raise InputError(f"the density of own images needs 8 generated images and 1 held out, got {len(own)}, {len(held_out)}.")
    mean = own.mean(axis=0)
    _, singular, axes = np.linalg.svd((own - mean).astype(np.float64), full_matrices=False)
    variances = singular**2 / len(own)
    count = min(AXES, len(own) // 4, own.shape[1] - 1)
    left = own.shape[1] - count
    evenly = SHRINKAGE * max(float(variances.sum() / own.shape[1]), 1e-12)
    rest = (1 - SHRINKAGE) * float(variances[count:].sum() / left) + evenly
    density = Density(
        mean=mean.astype(np.float32),
        axes=axes[:count].astype(np.float32),
        variances=((1 - SHRINKAGE) * variances[:count] + evenly).astype(np.float32),
        rest=rest,
        threshold=float("inf"),
    )
    distances = np.sort(density.distance(held_out))
    # The quantile that own images exceed with this probability, their number taken into account (split conformal).
    place = min(len(distances) - 1, int(np.ceil((len(distances) + 1) * (1 - false_alarms))) - 1)
    return Density(**{**vars(density), "threshold": float(distances[max(place, 0)])})
