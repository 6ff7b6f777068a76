"""Changes: no removal is lost, whoever writes, reads, dies or runs out of disk meanwhile, and what left is found in no file."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fastattr import ArtifactDamagedError, FastattrError, FastAttributor, InputError
from fastattr.attributor import bases, changes, load
from fastattr.attributor.folder import seal
from fastattr.attributor.receipts import decode_embedding, verify
from fastattr.core.files import read_json, write_json
from tests.made import QUERY, base_features, everything, names, write_attributor

ALL = 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_attributor(tmp_path / "attributor")


def added(attributor: FastAttributor, name: str, **fields: str) -> None:
    """Take in one image whose embedding is the query, so that it comes first."""
    attributor.add_features(QUERY[None], ["c"], [{"image_id": name, **fields}], thumbnails=[b"thumbnail of " + name.encode()])


@pytest.mark.parametrize("other", ["remove", "compact"])
def test_a_change_that_lands_while_a_reader_loads_is_seen(folder, monkeypatch, other):
    """The reader took its stamp after config.json: it never saw the removal, and its own next change undid it."""
    gone = names(FastAttributor.from_pretrained(folder), QUERY, 1)[0]
    real = load.LightStudent

    def slow(*arguments, **options):
        monkeypatch.setattr(load, "LightStudent", real)
        writer = FastAttributor.from_pretrained(folder)
        writer.remove([gone], reason="opt-out")
        if other == "compact":
            writer.compact()
        return real(*arguments, **options)

    monkeypatch.setattr(load, "LightStudent", slow)
    reader = FastAttributor.from_pretrained(folder)
    assert gone not in names(reader, QUERY, ALL - 1)
    reader.update({"base-1": {"license": "X"}})
    again = FastAttributor.from_pretrained(folder)
    assert again.has_left(gone)
    assert gone not in names(again, QUERY, ALL - 1)


def test_every_question_is_answered_from_the_newest_version(folder):
    """An open page went on listing a person for hours after the opt-out."""
    reader, writer = FastAttributor.from_pretrained(folder), FastAttributor.from_pretrained(folder)
    receipt = reader.attribute_features(QUERY[None], ["p"], 3)[0].to_dict()
    gone = receipt["results"][0]["image_id"]
    writer.remove([gone])
    asks = {
        "catalog": lambda: gone not in reader.catalog["image_id"].to_pylist(),
        "len": lambda: len(reader) == ALL - 1,
        "has_left": lambda: reader.has_left(gone),
        "versions": lambda: reader.versions() == writer.versions(),
        "info": lambda: reader.info()["images"] == ALL - 1,
        "replay": lambda: reader.replay(decode_embedding(receipt), "p", 1).results[0].image_id != gone,
        "verify": lambda: any("has been removed" in line for line in verify(receipt, reader)),
        "history": lambda: reader.history()[-1]["image_ids"] == [gone],
        "where": lambda: gone not in names(reader, QUERY, 20, where={"creator": ["Ada", "Bob"]}),
        "read_info": lambda: load.read_info(folder)["images"] == ALL - 1,
    }
    for what, holds in asks.items():
        fresh = FastAttributor.from_pretrained(folder)
        reader = fresh if what == "replay" else reader
        assert holds(), what


def test_threads_share_an_attributor_beside_a_writer(folder):
    """Two refreshes that interleaved put an old catalogue under a new version, for good."""
    shared, writer = FastAttributor.from_pretrained(folder), FastAttributor.from_pretrained(folder)
    removed: list[str] = []
    problems: list[str] = []
    done = threading.Event()

    def read() -> None:
        last = 0
        while not done.is_set():
            known = list(removed)
            answer = shared.attribute_features(QUERY[None], ["x"], 20)[0]
            version = answer.versions["catalog_version"]
            if version < last or {result.image_id for result in answer.results} & set(known):
                problems.append(f"{version} after {last}")
            last = version

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for step in range(12):
        (writer if step % 2 else shared).remove([f"base-{step}"])
        removed.append(f"base-{step}")
        if step == 6:
            writer.compact()
    done.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert everything(shared, QUERY) == everything(FastAttributor.from_pretrained(folder), QUERY)


@pytest.mark.parametrize(
    ("where", "what"),
    [
        (bases, "write_base"),
        (bases, "write_config"),
        (changes, "_write_state"),
        (changes, "erase_traces"),
        (bases, "sweep"),
        (bases, "write_json"),
        (bases, "_sync"),
    ],
)
def test_a_compaction_that_fails_anywhere_loses_nothing(folder, monkeypatch, where, what):
    """A new base and the emptied database are two files: killed in between, all changes would count twice or never."""
    attributor = FastAttributor.from_pretrained(folder)
    added(attributor, "new", creator="Eve")
    attributor.remove(["base-3"])
    attributor.update({"base-4": {"creator": "Cyd"}})
    before = everything(attributor, QUERY)
    real, calls = getattr(where, what), []

    def fail(*arguments, **options):
        calls.append(what)
        if what == "sweep" and len(calls) == 1:  # the sweep before the compaction
            return real(*arguments, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(where, what, fail)
    with pytest.raises(OSError, match="No space"):
        attributor.compact()
    monkeypatch.undo()
    for opened in (attributor, FastAttributor.from_pretrained(folder)):
        assert everything(opened, QUERY) == pytest.approx(before, abs=1e-6)
        assert opened.has_left("base-3")
    added(FastAttributor.from_pretrained(folder), "newer")
    attributor.compact()
    after = FastAttributor.from_pretrained(folder)
    assert everything(after, QUERY) == pytest.approx(before | {"newer": 1.0}, abs=1e-3)
    assert {row["image_id"]: row["creator"] for row in after.catalog.to_pylist()}["base-4"] == "Cyd"
    assert {path.name for path in folder.iterdir() if "-v" in path.name} <= read_json(folder / "config.json")["sha256"].keys()


def test_what_left_is_found_in_no_file(folder, tmp_path):
    """'Removed' is a promise about the disk and about what is passed on, not only about answers."""
    vector = base_features(1, seed=123)[0]
    attributor = FastAttributor.from_pretrained(folder)
    marks = [b"caption of one who left", b"picture of one who left", vector.astype("<f2").tobytes(), vector.tobytes()]
    fields = [{"image_id": "leaves", "creator": "Lea"}]
    attributor.add_features(vector[None], [marks[0].decode()], fields, thumbnails=[marks[1]])
    attributor.remove(["leaves", "base-5"])
    attributor.save_pretrained(tmp_path / "saved")
    attributor.compact()
    attributor.save_pretrained(tmp_path / "again")
    own = base_features(ALL)[5]
    marks += [own.astype("<f2").tobytes()]
    for place in (folder, tmp_path / "saved", tmp_path / "again"):
        kept = FastAttributor.from_pretrained(place)
        assert kept.has_left("leaves")
        assert kept.has_left("base-5")
        assert "caption 5" not in kept.catalog["caption"].to_pylist()
        for path in place.rglob("*"):
            data = path.read_bytes()
            assert [mark for mark in marks if mark in data] == [], path


def test_all_images_may_leave_and_others_come(folder, tmp_path):
    """The last opt-out must be kept like the first."""
    attributor = FastAttributor.from_pretrained(folder)
    attributor.remove([f"base-{row}" for row in range(ALL)])
    for _ in range(2):
        assert len(attributor) == 0
        with pytest.raises(InputError, match="every image has left"):
            names(attributor, QUERY, 1)
        attributor.compact()
        attributor = FastAttributor.from_pretrained(folder)
    attributor.save_pretrained(tmp_path / "empty")
    added(attributor, "first")
    assert names(attributor, QUERY, 1) == ["first"]
    attributor.compact()
    assert names(FastAttributor.from_pretrained(folder), QUERY, 1) == ["first"]


def with_journal(folder: Path) -> None:
    """Turn a folder into one of format 3, with three changes in its journal."""
    vector = base64.b64encode(QUERY.astype("<f2").tobytes()).decode()
    entries = [
        {"operation": "add", "images": [{"image_id": "old", "caption": "c", "embedding": vector}]},
        {"operation": "remove", "image_ids": ["base-3"], "reason": "asked"},
        {"operation": "update", "images": [{"image_id": "base-4", "creator": "Cyd"}, {"image_id": "old", "creator": "Eve"}]},
    ]
    lines = [json.dumps({"version": 2 + i, "time": "2026-01-01T00:00:00+00:00", **each}) for i, each in enumerate(entries)]
    data = ("\n".join(lines) + "\n").encode()
    (folder / "journal.jsonl").write_bytes(data + b'{"half a li')
    config = read_json(folder / "config.json")
    config |= {"format_version": 3, "catalog_version": 4, "journal_bytes": len(data)}
    config["files"] |= {"journal": "journal.jsonl"}
    config["sha256"] |= {"journal.jsonl": hashlib.sha256(data).hexdigest()}
    write_json(folder / "config.json", seal(config))


@pytest.mark.parametrize("killed", [False, True])
def test_a_journal_of_format_3_is_taken_over_by_the_first_change(folder, tmp_path, monkeypatch, killed):
    """Removals in an older attributor must hold, before the upgrade, after it, and when it is killed halfway."""
    with_journal(folder)
    attributor = FastAttributor.from_pretrained(folder)
    assert (names(attributor, QUERY, 1), attributor.versions()["catalog_version"]) == (["old"], 4)
    assert [entry["operation"] for entry in attributor.history()] == ["add", "remove", "update"]
    attributor.save_pretrained(tmp_path / "saved")
    if killed:
        monkeypatch.setattr(bases, "write_config", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            attributor.remove(["base-6"])
        monkeypatch.undo()
        assert FastAttributor.from_pretrained(folder).has_left("base-3")
    attributor.remove(["base-6"])
    for place, gone in ((folder, ["base-3", "base-6"]), (tmp_path / "saved", ["base-3"])):
        opened = FastAttributor.from_pretrained(place)
        assert opened.config["format_version"] == 4
        assert not set(names(opened, QUERY, ALL + 1 - len(gone))) & set(gone)
        assert all(opened.has_left(name) for name in gone)
        creators = {row["image_id"]: row["creator"] for row in opened.catalog.to_pylist()}
        assert (creators["base-4"], creators["old"]) == ("Cyd", "Eve")
    assert [entry["version"] for entry in FastAttributor.from_pretrained(folder).history()] == [2, 3, 4, 5]
    assert not (folder / "journal.jsonl").exists()


def test_a_damaged_or_foreign_database_is_refused_with_the_way_out(folder, tmp_path):
    """Falling back to the base without a word would bring back everyone who had left."""
    attributor = FastAttributor.from_pretrained(folder)
    attributor.remove(["base-3"])
    other = write_attributor(tmp_path / "other", seed=1)
    shutil.copyfile(folder / changes.FILE, other / changes.FILE)
    with pytest.raises(ArtifactDamagedError, match=r"delete changes.sqlite to go back"):
        FastAttributor.from_pretrained(other)
    with sqlite3.connect(folder / changes.FILE) as connection:
        connection.execute("DELETE FROM images")
    connection.close()
    with pytest.raises(ArtifactDamagedError, match="rows are missing"):
        FastAttributor.from_pretrained(folder)
    (folder / changes.FILE).write_bytes(b"no database" * 1000)
    with pytest.raises(ArtifactDamagedError, match="Put back a copy"):
        FastAttributor.from_pretrained(folder)


def test_without_shared_memory_a_rollback_journal_is_kept(folder, monkeypatch):
    """The write-ahead log of a folder on NFS is silently wrong between machines."""
    monkeypatch.setattr(changes, "shares_memory", lambda _: False)
    attributor = FastAttributor.from_pretrained(folder)
    attributor.remove(["base-3"])
    with sqlite3.connect(folder / changes.FILE) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    connection.close()
    assert FastAttributor.from_pretrained(folder).has_left("base-3")


def test_a_change_that_cannot_be_written_is_an_error_and_nothing_changes(folder, monkeypatch):
    """'removed' with exit code 0 on a full disk is a broken promise."""
    attributor = FastAttributor.from_pretrained(folder)
    attributor.remove(["base-1"])
    monkeypatch.setattr(changes, "_write_state", lambda *_: (_ for _ in ()).throw(sqlite3.OperationalError("disk is full")))
    with pytest.raises(InputError, match="nothing was changed"):
        attributor.remove(["base-2"])
    monkeypatch.undo()
    assert not attributor.has_left("base-2")
    attributor.remove(["base-2"])
    assert FastAttributor.from_pretrained(folder).has_left("base-2")


FORK = """
import os, sys
import numpy as np
from fastattr import FastAttributor
attributor, queries = FastAttributor.from_pretrained(sys.argv[1]), np.load(sys.argv[2])
def ask(attributor):
    return [[r.image_id for r in a.results] for a in attributor.attribute_features(queries, ["x"] * len(queries), 20)]
ask(attributor)
child = os.fork()
if child == 0:
    attributor.remove(["base-4"])
    os._exit(0 if ask(attributor) == ask(FastAttributor.from_pretrained(sys.argv[1])) else 1)
assert os.waitpid(child, 0)[1] == 0
attributor.remove(["base-5"])
assert attributor.has_left("base-4") and attributor.has_left("base-5")
"""


def test_a_forked_child_answers_like_its_parent(folder, tmp_path):
    """FAISS waits in a forked child for threads that are not there, and SQLite forbids a connection to be taken along."""
    np.save(tmp_path / "queries.npy", base_features(200, seed=3))
    command = [sys.executable, "-c", FORK, str(folder), str(tmp_path / "queries.npy")]
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", ["o'brien", "x'] or image_id not in ['", "\u202egnp", "a\nb", "'; DROP TABLE images; --", "-"])
def test_ids_are_data(folder, name):
    """An id that is spliced into a statement empties a table."""
    attributor = FastAttributor.from_pretrained(folder)
    added(attributor, name)
    attributor.update({name: {"creator": "Eve'; --"}})
    attributor.remove([name])
    assert FastAttributor.from_pretrained(folder).has_left(name)
    assert len(attributor) == ALL


def test_the_folder_may_be_read_only(folder):
    """Serving from a read-only disk is usual; SQLite wants to write even to read."""
    attributor = FastAttributor.from_pretrained(folder)
    attributor.remove(["base-3"])
    attributor.compact()
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path == folder else 0o444)
    try:
        reader = FastAttributor.from_pretrained(folder)
        assert reader.has_left("base-3")
        assert len(names(reader, QUERY, 10)) == 10
        if os.geteuid() != 0:  # root may write everywhere
            with pytest.raises(FastattrError, match="can't be changed"):
                reader.remove(["base-4"])
    finally:
        folder.chmod(0o755)


def test_many_updates_are_as_few(folder):
    """From a certain number on they are folded into columns: another path to the same answers."""
    attributor = FastAttributor.from_pretrained(folder)
    attributor.update({f"base-{row}": {"creator": f"c{row % 7}", "date": f"2026-01-{row % 28 + 1:02d}"} for row in range(50)})
    one_by_one, folded = attributor.catalog.to_pylist(), pytest.MonkeyPatch()
    folded.setattr("fastattr.attributor.catalogue.FOLD", 3)
    try:
        other = FastAttributor.from_pretrained(folder)
        assert other.catalog.to_pylist() == one_by_one
        where = {"creator": ["c1", "c2"], "since": "2026-01-05", "until": "2026-01"}
        assert names(other, QUERY, ALL, where=where) == names(attributor, QUERY, ALL, where=where) != []
        other.update({"base-3": {"creator": "c1"}})
        assert len(names(other, QUERY, ALL, where=where)) == len(names(attributor, QUERY, ALL, where=where))
    finally:
        folded.undo()


def test_vectors_come_back_as_they_were_given(folder):
    """Half precision, read with the wrong byte order or width, still looks like a unit vector."""
    attributor = FastAttributor.from_pretrained(folder)
    fresh = base_features(4, seed=9)
    attributor.add_features(fresh, ["c"] * 4, [{"image_id": f"n{i}"} for i in range(4)])
    table = FastAttributor.from_pretrained(folder)
    rows = [table.catalog["image_id"].to_pylist().index(f"n{i}") for i in range(4)]
    np.testing.assert_allclose(table.embeddings(np.array(rows)), fresh, atol=1e-3)
