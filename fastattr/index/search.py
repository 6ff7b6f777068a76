"""Search an index: shards as one, chosen rows left out by FAISS itself, a short list ranked again from exact vectors.

Inner product on unit vectors is their cosine. Rows are counted over the whole index, whichever shards are there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from fastattr.core.errors import ArtifactDamagedError, InputError
from fastattr.index.files import BATCH, Vectors, cause, inner_of, is_inverted, load_index, map_index

TUNED_K = 100  # the search's settings are chosen for the recall of so many neighbours
EXACT_ROWS = 10_000  # if no more rows than this may be found, all of them are compared
SETTLED = 1e-3
"""A search that finds no more than this, in the mean similarity of the last row wanted, by looking twice as far is done."""


class Shards:
    """Shards of one index, searched as one; those that are left out are simply not found."""

    def __init__(self, shards: Sequence[tuple[faiss.Index, int]], *, ranges: Sequence[tuple[int, int]] | None = None) -> None:
        """Join indexes, each with the number to add to its rows; `ranges` are theirs where they have ids of their own."""
        self.shards = list(shards)
        self.ranges = list(ranges or [(first, index.ntotal) for index, first in self.shards])  # first row, number of rows
        self.kept: Any = None
        self.ntotal = sum(index.ntotal for index, _ in self.shards)

    def search(
        self, queries: np.ndarray, k: int, *, allowed: np.ndarray | None = None, widen: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """(Q, k) similarities and rows, best first, -1 for none, of `widen` times as many lists or neighbours as usual."""
        found = []
        for index, first in self.shards:
            own = allowed if allowed is None or is_inverted(index) else allowed[first : first + index.ntotal]
            with _faiss_refusals():
                values, rows = _search_one(index, queries, min(k, index.ntotal), own, widen)
            found.append((np.where(rows < 0, -np.inf, values), np.where(rows < 0, -1, rows + first)))
        similarities, rows = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        return best(similarities, rows, k) if len(found) > 1 else (similarities, rows)

    @property
    def widest(self) -> int:
        """From this `widen` on, every list is looked at, or every neighbour followed."""
        factors = [1]
        for index, _ in self.shards:
            inner = inner_of(index)
            if isinstance(inner, faiss.IndexIVF):
                factors.append(math.ceil(inner.nlist / max(inner.nprobe, 1)))
            elif isinstance(inner, faiss.IndexHNSW):
                factors.append(math.ceil(inner.ntotal / max(inner.hnsw.efSearch, 1)))
        return max(factors)

    def reconstruct(self, start: int, stop: int) -> np.ndarray:
        """The vectors of consecutive rows as the index keeps them, (stop - start, D) float32."""
        parts = []
        for index, first in self.shards:
            low, high = max(start - first, 0), min(stop - first, index.ntotal)
            if low < high:
                with _faiss_refusals():
                    parts.append(index.reconstruct_n(low, high - low))
        return np.concatenate(parts)

    def reconstruct_batch(self, rows: np.ndarray) -> np.ndarray:
        """(k, D) vectors of (k,) rows, as the shards keep them."""
        vectors = np.empty((len(rows), self.shards[0][0].d), dtype=np.float32)
        for index, first in self.shards:
            own = (rows >= first) & (rows < first + index.ntotal)
            with _faiss_refusals():
                vectors[own] = index.reconstruct_batch(rows[own] - first)
        return vectors


@contextlib.contextmanager
def _faiss_refusals() -> Iterator[None]:
    """Say what FAISS's refusal to use an index means."""
    try:
        yield
    except RuntimeError as error:
        raise ArtifactDamagedError(f"FAISS can't use the index ({cause(error)}); fetch the attributor again.") from error


def join(loaded: Sequence[tuple[faiss.Index, dict[str, Any]]], first: Path) -> Shards:
    """Shards, each with its settings, as one; inverted files become one index, so that lists are chosen once."""
    ranges = [(int(listed["first_row"]), int(listed.get("rows", index.ntotal))) for index, listed in loaded]
    if len(loaded) == 1 or not all(is_inverted(index) for index, _ in loaded):
        starts = [0 if is_inverted(index) else first_row for (index, _), (first_row, _) in zip(loaded, ranges, strict=True)]
        return Shards([(index, start) for (index, _), start in zip(loaded, starts, strict=True)], ranges=ranges)
    lists = faiss.InvertedListsPtrVector()  # type: ignore[attr-defined]
    for index, _ in loaded:
        lists.push_back(faiss.extract_index_ivf(index).invlists)
    stacked = faiss.HStackInvertedLists(lists.size(), lists.data())
    whole = map_index(first, inverted=True)
    faiss.extract_index_ivf(whole).replace_invlists(stacked, False)
    faiss.extract_index_ivf(whole).ntotal = whole.ntotal = sum(index.ntotal for index, _ in loaded)
    joined = Shards([(whole, 0)], ranges=ranges)
    joined.kept = (stacked, loaded)  # FAISS only points to them
    return joined


def _search_one(
    index: faiss.Index, queries: np.ndarray, k: int, allowed: np.ndarray | None, widen: int
) -> tuple[np.ndarray, np.ndarray]:
    if allowed is None or not isinstance(inner_of(index), faiss.IndexPQ):
        return index.search(queries, k, params=_parameters(index, k, allowed, widen))
    # The one kind that FAISS can't make leave out rows; it compares all of them anyway.
    values, rows = index.search(queries, min(k + int((~allowed).sum()), index.ntotal))
    values = np.where(allowed[rows], values, -np.inf)
    values, rows = best(values, rows, k)
    return values, np.where(np.isneginf(values), -1, rows)


def _parameters(index: faiss.Index, k: int, allowed: np.ndarray | None, widen: int) -> Any:
    """How wide to search, and what may be found."""
    inner: Any = inner_of(index)
    library: Any = faiss  # its types name few members
    chosen = {} if allowed is None else {"sel": library.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))}
    if isinstance(inner, faiss.IndexPQ):
        return None
    if isinstance(inner, faiss.IndexIVF):
        parameters = library.SearchParametersIVF(nprobe=min(max(inner.nprobe, 1) * widen, inner.nlist), **chosen)
    elif isinstance(inner, faiss.IndexHNSW):
        breadth = min(max(inner.hnsw.efSearch, k) * widen, max(inner.ntotal, 1))
        parameters = library.SearchParametersHNSW(efSearch=breadth, **chosen)
    else:
        parameters = library.SearchParameters(**chosen)
    return library.SearchParametersPreTransform(index_params=parameters) if inner is not index else parameters


class Ranked:
    """An index, and the vectors that rank its short lists again if it has them."""

    def __init__(self, index: Shards, vectors: Vectors | None = None, *, shortlist: int = 0) -> None:
        """N rows, the vectors of the same rows, and how many rows are ranked again for each 100 that are wanted."""
        self.index, self.vectors, self.ntotal = index, vectors, index.ntotal
        self._shortlist, self.dim = shortlist, int(vectors.dim if vectors else index.shards[0][0].d)

    def search(self, queries: np.ndarray, k: int, *, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(Q, n) similarities and rows most similar to (Q, D) float32 unit vectors, best first, however far it has to look.

        n is k, or as many rows as may be found: those of missing shards never are, and (N,) bool `allowed` may leave out more.
        Raises InputError for a query that is not finite, ArtifactDamagedError if the index lacks rows, or is not finite.
        """
        require_finite_queries(queries)
        similarities, rows = self._search(queries, k, allowed)
        if not np.isfinite(similarities).all():
            raise ArtifactDamagedError("the index holds values that are not finite; fetch or build the attributor again.")
        return similarities, rows

    def _search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        count = self.ntotal if allowed is None else sum(int(allowed[first : first + n].sum()) for first, n in self.index.ranges)
        wanted = min(k, count)
        if wanted < 1:
            return np.zeros((len(queries), 0), dtype=np.float32), np.zeros((len(queries), 0), dtype=np.int64)
        if count == self.ntotal:
            allowed = None
        all_ranked_again = self.vectors is not None and self._shortlist >= self.ntotal - 1
        if count <= EXACT_ROWS and self.reads_rows and (allowed is not None or all_ranked_again):
            return self._compare_all(queries, wanted, allowed)
        # Of more neighbours, or among fewer rows, each is farther away than the hundredth of all.
        widest = self.index.widest
        widen = min(math.ceil(math.sqrt(wanted * self.ntotal / count / TUNED_K)), widest)
        # Few rows may lie in other lists than those nearest to the query: then look farther until it changes little.
        settled = count >= self.ntotal / 2
        least = -math.inf
        while True:
            similarities, rows = self.find(queries, wanted, allowed=allowed, widen=widen)
            complete, before, least = bool((rows >= 0).all()), least, float(similarities[:, -1].mean())
            if complete and (settled or widen >= widest or least - before < SETTLED):
                return similarities, rows
            if widen >= widest:
                break
            widen *= 2
        if not self.reads_rows:
            raise ArtifactDamagedError("the index finds fewer rows than it holds; build the attributor again.")
        return self._compare_all(queries, wanted, allowed)  # a graph whose parts no link joins

    def find(
        self, queries: np.ndarray, k: int, *, allowed: np.ndarray | None = None, widen: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, but looks as far as `widen` says and no farther; what is not found has the row -1 and comes last."""
        if self.vectors is None:
            return self.index.search(queries, k, allowed=allowed, widen=widen)
        length = math.ceil(max(k, TUNED_K) * self._shortlist / TUNED_K)
        _, short = self.index.search(queries, min(max(length, k), self.ntotal), allowed=allowed, widen=widen)
        return rerank(queries, short, self.vectors.take, k)

    def _compare_all(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The k most similar of all rows that may be found, by comparing every one."""
        there = np.concatenate([np.arange(first, first + rows) for first, rows in self.index.ranges])
        chosen = there if allowed is None else there[allowed[there]]
        blocks = (chosen[start : start + BATCH] for start in range(0, len(chosen), BATCH))
        return nearest(queries, ((rows, self.take(rows)) for rows in blocks), k)

    @property
    def reads_rows(self) -> bool:
        """Whether single rows can be read: from the vectors, or from an index that keeps them in order."""
        return self.vectors is not None or not any(is_inverted(index) for index, _ in self.index.shards)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The best vectors there are of consecutive rows, (stop - start, D) float32."""
        return self.vectors.take(np.arange(start, stop)) if self.vectors else self.index.reconstruct(start, stop)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The best vectors there are of chosen rows, (n, D) float32; only if `reads_rows`."""
        return self.vectors.take(rows) if self.vectors else self.index.reconstruct_batch(rows)


def require_finite_queries(queries: np.ndarray) -> None:
    """Raise InputError for (Q, D) embeddings of queries that overflowed on their way: nothing is similar to them."""
    wrong = np.flatnonzero(~np.isfinite(queries).all(axis=1))
    if len(wrong):
        raise InputError(f"the embedding of query {wrong[0]} is not finite: its features are too large, or not finite.")


def nearest(queries: np.ndarray, blocks: Iterable[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """(Q, k) similarities, best first, and rows: the nearest of blocks of (n,) rows and (n, D) vectors, all compared."""
    similarities = np.full((len(queries), 0), -np.inf, dtype=np.float32)
    rows = np.zeros((len(queries), 0), dtype=np.int64)
    for numbers, vectors in blocks:
        with np.errstate(invalid="ignore", over="ignore"):  # of a damaged index, which is noticed by its similarities
            values = queries @ vectors.T
        top = np.argpartition(-values, min(k, values.shape[1]) - 1, axis=1)[:, :k]
        values = np.concatenate([similarities, np.take_along_axis(values, top, axis=1)], axis=1)
        similarities, rows = best(values, np.concatenate([rows, numbers[top]], axis=1), k)
    return similarities, rows


def rerank(
    queries: np.ndarray, short: np.ndarray, take: Callable[[np.ndarray], np.ndarray], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """(Q, min(k, S)) similarities, best first, and rows of each (Q, S) short list, exactly; a row of -1 is none."""
    similarities = np.full(short.shape, -np.inf, dtype=np.float32)
    for query, rows, values in zip(queries, short, similarities, strict=True):
        known = rows >= 0
        with np.errstate(invalid="ignore", over="ignore"):
            values[known] = take(rows[known]) @ query
    return best(similarities, short, k)


def best(similarities: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k highest of each query, best first."""
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarities, order, axis=1), np.take_along_axis(rows, order, axis=1)


def open_ranked(folder: Path, settings: dict[str, Any], sha256: dict[str, str], numbers: Iterable[int] | None = None) -> Ranked:
    """Open an index as `build` describes it, or the shards with these numbers; MissingFileError or ArtifactDamagedError."""
    listed = settings["index_shards"]
    chosen = listed if numbers is None else [listed[number] for number in sorted(set(numbers))]
    loaded = []
    for shard in chosen:
        index = load_index(folder / shard["file"], sha256=sha256[shard["file"]], inverted="IVF" in settings["index"])
        if "rows" in shard and index.ntotal != shard["rows"]:
            raise ArtifactDamagedError(f"{folder / shard['file']} holds {index.ntotal} rows, expected {shard['rows']}.")
        loaded.append((index, shard))
    shards = join(loaded, folder / chosen[0]["file"])
    wide = settings.get("search") or {}
    set_breadth(shards, nprobe=int(wide.get("nprobe") or 0), neighbours=int(wide.get("neighbours") or 0))
    stored = settings.get("vectors")
    vectors = Vectors(folder, stored, digests_sha256=sha256[stored["digests"]]) if stored else None
    return Ranked(shards, vectors, shortlist=int(wide.get("shortlist") or TUNED_K))


def set_breadth(shards: Shards, *, nprobe: int = 0, neighbours: int = 0) -> None:
    """How many lists, or neighbours in a graph, a search looks at; 0 leaves what the file says."""
    for index, _ in shards.shards:
        inner = inner_of(index)
        if isinstance(inner, faiss.IndexIVF) and nprobe:
            inner.nprobe = nprobe
        elif isinstance(inner, faiss.IndexHNSW) and neighbours:
            inner.hnsw.efSearch = neighbours
