"""Teacher: find the training images that suffer when the model unlearns a query.

One EKFAC-preconditioned step raises the query's denoising loss; each candidate's loss is then measured before and
after, with noise drawn per image id so that the two are comparable. The loss before is measured once for the whole
corpus. The weights are restored bit for bit after each query. Splits named in `TeacherConfig.linearised` are scored to
first order instead (fastattr/teachers/linearised.py), for all their queries in one backward pass over the candidates.

Baselines (TRAK, D-TRAK, similarity) score the same candidates into the same table.

Reads corpus/, generator/, queries/, candidates/; writes encoded/, ekfac/ (factors), base_loss/, gradients/ (stored
gradients, where the settings ask for them) and scores/ (one shard a query while it runs, so a killed run resumes).
Source: arXiv:2511.10721, sec. 3 (AbU+). Where we differ from the paper: docs/differences.md.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from fastattr.core.errors import FastattrError, InputError, QueriesFailedError
from fastattr.core.files import (
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
from fastattr.core.processes import in_parts, peak_memory, split_between
from fastattr.corpus.store import Corpus
from fastattr.features.candidates import read_candidates
from fastattr.features.store import check_source, folders, read_features
from fastattr.generators.conditioning import Conditioning
from fastattr.generators.generator import CROSS_ATTENTION_KV, Generator, noise_for
from fastattr.generators.queries import SPLITS, Queries
from fastattr.gradients.denoising import EncodedImages, encode_corpus, image_losses
from fastattr.gradients.ekfac import MADE_OF, Factors, Layer, fit_ekfac
from fastattr.gradients.gradient_features import (
    Compression,
    GradientConfig,
    gradient_features,
    leading_coordinates,
    write_gradient_features,
)
from fastattr.teachers.baselines import kernel_scores, similarity_scores
from fastattr.teachers.linearised import flat_step, linearised_scores
from fastattr.teachers.scores import ScoredQuery, write_shard
from fastattr.teachers.unlearning import influence_scores, query_gradient, unlearned, unlearning_step

logger = logging.getLogger(__name__)

PART_ROWS = 512
"""Training images whose base losses or linearised scores go into one file; a killed run loses at most one part."""
ENCODED_ROWS = 128
"""Training images that are encoded at once, whatever the settings, so that all find what is kept of them."""
TRIES = 3
"""How often a failing query is tried before it is passed over."""
METHODS = ("unlearning", "trak", "d-trak", "similarity")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Settings of the teacher: AbU+ unless `method` or `curvature` say otherwise."""

    method: str = "unlearning"
    """'unlearning', or a baseline: 'trak' (arXiv:2303.14186), 'd-trak' (arXiv:2311.00500), 'similarity'."""
    pattern: str = CROSS_ATTENTION_KV
    """Layers of the denoiser to unlearn, as a regular expression on their names; the default stands for what suits the
    generator: see `Generator.modules_to_unlearn`."""
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
    factors: str = ""
    """A folder of factor files to use (ours or kronfluence's) instead of fitting; ours are checked to be of this corpus."""
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
    gradients: str = "auto"
    """How first-order scores are computed: 'contracted' holds all queries' steps in memory while the corpus passes by, in
    as many passes as they need; 'stored' keeps `gradient_width` numbers of each image's gradient, which serve later
    queries too; 'auto' contracts where one pass is enough, and stores otherwise."""
    gradient_width: int = 16_384
    """k, numbers kept of an image's gradient where gradients are stored (half precision): the leading coordinates, or a
    sketch for TRAK and D-TRAK; 0 keeps every coordinate."""
    memory_gb: float = 4.0
    """Memory for the steps of the queries that share one pass."""
    ridge: float = 0.1
    """Of TRAK and D-TRAK, as a fraction of the kernel's mean eigenvalue."""
    similarity_features: tuple[str, ...] = ()
    """Encoders of the features stage whose features, side by side, 'similarity' compares."""
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
        if self.method not in METHODS or (self.method == "similarity") != bool(self.similarity_features):
            raise InputError(
                f"method must be one of {', '.join(METHODS)}, and 'similarity' alone needs similarity_features; "
                f"got {self.method!r} with {list(self.similarity_features)}"
            )
        if self.gradients not in {"auto", "contracted", "stored"} or self.memory_gb <= 0 or self.ridge <= 0:
            raise InputError("gradients must be 'auto', 'contracted' or 'stored'; memory_gb and ridge must be positive")
        if self.gradients == "stored" and self.mirrored:
            raise InputError("stored gradients serve one view: with mirrored, set gradients to 'contracted'")
        if unknown := set(self.linearised) - set(SPLITS):
            raise InputError(f"linearised names the splits {sorted(unknown)}; there are {', '.join(SPLITS)}")


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
    candidate_rows = {query_id: corpus.rows(ids) for query_id, (ids, _) in candidates.items()}  # refuses unknown ids
    generator = Generator.from_pretrained(run_dir / "generator", device=accelerator.device)
    layers = generator.modules_to_unlearn(config.pattern)
    folder = run_dir / "scores"
    inputs = {"candidates": manifest["fingerprint"], "generator": generator.fingerprint}
    made_of = {"generator": generator.fingerprint, "corpus": corpus.fingerprint}
    given = Factors.load(Path(config.factors), layers, made_of=made_of) if config.factors else None
    if given:
        inputs["factors"] = given.fingerprint
    if finished(folder, stage="scores", config=config, inputs=inputs):
        done: dict[str, Any] = read_json(folder / MANIFEST)
        return done
    started = time.monotonic()
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    shards = folder / f"shards-{fingerprint([inputs, {**vars(config), 'allow_failures': None}])}"
    task = _Task(generator, layers, corpus, queries, candidates, candidate_rows, given, config, accelerator, run_dir, shards)
    if config.method == "unlearning":
        _score_by_unlearning(task)
    elif config.method == "similarity":
        _score_by_similarity(task)
    else:
        _score_by_kernel(task)
    accelerator.wait_for_everyone()
    spent = accelerator.reduce(torch.tensor(list(generator.evaluations.values()), device=accelerator.device), reduction="sum")
    evaluations = dict(zip(generator.evaluations, spent.tolist(), strict=True))  # of the run that finished
    peaks = accelerator.gather(torch.tensor([peak_memory()], device=accelerator.device))
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
            seconds_by_part=task.seconds,
            queries=len(queries.query_ids) - len(failures),
            failures=failures,
            evaluations=evaluations,
            peak_memory=int(peaks.max()),
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
    corpus: Corpus
    queries: Queries
    candidates: Mapping[str, tuple[list[str], np.ndarray]]
    candidate_rows: Mapping[str, np.ndarray]
    given_factors: Factors | None
    config: TeacherConfig
    accelerator: Accelerator
    run_dir: Path
    shards: Path
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of the parts of the work, of the run that finished."""

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the time until its end to `seconds[part]`."""
        started = time.monotonic()
        yield
        self.seconds[part] = round(self.seconds.get(part, 0.0) + time.monotonic() - started, 2)

    def encode_corpus(self) -> EncodedImages:
        """The corpus as the denoiser sees it; kept for the next run."""
        with self.timed("encode"):
            return encode_corpus(
                self.generator,
                self.corpus,
                batch_size=ENCODED_ROWS,
                folder=self.run_dir / "encoded" / fingerprint([self.generator.fingerprint, self.corpus.fingerprint]),
                captions=self.config.captions,
                mirrored=self.config.mirrored,
                accelerator=self.accelerator,
            )

    def rows_of(self, row: int) -> np.ndarray:
        """(C,) rows in the corpus of the candidates of query `row`."""
        return self.candidate_rows[self.queries.query_ids[row]]

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

    def attempt_all(self, rows: Sequence[int], work: Callable[[int], None], *, description: str) -> None:
        """`attempt` these queries, split over the processes; those with a shard are done."""
        todo = [row for row in rows if not self.shard(row).exists()]
        with self.timed(description), split_between(self.accelerator, todo) as mine:
            for row in tqdm(mine, desc=description, unit="query", disable=not self.accelerator.is_main_process):
                self.attempt(row, work)

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
    if config.method != "unlearning":
        return config.method.replace("-", "_")
    method = "abu_plus" if config.curvature == "ekfac" else "abu"
    return "+".join(sorted({f"{method}_{'linearised' if split in config.linearised else 'exact'}" for split in splits}))


def stores_gradients(config: TeacherConfig, *, queries: int, parameters: int) -> bool:
    """Whether first-order scores of `queries` queries on `parameters` unlearned weights are taken from stored gradients."""
    if config.gradients == "auto":
        return not config.mirrored and queries > queries_a_pass(config, parameters)
    return config.gradients == "stored"


def queries_a_pass(config: TeacherConfig, parameters: int) -> int:
    """Queries whose steps, float32, fit into `config.memory_gb` together."""
    return max(1, int(config.memory_gb * 1e9 / (4 * parameters)))


def _score_by_unlearning(task: _Task) -> None:
    """AbU+ or AbU: the splits in `linearised` to first order, the others exactly."""
    config, splits = task.config, task.queries.splits
    images = task.encode_corpus()
    # What the settings below determine is kept in folders named by them, so nothing stale is ever picked up.
    with task.timed("factors"):
        factors = _factors(task, images)
    by_first_order = [row for row, split in enumerate(splits) if split in config.linearised]
    if exact := [row for row, split in enumerate(splits) if split not in config.linearised]:
        _score_exactly(task, images, factors, exact)
    parameters = sum(layer.weight.numel() for layer in task.layers.values())
    if by_first_order and stores_gradients(config, queries=len(by_first_order), parameters=parameters):
        _score_from_store(task, images, factors, by_first_order)
    else:
        size = queries_a_pass(config, parameters)
        for start in range(0, len(by_first_order), size):
            _score_linearised(task, images, factors, by_first_order[start : start + size])


def _score_exactly(task: _Task, images: EncodedImages, factors: Factors, rows: Sequence[int]) -> None:
    """Score these queries one by one, split over the processes; those with a shard are done."""
    with task.timed("base loss"):
        base_loss = _base_loss(task, images)

    def score(row: int) -> None:
        influence, rise = score_query(
            task.generator,
            task.layers,
            factors,
            images,
            base_loss,
            **task.query(row),
            candidate_rows=task.rows_of(row),
            config=task.config,
        )
        task.write(row, influence, rise)

    task.attempt_all(rows, score, description="teacher")


def _score_linearised(task: _Task, images: EncodedImages, factors: Factors, rows: Sequence[int]) -> None:
    """Score these queries together: their steps, split over the processes, then their candidates in parts, split too.

    Steps and parts are kept in files until the queries have their shards, so a killed run goes on where it stood.
    """
    if all(task.shard(row).exists() for row in rows):
        return
    accelerator, config = task.accelerator, task.config
    scratch = task.shards / f"linearised-{fingerprint([task.queries.query_ids[row] for row in rows])}"
    step_files = {row: scratch / f"step-{task.queries.query_ids[row]}.safetensors" for row in rows}

    def keep_step(row: int) -> None:
        step, rise = query_step(task.generator, task.layers, factors, **task.query(row), config=config)
        flat = {"step": flat_step(step, list(task.layers)), "rise": np.array([rise])}
        with atomic_path(step_files[row]) as temporary:
            save_file(flat, temporary)

    task.attempt_all([row for row in rows if not step_files[row].exists()], keep_step, description="query steps")
    rows = [row for row in rows if step_files[row].exists()]
    if not rows:
        return
    steps = torch.empty(len(rows), sum(layer.weight.numel() for layer in task.layers.values()))
    for position, row in enumerate(rows):
        steps[position] = torch.from_numpy(load_file(step_files[row])["step"])
    union = np.unique(np.concatenate([task.rows_of(row) for row in rows]))

    def scores_of(positions: range) -> np.ndarray:
        scores = linearised_scores(
            task.generator,
            task.layers,
            images,
            union[positions.start : positions.stop],
            steps,
            draws=config.loss_draws,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        return scores.T.astype(np.float32)

    folder = scratch / f"parts-{fingerprint([task.queries.query_ids[row] for row in rows])}"
    with task.timed("linearised pass"):
        scores = in_parts(folder, len(union), PART_ROWS, scores_of, accelerator, description="linearised")
    if accelerator.is_main_process:
        for position, row in enumerate(rows):
            if task.shard(row).exists():
                continue
            influence = scores[np.searchsorted(union, task.rows_of(row)), position]
            task.write(row, influence, float(load_file(step_files[row])["rise"][0]))
    accelerator.wait_for_everyone()


def _score_from_store(task: _Task, images: EncodedImages, factors: Factors, rows: Sequence[int]) -> None:
    """Score these queries to first order from stored whitened gradients: one inner product an image."""
    if all(task.shard(row).exists() for row in rows):
        return
    config = task.config
    settings = _gradient_config(config, output="loss", whiten=True)
    store, scale, compression = _stored_gradients(task, images, settings, factors)

    def score(row: int) -> None:
        step, rise = query_step(task.generator, task.layers, factors, **task.query(row), config=config)
        influence = store[task.rows_of(row)].astype(np.float32) @ (compression.of_step(step).cpu().numpy() / scale)
        task.write(row, influence, rise)

    task.attempt_all(rows, score, description="teacher")


def _score_by_kernel(task: _Task) -> None:
    """TRAK and D-TRAK: projected gradients of training images and queries, and a ridge-regularised kernel."""
    config = task.config
    images = task.encode_corpus()
    settings = _gradient_config(config, output="loss" if config.method == "trak" else "squared_norm", whiten=False)
    store, scale, compression = _stored_gradients(task, images, settings, None)
    ids = task.queries.query_ids
    encoded = [task.query(row) for row in range(len(ids))]
    queries = EncodedImages(
        ids,
        torch.stack([query["latent"] for query in encoded]),
        Conditioning.concatenated([task.generator.encode_prompt([query["prompt"]]) for query in encoded]),
        np.arange(len(ids) + 1),
    )

    def features_of(rows: range) -> np.ndarray:
        drawn = replace(settings, draws=config.query_draws)
        return gradient_features(task.generator, task.layers, queries, np.array(rows), compression, drawn)

    features = in_parts(task.shards / "features", len(ids), 1, features_of, task.accelerator, description="query gradients")
    if task.accelerator.is_main_process:
        scores = kernel_scores(features, store.astype(np.float32) / scale, ridge=config.ridge)
        for row in range(len(ids)):
            task.write(row, scores[row, task.rows_of(row)], 0.0)
    task.accelerator.wait_for_everyone()


def _score_by_similarity(task: _Task) -> None:
    """Cosine similarity of the features that `similarity_features` names, side by side."""

    def features_of(name: str, source: str, ids: Sequence[str]) -> np.ndarray:
        found = folders(task.run_dir, name, task.config.similarity_features)
        for path in found:
            check_source(path, source)
        return read_features(found, ids)

    if task.accelerator.is_main_process:
        corpus = features_of("features", task.corpus.fingerprint, task.corpus.image_ids)
        queries = features_of("query_features", task.queries.fingerprint, task.queries.query_ids)
        for row in range(len(queries)):
            task.write(row, similarity_scores(queries[[row]], corpus[task.rows_of(row)])[0], 0.0)
    task.accelerator.wait_for_everyone()


def _gradient_config(config: TeacherConfig, *, output: str, whiten: bool) -> GradientConfig:
    """The gradient features that these settings of the teacher ask for."""
    return GradientConfig(
        output=output,
        whiten=whiten,
        damping=config.damping,
        width=config.gradient_width,
        draws=config.loss_draws,
        batch_size=config.batch_size,
        seed=config.seed,
    )


def _stored_gradients(
    task: _Task, images: EncodedImages, settings: GradientConfig, factors: Factors | None
) -> tuple[np.ndarray, float, Compression]:
    """(N, k) half-precision gradient features of the corpus, memory-mapped, the factor on them, and their compression."""
    inputs = {"source": task.corpus.fingerprint, "layers": fingerprint(sorted(task.layers))}
    inputs |= {"views": str(images.views), "captions": task.config.captions}
    if factors is not None:
        inputs["factors"] = factors.fingerprint
    folder = task.run_dir / "gradients" / fingerprint([task.generator.fingerprint, inputs, vars(settings)])
    coordinates, kept = None, folder / "coordinates.npy"
    with task.timed("gradient store"):
        if factors is not None and settings.width:
            if task.accelerator.is_main_process and not kept.exists():
                with atomic_path(kept) as temporary:
                    np.save(temporary, leading_coordinates(task.generator, task.layers, images, factors, settings))
            task.accelerator.wait_for_everyone()
            coordinates = np.load(kept)
        compression = Compression(task.layers, settings, factors, coordinates)
        manifest = write_gradient_features(
            folder, task.generator, task.layers, images, compression, settings, task.accelerator, inputs=inputs
        )
    return np.load(folder / "features.npy", mmap_mode="r"), manifest["scale"], compression


def _factors(task: _Task, images: EncodedImages) -> Factors:
    """Curvature: the user's, one fitted earlier, or one fitted now by all processes together."""
    if task.given_factors:
        return task.given_factors
    config, accelerator = task.config, task.accelerator
    made_of = {"generator": task.generator.fingerprint, "corpus": task.corpus.fingerprint}
    settings = ("curvature", "fisher", "factor_examples", "captions", "mirrored", "batch_size", "seed")
    identity = [made_of, sorted(task.layers), [getattr(config, name) for name in settings]]
    folder = task.run_dir / "ekfac" / fingerprint(identity)
    accelerator.wait_for_everyone()
    if not (folder / MADE_OF).exists():
        factors = fit_ekfac(
            task.layers,
            factor_batches(task.generator, images, config, accelerator),
            accelerator=accelerator,
            diagonal=config.curvature == "diagonal",
        )
        if accelerator.is_main_process:
            factors.save(folder, made_of=made_of)
    accelerator.wait_for_everyone()
    return Factors.load(folder, task.layers, made_of=made_of)


def _base_loss(task: _Task, images: EncodedImages) -> np.ndarray:
    """(N, V) base losses of the corpus, measured in parts that are split over the processes and kept for the next run."""
    config = task.config
    settings = [config.loss_draws, config.captions, config.mirrored, config.seed]
    folder = task.run_dir / "base_loss" / fingerprint([task.generator.fingerprint, task.corpus.fingerprint, *settings])

    def losses(rows: range) -> np.ndarray:
        return image_losses(
            task.generator, images, np.array(rows), draws=config.loss_draws, batch_size=config.batch_size, seed=config.seed
        )

    return in_parts(folder, len(images.image_ids), PART_ROWS, losses, task.accelerator, description="base loss")
