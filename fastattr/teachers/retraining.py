"""Retraining: correct a teacher's scores by what models trained on random subsets of the corpus did with the query.

A studio whose LoRA trains in minutes can afford some dozen models. With A the models' centred memberships, f their centred
log losses of a query (negated: higher = known better) and s0 a teacher's scores, the scores are

    s = c s0 + A^T (A A^T + lambda I)^-1 (f - c A s0),

a ridge regression of f on memberships around the prior c s0; c and lambda are chosen by how well models that are left out
are foretold. It needs the query's losses under those models, so it serves queries that were measured.
Source: datamodels (arXiv:2202.00622) with a prior; the prior is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from fastattr.core.errors import InputError

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
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


@dataclass(frozen=True)
class Corrected:
    """Scores, and what was chosen for them."""

    scores: np.ndarray
    """(Q, N) float64, higher = more influential, in the unit of the log loss."""
    prior: float
    ridge: float


def retraining_scores(
    prior: np.ndarray, retrained: Retrained, *, ridges: Sequence[float] = RIDGES, priors: Sequence[float] = PRIORS
) -> Corrected:
    """Correct a teacher's scores.

    Args:
        prior: (Q, N) the teacher's.
        retrained: the models.
        ridges: lambda to try.
        priors: c to try; both are chosen once for all queries.

    Raises:
        InputError: shapes differ, a loss is not positive, or all models were trained on one part.
    """
    kept, outputs = _checked(prior, retrained)
    folds = _folds(retrained.subsets)
    tried = {}
    for share in priors:
        for ridge in ridges:
            error = 0.0
            for held in folds:
                scores = _fit(prior, kept[~held], outputs[~held], share, ridge)
                centre = kept[~held].mean(axis=0)
                # Only what differs between queries and between models is to be foretold.
                foretold = (kept[held] - centre) @ scores.T
                error += float(np.square(outputs[held] - outputs[~held].mean(axis=0) - foretold).sum())
            tried[share, ridge] = error
    share, ridge = min(tried, key=tried.__getitem__)
    return Corrected(_fit(prior, kept, outputs, share, ridge), share, ridge)


def cross_fitted(prior: np.ndarray, retrained: Retrained, *, parts: int = FOLDS) -> list[tuple[np.ndarray, np.ndarray]]:
    """(rows of models, (Q, N) scores) pairs: each part of the models is judged by scores that its models had no say in."""
    found = []
    for held in _folds(retrained.subsets, parts):
        subsets = [name for name, out in zip(retrained.subsets, held, strict=True) if not out]
        others = Retrained(retrained.kept[~held], retrained.losses[~held], subsets)
        found.append((np.flatnonzero(held), retraining_scores(prior, others).scores))
    return found


def _checked(prior: np.ndarray, retrained: Retrained) -> tuple[np.ndarray, np.ndarray]:
    """Memberships and residual outputs: what each model has of its own, for the query and not for every query."""
    kept, losses = retrained.kept.astype(np.float64), retrained.losses
    if kept.shape != (len(losses), prior.shape[1]) or losses.shape[1] != len(prior) or len(retrained.subsets) != len(kept):
        raise InputError(
            f"prior (Q, N), kept (M, N) and losses (M, Q) must agree, got {prior.shape}, {kept.shape} and {losses.shape}"
        )
    if not (np.isfinite(losses).all() and (losses > 0).all()):
        raise InputError("losses must be positive and finite.")
    outputs = -np.log(losses)
    outputs = outputs - outputs.mean(axis=0)
    return kept, outputs - outputs.mean(axis=1, keepdims=True)


def _folds(subsets: Sequence[str], parts: int = FOLDS) -> list[np.ndarray]:
    """(M,) bool masks of the models that are left out together, as many parts as there are or fewer."""
    names = np.unique(list(subsets))
    if len(names) < 2:
        raise InputError("retraining needs models of at least two parts of the corpus; give the folder of more models.")
    order = np.random.default_rng(0).permutation(len(names))
    return [np.isin(list(subsets), names[part]) for part in np.array_split(order, min(parts, len(names)))]


def _fit(prior: np.ndarray, kept: np.ndarray, outputs: np.ndarray, share: float, ridge: float) -> np.ndarray:
    """(Q, N) scores by ridge regression around the prior, for one c and lambda."""
    memberships = kept - kept.mean(axis=0)
    outputs = outputs - outputs.mean(axis=0)
    foretold = memberships @ prior.T.astype(np.float64)  # (M, Q)
    spread = foretold.std(axis=0)
    factor = share * outputs.std(axis=0) / np.where(spread > 0, spread, np.inf)
    kernel = memberships @ memberships.T
    kernel[np.diag_indices_from(kernel)] += ridge * float(np.trace(kernel)) / len(kernel)
    corrections = memberships.T @ np.linalg.solve(kernel, outputs - factor * foretold)
    scores: np.ndarray = factor[:, None] * prior + corrections.T
    return scores


def read_retrained(folder: Path, image_ids: Sequence[str], query_ids: Sequence[str], *, kind: str = "half") -> Retrained:
    """Read models.parquet and losses.parquet, as a ground truth folder has them.

    Args:
        folder: with both tables.
        image_ids: (N,) the corpus.
        query_ids: (Q,) queries whose losses are wanted.
        kind: of the models.

    Raises:
        InputError: no model of this kind has all losses.
    """
    measured: dict[str, dict[str, float]] = {}
    for row in pq.read_table(folder / "losses.parquet", columns=["model_id", "query_id", "loss"]).to_pylist():
        measured.setdefault(row["model_id"], {})[row["query_id"]] = row["loss"]
    models = [
        row
        for row in pq.read_table(folder / "models.parquet").to_pylist()
        if row["kind"] == kind and set(query_ids) <= set(measured.get(row["model_id"], {}))
    ]
    if not models:
        raise InputError(f"{folder} has no model of kind {kind!r} with losses of all {len(query_ids)} queries.")
    ids = np.array(image_ids)
    return Retrained(
        np.stack([~np.isin(ids, row["removed_image_ids"]) for row in models]),
        np.array([[measured[row["model_id"]][query_id] for query_id in query_ids] for row in models]),
        [row["subset"] for row in models],
    )
