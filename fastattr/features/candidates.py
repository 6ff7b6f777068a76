"""Candidates: the training images that the teacher scores for each query (arXiv:2511.10721, sec. 4, two-stage curation).

A set holds the nearest neighbours in features, an equal part by each encoder, and random outsiders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastattr.core.errors import InputError
from fastattr.core.files import atomic_path
from fastattr.core.settings import at_least
from fastattr.core.stages import make, open_stage
from fastattr.corpus.store import Corpus
from fastattr.features.store import check_source, features_fingerprint, folders, read_features
from fastattr.generators.queries import Queries


@dataclass(frozen=True, kw_only=True)
class CandidatesConfig:
    """Size and make-up of a candidate set."""

    per_query: int = 1000  # C, images in each set
    outsider_share: float = 0.1  # part of the set drawn at random from the rest of the corpus (10% in the paper)
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, 1, "per_query")
        if not 0 <= self.outsider_share < 1:
            raise InputError(f"outsider_share must be in [0, 1), got {self.outsider_share}")


def choose_candidates(
    similarities: Sequence[np.ndarray], *, size: int, outsiders: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One query's candidate set, C = `size` of N images: (C,) rows and (C,) bool, true for outsiders, which `rng` draws.
    `similarities` has one (N,) array per encoder, higher = closer to the query. Neighbours come first: the encoders take turns,
    each adding its nearest image not yet chosen.
    """
    neighbours = size - outsiders
    orders = [np.argsort(-values, kind="stable")[: neighbours * len(similarities)] for values in similarities]
    turns = np.stack(orders, axis=1).ravel()
    _, first = np.unique(turns, return_index=True)
    chosen = turns[np.sort(first)][:neighbours]
    rest = np.setdiff1d(np.arange(len(similarities[0])), chosen)
    drawn = rng.choice(rest, size=size - len(chosen), replace=False)
    return np.concatenate([chosen, drawn]), np.arange(size) >= len(chosen)


def run(config: CandidatesConfig, run_dir: Path, *, encoders: Sequence[str]) -> dict[str, Any]:
    """Choose the candidates of every query; returns the manifest."""
    corpus, queries = Corpus(run_dir / "corpus"), Queries(run_dir / "queries")
    if config.per_query > len(corpus):
        raise InputError(f"per_query is {config.per_query}, but the corpus has {len(corpus)} images; ask for at most that.")
    corpus_folders, query_folders = folders(run_dir, "features", encoders), folders(run_dir, "query_features", encoders)
    for paths, source in ((corpus_folders, corpus), (query_folders, queries)):
        for path in paths:
            check_source(path, source.fingerprint)
    inputs = {"features": features_fingerprint(corpus_folders), "query_features": features_fingerprint(query_folders)}

    def choose() -> list[tuple[np.ndarray, np.ndarray]]:
        similarities = [
            read_features([ours], queries.query_ids) @ read_features([theirs], corpus.image_ids).T
            for ours, theirs in zip(query_folders, corpus_folders, strict=True)
        ]
        outsiders = round(config.per_query * config.outsider_share)
        drawn = [np.random.default_rng([config.seed, query]) for query in range(len(queries.query_ids))]
        of_query = zip(drawn, zip(*similarities, strict=True), strict=True)
        return [choose_candidates(values, size=config.per_query, outsiders=outsiders, rng=rng) for rng, values in of_query]

    settings: dict[str, Any] = {"config": config, "inputs": inputs, "encoders": list(encoders)}
    return write_candidates(run_dir / "candidates", corpus, queries, choose, **settings)


def write_candidates(
    folder: Path,
    corpus: Corpus,
    queries: Queries,
    choose: Callable[[], Sequence[tuple[np.ndarray, np.ndarray]]],
    *,
    config: Any,
    inputs: Mapping[str, str],
    **facts: Any,
) -> dict[str, Any]:
    """Write a candidates folder unless it is finished; `choose` gives each query's (C,) rows of the corpus and is_outsider."""

    def work() -> dict[str, Any]:
        rows = [
            {"query_id": query_id, "image_ids": [corpus.image_ids[row] for row in rows], "is_outsider": is_outsider.tolist()}
            for query_id, (rows, is_outsider) in zip(queries.query_ids, choose(), strict=True)
        ]
        with atomic_path(folder / "data.parquet") as temporary:
            pq.write_table(pa.Table.from_pylist(rows), temporary)
        return {"corpus_fingerprint": corpus.fingerprint, "queries_fingerprint": queries.fingerprint, **facts}

    return make(folder, work, stage="candidates", config=config, inputs=inputs)


def read_candidates(folder: Path) -> dict[str, tuple[list[str], np.ndarray]]:
    """query_id -> (C image ids, (C,) is_outsider)."""
    open_stage(folder, "candidates")
    table = pq.read_table(folder / "data.parquet").to_pylist()
    return {row["query_id"]: (row["image_ids"], np.array(row["is_outsider"], dtype=bool)) for row in table}
