"""Search an index: shards as one, a short list ranked again from exact vectors.

Inner product on unit vectors is their cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np

from fastattr.core.errors import ArtifactDamagedError, InputError
from fastattr.index.choose import inner_of, is_inverted
from fastattr.index.files import load_index, map_index
from fastattr.index.vectors import Vectors

TUNED_K = 100
"""The search's settings are chosen for the recall of so many neighbours."""


class Searchable(Protocol):
    """What `search` needs: a FAISS index, or several as one."""

    ntotal: int

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(Q, k) similarities, best first, and their (Q, k) rows."""
        ...


class Shards:
    """Shards of one index, searched as one; those that are left out are simply not found."""

    def __init__(self, shards: Sequence[tuple[faiss.Index, int]], *, ranges: Sequence[tuple[int, int]] | None = None) -> None:
        """Join them.

        Args:
            shards: each with the number to add to its rows.
            ranges: first row and number of rows of each, where that is not the same.
        """
        self.shards = list(shards)
        self.ranges = list(ranges) if ranges is not None else [(first, index.ntotal) for index, first in self.shards]
        """First row and number of rows of what is there."""
        self.kept: Any = None
        self.ntotal = sum(index.ntotal for index, _ in self.shards)

    def search(self, queries: np.ndarray, k: int, *, widen: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """See `Searchable.search`; what is not found has the row -1 and comes last.

        Args:
            queries: (Q, D) float32.
            k: how many.
            widen: look at so many times as many lists, or neighbours, as usual.
        """
        found = []
        for index, first in self.shards:
            values, rows = index.search(queries, min(k, index.ntotal), params=_parameters(index, k, widen))
            found.append((np.where(rows < 0, -np.inf, values), np.where(rows < 0, -1, rows + first)))
        similarities, rows = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        if len(found) > 1:
            best = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
            similarities, rows = np.take_along_axis(similarities, best, axis=1), np.take_along_axis(rows, best, axis=1)
        return similarities, rows

    @property
    def widest(self) -> int:
        """From this `widen` on, every list is looked at."""
        ivf = [faiss.extract_index_ivf(index) for index, _ in self.shards if is_inverted(index)]
        return max((math.ceil(each.nlist / each.nprobe) for each in ivf), default=1)

    def reconstruct(self, start: int, stop: int) -> np.ndarray:
        """The vectors of consecutive rows as the index keeps them, (stop - start, D) float32."""
        parts = []
        for index, first in self.shards:
            low, high = max(start - first, 0), min(stop - first, index.ntotal)
            if low < high:
                parts.append(index.reconstruct_n(low, high - low))
        return np.concatenate(parts)

    def reconstruct_batch(self, rows: np.ndarray) -> np.ndarray:
        """(k, D) vectors of (k,) rows, as the shards keep them."""
        vectors = np.empty((len(rows), self.shards[0][0].d), dtype=np.float32)
        for index, first in self.shards:
            own = (rows >= first) & (rows < first + index.ntotal)
            vectors[own] = index.reconstruct_batch(rows[own] - first)
        return vectors


def join(loaded: Sequence[tuple[faiss.Index, dict[str, Any]]], first: Path) -> Shards:
    """Shards as one; inverted files with the same lists become one index, so that lists are chosen once.

    Args:
        loaded: each with what `add_shards` says of it.
        first: the file of the first.
    """
    if len(loaded) == 1 or not all(listed.get("own_ids") for _, listed in loaded):
        return Shards([(index, 0 if listed.get("own_ids") else int(listed["first_row"])) for index, listed in loaded])
    lists = faiss.InvertedListsPtrVector()  # type: ignore[attr-defined]
    for index, _ in loaded:
        lists.push_back(faiss.extract_index_ivf(index).invlists)
    stacked = faiss.HStackInvertedLists(lists.size(), lists.data())
    whole = map_index(first, inverted=True)
    faiss.extract_index_ivf(whole).replace_invlists(stacked, False)
    faiss.extract_index_ivf(whole).ntotal = whole.ntotal = sum(index.ntotal for index, _ in loaded)
    joined = Shards([(whole, 0)], ranges=[(int(listed["first_row"]), int(listed["rows"])) for _, listed in loaded])
    joined.kept = (stacked, loaded)  # FAISS only points to them
    return joined


def _parameters(index: faiss.Index, k: int, widen: int) -> Any:
    """How wide to search; None for an exhaustive index."""
    inner = inner_of(index)
    parameters: Any = None
    if isinstance(inner, faiss.IndexIVF):
        wider = {"nprobe": min(inner.nprobe * widen, inner.nlist)}
        parameters = faiss.SearchParametersIVF(**wider)
    elif isinstance(inner, faiss.IndexHNSW):
        parameters = faiss.SearchParametersHNSW(efSearch=max(inner.hnsw.efSearch, 2 * k))  # type: ignore[attr-defined]
    if parameters is not None and inner is not index:
        return faiss.SearchParametersPreTransform(index_params=parameters)  # type: ignore[call-arg]
    return parameters


class Ranked:
    """An index, and the vectors that rank its short lists again if it has them."""

    def __init__(self, index: Shards, vectors: Vectors | None = None, *, shortlist: int = 0) -> None:
        """Join them.

        Args:
            index: N rows.
            vectors: of the same rows.
            shortlist: how many rows are ranked again for each 100 that are wanted.
        """
        self.index, self.vectors, self.ntotal = index, vectors, index.ntotal
        self._shortlist = shortlist

    def search(self, queries: np.ndarray, k: int, *, widen: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """As `Shards.search`; `widen` also lengthens the short list."""
        if self.vectors is None:
            return self.index.search(queries, k, widen=widen)
        length = math.ceil(max(k, TUNED_K) * self._shortlist / TUNED_K)
        _, short = self.index.search(queries, min(max(length, k), self.ntotal), widen=widen)
        return rerank(queries, short, self.vectors.take, k)

    @property
    def reads_rows(self) -> bool:
        """Whether single rows can be read: from the vectors, or from an index that keeps them in order."""
        return self.vectors is not None or not any(is_inverted(index) for index, _ in self.index.shards)

    def similarities(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(Q, n) exact similarities of chosen rows."""
        values: np.ndarray = queries @ self.take(rows).T
        return values

    def read(self, start: int, stop: int) -> np.ndarray:
        """The best vectors there are of consecutive rows, (stop - start, D) float32."""
        return self.vectors.take(np.arange(start, stop)) if self.vectors else self.index.reconstruct(start, stop)

    @property
    def dim(self) -> int:
        """D."""
        return int(self.vectors.dim if self.vectors else self.index.shards[0][0].d)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The best vectors there are of chosen rows, (n, D) float32; only if `reads_rows`."""
        return self.vectors.take(rows) if self.vectors else self.index.reconstruct_batch(rows)


def rerank(
    queries: np.ndarray, short: np.ndarray, take: Callable[[np.ndarray], np.ndarray], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of each query's short list by exact similarity.

    Args:
        queries: (Q, D) float32.
        short: (Q, S) rows, -1 where there is none.
        take: gives the vectors of rows.
        k: how many.

    Returns:
        (Q, min(k, S)) similarities, best first, -inf where there is none, and rows.
    """
    similarities = np.full(short.shape, -np.inf, dtype=np.float32)
    for query, rows, values in zip(queries, short, similarities, strict=True):
        known = rows >= 0
        values[known] = take(rows[known]) @ query
    best = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarities, best, axis=1), np.take_along_axis(short, best, axis=1)


def open_ranked(folder: Path, settings: dict[str, Any], sha256: dict[str, str], numbers: Iterable[int] | None = None) -> Ranked:
    """Open a built index.

    Args:
        folder: with its files.
        settings: 'index_shards', 'vectors' and 'search', as `build` returns them.
        sha256: checksums by file.
        numbers: which shards, counted from 0; None for all.

    Raises:
        MissingFileError: a file is missing.
        ArtifactDamagedError: a file is not the one that was written.
    """
    listed = settings["index_shards"]
    chosen = [listed[number] for number in (range(len(listed)) if numbers is None else sorted(set(numbers)))]
    wide = settings.get("search") or {}
    loaded = []
    for shard in chosen:
        index = load_index(folder / shard["file"], sha256=sha256[shard["file"]], inverted="IVF" in settings["index"])
        if "rows" in shard and index.ntotal != shard["rows"]:
            raise ArtifactDamagedError(f"{folder / shard['file']} holds {index.ntotal} rows, expected {shard['rows']}.")
        loaded.append((index, shard))
    shards = join(loaded, folder / chosen[0]["file"])
    for index, _ in shards.shards:
        if is_inverted(index) and wide.get("nprobe"):
            faiss.extract_index_ivf(index).nprobe = int(wide["nprobe"])
    stored = settings.get("vectors")
    vectors = Vectors(folder, stored, digests_sha256=sha256[stored["digests"]]) if stored else None
    return Ranked(shards, vectors, shortlist=int(wide.get("shortlist") or TUNED_K))


def search(index: Searchable, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of each query, best first.

    Args:
        index: N unit vectors.
        queries: (Q, D) float32 unit vectors.
        k: 1 to N.

    Returns:
        (Q, k) rows and (Q, k) cosine similarities.

    Raises:
        InputError: k is outside 1 to N.
    """
    if not 1 <= k <= index.ntotal:
        raise InputError(f"top-k must be between 1 and {index.ntotal} (the images in the corpus), got {k}.")
    similarities, rows = index.search(np.ascontiguousarray(queries, dtype=np.float32), k)
    return rows, similarities


def stored_vectors(index: Searchable, rows: np.ndarray) -> np.ndarray | None:
    """(k, D) float32 vectors of (k,) rows as the index keeps them; None if it is of a kind that cannot give them back."""
    try:
        vectors: np.ndarray = index.reconstruct_batch(np.ascontiguousarray(rows, dtype=np.int64))  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return None
    return vectors
