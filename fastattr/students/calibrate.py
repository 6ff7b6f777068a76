"""Calibrate stage: fit curves, intervals and the own-or-foreign check on the validation queries.

Intervals are widened until they hold 95% of the creators' shares of validation queries that took no part in the fit.

Reads scores/ (validation split), queries' and corpus' features, student/; writes calibration/calibration.safetensors.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastattr.core.errors import InputError
from fastattr.core.stages import make, open_stage, require_same
from fastattr.corpus.store import Corpus
from fastattr.features.encoder import modality
from fastattr.features.store import features_fingerprint, folders, read_features
from fastattr.generators.queries import Queries
from fastattr.students.calibration import FILE, Calibration, fit_curves, save_calibration
from fastattr.students.distill import open_student
from fastattr.students.ownness import LEAST_HELD_OUT, LEAST_QUERIES, Ownness, fit_ownness, measures_of
from fastattr.students.shares import LEAST_SHARE, divide, families_of, teacher_shares
from fastattr.students.student import embed
from fastattr.teachers.scores import ScoredQuery, read_scores

logger = logging.getLogger(__name__)

PICTURES = 5000
"""Training queries whose pictures are looked at."""
Arrays = Sequence[np.ndarray]
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


def find_widening(
    similarities: Arrays,
    scored: Sequence[ScoredQuery],
    names: Arrays,
    families: Arrays,
    *,
    resamples: int,
    seed: int,
    **corpus: int,
) -> float:
    """By which factor, at least 1, intervals must be widened to hold 95% of held-out queries' shares among their neighbours.

    Arguments as `fit_calibration` has them; names that are expected to hold less than `LEAST_SHARE` are left out.
    """
    drawn, none = {"resamples": resamples, "seed": seed, **corpus}, np.zeros(0)
    ratios = []
    for fold in range(min(FOLDS, len(scored))):
        others = [row for row in range(len(scored)) if row % FOLDS != fold] or list(range(len(scored)))
        curves = fit_curves([similarities[row] for row in others], [scored[row] for row in others], **drawn)
        fitted = Calibration(**curves, widening=1.0, feature_mean=none, ownness=None)
        for row in range(fold, len(scored), FOLDS):
            near = ~scored[row].is_outsider
            _, family, sizes = np.unique(families[row][near], return_inverse=True, return_counts=True)
            counted: dict[str, Any] = {"weights": 1 / sizes[family], "level": np.zeros(resamples + 1), "seed": seed + row}
            expected = divide(fitted, similarities[row][near], names[row][near], family, **counted)
            found, actual = teacher_shares(scored[row].influence[near], 1 / sizes[family], names[row][near])
            actual = actual[np.isin(found, expected.names)]
            side = np.where(actual > expected.share, expected.high - expected.share, expected.share - expected.low)
            ratio = np.abs(actual - expected.share) / np.maximum(side, 1e-9)
            ratios.append(ratio[expected.share >= LEAST_SHARE])
    every = np.concatenate(ratios)
    return max(1.0, float(np.quantile(every, 0.95))) if len(every) else 1.0


def fit_calibration(
    similarities: Arrays,
    scored: Sequence[ScoredQuery],
    names: Arrays,
    families: Arrays,
    *,
    corpus_size: int,
    feature_mean: np.ndarray,
    ownness: Ownness | None,
    resamples: int = 200,
    seed: int = 0,
) -> Calibration:
    """Fit everything on validation queries; InputError if there is none.

    Of Q queries, the similarities, names (say creators) and families are (C,) arrays of their candidates; names find how wide
    intervals must be. `feature_mean` is (F,) of the corpus; the others are as `fit_curves` has them.
    """
    if not scored:
        raise InputError("a calibration needs validation queries; score some with `fastattr teach`.")
    sizes = {"corpus_size": corpus_size, "seed": seed}
    curves = fit_curves(similarities, scored, **sizes, resamples=resamples)
    widening = find_widening(similarities, scored, names, families, **sizes, resamples=min(resamples, 100))
    return Calibration(**curves, widening=widening, feature_mean=feature_mean.astype(np.float32), ownness=ownness)


def run(config: CalibrateConfig, run_dir: Path, *, encoders: Sequence[str]) -> dict[str, Any]:
    """Calibrate run_dir/student on the validation queries; returns the manifest, whose 'queries' is 0 if there are none."""
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

    def work() -> dict[str, Any]:
        scored = read_scores(run_dir / "scores", split="validation")
        if not scored:
            return {"queries": 0}
        features = read_features(corpus_folders, corpus.image_ids)
        own = read_features(query_folders, [query.query_id for query in scored])
        student = open_student(run_dir)
        queries, images = embed(student, own), embed(student, features)
        rows = [corpus.rows(query.image_ids) for query in scored]
        train = [query.query_id for query in read_scores(run_dir / "scores", split="train")]
        widths = [open_stage(path, "features")["width"] for path in query_folders]
        kinds = np.repeat([modality(name) for name in encoders], widths)
        asked = Queries(run_dir / "queries")
        place = {query_id: row for row, query_id in enumerate(asked.query_ids)}
        pictures = [*train[:PICTURES], *(query.query_id for query in scored)]
        looks = np.stack([measures_of(asked.image(place[query_id])) for query_id in pictures])
        about: dict[str, Any] = {"image": kinds == "image", "text": kinds == "text", "measures": looks}
        about |= {"captions": (text for texts in corpus.captions for text in texts), "false_alarms": config.false_alarms}
        ownness = fit_ownness(read_features(query_folders, train), own, **about, seed=config.seed)
        creators, families = np.array(corpus.column("creator")), families_of(corpus.column("family"))
        similarities = [images[part] @ query for part, query in zip(rows, queries, strict=True)]
        owners, near = [creators[part] for part in rows], [families[part] for part in rows]
        facts: dict[str, Any] = {"corpus_size": len(corpus), "feature_mean": features.mean(axis=0), "ownness": ownness}
        facts |= {"resamples": config.resamples, "seed": config.seed}
        calibration = fit_calibration(similarities, scored, owners, near, **facts)
        save_calibration(calibration, folder / FILE)
        if ownness.match is None:
            logger.warning(
                "whether a picture goes with its prompt is not checked: that needs %d training and %d validation queries, "
                "there are %d and %d, and encoders of picture and prompt apart",
                *(LEAST_QUERIES, LEAST_HELD_OUT, len(train), len(scored)),
            )
        found = {"widening": calibration.widening, "unrelated": calibration.unrelated[0], "level": calibration.level[0]}
        found["highest_influence"] = calibration.influence[-1]
        rounded = {name: round(float(value), 4) for name, value in found.items()}
        return {"queries": len(scored), "own_or_foreign": ownness.match is not None, **rounded}

    return make(folder, work, stage="calibration", config=config, inputs=inputs)
