"""Measure whether a living catalogue keeps its word: killed writers, readers beside them, faults, growth, a million images.

    python benchmarks/catalogue.py --json benchmarks/results/catalogue.json      (some twenty minutes on 2 cores)
    python benchmarks/catalogue.py --quick                                       (two minutes)

storm     writers (4 processes, 4 threads each) that are killed and have ENOSPC, EIO and ESTALE raised in them, beside readers
killed    compact and a save over an earlier attributor, ended before every file that they open, rename, make or delete
erased    every file that is left after compact and save, searched for what belonged to images that left
growth    an inverted file that grows by a fifth in a region that it does not know, then compact
million   a folder of a million images: opened, one changed, all changed, asked with a restriction
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from fastattr import FastattrError, FastAttributor
from fastattr.attributor import bases, changes
from fastattr.index.choose import IndexConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
import machine

from tests.made import attributor_of

DIM = 16
FAULTS = (errno.ENOSPC, errno.EIO, errno.ESTALE)
STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "shutil.copyfile", "sqlite3.connect"}
"""What Python announces before it does it."""


def made(folder: Path, vectors: np.ndarray, factory: str = "SQfp16") -> Path:
    """An attributor on made features."""
    config = IndexConfig(factory=factory, plain="")
    return attributor_of(vectors, folder, config, name="image-{}", caption="subject number {} in a street at night")


def unit(seed: int, rows: int, dim: int = DIM) -> np.ndarray:
    """(rows, dim) float32 unit vectors."""
    vectors = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write(folder: Path, log: Path, seed: int, threads: int) -> None:
    """Change a folder until killed; every change is noted in a file before it is begun and after it is done."""
    attributor, notes = FastAttributor.from_pretrained(folder), log.open("a", buffering=1)
    rng, known = np.random.default_rng(seed), set[str]()
    for where, name in ((changes, "_write_state"), (bases, "_sync"), (bases, "write_config")):
        real = getattr(where, name)

        def faulty(*arguments: Any, real: Any = real) -> Any:
            if rng.random() < 0.02:
                raise OSError(int(rng.choice(FAULTS)), "injected")
            return real(*arguments)

        setattr(where, name, faulty)

    def work(number: int) -> None:
        own, step = np.random.default_rng([seed, number]), 0
        mine = [f"image-{row}" for row in range(seed * threads + number, 2000, 400)]
        while True:
            step += 1
            kind = str(own.choice(["add", "remove", "update", "compact"], p=[0.5, 0.35, 0.13, 0.02]))
            name = f"w{seed}-{number}-{step}" if kind == "add" or not mine else mine.pop(int(own.integers(len(mine))))
            kind = kind if name.startswith("image") or name in known else "add"
            notes.write(json.dumps(["begin", kind, name]) + "\n")
            try:
                if kind == "add":
                    attributor.add_features(unit(step, 1), ["c"], [{"image_id": name}])
                    known.add(name)
                elif kind == "remove":
                    attributor.remove([name])
                elif kind == "update":
                    attributor.update({name: {"creator": f"by {seed}"}})
                else:
                    attributor.compact()
                mine += [name] if kind != "remove" else []
                notes.write(json.dumps(["done", kind, name]) + "\n")
            except (OSError, FastattrError) as error:
                notes.write(json.dumps(["fault", kind, str(error)[:60]]) + "\n")

    for number in range(threads):
        threading.Thread(target=work, args=(number,)).start()


def read(folder: Path, logs: Path, stop: Path) -> None:
    """Ask until told to stop; print what was wrong."""
    attributor, last = FastAttributor.from_pretrained(folder), 0
    found = {"asked": 0, "removed_ids_answered": 0, "versions_backwards": 0}
    while not stop.exists():
        removed = removed_by_now(logs)
        attributor = FastAttributor.from_pretrained(folder) if found["asked"] % 7 == 0 else attributor
        answer = attributor.attribute_features(unit(found["asked"], 1), ["x"], 200)[0]
        found["asked"] += 1
        found["removed_ids_answered"] += len({result.image_id for result in answer.results} & removed)
        found["versions_backwards"] += answer.versions["catalog_version"] < last
        last = answer.versions["catalog_version"]
    print(json.dumps(found))


def removed_by_now(logs: Path) -> set[str]:
    """Ids whose removal had returned, by the writers' notes."""
    texts = [path.read_text() for path in logs.glob("*.log")]
    notes = (json.loads(line) for text in texts for line in text[: text.rfind("\n") + 1].splitlines())
    return {name for state, kind, name in notes if (state, kind) == ("done", "remove")}


def done_by(log: Path) -> int:
    """Changes that a writer has acknowledged."""
    return log.read_text().count('["done"') if log.exists() else 0


def storm(work: Path, quick: bool) -> dict[str, Any]:
    """Writers, killed again and again, beside readers."""
    folder, logs, stop = made(work / "storm", unit(0, 2000)), work / "logs", work / "stop"
    logs.mkdir()
    writers, wanted, kills_wanted, threads = (2, 150, 8, 2) if quick else (4, 5000, 200, 4)
    rng, kills, number = np.random.default_rng(0), 0, 0

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, __file__, *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    readers = [start("--read", folder, logs, stop) for _ in range(2 if quick else 4)]
    running: dict[int, subprocess.Popen[str]] = {}
    while True:
        while len(running) < writers:
            number += 1
            running[number] = start("--write", folder, logs / f"{number}.log", number, threads)
        if sum(map(done_by, logs.glob("*.log"))) >= wanted and kills >= kills_wanted:
            break
        victim = int(rng.choice(list(running)))
        due = done_by(logs / f"{victim}.log") + int(rng.integers(3, 30))
        while done_by(logs / f"{victim}.log") < due and running[victim].poll() is None:
            time.sleep(rng.uniform(0.0, 0.05))
        running.pop(victim).send_signal(signal.SIGKILL)
        kills += 1
    for process in running.values():
        process.kill()
    stop.touch()
    answers = [json.loads(reader.communicate()[0]) for reader in readers]
    lines = [json.loads(line) for path in logs.glob("*.log") for line in path.read_text().splitlines() if line.endswith("]")]
    present = set(FastAttributor.from_pretrained(folder).catalog["image_id"].to_pylist())
    what = (("begin", "remove"), ("done", "add"), ("done", "remove"))
    touched, added, gone = ({name for *noted, name in lines if tuple(noted) == wanted} for wanted in what)
    return {
        "changes": sum(state == "done" for state, _, _ in lines),
        "kills": kills,
        "faults": sum(state == "fault" for state, _, _ in lines),
        "answers": sum(each["asked"] for each in answers),
        "acknowledged_lost": len(added - touched - present) + len(gone & present),
        **{key: sum(each[key] for each in answers) for key in ("removed_ids_answered", "versions_backwards")},
    }


def killed(work: Path, quick: bool) -> dict[str, Any]:
    """End a process before each step of compact and of a save over an earlier attributor."""
    points, bad = 0, 0
    for what in ("compact", "save"):
        for step in itertools.count(1, 3 if quick else 1):
            folder = made(work / f"{what}-{step}", unit(0, 50))
            own, target = FastAttributor.from_pretrained(folder), work / f"{what}-{step}-target"
            own.save_pretrained(target)
            own.remove(["image-3"])
            child = os.fork()
            if child == 0:
                _die_at(step)
                own.compact() if what == "compact" else own.save_pretrained(target)
                os._exit(0)
            ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            points += ended == 9
            for place in (folder, target):
                try:
                    names = FastAttributor.from_pretrained(place).catalog["image_id"].to_pylist()
                    bad += len(names) != (50 if place == target and "image-3" in names else 49)
                except Exception as error:
                    print(what, step, place.name, error, file=sys.stderr)
                    bad += 1
            if ended == 0:
                break
    return {"kill_points": points, "kill_points_not_loadable": bad}


def _die_at(step: int) -> None:
    left = itertools.count(step - 1, -1)
    sys.addaudithook(lambda event, _: os._exit(9) if event in STEPS and next(left) == 0 else None)


def erased(work: Path, quick: bool) -> dict[str, Any]:
    """Search every file for what belonged to images that left."""
    vectors, fresh = unit(0, 500), unit(1, 50)
    attributor = FastAttributor.from_pretrained(made(work / "erased", vectors))
    texts = [f"a secret caption, number {i}." for i in range(50)]
    pictures = [f"a secret picture, number {i}.".encode() for i in range(50)]
    attributor.add_features(fresh, texts, [{"image_id": f"new-{i}"} for i in range(50)], thumbnails=pictures)
    attributor.remove([f"new-{i}" for i in range(25)] + [f"image-{i}" for i in range(25)])
    attributor.save_pretrained(work / "saved")
    attributor.compact()
    marks = [*pictures[:25], *(text.encode() for text in texts[:25]), b"subject number 7 "]
    marks += [row.astype("<f2").tobytes() for row in (*fresh[:25], *vectors[:25])]
    found = 0
    for path in (*(work / "saved").rglob("*"), *(work / "erased").rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        if path.suffix == ".parquet":
            values = [value for row in pq.read_table(path).to_pylist() for value in row.values()]
            data += b"\n".join(value if isinstance(value, bytes) else str(value).encode() for value in values)
        found += any(mark in data for mark in marks)
    return {"removed_bytes_found": found}


def growth(work: Path, quick: bool) -> dict[str, Any]:
    """Recall where the index was never trained."""
    rows, dim = (20_000, 32) if quick else (100_000, 64)
    rng = np.random.default_rng(0)

    def region(centre: np.ndarray, count: int) -> np.ndarray:
        vectors = centre + rng.standard_normal((count, dim)).astype(np.float32) * 0.6
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    base = np.concatenate([region(unit(i, 1, dim), rows // 20) for i in range(20)])
    new = region(unit(99, 1, dim) * 2, rows // 5)
    attributor = FastAttributor.from_pretrained(made(work / "growth", base, f"IVF{256 if quick else 512},SQ4"))
    attributor.add_features(new, ["c"] * len(new), [{"image_id": f"new-{i}"} for i in range(len(new))])
    attributor.compact()
    every, hits = np.concatenate([base, new]), []
    ids = np.array([f"image-{i}" for i in range(len(base))] + [f"new-{i}" for i in range(len(new))])
    for query in region(unit(99, 1, dim) * 2, 50):
        exact = set(ids[np.argsort(-(every @ query))[:100]])
        answer = attributor.attribute_features(query[None], ["x"], 100)[0]
        hits.append(len(exact & {result.image_id for result in answer}))
    return {"recall100_after_growth": float(np.mean(hits)) / 100, "recall_claimed": attributor.config["recall_of_search"]}


def million(work: Path, quick: bool) -> dict[str, Any]:
    """A folder of a million images."""
    rows = 50_000 if quick else 1_000_000
    folder = made(work / "million", unit(0, rows), "SQ8")
    found: dict[str, Any] = {}

    def seconds(call: Callable[[], object]) -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    found["open_million_seconds"] = seconds(lambda: FastAttributor.from_pretrained(folder))
    own = FastAttributor.from_pretrained(folder)
    own.update({"image-1": {"creator": "first"}})  # makes the database
    one = [seconds(lambda i=i: own.update({f"image-{i + 2}": {"creator": "next"}})) for i in range(5)]
    found["update_million_seconds"] = float(np.median(one))
    found["update_all_seconds"] = seconds(lambda: own.update({f"image-{i}": {"creator": f"c{i % 100}"} for i in range(rows)}))
    asks = [seconds(lambda i=i: own.attribute_features(unit(i, 1), ["x"], 10, where={"creator": f"c{i}"})) for i in range(5)]
    return {**found, "where_after_million_seconds": float(np.median(asks[1:]))}


PARTS = {"storm": storm, "killed": killed, "erased": erased, "growth": growth, "million": million}


def main() -> None:
    """Run the parts that are asked for."""
    parser = machine.parser(__doc__, quick="small sizes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--write", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--read", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        return write(*map(Path, options.write[:2]), *map(int, options.write[2:]))
    if options.read:
        return read(*map(Path, options.read))
    result: dict[str, Any] = {}
    for part in options.parts:
        with tempfile.TemporaryDirectory(prefix="fastattr-") as name:
            result |= PARTS[part](Path(name), options.quick)
    machine.finish(result, options)
    return None


if __name__ == "__main__":
    machine.run(main)
