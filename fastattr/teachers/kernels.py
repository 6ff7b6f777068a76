"""Kernels: TRAK (arXiv:2303.14186) and D-TRAK (arXiv:2311.00500), as (Q, N) scores from gradients, higher = more influential.

Both compare a query's and a training image's gradient through a ridge-regularised kernel of the training images' gradients;
they differ in what is differentiated (fastattr/gradients/compression.py).
"""

from __future__ import annotations

import numpy as np

from fastattr.core.errors import InputError
from fastattr.teachers.similarity import require_same_width

COLUMNS = 65_536
"""Numbers of each gradient that are in float64 at once."""


def kernel_scores(query_features: np.ndarray, corpus_features: np.ndarray, *, ridge: float) -> np.ndarray:
    """TRAK's score with gradients as features: phi(query) (Phi^T Phi + ridge I)^-1 Phi^T.

    Args:
        query_features: (Q, k) gradients of the queries, perhaps projected.
        corpus_features: (N, k) those of the training images.
        ridge: as a fraction of the mean eigenvalue of Phi^T Phi; where k > N, of those that can be other than 0.

    Returns:
        (Q, N); storage k numbers an image. D-TRAK is the same with gradients of the output's squared norm.

    Raises:
        InputError: the widths differ, or the ridge is not positive.

    Source: arXiv:2303.14186, sec. 3.2; the ridge is that of arXiv:2311.00500.
    """
    require_same_width(query_features, corpus_features)
    return query_features @ kernel_rows(corpus_features, ridge=ridge).T


def kernel_rows(corpus_features: np.ndarray, *, ridge: float) -> np.ndarray:
    """(N, k) rows whose inner product with a query's gradient is its kernel score, in the precision of the features.

    Args:
        corpus_features: (N, k), as of `kernel_scores`.
        ridge: the same.

    Raises:
        InputError: the ridge is not positive.
    """
    _positive(ridge)
    images, width = corpus_features.shape
    if width <= images:
        corpus = corpus_features.astype(np.float64)
        kernel = corpus.T @ corpus
        kernel[np.diag_indices_from(kernel)] += ridge * float(np.trace(kernel)) / width
        rows: np.ndarray = np.linalg.solve(kernel, corpus.T).T
        return rows.astype(corpus_features.dtype)
    parts = [slice(start, start + COLUMNS) for start in range(0, width, COLUMNS)]
    kernel = np.zeros((images, images))  # the smaller one, which gives the same numbers
    for part in parts:
        columns = corpus_features[:, part].astype(np.float64)
        kernel += columns @ columns.T
    kernel[np.diag_indices_from(kernel)] += ridge * float(np.trace(kernel)) / images
    inverse, rows = np.linalg.inv(kernel), np.empty_like(corpus_features)
    for part in parts:
        rows[:, part] = inverse @ corpus_features[:, part].astype(np.float64)
    return rows


def _positive(ridge: float) -> None:
    if ridge <= 0:
        raise InputError(f"ridge must be positive, got {ridge}")
