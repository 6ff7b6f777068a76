"""The server: the same answers as in the process, many at once, and a 4xx for whatever is hostile."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from fastattr import FastAttributor, InputError
from tests.made import QUERY, names, write_attributor
from tests.tiny import draw

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient

from fastattr.serving.http import ServeConfig, create_app, run


@pytest.fixture(scope="module")
def attributor(tiny_run) -> FastAttributor:
    return FastAttributor.from_pretrained(tiny_run / "attributor", thumbnails=False)


@pytest.fixture(scope="module")
def client(attributor) -> Iterator[TestClient]:
    config = ServeConfig(max_bytes=200_000, max_pixels=100_000)
    with TestClient(create_app(attributor, config), raise_server_exceptions=False) as client:
        yield client


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def post(client: TestClient, data: bytes, prompt: str = "red ring", **fields: object):
    return client.post("/attribute", files={"image": ("x.png", data)}, data={"prompt": prompt, **fields})


def test_the_answer_is_the_receipt_of_the_same_call(client, attributor):
    """A server that encodes otherwise would answer otherwise."""
    answer = post(client, png(draw("red", "ring", "plain")), k=7)
    expected = attributor.attribute(draw("red", "ring", "plain"), "red ring", k=7).to_dict()
    assert answer.status_code == 200
    found = answer.json()
    assert [row["image_id"] for row in found["results"]] == [row["image_id"] for row in expected["results"]]
    assert (found["versions"], found["query"]["sha256"]) == (expected["versions"], expected["query"]["sha256"])
    features = np.random.default_rng(0).standard_normal(attributor.config["feature_dim"])
    answer = client.post(
        "/attribute/features", json={"features": features.tolist(), "prompt": "p", "k": 4, "where": {"creator": "Ada"}}
    )
    assert [row["image_id"] for row in answer.json()["results"]] == names(
        attributor, features.astype(np.float32), 4, where={"creator": "Ada"}
    )


def test_requests_that_wait_are_answered_together_each_with_its_own(attributor):
    """Answers that slip against requests would go to the wrong people."""
    app = create_app(attributor, ServeConfig())
    pictures = [
        draw(colour, shape, "plain") for colour in ("red", "blue", "green") for shape in ("ring", "square", "circle")
    ] * 3
    expected = [attributor.attribute(picture, f"p{i}", k=1 + i % 5) for i, picture in enumerate(pictures)]
    found: dict[int, dict] = {}
    with TestClient(app) as client:

        def ask(number: int) -> None:
            found[number] = post(client, png(pictures[number]), f"p{number}", k=1 + number % 5).json()

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(pictures))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        batches = int(client.get("/metrics").text.split("\nfastattr_batches_total ")[1].split()[0])
    assert batches < len(pictures)
    for number, own in enumerate(expected):
        assert found[number]["prompt"] == f"p{number}"
        assert len(found[number]["results"]) == 1 + number % 5
        assert found[number]["query"]["sha256"] == own.query["sha256"]
        assert found[number]["results"][0]["similarity"] == pytest.approx(own.results[0].similarity, abs=1e-3)


def bomb(width: int, height: int) -> bytes:
    """A small PNG that claims, and unpacks to, very many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


HOSTILE = {
    "empty": b"",
    "text": b"GET / HTTP/1.1",
    "html": b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
    "truncated": png(Image.new("RGB", (60, 60), "red"))[:60],
    "bomb": bomb(50_000, 50_000),
    "large bomb": bomb(2**31 - 1, 2**31 - 1),
    "too many pixels": png(Image.new("RGB", (1000, 200))),
    "another format": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n",
    "tiff": b"II*\x00" + bytes(100),
    "too large": bytes(300_000),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_uploads_get_a_4xx(client, what):
    """One upload that ends the process, or its memory, ends the service for everyone."""
    answer = post(client, HOSTILE[what])
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["detail"]


@pytest.mark.parametrize(
    "request_",
    [
        {"data": {"prompt": "no image"}},
        {"files": {"image": ("x.png", png(Image.new("RGB", (8, 8))))}},
        {"files": {"image": ("x.png", png(Image.new("RGB", (8, 8))))}, "data": {"prompt": "  "}},
        {"files": {"image": ("x.png", png(Image.new("RGB", (8, 8))))}, "data": {"prompt": "p", "k": "1000000"}},
        {"files": {"image": ("x.png", png(Image.new("RGB", (8, 8))))}, "data": {"prompt": "p", "k": "49"}},
        {"files": {"image": ("x.png", png(Image.new("RGB", (8, 8))))}, "data": {"prompt": "p" * 5000}},
        {"content": b"--x\r\n broken", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        {"content": b"{}", "headers": {"content-type": "application/json"}},
        {"content": (bytes(1000) for _ in range(400)), "headers": {"content-type": "multipart/form-data; boundary=x"}},
    ],
)
def test_malformed_requests_get_a_4xx(client, request_):
    """A 500 says that nobody thought of it. The last comes in chunks, without a length."""
    assert 400 <= client.post("/attribute", **request_).status_code < 500


@pytest.mark.parametrize(
    "body",
    [
        {"features": [1.0], "prompt": "p"},
        {"features": ["x"], "prompt": "p"},
        {"features": [1.0] * 70_000, "prompt": "p"},
        {"prompt": "p"},
        {"features": [0.0] * 32, "prompt": "p", "where": {"colour": "red"}},
        {"features": [0.0] * 32, "prompt": "p", "extra": 1},
        [],
    ],
)
def test_malformed_features_get_a_4xx(client, body):
    """The same for numbers."""
    assert 400 <= client.post("/attribute/features", json=body).status_code < 500
    nan = client.post(
        "/attribute/features", content='{"features": [NaN], "prompt": "p"}', headers={"content-type": "application/json"}
    )
    assert 400 <= nan.status_code < 500


def test_one_bad_request_does_not_fail_its_batch(attributor):
    """K out of range for one must not take the others with it."""
    with TestClient(create_app(attributor, ServeConfig()), raise_server_exceptions=False) as client:
        codes: dict[int, int] = {}

        def ask(number: int) -> None:
            codes[number] = post(client, png(draw("red", "ring", "plain")), k=500 if number == 3 else 2).status_code

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert codes == {number: 422 if number == 3 else 200 for number in range(8)}


def test_a_token_is_asked_for_and_required_beyond_this_machine(attributor):
    """A server that listens to everyone without a token is open by accident."""
    with pytest.raises(InputError, match="FASTATTR_TOKEN"):
        run("emoji", host="0.0.0.0")
    with TestClient(create_app(attributor, ServeConfig(token="secret"))) as client:
        assert client.get("/info").status_code == 401
        assert client.get("/info", headers={"authorization": "Bearer secreT"}).status_code == 401
        assert client.get("/info", headers={"authorization": "Bearer secret"}).json()["images"] == 48
        assert client.get("/health").json()["status"] == "ok"


def test_waiting_has_an_end(attributor, monkeypatch):
    """A request that nobody will answer must not be held for ever, nor may the queue grow without end."""
    from fastattr.serving import http as serve

    monkeypatch.setattr(serve, "answer", lambda attributor, batch: time.sleep(1.5) or [InputError("late")] * len(batch))
    config = ServeConfig(timeout=0.3, max_waiting=2)
    with TestClient(create_app(attributor, config), raise_server_exceptions=False) as client:
        codes = []
        threads = [
            threading.Thread(target=lambda: codes.append(post(client, png(draw("red", "ring", "plain"))).status_code))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
    assert codes == [503] * 6


def test_a_removal_is_honoured_by_a_server_that_runs(tmp_path):
    """The opt-out comes from another process; no restart may be needed."""
    folder = write_attributor(tmp_path / "a")
    with TestClient(create_app(FastAttributor.from_pretrained(folder))) as client:
        body = {"features": QUERY.tolist(), "prompt": "p", "k": 5}
        before = [row["image_id"] for row in client.post("/attribute/features", json=body).json()["results"]]
        FastAttributor.from_pretrained(folder).remove(before[:2])
        after = client.post("/attribute/features", json=body).json()
        assert [row["image_id"] for row in after["results"]][:3] == before[2:]
        assert after["versions"]["catalog_version"] == 2
        assert "fastattr_catalog_version 2" in client.get("/metrics").text


def test_the_command_serves_and_ends_in_good_order(tmp_path):
    """A request that is being answered when the process is told to end is answered."""
    folder = write_attributor(tmp_path / "a")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "fastattr", "serve", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        import urllib.request

        until = time.monotonic() + 90
        while True:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/attribute/features",
            json.dumps({"features": QUERY.tolist(), "prompt": "p", "k": 3}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert len(json.load(answer)["results"]) == 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in {0, -signal.SIGTERM}
    finally:
        process.kill()
