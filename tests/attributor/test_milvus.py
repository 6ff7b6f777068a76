"""Milvus answers as the attributor's own index does, embedded and over TCP, with removals and restrictions."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fastattr import ArtifactMismatchError, ArtifactNotFoundError, FastAttributor, InputError
from tests.made import QUERY, base_features, names, write_attributor

collection = pytest.importorskip("fastattr.attributor.collection", reason="pip install 'fastattr[milvus]'")
milvus = pytest.importorskip("fastattr.attributor.milvus")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A local TCP server; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = tmp_path_factory.mktemp("milvus")
    command = [Path(sys.executable).with_name("milvus-lite"), "server", "--host", "127.0.0.1"]
    if not command[0].exists():
        import milvus_lite

        command[0] = Path(milvus_lite.__file__).parents[4] / "bin" / "milvus-lite"
    process = subprocess.Popen([*command, "--data-dir", data, "--port", str(port)], stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while True:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize("where", ["file", "server"])
def test_milvus_answers_as_the_own_index_does(tmp_path, where, request):
    """Another metric, a rounding of ids or a filter that is applied too late would change answers and crash nothing."""
    uri = str(tmp_path / "milvus.db") if where == "file" else request.getfixturevalue("server")
    folder = write_attributor(tmp_path / "a", factory="Flat")
    attributor = FastAttributor.from_pretrained(folder)
    attributor.add_features(
        base_features(3, seed=5),
        ['a "quoted" caption'] * 3,
        [{"image_id": f"new-{i}", "date": f"2026-0{i + 1}-01"} for i in range(3)],
    )
    loaded = milvus.load(str(folder), uri)
    assert (loaded["images"], loaded["inserted"]) == (63, 63)
    remote = FastAttributor.from_pretrained(folder, index_uri=uri)
    own = attributor.attribute_features(QUERY[None], ["x"], 63)[0]
    other = remote.attribute_features(QUERY[None], ["x"], 63)[0]
    assert {r.image_id: r.caption for r in other.results} == {r.image_id: r.caption for r in own.results}
    similarity = {result.image_id: result.similarity for result in own.results}
    np.testing.assert_allclose(
        [r.similarity for r in other.results], [similarity[r.image_id] for r in other.results], atol=1e-3
    )
    assert names(remote, QUERY, 5) == names(attributor, QUERY, 5)
    for restriction in (
        {"creator": "Ada"},
        {"creator": ["Ada", ""], "license": ""},
        {"since": "2026-02-01"},
        {"until": "2026-02-01"},
        {"creator": 'x" or "a" == "a'},
    ):
        assert names(remote, QUERY, 20, where=restriction) == names(attributor, QUERY, 20, where=restriction), restriction
    with pytest.raises(InputError, match="not by 'colour'"):
        names(remote, QUERY, 5, where={"colour": "red"})


def test_removed_images_are_not_named_even_by_a_collection_that_lags_behind(tmp_path):
    """Between an opt-out and the next load nobody may be named who has left."""
    folder, uri = write_attributor(tmp_path / "a"), str(tmp_path / "milvus.db")
    milvus.load(str(folder), uri)
    attributor = FastAttributor.from_pretrained(folder)
    gone = names(attributor, QUERY, 4)
    attributor.remove(gone)
    attributor.add_features(QUERY[None], ["c"], [{"image_id": "new"}])
    attributor.update({"base-0": {"creator": "Eve"}})
    lagging = FastAttributor.from_pretrained(folder, index_uri=uri)
    assert names(lagging, QUERY, 10) == [each for each in names(attributor, QUERY, 11) if each != "new"]
    loaded = milvus.load(str(folder), uri)
    assert (loaded["inserted"], loaded["deleted"]) == (2, 4)
    current = FastAttributor.from_pretrained(folder, index_uri=uri)
    assert names(current, QUERY, 57) == names(attributor, QUERY, 57)
    assert names(current, QUERY, 5, where={"creator": "Eve"}) == ["base-0"]
    assert milvus.load(str(folder), uri)["inserted"] == 1  # what the journal adds is sent again, and nothing else


def test_limits_of_a_real_server_are_kept(tmp_path, monkeypatch):
    """Milvus Lite has no limits: code that passes here would fail on a cluster."""
    assert collection.rows_a_call(768) * (4 * 768 + 256 * len(collection.FIELDS)) < collection.MAX_CALL
    assert collection.queries_a_call(768, collection.MAX_TOPK) * 544 * collection.MAX_TOPK < collection.MAX_CALL
    folder, uri = write_attributor(tmp_path / "a"), str(tmp_path / "milvus.db")
    monkeypatch.setattr(collection, "MAX_CALL", 40_000)
    assert collection.rows_a_call(12) < 60
    milvus.load(str(folder), uri)
    remote = FastAttributor.from_pretrained(folder, index_uri=uri)
    queries = base_features(7, seed=9)
    attributor = FastAttributor.from_pretrained(folder)
    for own, other in zip(
        attributor.attribute_features(queries, ["x"] * 7, 20), remote.attribute_features(queries, ["x"] * 7, 20), strict=True
    ):
        assert [result.image_id for result in own.results] == [result.image_id for result in other.results]
    monkeypatch.setattr(collection, "MAX_TOPK", 50)
    with pytest.raises(InputError, match="at most 50 images"):
        names(remote, QUERY, 51)


def test_what_is_not_there_is_said(tmp_path):
    """'collection not found' would leave users with the server's words."""
    folder = write_attributor(tmp_path / "a")
    with pytest.raises(ArtifactNotFoundError, match="fill it with"):
        FastAttributor.from_pretrained(folder, index_uri=str(tmp_path / "milvus.db"))


HOSTILE = ("o'brien", "x'] or image_id not in ['", 'a "b"', "back\\slash", "new\nline", "{ids}", "%s", "\u00e9\U0001f600")
"""Image ids."""


def test_ids_are_data_whatever_they_hold(tmp_path):
    """A quote in one id broke every answer with it; a crafted one emptied the collection when it was removed."""
    folder, uri = write_attributor(tmp_path / "a"), str(tmp_path / "milvus.db")
    attributor = FastAttributor.from_pretrained(folder)
    features = base_features(len(HOSTILE), seed=8)
    attributor.add_features(features, ["c"] * len(HOSTILE), [{"image_id": name, "creator": name} for name in HOSTILE])
    assert milvus.load(str(folder), uri)["failed"] == {}
    remote = FastAttributor.from_pretrained(folder, index_uri=uri)
    for feature, name in zip(features, HOSTILE, strict=True):
        assert names(remote, feature, 1) == [name]
        assert names(remote, QUERY, 5, where={"creator": name}) == [name]
    for number, name in enumerate(HOSTILE):
        attributor.remove([name])
        assert milvus.load(str(folder), uri)["deleted"] == 1
        assert len(FastAttributor.from_pretrained(folder, index_uri=uri)) == 60 + len(HOSTILE) - number - 1


def test_long_texts_are_cut_and_ids_that_do_not_fit_are_named(tmp_path):
    """One caption too long failed the whole load of all others."""
    folder, uri = write_attributor(tmp_path / "a"), str(tmp_path / "milvus.db")
    attributor = FastAttributor.from_pretrained(folder)
    ids = ["long caption", "i" * 600, "fits"]
    attributor.add_features(base_features(3, seed=8), ["\u00e9" * 9000, "c", "c"], [{"image_id": name} for name in ids])
    loaded = milvus.load(str(folder), uri)
    assert list(loaded["failed"]) == ["i" * 600]
    assert "600 bytes" in loaded["failed"]["i" * 600]
    assert loaded["inserted"] == 62
    remote = FastAttributor.from_pretrained(folder, index_uri=uri)
    found = {result.image_id: result for result in remote.attribute_features(QUERY[None], ["x"], 62)[0].results}
    assert found["long caption"].caption == "\u00e9" * 2048
    assert "fits" in found
    assert milvus.load(str(folder), uri)["inserted"] == 2  # what was added is sent again, the base is not


def test_a_load_goes_on_where_milvus_refuses_a_row(tmp_path, monkeypatch):
    """Which row it was, and that the others are there, is what an operator needs to know."""
    folder, uri = write_attributor(tmp_path / "a"), str(tmp_path / "milvus.db")
    upsert = collection.MilvusClient.upsert

    def refusing(self, name, data, **options):
        if any(record["image_id"] == "base-7" for record in data):
            raise collection.MilvusException(message="row refused")
        return upsert(self, name, data, **options)

    with monkeypatch.context() as patch:
        patch.setattr(collection.MilvusClient, "upsert", refusing)
        loaded = milvus.load(str(folder), uri)
    assert list(loaded["failed"]) == ["base-7"]
    assert loaded["inserted"] == 59
    assert milvus.load(str(folder), uri) | {"collection": ""} == {
        "images": 60,
        "inserted": 1,
        "deleted": 0,
        "catalog_version": 1,
        "collection": "",
        "failed": {},
    }


def test_a_removal_counts_once_the_collection_confirms_it(tmp_path, monkeypatch):
    """A delete that a server forgets would leave an opted-out image to be named by others."""
    folder, uri = write_attributor(tmp_path / "a"), str(tmp_path / "milvus.db")
    milvus.load(str(folder), uri)
    FastAttributor.from_pretrained(folder).remove(["base-3"])
    with monkeypatch.context() as patch:
        patch.setattr(collection.MilvusClient, "delete", lambda *args, **options: {})
        with pytest.raises(ArtifactMismatchError, match=r"still holds 1 images .* 'base-3'"):
            milvus.load(str(folder), uri)
    assert milvus.load(str(folder), uri)["deleted"] == 1


def test_token_and_certificate_reach_every_connection(tmp_path, monkeypatch):
    """Searching connected without the token that loading was given."""
    given = []
    monkeypatch.setattr(collection, "MilvusClient", lambda **options: given.append(options))
    monkeypatch.setenv("FASTATTR_MILVUS_TOKEN", "ada:secret")
    monkeypatch.setenv("FASTATTR_MILVUS_CA", "ca.pem")
    collection.connect("https://milvus:19530")
    collection.connect("https://milvus:19530", "other")
    assert given[0] == {
        "uri": "https://milvus:19530",
        "token": "ada:secret",
        "timeout": 30,
        "secure": True,
        "server_pem_path": "ca.pem",
    }
    assert given[1]["token"] == "other"
