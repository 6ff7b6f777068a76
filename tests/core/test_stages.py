"""fastattr/core/stages.py: a stage is done once, and folders that do not belong together are refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from fastattr.core.errors import ArtifactDamagedError, ArtifactMismatchError, ArtifactNotFoundError
from fastattr.core.stages import MANIFEST, fingerprint, finished, make, open_stage, require_same, write_manifest


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


def test_make_works_once_and_then_reads_what_it_found(tmp_path):
    """A second call that worked again would cost hours; one that returned nothing would lose the facts."""
    calls = []

    def work() -> dict[str, object]:
        calls.append(1)
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "data.npy").write_bytes(b"x")
        return {"images": 7}

    stage = {"stage": "candidates", "config": StageConfig(), "inputs": INPUTS}
    first, second = make(tmp_path / "c", work, **stage), make(tmp_path / "c", work, **stage)
    assert first == second == open_stage(tmp_path / "c", "candidates")
    assert (first["images"], calls) == (7, [1])
    with pytest.raises(ArtifactMismatchError, match="step_size"):
        make(tmp_path / "c", work, **{**stage, "config": replace(StageConfig(), step_size=0.5)})
    assert calls == [1]


def test_make_keeps_the_checkpoint_of_failed_work_and_removes_that_of_finished_work(tmp_path):
    """Removed too early, a killed run starts anew; removed never, it fills the disk."""
    folder, checkpoint, shards = tmp_path / "c", tmp_path / "c" / "checkpoint", tmp_path / "c" / "shards"

    def work() -> dict[str, object]:
        shards.mkdir(parents=True, exist_ok=True)
        if checkpoint.exists():
            return {"resumed": True}
        checkpoint.write_bytes(b"half")
        raise KeyboardInterrupt

    stage = {"stage": "student", "config": StageConfig(), "inputs": INPUTS, "temporary": [checkpoint, shards]}
    with pytest.raises(KeyboardInterrupt):
        make(folder, work, **stage)
    assert not (folder / MANIFEST).exists()
    assert make(folder, work, **stage)["resumed"] is True
    assert [path.name for path in folder.iterdir()] == [MANIFEST]
