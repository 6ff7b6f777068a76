"""The student: how much of the teacher it keeps, and how often its own-or-foreign check is wrong, on a run's score tables.

    python benchmarks/student.py --json benchmarks/results/student.json [--quick]

Parts, each of which adds its keys to the JSON file:
    tables   mAP(L) of feature spaces and losses; the best student
    foreign  how often the own-or-foreign check is wrong
Students are chosen on validation queries; test queries are scored once, by what was chosen. mAP(L) is taken within each test
query's candidates, with L in percent of the corpus. Students against retrained models: benchmarks/student_truth.py. With --card
FOLDER the main figures of the JSON file go into an attributor's metrics.json instead, from where its card shows them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fastattr.attributor.folder import read_config, write_config
from fastattr.core.errors import InputError
from fastattr.core.files import read_json, sha256_file, write_json
from fastattr.core.stages import MANIFEST
from fastattr.core.training import TrainingConfig
from fastattr.corpus.store import Corpus
from fastattr.features.encoder import unit_vectors
from fastattr.features.kinds import open_encoder
from fastattr.features.store import folders, read_features
from fastattr.generators.queries import Queries
from fastattr.students.distill import DistillConfig, Validation, distill
from fastattr.students.losses import LOSSES
from fastattr.students.ownness import fit_ownness, measures_of
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
    precision: str = "no"
    """`TrainingConfig.mixed_precision` of our students."""


QUICK = Sizes(steps=60)


def fast_precision() -> str:
    """'bf16' on processors that multiply bfloat16 matrices fast, else 'no'."""
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "no"


def recipe(sizes: Sizes, **options: Any) -> DistillConfig:
    """Our training with other options; those that `TrainingConfig` has go there."""
    fixed: dict[str, Any] = {"batch_size": 128, "warmup_steps": 20, "ema_decay": 0.99, "checkpoint_every": 10_000}
    training = TrainingConfig(steps=sizes.steps, seed=sizes.seed, mixed_precision=sizes.precision, **fixed)
    own = {name: options.pop(name) for name in list(options) if name in TrainingConfig.__annotations__}
    return replace(DistillConfig(loss="bce", judge_every=100, patience=3), training=replace(training, **own), **options)


def train(
    scored: Sequence[ScoredQuery],
    rows: Sequence[np.ndarray],
    queries: np.ndarray,
    images: np.ndarray,
    config: DistillConfig,
    validation: Validation | None = None,
) -> Student:
    """A student of scored queries, whose candidates are rows of the (N, F) image features, on (Q, F) query features."""
    table = make_table(labels_of(scored, rows), corpus_size=len(images), kind=config.target_kind)
    with tempfile.TemporaryDirectory() as scratch:
        return distill(table, queries, images, config, checkpoint=Path(scratch) / "kept.safetensors", validation=validation)


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
        features = self.queries[space, "train"], self.images[space]
        return train(self.scored["train"], self.rows["train"], *features, config, validation=self.validation(space))

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
    """Open a finished run, with the feature spaces that it has."""
    corpus = Corpus(run_dir / "corpus")
    scored = {split: read_scores(run_dir / "scores", split=split) for split in ("train", "validation", "test")}
    images, queries = {}, {}
    for space, encoders in SPACES.items():
        paths = folders(run_dir, "features", encoders)
        if not all((path / MANIFEST).exists() for path in paths):
            print(f"no features for {space}: left out", file=sys.stderr)
            continue
        images[space], query_paths = read_features(paths, corpus.image_ids), folders(run_dir, "query_features", encoders)
        for split, of_split in scored.items():
            queries[space, split] = read_features(query_paths, [query.query_id for query in of_split])
    rows = {split: [corpus.rows(query.image_ids) for query in of_split] for split, of_split in scored.items()}
    return Tables(corpus, scored, rows, images, queries)


def variants(sizes: Sizes, spaces: Sequence[str]) -> dict[str, tuple[str, DistillConfig]]:
    """Students that are tried, by name: feature space and settings."""
    pairs = [(space, loss) for space in spaces for loss in (LOSSES if space == "both" else SHOWN_LOSSES)]
    found = {f"{space}_{loss}": (space, recipe(sizes, loss=loss)) for space, loss in pairs}
    return found | {PAPER_RECIPE: ("both", recipe(sizes, student=PAPER))}


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
    keys = (f"map_1pct_gain_over_paper_recipe_{end}" for end in ("mean", "low", "high"))
    return found | dict(zip(keys, gains, strict=True))


def measure_foreign(tables: Tables, run_dir: Path, *, seed: int) -> dict[str, Any]:
    """Error rates of the check that the attributor would hold: own test queries called foreign, foreign kinds passed over."""
    queries, of_image = Queries(run_dir / "queries"), np.repeat([True, False], tables.images["image"].shape[1])
    pictures = [queries.image(row) for split in ("train", "validation") for row in queries.of_split(split)]
    known: dict[str, Any] = {"measures": np.stack([measures_of(picture) for picture in pictures]), "false_alarms": 0.05}
    known["captions"] = (text for texts in tables.corpus.captions for text in texts)
    features = tables.queries["both", "train"], tables.queries["both", "validation"]
    ownness = fit_ownness(*features, image=of_image, text=~of_image, seed=seed, **known)
    encoders = [open_encoder(name, folder=run_dir) for name in SPACES["both"]]

    def doubted(images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        features = np.concatenate([encoder.encode(images, [[text] for text in prompts]) for encoder in encoders], axis=1)
        doubts = ownness.doubts(features, prompts, [measures_of(image) for image in images])
        return np.array([bool(reasons) for reasons in doubts])

    rows = queries.of_split("test")
    own = [queries.image(row) for row in rows], [queries.prompts[row] for row in rows]
    found: dict[str, Any] = machine.share("foreign_false_alarms", doubted(*own))
    for kind, foreign in foreign_images(tables.corpus, queries, rows, seed=seed).items():
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


def parts_of(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """What docs/student.md shows of the parts that were measured, by the name of its mark."""
    found: dict[str, list[str]] = {}

    def beginning(*starts: str) -> list[str]:
        return [name for name in results if name.startswith(starts) and not name.endswith(("_se", "_n"))]

    if "best_student" in results:
        names = [name.removeprefix("map_1pct_") for name in beginning("map_1pct_") if f"{name}_se" in results]
        names = [name for name in names if f"map_half_pct_{name}" in results]
        header = ["student", "mAP(0.5%)", "mAP(1%)", "mAP(4%)", "mAP(1%), validation"]
        rows = []
        for name in sorted(names, key=lambda name: -results[f"validation_map_1pct_{name}"]):
            figures = [machine.with_error(results, f"map_{key}_{name}") for key in PERCENTS]
            chosen = " (chosen)" if name == results["best_student"] else ""
            rows.append([name + chosen, *figures, machine.number(results[f"validation_map_1pct_{name}"])])
        found["tables"] = machine.table(header, rows)
    if "foreign_false_alarms" in results:
        kinds = [name for name in beginning("foreign_") if f"{name}_se" in results]
        rows = [[f"`{name}`", machine.with_error(results, name, digits=2), str(results[f"{name}_n"])] for name in kinds]
        found["foreign"] = machine.table(["key", "part", "queries"], rows)
    return {name: [*lines, "", machine.where(results)] for name, lines in found.items()}


def write_card(folder: Path, results: Mapping[str, Any]) -> None:
    """Write the main figures into an attributor's metrics.json; what else it holds is kept."""
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
    parser = machine.parser(__doc__, json=RESULTS, quick="short trainings, no document: about 2 minutes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--run", type=Path, default=Path("runs/emoji"), help="finished emoji run folder (%(default)s)")
    parser.add_argument("--card", type=Path, help="only write the figures of --json into this attributor's metrics.json")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = read_json(options.json) if options.json.exists() else {}
    if options.card:
        return write_card(options.card, results)
    sizes = replace(QUICK if options.quick else Sizes(), precision=fast_precision())
    tables = open_tables(options.run)
    if "tables" in options.parts:
        results |= measure_tables(tables, sizes)
    if "foreign" in options.parts:
        results |= measure_foreign(tables, options.run, seed=sizes.seed)
    results |= {f"{split}_queries": len(scored) for split, scored in tables.scored.items()}
    results |= {"corpus_images": len(tables.corpus), "candidates_per_query": len(tables.rows["test"][0])}
    results = machine.finish(results, options)
    if not options.quick:
        machine.fill(DOCS / "student.md", parts_of(results))
    return None


if __name__ == "__main__":
    machine.run(main)
