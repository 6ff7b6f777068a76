"""Teacher: find the training images that suffer when the model unlearns a query.

One EKFAC-preconditioned step raises the query's denoising loss; each candidate's loss is then measured before and
after, with noise drawn per image id so that the two are comparable. The loss before is measured once for the whole
corpus. The weights are restored bit for bit after each query.

Reads corpus/, generator/, queries/, candidates/; writes ekfac/ (factors), base_loss/ and scores/ (one shard a query
while it runs, so a killed run resumes at the next query).
Source: arXiv:2511.10721, sec. 3 (AbU+). Where we differ from the paper: docs/differences.md.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from fastattr.artifacts import MANIFEST, atomic_path, fingerprint, finished, open_stage, read_json, require_same, write_manifest
from fastattr.candidates import read_candidates
from fastattr.corpus import Corpus
from fastattr.ekfac import Factors, fit_ekfac
from fastattr.errors import InputError, NonFiniteError
from fastattr.generator import CROSS_ATTENTION_KV, Generator, noise_for, spread_timesteps
from fastattr.queries import Queries
from fastattr.scores import ScoredQuery, write_shard

logger = logging.getLogger(__name__)

BASE_LOSS_ROWS = 512
"""Training images whose base losses go into one file."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Settings of the unlearning teacher, AbU+."""

    pattern: str = CROSS_ATTENTION_KV
    """Linear layers of the U-Net to unlearn, as a regular expression on their names."""
    query_loss_rise: float = 0.02
    """The step is as long as raises the query's loss by this part of itself, to first order."""
    step_size: float | None = None
    """A fixed factor on the natural gradient instead, as in the paper; None uses `query_loss_rise`."""
    damping: float = 0.1
    """EKFAC damping, as a fraction of each layer's mean eigenvalue (the authors' 0.1)."""
    factor_examples: int = 4096
    """(image, timestep, noise) triples on which the EKFAC factors are fitted."""
    query_draws: int = 256
    """(timestep, noise) pairs averaged into the query's gradient; the paper takes 50,000 for COCO."""
    loss_draws: int = 4
    """(timestep, noise) pairs at which a training image's loss is taken; the paper takes 20 for COCO."""
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.step_size is None and not 0 < self.query_loss_rise < 10:
            raise InputError(f"query_loss_rise must be above 0, e.g. 0.02 for 2%, got {self.query_loss_rise}")
        if self.damping <= 0:
            raise InputError(f"damping must be positive, got {self.damping}")
        if min(self.factor_examples, self.query_draws, self.loss_draws, self.batch_size) < 1:
            raise InputError("factor_examples, query_draws, loss_draws and batch_size must be at least 1")


@dataclass(frozen=True)
class EncodedImages:
    """Training images as the denoiser sees them."""

    image_ids: Sequence[str]
    latents: torch.Tensor
    """(N, L, h, w), scaled."""
    conditioning: torch.Tensor
    """(N, T, W) text conditioning of the first caption."""

    def rows(self, image_ids: Sequence[str]) -> np.ndarray:
        """(C,) rows of these ids."""
        row_of = {image_id: row for row, image_id in enumerate(self.image_ids)}
        return np.array([row_of[image_id] for image_id in image_ids], dtype=np.int64)


def encode_corpus(generator: Generator, corpus: Corpus, *, batch_size: int) -> EncodedImages:
    """Latents and conditioning of every training image."""
    latents, conditioning = [], []
    for start in tqdm(range(0, len(corpus), batch_size), desc="encode corpus", unit="batch"):
        rows = range(start, min(start + batch_size, len(corpus)))
        latents.append(generator.encode_image([corpus.image(row) for row in rows]).cpu())
        conditioning.append(generator.encode_prompt([corpus.captions[row][0] for row in rows]).cpu())
    return EncodedImages(corpus.image_ids, torch.cat(latents), torch.cat(conditioning))


@torch.no_grad()
def image_losses(
    generator: Generator, images: EncodedImages, rows: np.ndarray, *, draws: int, batch_size: int, seed: int
) -> np.ndarray:
    """Denoising loss of training images, averaged over draws.

    Args:
        generator: with the weights to measure.
        images: the encoded corpus.
        rows: (C,) which of them.
        draws: timesteps spread evenly over the schedule, each with noise of its own, fixed by (image id, draw, seed).
        batch_size: network evaluations at once; does not change the result.
        seed: of the noise.

    Returns:
        (C,) float64, mean squared error per latent element.
    """
    timesteps = spread_timesteps(draws, train_timesteps=generator.train_timesteps)
    pairs = [(row, draw) for row in rows for draw in range(draws)]
    losses = []
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        picked, drawn = [row for row, _ in batch], [draw for _, draw in batch]
        noise = noise_for([images.image_ids[row] for row in picked], drawn, seed=seed, shape=generator.latent_shape)
        loss = generator.training_loss(
            images.latents[picked].to(generator.device),
            images.conditioning[picked].to(generator.device),
            torch.from_numpy(timesteps[drawn]).to(generator.device),
            noise.to(generator.device),
        )
        losses.append(loss.double().cpu().numpy())
    means: np.ndarray = np.concatenate(losses).reshape(len(rows), draws).mean(axis=1)
    return means


def query_gradient(
    generator: Generator,
    layers: Mapping[str, nn.Linear],
    latent: torch.Tensor,
    conditioning: torch.Tensor,
    *,
    query_id: str,
    draws: int,
    batch_size: int,
    seed: int,
) -> tuple[dict[str, torch.Tensor], float]:
    """Mean gradient of the query's denoising loss.

    Args:
        generator: with base weights.
        layers: those to unlearn; their weights must require gradients.
        latent: (1, L, h, w).
        conditioning: (1, T, W).
        query_id: fixes the noise, together with draw number and seed.
        draws: timesteps spread evenly over the schedule, one noise each.
        batch_size: draws at once.
        seed: of the noise.

    Returns:
        (out, in) gradient by layer, and the mean loss.
    """
    timesteps = spread_timesteps(draws, train_timesteps=generator.train_timesteps)
    total = 0.0
    for layer in layers.values():
        layer.weight.grad = None
    for start in range(0, draws, batch_size):
        drawn = list(range(start, min(start + batch_size, draws)))
        noise = noise_for([query_id] * len(drawn), drawn, seed=seed, shape=generator.latent_shape).to(generator.device)
        loss = generator.training_loss(
            latent.to(generator.device).expand_as(noise),
            conditioning.to(generator.device).expand(len(drawn), -1, -1),
            torch.from_numpy(timesteps[drawn]).to(generator.device),
            noise,
        )
        (loss.sum() / draws).backward()
        total += float(loss.detach().double().sum())
    gradients = {}
    for name, layer in layers.items():
        gradient = layer.weight.grad
        if gradient is None or not torch.isfinite(gradient).all():
            raise NonFiniteError(f"the gradient of layer {name} for query {query_id} is missing or not finite.")
        gradients[name] = gradient.clone()
        layer.weight.grad = None
    return gradients, total / draws


def unlearning_step(
    gradients: Mapping[str, torch.Tensor],
    factors: Factors,
    *,
    damping: float,
    loss: float,
    rise: float,
    step_size: float | None,
) -> tuple[dict[str, torch.Tensor], float]:
    """The change of weights that unlearns a query: uphill in its loss, along the natural gradient.

    Args:
        gradients: (out, in) gradient of the query's loss, by layer.
        factors: EKFAC factors of the same layers.
        damping: as a fraction of each layer's mean eigenvalue.
        loss: the query's loss.
        rise: the relative rise of that loss that the step should give, to first order.
        step_size: a fixed factor instead, or None.

    Returns:
        (out, in) change by layer, and the relative rise that it gives to first order.
    """
    natural = factors.precondition(gradients, damping=damping)
    slope = sum(float((gradients[name].double() * natural[name].double()).sum()) for name in gradients)
    factor = rise * loss / slope if step_size is None else step_size
    return {name: factor * value for name, value in natural.items()}, factor * slope / loss


class unlearned:  # noqa: N801  (a context manager, named as it reads: `with unlearned(layers, step):`)
    """Weights changed by a step while open; restored bit for bit at the end, whatever happened inside."""

    def __init__(self, layers: Mapping[str, nn.Linear], step: Mapping[str, torch.Tensor]) -> None:
        self._layers, self._step = layers, step

    @torch.no_grad()
    def __enter__(self) -> None:
        self._kept = {name: layer.weight.detach().clone() for name, layer in self._layers.items()}
        for name, layer in self._layers.items():
            layer.weight += self._step[name]

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for name, layer in self._layers.items():
            layer.weight.copy_(self._kept[name])


def influence_scores(base_loss: np.ndarray, unlearned_loss: np.ndarray) -> np.ndarray:
    """Score each candidate by how much unlearning the query hurt it.

    Args:
        base_loss: (C,) denoising loss before unlearning, mean squared error per latent element.
        unlearned_loss: (C,) the same after unlearning, with the same noise draws.

    Returns:
        (C,) in the unit of the losses. Higher is more influential; values may be negative.

    Raises:
        InputError: the shapes differ.

    Source: arXiv:2511.10721, sec. 3.
    """
    if base_loss.shape != unlearned_loss.shape:
        raise InputError(f"losses must share one (C,) shape, got {base_loss.shape} and {unlearned_loss.shape}")
    rise: np.ndarray = unlearned_loss - base_loss  # positive where unlearning the query hurt
    return rise


def factor_batches(generator: Generator, images: EncodedImages, config: TeacherConfig) -> Callable[[], Iterator[torch.Tensor]]:
    """What `fit_ekfac` asks for: per-example training losses on random images of the corpus (empirical Fisher)."""
    rng = np.random.default_rng([config.seed, 7])
    rows = rng.choice(
        len(images.image_ids), size=config.factor_examples, replace=config.factor_examples > len(images.image_ids)
    )
    timesteps = rng.integers(0, generator.train_timesteps, size=config.factor_examples)

    def batches() -> Iterator[torch.Tensor]:
        starts = range(0, config.factor_examples, config.batch_size)
        for start in tqdm(starts, desc="EKFAC factors", unit="batch"):
            part = slice(start, start + config.batch_size)
            ids = [f"factor/{position}" for position in range(config.factor_examples)[part]]
            noise = noise_for(ids, [0] * len(ids), seed=config.seed, shape=generator.latent_shape)
            yield generator.training_loss(
                images.latents[rows[part]].to(generator.device),
                images.conditioning[rows[part]].to(generator.device),
                torch.from_numpy(timesteps[part]).to(generator.device),
                noise.to(generator.device),
            )

    return batches


def run(config: TeacherConfig, run_dir: Path) -> dict[str, Any]:
    """Score every query's candidates; queries are split over the processes of `accelerate launch`.

    Returns:
        The manifest of run_dir/scores.
    """
    accelerator = Accelerator()
    corpus, queries = Corpus(run_dir / "corpus"), Queries(run_dir / "queries")
    manifest = open_stage(run_dir / "candidates", "candidates")
    require_same(
        "the corpus of candidates/", manifest["corpus_fingerprint"], corpus.fingerprint, "Run `fastattr candidates` again."
    )
    require_same(
        "the queries of candidates/", manifest["queries_fingerprint"], queries.fingerprint, "Run `fastattr candidates` again."
    )
    candidates = read_candidates(run_dir / "candidates")
    empty = [query_id for query_id in queries.query_ids if not candidates.get(query_id, ([], None))[0]]
    if empty:
        raise InputError(f"{len(empty)} queries have no candidates, e.g. {empty[:3]}; run `fastattr candidates` again.")
    generator = Generator.from_pretrained(run_dir / "generator", device=accelerator.device)
    layers = generator.modules_to_unlearn(config.pattern)
    folder = run_dir / "scores"
    inputs = {"candidates": manifest["fingerprint"], "generator": generator.fingerprint}
    if finished(folder, stage="scores", config=config, inputs=inputs):
        done: dict[str, Any] = read_json(folder / MANIFEST)
        return done
    started = time.monotonic()
    images = encode_corpus(generator, corpus, batch_size=config.batch_size)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    # What the settings below determine is kept in folders named by them, so nothing stale is ever picked up.
    factors = _factors(run_dir / "ekfac", generator, images, layers, config, accelerator, corpus.fingerprint)
    base_loss = _base_loss(run_dir / "base_loss", generator, images, config, accelerator, corpus.fingerprint)
    shards = folder / f"shards-{fingerprint([inputs, vars(config)])}"
    todo = [row for row in range(len(queries.query_ids)) if not (shards / f"{queries.query_ids[row]}.parquet").exists()]
    with accelerator.split_between_processes(todo) as mine:
        for row in tqdm(mine, desc="teacher", unit="query", disable=not accelerator.is_main_process):
            query_id = queries.query_ids[row]
            image_ids, is_outsider = candidates[query_id]
            influence, rise = score_query(
                generator,
                layers,
                factors,
                images,
                base_loss,
                latent=generator.encode_image([queries.image(row)]),
                prompt=queries.prompts[row],
                query_id=query_id,
                candidate_rows=corpus.rows(image_ids),
                config=config,
            )
            scored = ScoredQuery(query_id, queries.prompts[row], queries.splits[row], image_ids, influence, is_outsider, rise)
            write_shard(shards / f"{query_id}.parquet", [scored], teacher="abu_plus_exact", config=fingerprint(vars(config)))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        tables = [pq.read_table(shards / f"{query_id}.parquet") for query_id in queries.query_ids]
        with atomic_path(folder / "data-00000.parquet") as temporary:
            pq.write_table(pa.concat_tables(tables), temporary)
        write_manifest(
            folder,
            stage="scores",
            config=config,
            inputs=inputs,
            teacher="abu_plus_exact",
            corpus_fingerprint=corpus.fingerprint,
            queries_fingerprint=queries.fingerprint,
            generator_fingerprint=generator.fingerprint,
            processes=accelerator.num_processes,
            seconds=round(time.monotonic() - started, 1),
            queries=len(queries.query_ids),
        )
        for path in shards.glob("*.parquet"):
            path.unlink()
        shards.rmdir()
    accelerator.wait_for_everyone()
    done = read_json(folder / MANIFEST)
    return done


def score_query(
    generator: Generator,
    layers: Mapping[str, nn.Linear],
    factors: Factors,
    images: EncodedImages,
    base_loss: np.ndarray,
    *,
    latent: torch.Tensor,
    prompt: str,
    query_id: str,
    candidate_rows: np.ndarray,
    config: TeacherConfig,
) -> tuple[np.ndarray, float]:
    """Influence of each candidate on one query.

    Args:
        generator: with base weights, which it has again on return.
        layers: those to unlearn.
        factors: EKFAC factors of these layers.
        images: the encoded corpus.
        base_loss: (N,) losses of the whole corpus before unlearning.
        latent: (1, L, h, w) of the query's image.
        prompt: the query's.
        query_id: fixes the noise of the query's gradient.
        candidate_rows: (C,) rows of the corpus.
        config: the teacher's settings.

    Returns:
        (C,) influence scores, higher = more influential, and the first-order relative rise of the query's loss.
    """
    gradients, loss = query_gradient(
        generator,
        layers,
        latent,
        generator.encode_prompt([prompt]),
        query_id=query_id,
        draws=config.query_draws,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    step, rise = unlearning_step(
        gradients, factors, damping=config.damping, loss=loss, rise=config.query_loss_rise, step_size=config.step_size
    )
    with unlearned(layers, step):
        after = image_losses(
            generator, images, candidate_rows, draws=config.loss_draws, batch_size=config.batch_size, seed=config.seed
        )
    return influence_scores(base_loss[candidate_rows], after), rise


def _factors(
    parent: Path,
    generator: Generator,
    images: EncodedImages,
    layers: Mapping[str, nn.Linear],
    config: TeacherConfig,
    accelerator: Accelerator,
    corpus_fingerprint: str,
) -> Factors:
    """Fitted EKFAC factors: read if they are there, else fitted by the first process."""
    identity = [
        generator.fingerprint,
        corpus_fingerprint,
        sorted(layers),
        config.factor_examples,
        config.batch_size,
        config.seed,
    ]
    folder = parent / fingerprint(identity)
    if accelerator.is_main_process and not (folder / "num_lambda_processed.safetensors").exists():
        fit_ekfac(layers, factor_batches(generator, images, config)).save(folder)
    accelerator.wait_for_everyone()
    return Factors.load(folder, layers)


def _base_loss(
    parent: Path,
    generator: Generator,
    images: EncodedImages,
    config: TeacherConfig,
    accelerator: Accelerator,
    corpus_fingerprint: str,
) -> np.ndarray:
    """(N,) base losses of the corpus, measured in parts that are split over the processes and kept for the next run."""
    folder = parent / fingerprint([generator.fingerprint, corpus_fingerprint, config.loss_draws, config.seed])
    count = len(images.image_ids)
    starts = list(range(0, count, BASE_LOSS_ROWS))
    missing = [start for start in starts if not (folder / f"{start:09d}.npy").exists()]
    with accelerator.split_between_processes(missing) as mine:
        for start in tqdm(mine, desc="base loss", unit="part", disable=not accelerator.is_main_process):
            rows = np.arange(start, min(start + BASE_LOSS_ROWS, count))
            losses = image_losses(
                generator, images, rows, draws=config.loss_draws, batch_size=config.batch_size, seed=config.seed
            )
            with atomic_path(folder / f"{start:09d}.npy") as temporary:
                np.save(temporary, losses)
    accelerator.wait_for_everyone()
    return np.concatenate([np.load(folder / f"{start:09d}.npy") for start in starts])
