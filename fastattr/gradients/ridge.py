"""The ridge kernel of TRAK and D-TRAK as a linear map, so that inner products of mapped gradients are kernel scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastattr.core.errors import InputError


@dataclass(frozen=True)
class RidgeKernel:
    """What makes inner products of gradient features TRAK's and D-TRAK's kernel scores, up to one factor for all of them.

    With Phi (n, k) the features of a sample of training images, it multiplies with (Phi^T Phi + lambda I)^(-1/2) lambda^(1/2):
    along each of the sample's r directions with a number below 1, and elsewhere with 1.
    Source: arXiv:2303.14186, sec. 3.2, and arXiv:2311.00500 for the ridge.
    """

    directions: np.ndarray
    """(r, k) float32, orthonormal."""
    factors: np.ndarray
    """(r,) float32 in (0, 1)."""

    @classmethod
    def fit(cls, features: np.ndarray, *, ridge: float) -> RidgeKernel:
        """Of (n, k) features.

        Args:
            features: of the sample.
            ridge: lambda, as a fraction of the mean of those min(n, k) eigenvalues of Phi^T Phi that can be other than 0.

        Raises:
            InputError: the ridge is not positive.
        """
        if ridge <= 0:
            raise InputError(f"ridge must be positive, got {ridge}")
        _, singular, directions = np.linalg.svd(features.astype(np.float64), full_matrices=False)
        level = ridge * float(np.mean(singular**2))
        factors = np.sqrt(level / (singular**2 + level))
        return cls(directions.astype(np.float32), factors.astype(np.float32))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(B, k) -> (B, k) float32."""
        along = features @ self.directions.T
        mapped: np.ndarray = features - (along * (1 - self.factors)) @ self.directions
        return mapped.astype(np.float32)
