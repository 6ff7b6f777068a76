"""The student: how much of the teacher it keeps, how fast it is trained, and what its degrees of influence are worth.

    python benchmarks/student.py --json benchmarks/results/student.json [--quick]
    python benchmarks/student.py --parts bench --json benchmarks/results/student.json     once the ground truth is there

Parts, each of which adds its keys to the JSON file:
    features diffusion features of the run's corpus and queries, written to the work folder (only if named; 4 minutes)
    speed    pairs a second at the paper's sizes: every pair through the network, as the authors do, against blocks of pairs
    tables   the emoji score tables: mAP(L) of feature spaces and losses; the time to equal mAP; hubs; the best student
    degrees  the best student's shares, percentiles and own-or-foreign check against the exact teacher's test queries
    bench    residual LDS on emoji-bench's retrained models (needs benchmarks/truth/emoji-bench, settings and exact scores)
Students are chosen on validation queries; test queries are scored once, by what was chosen. mAP(L) is taken within each test
query's candidates, with L in percent of the corpus.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
import truth as table_of_truth
from accelerate import Accelerator
from ground_truth import CONFIG
from PIL import Image
from student_truth import Setting, measure as measure_students, open_bench
from torch.nn import functional as F
from tqdm import tqdm

from fastattr.core.errors import FastattrError, InputError
from fastattr.core.files import atomic_path, read_json, write_json
from fastattr.core.settings import read_yaml
from fastattr.core.stages import MANIFEST
from fastattr.core.training import TrainingConfig
from fastattr.corpus.store import Corpus
from fastattr.evaluation.subsets import RetrainConfig
from fastattr.features.kinds import open_encoder
from fastattr.features.stage import FeaturesConfig, encode_sets
from fastattr.features.store import folders, read_features
from fastattr.generators.queries import Queries
from fastattr.students.calibrate import fit_calibration
from fastattr.students.calibration import Calibration, corpus_weights, teacher_percentiles
from fastattr.students.distill import DistillConfig, Validation, distill
from fastattr.students.losses import LOSSES
from fastattr.students.ownness import fit_density
from fastattr.students.pairs import PairTable, labels_of, make_table, standardised
from fastattr.students.ranking import paired_bootstrap, spearman, standard_error, teacher_average_precision
from fastattr.students.shares import divide, families_of, teacher_shares
from fastattr.students.student import Student, StudentConfig, embed
from fastattr.teachers.scores import ScoredQuery, read_scores

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = Path(__file__).parent / "results" / "student.json"
TRUTH = Path(__file__).parent / "truth" / "emoji-bench"
PARTS = ("features", "speed", "tables", "degrees", "bench")
PERCENTS = {"half_pct": 0.5, "1pct": 1.0, "4pct": 4.0}
"""L of mAP(L), in percent of the corpus, by the ending of its keys."""
SPACES = {
    "image": ("open_clip-image:encoder",),
    "text": ("open_clip-text:encoder",),
    "both": ("open_clip-image:encoder", "open_clip-text:encoder"),
    "diffusion": ("diffusion:generator",),
    "all": ("open_clip-image:encoder", "open_clip-text:encoder", "diffusion:generator"),
}
"""Feature spaces by name; those whose folders are not there are left out."""
PAPER = StudentConfig(embed_dim=768, hidden=(768, 768, 768), linear_path=False, dropout=0.1)
"""The paper's network (arXiv:2511.10721, sec. 4; dropout as in the authors' code)."""
PAPER_RECIPE = "both_paper_recipe"
PAIRS_A_STEP = 4096
"""Of the authors' training."""
SHOWN_LOSSES = ("bce", "listwise")
"""With which each feature space is tuned: the paper's, and the one that was best on the validation queries."""
BLOCK_IMAGES = 8192
"""Training images in a block, where speed is measured."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is computed."""

    speed_images: int = 118_287
    speed_candidates: int = 10_000
    speed_width: int = 1280
    speed_steps: int = 6
    steps: int = 1200
    """At most, of each student."""
    paper_seconds: float = 240.0
    """Time that the authors' way gets on the emoji tables."""
    truth_queries: int = 1000
    seed: int = 0
    precision: str = "no"
    """`TrainingConfig.mixed_precision` of our students."""


QUICK = Sizes(speed_images=20_000, speed_candidates=2000, speed_steps=2, steps=60, paper_seconds=10.0)


def fast_precision() -> str:
    """'bf16' on processors that multiply bfloat16 matrices fast, else 'no'."""
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "no"


def recipe(sizes: Sizes, **options: Any) -> DistillConfig:
    """Our training with other options; those that `TrainingConfig` has go there."""
    training = TrainingConfig(
        steps=sizes.steps,
        batch_size=128,
        warmup_steps=20,
        ema_decay=0.99,
        checkpoint_every=10_000,
        seed=sizes.seed,
        mixed_precision=sizes.precision,
    )
    own = {name: options.pop(name) for name in list(options) if name in TrainingConfig.__annotations__}
    return replace(DistillConfig(loss="bce", judge_every=100, patience=3), training=replace(training, **own), **options)


@dataclass
class Tables:
    """The score tables and features of a run folder, opened."""

    corpus: Corpus
    scored: dict[str, list[ScoredQuery]]
    rows: dict[str, list[np.ndarray]]
    images: dict[str, np.ndarray]
    """By feature space (N, F)."""
    queries: dict[tuple[str, str], np.ndarray]
    """By feature space and split (Q, F)."""
    students: dict[str, Student] = field(default_factory=dict)

    def validation(self, space: str) -> Validation:
        """The validation queries in a feature space."""
        influence = [query.influence for query in self.scored["validation"]]
        return Validation(self.queries[space, "validation"], self.rows["validation"], influence)

    def train(
        self,
        space: str,
        config: DistillConfig,
        *,
        table: PairTable | None = None,
        picked: np.ndarray | None = None,
        on_judgement: Callable[[float], None] | None = None,
    ) -> Student:
        """A student of the training queries, or of a table of some of them (`picked`), in a feature space."""
        own = self.queries[space, "train"]
        if table is None:
            labels = labels_of(self.scored["train"], self.rows["train"])
            table = make_table(labels, corpus_size=len(self.corpus), kind=config.target_kind)
        with tempfile.TemporaryDirectory() as scratch:
            return distill(
                table,
                own if picked is None else own[picked],
                self.images[space],
                config,
                checkpoint=Path(scratch) / "checkpoint.safetensors",
                validation=self.validation(space),
                on_judgement=on_judgement,
            )

    def similarities(self, space: str, split: str, student: Student | None = None) -> list[np.ndarray]:
        """Q arrays (C,) of similarities of a split's queries to their candidates, by a student or by the untuned features."""
        own, theirs = self.queries[space, split], self.images[space]
        if student is not None:
            own, theirs = embed(student, own), embed(student, theirs)
        else:
            own, theirs = (F.normalize(torch.from_numpy(part), dim=1).numpy() for part in (own, theirs))
        return [theirs[rows] @ query for rows, query in zip(self.rows[split], own, strict=True)]

    def precision(self, similarities: Sequence[np.ndarray], split: str, percent: float) -> np.ndarray:
        """(Q,) AP(L), L in percent of the corpus."""
        positives = max(1, round(len(self.corpus) * percent / 100))
        pairs = zip(similarities, self.scored[split], strict=True)
        return np.array(
            [teacher_average_precision(own, query.influence, positives=min(positives, len(own) - 1)) for own, query in pairs]
        )


def open_tables(run_dir: Path, work_dir: Path) -> Tables:
    """Open a finished run; feature folders may also lie in `work_dir`.

    Raises:
        ArtifactNotFoundError: a stage has not finished.
    """
    corpus = Corpus(run_dir / "corpus")
    scored = {split: read_scores(run_dir / "scores", split=split) for split in ("train", "validation", "test")}
    images, queries = {}, {}
    for space, encoders in SPACES.items():
        found = []
        for encoder in encoders:
            here = [base for base in (run_dir, work_dir) if (folders(base, "features", [encoder])[0] / MANIFEST).exists()]
            found += here[:1]
        if len(found) < len(encoders):
            print(f"no features for {space}: left out", file=sys.stderr)
            continue
        paths = {
            name: [folders(base, name, [encoder])[0] for base, encoder in zip(found, encoders, strict=True)]
            for name in ("features", "query_features")
        }
        images[space] = read_features(paths["features"], corpus.image_ids)
        for split, of_split in scored.items():
            queries[space, split] = read_features(paths["query_features"], [query.query_id for query in of_split])
    rows = {split: [corpus.rows(query.image_ids) for query in of_split] for split, of_split in scored.items()}
    return Tables(corpus, scored, rows, images, queries)


# Speed


def pair_step(student: Student, optimizer: torch.optim.Optimizer, queries: Any, images: Any, targets: torch.Tensor) -> None:
    """One step of the authors' training: each of B pairs sends its query and its image through the network.

    Source: arXiv:2511.10721, sec. 4 (written anew).
    """
    cosine = (student(queries) * student(images)).sum(dim=1)
    loss = F.binary_cross_entropy_with_logits(student.logits(cosine), targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def block_step(
    student: Student, optimizer: torch.optim.Optimizer, queries: Any, images: Any, targets: torch.Tensor, weights: torch.Tensor
) -> None:
    """One step of ours: each query and image passes once, every known pair counts."""
    logits = student.logits(student(queries) @ student(images).T)
    loss = LOSSES["bce"](logits, targets, weights)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def measure_speed(sizes: Sizes) -> dict[str, Any]:
    """Pairs a second of both ways at the paper's sizes, with tables as sparse as the paper's and with full ones."""
    rng = np.random.default_rng(sizes.seed)
    count, queries = sizes.speed_images, 4900 if sizes.speed_images > 50_000 else 500
    images = rng.standard_normal((count, sizes.speed_width), dtype=np.float32).astype(np.float16)
    own = rng.standard_normal((queries, sizes.speed_width), dtype=np.float32).astype(np.float16)
    rows = np.stack([rng.choice(count, sizes.speed_candidates, replace=False) for _ in range(queries)]).astype(np.int32)
    targets = rng.random(rows.shape, dtype=np.float32)
    sparse = PairTable(rows, targets, count, outsiders=0.1)
    generator = torch.Generator().manual_seed(sizes.seed)

    def student() -> tuple[Student, torch.optim.Optimizer]:
        torch.manual_seed(sizes.seed)
        network = Student(sizes.speed_width, PAPER).train()
        return network, torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01)

    def pairs() -> int:
        query, place = rng.integers(0, queries, PAIRS_A_STEP), rng.integers(0, sizes.speed_candidates, PAIRS_A_STEP)
        taken = own[query], images[rows[query, place]], targets[query, place]
        pair_step(*paper, *(torch.from_numpy(part).float() for part in taken))
        return PAIRS_A_STEP

    def block(table: PairTable, size: int) -> int:
        query = rng.choice(len(table), min(len(table), size), replace=False)
        drawn = table.draw(query, BLOCK_IMAGES, generator)
        wanted, known = table.block(query, drawn)
        taken = own[query], images[drawn], wanted, known
        block_step(*ours, *(torch.from_numpy(part).float() for part in taken))
        return int(known.sum())

    def rate(step: Callable[[], int], steps: int) -> float:
        step()  # not counted: first calls allocate
        started = time.perf_counter()
        done = sum(step() for _ in range(steps))
        return done / (time.perf_counter() - started)

    paper, ours = student(), student()
    full = PairTable(None, rng.random((min(queries, 1024), count), dtype=np.float32), count)
    found = {
        "pairs_per_second_full_tables": rate(lambda: block(full, 1024), sizes.speed_steps),
        "pairs_per_second_sparse_tables": rate(lambda: block(sparse, 2048), sizes.speed_steps),
    }
    found["pairs_per_second_paper"] = rate(pairs, sizes.speed_steps)
    return {
        **found,
        "pairs_per_second_ratio": found["pairs_per_second_full_tables"] / found["pairs_per_second_paper"],
        "pairs_per_second_ratio_sparse_tables": found["pairs_per_second_sparse_tables"] / found["pairs_per_second_paper"],
        "speed_images": count,
        "speed_features": sizes.speed_width,
        "speed_candidates": sizes.speed_candidates,
    }


def authors_way(tables: Tables, space: str, seconds: float, *, seed: int) -> list[tuple[float, float]]:
    """Train the paper's network pair by pair; (seconds, validation mAP(1%)) as it goes, the judging's time not counted."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    table = make_table(labels_of(tables.scored["train"], tables.rows["train"]), corpus_size=len(tables.corpus))
    assert table.rows is not None
    student = Student(tables.images[space].shape[1], PAPER).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.01)
    validation, own, images = tables.validation(space), tables.queries[space, "train"], tables.images[space]
    spent, judged, seen = 0.0, 0.0, []
    while spent < seconds:
        started = time.perf_counter()
        query = rng.integers(0, len(table), PAIRS_A_STEP)
        place = rng.integers(0, table.rows.shape[1], PAIRS_A_STEP)
        taken = own[query], images[table.rows[query, place]], table.targets[query, place]
        pair_step(student, optimizer, *map(torch.from_numpy, taken))
        spent += time.perf_counter() - started
        if spent - judged > seconds / 20:
            judged = spent
            seen.append((spent, validation.mean_average_precision(student.eval(), images)))
            student.train()
    return seen


def our_way(tables: Tables, space: str, config: DistillConfig) -> list[tuple[float, float]]:
    """Train by blocks; (seconds, validation mAP(1%)) as it goes, the table's making counted, the judging's mean time not."""
    seen: list[tuple[float, float]] = []
    validation = tables.validation(space)
    untrained = Student(tables.images[space].shape[1], config.student).eval()
    before = time.perf_counter()
    for _ in range(3):
        validation.mean_average_precision(untrained, tables.images[space])
    judging = (time.perf_counter() - before) / 3
    started = time.perf_counter()

    def note(value: float) -> None:
        seen.append((time.perf_counter() - started - judging * (len(seen) + 1), value))

    tables.train(space, config, on_judgement=note)
    return seen


def measure_time_to_equal(tables: Tables, sizes: Sizes) -> dict[str, Any]:
    """Seconds until validation mAP(1%) is what the authors' way reaches at most, by each way, with the paper's network."""
    paper = authors_way(tables, "both", sizes.paper_seconds, seed=sizes.seed)
    ours = our_way(tables, "both", recipe(sizes, judge_every=10, patience=1000, batch_size=128, images_per_step=1024))
    best = max(value for _, value in paper)
    first = next(spent for spent, value in paper if value >= best)
    reached = [spent for spent, value in ours if value >= best]
    return {
        "equal_map": best,
        "equal_map_seconds_paper": first,
        "equal_map_seconds_ours": reached[0] if reached else float("nan"),
        "time_to_equal_map_ratio": first / reached[0] if reached else 0.0,
        "map_reached_ours": max(value for _, value in ours),
        "paper_curve": " ".join(f"{spent:.1f}:{value:.4f}" for spent, value in paper),
        "our_curve": " ".join(f"{spent:.1f}:{value:.4f}" for spent, value in ours[::4]),
    }


# Tables


def variants(sizes: Sizes, spaces: Sequence[str]) -> dict[str, tuple[str, DistillConfig]]:
    """Students that are tried, by name: feature space and settings."""
    found = {f"both_{loss}": ("both", recipe(sizes, loss=loss)) for loss in LOSSES}
    found |= {
        f"{space}_{loss}": (space, recipe(sizes, loss=loss)) for space in spaces if space != "both" for loss in SHOWN_LOSSES
    }
    found[PAPER_RECIPE] = ("both", recipe(sizes, student=PAPER))
    return found


def measure_tables(tables: Tables, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """mAP(L) of every student and of untuned features; chooses the best student by validation mAP(1%)."""
    found: dict[str, Any] = {}
    precision: dict[str, dict[str, np.ndarray]] = {}
    valid: dict[str, float] = {}

    def note(name: str, space: str, student: Student | None) -> None:
        similarities = tables.similarities(space, "test", student)
        precision[name] = {key: tables.precision(similarities, "test", percent) for key, percent in PERCENTS.items()}
        valid[name] = float(tables.precision(tables.similarities(space, "validation", student), "validation", 1.0).mean())
        found[f"validation_map_1pct_{name}"] = valid[name]
        for key, values in precision[name].items():
            found.update({f"map_{key}_{name}": float(values.mean()), f"map_{key}_{name}_se": standard_error(values)})

    for space in tables.images:
        note(f"{space}_untuned", space, None)
    rng = np.random.default_rng(sizes.seed)
    chance = [rng.random(len(rows)) for rows in tables.rows["test"]]
    found["map_1pct_random"] = float(tables.precision(chance, "test", 1.0).mean())
    tried = variants(sizes, list(tables.images))
    for name, (space, config) in tqdm(tried.items(), desc="students", unit="student"):
        started = time.perf_counter()
        tables.students[name] = tables.train(space, config)
        found[f"seconds_{name}"] = round(time.perf_counter() - started, 1)
        note(name, space, tables.students[name])
        write_json(folder / "tables.json", found)
    eligible = [name for name, (space, _) in tried.items() if space == "both" and name != PAPER_RECIPE]
    best = max(eligible, key=lambda name: valid[name])
    found["best_student"] = best
    for key in PERCENTS:
        found[f"map_{key}"] = found[f"map_{key}_{best}"]
    gains = paired_bootstrap(precision[best]["1pct"], precision[PAPER_RECIPE]["1pct"], seed=sizes.seed)
    found |= {
        f"map_1pct_gain_over_paper_recipe_{end}": value for end, value in zip(("mean", "low", "high"), gains, strict=True)
    }
    return found | measure_hubs(tables, best)


def measure_hubs(tables: Tables, best: str) -> dict[str, Any]:
    """How often the same images come first whatever the query, and how much of a score is popularity.

    `hub_skewness_*` is the skewness of how often each image is among the first 10 of its test queries' corpus
    (Radovanović et al., JMLR 2010: 0 without hubs); `popularity_share_*` the mean Spearman correlation between a query's
    scores and the images' mean scores over the other queries.
    """
    from scipy.stats import skew

    found: dict[str, Any] = {}
    methods: dict[str, list[np.ndarray]] = {
        "untuned": tables.similarities("both", "test"),
        "student": tables.similarities("both", "test", tables.students[best]),
        "teacher": [query.influence for query in tables.scored["test"]],
    }
    rows = tables.rows["test"]
    for name, scores in methods.items():
        first = [own[np.argsort(-values, kind="stable")[:10]] for own, values in zip(rows, scores, strict=True)]
        found[f"hub_skewness_{name}"] = float(skew(np.bincount(np.concatenate(first), minlength=len(tables.corpus))))
        sums, counts = np.zeros(len(tables.corpus)), np.zeros(len(tables.corpus))
        standard = [standardised(values) for values in scores]
        for own, values in zip(rows, standard, strict=True):
            sums[own] += values
            counts[own] += 1
        shared = [
            spearman(values[counts[own] > 3], ((sums[own] - values) / np.maximum(counts[own] - 1, 1))[counts[own] > 3])
            for own, values in zip(rows, standard, strict=True)
        ]
        found[f"popularity_share_{name}"] = float(np.mean(shared))
    return found


# Degrees


def calibrate(tables: Tables, space: str, student: Student, *, seed: int) -> Calibration:
    """The calibration that the attributor would hold."""
    creators, families = np.array(tables.corpus.column("creator")), families_of(tables.corpus.column("family"))
    rows = tables.rows["validation"]
    return fit_calibration(
        tables.similarities(space, "validation", student),
        tables.scored["validation"],
        [creators[own] for own in rows],
        [families[own] for own in rows],
        corpus_size=len(tables.corpus),
        feature_mean=tables.images[space].mean(axis=0),
        density=fit_density(tables.queries[space, "train"], tables.queries[space, "validation"], false_alarms=0.05),
        seed=seed,
    )


def measure_degrees(tables: Tables, student: Student, run_dir: Path, sizes: Sizes, docs: Path | None) -> dict[str, Any]:
    """Shares, percentiles and warnings on the test queries, whose scores are the exact teacher's."""
    calibration = calibrate(tables, "both", student, seed=sizes.seed)
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
    share_points, error = reliability(shares, found_shares)
    places = np.concatenate(percentiles)
    percentile_points, percentile_error = reliability(places[:, 0], places[:, 1], places[:, 2])
    # What one would say without looking at the image: each creator's part of the candidates.
    baseline = [
        teacher_shares(
            np.ones(int((~query.is_outsider).sum())),
            np.ones(int((~query.is_outsider).sum())),
            creators[own][~query.is_outsider],
        )[1]
        for query, own in zip(tables.scored["test"], tables.rows["test"], strict=True)
    ]
    if docs is not None:
        degree_figure(share_points, percentile_points, docs / "student-shares.png")
    held = np.concatenate(inside)
    counted = shares >= 0.01
    return {
        "share_calibration_error": error,
        "share_mean_absolute_error": float(np.abs(shares - found_shares).mean()),
        "share_mean_absolute_error_by_count": float(np.abs(np.concatenate(baseline) - found_shares).mean()),
        "share_interval_coverage": float(held[counted].mean()),
        "share_interval_coverage_n": int(counted.sum()),
        "share_widening": calibration.widening,
        "percentile_calibration_error": percentile_error,
        "influence_top_over_mean": float(calibration.influence[-1]),
        "influence_unrelated_over_mean": float(calibration.unrelated[0]),
        **measure_foreign(tables, calibration, run_dir, sizes),
    }


def reliability(
    expected: np.ndarray, actual: np.ndarray, weights: np.ndarray | None = None, *, bins: int = 10
) -> tuple[np.ndarray, float]:
    """Means of what was foretold and what was found in bins of equal weight, and their mean absolute difference.

    Returns:
        (bins, 3) mean expected, mean actual and its standard error; the expected calibration error.
    """
    weights = np.ones(len(expected)) if weights is None else weights
    order = np.argsort(expected, kind="stable")
    reached = np.cumsum(weights[order]) / weights.sum()
    points, error = [], 0.0
    for part in range(bins):
        chosen = order[(reached > part / bins) & (reached <= (part + 1) / bins + 1e-12)]
        if not len(chosen):
            continue
        own = weights[chosen] / weights[chosen].sum()
        means = float(own @ expected[chosen]), float(own @ actual[chosen])
        spread = float(np.sqrt(own @ (actual[chosen] - means[1]) ** 2 / len(chosen)))
        points.append((*means, spread))
        error += weights[chosen].sum() / weights.sum() * abs(means[0] - means[1])
    return np.array(points), float(error)


def degree_figure(shares: np.ndarray, percentiles: np.ndarray, path: Path) -> None:
    """Reliability of shares and percentiles on the test queries."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    titles = (("share of a creator", shares), ("teacher percentile of an image", percentiles))
    for axes, (title, points) in zip(figure.subplots(1, 2), titles, strict=True):
        axes.errorbar(points[:, 0], points[:, 1], yerr=1.96 * points[:, 2], fmt="o-", capsize=2)
        top = float(points[:, :2].max()) * 1.05
        axes.plot([0, top], [0, top], color="grey", linewidth=0.8)
        axes.set(title=title, xlabel="foretold from the similarity", ylabel="found by the exact teacher (test queries)")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)


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
    kinds: dict[str, tuple[list[Any], list[str]]] = {
        "other_prompt": (own, turned),
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


def measure_foreign(tables: Tables, calibration: Calibration, run_dir: Path, sizes: Sizes) -> dict[str, Any]:
    """Error rates of the own-or-foreign check: own test queries called foreign, and foreign kinds not recognised."""
    assert calibration.density is not None
    queries = Queries(run_dir / "queries")
    alarms = calibration.density.is_foreign(tables.queries["both", "test"])
    found: dict[str, Any] = machine.share("foreign_false_alarms", alarms)
    encoders = [open_encoder(name, folder=run_dir) for name in SPACES["both"]]
    rows = queries.of_split("test")
    for kind, (images, prompts) in foreign_images(tables.corpus, queries, rows, seed=sizes.seed).items():
        features = np.concatenate([encoder.encode(images, [[text] for text in prompts]) for encoder in encoders], axis=1)
        found |= machine.share(f"foreign_missed_{kind}", ~calibration.density.is_foreign(features))
    return found


# emoji-bench


def bench_students(sizes: Sizes) -> dict[str, Setting]:
    """Students that part bench tries, by name.

    Residual LDS is about all scores, not about the first images alone, so `mse_scores` trains for a set number of steps. In
    the gradient spaces, which order images well as they are, learning is gentle.
    """
    found = {PAPER_RECIPE: Setting("both", recipe(sizes, student=PAPER))}
    for space in ("both", "all"):
        for loss in SHOWN_LOSSES:
            found[f"{space}_{loss}"] = Setting(space, recipe(sizes, loss=loss))
    for space in ("image", "text", "diffusion", "gradient", "output_gradient"):
        for loss in SHOWN_LOSSES:
            shape = StudentConfig(input_norm=space.endswith("gradient"))
            found[f"{space}_{loss}"] = Setting(space, recipe(sizes, loss=loss, student=shape))
    for space in ("both", "all", "image", "text", "diffusion"):
        scores = recipe(sizes, loss="mse_scores", steps=min(sizes.steps, 300))
        found[f"{space}_mse_scores"] = Setting(space, scores, judged=False)
    for space in ("gradient", "output_gradient"):
        shape = StudentConfig(embed_dim=256, hidden=(64,))
        gentle = recipe(sizes, loss="mse_scores", student=shape, steps=min(sizes.steps, 200), learning_rate=2e-4)
        found[f"{space}_mse_scores_gentle"] = Setting(space, gentle, judged=False)
    return found


def measure_bench(truth_dir: Path, run_dir: Path, source: Path | None, sizes: Sizes, docs: Path | None) -> dict[str, Any]:
    """Residual LDS of students, untuned features and teachers on retrained models (benchmarks/student_truth.py)."""
    bench_sizes = table_of_truth.QUICK if sizes.steps == QUICK.steps else table_of_truth.Sizes()
    config = read_yaml(CONFIG, RetrainConfig)
    bench = open_bench(truth_dir, run_dir, source, config, bench_sizes, queries=sizes.truth_queries)
    tried = bench_students(sizes)
    return measure_students(bench, tried, PAPER_RECIPE, docs, resamples=bench_sizes.resamples, seed=sizes.seed)


def lines_of(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """What docs/student.md shows of the parts that were measured, by the name of its mark."""
    found: dict[str, list[str]] = {}

    def pairs(*names: str) -> list[str]:
        return [f"| `{name}` | {_number(results[name])} |" for name in names if name in results]

    if "pairs_per_second_ratio" in results:
        names = ("pairs_per_second_paper", "pairs_per_second_sparse_tables", "pairs_per_second_full_tables")
        ratios = ("pairs_per_second_ratio_sparse_tables", "pairs_per_second_ratio")
        found["speed"] = ["| key | measured |", "| --- | --- |", *pairs(*names, *ratios)]
    if "best_student" in results:
        rows = [name.removeprefix("map_1pct_") for name in results if name.startswith("map_1pct_") and f"{name}_se" in results]
        rows = [name for name in rows if f"map_half_pct_{name}" in results]
        found["tables"] = [
            "| student | mAP(0.5%) | mAP(1%) | mAP(4%) | mAP(1%), validation |",
            "| --- | --- | --- | --- | --- |",
        ]
        for name in sorted(rows, key=lambda name: -results[f"validation_map_1pct_{name}"]):
            cells = [f"{results[f'map_{key}_{name}']:.3f} ± {results[f'map_{key}_{name}_se']:.3f}" for key in PERCENTS]
            mark = " (chosen)" if name == results["best_student"] else ""
            found["tables"].append(f"| {name}{mark} | {' | '.join(cells)} | {results[f'validation_map_1pct_{name}']:.3f} |")
        gains = [f"map_1pct_gain_over_paper_recipe_{end}" for end in ("mean", "low", "high")]
        equal = ("equal_map", "equal_map_seconds_paper", "equal_map_seconds_ours", "time_to_equal_map_ratio")
        hubs = [name for name in results if name.startswith(("hub_skewness_", "popularity_share_"))]
        found["equal"] = ["| key | measured |", "| --- | --- |", *pairs(*gains, *equal)]
        found["hubs"] = ["| key | measured |", "| --- | --- |", *pairs(*hubs)]
    if "share_calibration_error" in results:
        names = [name for name in results if name.startswith(("share_", "percentile_calibration", "influence_"))]
        foreign = [name for name in results if name.startswith("foreign_") and f"{name}_se" in results]
        found["degrees"] = ["| key | measured |", "| --- | --- |", *pairs(*names)]
        found["foreign"] = ["| key | part | queries |", "| --- | --- | --- |"]
        found["foreign"] += [
            f"| `{name}` | {results[name]:.2f} ± {results[f'{name}_se']:.2f} | {results[f'{name}_n']} |" for name in foreign
        ]
    if "gap_closed_lds" in results:
        rows = [name.removeprefix("bench_lds_residual_low_") for name in results if name.startswith("bench_lds_residual_low_")]
        marks = {results["bench_fast_student"]: " (chosen among the fast)", results["bench_best_student"]: " (chosen)"}
        found["bench"] = ["| method | residual LDS | plain LDS | mAP(1%) |", "| --- | --- | --- | --- |"]
        for name in sorted(rows, key=lambda name: -results[f"bench_lds_residual_{name}"]):
            middle, low, high = (results[f"bench_lds_residual{end}_{name}"] for end in ("", "_low", "_high"))
            plain, precision = results[f"bench_lds_{name}"], results[f"bench_map_1pct_{name}"]
            mark = marks.get(name, "")
            found["bench"].append(f"| {name}{mark} | {middle:.3f} [{low:.3f}, {high:.3f}] | {plain:.3f} | {precision:.3f} |")
        gap = (
            "gap_closed_lds",
            "gap_closed_lds_fast",
            "gap_closed_lds_paper_recipe",
            *(f"gain{part}_over_paper_recipe_{end}" for part in ("", "_fast") for end in ("mean", "low", "high")),
        )
        teachers = sorted(name for name in results if name.startswith("bench_choosing_lds_residual_"))
        seconds = sorted((name for name in results if name.startswith("bench_seconds_")), key=lambda name: results[name])
        found["teachers"] = ["| key | measured |", "| --- | --- |", *pairs("bench_teacher", *teachers, *seconds)]
        found["gap"] = ["| key | measured |", "| --- | --- |", *pairs(*gap)]
    where = (
        f"`{results['command']}`, seed {results['seed']}, {results['cpu']}, {results['cores']} cores, {results['date'][:10]}."
    )
    return {name: [*lines, "", where] for name, lines in found.items()}


def _number(value: Any) -> str:
    return (
        f"{value:,.0f}"
        if isinstance(value, float) and abs(value) >= 1000
        else f"{value:.4g}"
        if isinstance(value, float)
        else str(value)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts that are asked for and add them to the JSON file."""
    parser = argparse.ArgumentParser(description="Measure the student.")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file that gains the parts' keys (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="short trainings, no figures: about 2 minutes; bench is left out")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all whose inputs are there")
    parser.add_argument("--run", type=Path, default=Path("runs/emoji"), help="finished emoji run folder (%(default)s)")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/student"), help="further feature folders, results (%(default)s)"
    )
    parser.add_argument("--truth", type=Path, default=TRUTH, help="ground truth folder (%(default)s)")
    parser.add_argument("--bench-run", type=Path, default=Path("runs/bench"), help="run folder of emoji-bench (%(default)s)")
    parser.add_argument("--corpus", type=Path, help="a finished emoji corpus for emoji-bench; else it is built there")
    options = parser.parse_args(arguments)
    sizes = replace(QUICK if options.quick else Sizes(), precision=fast_precision())
    parts = options.parts or [part for part in PARTS[1:] if part != "bench" or (options.truth / MANIFEST).exists()]
    if options.quick and not options.parts:
        parts = [part for part in parts if part != "bench"]
    docs = None if options.quick else DOCS
    started = time.perf_counter()
    results: dict[str, Any] = read_json(options.json) if options.json.exists() else {}
    if "features" in parts:
        encoder = open_encoder("diffusion:generator", folder=options.run)
        corpus, queries = Corpus(options.run / "corpus"), Queries(options.run / "queries")
        encode_sets(encoder, corpus, queries, options.work, FeaturesConfig(), Accelerator(mixed_precision=sizes.precision))
    if "speed" in parts:
        results |= measure_speed(sizes)
    if {"tables", "degrees"} & set(parts):
        tables = open_tables(options.run, options.work)
        if "tables" in parts:
            results |= measure_tables(tables, sizes, options.work)
            results |= measure_time_to_equal(tables, sizes)
        if "degrees" in parts:
            best = results.get("best_student")
            if best is None:
                raise InputError("the degrees are those of the best student; measure the part 'tables' first.")
            student = tables.students.get(best) or tables.train(*variants(sizes, list(tables.images))[best])
            results |= measure_degrees(tables, student, options.run, sizes, docs)
        results |= {f"{split}_queries": len(scored) for split, scored in tables.scored.items()}
        results |= {"corpus_images": len(tables.corpus), "candidates_per_query": len(tables.rows["test"][0])}
    if "bench" in parts:
        results |= measure_bench(options.truth, options.bench_run, options.corpus, sizes, docs)
    results |= {
        "seed": sizes.seed,
        "quick": options.quick,
        **machine.describe(),
        f"benchmark_seconds_{'_'.join(parts)}": round(time.perf_counter() - started, 1),
    }
    machine.report(results, options.json)
    if docs is not None:
        table_of_truth.fill(docs / "student.md", lines_of(results))


if __name__ == "__main__":
    try:
        main()
    except FastattrError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
