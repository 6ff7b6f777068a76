"""The student: how often its own-or-foreign check is wrong, and how much of the truest teacher students keep.

    python benchmarks/student.py [--parts foreign bench]     adds its keys to results/student.json and fills docs/student.md

foreign   error rates of the check on a run's queries and on pictures that are not the generator's
bench     emoji-bench: which of the teachers that are quick enough to label training queries is the truest, how much of its
          residual LDS do students keep, and what does a query cost in each feature space? The teacher is chosen on validation
          and training queries; students learn from training queries and are chosen on validation queries; test queries are
          scored once.

With --card FOLDER the main figures of the JSON file go into an attributor's metrics.json instead, for its card.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import lab
import machine
import numpy as np
from lab import EXACT, FEATURES, Bench, options_of, train
from PIL import Image
from safetensors.numpy import load_file
from tqdm import tqdm
from truth import AVERAGED, Sizes as TruthSizes

from fastattr.attributor.folder import read_config, write_config
from fastattr.core.errors import InputError
from fastattr.core.files import read_json, sha256_file, write_json
from fastattr.core.settings import read_yaml
from fastattr.core.training import TrainingConfig
from fastattr.corpus.store import Corpus
from fastattr.evaluation.against_truth import compare_with_truth, table_scores
from fastattr.evaluation.lds import lds_residual
from fastattr.evaluation.subsets import RetrainConfig
from fastattr.features.by_generator import KERNEL, RECIPES, GradientEncoder, fit_gradient_encoder
from fastattr.features.kinds import open_encoder
from fastattr.features.store import folders, read_features
from fastattr.generators.queries import Queries
from fastattr.gradients.compression import RidgeKernel
from fastattr.gradients.ekfac import Factors
from fastattr.students.distill import DistillConfig
from fastattr.students.ownness import fit_ownness, measures_of
from fastattr.students.student import Student, StudentConfig, embed
from fastattr.teachers.kernels import averaged, similarity_scores

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = Path(__file__).parent / "results" / "student.json"
BOTH = ("open_clip-image:encoder", "open_clip-text:encoder")
SPLITS = ("train", "validation", "test")
KEYS = ("lds", "lds_residual", "lds_residual_low", "lds_residual_high", "map_1pct")
PAPER = StudentConfig(embed_dim=768, hidden=(768, 768, 768), linear_path=False, dropout=0.1)
"""The paper's network (arXiv:2511.10721, sec. 4; dropout as in the authors' code)."""
PAPER_RECIPE = "both_paper_recipe"
COMMAND = "python benchmarks/student.py"
MEANINGS = {
    "gap_closed_lds": "emoji-bench: part of the gap in residual LDS, untuned features to best teacher, that the student closes",
    "gap_closed_lds_fast": "the same by the best student that needs no gradient at query time",
    "gap_closed_lds_paper_recipe": "the same by the paper's recipe",
    "gain_over_paper_recipe_low": "best student over the paper's recipe in residual LDS, lower end of the paired 95% interval",
}
"""Keys of student.json that a card shows, with what they are."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is computed."""

    steps: int = 1200
    """At most, of each student."""
    seed: int = 0


def recipe(sizes: Sizes, **options: Any) -> DistillConfig:
    """Our training with other options; those that `TrainingConfig` has go there."""
    fixed: dict[str, Any] = {"batch_size": 128, "warmup_steps": 20, "ema_decay": 0.99, "checkpoint_every": 10_000}
    training = TrainingConfig(steps=sizes.steps, seed=sizes.seed, **fixed)
    own = {name: options.pop(name) for name in list(options) if name in TrainingConfig.__annotations__}
    return replace(DistillConfig(loss="bce", judge_every=100, patience=3), training=replace(training, **own), **options)


def measure_foreign(run_dir: Path, *, seed: int) -> dict[str, Any]:
    """Error rates of the check that the attributor would hold: own test queries called foreign, foreign kinds passed over."""
    corpus, queries = Corpus(run_dir / "corpus"), Queries(run_dir / "queries")
    known: dict[str, Any] = {"captions": (text for texts in corpus.captions for text in texts), "false_alarms": 0.05}
    pictures = [queries.image(row) for split in ("train", "validation") for row in queries.of_split(split)]
    known["measures"] = np.stack([measures_of(picture) for picture in pictures])
    paths = folders(run_dir, "query_features", BOTH)
    ids = {split: [queries.query_ids[row] for row in queries.of_split(split)] for split in ("train", "validation")}
    features = [read_features(paths, ids[split]) for split in ("train", "validation")]
    of_image = np.arange(features[0].shape[1]) < read_features(paths[:1], ids["train"][:1]).shape[1]
    ownness = fit_ownness(*features, image=of_image, text=~of_image, seed=seed, **known)
    encoders = [open_encoder(name, folder=run_dir) for name in BOTH]

    def doubted(images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        features = np.concatenate([encoder.encode(images, [[text] for text in prompts]) for encoder in encoders], axis=1)
        doubts = ownness.doubts(features, prompts, [measures_of(image) for image in images])
        return np.array([bool(reasons) for reasons in doubts])

    rows = queries.of_split("test")
    own = [queries.image(row) for row in rows], [queries.prompts[row] for row in rows]
    found: dict[str, Any] = machine.share("foreign_false_alarms", doubted(*own))
    for kind, foreign in foreign_images(corpus, queries, rows, seed=seed).items():
        found |= machine.share(f"foreign_missed_{kind}", ~doubted(*foreign))
    return found


def foreign_images(
    corpus: Corpus, queries: Queries, rows: Sequence[int], *, seed: int
) -> dict[str, tuple[list[Any], list[str]]]:
    """Kinds of images with prompts that the generator did not make for them."""
    rng = np.random.default_rng(seed)
    own, prompts = [queries.image(row) for row in rows], [queries.prompts[row] for row in rows]
    turned, letters = prompts[len(prompts) // 2 :] + prompts[: len(prompts) // 2], np.array([*"abcdefghijklmnopqrstuvwxyz"])
    noise = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in rows]
    flat = [Image.new("RGB", (64, 64), tuple(rng.integers(0, 256, 3).tolist())) for _ in rows]
    unseen = [" ".join("".join(rng.choice(letters, 7)) for _ in range(3)) for _ in rows]
    photographs, chosen = sample_photographs(len(rows), seed=seed), rng.choice(len(corpus), len(rows), replace=False)
    return {
        "other_prompt": (own, turned),
        "unknown_words": (own, unseen),
        "noise": (noise, prompts),
        "one_colour": (flat, prompts),
        **({"photograph": (photographs, prompts)} if photographs else {}),
        "training_image": ([corpus.image(int(row)) for row in chosen], [corpus.captions[row][0] for row in chosen]),
    }


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


def bench_parts(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """What docs/student.md shows of the part bench, by the name of its mark."""
    names = [name.removeprefix("bench_lds_residual_low_") for name in results if name.startswith("bench_lds_residual_low_")]
    marks = {results["bench_fast_student"]: " (chosen among the fast)", results["bench_best_student"]: " (chosen)"}
    rows = []
    for name in sorted(names, key=lambda name: -results[f"bench_lds_residual_{name}"]):
        ends = {f"lds{end}": results[f"bench_lds_residual{end}_{name}"] for end in ("", "_low", "_high")}
        plain, precision = (machine.number(results[f"bench_{key}_{name}"]) for key in ("lds", "map_1pct"))
        rows.append([name + marks.get(name, ""), machine.span(ends, "lds"), plain, precision])
    starts = ("bench_choosing_lds_residual_", "bench_seconds_")
    return {
        "bench": machine.table(["method", "residual LDS", "plain LDS", "mAP(1%)"], rows),
        "teachers": machine.pairs(results, "bench_teacher", *sorted(name for name in results if name.startswith(starts))),
        "gap": machine.pairs(results, *sorted(name for name in results if name.startswith(("gap_closed_lds", "gain_")))),
    }


def parts_of(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """What docs/student.md shows of what was measured, by the name of its mark."""
    found = bench_parts(results) if "bench_teacher" in results else {}
    kinds = [name for name in results if name.startswith("foreign_") and f"{name}_se" in results]
    rows = [[f"`{name}`", machine.with_error(results, name, digits=2), str(results[f"{name}_n"])] for name in kinds]
    found |= {"foreign": machine.table(["key", "part", "queries"], rows)} if rows else {}
    return {name: [*lines, "", machine.where(results)] for name, lines in found.items()}


def write_card(folder: Path, results: Mapping[str, Any]) -> None:
    """Write the main figures into an attributor's metrics.json; what else it holds is kept."""
    if missing := sorted(set(MEANINGS) - set(results)):
        raise InputError(f"the results lack {', '.join(missing)}; run `{COMMAND}` first.")
    rows = [{"key": key, "value": results[key], "meaning": meaning} for key, meaning in MEANINGS.items()]
    entry = {"command": COMMAND, "seed": results["seed"], "date": results["date"], "rows": rows}
    config, file = read_config(folder), folder / "metrics.json"
    metrics = read_json(file)
    others = [run for run in metrics.get("benchmarks", []) if run["command"] != COMMAND]
    write_json(file, metrics | {"benchmarks": [*others, entry]})
    write_config(folder, {**config, "sha256": {**config["sha256"], file.name: sha256_file(file)}})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts that are asked for, add their figures to the JSON file and the document; or write a card's figures."""
    parser = machine.parser(__doc__, json=RESULTS)
    parser.add_argument("--parts", nargs="+", choices=("foreign", "bench"), default=("foreign", "bench"), help="default: both")
    parser.add_argument("--emoji", type=Path, default=Path("runs/emoji"), help="emoji run folder, of foreign (%(default)s)")
    parser.add_argument("--card", type=Path, help="only write the figures of --json into this attributor's metrics.json")
    options = options_of(parser, arguments)
    earlier: dict[str, Any] = read_json(options.json) if options.json.exists() else {}
    if options.card:
        return write_card(options.card, earlier)
    found = measure_foreign(options.emoji, seed=0) if "foreign" in options.parts else {}
    if "bench" in options.parts:
        sizes, table_sizes, settings = Sizes(), TruthSizes(), lab.read_settings(options.truth)
        config = read_yaml(options.config, RetrainConfig)
        bench = lab.open_bench(options.truth, options.run, config, options.corpus, settings, table_sizes.cost)
        learned = learn(bench, table_sizes.train_queries, table_sizes.test_queries)
        found |= measure(learned, students(sizes), resamples=table_sizes.resamples, seed=sizes.seed)
    made = parts_of(found | machine.describe() | {"seed": 0})
    machine.finish(earlier | found, options)
    return machine.fill(DOCS / "student.md", made)


if __name__ == "__main__":
    machine.run(main)
