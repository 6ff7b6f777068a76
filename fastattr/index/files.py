"""Files of an index: written atomically, compared with their checksum before FAISS reads a byte, mapped into memory."""

from __future__ import annotations

from pathlib import Path

import faiss

from fastattr.core.errors import ArtifactDamagedError, MissingFileError
from fastattr.core.files import atomic_path, sha256_file


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
    return map_index(path, inverted=inverted)


def map_index(path: Path, *, inverted: bool) -> faiss.Index:
    """The index of a file whose origin is known; see `load_index` for others."""
    flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if inverted else faiss.IO_FLAG_MMAP_IFC
    try:
        return faiss.read_index(str(path), flags)
    except RuntimeError as error:
        raise ArtifactDamagedError(f"{path} can't be read by FAISS ({str(error).splitlines()[0][:200]}).") from error


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
