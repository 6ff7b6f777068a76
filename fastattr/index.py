"""Index: FAISS over the students' embeddings of the training images.

Inner product on unit vectors is their cosine. `factory` is any FAISS factory string; the default keeps float16
vectors and searches them exhaustively, which is exact enough and fast up to some hundred thousand images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

from fastattr.artifacts import atomic_path, sha256_file
from fastattr.errors import ArtifactDamagedError, ArtifactNotFoundError, InputError


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Settings of the index."""

    factory: str = "SQfp16"
    """FAISS factory string: 'Flat', 'SQfp16', 'HNSW32', 'IVF4096,PQ64', ..."""


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


def search(index: faiss.Index, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
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


def save_index(index: faiss.Index, path: Path) -> None:
    """Write the index, atomically."""
    with atomic_path(path) as temporary:
        faiss.write_index(index, str(temporary))


def load_index(path: Path, *, sha256: str) -> faiss.Index:
    """Read an index whose checksum is as expected; FAISS sees no byte of any other file.

    Raises:
        ArtifactNotFoundError: there is no such file.
        ArtifactDamagedError: its checksum is another.
    """
    if not path.exists():
        raise ArtifactNotFoundError(f"{path} does not exist; fetch or build the attributor again.")
    found = sha256_file(path)
    if found != sha256:
        raise ArtifactDamagedError(
            f"{path} has SHA-256 {found[:12]}..., expected {sha256[:12]}...; fetch the attributor again."
        )
    return faiss.read_index(str(path))
