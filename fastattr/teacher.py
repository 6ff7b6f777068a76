"""Teacher: find the training images that suffer when the model unlearns a query.

One EKFAC-preconditioned step raises the query's denoising loss; each candidate's loss is then measured before and
after, with noise drawn per image id so that the two are comparable. The loss before is measured once for the whole
corpus. The weights are restored bit for bit after each query. Splits named in `TeacherConfig.linearised` are scored to
first order instead (fastattr/linearised.py), for all their queries in one backward pass over the candidates.

Reads corpus/, generator/, queries/, candidates/; writes ekfac/ (factors), base_loss/ and scores/ (one shard a query
while it runs, so a killed run resumes at the next query).
Source: arXiv:2511.10721, sec. 3 (AbU+). Where we differ from the paper: docs/differences.md.
"""

from __future__ import annotations

import logging
import os
import shutil
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
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from fastattr.artifacts import (
    MANIFEST,
    atomic_path,
    fingerprint,
    finished,
    open_stage,
    read_json,
    require_same,
    write_json,
    write_manifest,
)
from fastattr.candidates import read_candidates
from fastattr.corpus import Corpus
from fastattr.denoising import EncodedImages, encode_corpus, image_losses, in_parts
from fastattr.ekfac import Factors, Layer, fit_ekfac
from fastattr.errors import FastattrError, InputError, NonFiniteError, QueriesFailedError
from fastattr.generator import CROSS_ATTENTION_KV, Generator, noise_for, spread_timesteps
from fastattr.linearised import flat_step, linearised_scores
from fastattr.queries import SPLITS, Queries
from fastattr.scores import ScoredQuery, write_shard

logger = logging.getLogger(__name__)

PART_ROWS = 512
"""Training images whose base losses or linearised scores go into one file; a killed run loses at most one part."""
TRIES = 3
"""How often a failing query is tried before it is passed over."""
LINEARISED_QUERIES = 1024
"""Queries that share one backward pass over their candidates; their steps are in memory together."""


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
    curvature: str = "ekfac"
    """'ekfac' (AbU+), or 'diagonal', the Fisher matrix' diagonal (AbU, arXiv:2406.09408)."""
    fisher: str = "empirical"
    """'empirical' takes the data's own targets, 'true' targets drawn from the model's Gaussian."""
    factor_examples: int = 4096
    """(image, timestep, noise) triples on which the curvature is fitted; an image may come several times."""
    query_draws: int = 256
    """(timestep, noise) pairs averaged into the query's gradient; the paper takes 50,000 for COCO."""
    loss_draws: int = 4
    """(timestep, noise) pairs at which a training image's loss is taken; the paper takes 20 for COCO."""
    captions: str = "first"
    """'first' or 'all': the captions over which a training image's loss is averaged; the paper takes all five for COCO."""
    mirrored: bool = False
    """Also score each training image's mirror image and keep the larger rise, for generators trained with mirroring."""
    antithetic: bool = False
    """Take the query's draws in pairs of opposite noise at one timestep."""
    unlearning_steps: int = 1
    """Steps that share the rise (or are `step_size` long each); the gradient is taken anew before each."""
    symmetric: bool = False
    """Score by half the difference between the losses after the step and after the opposite one: even orders cancel."""
    linearised: tuple[str, ...] = ()
    """Splits of queries that are scored to first order instead of exactly."""
    allow_failures: int = 0
    """Queries that may fail `TRIES` times each before the score table is refused; it then lacks them."""
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.step_size is None and not 0 < self.query_loss_rise < 10:
            raise InputError(f"query_loss_rise must be above 0, e.g. 0.02 for 2%, got {self.query_loss_rise}")
        if self.damping <= 0:
            raise InputError(f"damping must be positive, got {self.damping}")
        sizes = ("factor_examples", "query_draws", "loss_draws", "unlearning_steps", "batch_size")
        if min(getattr(self, name) for name in sizes) < 1:
            raise InputError(f"{', '.join(sizes)} must be at least 1")
        if self.captions not in {"first", "all"}:
            raise InputError(f"captions must be 'first' or 'all', got {self.captions!r}")
        if self.antithetic and self.query_draws % 2:
            raise InputError(f"antithetic draws come in pairs: query_draws must be even, got {self.query_draws}")
        if self.curvature not in {"ekfac", "diagonal"} or self.fisher not in {"empirical", "true"}:
            raise InputError(
                "curvature must be 'ekfac' or 'diagonal' and fisher 'empirical' or 'true', "
                f"got {self.curvature!r} and {self.fisher!r}"
            )
        if unknown := set(self.linearised) - set(SPLITS):
            raise InputError(f"linearised names the splits {sorted(unknown)}; there are {', '.join(SPLITS)}")


def query_gradient(
    generator: Generator,
    layers: Mapping[str, Layer],
    latent: torch.Tensor,
    conditioning: torch.Tensor,
    *,
    query_id: str,
    draws: int,
    batch_size: int,
    seed: int,
    antithetic: bool = False,
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
        antithetic: draws 2k and 2k + 1 have one timestep and opposite noise.

    Returns:
        (out, in) gradient by layer (a convolution's as `ekfac.weight_shape`), and the mean loss.
    """
    pairs = 2 if antithetic else 1
    timesteps = spread_timesteps(draws // pairs, train_timesteps=generator.train_timesteps).repeat(pairs)
    total = 0.0
    for layer in layers.values():
        layer.weight.grad = None
    for start in range(0, draws, batch_size):
        drawn = list(range(start, min(start + batch_size, draws)))
        noise = noise_for([query_id] * len(drawn), [draw // pairs for draw in drawn], seed=seed, shape=generator.latent_shape)
        if antithetic:
            noise = noise * torch.tensor([1.0 - 2 * (draw % 2) for draw in drawn])[:, None, None, None]
        noise = noise.to(generator.device)
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
        gradients[name] = gradient.flatten(1).clone()
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

    def __init__(self, layers: Mapping[str, Layer], step: Mapping[str, torch.Tensor]) -> None:
        self._layers, self._step = layers, step

    @torch.no_grad()
    def __enter__(self) -> None:
        self._kept = {name: layer.weight.detach().clone() for name, layer in self._layers.items()}
        for name, layer in self._layers.items():
            layer.weight += self._step[name].view(layer.weight.shape)

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for name, layer in self._layers.items():
            layer.weight.copy_(self._kept[name])


def influence_scores(base_loss: np.ndarray, unlearned_loss: np.ndarray) -> np.ndarray:
    """Score each candidate by how much unlearning the query hurt it.

    Args:
        base_loss: (C, V) denoising loss of each view before unlearning, mean squared error per latent element.
        unlearned_loss: (C, V) the same after unlearning, with the same noise draws.

    Returns:
        (C,) in the unit of the losses; of two views (image and mirror image) the larger rise counts. Higher is more
        influential; values may be negative.

    Raises:
        InputError: the shapes differ.

    Source: arXiv:2511.10721, sec. 3.
    """
    if base_loss.shape != unlearned_loss.shape or base_loss.ndim != 2:
        raise InputError(f"losses must share one (C, V) shape, got {base_loss.shape} and {unlearned_loss.shape}")
    rise: np.ndarray = (unlearned_loss - base_loss).max(axis=1)  # positive where unlearning the query hurt
    return rise


def factor_batches(
    generator: Generator, images: EncodedImages, config: TeacherConfig, accelerator: Accelerator | None = None
) -> Callable[[], Iterator[torch.Tensor]]:
    """What `fit_ekfac` asks for: per-example losses on random images of the corpus; each process gets its own batches."""
    rng = np.random.default_rng([config.seed, 7])
    rows = rng.choice(
        len(images.image_ids), size=config.factor_examples, replace=config.factor_examples > len(images.image_ids)
    )
    timesteps = rng.integers(0, generator.train_timesteps, size=config.factor_examples)
    views = rng.integers(0, images.views, size=config.factor_examples)
    captions = rng.integers(images.first_caption[rows], images.first_caption[rows + 1])
    index, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)

    def batches() -> Iterator[torch.Tensor]:
        starts = range(0, config.factor_examples, config.batch_size)[index::processes]
        for start in tqdm(starts, desc="EKFAC factors", unit="batch", disable=index > 0):
            part = slice(start, start + config.batch_size)
            ids = [f"factor/{position}" for position in range(config.factor_examples)[part]]
            noise, target_noise = (
                noise_for(ids, [draw] * len(ids), seed=config.seed, shape=generator.latent_shape).to(generator.device)
                for draw in (0, 1)
            )
            arguments = (
                images.latents[rows[part], views[part]].to(generator.device),
                images.conditioning[captions[part]].to(generator.device),
                torch.from_numpy(timesteps[part]).to(generator.device),
                noise,
            )
            true = config.fisher == "true"
            yield generator.sampled_loss(*arguments, target_noise) if true else generator.training_loss(*arguments)

    return batches


def run(config: TeacherConfig, run_dir: Path) -> dict[str, Any]:
    """Score every query's candidates; queries are split over the processes of `accelerate launch`.

    Returns:
        The manifest of run_dir/scores.
    """
    accelerator = Accelerator()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise InputError(
            f"{launched} processes were launched and each believes to be one of {accelerator.num_processes}; on CPUs set "
            "ACCELERATE_USE_CPU=true and launch with --multi_gpu, or launch one process."
        )
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
    images = encode_corpus(
        generator,
        corpus,
        batch_size=config.batch_size,
        folder=run_dir / "encoded" / fingerprint([generator.fingerprint, corpus.fingerprint]),
        captions=config.captions,
        mirrored=config.mirrored,
        accelerator=accelerator,
    )
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    # What the settings below determine is kept in folders named by them, so nothing stale is ever picked up.
    factors = _factors(run_dir / "ekfac", generator, images, layers, config, accelerator, corpus.fingerprint)
    base_loss = _base_loss(run_dir / "base_loss", generator, images, config, accelerator, corpus.fingerprint)
    shards = folder / f"shards-{fingerprint([inputs, {**vars(config), 'allow_failures': None}])}"
    task = _Task(generator, layers, factors, corpus, images, queries, candidates, config, accelerator, shards)
    by_first_order = [row for row, split in enumerate(queries.splits) if split in config.linearised]
    _score_exactly(task, sorted(set(range(len(queries.query_ids))) - set(by_first_order)), base_loss)
    for start in range(0, len(by_first_order), LINEARISED_QUERIES):
        _score_linearised(task, by_first_order[start : start + LINEARISED_QUERIES])
    accelerator.wait_for_everyone()
    spent = accelerator.reduce(torch.tensor(list(generator.evaluations.values()), device=accelerator.device), reduction="sum")
    evaluations = dict(zip(generator.evaluations, spent.tolist(), strict=True))  # of the run that finished
    failures = task.failures()
    accelerator.wait_for_everyone()  # all have looked before the first process removes the shards
    if len(failures) > config.allow_failures:
        table = "\n".join(f"  {query_id}  {error}" for query_id, error in failures.items())
        raise QueriesFailedError(
            f"{len(failures)} of {len(queries.query_ids)} queries failed {TRIES} times each:\n{table}\n"
            "The others are kept. Run again to try these again, or set teacher.allow_failures to go on without them."
        )
    if accelerator.is_main_process:
        for split in SPLITS:
            tables = [pq.read_table(path) for path in map(task.shard, queries.of_split(split)) if path.exists()]
            if tables:
                with atomic_path(folder / f"{split}-00000.parquet") as temporary:
                    pq.write_table(pa.concat_tables(tables), temporary)
        write_manifest(
            folder,
            stage="scores",
            config=config,
            inputs=inputs,
            teacher=_teacher_name(config, sorted(set(queries.splits))),
            corpus_fingerprint=corpus.fingerprint,
            queries_fingerprint=queries.fingerprint,
            generator_fingerprint=generator.fingerprint,
            processes=accelerator.num_processes,
            seconds=round(time.monotonic() - started, 1),
            queries=len(queries.query_ids) - len(failures),
            failures=failures,
            evaluations=evaluations,
        )
        shutil.rmtree(shards)
    accelerator.wait_for_everyone()
    done = read_json(folder / MANIFEST)
    return done


def score_query(
    generator: Generator,
    layers: Mapping[str, Layer],
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
        base_loss: (N, V) losses of the whole corpus before unlearning.
        latent: (1, L, h, w) of the query's image.
        prompt: the query's.
        query_id: fixes the noise of the query's gradient.
        candidate_rows: (C,) rows of the corpus.
        config: the teacher's settings.

    Returns:
        (C,) influence scores, higher = more influential, and the first-order relative rise of the query's loss.
    """
    step, rise = query_step(generator, layers, factors, latent=latent, prompt=prompt, query_id=query_id, config=config)

    def losses() -> np.ndarray:
        return image_losses(
            generator, images, candidate_rows, draws=config.loss_draws, batch_size=config.batch_size, seed=config.seed
        )

    with unlearned(layers, step):
        after = losses()
    if not config.symmetric:
        return influence_scores(base_loss[candidate_rows], after), rise
    with unlearned(layers, {name: -change for name, change in step.items()}):
        return influence_scores(losses() / 2, after / 2), rise


def query_step(
    generator: Generator,
    layers: Mapping[str, Layer],
    factors: Factors,
    *,
    latent: torch.Tensor,
    prompt: str,
    query_id: str,
    config: TeacherConfig,
) -> tuple[dict[str, torch.Tensor], float]:
    """The change of weights that unlearns a query, by layer, and how much it raises the query's loss to first order."""
    conditioning = generator.encode_prompt([prompt])
    total = {name: torch.zeros_like(layer.weight).flatten(1) for name, layer in layers.items()}
    total_rise = 0.0
    for _ in range(config.unlearning_steps):
        with unlearned(layers, total):
            gradients, loss = query_gradient(
                generator,
                layers,
                latent,
                conditioning,
                query_id=query_id,
                draws=config.query_draws,
                batch_size=config.batch_size,
                seed=config.seed,
                antithetic=config.antithetic,
            )
        step, rise = unlearning_step(
            gradients,
            factors,
            damping=config.damping,
            loss=loss,
            rise=config.query_loss_rise / config.unlearning_steps,
            step_size=config.step_size,
        )
        total = {name: total[name] + change for name, change in step.items()}
        total_rise += rise
    return total, total_rise


@dataclass(frozen=True)
class _Task:
    """What scoring any query of a run needs."""

    generator: Generator
    layers: Mapping[str, Layer]
    factors: Factors
    corpus: Corpus
    images: EncodedImages
    queries: Queries
    candidates: Mapping[str, tuple[list[str], np.ndarray]]
    config: TeacherConfig
    accelerator: Accelerator
    shards: Path

    def shard(self, row: int) -> Path:
        """Where the scores of query `row` are kept until all are there."""
        return self.shards / f"{self.queries.query_ids[row]}.parquet"

    def write(self, row: int, influence: np.ndarray, rise: float) -> None:
        """Keep the scores of query `row`."""
        query_id, split = self.queries.query_ids[row], self.queries.splits[row]
        image_ids, is_outsider = self.candidates[query_id]
        scored = ScoredQuery(query_id, self.queries.prompts[row], split, image_ids, influence, is_outsider, rise)
        write_shard(
            self.shard(row), [scored], teacher=_teacher_name(self.config, [split]), config=fingerprint(vars(self.config))
        )

    def failure(self, row: int) -> Path:
        """Where it is recorded that query `row` failed."""
        return self.shards / f"{self.queries.query_ids[row]}.failed.json"

    def attempt(self, row: int, work: Callable[[int], None]) -> None:
        """Do `work` for query `row`; if it fails `TRIES` times, record the error and pass on."""
        for trial in range(TRIES):
            try:
                work(row)
            except (FastattrError, RuntimeError, OSError) as error:  # RuntimeError: torch, also out of memory
                logger.warning("query %s failed (try %d of %d): %s", self.queries.query_ids[row], trial + 1, TRIES, error)
                write_json(self.failure(row), {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"})
            else:
                self.failure(row).unlink(missing_ok=True)
                return

    def failures(self) -> dict[str, str]:
        """Error by query id, of all queries that have no scores."""
        rows = [row for row in range(len(self.queries.query_ids)) if not self.shard(row).exists()]
        return {self.queries.query_ids[row]: read_json(self.failure(row))["error"] for row in rows}

    def query(self, row: int) -> dict[str, Any]:
        """The query as `query_step` takes it."""
        return {
            "latent": self.generator.encode_image([self.queries.image(row)]),
            "prompt": self.queries.prompts[row],
            "query_id": self.queries.query_ids[row],
        }


def _teacher_name(config: TeacherConfig, splits: Sequence[str]) -> str:
    """'abu_plus_exact' (EKFAC), 'abu_linearised' (diagonal) and so on; both, with a +, where the splits differ."""
    method = "abu_plus" if config.curvature == "ekfac" else "abu"
    return "+".join(sorted({f"{method}_{'linearised' if split in config.linearised else 'exact'}" for split in splits}))


def _score_exactly(task: _Task, rows: Sequence[int], base_loss: np.ndarray) -> None:
    """Score these queries one by one, split over the processes; those with a shard are done."""

    def score(row: int) -> None:
        influence, rise = score_query(
            task.generator,
            task.layers,
            task.factors,
            task.images,
            base_loss,
            **task.query(row),
            candidate_rows=task.corpus.rows(task.candidates[task.queries.query_ids[row]][0]),
            config=task.config,
        )
        task.write(row, influence, rise)

    todo = [row for row in rows if not task.shard(row).exists()]
    with task.accelerator.split_between_processes(todo) as mine:
        for row in tqdm(mine, desc="teacher", unit="query", disable=not task.accelerator.is_main_process):
            task.attempt(row, score)
    task.accelerator.wait_for_everyone()


def _score_linearised(task: _Task, rows: Sequence[int]) -> None:
    """Score these queries together: their steps, split over the processes, then their candidates in parts, split too.

    Steps and parts are kept in files until the queries have their shards, so a killed run goes on where it stood.
    """
    if all(task.shard(row).exists() for row in rows):
        return
    accelerator, config = task.accelerator, task.config
    scratch = task.shards / f"linearised-{fingerprint([task.queries.query_ids[row] for row in rows])}"
    step_files = {row: scratch / f"step-{task.queries.query_ids[row]}.safetensors" for row in rows}

    def keep_step(row: int) -> None:
        step, rise = query_step(task.generator, task.layers, task.factors, **task.query(row), config=config)
        flat = {"step": flat_step(step, list(task.layers)), "rise": np.array([rise])}
        with atomic_path(step_files[row]) as temporary:
            save_file(flat, temporary)

    with accelerator.split_between_processes([row for row in rows if not step_files[row].exists()]) as mine:
        for row in tqdm(mine, desc="query steps", unit="query", disable=not accelerator.is_main_process):
            task.attempt(row, keep_step)
    accelerator.wait_for_everyone()
    rows = [row for row in rows if step_files[row].exists()]
    if not rows:
        return
    steps = torch.from_numpy(np.stack([load_file(step_files[row])["step"] for row in rows]))
    candidate_rows = {row: task.corpus.rows(task.candidates[task.queries.query_ids[row]][0]) for row in rows}
    union = np.unique(np.concatenate(list(candidate_rows.values())))

    def scores_of(positions: range) -> np.ndarray:
        return linearised_scores(
            task.generator,
            task.layers,
            task.images,
            union[positions.start : positions.stop],
            steps,
            draws=config.loss_draws,
            batch_size=config.batch_size,
            seed=config.seed,
        ).astype(np.float32)

    folder = scratch / f"parts-{fingerprint([task.queries.query_ids[row] for row in rows])}"
    parts = in_parts(folder, len(union), PART_ROWS, scores_of, accelerator, description="linearised")
    if accelerator.is_main_process:
        scores = np.concatenate(parts, axis=1)
        for position, row in enumerate(rows):
            if task.shard(row).exists():
                continue
            influence = scores[position, np.searchsorted(union, candidate_rows[row])]
            task.write(row, influence, float(load_file(step_files[row])["rise"][0]))
    accelerator.wait_for_everyone()


def _factors(
    parent: Path,
    generator: Generator,
    images: EncodedImages,
    layers: Mapping[str, Layer],
    config: TeacherConfig,
    accelerator: Accelerator,
    corpus_fingerprint: str,
) -> Factors:
    """Fitted curvature: read if it is there, else fitted by all processes together."""
    identity = [
        generator.fingerprint,
        corpus_fingerprint,
        sorted(layers),
        config.curvature,
        config.fisher,
        config.factor_examples,
        config.captions,
        config.mirrored,
        config.batch_size,
        config.seed,
    ]
    folder = parent / fingerprint(identity)
    accelerator.wait_for_everyone()
    if not (folder / "num_lambda_processed.safetensors").exists():
        factors = fit_ekfac(
            layers,
            factor_batches(generator, images, config, accelerator),
            accelerator=accelerator,
            diagonal=config.curvature == "diagonal",
        )
        if accelerator.is_main_process:
            factors.save(folder)
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
    """(N, V) base losses of the corpus, measured in parts that are split over the processes and kept for the next run."""
    settings = [config.loss_draws, config.captions, config.mirrored, config.seed]
    folder = parent / fingerprint([generator.fingerprint, corpus_fingerprint, *settings])

    def losses(rows: range) -> np.ndarray:
        return image_losses(
            generator, images, np.array(rows), draws=config.loss_draws, batch_size=config.batch_size, seed=config.seed
        )

    parts = in_parts(folder, len(images.image_ids), PART_ROWS, losses, accelerator, description="base loss")
    return np.concatenate(parts)
