"""Scores from arrays: cosine, TRAK's and D-TRAK's kernel, means of teachers, and what retraining corrects of them.

All are (Q, N), higher = more influential. TRAK (arXiv:2303.14186) and D-TRAK (arXiv:2311.00500) compare a query's and a
training image's gradient through a ridge-regularised kernel of the training images' gradients; they differ in what is
differentiated (fastattr/gradients/compression.py). Scores of different teachers have different units, so each is standardised
for each query before a mean is taken; a mean over models foretells the mean over seeds better than one model (docs/truth.md).

Retraining: a studio whose LoRA trains in minutes can afford some dozen models of random subsets. With A the models' centred
memberships, f their centred log losses of a query (negated: higher = known better) and s0 a teacher's scores, the scores are s
= c s0 + A^T (A A^T + lambda I)^-1 (f - c A s0), a ridge regression of f on memberships around the prior c s0. c and lambda are
chosen by how well models that are left out are foretold. Of scores and losses only what differs between queries counts, as in
residual LDS. Source: datamodels (arXiv:2202.00622); the prior is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from fastattr.core.errors import InputError

COLUMNS = 65_536
"""Numbers of each gradient that are in float64 at once."""


def similarity_scores(query_features: np.ndarray, corpus_features: np.ndarray) -> np.ndarray:
    """(Q, N) cosine similarity of (Q, F) and (N, F) features; InputError if the widths differ."""
    _require_same_width(query_features, corpus_features)
    return _unit(query_features) @ _unit(corpus_features).T


def kernel_scores(query_features: np.ndarray, corpus_features: np.ndarray, *, ridge: float) -> np.ndarray:
    """(Q, N) TRAK's score with gradients as features: phi(query) (Phi^T Phi + ridge I)^-1 Phi^T; storage k numbers an image.

    `query_features` (Q, k) are gradients of the queries, perhaps projected, `corpus_features` (N, k) those of the training
    images; `ridge` is a fraction of the mean eigenvalue of Phi^T Phi; where k > N, of those that can be other than 0. D-TRAK
    is the same with gradients of the output's squared norm. InputError if the widths differ, or the ridge is not positive.
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


RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""lambda, as a fraction of the mean eigenvalue of A A^T, that are tried."""
PRIORS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""c that are tried, as a fraction of what makes A s0 vary as f does."""
FOLDS = 10


@dataclass(frozen=True)
class Retrained:
    """Models trained on parts of the corpus, and what they made of some queries."""

    kept: np.ndarray
    """(M, N) bool, the images that each was trained on."""
    losses: np.ndarray
    """(M, Q) denoising losses of the queries."""
    subsets: Sequence[str]
    """(M,) name of the part; models of one part differ by seed alone and are left out together."""

    def without(self, out: np.ndarray) -> Retrained:
        """These, less the models that an (M,) mask names."""
        names = [name for name, gone in zip(self.subsets, out, strict=True) if not gone]
        return Retrained(self.kept[~out], self.losses[~out], names)

    def folds(self) -> list[np.ndarray]:
        """(M,) masks of the models that are left out together; InputError if all were trained on one part."""
        names = np.unique(list(self.subsets))
        if len(names) < 2:
            raise InputError("retraining needs models of at least two parts of the corpus; give the folder of more models.")
        order = np.random.default_rng(0).permutation(len(names))
        return [np.isin(list(self.subsets), names[part]) for part in np.array_split(order, min(FOLDS, len(names)))]


def retraining_scores(
    teacher: np.ndarray, retrained: Retrained, *, priors: Sequence[float] = PRIORS
) -> tuple[np.ndarray, dict[str, float]]:
    """Correct a teacher's (Q, N) scores: (Q, N) float64, and the 'prior' (c) and 'ridge' (lambda) that were chosen.

    Raises:
        InputError: shapes differ, a loss is not positive, or all models were trained on one part.
    """
    kept, losses = retrained.kept.astype(np.float64), retrained.losses
    if kept.shape != (len(losses), teacher.shape[1]) or losses.shape[1] != len(teacher):
        shapes = f"{teacher.shape}, {kept.shape} and {losses.shape}"
        raise InputError(f"scores (Q, N), kept (M, N) and losses (M, Q) must agree, got {shapes}")
    if not (np.isfinite(losses).all() and (losses > 0).all()):
        raise InputError("losses must be positive and finite.")
    outputs = -np.log(losses)
    outputs = outputs - outputs.mean(axis=1, keepdims=True)
    scores = standardised(teacher)
    scores = scores - scores.mean(axis=0)
    tried = {}
    for share in priors:
        for ridge in RIDGES:
            tried[share, ridge] = 0.0
            for held in retrained.folds():
                fitted = ridge_scores(scores, kept[~held], outputs[~held], share, ridge)
                foretold = (kept[held] - kept[~held].mean(axis=0)) @ fitted.T
                tried[share, ridge] += float(np.square(outputs[held] - outputs[~held].mean(axis=0) - foretold).sum())
    share, ridge = min(tried, key=tried.__getitem__)
    return ridge_scores(scores, kept, outputs, share, ridge), {"prior": share, "ridge": ridge}


def ridge_scores(prior: np.ndarray, kept: np.ndarray, outputs: np.ndarray, share: float, ridge: float) -> np.ndarray:
    """(Q, N) scores around a (Q, N) prior from (M, N) memberships and (M, Q) outputs, for one c and lambda."""
    memberships, outputs = kept - kept.mean(axis=0), outputs - outputs.mean(axis=0)
    foretold = memberships @ prior.T  # (M, Q)
    spread = foretold.std(axis=0)
    factor = share * outputs.std(axis=0) / np.where(spread > 0, spread, np.inf)
    kernel = with_ridge(memberships @ memberships.T, ridge)
    corrections = memberships.T @ np.linalg.solve(kernel, outputs - factor * foretold)
    return factor[:, None] * prior + corrections.T


def cross_fitted(teacher: np.ndarray, retrained: Retrained) -> np.ndarray:
    """(M, Q) what corrected scores foretell of each model, by scores that models of its own part had no say in."""
    foretold = np.empty(retrained.losses.shape)
    for held in retrained.folds():
        others = retrained.without(held)
        scores, _ = retraining_scores(teacher, others)
        foretold[held] = (retrained.kept[held] - others.kept.mean(axis=0)) @ scores.T
    return foretold


def read_retrained(folder: Path, image_ids: Sequence[str], query_ids: Sequence[str], *, kind: str = "half") -> Retrained:
    """Models of a kind from models.parquet and losses.parquet of a ground truth folder; InputError if none has all losses."""
    measured: dict[str, dict[str, float]] = {}
    for row in pq.read_table(folder / "losses.parquet", columns=["model_id", "query_id", "loss"]).to_pylist():
        measured.setdefault(row["model_id"], {})[row["query_id"]] = row["loss"]
    models = [row for row in pq.read_table(folder / "models.parquet").to_pylist() if row["kind"] == kind]
    models = [row for row in models if set(query_ids) <= set(measured.get(row["model_id"], {}))]
    if not models:
        raise InputError(f"{folder} has no model of kind {kind!r} with losses of all {len(query_ids)} queries.")
    kept = np.stack([~np.isin(np.array(image_ids), row["removed_image_ids"]) for row in models])
    losses = np.array([[measured[row["model_id"]][query_id] for query_id in query_ids] for row in models])
    return Retrained(kept, losses, [row["subset"] for row in models])
