"""Retrain: a small generator, trained from scratch again and again on parts of its images.

Each model is a process of its own with one thread, which trains, resuming from its last checkpoint, and measures (measure.py).
What is there is not done again, so that the work may be killed and started again at any time. Two trainings with one seed on
one machine and one thread are the same bit for bit; on other processors or library versions they are as two seeds are, for
rounding errors grow in training.

Reads RUN/corpus and a trained autoencoder; writes RUN/shared (latents, tokenizer) and RUN/models. The full model draws
RUN/queries. record.py makes a ground truth folder of a run.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPTokenizer

from fastattr.core.files import atomic_path, read_json, sha256_file, temporary_folder, write_json
from fastattr.core.stages import MANIFEST, fingerprint, finished, require_same, write_manifest
from fastattr.core.training import fit, trapezoid
from fastattr.corpus.stage import CorpusConfig
from fastattr.corpus.store import Corpus, write_corpus
from fastattr.evaluation.subsets import Model, RetrainConfig, choose_part, groups, halves, removals
from fastattr.generators.generator import Generator
from fastattr.generators.queries import Queries
from fastattr.generators.scratch.autoencoder import encode_latents, load_images
from fastattr.generators.scratch.denoiser import DenoiserLoss, build_denoiser, build_scheduler, tokenize, train_tokenizer

RANKINGS = "rankings.parquet"
"""In the run, and kept with the ground truth: whom each method names for each query of leave-K-out."""


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
        unet, text_encoder = build_denoiser(
            self.config.generator, tokenizer=self.tokenizer, latent_channels=channels, latent_side=side
        )
        return DenoiserLoss(unet, text_encoder, build_scheduler())

    def generator(self, model: Model) -> Generator:
        """A trained model as a generator."""
        network = self.untrained(model.seed)
        weights = load_file(self.folder(model) / "weights.safetensors")
        network.load_state_dict({name: value.float() for name, value in weights.items()})
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL.from_pretrained(self.autoencoder),
            text_encoder=network.text_encoder,
            tokenizer=self.tokenizer,
            unet=network.unet,
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        return Generator(pipeline, name=model.model_id)


def prepare(config: RetrainConfig, run_dir: Path, *, autoencoder: Path, source: Path) -> Retraining:
    """Choose the images, encode them and learn the tokenizer, once; later calls check that the recipe is still the same.

    `source` is a finished corpus, read only where `run_dir` has none yet; `autoencoder` the folder of a trained one.

    Raises:
        ArtifactMismatchError: the run was begun with another recipe, corpus or autoencoder.
    """
    if not (run_dir / "corpus" / MANIFEST).exists():
        whole = Corpus(source)
        rows = choose_part(whole, config.part)
        write_corpus(whole.training_images(rows.tolist()), run_dir / "corpus", CorpusConfig(**whole.manifest["config"]))
    run, shared = Retraining(config, run_dir, autoencoder), run_dir / "shared"
    inputs = {
        "corpus": run.corpus.fingerprint,
        "autoencoder": sha256_file(autoencoder / "diffusion_pytorch_model.safetensors"),
    }
    if finished(shared, stage="bench", config=config.recipe, inputs=inputs):
        return run
    network = AutoencoderKL.from_pretrained(autoencoder)
    latents = encode_latents(network, load_images(run.corpus, network.config.sample_size)) * network.config.scaling_factor
    with atomic_path(shared / "latents.npy") as temporary:
        np.save(temporary, latents.numpy())
    with temporary_folder(shared) as scratch:
        train_tokenizer(
            (caption for captions in run.corpus.captions for caption in captions),
            vocabulary=config.generator.vocabulary,
            max_tokens=config.generator.max_tokens,
            scratch=scratch,
        ).save_pretrained(shared / "tokenizer")
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
    started = time.monotonic()
    config = run.config.generator
    captions = [captions[0] for captions in run.corpus.captions]
    rows = torch.tensor([row for row, image_id in enumerate(run.corpus.image_ids) if image_id not in model.removed])
    latents = run.latents[rows]
    prompts = {
        "whole": captions,
        "subject": [caption.rpartition(", ")[0] or caption for caption in captions],
        "style": [caption.rpartition(", ")[2] for caption in captions],
    }
    tokens = {name: tokenize(run.tokenizer, texts)[rows] for name, texts in prompts.items()}
    empty = tokenize(run.tokenizer, [""])
    shares = np.cumsum([config.caption_dropout, config.subject_dropout, config.style_dropout])[::-1]
    network = run.untrained(model.seed)
    train_timesteps = build_scheduler().config.num_train_timesteps

    def batch_of(picked: np.ndarray, generator: torch.Generator) -> tuple[torch.Tensor, ...]:  # as train_generator's
        stratum = torch.randperm(len(picked), generator=generator) + torch.rand(len(picked), generator=generator)
        timesteps = (stratum / len(picked) * train_timesteps).long().clamp_max(train_timesteps - 1)
        lot = torch.rand(len(picked), 1, generator=generator)
        prompt = tokens["whole"][picked]
        for share, shorter in zip(shares, (tokens["subject"][picked], tokens["style"][picked], empty), strict=True):
            prompt = torch.where(lot < share, shorter, prompt)
        return latents[picked], prompt, timesteps, torch.randn(latents[picked].shape, generator=generator)

    checkpoint = path.with_name("checkpoint.safetensors")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    average = fit(
        network,
        batch_of,
        replace(config.training, seed=model.seed),
        examples=len(rows),
        checkpoint=checkpoint,
        made_from=identity,
        schedule=trapezoid(config.decay_share),
        description=model.model_id,
    )
    facts = {"identity": fingerprint(identity), "seconds": round(time.monotonic() - started, 1)}  # since the last start
    write_json(path.with_name("training.json"), facts)
    with atomic_path(path) as temporary:
        save_file({name: value.half().contiguous() for name, value in average.state_dict().items()}, temporary)
    checkpoint.unlink(missing_ok=True)


def planned(run: Retraining, what: str) -> list[Model]:
    """The models that `what` needs, besides 'full'."""
    if what == "lds":
        return halves(run.corpus.image_ids, run.config)
    if what == "groups":
        return groups(run.corpus, run.config)
    return removals(run.corpus, run.queries, run.run_dir / RANKINGS, run.config)


def run_all(
    models: Sequence[Model], command: Callable[[str], Sequence[str]], logs: Path, *, processes: int, description: str
) -> list[str]:
    """Run one process a model, `processes` at a time; returns the ids of those that failed.

    `command` gives the command line that calls `measure.run_one` for a model's id; what a process says goes to LOGS/ID.txt.
    A process that outlives this one finishes its model and ends; starting anew meanwhile does no harm, as both write
    the same files atomically.
    """
    logs.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    waiting = [model.model_id for model in models]
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed = []
    with tqdm(total=len(models), desc=description, unit="model") as bar:
        while waiting or running:
            while waiting and len(running) < processes:
                model_id = waiting.pop(0)
                with (logs / f"{model_id}.txt").open("wb") as log:
                    running[model_id] = subprocess.Popen(
                        command(model_id), env=environment, stdout=log, stderr=subprocess.STDOUT
                    )
            time.sleep(0.2)
            for model_id in [name for name, process in running.items() if process.poll() is not None]:
                if running.pop(model_id).returncode != 0:
                    failed.append(model_id)
                bar.update()
    return failed
