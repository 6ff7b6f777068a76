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

from fastattr import ArtifactNotFoundError, FastAttributor, InputError
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
