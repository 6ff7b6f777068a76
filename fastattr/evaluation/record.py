"""Record: make a ground truth folder of a run's retrained models, and take what a ground truth holds into a new run.

Reads a run folder (retrain.py); writes the folder that `GroundTruth` opens, with the two generators that benchmarks need: the
one that drew the queries, and one of another seed and half of the images.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from fastattr.core.errors import ArtifactNotFoundError
from fastattr.core.files import atomic_path, plain, write_json
from fastattr.core.stages import MANIFEST, finished, open_stage, write_manifest
from fastattr.evaluation import retrain
from fastattr.evaluation.retrain import RANKINGS, Retraining, everything, read_measured
from fastattr.evaluation.subsets import Model, halves
from fastattr.evaluation.truth import LOSSES, MODELS, GroundTruth, counterfactuals_schema, write_table
from fastattr.generators import queries as queries_stage
from fastattr.generators.scratch.stage import save_pipeline

OTHER = "half-000-s1"
"""The generator whose teacher is a null: other seed, other training images."""


def make_ground_truth(
    run: Retraining, out: Path, what: Sequence[str], train_all: Callable[[Sequence[Model], str], None], **facts: Any
) -> dict[str, Any]:
    """Train what is missing, draw the queries, and write the ground truth to `out`; returns its manifest, which keeps `facts`.

    `what` names the parts whose models are wanted now; `train_all` trains and measures models, under a description. What
    `out` holds already, of the same recipe, images and queries, is not trained again.
    """
    other = next(model for model in halves(run.corpus.image_ids, run.config) if model.model_id == OTHER)
    drawn = run.run_dir / "queries"
    if not (drawn / MANIFEST).exists() and not restore(run, out):
        train_all([run.full(), other], "first two models")  # their measurements come with the others'
        save_generator(run, run.full(), run.run_dir / "generator")
        queries_stage.run(run.config.queries, run.run_dir)
    inputs = {"corpus": run.corpus.fingerprint, "generator": run.queries.table["generator"][0].as_py()}
    finished(drawn, stage="queries", config=run.config.queries, inputs=inputs)  # refuses other settings than they have
    wanted = {
        model.model_id: model for model in [run.full(), other, *(one for part in what for one in retrain.planned(run, part))]
    }
    train_all([model for model in wanted.values() if not read_measured(run, model)], "models")
    return compact(run, everything(run), out, **facts)


def restore(run: Retraining, out: Path) -> bool:
    """Take queries and measurements from the ground truth at `out` into the run, so that its models need no second training.

    Returns whether it is of this recipe, these images, these queries and this noise; of another one nothing is taken.
    """
    if not (out / MANIFEST).exists():
        return False
    truth = GroundTruth(out)
    names = ("part", "generator", "queries", "loss_timesteps", "seed")
    made, wanted = ({name: config[name] for name in names} for config in (truth.manifest["config"], vars(run.config)))
    if truth.corpus_fingerprint != run.corpus.fingerprint or not _agree(made, json.loads(json.dumps(wanted, default=plain))):
        return False
    folder, facts = run.run_dir / "queries", {"queries_fingerprint": truth.manifest["queries_fingerprint"]}
    inputs = {"corpus": run.corpus.fingerprint, "generator": truth.queries["generator"][0].as_py()}
    _copy(out / "queries.parquet", folder / "data.parquet")
    write_manifest(folder, stage="queries", config=run.config.queries, inputs=inputs, **facts)
    if not any((run.run_dir / "models").glob("*/weights.safetensors")):  # ids must be those of the kept models
        shutil.copytree(out / "generator" / "tokenizer", run.run_dir / "shared" / "tokenizer", dirs_exist_ok=True)
    if (out / RANKINGS).exists() and not (run.run_dir / RANKINGS).exists():
        _copy(out / RANKINGS, run.run_dir / RANKINGS)
    records = {record["model_id"]: record for record in truth.models}
    spent = {name: round(total / len(records), 1) for name, total in truth.manifest["seconds"].items()}
    drawn = {(row["model_id"], row["query_id"]): row for row in truth.counterfactuals.to_dict("records")}
    for model in everything(run):
        record = records.get(model.model_id)
        if not record or record["seed"] != model.seed or set(record["removed_image_ids"]) != model.removed:
            continue
        query_ids = [run.queries.query_ids[row] for row in retrain.measured_rows(run, model)]
        again = {query_id: drawn[model.model_id, query_id] for query_id in model.regenerate}
        alike = {query_id: {name: row[name] for name in ("mse", "similarity")} for query_id, row in again.items()}
        for query_id, row in again.items():
            with atomic_path(run.folder(model) / f"{query_id}.png") as temporary:
                temporary.write_bytes(row["image"]["bytes"])
        losses = truth.losses_by_timestep([model.model_id], query_ids)[0]
        kept: dict[str, Any] = {"losses": dict(zip(query_ids, losses.tolist(), strict=True)), "regenerated": alike}
        kept |= {"identity": retrain.measurement_identity(run, model), "seconds": spent}  # of each the mean of all
        write_json(run.folder(model) / "measured.json", kept)
    return True


def _copy(path: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        shutil.copyfile(path, temporary)


def _agree(made: Any, wanted: Any) -> bool:
    """Whether settings agree as far as the older ones go: a setting that came later had its default then."""
    if isinstance(made, dict) and isinstance(wanted, dict):
        return all(name in wanted and _agree(value, wanted[name]) for name, value in made.items())
    return bool(made == wanted)


def save_generator(run: Retraining, model: Model, folder: Path) -> None:
    """Write a trained model as a pipeline folder in half precision, which `Generator.from_pretrained` loads."""
    with atomic_path(folder) as temporary:
        save_pipeline(run.generator(model).pipeline, temporary)


def compact(run: Retraining, models: Sequence[Model], out: Path, **facts: Any) -> dict[str, Any]:
    """Write the measured models of this run as a ground truth folder; returns its manifest."""
    measured = {model.model_id: found for model in models if (found := read_measured(run, model))}
    for needed in ("full", OTHER):
        if needed not in measured:
            raise ArtifactNotFoundError(f"model {needed!r} is not measured yet; make the part 'lds' first.")
    present = [model for model in models if model.model_id in measured]

    def judged_loss(losses: Sequence[float]) -> float:
        return float(np.mean(np.array(losses)[run.config.judged_timesteps]))

    losses, counterfactuals = [], []
    for model in present:
        found = measured[model.model_id]
        judged = {query_id: judged_loss(by_timestep) for query_id, by_timestep in found["losses"].items()}
        for query_id, by_timestep in found["losses"].items():
            row = {"model_id": model.model_id, "query_id": query_id, "loss": judged[query_id]}
            losses.append({**row, "by_timestep": by_timestep})
        for method, query_id in model.counterfactuals:
            row = {"model_id": model.model_id, "method": method, "query_id": query_id, "loss": judged[query_id]}
            image = {"bytes": (run.folder(model) / f"{query_id}.png").read_bytes(), "path": None}
            counterfactuals.append({**row, "image": image, **found["regenerated"][query_id]})
    records = [{**vars(model), "removed_image_ids": sorted(model.removed)} for model in present]
    write_table(out / "models.parquet", records, MODELS)
    write_table(out / "losses.parquet", losses, LOSSES)
    write_table(out / "counterfactuals.parquet", counterfactuals, counterfactuals_schema())
    with atomic_path(out / "images.parquet") as temporary:
        pq.write_table(run.corpus.table.drop_columns(["url"]), temporary, compression="zstd")
    _copy(run.run_dir / "queries" / "data.parquet", out / "queries.parquet")
    if (run.run_dir / RANKINGS).exists():
        _copy(run.run_dir / RANKINGS, out / RANKINGS)
    for model in present:
        name = {"full": "generator", OTHER: "other_generator"}.get(model.model_id)
        if name and (run.folder(model) / "weights.safetensors").exists():  # else it was restored from the ground truth
            save_generator(run, model, out / name)
            shutil.rmtree(out / name / "vae", ignore_errors=True)  # named by its checksum in the manifest
    return write_manifest(
        out,
        stage="ground_truth",
        config=run.config,
        inputs=open_stage(run.run_dir / "shared", "bench")["inputs"],
        corpus_fingerprint=run.corpus.fingerprint,
        queries_fingerprint=run.queries.fingerprint,
        models={kind: sum(model.kind == kind for model in present) for kind in sorted({model.kind for model in present})},
        repeat_max_log_difference=_repeated(measured),
        seconds={name: round(sum(one["seconds"][name] for one in measured.values()), 1) for name in ("train", "measure")},
        **facts,
    )


def _repeated(measured: Mapping[str, Any]) -> float | None:
    """Largest difference of log losses between two trainings with one seed on the same images; None before both exist."""
    if not {"half-000-s0", "repeat"} <= set(measured):
        return None
    one, other = (measured[name]["losses"] for name in ("half-000-s0", "repeat"))
    return float(max(np.abs(np.log(losses) - np.log(other[query_id])).max() for query_id, losses in one.items()))
