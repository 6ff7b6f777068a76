"""Vectors of an index in float16 on disk, each with its own digest: they rank a short list again, exactly."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fastattr.core.errors import ArtifactDamagedError, MissingFileError, NonFiniteError
from fastattr.index.files import check_file

BATCH = 65_536  # rows that are read, encoded and written at once
DIGEST_BYTES = 16  # of each row's SHA-256, kept beside the float16 vectors
Read = Callable[[int, int], np.ndarray]  # (start, stop) -> the (stop - start, D) float32 unit vectors of these rows


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
