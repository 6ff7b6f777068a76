"""The stage `teach`: score every query's candidates by the method that the config names, into one table.

Reads corpus/, generator/, queries/, candidates/ (and the features that 'similarity' compares); writes encoded/, ekfac/
(factors), base_loss/, gradients/ (stored gradients, where the settings ask for them) and scores/ (one shard a query while
it runs, so a killed run resumes). The methods are in fastattr/teachers/methods.py.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator

from fastattr.core.errors import InputError, QueriesFailedError
from fastattr.core.files import atomic_path
from fastattr.core.processes import peak_memory
from fastattr.core.stages import fingerprint, make, open_stage, require_same
from fastattr.corpus.store import Corpus
from fastattr.features.candidates import read_candidates
from fastattr.generators.generator import Generator
from fastattr.generators.queries import SPLITS, Queries
from fastattr.gradients.ekfac import Factors
from fastattr.teachers.config import TeacherConfig, teacher_name
from fastattr.teachers.methods import score
from fastattr.teachers.task import TRIES, Task, layers_to_unlearn


def run(config: TeacherConfig, run_dir: Path) -> dict[str, Any]:
    """Score every query's candidates; queries are split over the processes of `accelerate launch`.

    Returns:
        The manifest of run_dir/scores.

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
        raise InputError(
            f"{launched} processes were launched and each believes to be one of {accelerator.num_processes}; on CPUs set "
            "ACCELERATE_USE_CPU=true and launch with --multi_gpu, or launch one process."
        )
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
    spent = accelerator.reduce(torch.tensor(list(generator.evaluations.values()), device=accelerator.device), reduction="sum")
    evaluations = dict(zip(generator.evaluations, spent.tolist(), strict=True))  # of the run that finished
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
    return {
        "teacher": teacher_name(config, sorted(set(queries.splits))),
        "corpus_fingerprint": task.corpus.fingerprint,
        "queries_fingerprint": queries.fingerprint,
        "generator_fingerprint": generator.fingerprint,
        "processes": accelerator.num_processes,
        "seconds_by_part": task.seconds,
        "queries": len(queries.query_ids) - len(failures),
        "failures": failures,
        "evaluations": evaluations,
        "peak_memory": int(peaks.max()),
    }
