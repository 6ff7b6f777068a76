"""Similarity: score training images by the cosine of their features and the query's, whatever encoder made them."""

from __future__ import annotations

import numpy as np

from fastattr.core.errors import InputError


def similarity_scores(query_features: np.ndarray, corpus_features: np.ndarray) -> np.ndarray:
    """(Q, N) cosine similarity of (Q, F) and (N, F) features; storage F numbers an image.

    Raises:
        InputError: the widths differ.
    """
    require_same_width(query_features, corpus_features)
    return _unit(query_features) @ _unit(corpus_features).T


def require_same_width(query_features: np.ndarray, corpus_features: np.ndarray) -> None:
    """Raise InputError unless (Q, F) and (N, F) features have one width."""
    if query_features.shape[1] != corpus_features.shape[1]:
        raise InputError(
            f"query features have {query_features.shape[1]} columns, the corpus' {corpus_features.shape[1]}; "
            "make both with the same encoder."
        )


def _unit(features: np.ndarray) -> np.ndarray:
    values = features.astype(np.float64)
    lengths: np.ndarray = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.maximum(lengths, np.finfo(np.float64).tiny)
