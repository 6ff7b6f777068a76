"""Ensembles: the mean of several teachers' scores, or of one teacher's on several models.

Scores of different teachers have different units, so each is standardised for each query first. Retraining with another
seed moves a query's loss too, so a mean over models foretells the mean over seeds better than one model (docs/truth.md).
"""

from __future__ import annotations

import numpy as np

from fastattr.core.errors import InputError


def standardised(scores: np.ndarray) -> np.ndarray:
    """(Q, N) scores less each query's mean, divided by its standard deviation; zeros for a query whose scores are all alike."""
    values = scores.astype(np.float64)
    values = values - values.mean(axis=1, keepdims=True)
    spread = values.std(axis=1, keepdims=True)
    return values / np.where(spread > 0, spread, 1.0)


def averaged(*scores: np.ndarray) -> np.ndarray:
    """(Q, N) float64 mean of several (Q, N) scores, each standardised for each query.

    Raises:
        InputError: their shapes differ.
    """
    if len({rows.shape for rows in scores}) != 1:
        raise InputError(f"scores to average must share one (Q, N) shape, got {[rows.shape for rows in scores]}")
    return np.mean([standardised(rows) for rows in scores], axis=0)
