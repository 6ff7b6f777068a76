"""Students against emoji-bench's retrained models.

    python benchmarks/student_truth.py --json benchmarks/results/student.json     adds its keys there, and fills docs/student.md

Which of the teachers that are quick enough to label training queries is the truest, how much of its residual LDS do students
keep that answer by cosine search, and what does a query cost in each feature space? The teacher is chosen on validation and
training queries, from which no teacher learns; students learn from training queries and are chosen on validation queries;
test queries are scored once, by all.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import lab
import machine
import numpy as np
from lab import EXACT, FEATURES, Bench, options_of
from safetensors.numpy import load_file
from student import DOCS, PAPER, PAPER_RECIPE, RESULTS, Sizes, recipe
from tqdm import tqdm
from truth import AVERAGED, Sizes as TruthSizes, train

from fastattr.core.files import read_json
from fastattr.core.settings import read_yaml
from fastattr.evaluation.against_truth import compare_with_truth, table_scores
from fastattr.evaluation.lds import lds_residual
from fastattr.evaluation.subsets import RetrainConfig
from fastattr.features.by_generator import KERNEL, RECIPES, GradientEncoder, fit_gradient_encoder
from fastattr.gradients.ekfac import Factors
from fastattr.gradients.ridge import RidgeKernel
from fastattr.students.distill import DistillConfig
from fastattr.students.student import Student, StudentConfig, embed
from fastattr.teachers.ensembles import averaged
from fastattr.teachers.similarity import similarity_scores

SPLITS = ("train", "validation", "test")
KEYS = ("lds", "lds_residual", "lds_residual_low", "lds_residual_high", "map_1pct")


class Setting(NamedTuple):
    """One student to try."""

    space: str
    config: DistillConfig


@dataclass(frozen=True)
class Learned:
    """Everything that students learn from and are judged by."""

    bench: Bench
    ids: Mapping[str, list[str]]
    """Query ids by split."""
    teachers: Mapping[str, Mapping[str, np.ndarray]]
    """By teacher and split (Q, N) scores, images in the corpus' order."""
    spaces: Mapping[str, Mapping[str, np.ndarray]]
    """By space features (., F) of the training images ('images') and of each split's queries."""
    seconds: Mapping[str, float]
    """A query's, by feature space."""

    def choosing_lds(self, teacher: str) -> float:
        """Mean residual LDS of a teacher over the validation and training queries whose losses are known."""
        scores, query_ids = [], []
        for split in ("validation", "train"):
            measured = [query_id for query_id in self.bench.truth.measured(split) if query_id in set(self.ids[split])]
            scores.append(self.teachers[teacher][split][[self.ids[split].index(query_id) for query_id in measured]])
            query_ids += measured
        halves = self.bench.truth.retrained("half", query_ids)
        return float(lds_residual(self.bench.in_order(np.concatenate(scores)), halves.kept, halves.losses).mean())

    def similarities(self, space: str, split: str, student: Student | None = None) -> np.ndarray:
        """(Q, N) cosines by a student or by the untuned features, in the ground truth's order."""
        own, theirs = self.spaces[space][split], self.spaces[space]["images"]
        found = similarity_scores(own, theirs) if student is None else embed(student, own) @ embed(student, theirs).T
        return self.bench.in_order(found)


def learn(bench: Bench, train_queries: int, queries: int) -> Learned:
    """Score so many queries at most by every quick teacher and encode everything in every feature space."""
    counts = {"train": train_queries, "validation": queries, "test": queries}
    ids = {split: bench.truth.of_split(split)[: counts[split]] for split in SPLITS}
    seconds: dict[str, float] = {}

    bench.encoders.update({name: gradient_encoder(bench, name) for name in RECIPES})
    spaces: dict[str, dict[str, np.ndarray]] = {}
    for space in (*FEATURES, *RECIPES):
        spaces[space] = {"images": bench.images(space)}
        for split in SPLITS:
            started = time.perf_counter()
            spaces[space][split] = bench.queries(ids[split], space)
            seconds[space] = (time.perf_counter() - started) / len(ids[split])
    for name, members in (("both", FEATURES[:2]), ("all", FEATURES)):
        spaces[name] = {kind: np.concatenate([spaces[one][kind] for one in members], axis=1) for kind in ("images", *SPLITS)}
        seconds[name] = sum(seconds[member] for member in members)
    teachers = {}
    for name in ("abu_plus_linearised", "d_trak", "d_trak_ekfac"):
        teacher = bench.lab.fit(name)
        teachers[name] = {split: bench.lab.scores(teacher, ids[split]) for split in SPLITS}
        del teacher
    teachers["averaged"] = {split: averaged(*(teachers[name][split] for name in AVERAGED)) for split in SPLITS}
    return Learned(bench, ids, teachers, spaces, seconds)


def gradient_encoder(bench: Bench, name: str) -> GradientEncoder:
    """The library's gradient features of the bench's generator, fitted once in the run folder."""
    recipe, generator = RECIPES[name], bench.lab.generator
    folder = bench.run_dir / "gradients" / f"{name}-{generator.fingerprint}"
    fit_gradient_encoder(generator, bench.corpus, folder, recipe, reference="generator")
    factors = Factors.load(folder, generator.modules_to_unlearn(recipe.pattern))
    kernel = RidgeKernel(**load_file(folder / KERNEL)) if recipe.ridge else None
    return GradientEncoder(generator, factors, np.load(folder / "coordinates.npy"), recipe, kernel)


def students(sizes: Sizes) -> dict[str, Setting]:
    """Students that are tried, by name.

    Residual LDS is about all scores, not about the first images alone, so all train for a set number of steps. In the
    gradient spaces, which order images well as they are, learning is gentle.
    """
    found = {PAPER_RECIPE: Setting("both", recipe(sizes, student=PAPER))}
    for space in ("both", "all", *FEATURES):
        for loss in ("bce", "listwise"):
            found[f"{space}_{loss}"] = Setting(space, recipe(sizes, loss=loss))
        scores = recipe(sizes, loss="mse_scores", steps=min(sizes.steps, 300))
        found[f"{space}_mse_scores"] = Setting(space, scores)
    for space in RECIPES:
        shape = StudentConfig(embed_dim=256, hidden=(64,))
        gentle = recipe(sizes, loss="mse_scores", student=shape, steps=min(sizes.steps, 200), learning_rate=2e-4)
        found[f"{space}_mse_scores_gentle"] = Setting(space, gentle)
    return found


def measure(learned: Learned, tried: Mapping[str, Setting], *, resamples: int, seed: int) -> dict[str, Any]:
    """Train every student, choose one, and compare all with retraining; keys begin with 'bench_'."""
    bench, ids, truth = learned.bench, learned.ids, learned.bench.truth
    choosing = {name: learned.choosing_lds(name) for name in learned.teachers}
    teacher = max(choosing, key=choosing.__getitem__)
    labels = learned.teachers[teacher]["train"]

    def taught(setting: Setting) -> Student:
        own = learned.spaces[setting.space]
        return train(bench, ids["train"], own["train"], own["images"], labels, setting.config)

    trained = {name: taught(setting) for name, setting in tqdm(tried.items(), desc="students", unit="student")}

    def scores(split: str) -> dict[str, np.ndarray]:
        return {name: learned.similarities(tried[name].space, split, student) for name, student in trained.items()}

    on_validation = compare_with_truth(scores("validation"), truth, ids["validation"], resamples=100, seed=seed)["methods"]
    valid = {name: float(row["lds_residual"]) for name, row in on_validation.items()}
    ours = [name for name in tried if name != PAPER_RECIPE]
    best = max(ours, key=valid.__getitem__)
    fast = max((name for name in ours if tried[name].space not in RECIPES), key=valid.__getitem__)
    methods = {f"untuned_{space}": learned.similarities(space, "test") for space in learned.spaces} | scores("test")
    methods |= {f"teacher_{name}": bench.in_order(found["test"]) for name, found in learned.teachers.items()}
    methods["teacher_exact"] = table_scores(truth.folder / EXACT, truth, ids["test"])
    pairs = [(one, other) for one in dict.fromkeys((best, fast)) for other in (PAPER_RECIPE, "untuned_both", "untuned_image")]
    asked = {"teacher": "teacher_exact", "pairs": pairs, "resamples": resamples, "seed": seed}
    result = compare_with_truth(methods, truth, ids["test"], **asked)
    residual = {name: float(row["lds_residual"]) for name, row in result["methods"].items()}
    gap = max(value for name, value in residual.items() if name.startswith("teacher_")) - residual["untuned_both"]
    found: dict[str, Any] = {"bench_teacher": teacher, "bench_best_student": best, "bench_fast_student": fast}
    found |= {"bench_queries": result["n_queries"], "bench_models": result["n_models"]}
    for ending, one in (("", best), ("_fast", fast), ("_paper_recipe", PAPER_RECIPE)):
        found[f"gap_closed_lds{ending}"] = (residual[one] - residual["untuned_both"]) / gap if gap > 0 else float("nan")
    for ending, one in (("", best), ("_fast", fast)):
        gain = result["gains"][f"{one} - {PAPER_RECIPE}"]["lds_residual"]
        found |= {f"gain{ending}_over_paper_recipe_{end}": gain[end] for end in ("mean", "low", "high")}
    for name, row in result["methods"].items():
        found |= {f"bench_{key}_{name}": row[key] for key in KEYS}
    found |= {f"bench_validation_lds_residual_{name}": value for name, value in valid.items()}
    found |= {f"bench_choosing_lds_residual_{name}": value for name, value in choosing.items()}
    return found | {f"bench_seconds_{space}": value for space, value in learned.seconds.items()}


def parts_of(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """What docs/student.md shows, by the name of its mark."""
    names = [name.removeprefix("bench_lds_residual_low_") for name in results if name.startswith("bench_lds_residual_low_")]
    marks = {results["bench_fast_student"]: " (chosen among the fast)", results["bench_best_student"]: " (chosen)"}
    rows = []
    for name in sorted(names, key=lambda name: -results[f"bench_lds_residual_{name}"]):
        ends = {f"lds{end}": results[f"bench_lds_residual{end}_{name}"] for end in ("", "_low", "_high")}
        plain, precision = (machine.number(results[f"bench_{key}_{name}"]) for key in ("lds", "map_1pct"))
        rows.append(
            [name + marks.get(name, ""), machine.span({f"lds{end}": ends[end] for end in ends}, "lds"), plain, precision]
        )
    starts = ("bench_choosing_lds_residual_", "bench_seconds_")
    found = {
        "bench": machine.table(["method", "residual LDS", "plain LDS", "mAP(1%)"], rows),
        "teachers": machine.pairs(results, "bench_teacher", *sorted(name for name in results if name.startswith(starts))),
        "gap": machine.pairs(results, *sorted(name for name in results if name.startswith(("gap_closed_lds", "gain_")))),
    }
    return {name: [*lines, "", machine.where(results)] for name, lines in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, add the keys to the JSON file, and fill the document."""
    options = options_of(machine.parser(__doc__, json=RESULTS), arguments)
    sizes, table_sizes = Sizes(), TruthSizes()
    settings, config = lab.read_settings(options.truth), read_yaml(options.config, RetrainConfig)
    bench = lab.open_bench(options.truth, options.run, config, options.corpus, settings, table_sizes.cost)
    learned = learn(bench, table_sizes.train_queries, table_sizes.test_queries)
    found = measure(learned, students(sizes), resamples=table_sizes.resamples, seed=sizes.seed)
    earlier = read_json(options.json) if options.json.exists() else {}
    machine.fill(DOCS / "student.md", parts_of(machine.finish(earlier | found, options)))


if __name__ == "__main__":
    machine.run(main)
