"""The student: how much of the teacher it keeps, and how often its own-or-foreign check is wrong, on a run's score tables.

    python benchmarks/student.py --json benchmarks/results/student.json [--quick]

Parts, each of which adds its keys to the JSON file:
    tables   mAP(L) of feature spaces and losses; the best student
    foreign  how often the own-or-foreign check is wrong
Students are chosen on validation queries; test queries are scored once, by what was chosen. mAP(L) is taken within each test
query's candidates, with L in percent of the corpus. Further features that the run has (`features.encoders` in its config) are
feature spaces of their own. Students against retrained models: benchmarks/student_truth.py. With --card FOLDER the main figures
of the JSON file go into an attributor's metrics.json instead, from where its card shows them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import document
import machine
import numpy as np
import torch
from foreign import measure_foreign
from tqdm import tqdm

from fastattr.attributor.folder import read_config, write_config
from fastattr.core.errors import InputError
from fastattr.core.files import read_json, sha256_file, write_json
from fastattr.core.stages import MANIFEST
from fastattr.core.training import TrainingConfig
from fastattr.corpus.store import Corpus
from fastattr.features.encoder import unit_vectors
from fastattr.features.store import folders, read_features
from fastattr.students.distill import LOSSES, DistillConfig, Validation, distill
from fastattr.students.pairs import labels_of, make_table
from fastattr.students.ranking import paired_bootstrap, standard_error, teacher_average_precision
from fastattr.students.student import Student, StudentConfig, embed
from fastattr.teachers.scores import ScoredQuery, read_scores

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = Path(__file__).parent / "results" / "student.json"
PARTS = ("tables", "foreign")
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
SHOWN_LOSSES = ("bce", "listwise")
"""With which each feature space is tuned: the paper's, and the one that was best on the validation queries."""
COMMAND = "python benchmarks/student.py"
MEANINGS = {
    "map_half_pct": "mAP(0.5% of the corpus), best student on the tables of docs/student.md against the exact teacher",
    "map_1pct": "the same, mAP(1%)",
    "map_4pct": "the same, mAP(4%)",
    "gap_closed_lds": "emoji-bench: part of the gap in residual LDS from untuned features to the best teacher that the best "
    "student closes",
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
    precision: str = "no"
    """`TrainingConfig.mixed_precision` of our students."""


QUICK = Sizes(steps=60)


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

    def validation(self, space: str) -> Validation:
        """The validation queries in a feature space."""
        influence = [query.influence for query in self.scored["validation"]]
        return Validation(self.queries[space, "validation"], self.rows["validation"], influence)

    def train(self, space: str, config: DistillConfig) -> Student:
        """A student of the training queries in a feature space."""
        labels = labels_of(self.scored["train"], self.rows["train"])
        table = make_table(labels, corpus_size=len(self.corpus), kind=config.target_kind)
        own, images, validation = self.queries[space, "train"], self.images[space], self.validation(space)
        with tempfile.TemporaryDirectory() as scratch:
            return distill(table, own, images, config, checkpoint=Path(scratch) / "kept.safetensors", validation=validation)

    def similarities(self, space: str, split: str, student: Student | None = None) -> list[np.ndarray]:
        """Q arrays (C,) of similarities of a split's queries to their candidates, by a student or by the untuned features."""
        both = self.queries[space, split], self.images[space]
        own, theirs = (unit_vectors(part) if student is None else embed(student, part) for part in both)
        return [theirs[rows] @ query for rows, query in zip(self.rows[split], own, strict=True)]

    def precision(self, similarities: Sequence[np.ndarray], split: str, percent: float) -> np.ndarray:
        """(Q,) AP(L), L in percent of the corpus."""
        positives = max(1, round(len(self.corpus) * percent / 100))
        pairs = zip(similarities, self.scored[split], strict=True)
        return np.array(
            [teacher_average_precision(own, query.influence, positives=min(positives, len(own) - 1)) for own, query in pairs]
        )


def open_tables(run_dir: Path) -> Tables:
    """Open a finished run, with the feature spaces that it has.

    Raises:
        ArtifactNotFoundError: a stage has not finished.
    """
    corpus = Corpus(run_dir / "corpus")
    scored = {split: read_scores(run_dir / "scores", split=split) for split in ("train", "validation", "test")}
    images, queries = {}, {}
    for space, encoders in SPACES.items():
        paths = folders(run_dir, "features", encoders)
        if not all((path / MANIFEST).exists() for path in paths):
            print(f"no features for {space}: left out", file=sys.stderr)
            continue
        images[space] = read_features(paths, corpus.image_ids)
        for split, of_split in scored.items():
            ids = [query.query_id for query in of_split]
            queries[space, split] = read_features(folders(run_dir, "query_features", encoders), ids)
    rows = {split: [corpus.rows(query.image_ids) for query in of_split] for split, of_split in scored.items()}
    return Tables(corpus, scored, rows, images, queries)


def variants(sizes: Sizes, spaces: Sequence[str]) -> dict[str, tuple[str, DistillConfig]]:
    """Students that are tried, by name: feature space and settings."""
    found = {f"both_{loss}": ("both", recipe(sizes, loss=loss)) for loss in LOSSES}
    found |= {
        f"{space}_{loss}": (space, recipe(sizes, loss=loss)) for space in spaces if space != "both" for loss in SHOWN_LOSSES
    }
    found[PAPER_RECIPE] = ("both", recipe(sizes, student=PAPER))
    return found


def measure_tables(tables: Tables, sizes: Sizes) -> dict[str, Any]:
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
        student = tables.train(space, config)
        found[f"seconds_{name}"] = round(time.perf_counter() - started, 1)
        note(name, space, student)
    eligible = [name for name, (space, _) in tried.items() if space == "both" and name != PAPER_RECIPE]
    best = max(eligible, key=lambda name: valid[name])
    found["best_student"] = best
    for key in PERCENTS:
        found[f"map_{key}"] = found[f"map_{key}_{best}"]
    gains = paired_bootstrap(precision[best]["1pct"], precision[PAPER_RECIPE]["1pct"], seed=sizes.seed)
    found |= {
        f"map_1pct_gain_over_paper_recipe_{end}": value for end, value in zip(("mean", "low", "high"), gains, strict=True)
    }
    return found


def parts_of(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """What docs/student.md shows of the parts that were measured, by the name of its mark."""
    found: dict[str, list[str]] = {}

    def beginning(*starts: str) -> list[str]:
        return [name for name in results if name.startswith(starts) and not name.endswith(("_se", "_n"))]

    if "best_student" in results:
        names = [name.removeprefix("map_1pct_") for name in beginning("map_1pct_") if f"{name}_se" in results]
        names = [name for name in names if f"map_half_pct_{name}" in results]
        header = ["student", "mAP(0.5%)", "mAP(1%)", "mAP(4%)", "mAP(1%), validation"]
        rows = [
            [
                name + (" (chosen)" if name == results["best_student"] else ""),
                *(document.with_error(results, f"map_{key}_{name}") for key in PERCENTS),
                document.number(results[f"validation_map_1pct_{name}"]),
            ]
            for name in sorted(names, key=lambda name: -results[f"validation_map_1pct_{name}"])
        ]
        found["tables"] = document.table(header, rows)
    if "foreign_false_alarms" in results:
        kinds = [name for name in beginning("foreign_") if f"{name}_se" in results]
        rows = [[f"`{name}`", document.with_error(results, name, digits=2), str(results[f"{name}_n"])] for name in kinds]
        found["foreign"] = document.table(["key", "part", "queries"], rows)
    return {name: [*lines, "", document.where(results)] for name, lines in found.items()}


def write_card(folder: Path, results: Mapping[str, Any]) -> None:
    """Write the main figures into an attributor's metrics.json; what else it holds is kept.

    Raises:
        InputError: a part of the benchmark was not run.
    """
    if missing := sorted(set(MEANINGS) - set(results)):
        raise InputError(f"the results lack {', '.join(missing)}; run all parts of `{COMMAND}` and student_truth.py first.")
    rows = [{"key": key, "value": results[key], "meaning": meaning} for key, meaning in MEANINGS.items()]
    entry = {"command": COMMAND, "seed": results["seed"], "date": results["date"], "rows": rows}
    config, file = read_config(folder), folder / "metrics.json"
    metrics = read_json(file)
    others = [run for run in metrics.get("benchmarks", []) if run["command"] != COMMAND]
    write_json(file, metrics | {"benchmarks": [*others, entry]})
    write_config(folder, {**config, "sha256": {**config["sha256"], file.name: sha256_file(file)}})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts that are asked for and add them to the JSON file, or write a card's figures."""
    parser = argparse.ArgumentParser(description="Measure the student.")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file that gains the parts' keys (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="short trainings, no document: about 2 minutes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--run", type=Path, default=Path("runs/emoji"), help="finished emoji run folder (%(default)s)")
    parser.add_argument("--card", type=Path, help="only write the figures of --json into this attributor's metrics.json")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = read_json(options.json) if options.json.exists() else {}
    if options.card:
        return write_card(options.card, results)
    sizes = replace(QUICK if options.quick else Sizes(), precision=fast_precision())
    started = time.perf_counter()
    tables = open_tables(options.run)
    if "tables" in options.parts:
        results |= measure_tables(tables, sizes)
    if "foreign" in options.parts:
        results |= measure_foreign(tables, options.run, seed=sizes.seed)
    results |= {f"{split}_queries": len(scored) for split, scored in tables.scored.items()}
    results |= {"corpus_images": len(tables.corpus), "candidates_per_query": len(tables.rows["test"][0])}
    results |= {"seed": sizes.seed, "quick": options.quick, **machine.describe()}
    results[f"benchmark_seconds_{'_'.join(options.parts)}"] = round(time.perf_counter() - started, 1)
    machine.report(results, options.json)
    if not options.quick:
        document.fill(DOCS / "student.md", parts_of(results))
    return None


if __name__ == "__main__":
    machine.run(main)
