"""Calibrate: from a similarity, which only orders, to degrees of influence.

On validation queries, which the student has not learned from, two rising curves are fitted to the teacher's scores:
similarity -> expected percentile of the teacher's score within the corpus, and similarity -> expected positive influence in
units of the corpus' mean. The second makes shares: of a query's positive influence, what a creator's images hold beyond what
as many unrelated images would hold; the remainder belongs to no one in particular. Near-duplicates (the catalogue's `family`)
count once together: each of n has weight 1 / n.

A score table holds a query's neighbours whole and of the rest of the corpus a few outsiders, drawn at random; each outsider
stands for its part of the rest (Horvitz-Thompson weights), so that curves and shares are of the corpus, not of the table.
Intervals are bootstraps over validation queries and families of images, widened until they hold 95% of the creators' shares of
validation queries that took no part in the fit.

Reads scores/ (validation split), queries' and corpus' features, student/; writes calibration/calibration.safetensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from fastattr.core.errors import ArtifactDamagedError, InputError
from fastattr.core.files import atomic_path, read_json
from fastattr.core.stages import MANIFEST, finished, open_stage, require_same, write_manifest
from fastattr.corpus.store import Corpus
from fastattr.students.ownness import Density, fit_density

if TYPE_CHECKING:
    from fastattr.teachers.scores import ScoredQuery

FILE = "calibration.safetensors"
FORMAT = "fastattr calibration 1"
FOLDS = 5
"""Parts of the validation queries, each of which is foretold by the others to find how wide intervals must be."""


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """Settings of the calibration."""

    resamples: int = 200
    """R, bootstrap resamples of the validation queries that are kept."""
    false_alarms: float = 0.05
    """Part of the generator's own images that the own-or-foreign check may call foreign."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 10 or not 0 < self.false_alarms < 1:
            raise InputError("resamples must be at least 10 and false_alarms between 0 and 1")


def corpus_weights(is_outsider: np.ndarray, corpus_size: int) -> np.ndarray:
    """(C,) how many images of the corpus each candidate stands for: itself, or an outsider's part of the rest."""
    outsiders = int(is_outsider.sum())
    rest = corpus_size - (len(is_outsider) - outsiders)
    weights: np.ndarray = np.where(is_outsider, rest / max(outsiders, 1), 1.0)
    return weights


def teacher_percentiles(influence: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(C,) percentiles of (C,) influence scores within the weighted set: 100 x the part of it with a lower score.

    Equal scores share their middle.
    """
    _, level = np.unique(influence, return_inverse=True)
    mass = np.bincount(level, weights=weights)
    percentiles: np.ndarray = (np.cumsum(mass) - mass / 2)[level] * (100 / mass.sum())
    return percentiles


def relative_influence(influence: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(C,) positive influence in units of its weighted mean; negative scores count as none. Zeros if none is positive."""
    positive = np.maximum(influence.astype(np.float64), 0.0)
    mean = (positive * weights).sum() / weights.sum()
    scaled: np.ndarray = positive / mean if mean > 0 else positive
    return scaled


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
    feature_mean: np.ndarray
    """(F,) the corpus' mean features: what stands for an image or prompt that is taken away."""
    density: Density | None
    """Of the generator's own images; None where there are too few."""

    def percentile_of(self, similarity: np.ndarray) -> np.ndarray:
        """Expected teacher percentile, 0 to 100 = most influential, of similarities of any shape."""
        found: np.ndarray = np.interp(similarity, self.knots, self.percentile)
        return found

    def influence_of(self, similarity: np.ndarray) -> np.ndarray:
        """Expected positive influence of similarities of any shape, in units of the corpus' mean."""
        found: np.ndarray = np.interp(similarity, self.knots, self.influence)
        return found

    def draws_of(self, similarity: np.ndarray) -> np.ndarray:
        """(R, M) expected positive influence of (M,) similarities under each bootstrap resample."""
        above = np.clip(np.searchsorted(self.knots, similarity), 1, max(len(self.knots) - 1, 1))
        if len(self.knots) == 1:
            return np.repeat(self.influence_draws, len(similarity), axis=1)
        low, high = self.knots[above - 1], self.knots[above]
        part = np.clip((similarity - low) / (high - low), 0.0, 1.0).astype(np.float32)
        draws: np.ndarray = self.influence_draws[:, above - 1] * (1 - part) + self.influence_draws[:, above] * part
        return draws


def curve_bins(similarity: np.ndarray, weights: np.ndarray, *, per_bin: float, growth: float = 1.35) -> np.ndarray:
    """(P,) bin of each pair, 0 for the lowest similarities.

    Args:
        similarity: (P,).
        weights: (P,) positive.
        per_bin: weight of the topmost bin.
        growth: ratio of a bin's weight to that of the one above, until bins hold a twentieth of the whole.
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
    _, packed = np.unique(-bins, return_inverse=True)
    counted: np.ndarray = packed
    return counted


def fit_curves(
    similarities: Sequence[np.ndarray], scored: Sequence[ScoredQuery], *, corpus_size: int, resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """The curves of a `Calibration` and their bootstrap over queries.

    Args:
        similarities: of Q queries, each (C,), to their candidates.
        scored: the Q queries' candidates as the teacher scored them.
        corpus_size: N.
        resamples: R.
        seed: of the bootstrap.

    Returns:
        'knots', 'percentile', 'influence', 'influence_draws', 'unrelated', as `Calibration` has them.
    """
    weights = [corpus_weights(query.is_outsider, corpus_size) for query in scored]
    pairs = [(query.influence, weight) for query, weight in zip(scored, weights, strict=True)]
    values = {
        "percentile": np.concatenate([teacher_percentiles(*pair) for pair in pairs]),
        "influence": np.concatenate([relative_influence(*pair) for pair in pairs]),
    }
    similarity, weight = np.concatenate(similarities).astype(np.float64), np.concatenate(weights)
    query = np.repeat(np.arange(len(scored)), [len(part) for part in similarities])
    bins = curve_bins(similarity, weight, per_bin=5.0 * len(scored))
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
        "percentile": _rising(whole["percentile"], mass.sum(axis=0)),
        "influence": _rising(whole["influence"], mass.sum(axis=0)),
        "influence_draws": np.stack([_rising(row, of_bin) for row, of_bin in zip(drawn, masses, strict=True)]),
        "unrelated": (both @ unrelated_sum) / np.maximum(both @ unrelated_mass, 1e-12),
    }


def _rising(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The nearest sequence, in weighted squares, that does not fall."""
    from scipy.optimize import isotonic_regression

    fitted: np.ndarray = isotonic_regression(values, weights=np.maximum(weights, 1e-9)).x
    return fitted


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


def find_widening(
    similarities: Sequence[np.ndarray],
    scored: Sequence[ScoredQuery],
    names: Sequence[np.ndarray],
    families: Sequence[np.ndarray],
    *,
    corpus_size: int,
    resamples: int,
    seed: int,
    least_share: float = 0.01,
) -> float:
    """By which factor, at least 1, intervals must be widened to hold 95% of held-out queries' shares among their neighbours.

    Args:
        similarities: of Q queries, each (C,).
        scored: the queries as the teacher scored them.
        names: of each query's candidates.
        families: of each query's candidates.
        corpus_size: N.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        least_share: names that are expected to hold less are left out.
    """
    ratios = []
    for fold in range(min(FOLDS, len(scored))):
        held_out = range(fold, len(scored), FOLDS)
        others = [row for row in range(len(scored)) if row % FOLDS != fold] or list(range(len(scored)))
        curves = fit_curves(
            [similarities[row] for row in others],
            [scored[row] for row in others],
            corpus_size=corpus_size,
            resamples=resamples,
            seed=seed,
        )
        fitted = Calibration(**curves, widening=1.0, feature_mean=np.zeros(0), density=None)
        for row in held_out:
            near = ~scored[row].is_outsider
            _, family, sizes = np.unique(families[row][near], return_inverse=True, return_counts=True)
            expected = estimate_shares(
                fitted,
                similarities[row][near],
                names[row][near],
                family,
                family_sizes=sizes[family],
                beyond_unrelated=False,
                seed=seed + row,
            )
            found, actual = teacher_shares(scored[row].influence[near], 1 / sizes[family], names[row][near])
            actual = actual[np.isin(found, expected.names)]
            side = np.where(actual > expected.share, expected.high - expected.share, expected.share - expected.low)
            ratio = np.abs(actual - expected.share) / np.maximum(side, 1e-9)
            ratios.append(ratio[expected.share >= least_share])
    every = np.concatenate(ratios)
    return max(1.0, float(np.quantile(every, 0.95))) if len(every) else 1.0


def fit_calibration(
    similarities: Sequence[np.ndarray],
    scored: Sequence[ScoredQuery],
    names: Sequence[np.ndarray],
    families: Sequence[np.ndarray],
    *,
    corpus_size: int,
    feature_mean: np.ndarray,
    density: Density | None,
    resamples: int = 200,
    seed: int = 0,
) -> Calibration:
    """Fit everything on validation queries.

    Args:
        similarities: of Q queries, each (C,), to their candidates.
        scored: the Q queries' candidates as the teacher scored them.
        names: (C,) names, say creators, of each query's candidates; they find how wide intervals must be.
        families: (C,) families of each query's candidates.
        corpus_size: N.
        feature_mean: (F,) of the corpus.
        density: of own images.
        resamples: R.
        seed: of the bootstraps.

    Raises:
        InputError: there is no query.
    """
    if not scored:
        raise InputError("a calibration needs validation queries; score some with `fastattr teach`.")
    curves = fit_curves(similarities, scored, corpus_size=corpus_size, resamples=resamples, seed=seed)
    widening = find_widening(
        similarities, scored, names, families, corpus_size=corpus_size, resamples=min(resamples, 100), seed=seed
    )
    return Calibration(**curves, widening=widening, feature_mean=feature_mean.astype(np.float32), density=density)


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write it as safetensors, atomically."""
    tensors = {
        name: np.asarray(getattr(calibration, name), dtype=np.float64)
        for name in ("knots", "percentile", "influence", "unrelated", "widening")
    }
    tensors |= {name: np.asarray(getattr(calibration, name), np.float32) for name in ("influence_draws", "feature_mean")}
    if calibration.density is not None:
        tensors |= {f"density.{name}": np.asarray(value, np.float32) for name, value in vars(calibration.density).items()}
    with atomic_path(path) as temporary:
        save_file(
            {name: np.ascontiguousarray(value) for name, value in tensors.items()},
            temporary,
            metadata={"format": FORMAT},  # one entry only: several would be written in any order
        )


def load_calibration(path: Path, *, feature_dim: int) -> Calibration:
    """Read what `save_calibration` wrote, strictly.

    Raises:
        ArtifactDamagedError: the file is not a calibration for features of this width.
    """
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    parts = {name.removeprefix("density."): value for name, value in tensors.items() if name.startswith("density.")}
    plain = {name: value for name, value in tensors.items() if not name.startswith("density.")}
    knots = len(plain.get("knots", []))
    sound = (
        metadata.get("format") == FORMAT
        and set(plain) == set(Calibration.__annotations__) - {"density"}
        and set(parts) in (set(), set(Density.__annotations__))
        and all(np.isfinite(value).all() for value in tensors.values())
        and plain["percentile"].shape == plain["influence"].shape == (knots,)
        and plain["influence_draws"].shape == (len(plain["unrelated"]) - 1, knots)
        and plain["feature_mean"].shape == (feature_dim,)
        and all((np.diff(plain[name]) >= 0).all() for name in ("knots", "percentile", "influence"))
    )
    if not sound:
        raise ArtifactDamagedError(
            f"{path} is no calibration ({FORMAT!r}) for features of width {feature_dim}; fetch or build the attributor again."
        )
    numbers = {name: parts.pop(name).item() for name in ("rest", "threshold") if name in parts}
    density = Density(**parts, **numbers) if parts else None
    return Calibration(**{**plain, "widening": plain["widening"].item()}, density=density)


def run(config: CalibrateConfig, run_dir: Path, *, encoders: Sequence[str]) -> dict[str, Any]:
    """Calibrate run_dir/student on the validation queries; returns the manifest, whose 'queries' is 0 if there are none."""
    # They import torch, for which whoever only reads a calibration should not wait.
    from fastattr.features.features import features_fingerprint, folders, read_features
    from fastattr.students.distill import open_student
    from fastattr.students.student import embed_both
    from fastattr.teachers.scores import read_scores

    corpus = Corpus(run_dir / "corpus")
    scores_manifest = open_stage(run_dir / "scores", "scores")
    require_same("the corpus of scores/", scores_manifest["corpus_fingerprint"], corpus.fingerprint, "Score this corpus first.")
    corpus_folders, query_folders = folders(run_dir, "features", encoders), folders(run_dir, "query_features", encoders)
    folder = run_dir / "calibration"
    inputs = {
        "scores": scores_manifest["fingerprint"],
        "student": open_stage(run_dir / "student", "student")["fingerprint"],
        "features": features_fingerprint(corpus_folders),
        "query_features": features_fingerprint(query_folders),
    }
    if finished(folder, stage="calibration", config=config, inputs=inputs):
        manifest: dict[str, Any] = read_json(folder / MANIFEST)
        return manifest
    scored = read_scores(run_dir / "scores", split="validation")
    facts: dict[str, Any] = {"queries": len(scored)}
    if scored:
        features = read_features(corpus_folders, corpus.image_ids)
        own = read_features(query_folders, [query.query_id for query in scored])
        queries, images = embed_both(open_student(run_dir), own, features)
        rows = [corpus.rows(query.image_ids) for query in scored]
        trained = read_features(query_folders, [query.query_id for query in read_scores(run_dir / "scores", split="train")])
        density = fit_density(trained, own, false_alarms=config.false_alarms) if len(trained) >= 8 else None
        creators, families = np.array(corpus.column("creator")), families_of(corpus.column("family"))
        calibration = fit_calibration(
            [images[part] @ query for part, query in zip(rows, queries, strict=True)],
            scored,
            [creators[part] for part in rows],
            [families[part] for part in rows],
            corpus_size=len(corpus),
            feature_mean=features.mean(axis=0),
            density=density,
            resamples=config.resamples,
            seed=config.seed,
        )
        save_calibration(calibration, folder / FILE)
        facts |= {
            "widening": round(calibration.widening, 4),
            "unrelated": round(float(calibration.unrelated[0]), 4),
            "highest_influence": round(float(calibration.influence[-1]), 4),
        }
    return write_manifest(folder, stage="calibration", config=config, inputs=inputs, **facts)


def families_of(column: Sequence[str]) -> np.ndarray:
    """(N,) number of each image's family; an image without one is a family of its own."""
    names = np.array([name or f"\0{row}" for row, name in enumerate(column)])
    _, numbers = np.unique(names, return_inverse=True)
    return numbers
