"""Calibration: from a similarity, which only orders, to degrees of influence.

On validation queries, which the student has not learned from, two rising curves are fitted to the teacher's scores:
similarity -> expected percentile of the teacher's score within the corpus, and similarity -> expected positive influence in
units of the corpus' mean, which makes shares (shares.py). A score table holds a query's neighbours whole and of the rest of
    the
corpus a few outsiders, drawn at random; each outsider stands for its part of the rest (Horvitz-Thompson weights), so that
    curves
and shares are of the corpus. Reads and writes calibration.safetensors; calibrate.py is the stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from fastattr.core.errors import ArtifactDamagedError
from fastattr.core.files import atomic_path
from fastattr.students.ownness import Ownness

if TYPE_CHECKING:
    from fastattr.teachers.scores import ScoredQuery

FILE = "calibration.safetensors"
FORMATS = ("fastattr calibration 2", "fastattr calibration 1")
"""The one that is written, and those that are read besides: 1 had neither `level` nor `queries`."""
UNRELATED_PART = 0.99
"""Part of the unrelated images that have less influence than `Calibration.level`."""
HALF_NORMAL = 5.83
"""The same quantile over the mean, where influence is the positive part of normal noise: what format 1 is read with."""
STRENGTHS = ("weak", "medium", "strong")


def corpus_weights(is_outsider: np.ndarray, corpus_size: int) -> np.ndarray:
    """(C,) how many images of the corpus each candidate stands for: itself, or an outsider's part of the rest."""
    outsiders = int(is_outsider.sum())
    rest = corpus_size - (len(is_outsider) - outsiders)
    return np.where(is_outsider, rest / max(outsiders, 1), 1.0)


def teacher_percentiles(influence: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(C,) percentiles of (C,) influence scores within the weighted set: 100 x the part of it with a lower score.

    Equal scores share their middle.
    """
    _, level = np.unique(influence, return_inverse=True)
    mass = np.bincount(level, weights=weights)
    return (np.cumsum(mass) - mass / 2)[level] * (100 / mass.sum())


def relative_influence(influence: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(C,) positive influence in units of its weighted mean; negative scores count as none. Zeros if none is positive."""
    positive = np.maximum(influence.astype(np.float64), 0.0)
    mean = (positive * weights).sum() / weights.sum()
    return positive / mean if mean > 0 else positive


@dataclass(frozen=True)
class Calibration:
    """Rising curves over K similarities, their bootstrap draws, and what the own-or-foreign check needs."""

    knots: np.ndarray
    """(K,) similarities, rising."""
    percentile: np.ndarray
    """(K,) expected teacher percentile, 0 to 100, not falling."""
    influence: np.ndarray
    """(K,) expected positive influence in units of the corpus' mean, not falling."""
    influence_draws: np.ndarray
    """(R, K) the same of each bootstrap resample."""
    unrelated: np.ndarray
    """(1 + R,) positive influence of unrelated images in the same unit: of all queries, then of each resample."""
    widening: float
    """Factor on the bootstrap's intervals."""
    level: np.ndarray
    """(1 + R,) influence that `UNRELATED_PART` of unrelated images stay below, in the same unit."""
    queries: int
    """Validation queries that it was fitted on; 0 where an older file does not say."""
    feature_mean: np.ndarray
    """(F,) the corpus' mean features: what stands for an image or prompt that is taken away."""
    ownness: Ownness | None
    """What tells the generator's own images from others; None in format 1, where there were too few."""

    def percentile_of(self, similarity: np.ndarray) -> np.ndarray:
        """Expected teacher percentile, 0 to 100 = most influential, of similarities of any shape."""
        return np.interp(similarity, self.knots, self.percentile)

    def influence_of(self, similarity: np.ndarray) -> np.ndarray:
        """Expected positive influence of similarities of any shape, in units of the corpus' mean."""
        return np.interp(similarity, self.knots, self.influence)

    def draws_of(self, similarity: np.ndarray) -> np.ndarray:
        """(R, M) expected positive influence of (M,) similarities under each bootstrap resample."""
        above = np.clip(np.searchsorted(self.knots, similarity), 1, max(len(self.knots) - 1, 1))
        if len(self.knots) == 1:
            return np.repeat(self.influence_draws, len(similarity), axis=1)
        low, high = self.knots[above - 1], self.knots[above]
        part = np.clip((similarity - low) / (high - low), 0.0, 1.0).astype(np.float32)
        return self.influence_draws[:, above - 1] * (1 - part) + self.influence_draws[:, above] * part

    @property
    def reached(self) -> float:
        """Similarity up to which no draw of the curve gives more influence than unrelated images have."""
        above = (self.influence > self.level[0]) | (self.influence_draws > self.level[1:, None]).any(axis=0)
        return float(np.array([-np.inf, *self.knots])[np.argmax(above)]) if above.any() else np.inf

    def strengths_of(self, similarity: np.ndarray) -> list[str | None]:
        """'strong', 'medium' or 'weak' for each of (M,) similarities; None for all where the calibration separates nothing.

        Strong: in 97.5% of the bootstrap's draws, images with this similarity are expected to have more influence than
        `UNRELATED_PART` of unrelated images have. Medium: more than twice the influence of an unrelated image.
        """
        draws = self.draws_of(np.append(similarity, self.knots[-1]))
        certain = [(draws > bar[1:, None]).mean(axis=0) >= 0.975 for bar in (2 * self.unrelated, self.level)]
        medium, strong = certain[0], certain[0] & certain[1]
        if not medium[-1]:
            return [None] * len(similarity)
        return [STRENGTHS[value] for value in (medium.astype(int) + strong)[:-1].tolist()]


def curve_bins(similarity: np.ndarray, weights: np.ndarray, *, per_bin: float, growth: float = 1.35) -> np.ndarray:
    """(P,) bin of each pair by its (P,) similarity and weight, 0 for the lowest similarities.

    The topmost bin has weight `per_bin`, each next one `growth` times that of the one above, up to a twentieth of all.
    """
    order = np.argsort(-similarity, kind="stable")
    reached = np.cumsum(weights[order])
    edges = []
    size, edge = per_bin, per_bin
    while edge < reached[-1]:
        edges.append(edge)
        size = max(per_bin, min(size * growth, reached[-1] / 20))
        edge += size
    bins = np.empty(len(similarity), dtype=np.int64)
    bins[order] = np.searchsorted(np.array(edges), reached - 1e-9 * reached[-1])
    return np.unique(-bins, return_inverse=True)[1]


def fit_curves(
    similarities: Sequence[np.ndarray], scored: Sequence[ScoredQuery], *, corpus_size: int, resamples: int, seed: int
) -> dict[str, Any]:
    """The curves of a `Calibration` and their R bootstrap `resamples` over queries.

    Of Q queries, `similarities` are (C,) each, to the candidates that the teacher `scored`; `corpus_size` is N. Returns
    'knots', 'percentile', 'influence', 'influence_draws', 'unrelated', 'level' and 'queries', as `Calibration` has them.
    """
    weights = [corpus_weights(query.is_outsider, corpus_size) for query in scored]
    pairs = [(query.influence, weight) for query, weight in zip(scored, weights, strict=True)]
    kinds = {"percentile": teacher_percentiles, "influence": relative_influence}
    values = {name: np.concatenate([measure(*pair) for pair in pairs]) for name, measure in kinds.items()}
    similarity, weight = np.concatenate(similarities).astype(np.float64), np.concatenate(weights)
    query = np.repeat(np.arange(len(scored)), [len(part) for part in similarities])
    bins = curve_bins(similarity, weight, per_bin=max(20.0, len(scored) / 2))
    count = int(bins.max()) + 1

    def by_query(amounts: np.ndarray) -> np.ndarray:
        return np.bincount(query * count + bins, weights=amounts, minlength=len(scored) * count).reshape(len(scored), count)

    mass = by_query(weight)
    knots = by_query(weight * similarity).sum(axis=0) / mass.sum(axis=0)
    whole = {name: by_query(weight * of_pair).sum(axis=0) / mass.sum(axis=0) for name, of_pair in values.items()}
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(scored), np.full(len(scored), 1 / len(scored)), size=resamples)  # (R, Q)
    influence_sums, masses = counts @ by_query(weight * values["influence"]), counts @ mass
    drawn = np.where(masses > 0, influence_sums / np.maximum(masses, 1e-12), whole["influence"])
    outside = np.concatenate([part.is_outsider for part in scored])
    if not outside.any():  # the whole corpus was scored: what is least similar is unrelated
        outside = bins <= count // 2
    unrelated_sum = np.bincount(query, weights=outside * weight * values["influence"], minlength=len(scored))
    unrelated_mass = np.bincount(query, weights=outside * weight, minlength=len(scored))
    both = np.vstack([np.ones((1, len(scored)), dtype=np.int64), counts])
    return {
        "knots": knots,
        **{name: _rising(curve, mass.sum(axis=0)) for name, curve in whole.items()},
        "influence_draws": np.stack([_rising(row, of_bin) for row, of_bin in zip(drawn, masses, strict=True)]),
        "unrelated": (both @ unrelated_sum) / np.maximum(both @ unrelated_mass, 1e-12),
        "level": _quantiles(values["influence"][outside], query[outside], both, weight[outside], UNRELATED_PART),
        "queries": len(scored),
    }


def _quantiles(values: np.ndarray, query: np.ndarray, counts: np.ndarray, weights: np.ndarray, part: float) -> np.ndarray:
    """(R,) quantiles of (P,) weighted values in R resamples of their queries; counts is (R, Q), how often each was drawn."""
    order = np.argsort(values, kind="stable")
    values, query, weights = values[order], query[order], weights[order]
    found: list[float] = []
    for drawn in counts:
        mass = np.cumsum(drawn[query] * weights)
        found.append(values[np.searchsorted(mass, part * mass[-1])] if mass[-1] > 0 else found[0])
    return np.array(found)


def _rising(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The nearest sequence, in weighted squares, that does not fall."""
    from scipy.optimize import isotonic_regression

    return isotonic_regression(values, weights=np.maximum(weights, 1e-9)).x


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write it as safetensors, atomically."""
    parts = {name: value for name, value in vars(calibration).items() if name != "ownness"}
    single = {"influence_draws", "feature_mean"}
    tensors = {name: np.asarray(value, np.float32 if name in single else np.float64) for name, value in parts.items()}
    tensors |= calibration.ownness.tensors() if calibration.ownness is not None else {}
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": FORMATS[0]})  # one entry only: several come in any order


def load_calibration(path: Path, *, feature_dim: int) -> Calibration:
    """Read what `save_calibration` wrote, strictly; ArtifactDamagedError if it is none for features of this width."""
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    parts = {name: value for name, value in tensors.items() if "." in name}
    plain = {name: value for name, value in tensors.items() if "." not in name}
    knots = len(plain.get("knots", []))
    if metadata.get("format") == FORMATS[1] and "unrelated" in plain:
        plain = {"level": HALF_NORMAL * plain["unrelated"], "queries": np.zeros(()), **plain}
    sound = (
        metadata.get("format") in FORMATS
        and set(plain) == set(Calibration.__annotations__) - {"ownness"}
        and all(np.isfinite(value).all() for value in tensors.values())
        and plain["percentile"].shape == plain["influence"].shape == (knots,)
        and plain["influence_draws"].shape == (len(plain["unrelated"]) - 1, knots)
        and plain["level"].shape == plain["unrelated"].shape
        and plain["feature_mean"].shape == (feature_dim,)
        and all((np.diff(plain[name]) >= 0).all() for name in ("knots", "percentile", "influence"))
    )
    wrong = f"{path} is no calibration ({FORMATS[0]!r}) for features of width {feature_dim}; fetch or build it again."
    if not sound:
        raise ArtifactDamagedError(wrong)
    try:
        ownness = Ownness.read(parts, feature_dim)
    except (ValueError, TypeError) as error:
        raise ArtifactDamagedError(wrong) from error
    single = {"widening": plain["widening"].item(), "queries": int(plain["queries"].item()), "ownness": ownness}
    return Calibration(**plain | single)
