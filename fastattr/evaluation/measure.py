"""Measure: what became of the queries under a retrained model: their losses, and what it draws from their noise.

Every query's denoising loss is taken under noise that is the same for all models. Models that lack the images which some
method holds most influential for a query draw that query again. Writes RUN/models/ID/measured.json and drawings.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastattr.core.errors import InputError, NonFiniteError
from fastattr.core.files import atomic_path, read_json, write_json
from fastattr.core.stages import MANIFEST, fingerprint
from fastattr.evaluation.retrain import Retraining, planned, train, training_identity
from fastattr.evaluation.subsets import WHAT, Model, RetrainConfig
from fastattr.features.kinds import open_encoder
from fastattr.generators.generator import Generator
from fastattr.generators.queries import Queries
from fastattr.generators.schedules import noise_for, spread_timesteps

IMAGE_ENCODER = "open_clip-image:emoji"
"""Judges how alike a query and its regeneration look."""
LOSS_SEED = 1_000_000
"""Added to the seed for the noise of the measured losses: no teacher may unlearn a query at the noise that judges it."""


def measurement_identity(run: Retraining, model: Model) -> str:
    """All that determines what is measured of a model."""
    config = run.config
    noise = {"timesteps": config.loss_timesteps, "seed": config.seed + LOSS_SEED}
    return fingerprint([training_identity(run, model), run.queries.fingerprint, measured_rows(run, model), noise])


def measured_rows(run: Retraining, model: Model) -> list[int]:
    """Queries whose loss is measured: those that the model draws again, or, without any, the first drawing of each prompt."""
    queries = run.queries
    if model.regenerate:
        return [queries.query_ids.index(query_id) for query_id in model.regenerate]
    first = {prompt: row for row, prompt in reversed(list(enumerate(queries.prompts)))}
    return sorted(first.values())


def read_measured(run: Retraining, model: Model) -> dict[str, Any] | None:
    """What `measure` wrote for this very model and these very queries; None if it has not."""
    path = run.folder(model) / "measured.json"
    found: dict[str, Any] | None = read_json(path) if path.exists() else None
    return found if found and found["identity"] == measurement_identity(run, model) else None


@torch.no_grad()
def query_losses(generator: Generator, queries: Queries, rows: Sequence[int], config: RetrainConfig) -> np.ndarray:
    """(Q, T) denoising losses of queries at T evenly spaced timesteps, mean squared error per latent element.

    Each is the mean over one noise, which depends on the query's id and the seed alone, and its negative.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    timesteps, batch_size, seed = config.loss_timesteps, config.batch_size, config.seed + LOSS_SEED
    latents = torch.cat([generator.encode_image([queries.image(row)]) for row in rows])
    conditioning = generator.encode_prompt([queries.prompts[row] for row in rows])
    ids = [queries.query_ids[row] for row in rows]
    spread = spread_timesteps(timesteps, train_timesteps=generator.train_timesteps)
    query, draw = (part.ravel() for part in np.indices((len(rows), 2 * timesteps)))
    losses = np.zeros((len(rows), timesteps))
    for start in range(0, len(query), batch_size):
        own, drawn = query[start : start + batch_size], draw[start : start + batch_size]
        noise = noise_for([ids[index] for index in own], (drawn // 2).tolist(), seed=seed, shape=generator.latent_shape)
        sign = torch.from_numpy(1.0 - 2.0 * (drawn % 2)).float()[:, None, None, None]
        part = generator.training_loss(latents[own], conditioning[own], torch.from_numpy(spread[drawn // 2]), noise * sign)
        np.add.at(losses, (own, drawn // 2), part.double().numpy() / 2)
    if not np.isfinite(losses).all():
        raise NonFiniteError(f"{int((~np.isfinite(losses)).sum())} of {len(rows)} query losses are not finite.")
    return losses


def regenerations(
    generator: Generator, queries: Queries, query_ids: Sequence[str], folder: Path
) -> dict[str, dict[str, float]]:
    """How near a model comes to queries that another model drew, from the same noise; its drawings go to FOLDER/QUERY.png.

    By query 'mse' (mean squared difference of pixels in [0, 1]) and 'similarity' (cosine of image features).
    """
    encoder = open_encoder(IMAGE_ENCODER)
    found = {}
    for query_id in query_ids:
        row = queries.query_ids.index(query_id)
        record = queries.table.drop_columns(["image"]).slice(row, 1).to_pylist()[0]
        before = queries.image(row)
        settings = {"seed": record["seed"], "steps": record["steps"], "guidance": float(record["guidance"])}
        after = generator.generate(record["prompt"], **settings)
        with atomic_path(folder / f"{query_id}.png") as temporary:
            after.save(temporary, format="PNG")
        pixels = [np.asarray(image, dtype=np.float64) / 255 for image in (before, after)]
        features = encoder.encode([before, after], [[record["prompt"]]] * 2)
        mse, similarity = np.mean((pixels[0] - pixels[1]) ** 2), features[0] @ features[1]
        found[query_id] = {"mse": float(mse), "similarity": float(similarity)}
    return found


def measure(run: Retraining, model: Model) -> None:
    """Measure a trained model on its queries (`measured_rows`), and draw again what it shall; does nothing if that is done."""
    if read_measured(run, model):
        return
    started, folder, queries, rows = time.monotonic(), run.folder(model), run.queries, measured_rows(run, model)
    generator = run.generator(model)
    losses = query_losses(generator, queries, rows, run.config)
    found = {
        "identity": measurement_identity(run, model),
        "losses": {queries.query_ids[row]: loss for row, loss in zip(rows, losses.tolist(), strict=True)},
        "regenerated": regenerations(generator, queries, model.regenerate, folder),
    }
    trained = read_json(folder / "training.json")["seconds"]
    found["seconds"] = {"train": trained, "measure": round(time.monotonic() - started, 1)}
    write_json(folder / "measured.json", found)


def run_one(run: Retraining, model_id: str) -> None:
    """Train one model and, if the queries are drawn, measure it: what a process of its own does."""
    torch.set_num_threads(1)
    models = [run.full(), *(model for what in WHAT[:2] for model in planned(run, what))]
    if (run.run_dir / "queries" / MANIFEST).exists():
        models += planned(run, "leave-k-out")
    found = [model for model in models if model.model_id == model_id]
    if not found:
        raise InputError(f"there is no model {model_id!r} in this run.")
    train(run, found[0])
    if (run.run_dir / "queries" / MANIFEST).exists():
        measure(run, found[0])
