"""The storm of `benchmarks/catalogue.py`: writers that are killed and have faults raised in them, beside readers."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import multiprocessing
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import numpy as np

from fastattr import FastattrError, FastAttributor
from fastattr.attributor import bases, changes
from fastattr.core.files import read_json, write_json

IMAGES = 2000  # of the catalogue before it begins, from the embedded attributor
FAULTS = (errno.ENOSPC, errno.EIO, errno.ESTALE)
BESIDE = ("server", "page", "milvus")
Answer = tuple[set[str], int]  # ids and version of the catalogue


def unit(seed: int, rows: int, dim: int) -> np.ndarray:
    """(rows, dim) float32 unit vectors."""
    vectors = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write(folder: Path, log: Path, seed: int, threads: int, names: list[str]) -> None:
    """Change a folder until killed; every change is noted in a file before it is begun and after it is done."""
    attributor, notes = FastAttributor.from_pretrained(folder), log.open("a", buffering=1)
    rng, dim = np.random.default_rng(seed), attributor.config["feature_dim"]
    for where, name in ((changes, "_write_state"), (bases, "_sync"), (bases, "write_config")):
        real = getattr(where, name)

        def faulty(*arguments: Any, real: Any = real) -> Any:
            if rng.random() < 0.02:
                raise OSError(int(rng.choice(FAULTS)), "injected")
            return real(*arguments)

        setattr(where, name, faulty)

    def work(number: int) -> None:
        own, mine = np.random.default_rng([seed, number]), names[seed * threads + number : IMAGES : IMAGES // 2]
        for step in itertools.count():
            kind = str(own.choice(["add", "remove", "update", "compact"], p=[0.5, 0.35, 0.145, 0.005]))
            kind = "add" if kind != "compact" and not mine else kind
            name = f"w{seed}-{number}-{step}" if kind == "add" else mine.pop(int(own.integers(len(mine)))) if mine else ""
            value = f"{name} in step {step}"
            notes.write(json.dumps(["begin", kind, name, value]) + "\n")
            try:
                if kind == "add":
                    attributor.add_features(unit(step, 1, dim), ["c"], [{"image_id": name, "creator": value}])
                elif kind == "remove":
                    attributor.remove([name])
                elif kind == "update":
                    attributor.update({name: {"creator": value}})
                else:
                    attributor.compact()
                mine += [name] if kind in {"add", "update"} else []
                notes.write(json.dumps(["done", kind, name, value]) + "\n")
            except (OSError, FastattrError) as error:
                notes.write(json.dumps(["fault", kind, name, str(error)[:80]]) + "\n")

    for number in range(threads):
        threading.Thread(target=work, args=(number,)).start()


def asking(kind: str, folder: Path, work: Path, port: int) -> Callable[[int], Answer]:
    """How one reader asks its n-th question; those beside ask a page, a server and a Milvus collection that lags behind."""
    if kind == "page":
        from gradio_client import Client, handle_file
        from PIL import Image

        picture, client = work / "asked.png", Client(f"http://127.0.0.1:{port}", verbose=False, httpx_kwargs={"timeout": 300})
        Image.new("RGB", (64, 64), (200, 30, 30)).save(picture)
        return lambda _: _named(client.predict(handle_file(str(picture)), "red heart", api_name="/attribute"))
    dim = FastAttributor.from_pretrained(folder).config["feature_dim"]
    if kind == "server":

        def post(number: int) -> Answer:
            body = json.dumps({"features": unit(number, 1, dim)[0].tolist(), "prompt": "x", "k": 500}).encode()
            options = {"data": body, "headers": {"Content-Type": "application/json"}}
            with urllib.request.urlopen(
                urllib.request.Request(f"http://127.0.0.1:{port}/attribute/features", **options)
            ) as found:
                return _named(json.load(found))

        return post
    opened: list[FastAttributor] = []

    def ask(number: int) -> Answer:
        if number % (40 if kind == "milvus" else 7) == 0:
            opened[:] = [_filled(folder, work) if kind == "milvus" else FastAttributor.from_pretrained(folder)]
        return _named(opened[0].attribute_features(unit(number, 1, dim), ["x"], 500)[0].to_dict())

    return ask


def _filled(folder: Path, work: Path) -> FastAttributor:
    from fastattr.attributor import milvus

    uri = str(work / "milvus.db")
    milvus.load(str(folder), uri)
    return FastAttributor.from_pretrained(folder, index_uri=uri)


def _named(receipt: dict[str, Any]) -> Answer:
    return {result["image_id"] for result in receipt["results"]}, receipt["versions"]["catalog_version"]


def read(kind: str, folder: Path, logs: Path, port: int) -> None:
    """Ask until told to stop; note what was wrong."""
    last, removed, seen, errors = 0, set[str](), dict[Path, int](), list[str]()
    found = {"answers": 0, "removed_ids_answered": 0, "versions_backwards": 0, "readers_failed": 0}
    ask = asking(kind, folder, logs.parent, port)
    while not (logs / "stop").exists():
        for path in logs.glob("*.log"):
            data = path.read_bytes()[seen.get(path, 0) :]
            data = data[: data.rfind(b"\n") + 1]
            seen[path] = seen.get(path, 0) + len(data)
            removed |= {
                name for state, kind, name, _ in map(json.loads, data.splitlines()) if (state, kind) == ("done", "remove")
            }
        try:
            ids, version = ask(found["answers"])
        except Exception as error:
            found["readers_failed"] += 1
            errors.append(f"{kind}: {error!r}")
            time.sleep(1)
            continue
        found["answers"] += 1
        found["removed_ids_answered"] += len(ids & removed)
        found["versions_backwards"] += version < last
        last = version
        time.sleep(0.2)  # the cores are for the writers, too
    with (logs / "asked").open("a") as file:
        file.write(json.dumps({**found, "kind": kind, "errors": errors[:5]}) + "\n")


def done_by(log: Path) -> int:
    """Changes that a writer has acknowledged."""
    return log.read_text().count('["done"') if log.exists() else 0


def storm(work: Path, quick: bool, minutes: float) -> dict[str, Any]:
    """Writers, killed again and again, beside readers; what earlier runs have left in the folder is gone on with."""
    folder, logs = work / "storm", work / "logs"
    before = _begun(work)
    writers, wanted, kills_wanted, threads = (2, 60, 8, 2) if quick else (4, 5000, 200, 4)
    number, until = len(list(logs.glob("*.log"))), time.monotonic() + 60 * minutes
    rng, kills = np.random.default_rng(number), logs / "kills"
    kills.touch()
    (logs / "stop").unlink(missing_ok=True)

    def start(what: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
        process = multiprocessing.get_context("fork").Process(target=what, args=arguments)
        process.start()
        return process

    with contextlib.ExitStack() as stack:
        ports = {"milvus": 0} | {f"own-{i}": 0 for i in range(2 if quick else 4)}
        _, ports["server"] = stack.enter_context(machine.served("serve", str(folder)))
        _, ports["page"] = stack.enter_context(machine.served("demo", str(folder), "--generator", "emoji"))
        readers = [start(read, kind, folder, logs, port) for kind, port in ports.items()]
        running: dict[int, multiprocessing.process.BaseProcess] = {}
        while time.monotonic() < until:
            while len(running) < writers:
                number += 1
                running[number] = start(write, folder, logs / f"{number}.log", number, threads, list(before))
            if sum(map(done_by, logs.glob("*.log"))) >= wanted and kills.stat().st_size >= kills_wanted:
                break
            victim = int(rng.choice(list(running)))
            due = done_by(logs / f"{victim}.log") + int(rng.integers(1, 12))
            while done_by(logs / f"{victim}.log") < due and running[victim].is_alive() and time.monotonic() < until:
                time.sleep(rng.uniform(0.0, 0.1))
            running.pop(victim).kill()
            kills.write_bytes(kills.read_bytes() + b"9")
        for process in running.values():
            process.kill()
        (logs / "stop").touch()
        for reader in readers:
            reader.join()
    asked = [json.loads(line) for line in (logs / "asked").read_text().splitlines()]
    lines = [json.loads(line) for path in logs.glob("*.log") for line in path.read_text().splitlines() if line.endswith("]")]
    for error in itertools.chain.from_iterable(each["errors"] for each in asked):
        print(error, file=sys.stderr)
    return {
        "changes": sum(state == "done" for state, *_ in lines),
        "kills": kills.stat().st_size,
        "faults": sum(state == "fault" for state, *_ in lines),
        "acknowledged_lost": lost(before, lines, FastAttributor.from_pretrained(folder)),
        **{key: sum(each[key] for each in asked) for key in asked[0] if key not in {"kind", "errors"}},
        **{f"answers_{kind}": sum(each["answers"] for each in asked if each["kind"] == kind) for kind in BESIDE},
    }


def _begun(work: Path) -> dict[str, str]:
    """Creators by image id of the storm's folder before it began; it is made where there is none."""
    noted, folder = work / "before.json", work / "storm"
    if not noted.exists():
        (work / "logs").mkdir(parents=True, exist_ok=True)
        FastAttributor.from_pretrained("emoji").save_pretrained(folder)
        own = FastAttributor.from_pretrained(folder)
        own.remove(own.catalog["image_id"].to_pylist()[IMAGES:])
        own.compact()
        write_json(noted, dict(zip(own.catalog["image_id"].to_pylist(), own.catalog["creator"].to_pylist(), strict=True)))
    return dict(read_json(noted))


def lost(before: dict[str, str], lines: list[list[str]], after: FastAttributor) -> int:
    """Images that are not as the last acknowledged change, or one begun after it, has left them."""
    allowed: dict[str, set[str | None]] = {name: {creator} for name, creator in before.items()}
    for state, kind, name, value in lines:
        if kind != "compact" and state in {"begin", "done"}:
            outcome = None if kind == "remove" else value
            allowed[name] = {outcome} | (allowed.get(name, {None}) if state == "begin" else set())
    now = dict(zip(after.catalog["image_id"].to_pylist(), after.catalog["creator"].to_pylist(), strict=True))
    return sum(now.get(name) not in outcomes for name, outcomes in allowed.items()) + len(now.keys() - allowed.keys())
