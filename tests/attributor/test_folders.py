"""Folders: nothing that is not an attributor's is read, overwritten or deleted; names in a config are data."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastattr import ArtifactDamagedError, FastAttributor, InputError
from fastattr.attributor import bases, many
from fastattr.attributor.folder import seal
from fastattr.core.files import read_json, sha256_file, write_json
from tests.made import QUERY, base_features, names, write_attributor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_attributor(tmp_path / "attributor")


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """A folder of the user's."""
    target = tmp_path / "documents"
    (target / "src").mkdir(parents=True)
    (target / "thesis.docx").write_text("three years")
    (target / "src" / "a.py").write_text("x")
    return target


def test_a_save_into_a_foreign_folder_is_refused(folder, documents):
    """It deleted everything there."""
    before = {path: path.read_bytes() for path in documents.rglob("*") if path.is_file()}
    attributor = FastAttributor.from_pretrained(folder)
    for target in (documents, documents / "thesis.docx", documents / "src"):
        with pytest.raises(InputError):
            attributor.save_pretrained(target)
    assert {path: path.read_bytes() for path in documents.rglob("*") if path.is_file()} == before


def test_an_overwriting_save_keeps_foreign_files_and_replaces_the_attributor(folder, documents, tmp_path):
    """`overwrite=True` is permission to put an attributor there, not to tidy up."""
    attributor = FastAttributor.from_pretrained(folder)
    attributor.save_pretrained(documents, overwrite=True)
    FastAttributor.from_pretrained(write_attributor(tmp_path / "two", seed=5)).save_pretrained(documents, overwrite=True)
    assert (documents / "thesis.docx").read_text() == "three years"
    assert (documents / "src" / "a.py").read_text() == "x"
    saved = FastAttributor.from_pretrained(documents)
    assert names(saved, QUERY, 5) == names(FastAttributor.from_pretrained(tmp_path / "two"), QUERY, 5)


def test_a_save_follows_a_link_and_replaces_an_attributor_with_its_changes(folder, tmp_path):
    """Removals of the attributor that was replaced must not be applied to the new one."""
    attributor = FastAttributor.from_pretrained(folder)
    attributor.save_pretrained(tmp_path / "real")
    FastAttributor.from_pretrained(tmp_path / "real").remove(["base-1"])
    (tmp_path / "link").symlink_to(tmp_path / "real")
    attributor.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert len(FastAttributor.from_pretrained(tmp_path / "real")) == 60
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("what", ["write_base", "copy_base", "_sync", "_exchange"])
def test_a_save_that_fails_leaves_the_earlier_attributor(folder, tmp_path, monkeypatch, what):
    """18 of 70 kill points left neither the old one nor the new one."""
    attributor = FastAttributor.from_pretrained(folder)
    attributor.save_pretrained(tmp_path / "target")
    if what == "write_base":
        attributor.remove(["base-1"])
    monkeypatch.setattr(bases, what, lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        attributor.save_pretrained(tmp_path / "target")
    assert len(FastAttributor.from_pretrained(tmp_path / "target")) == 60


def changed(folder: Path, **settings: object) -> None:
    """Change config.json and seal it again, as a hostile author would."""
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", seal({**config, **settings}))


@pytest.mark.parametrize("name", ["/etc/hostname", "../victim", "a/../../victim", "..\\victim", "", ".", "x//y", "victim\0"])
@pytest.mark.parametrize("part", ["files", "sha256", "index_shards", "replaced"])
def test_names_that_lead_elsewhere_are_refused(folder, tmp_path, name, part):
    """Opening a stranger's attributor and changing it truncated any file of the user's."""
    (tmp_path / "victim").write_text("# my settings\n")
    config = read_json(folder / "config.json")
    hostile = {
        "files": {**config["files"], "journal": name},
        "sha256": {**config["sha256"], name: "0"},
        "index_shards": [{"file": name, "first_row": 0}],
        "replaced": [name],
    }
    changed(folder, **{part: hostile[part]})
    with pytest.raises(ArtifactDamagedError):
        FastAttributor.from_pretrained(folder)
    assert (tmp_path / "victim").read_text() == "# my settings\n"


@pytest.mark.parametrize("missing", ["catalog.parquet", "model.safetensors", "metrics.json", "index.faiss"])
def test_every_file_that_is_read_is_covered_by_the_seal(folder, missing):
    """A catalogue without a checksum was opened: its creators could be anyone."""
    config = read_json(folder / "config.json")
    changed(folder, sha256={file: checksum for file, checksum in config["sha256"].items() if file != missing})
    with pytest.raises(ArtifactDamagedError, match="no checksum of"):
        FastAttributor.from_pretrained(folder)


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    """A link in an unpacked archive reads, and would pass on, the user's own files."""
    shutil.move(folder / "metrics.json", tmp_path / "metrics.json")
    (folder / "metrics.json").symlink_to(tmp_path / "metrics.json")
    with pytest.raises(ArtifactDamagedError, match="leads out of the folder"):
        FastAttributor.from_pretrained(folder)


def test_a_local_folder_named_like_the_embedded_model_is_itself(folder, tmp_path, monkeypatch):
    """`fastattr remove emoji ID` said 'removed' and changed a copy that was thrown away."""
    folder.rename(tmp_path / "emoji")
    monkeypatch.chdir(tmp_path)
    FastAttributor.from_pretrained("emoji").remove(["base-3"])
    assert FastAttributor.from_pretrained(tmp_path / "emoji").has_left("base-3")
    (tmp_path / "snapshots").mkdir()
    FastAttributor.from_pretrained("emoji").save_pretrained(tmp_path / "snapshots" / "2026-11-28")
    FastAttributor.from_pretrained("snapshots/2026-11-28").remove(["base-4"])
    assert FastAttributor.from_pretrained("snapshots/2026-11-28").has_left("base-4")


def test_a_removal_that_cannot_be_kept_is_an_error(tmp_path):
    """A warning is not read by a pipeline, and a changed copy is lost with its process."""
    shipped = FastAttributor.from_pretrained("emoji").folder
    before = sha256_file(shipped / "config.json")
    (tmp_path / "link").symlink_to(shipped)
    for change in (lambda own: own.remove(["openmoji-2764"]), lambda own: own.compact()):
        for named in ("emoji", shipped, tmp_path / "link"):
            with pytest.raises(InputError, match="not yours to change"):
                change(FastAttributor.from_pretrained(named))
    assert sha256_file(shipped / "config.json") == before
    assert not (shipped / "changes.sqlite").exists()


@pytest.mark.parametrize("what", ["removed", "k", "table"])
def test_a_resumed_batch_takes_over_only_what_is_still_true(folder, tmp_path, monkeypatch, what):
    """Parts of a killed run named images that had left, or answered another table."""
    monkeypatch.setattr(many, "PART_ROWS", 4)
    for name, seed in (("one", 1), ("two", 2)):
        rows = [
            {"query_id": f"{name}{i}", "prompt": "p", "features": row.tolist()}
            for i, row in enumerate(base_features(8, seed=seed))
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    real = many._attribute

    def until_killed(attributor, rows, *rest):
        if rows["query_id"][0].as_py() == "one4":
            raise KeyboardInterrupt
        return real(attributor, rows, *rest)

    monkeypatch.setattr(many, "_attribute", until_killed)
    with pytest.raises(KeyboardInterrupt):
        many.run(str(folder), tmp_path / "one.jsonl", tmp_path / "out", k=3)
    (part,) = (tmp_path / "out").glob("part-*.parquet")
    gone = pq.read_table(part)["image_ids"][0].as_py()[0]
    monkeypatch.setattr(many, "_attribute", real)
    if what == "removed":
        FastAttributor.from_pretrained(folder).remove([gone])
    table = "two" if what == "table" else "one"
    many.run(str(folder), tmp_path / f"{table}.jsonl", tmp_path / "out", k=5 if what == "k" else 3)
    found = pa.concat_tables([pq.read_table(path) for path in (tmp_path / "out").glob("part-*.parquet")])
    assert sorted(found["query_id"].to_pylist()) == [f"{table}{i}" for i in range(8)]
    assert {len(ids) for ids in found["image_ids"].to_pylist()} == {5 if what == "k" else 3}
    assert what != "removed" or not any(gone in ids for ids in found["image_ids"].to_pylist())


def test_a_killed_save_leaves_no_half_folder_under_the_name(folder, tmp_path):
    """A folder that is there and not loadable blocks the next save."""
    child = os.fork()
    if child == 0:
        bases._sync = lambda _: os._exit(9)
        FastAttributor.from_pretrained(folder).save_pretrained(tmp_path / "target")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "target").exists()
    FastAttributor.from_pretrained(folder).save_pretrained(tmp_path / "target")
    assert len(FastAttributor.from_pretrained(tmp_path / "target")) == 60
