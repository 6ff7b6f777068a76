"""Files of an index, compared with their checksum before FAISS reads a byte, and of exact vectors, each with its digest.

FAISS's reader checks what it reads; its mapping reader does not, so a file is mapped only once `_ends_where_it_says` has
followed its structure to the last byte. Nothing may allocate more than the file has.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import faiss
import numpy as np
from tqdm import tqdm

from fastattr.core.errors import ArtifactDamagedError, MissingFileError, NonFiniteError
from fastattr.core.files import atomic_path, sha256_file

KINDS = ("Flat", "ScalarQuantizer", "PQ", "RaBitQ", "HNSW", "IVFFlat", "IVFScalarQuantizer", "IVFPQ", "IVFRaBitQ")
SUPPORTED = tuple(getattr(faiss, f"Index{kind}") for kind in KINDS)
"""FAISS classes that `search` can make leave out chosen rows, and whose files FAISS checks; alone, or behind PCA, OPQ, ..."""
BATCH = 65_536  # rows that are read, encoded and written at once
DIGEST_BYTES = 16  # of each row's SHA-256, kept beside the float16 vectors
Read = Callable[[int, int], np.ndarray]  # (start, stop) -> the (stop - start, D) float32 unit vectors of these rows
_LIMITS = threading.Lock()  # FAISS's limits on what it reads are the process's


def _after_fork() -> None:
    """A forked child has none of its parent's OpenMP threads, and FAISS would wait for them: it goes on with one."""
    _LIMITS.release()
    faiss.omp_set_num_threads(1)


os.register_at_fork(before=_LIMITS.acquire, after_in_parent=_LIMITS.release, after_in_child=_after_fork)


def inner_of(index: faiss.Index) -> Any:
    """The index behind a transform of the vectors, or itself; it lives as long as the whole. FAISS's types name few members."""
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def is_inverted(index: faiss.Index) -> bool:
    """Whether an index is an inverted file, alone or behind a transform of the vectors."""
    return isinstance(inner_of(index), faiss.IndexIVF)


def is_supported(index: faiss.Index) -> bool:
    """Whether fastattr searches this kind of index: by inner product, and able to leave out rows."""
    return isinstance(inner_of(index), SUPPORTED) and index.metric_type == faiss.METRIC_INNER_PRODUCT


def save_index(index: faiss.Index, path: Path) -> None:
    """Write the index, atomically."""
    with atomic_path(path) as temporary:
        faiss.write_index(index, str(temporary))


def check_file(path: Path, sha256: str) -> None:
    """Compare a file's checksum; MissingFileError or ArtifactDamagedError."""
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; fetch or build the attributor again.")
    found = sha256_file(path)
    if (found := sha256_file(path)) != sha256:
        differs = f"has SHA-256 {found[:12]}..., expected {str(sha256)[:12]}..."
        raise ArtifactDamagedError(f"{path} {differs}; fetch it again with force_download=True.")


def load_index(path: Path, *, sha256: str, inverted: bool = False) -> faiss.Index:
    """Map an index into memory whose checksum is as expected; FAISS sees no byte of any other file."""
    check_file(path, sha256)
    return map_index(path, inverted=inverted)


def map_index(path: Path, *, inverted: bool) -> faiss.Index:
    """The index of a file, mapped into memory where FAISS can; no file ends the process: ArtifactDamagedError."""
    size, flags = path.stat().st_size, 0
    if inverted:
        flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
    elif _ends_where_it_says(path, size):
        flags = faiss.IO_FLAG_MMAP_IFC
    with _LIMITS:
        largest, longest = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
        faiss.set_deserialization_vector_byte_limit(size)
        faiss.set_deserialization_loop_limit(size)
        try:
            index = faiss.read_index(str(path), flags)
        except (RuntimeError, MemoryError) as error:
            raise ArtifactDamagedError(f"{path} can't be read by FAISS ({cause(error)}); fetch it again.") from error
        finally:
            faiss.set_deserialization_vector_byte_limit(largest)
            faiss.set_deserialization_loop_limit(longest)
    inner = inner_of(index)
    if not is_supported(index):
        kind = f"holds a FAISS index of a kind that fastattr does not search ({type(inner).__name__})"
        raise ArtifactDamagedError(f"{path} {kind}; build the attributor again with another index.factory.")
    if isinstance(inner, faiss.IndexFlatCodes) and inner.codes.size() != inner.ntotal * inner.code_size:
        raise ArtifactDamagedError(f"{path} holds fewer codes than rows; fetch the attributor again.")
    return index


def cause(error: Exception) -> str:
    """What FAISS says, in one line."""
    return str(error).splitlines()[0][:200]


def _ends_where_it_says(path: Path, size: int) -> bool:
    """Whether a file is an exhaustive or HNSW index whose parts end with the file, so that it can be mapped."""
    with path.open("rb") as file:
        try:
            return _skip_index(file) and file.tell() == size
        except (struct.error, OverflowError, ValueError, OSError):  # shorter than it says, or longer than a file can be
            return False


def _skip_index(file: BinaryIO) -> bool:
    """Move behind an index as FAISS writes it; False where it is of another kind."""
    kind = file.read(4)
    _read(file, "<iqqq?i")  # width, rows, two unused, trained, metric
    if kind in {b"IHNf", b"IHNs"}:
        for width in (8, 4, 4, 8, 4):  # probabilities, neighbours a level, levels, offsets, neighbours
            file.seek(_read(file, "<Q")[0] * width, 1)
        _read(file, "<5i")
        return _skip_index(file)
    if kind == b"IxSQ":
        _read(file, "<iifQQ")  # kind of quantiser, range, its argument, width, bytes a code
        file.seek(_read(file, "<Q")[0] * 4, 1)
        file.seek(_read(file, "<Q")[0], 1)
    elif kind in {b"IxFI", b"IxF2"}:
        file.seek(_read(file, "<Q")[0] * 4, 1)
    return kind in {b"IxSQ", b"IxFI", b"IxF2"}


def _read(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def empty_copy(path: Path, factory: str) -> faiss.Index:
    """The index in a file without its rows, as it was once trained."""
    if "IVF" not in factory:
        index = faiss.read_index(str(path))
        index.reset()
        return index
    index = map_index(path, inverted=True)
    ivf = faiss.extract_index_ivf(index)
    lists = faiss.ArrayInvertedLists(ivf.nlist, ivf.code_size)
    lists.this.disown()  # type: ignore[attr-defined]
    ivf.replace_invlists(lists, True)
    ivf.ntotal = index.ntotal = 0
    return index


def require_finite(vectors: np.ndarray, image_ids: Sequence[str] = (), *, first: int = 0) -> np.ndarray:
    """The (n, D) vectors of consecutive rows; NonFiniteError names those that are not finite, by id, or row from `first`."""
    wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(wrong):
        named = [repr(image_ids[row]) if len(image_ids) else f"row {first + row:,}" for row in wrong[:5]]
        more = ", ..." if len(wrong) > 5 else ""
        raise NonFiniteError(
            f"{len(wrong)} embeddings are NaN or infinite: {', '.join(named)}{more}. No search could find them, and they would "
            "spoil the index for others; encode these images again (in float32), or leave them out."
        )
    return vectors


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
        """Open them; MissingFileError, or ArtifactDamagedError if a file has another size or checksum than config.json says."""
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
        """(n, D) float32 vectors of these rows; ArtifactDamagedError if one is not what was written."""
        size, descriptor = 2 * self.dim, self._file.fileno()
        data = [os.pread(descriptor, size, row * size) for row in rows.tolist()]
        found = b"".join([hashlib.sha256(row).digest()[:DIGEST_BYTES] for row in data])
        if found != self._digests[rows].tobytes():
            raise ArtifactDamagedError(f"{self._path} has rows whose digests differ; fetch it again with force_download=True.")
        return np.frombuffer(b"".join(data), dtype=np.float16).reshape(len(data), self.dim).astype(np.float32)
