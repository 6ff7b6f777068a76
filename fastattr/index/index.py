"""Index: FAISS over the students' embeddings of the training images, from thousands to hundreds of millions.

Inner product on unit vectors is their cosine. `choose` picks the kind of index from size, memory and recall wanted, or
takes any FAISS factory string; what each kind costs and finds is measured in docs/search-index.md. An index that compresses
finds a short list, which is ranked again by exact similarities from float16 vectors that stay on disk. An index is
built shard by shard from a stream, resumes, and is searched as one; shards can be fetched and read one by one. FAISS maps
inverted lists into memory from their files, so that an index larger than memory still answers; it reads no byte of a file
whose SHA-256 is not the expected one, and no vector is used whose own digest differs.

Writes index.faiss (or shards of it), vectors.f16 and vectors.sha256.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
from tqdm import tqdm

from fastattr.core.errors import ArtifactDamagedError, ArtifactMismatchError, DoesNotFitError, InputError, MissingFileError
from fastattr.core.files import atomic_path, read_json, sha256_file, write_json
from fastattr.core.stages import fingerprint

logger = logging.getLogger(__name__)

AUTO = "auto"
EXHAUSTIVE_ROWS = 20_000
"""Up to here an exhaustive search answers in a millisecond or two; nothing is gained by approximating it."""
BUILD_ROWS = 2_000_000
"""Rows that are added to an index in memory before they are written as a shard."""
BATCH = 65_536
"""Rows that are read, encoded and written at once."""
TRAINING_ROWS = 262_144
"""At most so many vectors train an index."""
DIGEST_BYTES = 16
"""Of each row's SHA-256, kept beside the float16 vectors."""
TUNED_K = 100
"""The search's settings are chosen for the recall of so many neighbours."""
TUNING_QUERIES = 200
NPROBES = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
READ_COST = 150
"""Codes that are compared in the time in which one vector is read from the disk's cache, checked and compared."""
SHORTLISTS = (150, 200, 300, 400, 600, 800, 1200, 1600)

Read = Callable[[int, int], np.ndarray]
"""(start, stop) -> the (stop - start, D) float32 unit vectors of these rows."""


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
        if self.shard_rows < 0:
            raise InputError(f"shard_rows must be at least 0, got {self.shard_rows}")
        if not 0 < self.recall <= 1:
            raise InputError(f"recall must be above 0 and at most 1, got {self.recall}")
        if self.memory_gb < 0:
            raise InputError(f"memory_gb must be at least 0, got {self.memory_gb}")


class Searchable(Protocol):
    """What `search` needs: a FAISS index, or several as one."""

    ntotal: int

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(Q, k) similarities, best first, and their (Q, k) rows."""
        ...


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What an index takes, in bytes."""

    factory: str
    memory: int
    """Of the loaded index, should all of it be touched."""
    disk: int
    """Index and float16 vectors."""
    build_memory: int
    """At most, while it is built."""

    def in_words(self) -> str:
        """One line."""
        return (
            f"{self.factory}: {self.memory / 1e9:,.2f} GB memory ({self.build_memory / 1e9:,.2f} GB while it is built), "
            f"{self.disk / 1e9:,.2f} GB disk"
        )


# ---- choosing


def choose(rows: int, dim: int, *, recall: float = 0.95, memory: float = math.inf) -> str:
    """The FAISS factory string for a corpus; docs/search-index.md has the measurements behind it.

    Args:
        rows: N, images in the corpus.
        dim: D, width of the embeddings.
        recall: share of the 100 nearest that a search has to find.
        memory: bytes that the index may take.

    Raises:
        DoesNotFitError: nothing that reaches this recall fits; the text says what each kind would take.
    """
    fitting = [factory for factory in candidates(rows, dim, recall=recall) if estimate(rows, dim, factory).memory <= memory]
    if not fitting:
        raise DoesNotFitError(
            f"no index of {rows:,} x {dim} fits into {memory / 1e9:,.2f} GB: {_alternatives(rows, dim, recall)}. "
            "Give it more memory (memory_gb), or split the corpus over machines (docs/search-index.md, Milvus)."
        )
    return fitting[0]


def candidates(rows: int, dim: int, *, recall: float) -> list[str]:
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


def keeps_vectors(factory: str) -> bool:
    """Whether an index of this kind needs float16 vectors beside it, since its own are coarser than 8 bits a value."""
    last = factory.rsplit(",", 1)[-1]
    return not ("Flat" in factory or "SQfp16" in last or "SQ8" in last or "SQbf16" in last or "HNSW" in last)


def estimate(rows: int, dim: int, factory: str, *, shard_rows: int = 0) -> Estimate:
    """What an index takes, from the sizes of its parts.

    Raises:
        InputError: FAISS does not know the factory string.
    """
    index: Any = make(factory, dim)
    fixed, inner = 0, _inner(index)
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
    vectors = rows * 2 * dim if keeps_vectors(factory) else 0
    memory = rows * per_row + fixed + (rows * DIGEST_BYTES if vectors else 0)
    at_once = min(rows, shard_rows or (BUILD_ROWS if isinstance(inner, faiss.IndexIVF) else rows))
    shards = -(-rows // at_once)
    memory += (shards if shards > 1 else 0) * fixed  # each shard has the lists' centres, and the whole once more
    training = min(rows, TRAINING_ROWS) * dim * 4 * 2
    return Estimate(
        factory=factory,
        memory=memory,
        disk=memory + vectors,
        build_memory=fixed + at_once * per_row + max(training, 3 * BATCH * dim * 4),
    )


def _alternatives(rows: int, dim: int, recall: float) -> str:
    return "; ".join(estimate(rows, dim, factory).in_words() for factory in candidates(rows, dim, recall=recall))


def require_room(rows: int, dim: int, factory: str, folder: Path, config: IndexConfig) -> Estimate:
    """The estimate, if memory and disk have room for it.

    Raises:
        DoesNotFitError: they have not; the text has the figures and the alternatives.
    """
    needed = estimate(rows, dim, factory, shard_rows=config.shard_rows)
    memory, disk = available_memory(), shutil.disk_usage(_existing(folder)).free
    for what, found, wanted in (("memory", memory, needed.build_memory), ("disk", disk, needed.disk)):
        if wanted > found:
            raise DoesNotFitError(
                f"an index {factory!r} of {rows:,} x {dim} takes {wanted / 1e9:,.2f} GB of {what} while it is built, and "
                f"{found / 1e9:,.2f} GB are free. Alternatives: {_alternatives(rows, dim, config.recall)}; or fewer rows a "
                "shard (shard_rows)."
            )
    return needed


def available_memory() -> int:
    """Bytes that a process may still take, as the system tells; no limit where it does not."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


# ---- building


def make(factory: str, dim: int) -> faiss.Index:
    """An empty inner-product index.

    Raises:
        InputError: FAISS does not know the factory string.
    """
    try:
        index: faiss.Index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InputError(
            f"FAISS does not know the index {factory!r} for width {dim}; try 'auto', 'Flat', 'SQfp16' or 'HNSW32'."
        ) from error
    inner = _inner(index)
    if inner is not index:
        whole: Any = index
        first: Any = faiss.downcast_VectorTransform(whole.chain.at(0))
        if isinstance(first, faiss.OPQMatrix):
            first.niter, first.max_train_points = 10, 16_384
    if isinstance(inner, faiss.IndexPQ):
        inner.do_polysemous_training = False  # type: ignore[attr-defined]  # slow, for searches not used here
    if isinstance(inner, faiss.IndexPQ | faiss.IndexIVFPQ):
        inner.pq.cp.niter, inner.pq.cp.max_points_per_centroid = 12, 128  # a quarter of the work
    return index


def _inner(index: faiss.Index) -> Any:
    """The index behind a transform of the vectors, or itself; it lives as long as the whole. FAISS's types name few members."""
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def build_index(embeddings: np.ndarray, factory: str) -> faiss.Index:
    """An inner-product index of (N, D) float32 unit vectors, in memory; row i has id i.

    Raises:
        InputError: FAISS does not know the factory string, or there are too few vectors to train it.
    """
    index = make(factory, embeddings.shape[1])
    index = train(index, embeddings, factory)
    index.add(embeddings)
    return index


def train(index: faiss.Index, embeddings: np.ndarray, factory: str) -> faiss.Index:
    """The index, trained on (n, D) float32 vectors.

    Raises:
        InputError: there are too few.
    """
    trained = on_gpu(index)
    try:
        trained.train(embeddings)
    except RuntimeError as error:
        raise InputError(
            f"{len(embeddings)} images are too few to train an index {factory!r}; take 'SQfp16'. "
            f"FAISS says: {str(error).splitlines()[0][:200]}"
        ) from error
    return off_gpu(trained)


def on_gpu(index: faiss.Index) -> faiss.Index:
    """The index on FAISS's first GPU, or itself where FAISS sees none."""
    if not faiss.get_num_gpus():
        return index
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)


def off_gpu(index: faiss.Index) -> faiss.Index:
    """What `on_gpu` gave, back in memory, where it can be written."""
    return faiss.index_gpu_to_cpu(index) if faiss.get_num_gpus() else index


def _is_ivf(index: faiss.Index) -> bool:
    return faiss.try_extract_index_ivf(index) is not None


def build(
    read: Read, rows: int, dim: int, config: IndexConfig, folder: Path, *, name: str = "index", seed: int = 0
) -> dict[str, Any]:
    """Build an index of N vectors from a stream into a folder, shard by shard; done again, it goes on where it stopped.

    Args:
        read: gives the vectors; rows are read in order, and some of them twice.
        rows: N.
        dim: D.
        config: the kind of index, and how large its files.
        folder: where the files go; those of an interrupted build are in its folder `.build`.
        name: first part of the files' names.
        seed: of the choice of training vectors.

    Returns:
        What config.json says of it: 'index' (factory), 'index_shards', 'vectors', 'search', 'recall_of_search'.

    Raises:
        DoesNotFitError: memory or disk are too small.
        InputError: FAISS does not know the factory string, or there are too few vectors.
        ArtifactMismatchError: the folder holds a half-built index with other settings.
    """
    memory = config.memory_gb * 1e9 or available_memory() / 2
    factory = config.factory if config.factory != AUTO else choose(rows, dim, recall=config.recall, memory=memory)
    require_room(rows, dim, factory, folder, config)
    work = folder / ".build"
    work.mkdir(parents=True, exist_ok=True)
    identity = fingerprint([factory, rows, dim, config.shard_rows, name, seed, read(0, min(rows, 8)).round(4).tolist()])
    if (work / "identity.json").exists() and read_json(work / "identity.json") != identity:
        raise ArtifactMismatchError(f"{work} holds a half-built index of something else; remove it to build anew.")
    write_json(work / "identity.json", identity)
    vectors = write_vectors(read, rows, dim, folder, name) if keeps_vectors(factory) else None
    if vectors:
        read = reader(folder / vectors["file"], dim)
    trained = _train_on_sample(read, rows, factory, dim, work / "trained.faiss", seed=seed)
    shards = add_shards(trained, read, rows, config.shard_rows, folder, name=name)
    settings: dict[str, Any] = {"index": factory, "index_shards": shards, "vectors": vectors}
    settings.update(tune(folder, settings, read, rows, recall=config.recall, seed=seed))
    shutil.rmtree(work)
    return settings


def add_shards(trained: Path, read: Read, rows: int, shard_rows: int, folder: Path, *, name: str) -> list[dict[str, Any]]:
    """Add N vectors to copies of an empty trained index and write these shards; those that are there are left alone.

    Args:
        trained: the file of the empty index.
        read: gives the vectors.
        rows: N.
        shard_rows: rows in one file, 0 for all.
        folder: where the files go.
        name: first part of their names.

    Returns:
        'file', 'first_row' and 'rows' of each; 'own_ids' where rows are counted over the whole index.
    """
    inverted = _is_ivf(faiss.read_index(str(trained)))
    size = shard_rows or (BUILD_ROWS if inverted else rows)
    starts = range(0, rows, size)
    listed = []
    for number, start in enumerate(tqdm(starts, desc="index", unit="shard", disable=len(starts) == 1)):
        stop = min(start + size, rows)
        file = f"{name}.faiss" if len(starts) == 1 else f"{name}-{number:05d}-of-{len(starts):05d}.faiss"
        if not (folder / file).exists():
            shard = on_gpu(faiss.read_index(str(trained)))
            for first in range(start, stop, BATCH):
                batch = read(first, min(first + BATCH, stop))
                if inverted:
                    shard.add_with_ids(batch, np.arange(first, first + len(batch)))
                else:
                    shard.add(batch)
            save_index(off_gpu(shard), folder / file)
        listed.append({"file": file, "first_row": start, "rows": stop - start} | ({"own_ids": True} if inverted else {}))
    return listed


def _train_on_sample(read: Read, rows: int, factory: str, dim: int, path: Path, *, seed: int) -> Path:
    """The file of an empty index trained on vectors that are drawn over the whole corpus."""
    if path.exists():
        return path
    index = make(factory, dim)
    if not index.is_trained:
        blocks = np.array_split(np.arange(rows), max(1, rows // 4096))
        wanted = min(rows, max(TRAINING_ROWS // 4, min(TRAINING_ROWS, 40 * _lists(index))))
        order = np.random.default_rng(seed).permutation(len(blocks))
        each = math.ceil(wanted / len(blocks))
        parts = []
        for number in tqdm(np.sort(order), desc="training vectors", unit="block", disable=len(blocks) < 100):
            block = blocks[number]
            picked = np.random.default_rng([seed, int(number)]).permutation(len(block))[:each]
            parts.append(read(int(block[0]), int(block[-1]) + 1)[np.sort(picked)])
        index = train(index, np.concatenate(parts)[: max(wanted, 1)], factory)
    save_index(index, path)
    return path


def _lists(index: faiss.Index) -> int:
    return int(faiss.extract_index_ivf(index).nlist) if _is_ivf(index) else 1024


# ---- vectors for exact re-ranking


def write_vectors(read: Read, rows: int, dim: int, folder: Path, name: str) -> dict[str, Any]:
    """Write the vectors as float16 and a digest of each; goes on after the last whole batch."""
    stem = "vectors" + name.removeprefix("index")
    listed: dict[str, Any] = {"file": f"{stem}.f16", "digests": f"{stem}.sha256", "rows": rows, "dim": dim}
    values, digests = folder / listed["file"], folder / listed["digests"]
    done = 0
    if values.exists() and digests.exists():
        done = min(values.stat().st_size // (2 * dim), digests.stat().st_size // DIGEST_BYTES) // BATCH * BATCH
    with values.open("r+b" if done else "wb") as out, digests.open("r+b" if done else "wb") as digest_out:
        out.truncate(done * 2 * dim)
        digest_out.truncate(done * DIGEST_BYTES)
        out.seek(0, os.SEEK_END)
        digest_out.seek(0, os.SEEK_END)
        for start in tqdm(range(done, rows, BATCH), desc="vectors", unit="batch", disable=rows <= BATCH):
            half = read(start, min(start + BATCH, rows)).astype(np.float16)
            out.write(half.tobytes())
            digest_out.write(b"".join(row_digests(half)))
        for file in (out, digest_out):
            file.flush()
            os.fsync(file.fileno())
    return listed


def row_digests(half: np.ndarray) -> list[bytes]:
    """The digest of each of (n, D) float16 rows."""
    return [hashlib.sha256(row.data).digest()[:DIGEST_BYTES] for row in np.ascontiguousarray(half)]


def reader(path: Path, dim: int) -> Read:
    """Reads a file of (N, D) float16 rows that this process wrote; nothing is checked."""

    def read(start: int, stop: int) -> np.ndarray:
        half = np.fromfile(path, dtype=np.float16, count=(stop - start) * dim, offset=start * dim * 2)
        return half.reshape(-1, dim).astype(np.float32)

    return read


class Vectors:
    """(N, D) float16 vectors on disk; every row is compared with its digest whenever it is read."""

    def __init__(self, folder: Path, listed: dict[str, Any], *, digests_sha256: str) -> None:
        """Open them.

        Raises:
            MissingFileError: a file is missing.
            ArtifactDamagedError: a file has another size or checksum than config.json says.
        """
        self._path = folder / listed["file"]
        self.rows, self.dim = int(listed["rows"]), int(listed["dim"])
        digests = folder / listed["digests"]
        check_file(digests, digests_sha256)
        for path, size in ((self._path, self.rows * self.dim * 2), (digests, self.rows * DIGEST_BYTES)):
            if not path.exists():
                raise MissingFileError(f"{path} does not exist; fetch or build the attributor again.")
            if path.stat().st_size != size:
                raise ArtifactDamagedError(f"{path} has {path.stat().st_size} bytes, expected {size}; fetch it again.")
        self._digests = np.memmap(digests, dtype=f"V{DIGEST_BYTES}", mode="r", shape=(self.rows,))
        self._file = self._path.open("rb", buffering=0)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead

    def take(self, rows: np.ndarray) -> np.ndarray:
        """(n, D) float32 vectors of these rows.

        Raises:
            ArtifactDamagedError: a row is not what was written.
        """
        size, descriptor = 2 * self.dim, self._file.fileno()
        data = [os.pread(descriptor, size, row * size) for row in rows.tolist()]
        found = b"".join([hashlib.sha256(row).digest()[:DIGEST_BYTES] for row in data])
        if found != self._digests[rows].tobytes():
            raise ArtifactDamagedError(f"{self._path} has rows whose digests differ; fetch it again with force_download=True.")
        return np.frombuffer(b"".join(data), dtype=np.float16).reshape(len(data), self.dim).astype(np.float32)


# ---- searching


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
        ivf = [faiss.extract_index_ivf(index) for index, _ in self.shards if _is_ivf(index)]
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
    whole = _map(first, inverted=True)
    faiss.extract_index_ivf(whole).replace_invlists(stacked, False)
    faiss.extract_index_ivf(whole).ntotal = whole.ntotal = sum(index.ntotal for index, _ in loaded)
    joined = Shards([(whole, 0)], ranges=[(int(listed["first_row"]), int(listed["rows"])) for _, listed in loaded])
    joined.kept = (stacked, loaded)  # FAISS only points to them
    return joined


def _parameters(index: faiss.Index, k: int, widen: int) -> Any:
    """How wide to search; None for an exhaustive index."""
    inner = _inner(index)
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
        return self.vectors is not None or not any(_is_ivf(index) for index, _ in self.index.shards)

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
    shards = join([(_map(folder / each["file"], inverted=inverted), each) for each in listed], folder / listed[0]["file"])
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


# ---- files


def save_index(index: faiss.Index, path: Path) -> None:
    """Write the index, atomically."""
    with atomic_path(path) as temporary:
        faiss.write_index(index, str(temporary))


def check_file(path: Path, sha256: str) -> None:
    """Compare a file's checksum.

    Raises:
        MissingFileError: there is no such file.
        ArtifactDamagedError: its checksum is another.
    """
    if not path.exists():
        raise MissingFileError(f"{path} does not exist; fetch or build the attributor again.")
    found = sha256_file(path)
    if found != sha256:
        raise ArtifactDamagedError(
            f"{path} has SHA-256 {found[:12]}..., expected {str(sha256)[:12]}...; fetch it again with force_download=True."
        )


def load_index(path: Path, *, sha256: str, inverted: bool = False) -> faiss.Index:
    """Map an index into memory whose checksum is as expected; FAISS sees no byte of any other file.

    Args:
        path: the index.
        sha256: its checksum.
        inverted: whether it is an inverted file, which FAISS maps in another way.

    Raises:
        MissingFileError: there is no such file.
        ArtifactDamagedError: a checksum is another, or FAISS can't read it.
    """
    check_file(path, sha256)
    return _map(path, inverted=inverted)


def _map(path: Path, *, inverted: bool) -> faiss.Index:
    flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if inverted else faiss.IO_FLAG_MMAP_IFC
    try:
        return faiss.read_index(str(path), flags)
    except RuntimeError as error:
        raise ArtifactDamagedError(f"{path} can't be read by FAISS ({str(error).splitlines()[0][:200]}).") from error


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
        if _is_ivf(index) and wide.get("nprobe"):
            faiss.extract_index_ivf(index).nprobe = int(wide["nprobe"])
    stored = settings.get("vectors")
    vectors = Vectors(folder, stored, digests_sha256=sha256[stored["digests"]]) if stored else None
    return Ranked(shards, vectors, shortlist=int(wide.get("shortlist") or TUNED_K))


def empty_copy(path: Path, factory: str) -> faiss.Index:
    """The index in a file without its rows, as it was once trained."""
    if "IVF" not in factory:
        index = faiss.read_index(str(path))
        index.reset()
        return index
    index = _map(path, inverted=True)
    ivf = faiss.extract_index_ivf(index)
    lists = faiss.ArrayInvertedLists(ivf.nlist, ivf.code_size)
    lists.this.disown()  # type: ignore[attr-defined]
    ivf.replace_invlists(lists, True)
    ivf.ntotal = index.ntotal = 0
    return index
