"""Scores from features: cosine, TRAK's and D-TRAK's kernel, and means of teachers; (Q, N), higher = more influential.

TRAK (arXiv:2303.14186) and D-TRAK (arXiv:2311.00500) compare a query's and a training image's gradient through a
ridge-regularised kernel of the training images' gradients; they differ in what is differentiated
(fastattr/gradients/compression.py). Scores of different teachers have different units, so each is standardised for each query
before a mean is taken. Retraining with another seed moves a query's loss too, so a mean over models foretells the mean over
seeds better than one model (docs/truth.md).
"""

from __future__ import annotations

import numpy as np

from fastattr.core.errors import InputError

COLUMNS = 65_536
"""Numbers of each gradient that are in float64 at once."""


def similarity_scores(query_features: np.ndarray, corpus_features: np.ndarray) -> np.ndarray:
    """(Q, N) cosine similarity of (Q, F) and (N, F) features; InputError if the widths differ."""
    _require_same_width(query_features, corpus_features)
    return _unit(query_features) @ _unit(corpus_features).T


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
    _require_same_width(query_features, corpus_features)
    return query_features @ kernel_rows(corpus_features, ridge=ridge).T


def kernel_rows(corpus_features: np.ndarray, *, ridge: float) -> np.ndarray:
    """(N, k) rows whose inner product with a query's gradient is its kernel score, in the features' precision."""
    if ridge <= 0:
        raise InputError(f"ridge must be positive, got {ridge}")
    images, width = corpus_features.shape
    if width <= images:
        corpus = corpus_features.astype(np.float64)
        return np.linalg.solve(with_ridge(corpus.T @ corpus, ridge), corpus.T).T.astype(corpus_features.dtype)
    parts = [slice(start, start + COLUMNS) for start in range(0, width, COLUMNS)]
    kernel = np.zeros((images, images))  # the smaller one, which gives the same numbers
    for part in parts:
        columns = corpus_features[:, part].astype(np.float64)
        kernel += columns @ columns.T
    inverse, rows = np.linalg.inv(with_ridge(kernel, ridge)), np.empty_like(corpus_features)
    for part in parts:
        rows[:, part] = inverse @ corpus_features[:, part].astype(np.float64)
    return rows


def standardised(scores: np.ndarray) -> np.ndarray:
    """(Q, N) scores less each query's mean, divided by its standard deviation; zeros for a query whose scores are all alike."""
    values = scores.astype(np.float64)
    values = values - values.mean(axis=1, keepdims=True)
    spread = values.std(axis=1, keepdims=True)
    return values / np.where(spread > 0, spread, 1.0)


def averaged(*scores: np.ndarray) -> np.ndarray:
    """(Q, N) float64 mean of several (Q, N) scores, each standardised for each query; InputError if their shapes differ."""
    if len({rows.shape for rows in scores}) != 1:
        raise InputError(f"scores to average must share one (Q, N) shape, got {[rows.shape for rows in scores]}")
    return np.mean([standardised(rows) for rows in scores], axis=0)


def with_ridge(kernel: np.ndarray, ridge: float) -> np.ndarray:
    """A (W, W) kernel plus `ridge` times its mean eigenvalue on the diagonal, in place."""
    kernel[np.diag_indices_from(kernel)] += ridge * float(np.trace(kernel)) / len(kernel)
    return kernel


def _require_same_width(query_features: np.ndarray, corpus_features: np.ndarray) -> None:
    found, expected = query_features.shape[1], corpus_features.shape[1]
    if found != expected:
        raise InputError(f"query features have {found} columns, the corpus' {expected}; make both with the same encoder.")


def _unit(features: np.ndarray) -> np.ndarray:
    values = features.astype(np.float64)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.finfo(np.float64).tiny)
