"""The stage `teach`: score every query's candidates by the method that the config names, into one table.

Reads corpus/, generator/, queries/, candidates/ (and the features that 'similarity' compares); writes encoded/, ekfac/
(factors), base_loss/, gradients/ (stored gradients, where the settings ask for them) and scores/ (one shard a query while it
runs, so a killed run resumes). One function a method takes a task to its shards: `SCORED_BY`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from safetensors.numpy import load_file, save_file

from fastattr.core.errors import InputError, QueriesFailedError
from fastattr.core.files import atomic_path
from fastattr.core.processes import in_parts, peak_memory
from fastattr.core.stages import fingerprint, make, open_stage, require_same
from fastattr.corpus.store import Corpus
from fastattr.features.candidates import read_candidates
from fastattr.features.store import check_source, folders, read_features
from fastattr.generators.families import Conditioning
from fastattr.generators.generator import Generator
from fastattr.generators.queries import SPLITS, Queries
from fastattr.gradients.compression import gradient_features
from fastattr.gradients.ekfac import Factors
from fastattr.gradients.losses import EncodedImages
from fastattr.teachers.config import KERNELS, TeacherConfig, queries_a_pass, stores_gradients, teacher_name
from fastattr.teachers.kernels import averaged, kernel_scores, read_retrained, retraining_scores, similarity_scores
from fastattr.teachers.scores import read_shard
from fastattr.teachers.task import PART_ROWS, TRIES, Task, layers_to_unlearn
from fastattr.teachers.unlearning import GaussNewton, exact_scores, flat_step, linearised_scores


def score_by_unlearning(task: Task) -> None:
    """AbU+ or AbU: some splits to first order, the others exactly."""
    config, splits = task.config, task.queries.splits
    images = task.encode_corpus()
    factors, matrix = task.factors(images), task.curved(images)
    by_first_order = [row for row, split in enumerate(splits) if config.is_linearised(split)]
    if exact := [row for row, split in enumerate(splits) if not config.is_linearised(split)]:
        with task.timed("base loss"):
            base_loss = task.base_loss(images)

        def score(row: int) -> None:
            step, rise = task.step(row, factors, matrix)
            measured: dict[str, Any] = {"candidate_rows": task.rows_of(row), "config": config}
            task.write(row, exact_scores(task.generator, task.layers, images, base_loss, step, **measured), rise)

        task.attempt_all(exact, score, description="teacher")
    parameters = sum(layer.weight.numel() for layer in task.layers.values())
    stored = stores_gradients(config, queries=len(by_first_order), parameters=parameters)
    size = len(by_first_order) if stored else queries_a_pass(config, parameters)
    score_some = _score_from_store if stored else _score_linearised
    for start in range(0, len(by_first_order), size or 1):
        rows = by_first_order[start : start + size]
        if not all(task.shard(row).exists() for row in rows):
            score_some(task, images, factors, matrix, rows)


def _score_linearised(
    task: Task, images: EncodedImages, factors: Factors, matrix: GaussNewton | None, rows: Sequence[int]
) -> None:
    """Score these queries together: their steps, split over the processes, then their candidates in parts, split too.

    Steps and parts are kept in files until the queries have their shards, so a killed run goes on where it stood.
    """
    config, ids = task.config, task.queries.query_ids
    scratch = task.shards / f"linearised-{fingerprint([ids[row] for row in rows])}"
    step_files = {row: scratch / f"step-{ids[row]}.safetensors" for row in rows}

    def keep_step(row: int) -> None:
        step, rise = task.step(row, factors, matrix)
        with atomic_path(step_files[row]) as temporary:
            save_file({"step": flat_step(step, list(task.layers)), "rise": np.array([rise])}, temporary)

    task.attempt_all([row for row in rows if not step_files[row].exists()], keep_step, description="query steps")
    rows = [row for row in rows if step_files[row].exists()]
    if not rows:
        return
    steps = torch.empty(len(rows), sum(layer.weight.numel() for layer in task.layers.values()))
    for position, row in enumerate(rows):
        steps[position] = torch.from_numpy(load_file(step_files[row])["step"])
    union = np.unique(np.concatenate([task.rows_of(row) for row in rows]))

    def scores_of(positions: range) -> np.ndarray:
        some = union[positions.start : positions.stop]
        return linearised_scores(task.generator, task.layers, images, some, steps, **config.measured).T.astype(np.float32)

    folder = scratch / f"parts-{fingerprint([ids[row] for row in rows])}"
    with task.timed("linearised pass"):
        scores = in_parts(folder, len(union), PART_ROWS, scores_of, task.accelerator, description="linearised")
    if task.accelerator.is_main_process:
        for position, row in enumerate(rows):
            if not task.shard(row).exists():
                influence = scores[np.searchsorted(union, task.rows_of(row)), position]
                task.write(row, influence, float(load_file(step_files[row])["rise"][0]))
    task.accelerator.wait_for_everyone()


def _score_from_store(
    task: Task, images: EncodedImages, factors: Factors, matrix: GaussNewton | None, rows: Sequence[int]
) -> None:
    """Score these queries to first order from stored whitened gradients: one inner product an image."""
    store, scale, compression = task.stored_gradients(images, task.config.gradients_of("first-order"), factors)

    def score(row: int) -> None:
        step, rise = task.step(row, factors, matrix)
        short = compression.of_step(step).cpu().numpy() / scale
        task.write(row, store[task.rows_of(row)].astype(np.float32) @ short, rise)

    task.attempt_all(rows, score, description="teacher")


def score_by_kernel(task: Task) -> None:
    """TRAK and D-TRAK: gradients of training images and queries, and a ridge-regularised kernel."""
    config, ids = task.config, task.queries.query_ids
    images, settings = task.encode_corpus(), config.gradients_of(config.method)
    store, scale, compression = task.stored_gradients(images, settings, task.factors(images) if settings.whiten else None)
    latents = torch.stack([task.query(row)["latent"] for row in range(len(ids))])
    told = [task.generator.encode_prompt([prompt]) for prompt in task.queries.prompts]
    queries = EncodedImages(ids, latents, Conditioning.concatenated(told), np.arange(len(ids) + 1))
    drawn = replace(settings, draws=config.query_draws, antithetic=config.antithetic)

    def features_of(rows: range) -> np.ndarray:
        return gradient_features(task.generator, task.layers, queries, np.array(rows), compression, drawn)

    features = in_parts(task.shards / "features", len(ids), 1, features_of, task.accelerator, description="query gradients")
    if task.accelerator.is_main_process:
        scores = kernel_scores(features, store.astype(np.float32) / scale, ridge=config.ridge)
        for row in range(len(ids)):
            task.write(row, scores[row, task.rows_of(row)], 0.0)
    task.accelerator.wait_for_everyone()


def score_by_similarity(task: Task) -> None:
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


SCORED_BY: dict[str, Callable[[Task], None]] = {"unlearning": score_by_unlearning, "first-order": score_by_unlearning}
SCORED_BY |= {**dict.fromkeys(KERNELS, score_by_kernel), "similarity": score_by_similarity}
"""What scores a run's queries, by method; 'averaged' is the mean of some."""


def score(task: Task) -> None:
    """Score all queries of a task; where it is a mean, every member on every model, then the mean, then what corrects it."""
    members = task.members()
    if len(members) == 1 and task.config.method != "retraining":
        SCORED_BY[task.config.method](task)
        return
    for member in members:
        SCORED_BY[member.config.method](member)
    task.accelerator.wait_for_everyone()
    correct = _corrections(task, members) if task.config.retrained else lambda _, mean: mean

    def write(row: int) -> None:
        mean, rise = _mean(task, members, row)
        task.write(row, correct(row, mean), rise)

    task.attempt_all(range(len(task.queries.query_ids)), write, description="mean of teachers")


def _mean(task: Task, members: Sequence[Task], row: int) -> tuple[np.ndarray, float]:
    """(C,) mean of the members' scores of query `row`, each standardised, and of the rises of its loss."""
    missing = [member for member in members if not member.shard(row).exists()]
    if missing:
        raise QueriesFailedError(f"{missing[0].config.method}: {missing[0].failures()[task.queries.query_ids[row]]}")
    tables = [read_shard(member.shard(row)) for member in members]
    mean = averaged(*(table.influence[None] for table in tables))[0]
    return mean, float(np.mean([table.query_loss_rise for table in tables]))


def _corrections(task: Task, members: Sequence[Task]) -> Callable[[int, np.ndarray], np.ndarray]:
    """What retraining makes of a mean: (row, (C,) scores) -> (C,) scores. An image that is no candidate has the prior 0."""
    ids = task.queries.query_ids
    rows = [row for row in range(len(ids)) if all(member.shard(row).exists() for member in members)]
    prior = np.zeros((len(rows), len(task.corpus)))
    for place, row in enumerate(rows):
        prior[place, task.rows_of(row)] = _mean(task, members, row)[0]
    retrained = read_retrained(Path(task.config.retrained), task.corpus.image_ids, [ids[row] for row in rows])
    corrected, _ = retraining_scores(prior, retrained)
    return lambda row, _: corrected[rows.index(row), task.rows_of(row)]


def run(config: TeacherConfig, run_dir: Path) -> dict[str, Any]:
    """Score every query's candidates on all processes of `accelerate launch`; returns the manifest of run_dir/scores.

    Raises:
        ArtifactMismatchError: the stages of the run folder do not belong together.
        InputError: a query has no candidates, or the launched processes do not know of each other.
        QueriesFailedError: more queries failed than the settings allow.
    """
    accelerator = _joined_processes()
    corpus, queries = Corpus(run_dir / "corpus"), Queries(run_dir / "queries")
    candidates, candidates_fingerprint = _candidates(run_dir, corpus, queries)
    candidate_rows = {query_id: corpus.rows(ids) for query_id, (ids, _) in candidates.items()}  # refuses unknown ids
    generator = Generator.from_pretrained(run_dir / "generator", device=accelerator.device)
    layers = layers_to_unlearn(generator, config.pattern)
    models = tuple(Generator.from_pretrained(name, device=accelerator.device) for name in config.models)
    folder = run_dir / "scores"
    inputs = {"candidates": candidates_fingerprint, "generator": generator.fingerprint}
    made_of = {"generator": generator.fingerprint, "corpus": corpus.fingerprint}
    given = Factors.load(Path(config.factors), layers, made_of=made_of) if config.factors else None
    inputs |= {"factors": given.fingerprint} if given else {}
    inputs |= {"models": fingerprint([model.fingerprint for model in models])} if models else {}
    shards = folder / f"shards-{fingerprint([inputs, {**vars(config), 'allow_failures': None}])}"
    task = Task(
        generator, layers, corpus, queries, candidates, candidate_rows, given, config, accelerator, run_dir, shards, models
    )

    def work() -> dict[str, Any]:
        started = time.monotonic()
        score(task)
        return {**_write_table(task, folder), "seconds": round(time.monotonic() - started, 1)}

    return make(folder, work, stage="scores", config=config, inputs=inputs, accelerator=accelerator, temporary=[shards])


def _joined_processes() -> Accelerator:
    """The processes of `accelerate launch`; InputError if each believes to be the only one."""
    accelerator = Accelerator()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        found = f"{launched} processes were launched and each believes to be one of {accelerator.num_processes}"
        fix = "on CPUs set ACCELERATE_USE_CPU=true and launch with --multi_gpu, or launch one process"
        raise InputError(f"{found}; {fix}.")
    return accelerator


def _candidates(run_dir: Path, corpus: Corpus, queries: Queries) -> tuple[dict[str, tuple[list[str], np.ndarray]], str]:
    """The candidates of every query, of this corpus and these queries, and the stage's fingerprint."""
    manifest = open_stage(run_dir / "candidates", "candidates")
    for what, found in (("corpus", corpus.fingerprint), ("queries", queries.fingerprint)):
        require_same(f"the {what} of candidates/", manifest[f"{what}_fingerprint"], found, "Run `fastattr candidates` again.")
    candidates = read_candidates(run_dir / "candidates")
    empty = [query_id for query_id in queries.query_ids if not candidates.get(query_id, ([], None))[0]]
    if empty:
        raise InputError(f"{len(empty)} queries have no candidates, e.g. {empty[:3]}; run `fastattr candidates` again.")
    return candidates, manifest["fingerprint"]


def _write_table(task: Task, folder: Path) -> dict[str, Any]:
    """Join the shards of all processes into the score table, unless too many queries failed; returns the manifest's facts."""
    accelerator, config, queries, generator = task.accelerator, task.config, task.queries, task.generator
    accelerator.wait_for_everyone()
    counts = accelerator.reduce(torch.tensor(list(generator.evaluations.values()), device=accelerator.device), reduction="sum")
    evaluations = dict(zip(generator.evaluations, counts.tolist(), strict=True))  # of the run that finished
    peaks = accelerator.gather(torch.tensor([peak_memory()], device=accelerator.device))
    failures = task.failures()
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
    made_of: dict[str, Any] = {"corpus": task.corpus, "queries": queries, "generator": generator}
    spent = {"processes": accelerator.num_processes, "seconds_by_part": task.seconds, "peak_memory": int(peaks.max())}
    return {
        "teacher": teacher_name(config, sorted(set(queries.splits))),
        **{f"{name}_fingerprint": stage.fingerprint for name, stage in made_of.items()},
        **spent,
        "queries": len(queries.query_ids) - len(failures),
        "failures": failures,
        "evaluations": evaluations,
    }
