"""Students against emoji-bench's retrained models: part 'bench' of benchmarks/student.py.

Which of the teachers that are quick enough to label training queries is the truest, how much of its residual LDS do students
keep that answer by cosine search, and what does a query cost in each feature space? The teacher is chosen on validation and
training queries, from which no teacher learns; students learn from training queries and are chosen on validation queries;
test queries are scored once, by all.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from truth import EXACT, Data, Lab, Settings, Sizes, averaged, of_unit_length, open_data, read_settings

from fastattr.core.files import atomic_path, read_json
from fastattr.core.stages import MANIFEST
from fastattr.evaluation.against_truth import compare_with_truth, table_scores
from fastattr.evaluation.lds import lds_residual
from fastattr.evaluation.subsets import RetrainConfig
from fastattr.evaluation.truth import GroundTruth
from fastattr.generators.layers import weight_shape
from fastattr.gradients.compression import Compression, GradientConfig
from fastattr.gradients.ridge import RidgeKernel
from fastattr.students.distill import DistillConfig, Validation, distill
from fastattr.students.pairs import labels_of, make_table
from fastattr.students.student import Student, embed
from fastattr.teachers.kernels import kernel_scores_of_products
from fastattr.teachers.scores import ScoredQuery

SPLITS = ("train", "validation", "test")
WIDTHS = {"gradient": 2048, "output_gradient": 4096}
"""Coordinates that a gradient space keeps."""
PART = 32
"""Images whose gradients are compressed at once."""
RESULT_KEYS = ("lds", "lds_residual", "lds_residual_low", "lds_residual_high", "map_1pct")

Space = Mapping[str, np.ndarray]
"""Features (., F) of the training images ('images') and of each split's queries."""


class Setting(NamedTuple):
    """One student to try."""

    space: str
    config: DistillConfig
    judged: bool = True
    """Whether the validation queries' mAP(1%) stops the training."""


@dataclass(frozen=True)
class Bench:
    """Everything that students learn from and are judged by."""

    data: Data
    ids: Mapping[str, list[str]]
    """Query ids by split."""
    teachers: Mapping[str, Space]
    """By teacher and split (Q, N) scores, images in the corpus' order."""
    spaces: Mapping[str, Space]
    seconds: Mapping[str, float]
    """A query's, by feature space."""

    @property
    def truth(self) -> GroundTruth:
        """The retrained models' losses."""
        return self.data.truth

    def in_order(self, scores: np.ndarray) -> np.ndarray:
        """(Q, N) from the corpus' order to the ground truth's."""
        return scores[:, self.data.corpus.rows(self.truth.image_ids)]

    def choosing_lds(self, teacher: str) -> float:
        """Mean residual LDS of a teacher over the validation and training queries whose losses are known."""
        scores, query_ids = [], []
        for split in ("validation", "train"):
            measured = [query_id for query_id in self.truth.measured(split) if query_id in set(self.ids[split])]
            scores.append(self.teachers[teacher][split][[self.ids[split].index(query_id) for query_id in measured]])
            query_ids += measured
        halves = self.truth.retrained("half", query_ids)
        return float(lds_residual(self.in_order(np.concatenate(scores)), halves.kept, halves.losses).mean())


def open_bench(
    truth_dir: Path, run_dir: Path, source: Path | None, config: RetrainConfig, sizes: Sizes, *, queries: int
) -> Bench:
    """Open emoji-bench, score its queries by every quick teacher and encode everything in every feature space.

    Args:
        truth_dir: the ground truth.
        run_dir: with the benchmark's corpus.
        source: a finished emoji corpus; None builds it in `run_dir`.
        config: of the benchmark.
        sizes: of the table of truth.
        queries: of validation and test, at most.
    """
    data = open_data(truth_dir, run_dir, config, sizes, source)
    truth, lab, settings = data.truth, data.lab, read_settings(data.truth).at_most(sizes)
    counts = {"train": sizes.train_queries, "validation": queries, "test": queries}
    ids = {split: truth.of_split(split)[: counts[split]] for split in SPLITS}
    seconds: dict[str, float] = {}
    spaces: dict[str, dict[str, np.ndarray]] = {name: {"images": rows} for name, rows in data.images().items()}
    spaces["diffusion"] = {"images": of_unit_length(lab.diffusion_features(lab.corpus))}
    for split in SPLITS:
        for name in spaces:
            started = time.perf_counter()
            if name == "diffusion":
                spaces[name][split] = of_unit_length(lab.diffusion_features(lab.queries(truth, ids[split])))
            else:
                spaces[name][split] = data.queries(ids[split], name)
            seconds[name] = (time.perf_counter() - started) / len(ids[split])
    for name, members in (("both", ("image", "text")), ("all", ("image", "text", "diffusion"))):
        spaces[name] = {kind: np.concatenate([spaces[one][kind] for one in members], axis=1) for kind in ("images", *SPLITS)}
        seconds[name] = sum(seconds[member] for member in members)

    loss, output = (Gradients.of(lab, settings, name) for name in ("loss", "squared_norm"))
    teachers: dict[str, dict[str, np.ndarray]] = {name: {} for name in ("first_order", "d_trak", "d_trak_ekfac", "averaged")}
    for name, gradients in (("gradient", loss), ("output_gradient", output)):
        compress = Compressed.fit(gradients, WIDTHS[name], ridge=settings.d_trak_ridge if name == "output_gradient" else 0.0)
        spaces[name] = {"images": compress(gradients.corpus)}
        for split in SPLITS:
            started = time.perf_counter()
            own = gradients.of_queries(lab.queries(truth, ids[split]))
            spaces[name][split] = compress(own)
            seconds[name] = (time.perf_counter() - started) / len(ids[split])
            if name == "gradient":
                teachers["first_order"][split] = gradients.whitened(own)
            else:
                kernels = {"d_trak": gradients.plain, "d_trak_ekfac": gradients.whitened}
                for teacher, products in kernels.items():
                    teachers[teacher][split] = kernel_scores_of_products(
                        products(own), gradients.among_images(teacher), ridge=settings.d_trak_ridge
                    )
    for split in SPLITS:
        teachers["averaged"][split] = averaged(teachers["first_order"][split], teachers["d_trak_ekfac"][split])
    return Bench(data, ids, teachers, spaces, seconds)


@dataclass(frozen=True)
class Gradients:
    """Gradients of one output function: whole, of all images, and what teachers make of a query's."""

    lab: Lab
    settings: Settings
    output: str
    corpus: np.ndarray
    """(N, P)."""
    cached: dict[str, np.ndarray]

    @classmethod
    def of(cls, lab: Lab, settings: Settings, output: str) -> Gradients:
        """Of the training images."""
        return cls(lab, settings, output, lab.corpus_gradients(settings.loss_draws, output), {})

    def of_queries(self, queries: Any) -> np.ndarray:
        """(Q, P), with as many draws as the table of truth takes."""
        if self.output == "loss":
            return self.lab.query_gradients(queries, self.settings.query_draws)
        return self.lab.image_gradients(queries, self.settings.fewer_query_draws, self.output)

    def plain(self, own: np.ndarray) -> np.ndarray:
        """(Q, N) inner products with the training images'."""
        return self.lab.first_order(own, self.corpus, self.settings.d_trak_pattern, None, 1.0)

    def whitened(self, own: np.ndarray) -> np.ndarray:
        """(Q, N) the same in the geometry of the teacher's curvature."""
        return self.lab.first_order(own, self.corpus, self.settings.pattern, self.lab.factors(), self.settings.damping)

    def among_images(self, teacher: str) -> np.ndarray:
        """(N, N) products of the training images, computed once."""
        if teacher not in self.cached:
            self.cached[teacher] = (self.plain if teacher == "d_trak" else self.whitened)(self.corpus)
        return self.cached[teacher]

    def by_layer(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """(B, P) -> (B, out, in) of the layers that are unlearned."""
        chosen, found, start = self.lab.matching(self.settings.pattern), {}, 0
        for name, layer in self.lab.layers.items():
            shape = weight_shape(layer)
            if name in chosen:
                found[name] = torch.from_numpy(rows[:, start : start + shape[0] * shape[1]]).reshape(-1, *shape)
            start += shape[0] * shape[1]
        return found


@dataclass(frozen=True)
class Compressed:
    """What `fastattr.features.gradient` stores of a gradient: whitened, its leading coordinates, a ridge kernel if asked."""

    gradients: Gradients
    compression: Compression
    kernel: RidgeKernel | None

    @classmethod
    def fit(cls, gradients: Gradients, width: int, *, ridge: float) -> Compressed:
        """Choose the coordinates, and the kernel where the ridge is not 0, by the training images."""
        lab, settings = gradients.lab, gradients.settings
        layers = lab.matching(settings.pattern)
        config = GradientConfig(output=gradients.output, width=width, damping=settings.damping)
        whole = Compression(layers, replace(config, width=0), lab.factors())
        energy = np.zeros(whole.width)
        for rows in _parts(gradients.corpus):
            energy += whole(gradients.by_layer(rows)).square().sum(dim=0).double().numpy()
        compression = Compression(layers, config, lab.factors(), np.sort(np.argsort(-energy, kind="stable")[:width]))
        own = cls(gradients, compression, None)
        return replace(own, kernel=RidgeKernel.fit(own.rows(gradients.corpus), ridge=ridge)) if ridge else own

    def rows(self, gradients: np.ndarray) -> np.ndarray:
        """(B, P) -> (B, k), before the kernel."""
        parts = [self.compression(self.gradients.by_layer(rows)).numpy() for rows in _parts(gradients)]
        return np.concatenate(parts)

    def __call__(self, gradients: np.ndarray) -> np.ndarray:
        """(B, P) -> (B, k) unit vectors."""
        rows = self.rows(gradients)
        return of_unit_length(rows if self.kernel is None else self.kernel(rows)).astype(np.float32)


def _parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), PART):
        yield rows[start : start + PART]


def train(bench: Bench, setting: Setting, teacher: str) -> Student:
    """A student of what a teacher says of the training queries."""
    corpus, own, labels, config = bench.data.corpus, bench.spaces[setting.space], bench.teachers[teacher], setting.config
    everything, nobody = np.arange(len(corpus)), np.zeros(len(corpus), dtype=bool)
    scored = [
        ScoredQuery(query_id, "", "train", corpus.image_ids, influence, nobody, 0.0)
        for query_id, influence in zip(bench.ids["train"], labels["train"].astype(np.float32), strict=True)
    ]
    table = make_table(labels_of(scored, [everything] * len(scored)), corpus_size=len(corpus), kind=config.target_kind)
    validation = Validation(own["validation"], [everything] * len(own["validation"]), list(labels["validation"]))
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint.safetensors"
        options: dict[str, Any] = {"checkpoint": checkpoint, "validation": validation if setting.judged else None}
        return distill(table, own["train"], own["images"], config, **options)


def similarities(bench: Bench, space: str, split: str, student: Student | None = None) -> np.ndarray:
    """(Q, N) cosines of a split's queries, by a student or by the untuned features; in the ground truth's order."""
    own, theirs = bench.spaces[space][split], bench.spaces[space]["images"]
    own, theirs = (
        (of_unit_length(own), of_unit_length(theirs)) if student is None else (embed(student, own), embed(student, theirs))
    )
    return bench.in_order(own @ theirs.T)


def measure(
    bench: Bench,
    tried: Mapping[str, tuple[str, DistillConfig, bool]],
    paper: str,
    docs: Path | None,
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Train every student, choose one, and compare all with retraining.

    Args:
        bench: opened.
        tried: students by name.
        paper: which of them is the paper's recipe; it is not chosen.
        docs: where the figure goes; None draws none.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    truth = bench.truth
    choosing = {name: bench.choosing_lds(name) for name in bench.teachers}
    teacher = max(choosing, key=choosing.__getitem__)
    students = {name: train(bench, setting, teacher) for name, setting in tqdm(tried.items(), desc="students", unit="student")}
    on_validation = compare_with_truth(
        {name: similarities(bench, tried[name].space, "validation", student) for name, student in students.items()},
        truth,
        bench.ids["validation"],
        resamples=100,
        seed=seed,
    )["methods"]
    valid = {name: float(row["lds_residual"]) for name, row in on_validation.items()}
    best = _best(valid, [name for name in tried if name != paper])
    fast = _best(valid, [name for name, setting in tried.items() if name != paper and setting.space not in WIDTHS])
    methods = {f"untuned_{space}": similarities(bench, space, "test") for space in bench.spaces}
    methods |= {name: similarities(bench, tried[name].space, "test", student) for name, student in students.items()}
    methods |= {f"teacher_{name}": bench.in_order(scores["test"]) for name, scores in bench.teachers.items()}
    methods["teacher_exact"] = table_scores(truth.folder / EXACT, truth, bench.ids["test"])
    pairs = [(one, other) for one in dict.fromkeys((best, fast)) for other in (paper, "untuned_both", "untuned_image")]
    result = compare_with_truth(
        methods, truth, bench.ids["test"], teacher="teacher_exact", pairs=pairs, resamples=resamples, seed=seed
    )
    residual = {name: float(row["lds_residual"]) for name, row in result["methods"].items()}
    top = max(value for name, value in residual.items() if name.startswith("teacher_"))

    def closed(name: str) -> float:
        gap = top - residual["untuned_both"]
        return (residual[name] - residual["untuned_both"]) / gap if gap > 0 else float("nan")

    found: dict[str, Any] = {
        "bench_teacher": teacher,
        "bench_best_student": best,
        "bench_fast_student": fast,
        "bench_queries": result["n_queries"],
        "bench_models": result["n_models"],
        "gap_closed_lds": closed(best),
        "gap_closed_lds_fast": closed(fast),
        "gap_closed_lds_paper_recipe": closed(paper),
    }
    for ending, one in (("", best), ("_fast", fast)):
        gain = result["gains"][f"{one} - {paper}"]["lds_residual"]
        found |= {f"gain{ending}_over_paper_recipe_{end}": gain[end] for end in ("mean", "low", "high")}
    for name, row in result["methods"].items():
        found |= {f"bench_{key}_{name}": row[key] for key in RESULT_KEYS}
    found |= {f"bench_validation_lds_residual_{name}": value for name, value in valid.items()}
    found |= {f"bench_choosing_lds_residual_{name}": value for name, value in choosing.items()}
    found |= {f"bench_seconds_{space}": value for space, value in bench.seconds.items()}
    if docs is not None:
        frontier_figure(_frontier(bench, tried, residual, best, fast, paper), docs / "student-frontier.png")
    return found


def _best(values: Mapping[str, float], names: Sequence[str]) -> str:
    return max(names, key=lambda name: values[name])


def _frontier(
    bench: Bench,
    tried: Mapping[str, Setting],
    residual: Mapping[str, float],
    best: str,
    fast: str,
    paper: str,
) -> dict[str, tuple[float, float]]:
    """Seconds a query and residual LDS, by what the figure calls it."""
    seconds = bench.seconds
    exact = read_json(bench.truth.folder / EXACT / MANIFEST)["seconds_per_query"]
    return {
        "similarity (image + text)": (seconds["both"], residual["untuned_both"]),
        "the paper's recipe": (seconds["both"], residual[paper]),
        f"fast student ({fast})": (seconds[tried[fast].space], residual[fast]),
        "diffusion features": (seconds["diffusion"], residual["untuned_diffusion"]),
        "gradient embedding": (seconds["gradient"], residual["untuned_gradient"]),
        "output gradient embedding": (seconds["output_gradient"], residual["untuned_output_gradient"]),
        f"best student ({best})": (seconds[tried[best].space], residual[best]),
        "exact unlearning": (exact, residual["teacher_exact"]),
    }


def frontier_figure(points: Mapping[str, tuple[float, float]], path: Path) -> None:
    """Residual LDS against seconds a query."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, (seconds, quality) in points.items():
        axes.plot(seconds, quality, "o")
        axes.annotate(name, (seconds, quality), textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.set(
        xscale="log", xlabel="seconds a query (features; the search is negligible here)", ylabel="residual LDS, emoji-bench"
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
