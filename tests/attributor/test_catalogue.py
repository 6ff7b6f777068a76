"""A living catalogue: images come and leave, every version is consistent, killed writers and damaged files do no harm."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fastattr import ArtifactDamagedError, FastattrError, FastAttributor, InputError
from fastattr.attributor.catalogue import Catalogue
from fastattr.attributor.changes import FILE, Image
from fastattr.attributor.folder import read_config, seal
from fastattr.core.files import read_json, sha256_file, write_json
from fastattr.core.models import ASSETS
from fastattr.index.search import open_ranked
from tests.made import QUERY, WIDTH, base_features, everything, names, write_attributor
from tests.tiny import draw, unit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_attributor(tmp_path / "attributor")


@pytest.mark.parametrize("factory", ["SQfp16", "SQ8", "Flat", "IVF4,SQ4", "IVF4,SQ8", "HNSW8"])
def test_search_equals_a_slow_loop_after_any_changes(tmp_path, factory):
    """Rows that slip against ids after a removal would name other people's images."""
    folder = write_attributor(tmp_path / "a", factory=factory)
    near = 0.15 if "SQ8" in factory else 0.002  # SQ8 clips what lies outside the range it was trained on
    attributor = FastAttributor.from_pretrained(folder)
    truth = dict(zip((f"base-{row}" for row in range(60)), base_features(60), strict=True))
    rng = np.random.default_rng(1)
    for step in range(4):
        fresh = unit(rng, 5, WIDTH)
        ids = [f"new-{step}-{i}" for i in range(5)]
        attributor.add_features(fresh, ["c"] * 5, [{"image_id": image_id} for image_id in ids])
        truth.update(zip(ids, fresh, strict=True))
        gone = rng.choice(sorted(truth), 6, replace=False).tolist()
        attributor.remove(gone)
        for image_id in gone:
            del truth[image_id]
        if step == 2:
            attributor.compact()
        for opened in (attributor, FastAttributor.from_pretrained(folder)):
            found = everything(opened, QUERY)
            assert set(found) == set(truth)
            expected = {image_id: float(vector @ QUERY) for image_id, vector in truth.items()}
            np.testing.assert_allclose([found[each] for each in expected], list(expected.values()), atol=near)
            top = names(opened, QUERY, 5)
            assert [expected[each] for each in top] == pytest.approx(sorted(expected.values(), reverse=True)[:5], abs=near)
            assert opened.catalog["image_id"].to_pylist() == [
                each for each in opened.catalog["image_id"].to_pylist() if each in truth
            ]
            assert len(opened.catalog) == len(truth) == len(opened)


@pytest.mark.parametrize("path", ["memory", "journal", "compacted", "saved", "other reader", "sharded", "restricted"])
def test_a_removed_image_is_named_on_no_path(tmp_path, path):
    """Opt-out is a promise: one forgotten path breaks it."""
    folder = write_attributor(tmp_path / "a", shard_rows=20 if path == "sharded" else 0)
    reader = FastAttributor.from_pretrained(folder)
    gone = names(reader, QUERY, 3)
    attributor = FastAttributor.from_pretrained(folder)
    attributor.remove(gone, reason="opt-out")
    if path == "compacted":
        attributor.compact()
    if path == "saved":
        attributor.save_pretrained(tmp_path / "saved")
        attributor = FastAttributor.from_pretrained(tmp_path / "saved")
    if path in {"journal", "sharded"}:
        attributor = FastAttributor.from_pretrained(folder)
    if path == "other reader":
        attributor = reader
    where = {"creator": ["Ada", "Bob"]} if path == "restricted" else None
    assert not set(names(attributor, QUERY, 57, where=where)) & set(gone)
    assert not set(attributor.catalog["image_id"].to_pylist()) & set(gone)
    with pytest.raises(InputError, match="between 1 and 57"):
        names(attributor, QUERY, 58)
    with pytest.raises(InputError, match="was removed"):
        attributor.add_features(base_features(1), ["c"], [{"image_id": gone[0]}])
    attributor.add_features(QUERY[None], ["c"], [{"image_id": gone[0]}], readmit=True)
    assert names(attributor, QUERY, 1) == [gone[0]]


def test_compaction_changes_no_answer_and_erases_what_left(folder):
    """Rows are copied, not encoded anew from something coarser; 'removed' must mean gone from the disk in the end."""
    attributor = FastAttributor.from_pretrained(folder)
    attributor.add_features(base_features(9, seed=5), ["secret caption"] * 9, [{"image_id": f"new-{i}"} for i in range(9)])
    attributor.remove(["new-3", "base-7"])
    attributor.update({"base-8": {"creator": "Cyd", "date": "2026-01-02"}, "new-4": {"caption": "told"}})
    before, table = everything(attributor, QUERY), attributor.catalog
    attributor.compact()
    assert everything(attributor, QUERY) == pytest.approx(before, abs=1e-6)
    reopened = FastAttributor.from_pretrained(folder)
    assert everything(reopened, QUERY) == pytest.approx(before, abs=1e-6)
    assert reopened.catalog.to_pylist() == table.to_pylist()
    assert {record["image_id"]: record for record in reopened.catalog.to_pylist()}["base-8"]["creator"] == "Cyd"
    config = read_json(folder / "config.json")
    kept = {path.name for path in folder.iterdir() if not path.name.startswith(FILE)}
    assert kept - {".lock"} == {"config.json", *config["sha256"]}
    (line,) = reopened.history()
    assert line["removed"] == ["new-3", "base-7"]  # their ids, and nothing else of them
    assert set(line) == {"version", "time", "operation", "removed"}
    assert not {"new-3", "base-7"} & set(reopened.catalog["image_id"].to_pylist())
    attributor.remove(["new-3"])  # a removal asked for twice is no error, even after compaction


def test_shards_stay_shards_when_compacted(tmp_path):
    """An index that fits one machine only as shards must not become one file."""
    folder = write_attributor(tmp_path / "a", shard_rows=25)
    attributor = FastAttributor.from_pretrained(folder)
    attributor.remove([f"base-{row}" for row in range(12)])
    before = everything(attributor, QUERY)
    attributor.compact()
    assert [shard["rows"] for shard in read_json(folder / "config.json")["index_shards"]] == [25, 23]
    assert everything(FastAttributor.from_pretrained(folder), QUERY) == pytest.approx(before)


def test_restriction_equals_filtering_afterwards(folder):
    """A restriction that is applied after the top k would return too few, or none."""
    attributor = FastAttributor.from_pretrained(folder)
    attributor.add_features(
        base_features(6, seed=3),
        ["c"] * 6,
        [{"image_id": f"new-{i}", "creator": "Ada", "date": f"2026-0{i + 1}-15"} for i in range(6)],
    )
    attributor.update({"base-0": {"creator": "Ada"}, "base-1": {"creator": "Cyd", "date": "2026-03-01"}})
    everyone = names(attributor, QUERY, 66)
    records = {record["image_id"]: record for record in attributor.catalog.to_pylist()}
    ada = [each for each in everyone if records[each]["creator"] == "Ada"]
    assert names(attributor, QUERY, 10, where={"creator": "Ada"}) == ada[:10]
    assert names(attributor, QUERY, 66, where={"creator": ["Ada", "Cyd"]}) == [
        each for each in everyone if records[each]["creator"] in {"Ada", "Cyd"}
    ]
    spring = [each for each in everyone if "2026-02" <= records[each].get("date", "")[:7] <= "2026-04"]
    assert names(attributor, QUERY, 66, where={"since": "2026-02-01", "until": "2026-04-30"}) == spring
    assert len(spring) == 4
    assert names(attributor, QUERY, 5, where={"creator": "nobody"}) == []
    with pytest.raises(InputError, match="not by 'colour'"):
        names(attributor, QUERY, 5, where={"colour": "red"})


def test_an_attributor_with_encoders_takes_in_images_and_finds_them(tiny_run, tmp_path):
    """The planted copy of a query comes first, with its thumbnail; the trained weights are not touched."""
    attributor = FastAttributor.from_pretrained(tiny_run / "attributor")
    attributor.save_pretrained(tmp_path / "own")
    attributor = FastAttributor.from_pretrained(tmp_path / "own")
    picture = draw("red", "ring", "framed").rotate(30)
    (image_id,) = attributor.add([picture], ["a ring of another kind"], [{"creator": "Eve"}])
    first = attributor.attribute(picture, "a ring of another kind", k=1).results[0]
    assert (first.image_id, first.creator, first.similarity) == (image_id, "Eve", pytest.approx(1, abs=2e-3))
    answer = FastAttributor.from_pretrained(tmp_path / "own").attribute(picture, "a ring of another kind", k=3)
    assert answer.thumbnail(image_id).size == (16, 16)
    weights = "model.safetensors"
    assert sha256_file(tmp_path / "own" / weights) == sha256_file(tiny_run / "attributor" / weights)
    assert [entry["operation"] for entry in attributor.history()] == ["add"]


@pytest.mark.parametrize(
    "change",
    [
        lambda attributor: attributor.add_features(QUERY[None], ["c"], [{"image_id": "base-1"}]),
        lambda attributor: attributor.add_features(QUERY[None], ["c"], [{"image_id": "x", "colour": "red"}]),
        lambda attributor: attributor.add_features(QUERY[None] * np.nan, ["c"], [{"image_id": "x"}]),
        lambda attributor: attributor.add_features(np.stack([QUERY, QUERY]), ["c"] * 2, [{"image_id": "x"}, {"image_id": "x"}]),
        lambda attributor: attributor.remove(["base-1", "never"]),
        lambda attributor: attributor.update({"never": {"creator": "Eve"}}),
        lambda attributor: attributor.update({"base-1": {"image_id": "base-2"}}),
    ],
)
def test_a_refused_change_changes_nothing(folder, change):
    """Half a change would be a version that nobody asked for."""
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    with pytest.raises(InputError):
        change(FastAttributor.from_pretrained(folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"} == before


def test_two_writers_lose_nothing(folder):
    """A writer that builds upon a version it read before the lock would overwrite the other's change."""
    one, two = FastAttributor.from_pretrained(folder), FastAttributor.from_pretrained(folder)
    for step in range(6):
        writer = (one, two)[step % 2]
        writer.add_features(base_features(1, seed=step), ["c"], [{"image_id": f"new-{step}"}])
        if step == 3:
            one.compact()
    for attributor in (one, two, FastAttributor.from_pretrained(folder)):
        assert {f"new-{step}" for step in range(6)} <= set(names(attributor, QUERY, 66))
    assert one.versions()["catalog_version"] == 8


def _write_until_killed(folder: str, acknowledged: str, seed: int) -> None:
    """Random changes to a folder; each is noted in a file before it is begun and after it is done."""
    attributor = FastAttributor.from_pretrained(folder)
    rng = np.random.default_rng(seed)
    there = set(attributor.catalog["image_id"].to_pylist())
    with Path(acknowledged).open("a", buffering=1) as log:
        for step in range(100_000):
            kind = rng.choice(["add", "remove", "compact"], p=[0.55, 0.41, 0.04])
            ids = [f"s{seed}-{step}"] if kind == "add" else rng.choice(sorted(there), 1).tolist() if there else []
            log.write(json.dumps(["begin", str(kind), ids]) + "\n")
            if kind == "add":
                attributor.add_features(unit(rng, 1, WIDTH), ["c"], [{"image_id": ids[0]}])
                there |= set(ids)
            elif kind == "remove" and len(there) > 5:
                attributor.remove(ids)
                there -= set(ids)
            elif kind == "compact":
                attributor.compact()
            log.write(json.dumps(["done", str(kind), ids]) + "\n")


def check_log(lines: list[list], found: set[str], present: set[str]) -> None:
    """What a killed writer had acknowledged holds; what it was about to do may hold or not."""
    expected, open_change = set(present), None
    for state, kind, ids in lines:
        if state == "begin":
            open_change = (kind, set(ids))
        else:
            expected = expected | set(ids) if kind == "add" else expected - set(ids) if kind == "remove" else expected
            open_change = None
    uncertain = open_change[1] if open_change else set()
    assert expected - uncertain <= found
    assert found <= expected | uncertain


def start_writer(folder: Path, log: Path, seed: int) -> BaseProcess:
    """A process that changes the folder; spawned, since one forked from a process with OpenMP's threads may hang."""
    process = multiprocessing.get_context("spawn").Process(target=_write_until_killed, args=(str(folder), str(log), seed))
    process.start()
    while not log.exists() or not log.stat().st_size:
        assert process.is_alive()
        time.sleep(0.01)
    return process


def test_killed_writers_lose_nothing_and_bring_nothing_back(folder, tmp_path):
    """A process may die between any two system calls; `benchmarks/catalogue.py` does this two hundred times."""
    rng = np.random.default_rng(0)
    present = {f"base-{row}" for row in range(60)}
    for number in range(8):
        log = tmp_path / f"log-{number}"
        process = start_writer(folder, log, number)
        time.sleep(rng.uniform(0.0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        attributor = FastAttributor.from_pretrained(folder)
        found = set(names(attributor, QUERY, len(attributor)))
        check_log([json.loads(line) for line in log.read_text().splitlines() if line.endswith("]")], found, present)
        present = found


def test_readers_see_one_version_while_a_writer_publishes(folder, tmp_path):
    """An index of one version with the catalogue of another would name wrong images, and crash nothing."""
    process = start_writer(folder, tmp_path / "log", 1)
    try:
        kept = FastAttributor.from_pretrained(folder)
        while kept.versions()["catalog_version"] <= 25:
            assert process.is_alive()
            for attributor in (kept, FastAttributor.from_pretrained(folder)):
                answer = attributor.attribute_features(QUERY[None], ["x"], 5)[0]
                assert len({result.image_id for result in answer.results}) == 5
                assert answer.versions["catalog_version"] == attributor.config["catalog_version"]
    finally:
        process.kill()
        process.join()


# ---- damage


def damaged_copies(folder: Path, target: Path, *, seed: int, count: int):
    """Copies of a folder with one file truncated, bit-flipped, emptied or lengthened each."""
    rng = np.random.default_rng(seed)
    files = ["config.json", *sorted(read_json(folder / "config.json")["sha256"])]
    for number in range(count):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder, target)
        file = target / files[number % len(files)]
        data = bytearray(file.read_bytes())
        how = ("flip", "truncate", "append", "empty")[int(rng.choice(4, p=[0.7, 0.15, 0.1, 0.05]))]
        if how == "flip" and data:
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        elif how == "truncate":
            data = data[: int(rng.integers(len(data) + 1))]
        elif how == "append":
            data += bytes(rng.integers(0, 256, 7, dtype=np.uint8))
        else:
            data = bytearray()
        if bytes(data) != file.read_bytes():
            file.write_bytes(data)
            yield f"{file.name} {how}"


@pytest.mark.parametrize("factory", ["SQfp16", "IVF4,SQ4"])
def test_damage_is_a_clear_error_or_changes_nothing(tmp_path, factory):
    """A flipped bit that FAISS reads may crash the process; one in a vector or a name may change an answer unseen."""
    folder = write_attributor(tmp_path / "a", factory=factory)
    attributor = FastAttributor.from_pretrained(folder)
    attributor.add_features(base_features(3, seed=8), ["c"] * 3, [{"image_id": f"new-{i}"} for i in range(3)])
    attributor.remove(["base-3"])
    expected = attributor.attribute_features(QUERY[None], ["x"], 62)[0].results
    errors = 0
    for what in damaged_copies(folder, tmp_path / "damaged", seed=4, count=120):
        try:
            found = FastAttributor.from_pretrained(tmp_path / "damaged").attribute_features(QUERY[None], ["x"], 62)[0].results
        except FastattrError:
            errors += 1
        else:
            assert found == expected, what
    assert errors > 100


def test_files_of_another_attributor_are_refused(tmp_path):
    """Two models' files have the same names and shapes; mixed, they answer at random."""
    one, two = write_attributor(tmp_path / "one"), write_attributor(tmp_path / "two", factory="IVF4,SQ4", seed=1)
    three = write_attributor(tmp_path / "three", factory="IVF4,SQ4", seed=2)
    for source, target in ((one, two), (three, two), (two, three), (two, one)):
        for file in ("index.faiss", "vectors.f16", "vectors.sha256", "model.safetensors", "catalog.parquet"):
            other = source / file
            if not other.exists() or not (target / file).exists() or sha256_file(other) == sha256_file(target / file):
                continue
            mixed = tmp_path / "mixed"
            shutil.rmtree(mixed, ignore_errors=True)
            shutil.copytree(target, mixed)
            shutil.copyfile(other, mixed / file)
            with pytest.raises(ArtifactDamagedError):
                FastAttributor.from_pretrained(mixed).attribute_features(QUERY[None], ["x"], 5)


def test_a_config_changed_by_hand_is_refused(folder):
    """Its numbers decide how the index is read."""
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "feature_dim": WIDTH + 1})
    with pytest.raises(ArtifactDamagedError, match="seal"):
        read_config(folder)
    write_json(folder / "config.json", seal(config))
    assert read_config(folder) == config


def test_older_formats_still_answer(tmp_path):
    """Attributors on the Hub do not change when the library does; once changed they carry the new format number."""
    shutil.copytree(ASSETS / "emoji" / "attributor", tmp_path / "old")
    config = read_json(tmp_path / "old" / "config.json")
    gone = ("calibration.safetensors", "plain.faiss", "generated.parquet")
    for file in gone:
        (tmp_path / "old" / file).unlink()
    # What format 2 held, and nothing else.
    names_of_2 = ("fastattr_version", "encoders", "encoder_fingerprints", "captions", "feature_dim", "index", "index_shards")
    names_of_2 += ("corpus_fingerprint", "generator_fingerprint", "teacher", "training_queries")
    old = {"format_version": 2, **{name: config[name] for name in names_of_2}}
    old["student"] = {name: config["student"][name] for name in ("embed_dim", "hidden", "input_norm")}
    old["sha256"] = {file: checksum for file, checksum in config["sha256"].items() if file not in gone}
    write_json(tmp_path / "old" / "config.json", old)
    attributor = FastAttributor.from_pretrained(tmp_path / "old")
    assert attributor.config["format_version"] == 2
    feature = np.random.default_rng(0).standard_normal(attributor.config["feature_dim"]).astype(np.float32)
    before = names(attributor, feature, 50)
    attributor.save_pretrained(tmp_path / "own")
    own = FastAttributor.from_pretrained(tmp_path / "own")
    own.remove(before[:5])
    assert own.config["format_version"] == 4
    assert names(FastAttributor.from_pretrained(tmp_path / "own"), feature, 45) == before[5:]


def test_catalogue_versions_leave_earlier_ones_alone():
    """A reader in the middle of an answer holds an earlier version: a change must make another one."""
    vectors = base_features(10)
    table = pa.table({"image_id": [str(row) for row in range(10)], "caption": ["c"] * 10})
    first = Catalogue(table, Fixed(vectors))
    second = first.applied([Image("3", True, {})])
    new, told = Image("new", False, {}, QUERY.astype("<f2").tobytes(), place=1), Image("4", False, {"caption": "told"})
    third = second.applied([new, told])
    assert [len(each) for each in (first, second, third)] == [10, 9, 10]
    assert first.table.to_pylist() == table.to_pylist()
    assert "3" in [record["image_id"] for record in first.fetch(np.arange(10))]
    assert [record["caption"] for record in second.fetch(np.arange(9))] == ["c"] * 9
    dated = third.applied([Image("5", False, {"date": "2026-01-01"})])
    assert dated.table.to_pylist()[4]["date"] == "2026-01-01"
    assert third.table.to_pylist() == third.fetch(np.arange(10))
    assert third.fetch(third.search(QUERY[None], 1)[1][0])[0]["image_id"] == "new"


class Fixed:
    """A base that compares everything."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors, self.ntotal, self.reads_rows = vectors, len(vectors), True
        self.index = type("Index", (), {"ranges": [(0, len(vectors))]})

    def search(self, queries: np.ndarray, k: int, *, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = np.where(allowed, queries @ self.vectors.T, -np.inf)
        best = np.argsort(-values, axis=1)[:, : min(k, int(allowed.sum()))]
        return np.take_along_axis(values, best, axis=1), best


def test_no_vector_is_used_that_is_not_the_one_written(tmp_path):
    """Vectors are not read as a whole when an attributor is opened, so each must be checked when it is used."""
    folder = write_attributor(tmp_path / "a", factory="IVF4,SQ4")
    config = read_json(folder / "config.json")
    data = bytearray((folder / "vectors.f16").read_bytes())
    data[2 * WIDTH * 17] ^= 1
    (folder / "vectors.f16").write_bytes(data)
    ranked = open_ranked(folder, config, config["sha256"])
    assert ranked.take(np.array([16, 18])).shape == (2, WIDTH)
    with pytest.raises(ArtifactDamagedError, match="digests differ"):
        ranked.take(np.array([16, 17]))
