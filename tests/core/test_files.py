"""fastattr/core/files.py: files are whole or absent."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fastattr.core.errors import ArtifactDamagedError, ArtifactNotFoundError
from fastattr.core.files import atomic_path, read_json, sha256_file, temporary_folder, write_json


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A config with the kinds of value that configs hold."""

    step_size: float = 0.01
    channels: tuple[int, ...] = (16, 32)
    source: Path = Path("images")


def test_atomic_path_keeps_the_old_file_when_writing_fails(tmp_path):
    """A crash half-way would leave a short file that a later stage reads as the result."""
    path = tmp_path / "scores.npy"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="disk"), atomic_path(path) as temporary:
        temporary.write_bytes(b"half of the n")
        raise RuntimeError("disk full")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_path_shows_nothing_before_the_end(tmp_path):
    """A reader in another process must not see a file that is still being written."""
    path = tmp_path / "new" / "scores.npy"
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"new")
        assert temporary.suffix == ".npy"  # numpy would add a suffix of its own, and the rename would miss the file
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_atomic_path_replaces_a_folder_whole(tmp_path):
    """A shard of an earlier try, left beside the new shards, would add its rows to the result."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "data-00007.parquet").write_bytes(b"earlier try")
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        (temporary / "data-00000.parquet").write_bytes(b"new")
    assert [path.name for path in folder.iterdir()] == ["data-00000.parquet"]


def test_atomic_path_keeps_the_old_folder_when_writing_fails(tmp_path):
    """Removing the old folder first would lose hours of work to an error in the new try."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "data.parquet").write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_path(folder) as temporary:
        temporary.mkdir()
        (temporary / "data.parquet").write_bytes(b"half")
        raise RuntimeError
    assert (folder / "data.parquet").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [folder]


def test_atomic_path_keeps_the_old_folder_when_nothing_was_written(tmp_path):
    """A writer that forgot to write would otherwise have the old result removed, and leave nothing."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "data.parquet").write_bytes(b"old")
    with pytest.raises(FileNotFoundError), atomic_path(folder):
        pass
    assert (folder / "data.parquet").read_bytes() == b"old"


def test_json_round_trip_keeps_values(tmp_path):
    """A number written as text, or escaped names, would come back as something else."""
    write_json(tmp_path / "a.json", {"creator": "Groß", "map": np.float64(0.5), "rows": np.int64(3), "config": StageConfig()})
    assert read_json(tmp_path / "a.json") == {
        "creator": "Groß",
        "map": 0.5,
        "rows": 3,
        "config": {"step_size": 0.01, "channels": [16, 32], "source": "images"},
    }


def test_failed_write_json_keeps_the_old_file(tmp_path):
    """A value without a JSON form would truncate the metrics that were there."""
    write_json(tmp_path / "a.json", {"map": 0.5})
    with pytest.raises(TypeError, match="object"):
        write_json(tmp_path / "a.json", {"map": object()})
    assert read_json(tmp_path / "a.json") == {"map": 0.5}


@pytest.mark.parametrize("content", [b'{"map": 0.', b"\xff\xfe", b""])
def test_damaged_json_is_named_as_damaged(tmp_path, content):
    """A traceback from the JSON module does not tell a user which file to fetch again."""
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ArtifactDamagedError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_missing_json_is_named_as_missing(tmp_path):
    """An empty default in its place would be taken for a result."""
    with pytest.raises(ArtifactNotFoundError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_sha256_file_equals_hashlib_over_the_bytes(tmp_path):
    """A checksum over anything but all bytes would let a damaged index through."""
    data = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "index.faiss").write_bytes(data)
    assert sha256_file(tmp_path / "index.faiss") == hashlib.sha256(data).hexdigest()


def test_temporary_folder_is_removed_after_an_error(tmp_path):
    """Scratch shards left in a run folder would fill the disk over many tries."""
    with pytest.raises(RuntimeError), temporary_folder(tmp_path / "run") as scratch:
        (scratch / "shard").write_bytes(b"x")
        raise RuntimeError
    assert list((tmp_path / "run").iterdir()) == []
