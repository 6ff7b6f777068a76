"""Choose the kind of an index: what FAISS kind fits a corpus, what it takes, and whether there is room for it."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from fastattr.core.errors import DoesNotFitError, InputError
from fastattr.index.files import BATCH, DIGEST_BYTES, inner_of, is_supported

AUTO = "auto"
EXHAUSTIVE_ROWS = 20_000
"""Up to here an exhaustive search answers in a millisecond or two; nothing is gained by approximating it."""
BUILD_ROWS = 2_000_000  # rows that are added to an index in memory before they are written as a shard
TRAINING_ROWS = 262_144  # at most so many vectors train an index


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Settings of the index."""

    factory: str = AUTO
    """'auto', or a FAISS factory string: 'Flat', 'SQfp16', 'HNSW32', 'OPQ64_256,IVF4096,PQ64', ..."""
    recall: float = 0.95
    """Share of the 100 nearest images that a search has to find, 0 to 1; 'auto' and the search's settings go by it."""
    memory_gb: float = 0.0
    """Memory that the index may take, in 10^9 bytes; 0 takes half of what is free."""
    shard_rows: int = 0
    """Rows in one index file; 0 keeps the whole index in one."""
    plain: str = "SQ4"
    """FAISS factory string of a second index, of the untuned features, for `FastAttributor.plain`; '' leaves it out."""

    def __post_init__(self) -> None:
        for name in ("shard_rows", "memory_gb"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 < self.recall <= 1:
            raise InputError(f"recall must be above 0 and at most 1, got {self.recall}")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What an index takes, in bytes."""

    factory: str
    memory: int  # of the loaded index, should all of it be touched
    disk: int  # index and float16 vectors
    build_memory: int  # at most, while it is built

    def in_words(self) -> str:
        """One line."""
        memory, build, disk = (f"{size / 1e9:,.2f} GB" for size in (self.memory, self.build_memory, self.disk))
        return f"{self.factory}: {memory} memory ({build} while it is built), {disk} disk"


def choose(rows: int, dim: int, *, recall: float = 0.95, memory: float = math.inf) -> str:
    """The FAISS factory string for N x D embeddings, of this recall in this memory (bytes); DoesNotFitError if none is."""
    fitting = [factory for factory in kinds(rows, dim, recall=recall) if estimate(rows, dim, factory).memory <= memory]
    if not fitting:
        way_out = "Give it more memory (memory_gb), or split the corpus over machines (docs/search-index.md, Milvus)"
        room = f"{memory / 1e9:,.2f} GB: {_alternatives(rows, dim, recall)}"
        raise DoesNotFitError(f"no index of {rows:,} x {dim} fits into {room}. {way_out}.")
    return fitting[0]


def kinds(rows: int, dim: int, *, recall: float) -> list[str]:
    """Factory strings that reach a recall on this corpus, the most desirable first, then ever smaller ones."""
    if rows <= EXHAUSTIVE_ROWS:
        return ["SQfp16", "SQ8"]
    if recall > 0.995:  # only an exhaustive search promises that
        return ["SQfp16"]
    lists = coarse_lists(rows)
    if dim < 192:
        return [f"IVF{lists},SQ4", f"IVF{lists},RaBitQ"]
    return [f"{f'PCAR{width},' if width < dim else ''}IVF{lists},RaBitQ" for width in (256, 128) if width <= dim]


def coarse_lists(rows: int) -> int:
    """Lists of an inverted file: about 1.4 times the root of the rows, a power of two, 64 to 65,536."""
    return int(2 ** np.clip(round(math.log2(1.4 * math.sqrt(rows))), 6, 16))


def keeps_vectors(index: faiss.Index) -> bool:
    """Whether an index needs float16 vectors beside it: it keeps less than 8 bits a value, or not all of the values."""
    inner = inner_of(index)
    if isinstance(inner, faiss.IndexHNSW):
        inner = faiss.downcast_index(inner.storage)
    coarse = isinstance(inner, faiss.IndexRaBitQ | faiss.IndexIVFRaBitQ) or inner.sa_code_size() < index.d
    return coarse or inner.d < index.d


def estimate(rows: int, dim: int, factory: str, *, shard_rows: int = 0) -> Estimate:
    """What an index takes, from the sizes of its parts; InputError if FAISS does not know the factory string."""
    index: Any = make(factory, dim)
    fixed, inner = 0, inner_of(index)
    if inner is not index:
        fixed += sum(4 * index.chain.at(i).d_in * index.chain.at(i).d_out for i in range(index.chain.size()))
    if isinstance(inner, faiss.IndexIVF):
        per_row = inner.code_size + 8  # and the row's id
        fixed += 4 * inner.nlist * inner.d
    elif isinstance(inner, faiss.IndexHNSW):
        # On the ground level; 1 in M rows has as many half again.
        links = 4 * 2 * inner.hnsw.nb_neighbors(1)  # type: ignore[attr-defined]
        per_row = faiss.downcast_index(inner.storage).sa_code_size() + round(1.1 * links) + 12
    else:
        per_row = inner.sa_code_size()
    if isinstance(inner, faiss.IndexPQ | faiss.IndexIVFPQ):
        fixed += 4 * 256 * inner.d  # the codebooks
    vectors = rows * 2 * dim if keeps_vectors(index) else 0
    memory = rows * per_row + fixed + (rows * DIGEST_BYTES if vectors else 0)
    at_once = min(rows, shard_rows or (BUILD_ROWS if isinstance(inner, faiss.IndexIVF) else rows))
    shards = -(-rows // at_once)
    memory += (shards if shards > 1 else 0) * fixed  # each shard has the lists' centres, and the whole once more
    training = min(rows, TRAINING_ROWS) * dim * 4 * 2
    build_memory = fixed + at_once * per_row + max(training, 3 * BATCH * dim * 4)
    return Estimate(factory=factory, memory=memory, disk=memory + vectors, build_memory=build_memory)


def _alternatives(rows: int, dim: int, recall: float) -> str:
    return "; ".join(estimate(rows, dim, factory).in_words() for factory in kinds(rows, dim, recall=recall))


def require_room(rows: int, dim: int, factory: str, folder: Path, config: IndexConfig) -> None:
    """Raise DoesNotFitError if memory or disk have no room for an index; the text has the figures and the alternatives."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    needed = estimate(rows, dim, factory, shard_rows=config.shard_rows)
    memory, disk = available_memory(), shutil.disk_usage(existing).free
    for what, found, wanted in (("memory", memory, needed.build_memory), ("disk", disk, needed.disk)):
        if wanted > found:
            room = f"{wanted / 1e9:,.2f} GB of {what} while it is built, and {found / 1e9:,.2f} GB are free"
            others = f"{_alternatives(rows, dim, config.recall)}; or fewer rows a shard (shard_rows)"
            raise DoesNotFitError(f"an index {factory!r} of {rows:,} x {dim} takes {room}. Alternatives: {others}.")


def available_memory() -> int:
    """Bytes that a process may still take, as the system tells; no limit where it does not."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))


def make(factory: str, dim: int) -> faiss.Index:
    """An empty inner-product index; InputError if FAISS does not know the kind, or can't leave out rows while it searches."""
    try:
        index: faiss.Index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        known = "try 'auto', 'Flat', 'SQfp16' or 'HNSW32'"
        raise InputError(f"FAISS does not know the index {factory!r} for width {dim}; {known}.") from error
    if not is_supported(index):
        raise InputError(
            f"fastattr does not search the index {factory!r}: removed images must be left out, by inner product. Try 'auto', "
            "or Flat, SQ..., PQ..., HNSW... or IVFn with Flat, SQ..., PQ... or RaBitQ, also behind PCA or OPQ."
        )
    inner = inner_of(index)
    if inner is not index:
        first: Any = faiss.downcast_VectorTransform(index.chain.at(0))  # type: ignore[attr-defined]
        if isinstance(first, faiss.OPQMatrix):
            first.niter, first.max_train_points = 10, 16_384
    if isinstance(inner, faiss.IndexPQ):
        inner.do_polysemous_training = False  # type: ignore[attr-defined]  # slow, for searches not used here
    if isinstance(inner, faiss.IndexPQ | faiss.IndexIVFPQ):
        inner.pq.cp.niter, inner.pq.cp.max_points_per_centroid = 12, 128  # a quarter of the work
    return index
