"""The student: how often its own-or-foreign check is wrong, on a run's queries; and how benchmarks train students.

    python benchmarks/student.py --json benchmarks/results/student.json     adds its keys there, and fills docs/student.md

Students against retrained models: benchmarks/student_truth.py. With --card FOLDER the main figures of the JSON file go into an
attributor's metrics.json instead, from where its card shows them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import machine
import numpy as np
from PIL import Image

from fastattr.attributor.folder import read_config, write_config
from fastattr.core.errors import InputError
from fastattr.core.files import read_json, sha256_file, write_json
from fastattr.core.training import TrainingConfig
from fastattr.corpus.store import Corpus
from fastattr.features.kinds import open_encoder
from fastattr.features.store import folders, read_features
from fastattr.generators.queries import Queries
from fastattr.students.distill import DistillConfig, distill
from fastattr.students.ownness import fit_ownness, measures_of
from fastattr.students.pairs import labels_of, make_table
from fastattr.students.student import Student, StudentConfig
from fastattr.teachers.scores import ScoredQuery

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = Path(__file__).parent / "results" / "student.json"
BOTH = ("open_clip-image:encoder", "open_clip-text:encoder")
PAPER = StudentConfig(embed_dim=768, hidden=(768, 768, 768), linear_path=False, dropout=0.1)
"""The paper's network (arXiv:2511.10721, sec. 4; dropout as in the authors' code)."""
PAPER_RECIPE = "both_paper_recipe"
COMMAND = "python benchmarks/student_truth.py"
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


def train(
    scored: Sequence[ScoredQuery],
    rows: Sequence[np.ndarray],
    queries: np.ndarray,
    images: np.ndarray,
    config: DistillConfig,
) -> Student:
    """A student of scored queries, whose candidates are rows of the (N, F) image features, on (Q, F) query features."""
    table = make_table(labels_of(scored, rows), corpus_size=len(images), kind=config.target_kind)
    with tempfile.TemporaryDirectory() as scratch:
        return distill(table, queries, images, config, checkpoint=Path(scratch) / "kept.safetensors")


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


def parts_of(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """What docs/student.md shows, by the name of its mark."""
    kinds = [name for name in results if name.startswith("foreign_") and f"{name}_se" in results]
    rows = [[f"`{name}`", machine.with_error(results, name, digits=2), str(results[f"{name}_n"])] for name in kinds]
    return {"foreign": [*machine.table(["key", "part", "queries"], rows), "", machine.where(results)]}


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
    """Measure and add the figures to the JSON file, or write a card's figures."""
    parser = machine.parser(__doc__, json=RESULTS)
    parser.add_argument("--run", type=Path, default=Path("runs/emoji"), help="finished emoji run folder (%(default)s)")
    parser.add_argument("--card", type=Path, help="only write the figures of --json into this attributor's metrics.json")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = read_json(options.json) if options.json.exists() else {}
    if options.card:
        return write_card(options.card, results)
    results = machine.finish(results | measure_foreign(options.run, seed=0), options)
    return machine.fill(DOCS / "student.md", parts_of(results))


if __name__ == "__main__":
    machine.run(main)
