"""What the costs of a run's teacher depend on, read off a run folder; `fastattr plan` has it from the config alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastattr.corpus.store import Corpus
from fastattr.features.candidates import read_candidates
from fastattr.generators.generator import Generator
from fastattr.generators.queries import Queries
from fastattr.gradients.ekfac import factor_bytes
from fastattr.teachers.config import TeacherConfig
from fastattr.teachers.cost import Sizes


def sizes_of_run(config: TeacherConfig, run_dir: Path, generator: Generator) -> Sizes:
    """The sizes of a run folder."""
    layers = generator.modules_to_unlearn(config.pattern)
    corpus, queries = Corpus(run_dir / "corpus"), Queries(run_dir / "queries")
    candidates = read_candidates(run_dir / "candidates")
    by_split: dict[bool, list[str]] = {False: [], True: []}
    for query_id, split in zip(queries.query_ids, queries.splits, strict=True):
        by_split[split in config.linearised].append(query_id)
    exact, linearised = (tuple(len(candidates[query_id][0]) for query_id in by_split[kind]) for kind in (False, True))
    return Sizes(
        images=len(corpus),
        captions=sum(map(len, corpus.captions)) if config.captions == "all" else len(corpus),
        latent=int(np.prod(generator.latent_shape)),
        conditioning=sum(part.numel() for part in generator.encode_prompt([""]).tensors.values()),
        parameters=sum(layer.weight.numel() for layer in layers.values()),
        factors=factor_bytes(layers),
        exact=exact,
        linearised=linearised,
        union=len(set().union(*(candidates[query_id][0] for query_id in by_split[True]))),
    )
