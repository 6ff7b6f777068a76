"""fastattr/core/files.py: files are whole or absent, and folders that do not belong together are refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from fastattr.core.errors import ArtifactDamagedError, ArtifactMismatchError, ArtifactNotFoundError
from fastattr.core.files import (
    MANIFEST,
    atomic_path,
    fingerprint,
    finished,
    open_stage,
    read_json,
    require_same,
    sha256_file,
    temporary_folder,
    write_json,
    write_manifest,
)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A config with the kinds of value that configs hold."""

    step_size: float = 0.01
    channels: tuple[int, ...] = (16, 32)
    source: Path = Path("images")


INPUTS = {"corpus": "0123456789abcdef"}


def write_stage(folder: Path, config: StageConfig | None = None, **facts: object) -> dict[str, object]:
    folder.mkdir()
    return write_manifest(folder, stage="candidates", config=config or StageConfig(), inputs=INPUTS, **facts)


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


def test_fingerprint_ignores_key_order_and_notices_every_value(tmp_path):
    """Key order would refuse equal configs; a value left out would join folders of different ones."""
    assert fingerprint({"a": 1, "b": [2, 3]}) == fingerprint({"b": [2, 3], "a": 1})
    others = [{"a": 1, "b": [3, 2]}, {"a": 1.5, "b": [2, 3]}, {"a": "1", "b": [2, 3]}, {"a": 1}]
    assert len({fingerprint(value) for value in [{"a": 1, "b": [2, 3]}, *others]}) == 5


def test_finished_is_false_without_a_manifest(tmp_path):
    """A folder whose stage was killed holds files, but no result."""
    (tmp_path / "scores.npy").write_bytes(b"half")
    assert not finished(tmp_path, stage="candidates", config=StageConfig(), inputs=INPUTS)


def test_finished_recognises_its_own_config_and_inputs(tmp_path):
    """If a tuple or path changed on its way through JSON, every resumed run would refuse its own folders."""
    write_stage(tmp_path / "c", seconds=3.2)
    assert finished(tmp_path / "c", stage="candidates", config=StageConfig(), inputs=dict(INPUTS))


@pytest.mark.parametrize(
    ("config", "inputs", "told"),
    [
        (replace(StageConfig(), step_size=0.02), INPUTS, "step_size: found 0.01, wanted 0.02"),
        (replace(StageConfig(), channels=(16,)), INPUTS, "channels"),
        (StageConfig(), {"corpus": "fedcba9876543210"}, "corpus: found '0123456789abcdef', wanted 'fedcba9876543210'"),
        (StageConfig(), {}, "corpus"),
    ],
)
def test_finished_refuses_a_folder_made_with_other_settings(tmp_path, config, inputs, told):
    """Scores of another corpus or step size would be taken for the wanted ones, or overwritten."""
    write_stage(tmp_path / "c")
    with pytest.raises(ArtifactMismatchError, match=told):
        finished(tmp_path / "c", stage="candidates", config=config, inputs=inputs)


def test_finished_refuses_a_folder_of_another_stage(tmp_path):
    """Two stages with equal configs would take each other's folder for their own."""
    write_stage(tmp_path / "c")
    with pytest.raises(ArtifactMismatchError, match="other stage"):
        finished(tmp_path / "c", stage="teacher", config=StageConfig(), inputs=INPUTS)


def test_facts_do_not_change_the_fingerprint(tmp_path):
    """A timing in the identity would make every rebuilt folder look like another one."""
    first = write_stage(tmp_path / "a", seconds=3.2)
    second = write_stage(tmp_path / "b", seconds=4.7)
    assert first["fingerprint"] == second["fingerprint"]
    assert second["seconds"] == 4.7


def test_open_stage_returns_what_write_manifest_returned(tmp_path):
    """A later stage names its input by this fingerprint."""
    written = write_stage(tmp_path / "c", images=7)
    assert open_stage(tmp_path / "c", "candidates") == written


def test_open_stage_refuses_an_unfinished_folder(tmp_path):
    """Half a folder would be read as a smaller, complete one."""
    with pytest.raises(ArtifactNotFoundError, match="no finished 'candidates'"):
        open_stage(tmp_path, "candidates")
    with pytest.raises(ArtifactNotFoundError, match="no finished 'candidates'"):
        open_stage(tmp_path / "missing", "candidates")


def test_open_stage_refuses_another_stages_folder(tmp_path):
    """Reading candidates as teacher scores would order images by their similarity instead."""
    write_stage(tmp_path / "c")
    with pytest.raises(ArtifactMismatchError, match="holds 'candidates', expected 'teacher'"):
        open_stage(tmp_path / "c", "teacher")


@pytest.mark.parametrize("content", ['{"stage": "candi', "[]", "null"])
def test_a_damaged_manifest_is_named_as_damaged(tmp_path, content):
    """A user must be told to fetch the folder again, not that a list has no attribute 'get'."""
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ArtifactDamagedError, match=MANIFEST):
        open_stage(tmp_path, "candidates")
    with pytest.raises(ArtifactDamagedError, match=MANIFEST):
        finished(tmp_path, stage="candidates", config=StageConfig(), inputs=INPUTS)


def test_manifest_is_plain_json(tmp_path):
    """A manifest that only our own reader understands would be no record of how the files were made."""
    write_stage(tmp_path / "c", images=np.int64(7))
    manifest = json.loads((tmp_path / "c" / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["config"] == {"step_size": 0.01, "channels": [16, 32], "source": "images"}
    assert manifest["images"] == 7


def test_require_same_names_both_and_the_remedy():
    """'mismatch' alone leaves a user with two folders and no idea which one to rebuild."""
    require_same("the index", "aa", "aa", "Rebuild it.")
    with pytest.raises(ArtifactMismatchError, match=r"the index is 'aa', expected 'bb'\. Rebuild it\."):
        require_same("the index", "aa", "bb", "Rebuild it.")


def test_temporary_folder_is_removed_after_an_error(tmp_path):
    """Scratch shards left in a run folder would fill the disk over many tries."""
    with pytest.raises(RuntimeError), temporary_folder(tmp_path / "run") as scratch:
        (scratch / "shard").write_bytes(b"x")
        raise RuntimeError
    assert list((tmp_path / "run").iterdir()) == []
