"""Tune a search: measure what it finds of the exact neighbours, and choose the least work that reaches the recall wanted."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from tqdm import tqdm

from fastattr.index.files import map_index
from fastattr.index.search import TUNED_K, join
from fastattr.index.vectors import BATCH, Read

logger = logging.getLogger(__name__)

TUNING_QUERIES = 200
NPROBES = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
READ_COST = 150
"""Codes that are compared in the time in which one vector is read from the disk's cache, checked and compared."""
SHORTLISTS = (150, 200, 300, 400, 600, 800, 1200, 1600)


def exact_neighbours(queries: np.ndarray, read: Read, rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Exhaustive search of a stream: (Q, k) similarities, best first, and rows."""
    best = np.full((len(queries), 0), -np.inf, dtype=np.float32)
    found = np.zeros((len(queries), 0), dtype=np.int64)
    for start in tqdm(range(0, rows, BATCH), desc="exhaustive search", unit="batch", disable=rows <= 4 * BATCH):
        values = queries @ read(start, min(start + BATCH, rows)).T
        top = np.argpartition(-values, min(k, values.shape[1]) - 1, axis=1)[:, :k]
        best = np.concatenate([best, np.take_along_axis(values, top, axis=1)], axis=1)
        found = np.concatenate([found, top + start], axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :k]
        best, found = np.take_along_axis(best, order, axis=1), np.take_along_axis(found, order, axis=1)
    return best, found


def recall_of(found: np.ndarray, exact: np.ndarray) -> float:
    """Share of the (Q, k) exact rows that are among the (Q, k) found."""
    hits = [len(np.intersect1d(mine, true)) for mine, true in zip(found, exact, strict=True)]
    return float(np.sum(hits) / exact.size)


def tune(
    folder: Path,
    settings: dict[str, Any],
    read: Read,
    rows: int,
    *,
    recall: float,
    seed: int,
    queries: np.ndarray | None = None,
) -> dict[str, Any]:
    """Choose how many lists to look at and how long the short list is, the least work that reaches the recall.

    Args:
        folder: with the index.
        settings: 'index_shards' and 'vectors', as `build` returns them.
        read: gives the vectors.
        rows: N.
        recall: of the 100 nearest, wanted.
        seed: of the rows that serve as queries, where none are given; they themselves don't count as found.
        queries: (Q, D) vectors that are not in the index.

    Returns:
        'search' ('nprobe' and 'shortlist', 0 where they mean nothing) and 'recall_of_search', measured; 1 if exhaustive.
    """
    inverted = "IVF" in settings["index"]
    if not inverted and settings["vectors"] is None:
        return {"search": {"nprobe": 0, "shortlist": 0}, "recall_of_search": 1.0}
    listed = settings["index_shards"]
    shards = join([(map_index(folder / each["file"], inverted=inverted), each) for each in listed], folder / listed[0]["file"])
    own = np.zeros((0, 1), dtype=np.int64)
    if queries is None:
        own = np.sort(np.random.default_rng([seed, 1]).permutation(rows)[:TUNING_QUERIES])[:, None]
        queries = np.concatenate([read(int(row), int(row) + 1) for row in own[:, 0]])
    itself = min(len(own), 1)
    k = max(min(TUNED_K, rows - itself), 1)
    _, exact = exact_neighbours(queries, read, rows, min(k + itself, rows))
    wanted = (exact != own) if itself else np.ones(exact.shape, dtype=bool)
    # Exact re-ranking keeps each true neighbour that the short list has, so it need not be done to know the recall.
    lengths = [min(length + itself, rows) for length in (SHORTLISTS if settings["vectors"] else (k,))]
    lists = min((faiss.extract_index_ivf(index).nlist for index, _ in shards.shards), default=0) if inverted else 0
    tried: list[tuple[bool, float, float, int, int]] = []  # (misses, cost, -recall, lists, short list): the least is chosen
    for nprobe in [n for n in NPROBES if n < lists] + [lists]:
        scanned = nprobe * rows / lists if lists else 0.0
        if tried and not min(tried)[0] and scanned >= min(tried)[1]:
            break  # more lists cost more than the best settings do in all
        for index, _ in shards.shards if inverted else []:
            faiss.extract_index_ivf(index).nprobe = nprobe
        _, short = shards.search(queries, lengths[-1])
        places = np.stack([_places(mine, true) for mine, true in zip(short, exact, strict=True)])  # (Q, k), of each true one
        for length in lengths:
            reached = float(((places < length) & wanted).sum() / wanted.sum())
            misses = reached < min(recall + 0.01, 1.0)  # a little more, since other queries are a little harder
            cost = round(-reached, 2) if misses else scanned + (length * READ_COST if settings["vectors"] else 0)
            tried.append((misses, cost, -reached, nprobe, length - itself))
    _, _, reached, nprobe, length = min(tried)
    if -reached < recall:
        logger.warning("the search finds %.1f%% of the 100 nearest, wanted %.1f%%", -100 * reached, 100 * recall)
    return {"search": {"nprobe": nprobe, "shortlist": length}, "recall_of_search": -reached}


def _places(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each of (k,) wanted rows stands in a (S,) list; S for those that are not there."""
    order = np.argsort(found, kind="stable")
    at = np.minimum(np.searchsorted(found[order], wanted), len(found) - 1)
    return np.where(found[order][at] == wanted, order[at], len(found))
