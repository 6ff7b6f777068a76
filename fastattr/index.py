"""Index: FAISS over the students' embeddings of the training images.

Inner product on unit vectors is their cosine. `factory` is any FAISS factory string; the default keeps float16
vectors and searches them exhaustively, which is exact enough and fast up to some hundred thousand images. An index may
be kept as shards, files of consecutive rows that were quantised alike, so that each can be fetched and read by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import faiss
import numpy as np

from fastattr.artifacts import atomic_path, sha256_file
from fastattr.errors import ArtifactDamagedError, InputError, MissingFileError


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Settings of the index."""

    factory: str = "SQfp16"
    """FAISS factory string: 'Flat', 'SQfp16', 'HNSW32', 'IVF4096,PQ64', ..."""
    shard_rows: int = 0
    """Rows in one index file; 0 keeps the whole index in one."""
    plain: str = "SQ4"
    """FAISS factory string of a second index, of the untuned features, for `FastAttributor.plain`; '' leaves it out."""

    def __post_init__(self) -> None:
        if self.shard_rows < 0:
            raise InputError(f"shard_rows must be at least 0, got {self.shard_rows}")


class Searchable(Protocol):
    """What `search` needs: a FAISS index, or several as one."""

    ntotal: int

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(Q, k) similarities, best first, and their (Q, k) rows."""
        ...


class Shards:
    """Shards of one index, searched as one; those that are left out are simply not found."""

    def __init__(self, shards: Sequence[tuple[faiss.Index, int]]) -> None:
        """Join them.

        Args:
            shards: each with the number of its first row.
        """
        self._shards = list(shards)
        self.ntotal = sum(index.ntotal for index, _ in self._shards)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Searchable.search`."""
        found = [(index.search(queries, min(k, index.ntotal)), first) for index, first in self._shards]
        similarities = np.concatenate([values for (values, _), _ in found], axis=1)
        rows = np.concatenate([rows + first for (_, rows), first in found], axis=1)
        best = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(similarities, best, axis=1), np.take_along_axis(rows, best, axis=1)

    def reconstruct_batch(self, rows: np.ndarray) -> np.ndarray:
        """(k, D) vectors of (k,) rows, as the shards keep them."""
        vectors = np.empty((len(rows), self._shards[0][0].d), dtype=np.float32)
        for index, first in self._shards:
            own = (rows >= first) & (rows < first + index.ntotal)
            vectors[own] = index.reconstruct_batch(rows[own] - first)
        return vectors


def build_index(embeddings: np.ndarray, factory: str) -> faiss.Index:
    """An inner-product index of (N, D) float32 unit vectors; row i has id i.

    Raises:
        InputError: FAISS does not know the factory string.
    """
    try:
        index = faiss.index_factory(embeddings.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InputError(f"FAISS does not know the index {factory!r}; try 'Flat', 'SQfp16' or 'HNSW32'.") from error
    index.train(embeddings)
    index.add(embeddings)
    return index


def split_index(embeddings: np.ndarray, config: IndexConfig) -> list[faiss.Index]:
    """The index of (N, D) float32 unit vectors as shards of `shard_rows` consecutive rows, all quantised alike.

    Raises:
        InputError: FAISS does not know the factory string.
    """
    whole = build_index(embeddings, config.factory)
    if not 0 < config.shard_rows < len(embeddings):
        return [whole]
    whole.reset()  # keeps what training found
    shards = []
    for start in range(0, len(embeddings), config.shard_rows):
        shard = faiss.clone_index(whole)
        shard.add(embeddings[start : start + config.shard_rows])
        shards.append(shard)
    return shards


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


def save_index(index: faiss.Index, path: Path) -> None:
    """Write the index, atomically."""
    with atomic_path(path) as temporary:
        faiss.write_index(index, str(temporary))


def load_index(path: Path, *, sha256: str) -> faiss.Index:
    """Read an index whose checksum is as expected; FAISS sees no byte of any other file.

    Raises:
        MissingFileError: there is no such file.
        ArtifactDamagedError: its checksum is another.
    """
    if not path.exists():
        raise MissingFileError(f"{path} does not exist; fetch or build the attributor again.")
    found = sha256_file(path)
    if found != sha256:
        raise ArtifactDamagedError(
            f"{path} has SHA-256 {found[:12]}..., expected {sha256[:12]}...; fetch it again with force_download=True."
        )
    return faiss.read_index(str(path))
