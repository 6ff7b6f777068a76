"""Tune a search: measure what it finds of the exact neighbours, and choose the least work that reaches the recall wanted.

Recall is measured on rows of every region of the corpus, and on queries as they come (embeddings of generated images); the
recall that config.json claims is the lowest of these. Copies of a row stand for each other: any of them counts as found.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from tqdm import tqdm

from fastattr.index.files import BATCH, Read, inner_of, map_index
from fastattr.index.search import EXACT_ROWS, TUNED_K, Shards, join, nearest, set_breadth

logger = logging.getLogger(__name__)

TUNING_QUERIES = 200  # rows of the corpus that serve as queries, and at most so many queries as they come
REGIONS = 4  # consecutive parts of the corpus, of each of which the recall is reached: what was added last may be far off
MADE_QUERIES = 200  # queries of each of two sorts that are made for kinds that may fail where no row is
NPROBES = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
NEIGHBOURS = (100, 150, 200, 300, 400, 600, 800, 1200, 1600, 3200)  # breadths of a search in a graph
SHORTLISTS = (150, 200, 300, 400, 600, 800, 1200, 1600)  # and all of up to EXACT_ROWS rows: copies may fill shorter lists
READ_COST = 150  # codes that are compared in the time in which one vector is read from the disk's cache, checked and compared
Queries = np.ndarray | None  # (Q, D) embeddings of queries as they come, which are in no index
EQUAL = 1e-6  # rows whose similarities to a query differ by no more are equally near


def exact_neighbours(queries: np.ndarray, read: Read, rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Exhaustive search of a stream: (Q, k) similarities, best first, and rows."""
    starts = tqdm(range(0, rows, BATCH), desc="exhaustive search", unit="batch", disable=rows <= 4 * BATCH)
    stops = (min(start + BATCH, rows) for start in range(0, rows, BATCH))
    return nearest(queries, ((np.arange(start, stop), read(start, stop)) for start, stop in zip(starts, stops, strict=True)), k)


def recall_of(found: np.ndarray, exact: np.ndarray) -> float:
    """Share of the (Q, k) exact rows that are among the (Q, k) found."""
    hits = [len(np.intersect1d(mine, true)) for mine, true in zip(found, exact, strict=True)]
    return float(np.sum(hits) / exact.size)


@dataclass(frozen=True)
class Sample:
    """Queries whose exact neighbours are known."""

    queries: np.ndarray  # (Q, D)
    own: np.ndarray  # (Q,) the row that a query is, which does not count as its own neighbour; -1 for none
    groups: list[np.ndarray]  # (Q,) bool masks: of each the recall has to be reached
    exact: np.ndarray  # (Q, k) the nearest rows
    clear: np.ndarray  # (Q, k) bool: nearer than any row that is not listed; among the others, any equally near row would do
    least: np.ndarray  # (Q,) similarity of the k-th

    def lowest(self, hits: np.ndarray, wanted: np.ndarray) -> float:
        """The lowest recall of any group, from (Q,) hits and (Q,) rows wanted; 1 where nothing is wanted."""
        return min(float(hits[group].sum() / wanted[group].sum()) if wanted[group].any() else 1.0 for group in self.groups)


def read_rows(read: Read, rows: np.ndarray) -> np.ndarray:
    """(n, D) vectors of (n,) rows."""
    return np.concatenate([read(int(row), int(row) + 1) for row in rows])


def draw(read: Read, rows: int, *, queries: np.ndarray | None, parts: Sequence[int], made: Sequence[np.ndarray]) -> Sample:
    """Queries with their exact neighbours: rows of every region, made ones, and (Q, D) as they come; see `tune`."""
    rng = np.random.default_rng([0, 1])
    bounds = sorted({*np.linspace(0, rows, REGIONS + 1).astype(int).tolist(), *parts, rows})
    each = TUNING_QUERIES // REGIONS
    picked = [np.sort(low + rng.permutation(high - low)[:each]) for low, high in itertools.pairwise(bounds)]
    asked = [(read_rows(read, chosen), chosen) for chosen in picked]
    if queries is not None and len(queries):
        chosen = np.sort(rng.permutation(len(queries))[:TUNING_QUERIES])
        asked.append((np.asarray(queries[chosen], dtype=np.float32), np.full(len(chosen), -1)))
    asked += [(each, np.full(len(each), -1)) for each in made]
    together, own = (np.concatenate(each) for each in zip(*asked, strict=True))
    group = np.repeat(np.arange(len(asked)), [len(each) for each, _ in asked])
    k = max(min(TUNED_K, rows - 1), 1)
    similarities, found = exact_neighbours(together, read, rows, min(k + 2, rows))
    keep = np.argsort(found == own[:, None], axis=1, kind="stable")  # the row itself goes last
    similarities, found = np.take_along_axis(similarities, keep, axis=1), np.take_along_axis(found, keep, axis=1)
    following = similarities[:, k : k + 1] if rows > k + 1 else np.full((len(found), 1), -np.inf)
    groups, clear = [group == number for number in range(len(asked))], similarities[:, :k] > following + EQUAL
    return Sample(together, own, groups, found[:, :k], clear, similarities[:, k - 1])


def tune(
    folder: Path,
    settings: dict[str, Any],
    read: Read,
    rows: int,
    recall: float,
    queries: Queries = None,
    parts: Sequence[int] = (),
) -> dict[str, Any]:
    """Choose how far a search looks and how long its short list is: the least work that reaches the recall everywhere.

    Of settings it needs 'index', 'index_shards' and 'vectors', as `build` returns them; `read` gives the (rows, D) vectors;
    `recall` is of the 100 nearest; `parts` are first rows of regions whose recall is looked at besides. Returns 'search'
    ('nprobe', 'neighbours' and 'shortlist', 0 where they mean nothing), 'recall_wanted' and 'recall_of_search', the lowest.
    """
    listed, inverted = settings["index_shards"], "IVF" in settings["index"]
    shards = join([(map_index(folder / each["file"], inverted=inverted), each) for each in listed], folder / listed[0]["file"])
    sample = draw(read, rows, queries=queries, parts=parts, made=_made_queries(settings, read, rows))
    itself, k = 1, sample.exact.shape[1]
    # Exact re-ranking keeps each true neighbour that the short list has, so it need not be done to know the recall.
    ranked_again = (*SHORTLISTS, rows) if rows <= EXACT_ROWS else SHORTLISTS
    lengths = [min(length + itself, rows) for length in (ranked_again if settings["vectors"] else (k,))]
    wanted = sample.clear.sum(axis=1)
    tried: list[tuple[bool, float, float, int, int, int]] = []  # (misses, cost, -recall, ...): the least is chosen
    for nprobe, neighbours, looked_at in breadths(shards):
        if tried and not min(tried)[0] and looked_at >= min(tried)[1]:
            break  # looking farther costs more than the best settings do in all
        set_breadth(shards, nprobe=nprobe, neighbours=neighbours)
        _, short = shards.search(sample.queries, lengths[-1])
        places = np.stack([_places(mine, true) for mine, true in zip(short, sample.exact, strict=True)])  # of each true one
        for length in lengths:
            reached = sample.lowest(((places < length) & sample.clear).sum(axis=1), wanted)
            misses = reached < min(recall + 0.01, 1.0)  # a little more, since other queries are a little harder
            cost = round(-reached, 2) if misses else looked_at + (length * READ_COST if settings["vectors"] else 0)
            tried.append((misses, cost, -reached, nprobe, neighbours, length - itself))
    _, _, _, nprobe, neighbours, length = min(tried)
    set_breadth(shards, nprobe=nprobe, neighbours=neighbours)
    found = shards.search(sample.queries, min(length + itself, rows))[1]
    measured = sample.lowest(np.minimum(hits(sample, found, read, rows), k), np.full(len(found), k))
    measured = min(measured, reached_by_graph(shards, sample.queries[:: max(len(sample.queries) // 8, 1)]))
    if measured < recall:
        logger.warning("the search finds %.1f%% of the 100 nearest, wanted %.1f%%", 100 * measured, 100 * recall)
    search = {"nprobe": nprobe, "neighbours": neighbours, "shortlist": length if settings["vectors"] else 0}
    return {"search": search, "recall_wanted": recall, "recall_of_search": measured}


def _made_queries(settings: dict[str, Any], read: Read, rows: int) -> list[np.ndarray]:
    """Queries unlike any row: between four rows, where a graph may have no way, and in any direction, which PCA may drop."""
    if "IVF" in settings["index"] or ("HNSW" not in settings["index"] and not settings["vectors"]):
        return []  # all rows are compared, as they are, or lists would be looked at where no query comes
    rng = np.random.default_rng([0, 2])
    between = read_rows(read, rng.integers(rows, size=4 * MADE_QUERIES)).reshape(MADE_QUERIES, 4, -1).sum(axis=1)
    made = (between, rng.standard_normal(between.shape, dtype=np.float32))
    return [each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-9) for each in made]


def reached_by_graph(shards: Shards, queries: np.ndarray) -> float:
    """Lowest share of the rows that a query can reach at all: the links of many equal rows lead to each other only."""
    if not isinstance(inner_of(shards.shards[0][0]), faiss.IndexHNSW):
        return 1.0
    found = np.concatenate([shards.search(query[None], shards.ntotal, widen=shards.widest)[1] for query in queries])
    return float((found >= 0).mean(axis=1).min())


def breadths(shards: Shards) -> Iterator[tuple[int, int, float]]:
    """How far searches may look, ever farther: lists, neighbours in a graph, and rows that are compared."""
    inner = [inner_of(index) for index, _ in shards.shards]
    if isinstance(inner[0], faiss.IndexIVF):
        lists = min(each.nlist for each in inner)
        for nprobe in [n for n in NPROBES if n < lists] + [lists]:
            yield nprobe, 0, nprobe * shards.ntotal / lists
    elif isinstance(inner[0], faiss.IndexHNSW):
        most = max(each.ntotal for each in inner)
        for neighbours in sorted({min(n, most) for n in NEIGHBOURS}):
            yield 0, neighbours, float(neighbours)
    else:
        yield 0, 0, float(shards.ntotal)


def hits(sample: Sample, found: np.ndarray, read: Read, rows: int) -> np.ndarray:
    """(Q,) how many of (Q, S) found rows are among the k nearest of each query, or as near as the k-th; -1 is no row."""
    others = (found >= 0) & (found != sample.own[:, None])
    near = np.stack([np.isin(mine, true) for mine, true in zip(found, sample.exact, strict=True)]) & others
    unclear = np.flatnonzero(~sample.clear.all(axis=1))
    for start in range(0, rows, BATCH) if len(unclear) else []:
        values = sample.queries[unclear] @ read(start, min(start + BATCH, rows)).T
        inside = (found[unclear] >= start) & (found[unclear] < start + values.shape[1])
        mine = np.take_along_axis(values, np.where(inside, found[unclear] - start, 0), axis=1)
        near[unclear] |= inside & others[unclear] & (mine >= sample.least[unclear, None] - EQUAL)
    return near.sum(axis=1)


def _places(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each of (k,) wanted rows stands in a (S,) list; S for those that are not there."""
    order = np.argsort(found, kind="stable")
    at = np.minimum(np.searchsorted(found[order], wanted), len(found) - 1)
    return np.where(found[order][at] == wanted, order[at], len(found))
