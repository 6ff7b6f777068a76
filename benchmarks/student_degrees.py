"""What a student's degrees of influence are worth on a run's test queries: shares, percentiles, the own-or-foreign check.

Part `degrees` of benchmarks/student.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import machine
import numpy as np
from PIL import Image

from fastattr.corpus.store import Corpus
from fastattr.features.kinds import open_encoder
from fastattr.generators.queries import Queries
from fastattr.students.calibrate import fit_calibration
from fastattr.students.calibration import Calibration, corpus_weights, teacher_percentiles
from fastattr.students.ownness import fit_ownness, measures_of
from fastattr.students.shares import divide, families_of, teacher_shares
from fastattr.students.student import Student

if TYPE_CHECKING:
    from student import Tables

BOTH = ("open_clip-image:encoder", "open_clip-text:encoder")


def calibrate(tables: Tables, space: str, student: Student, run_dir: Path, *, seed: int) -> Calibration:
    """The calibration that the attributor would hold."""
    queries, of_image = Queries(run_dir / "queries"), np.repeat([True, False], tables.images["image"].shape[1])
    pictures = [queries.image(row) for split in ("train", "validation") for row in queries.of_split(split)]
    creators, families = np.array(tables.corpus.column("creator")), families_of(tables.corpus.column("family"))
    rows = tables.rows["validation"]
    return fit_calibration(
        tables.similarities(space, "validation", student),
        tables.scored["validation"],
        [creators[own] for own in rows],
        [families[own] for own in rows],
        corpus_size=len(tables.corpus),
        feature_mean=tables.images[space].mean(axis=0),
        ownness=fit_ownness(
            tables.queries[space, "train"],
            tables.queries[space, "validation"],
            image=of_image,
            text=~of_image,
            measures=np.stack([measures_of(picture) for picture in pictures]),
            captions=(text for texts in tables.corpus.captions for text in texts),
            false_alarms=0.05,
            seed=seed,
        ),
        seed=seed,
    )


def measure_degrees(tables: Tables, student: Student, run_dir: Path, *, seed: int) -> dict[str, Any]:
    """Shares, percentiles and warnings on the test queries, whose scores are the exact teacher's."""
    calibration = calibrate(tables, "both", student, run_dir, seed=seed)
    creators, families = np.array(tables.corpus.column("creator")), families_of(tables.corpus.column("family"))
    expected, actual, inside, percentiles = [], [], [], []
    similarities = tables.similarities("both", "test", student)
    for number, (query, own, values) in enumerate(zip(tables.scored["test"], tables.rows["test"], similarities, strict=True)):
        near = ~query.is_outsider
        _, family, counts = np.unique(families[own][near], return_inverse=True, return_counts=True)
        found = divide(
            calibration,
            values[near],
            creators[own][near],
            family,
            weights=1 / counts[family],
            level=np.zeros(len(calibration.level)),
            seed=number,
        )
        _, theirs = teacher_shares(query.influence[near], 1 / counts[family], creators[own][near])
        expected.append(found.share)
        actual.append(theirs)
        inside.append((found.low <= theirs) & (theirs <= found.high))
        weights = corpus_weights(query.is_outsider, len(tables.corpus))
        truth = teacher_percentiles(query.influence, weights)
        percentiles.append(np.stack([calibration.percentile_of(values), truth, weights], axis=1))
    shares, found_shares = np.concatenate(expected), np.concatenate(actual)
    places = np.concatenate(percentiles)
    # What one would say without looking at the image: each creator's part of the candidates.
    named = [creators[own][~query.is_outsider] for query, own in zip(tables.scored["test"], tables.rows["test"], strict=True)]
    baseline = [teacher_shares(np.ones(len(own)), np.ones(len(own)), own)[1] for own in named]
    held = np.concatenate(inside)
    counted = shares >= 0.01
    return {
        "share_calibration_error": calibration_error(shares, found_shares),
        "share_mean_absolute_error": float(np.abs(shares - found_shares).mean()),
        "share_mean_absolute_error_by_count": float(np.abs(np.concatenate(baseline) - found_shares).mean()),
        "share_interval_coverage": float(held[counted].mean()),
        "share_interval_coverage_n": int(counted.sum()),
        "share_widening": calibration.widening,
        "percentile_calibration_error": calibration_error(*places.T),
        "influence_top_over_mean": float(calibration.influence[-1]),
        "influence_unrelated_over_mean": float(calibration.unrelated[0]),
        **measure_foreign(tables, calibration, run_dir, seed=seed),
    }


def calibration_error(expected: np.ndarray, actual: np.ndarray, weights: np.ndarray | None = None, *, bins: int = 10) -> float:
    """Mean absolute difference of what was foretold and what was found, as means in bins of equal weight."""
    weights = np.ones(len(expected)) if weights is None else weights
    order = np.argsort(expected, kind="stable")
    reached = np.cumsum(weights[order]) / weights.sum()
    error = 0.0
    for part in range(bins):
        chosen = order[(reached > part / bins) & (reached <= (part + 1) / bins + 1e-12)]
        error += abs(float(weights[chosen] @ (expected[chosen] - actual[chosen])))
    return error / float(weights.sum())


def foreign_images(
    corpus: Corpus, queries: Queries, rows: Sequence[int], *, seed: int
) -> dict[str, tuple[list[Any], list[str]]]:
    """Kinds of images with prompts that the generator did not make for them."""
    rng = np.random.default_rng(seed)
    own = [queries.image(row) for row in rows]
    prompts = [queries.prompts[row] for row in rows]
    turned = prompts[len(prompts) // 2 :] + prompts[: len(prompts) // 2]
    noise = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in rows]
    flat = [Image.new("RGB", (64, 64), tuple(rng.integers(0, 256, 3).tolist())) for _ in rows]
    letters = np.array([*"abcdefghijklmnopqrstuvwxyz"])
    unseen = [" ".join("".join(rng.choice(letters, 7)) for _ in range(3)) for _ in rows]
    kinds: dict[str, tuple[list[Any], list[str]]] = {
        "other_prompt": (own, turned),
        "unknown_words": (own, unseen),
        "noise": (noise, prompts),
        "one_colour": (flat, prompts),
    }
    photographs = sample_photographs(len(rows), seed=seed)
    if photographs:
        kinds["photograph"] = (photographs, prompts)
    chosen = rng.choice(len(corpus), len(rows), replace=False)
    kinds["training_image"] = ([corpus.image(int(row)) for row in chosen], [corpus.captions[row][0] for row in chosen])
    return kinds


def sample_photographs(count: int, *, seed: int) -> list[Image.Image]:
    """64 x 64 pieces of the two photographs that scikit-learn brings along; none without scikit-learn."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        return []
    rng = np.random.default_rng(seed)
    pieces = []
    for number in range(count):
        whole = Image.fromarray(load_sample_images().images[number % 2])
        side = int(rng.integers(96, min(whole.size)))
        left, top = (int(rng.integers(0, length - side + 1)) for length in whole.size)
        pieces.append(whole.crop((left, top, left + side, top + side)).resize((64, 64)))
    return pieces


def measure_foreign(tables: Tables, calibration: Calibration, run_dir: Path, *, seed: int) -> dict[str, Any]:
    """Error rates of the own-or-foreign check: own test queries called foreign, and foreign kinds not recognised."""
    queries = Queries(run_dir / "queries")
    encoders = [open_encoder(name, folder=run_dir) for name in BOTH]
    rows = queries.of_split("test")

    def doubted(images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        features = np.concatenate([encoder.encode(images, [[text] for text in prompts]) for encoder in encoders], axis=1)
        doubts = calibration.ownness.doubts(features, prompts, [measures_of(image) for image in images])
        return np.array([bool(reasons) for reasons in doubts])

    own = [queries.image(row) for row in rows], [queries.prompts[row] for row in rows]
    found: dict[str, Any] = machine.share("foreign_false_alarms", doubted(*own))
    for kind, foreign in foreign_images(tables.corpus, queries, rows, seed=seed).items():
        found |= machine.share(f"foreign_missed_{kind}", ~doubted(*foreign))
    return found
