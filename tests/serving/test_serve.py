"""The server: the same answers as in the process, many at once, and a 4xx for whatever is hostile."""

from __future__ import annotations

import contextlib
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

from fastattr.serving import batches
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
        together = float(client.get("/metrics").text.split("\nfastattr_batches_total ")[1].split()[0])
    assert together < len(pictures)
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
    monkeypatch.setattr(batches, "answer", lambda attributor, batch: time.sleep(1.5) or [InputError("late")] * len(batch))
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
        assert "fastattr_catalog_version 2.0" in client.get("/metrics").text


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


def features_of(attributor: FastAttributor, value: float = 0.5) -> list[float]:
    return [value] * attributor.config["feature_dim"]


@pytest.mark.parametrize("value", [1e38, 3e38, -1e38, 1e39, 1e300, 0.0, 1e-40])
def test_features_that_overflow_fail_nobody_else(attributor, value):
    """Features of 1e38 took the answers of all who were asked in the same batch with them."""
    with TestClient(create_app(attributor), raise_server_exceptions=False) as client:
        codes: dict[int, int] = {}

        def ask(number: int) -> None:
            features = features_of(attributor, value if number % 4 == 0 else 0.5 + 0.01 * number)
            codes[number] = client.post("/attribute/features", json={"features": features, "prompt": "p", "k": 3}).status_code

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(code == 200 for number, code in codes.items() if number % 4), codes
    assert all(code in {200, 422} for code in codes.values()), codes


def test_whatever_one_request_raises_is_its_own_affair(attributor):
    """An error that nobody thought of must not answer for others."""

    class Strange:
        def attribute_features(self, features: np.ndarray, prompts: list[str], k: int, **options: object) -> object:
            if "bad" in prompts:
                raise ZeroDivisionError
            return attributor.attribute_features(features, prompts, k, **options)

    asked = [
        batches.Waiting(np.array(features_of(attributor)), prompt, 3, None, answer=None)  # type: ignore[arg-type]
        for prompt in ("good", "bad", "also good")
    ]
    found = batches.answer(Strange(), asked)  # type: ignore[arg-type]
    assert [type(each).__name__ for each in found] == ["Attribution", "ZeroDivisionError", "Attribution"]


@pytest.mark.parametrize("where", ["prompt", "where", "key", "features"])
def test_text_that_is_no_unicode_gets_a_4xx(client, attributor, where):
    """The echo of a lone surrogate can't be encoded: a 500, of an answer that says what is wrong."""
    body = {"features": features_of(attributor), "prompt": "p", "where": {}}
    body |= {"prompt": {"prompt": "\ud83d"}, "where": {"where": {"creator": "\ud83d"}}, "key": {"\ud83d": 1}}.get(
        where, {"features": ["\ud83d"]}
    )
    answer = client.post("/attribute/features", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["detail"]


def test_a_wrong_list_is_refused_at_its_first_error(client):
    """65,536 strings as features gave 65,536 errors, and the server nothing else to do meanwhile."""
    answer = client.post("/attribute/features", json={"features": ["x"] * 30_000, "prompt": "p"})
    assert answer.status_code == 422
    assert len(answer.content) < 500


def test_uploads_that_wait_are_not_all_decoded(attributor, monkeypatch):
    """40 small files of 20 million pixels took 7 GB."""
    held, most = 0, 0
    real_read, real_answer = batches.read_upload, batches.answer

    def counted(data: bytes) -> Image.Image:
        nonlocal held, most
        held += 90_000
        most = max(most, held)
        return real_read(data)

    def answered(attributor: FastAttributor, batch: list) -> list:
        nonlocal held
        found = real_answer(attributor, batch)
        held -= 90_000 * len(batch)
        return found

    from fastattr.serving import http

    monkeypatch.setattr(http, "read_upload", counted)
    monkeypatch.setattr(batches, "answer", answered)
    large = png(Image.new("RGBA", (300, 300), "red"))
    config = ServeConfig(max_pixels=100_000, max_waiting_pixels=300_000)
    with TestClient(create_app(attributor, config)) as client:
        codes = []
        threads = [threading.Thread(target=lambda: codes.append(post(client, large, k=1).status_code)) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert codes == [200] * 20
    assert 90_000 <= most <= 270_000


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_turned_picture_is_the_same_from_server_and_file(client, attributor, tmp_path, orientation):
    """A phone's picture got another receipt from the server than from the command line."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.jpg"
    draw("red", "ring", "plain").crop((0, 0, 16, 9)).save(path, exif=exif, quality=95)
    answer = post(client, path.read_bytes(), "red ring").json()
    assert answer["query"]["sha256"] == attributor.attribute(path, "red ring").query["sha256"]


@pytest.fixture(scope="module")
def listening(attributor) -> Iterator[int]:
    """The port of a server that listens, as `run` sets it up, with short batches."""
    import uvicorn

    batches.HEADER_SECONDS, before = 0.5, batches.HEADER_SECONDS
    config = ServeConfig(max_bytes=100_000, timeout=1.0, token="secret")
    server = uvicorn.Server(
        uvicorn.Config(create_app(attributor, config), port=0, http=batches.PatientProtocol, log_level="critical")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)
    batches.HEADER_SECONDS = before


def sent(port: int, *pieces: bytes, pause: float = 0.0) -> bytes:
    """What the server answers to raw bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=8) as client:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                client.sendall(piece)
                time.sleep(pause)
        with contextlib.suppress(ConnectionError):
            return client.recv(4096)
    return b""


HEAD = b"POST /attribute/features HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Type: application/json\r\n"


def test_bytes_are_counted_whatever_the_headers_say(listening):
    """A length of 5 beside a chunked body let 40 MB through."""
    chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    both = HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert b" 400 " in sent(listening, both, *[chunk] * 20).split(b"\r\n")[0]
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    assert b" 413 " in sent(listening, chunked, *[chunk] * 20).split(b"\r\n")[0]
    assert b" 413 " in sent(listening, HEAD + b"Content-Length: 200000\r\n\r\n").split(b"\r\n")[0]
    assert b" 401 " in sent(listening, HEAD.replace(b"secret", b"guess") + b"Content-Length: 90000\r\n\r\n").split(b"\r\n")[0]


@pytest.mark.parametrize("pieces", [[], [b"POST /attribute HT"], [HEAD], [HEAD[:30], HEAD[30:50], HEAD[50:]]])
def test_half_sent_headers_are_not_waited_for(listening, pieces):
    """Each held a connection for ever; some hundred keep everyone else out."""
    started = time.monotonic()
    assert sent(listening, *pieces, pause=0.2) == b""
    assert time.monotonic() - started < 5


def test_a_second_request_half_sent_is_not_waited_for_either(listening):
    """The first one, answered, may not buy time for the next."""
    with socket.create_connection(("127.0.0.1", listening), timeout=8) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /hea")
        assert b" 200 " in client.recv(4096)
        with contextlib.suppress(ConnectionError):
            while client.recv(4096):
                pass


def test_a_body_that_does_not_come_ends(listening):
    """A byte now and then must not hold a request for ever."""
    assert b" 408 " in sent(listening, HEAD + b"Content-Length: 50\r\n\r\n{").split(b"\r\n")[0]


def test_honest_clients_are_answered_beside_hostile_ones(listening, attributor):
    """What one sends must not be felt by others; `benchmarks/serve.py` does this for a minute."""
    ended = threading.Event()
    hostile = [
        [HEAD + b"Content-Length: 60000\r\n\r\n" + b"[" * 60_000],
        [HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{{{{{\r\n"],
        [HEAD],
        [b"\x00" * 5000],
    ]

    def attack(number: int) -> None:
        while not ended.is_set():
            sent(listening, *hostile[number])

    def honest(number: int) -> None:
        body = json.dumps({"features": features_of(attributor, 0.01 * number), "prompt": "p", "k": 3}).encode()
        for _ in range(10):
            request = HEAD + f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
            codes.append(sent(listening, request)[9:12])

    codes: list[bytes] = []
    attackers = [threading.Thread(target=attack, args=(number,)) for number in range(len(hostile))]
    clients = [threading.Thread(target=honest, args=(number,)) for number in range(6)]
    for thread in attackers + clients:
        thread.start()
    for thread in clients:
        thread.join()
    ended.set()
    for thread in attackers:
        thread.join()
    assert codes == [b"200"] * 60
