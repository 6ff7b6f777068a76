"""Retrain: a small generator, trained from scratch again and again on parts of its images, and asked about the queries.

Each model is a process of its own with one thread, which trains, resuming from its last checkpoint, and measures: every
query's denoising loss, under noise that is the same for all models. Models that lack the images which some method holds most
influential for a query draw that query again. What is there is not done again. Two trainings with one seed on one machine
and one thread are the same bit for bit; on other processors or library versions they are as two seeds are.

Reads RUN/corpus, RUN/queries and a trained autoencoder; writes RUN/shared (latents, tokenizer) and RUN/models.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPTokenizer

from fastattr.core.errors import InputError, NonFiniteError
from fastattr.core.files import atomic_path, read_json, sha256_file, temporary_folder, write_json
from fastattr.core.stages import MANIFEST, fingerprint, finished, require_same, write_manifest
from fastattr.core.training import fit, trapezoid
from fastattr.corpus.stage import CorpusConfig
from fastattr.corpus.store import Corpus, write_corpus
from fastattr.evaluation.subsets import WHAT, Model, RetrainConfig, choose_part, groups, halves, removals
from fastattr.features.kinds import open_encoder
from fastattr.generators.generator import Generator
from fastattr.generators.queries import Queries
from fastattr.generators.schedules import noise_for, spread_timesteps
from fastattr.generators.scratch.autoencoder import encode_latents, load_images
from fastattr.generators.scratch.denoiser import DenoiserLoss, build_denoiser, build_scheduler, tokenize, train_tokenizer
from fastattr.generators.scratch.stage import pipeline_of

RANKINGS = "rankings.parquet"
"""In the run, and kept with the ground truth: whom each method names for each query of leave-K-out."""
IMAGE_ENCODER = "open_clip-image:emoji"
"""Judges how alike a query and its regeneration look."""
LOSS_SEED = 1_000_000
"""Added to the seed for the noise of the measured losses: no teacher may unlearn a query at the noise that judges it."""


@dataclass(frozen=True)
class Retraining:
    """A run folder of retrained models: what all of them share, opened."""

    config: RetrainConfig
    run_dir: Path
    autoencoder: Path  # folder of the one whose latents all models are trained on

    @cached_property
    def corpus(self) -> Corpus:
        """The benchmark's images."""
        return Corpus(self.run_dir / "corpus")

    @cached_property
    def queries(self) -> Queries:
        """Drawn by the full model."""
        return Queries(self.run_dir / "queries")

    @cached_property
    def latents(self) -> torch.Tensor:
        """(N, L, h, w), scaled."""
        return torch.from_numpy(np.load(self.run_dir / "shared" / "latents.npy"))

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """Learned from the captions of all images."""
        return CLIPTokenizer.from_pretrained(self.run_dir / "shared" / "tokenizer")

    def folder(self, model: Model) -> Path:
        """Where a model's weights and measurements are."""
        return self.run_dir / "models" / model.model_id

    def full(self) -> Model:
        """The model on all images."""
        return Model("full", "full", self.config.seed, frozenset(), "full")

    def untrained(self, seed: int) -> DenoiserLoss:
        """The network of every model, with the start that this seed gives."""
        torch.manual_seed(seed)
        _, channels, side, _ = self.latents.shape
        sizes = {"latent_channels": channels, "latent_side": side}
        unet, text_encoder = build_denoiser(self.config.generator, tokenizer=self.tokenizer, **sizes)
        return DenoiserLoss(unet, text_encoder, build_scheduler())

    def generator(self, model: Model) -> Generator:
        """A trained model as a generator."""
        network = self.untrained(model.seed)
        weights = load_file(self.folder(model) / "weights.safetensors")
        network.load_state_dict({name: value.float() for name, value in weights.items()})
        pipeline = pipeline_of(network, AutoencoderKL.from_pretrained(self.autoencoder), self.tokenizer)
        return Generator(pipeline, name=model.model_id)


def prepare(config: RetrainConfig, run_dir: Path, *, autoencoder: Path, source: Path) -> Retraining:
    """Choose the images, encode them and learn the tokenizer, once.

    `source` is a finished corpus, read only where `run_dir` has none yet; `autoencoder` the folder of a trained one.
    ArtifactMismatchError if the run was begun with another recipe, corpus or autoencoder.
    """
    if not (run_dir / "corpus" / MANIFEST).exists():
        whole = Corpus(source)
        rows = choose_part(whole, config.part)
        write_corpus(whole.training_images(rows.tolist()), run_dir / "corpus", CorpusConfig(**whole.manifest["config"]))
    run, shared = Retraining(config, run_dir, autoencoder), run_dir / "shared"
    inputs = {"corpus": run.corpus.fingerprint, "autoencoder": sha256_file(autoencoder / "diffusion_pytorch_model.safetensors")}
    if finished(shared, stage="bench", config=config.recipe, inputs=inputs):
        return run
    network = AutoencoderKL.from_pretrained(autoencoder)
    latents = encode_latents(network, load_images(run.corpus, network.config.sample_size)) * network.config.scaling_factor
    with atomic_path(shared / "latents.npy") as temporary:
        np.save(temporary, latents.numpy())
    captions = (caption for captions in run.corpus.captions for caption in captions)
    sizes = {"vocabulary": config.generator.vocabulary, "max_tokens": config.generator.max_tokens}
    with temporary_folder(shared) as scratch:
        train_tokenizer(captions, **sizes, scratch=scratch).save_pretrained(shared / "tokenizer")
    write_manifest(shared, stage="bench", config=config.recipe, inputs=inputs)
    return run


def training_identity(run: Retraining, model: Model) -> dict[str, Any]:
    """All that determines a model's weights."""
    return {"recipe": run.config.recipe, "seed": model.seed, "removed": sorted(model.removed)}


def train(run: Retraining, model: Model) -> None:
    """Train one model from scratch and keep its weights in half precision; resumes, and does nothing if they are there."""
    path = run.folder(model) / "weights.safetensors"
    identity = training_identity(run, model)
    if path.exists():
        found = read_json(path.with_name("training.json"))["identity"]
        require_same(f"the training of {path}", found, fingerprint(identity), "Delete that folder to train it again.")
        return
    started, config = time.monotonic(), run.config.generator
    captions = [captions[0] for captions in run.corpus.captions]
    rows = torch.tensor([row for row, image_id in enumerate(run.corpus.image_ids) if image_id not in model.removed])
    subjects = [caption.rpartition(", ")[0] or caption for caption in captions]
    styles = [caption.rpartition(", ")[2] for caption in captions]
    whole, subject, style = (tokenize(run.tokenizer, texts)[rows] for texts in (captions, subjects, styles))
    latents, empty = run.latents[rows], tokenize(run.tokenizer, [""])
    shares = np.cumsum([config.caption_dropout, config.subject_dropout, config.style_dropout])[::-1]
    network, train_timesteps = run.untrained(model.seed), build_scheduler().config.num_train_timesteps

    def batch_of(picked: np.ndarray, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        stratum = torch.randperm(len(picked), generator=generator) + torch.rand(len(picked), generator=generator)
        timesteps = (stratum / len(picked) * train_timesteps).long().clamp_max(train_timesteps - 1)
        lot, prompt = torch.rand(len(picked), 1, generator=generator), whole[picked]
        for share, shorter in zip(shares, (subject[picked], style[picked], empty), strict=True):
            prompt = torch.where(lot < share, shorter, prompt)
        return latents[picked], prompt, timesteps, torch.randn(latents[picked].shape, generator=generator)

    checkpoint = path.with_name("checkpoint.safetensors")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    how: dict[str, Any] = {"schedule": trapezoid(config.decay_share), "made_from": identity, "description": model.model_id}
    training = replace(config.training, seed=model.seed)
    average = fit(network, batch_of, training, examples=len(rows), checkpoint=checkpoint, **how)
    facts = {"identity": fingerprint(identity), "seconds": round(time.monotonic() - started, 1)}  # since the last start
    write_json(path.with_name("training.json"), facts)
    with atomic_path(path) as temporary:
        save_file({name: value.half().contiguous() for name, value in average.state_dict().items()}, temporary)
    checkpoint.unlink(missing_ok=True)


def measured_rows(run: Retraining, model: Model) -> list[int]:
    """Queries whose loss is measured: those that the model draws again, or, without any, the first drawing of each prompt."""
    if model.regenerate:
        return [run.queries.query_ids.index(query_id) for query_id in model.regenerate]
    first = {prompt: row for row, prompt in reversed(list(enumerate(run.queries.prompts)))}
    return sorted(first.values())


def measurement_identity(run: Retraining, model: Model) -> str:
    """All that determines what is measured of a model."""
    noise = {"timesteps": run.config.loss_timesteps, "seed": run.config.seed + LOSS_SEED}
    return fingerprint([training_identity(run, model), run.queries.fingerprint, measured_rows(run, model), noise])


def read_measured(run: Retraining, model: Model) -> dict[str, Any] | None:
    """What `measure` wrote for this very model and these very queries; None if it has not."""
    path = run.folder(model) / "measured.json"
    found = read_json(path) if path.exists() else {}
    return found if found and found["identity"] == measurement_identity(run, model) else None


@torch.no_grad()
def query_losses(generator: Generator, queries: Queries, rows: Sequence[int], config: RetrainConfig) -> np.ndarray:
    """(Q, T) denoising losses of queries at T evenly spaced timesteps, mean squared error per latent element.

    Each is the mean over one noise, which depends on the query's id and the seed alone, and its negative. NonFiniteError if
    one is NaN or infinite.
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
    encoder, found = open_encoder(IMAGE_ENCODER), {}
    for query_id in query_ids:
        row = queries.query_ids.index(query_id)
        record, before = queries.table.drop_columns(["image"]).slice(row, 1).to_pylist()[0], queries.image(row)
        settings = {"seed": record["seed"], "steps": record["steps"], "guidance": float(record["guidance"])}
        after = generator.generate(record["prompt"], **settings)
        with atomic_path(folder / f"{query_id}.png") as temporary:
            after.save(temporary, format="PNG")
        one, other = (np.asarray(image, dtype=np.float64) / 255 for image in (before, after))
        features = encoder.encode([before, after], [[record["prompt"]]] * 2)
        found[query_id] = {"mse": float(np.mean((one - other) ** 2)), "similarity": float(features[0] @ features[1])}
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


def planned(run: Retraining, what: str) -> list[Model]:
    """The models that `what` needs, besides 'full'."""
    if what == "lds":
        return halves(run.corpus.image_ids, run.config)
    if what == "groups":
        return groups(run.corpus, run.config)
    return removals(run.corpus, run.queries, run.run_dir / RANKINGS, run.config)


def everything(run: Retraining) -> list[Model]:
    """The models of all parts; before the queries are drawn, of the parts that need none."""
    drawn = (run.run_dir / "queries" / MANIFEST).exists()
    return [run.full(), *(model for what in WHAT if drawn or what != "leave-k-out" for model in planned(run, what))]


def run_one(run: Retraining, model_id: str) -> None:
    """Train one model and, if the queries are drawn, measure it: what a process of its own does."""
    torch.set_num_threads(1)
    found = [model for model in everything(run) if model.model_id == model_id]
    if not found:
        raise InputError(f"there is no model {model_id!r} in this run.")
    train(run, found[0])
    if (run.run_dir / "queries" / MANIFEST).exists():
        measure(run, found[0])


def run_all(
    models: Sequence[Model], command: Callable[[str], Sequence[str]], logs: Path, *, processes: int, description: str
) -> list[str]:
    """Run one process a model, `processes` at a time; returns the ids of those that failed.

    `command` gives the command line that calls `run_one` for a model's id; what a process says goes to LOGS/ID.txt. A process
    that outlives this one does no harm to one that is started anew: both write the same files atomically.
    """
    logs.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}

    def start(model: Model) -> int:
        with (logs / f"{model.model_id}.txt").open("wb") as log:
            return subprocess.run(command(model.model_id), env=environment, stdout=log, stderr=subprocess.STDOUT).returncode

    with ThreadPoolExecutor(processes) as pool:
        ended = list(tqdm(pool.map(start, models), total=len(models), desc=description, unit="model"))
    return [model.model_id for model, code in zip(models, ended, strict=True) if code]
