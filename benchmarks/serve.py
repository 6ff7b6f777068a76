"""The server: honest clients beside hostile ones, on the embedded attributor.

    python benchmarks/serve.py --json benchmarks/results/serve.json [--quick]

`fastattr serve emoji` runs in a process of its own. 64 clients post pictures one after another for 60 seconds, 8 hostile ones
post uploads that must be refused (among them many decodings at once, features that overflow, a body longer than it says).
No honest request may fail; `serve_peak_gb` is the most memory that the server held.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np
from PIL import Image

FORM = {"Content-Type": "multipart/form-data; boundary=frontier"}
JSON = {"Content-Type": "application/json"}


def png(pixels: np.ndarray) -> bytes:
    """Pixels as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def form(data: bytes) -> bytes:
    """An upload as a form."""
    prompt = b'--frontier\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nred heart, openmoji style\r\n'
    image = b'--frontier\r\nContent-Disposition: form-data; name="image"; filename="x.png"\r\n\r\n'
    return prompt + image + data + b"\r\n--frontier--\r\n"


def post(port: int, path: str, body: bytes, headers: dict[str, str]) -> int:
    """Post a body; the status, 0 where the connection broke."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    except ConnectionError:  # a server may answer an upload that is too large before it has read it, and close
        with contextlib.suppress(OSError, http.client.HTTPException):
            return connection.getresponse().status
        return 0
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def hostile_requests(picture: bytes) -> dict[str, tuple[str, bytes, dict[str, str]]]:
    """(path, body, headers) by what is wrong with it; each must be refused with a 4xx."""
    large = png(np.zeros((5000, 5000, 3), dtype=np.uint8))
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    uploads = {"empty": b"", "text": b"no image", "truncated": picture[:100], "oversized": bytes(20_000_000)}
    found = {name: ("/attribute", form(data), FORM) for name, data in {**uploads, "too many pixels": large, "svg": svg}.items()}
    overflow = json.dumps({"features": [1e38] * 256, "prompt": "x"}).encode()
    words = json.dumps({"features": ["x"] * 65_536, "prompt": "x"}).encode()
    return {**found, "overflow": ("/attribute/features", overflow, JSON), "words": ("/attribute/features", words, JSON)}


def measure(clients: int, enemies: int, seconds: float) -> dict[str, Any]:
    """Honest clients' answers beside hostile ones'; then each hostile request once more, by itself."""
    pictures = [png(np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)) for number in range(64)]
    hostile = list(hostile_requests(pictures[0]).values())
    with machine.served("serve", "emoji") as (server, port):
        post(port, "/attribute", form(pictures[0]), FORM)  # the encoders are warm
        milliseconds: list[float] = []
        failed: list[int] = []
        until = time.perf_counter() + seconds

        def ask(number: int) -> None:
            while time.perf_counter() < until:
                started = time.perf_counter()
                status = post(port, "/attribute", form(pictures[number % len(pictures)]), FORM)
                milliseconds.append(1000 * (time.perf_counter() - started))
                failed.extend([status] if status != 200 else [])

        def attack(number: int) -> None:
            while time.perf_counter() < until:
                post(port, *hostile[number % len(hostile)])
                number += enemies

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
        threads += [threading.Thread(target=attack, args=(number,)) for number in range(enemies)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        answers = [post(port, *request) for request in hostile]
        alive = post(port, "/attribute", form(pictures[0]), FORM) == 200
        peak = Path(f"/proc/{server.pid}/status").read_text().partition("VmHWM:")[2].split()[0]
    return {
        "serve_clients": clients,
        "serve_hostile_clients": enemies,
        "serve_seconds": seconds,
        "serve_requests": len(milliseconds),
        "serve_errors": len(failed),
        "serve_p50_ms": float(np.median(milliseconds)),
        "serve_p99_ms": float(np.percentile(milliseconds, 99)),
        "serve_hostile": len(answers),
        "serve_hostile_refused_4xx": sum(400 <= status < 500 for status in answers),
        "serve_alive_afterwards": alive,
        "serve_peak_gb": int(peak) * 1024 / 1e9,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--quick", action="store_true", help="8 clients beside 2 for 5 seconds")
    options = parser.parse_args()
    clients, enemies, seconds = (8, 2, 5.0) if options.quick else (64, 8, 60.0)
    machine.report(
        {**measure(clients, enemies, seconds), "seed": 0, "quick": options.quick, **machine.describe()}, options.json
    )


if __name__ == "__main__":
    main()
