"""Measure whether a living catalogue keeps its word: killed writers, readers beside them, faults, growth, a million images.

    python benchmarks/catalogue.py --json benchmarks/results/catalogue.json      (an hour on one core)
    python benchmarks/catalogue.py --quick                                       (two minutes)

storm     writers (4 processes, 4 threads each) that are killed and have ENOSPC, EIO and ESTALE raised in them, beside 4
          readers, the page, the server and Milvus Lite, all on 2,000 images of the embedded attributor
killed    compact, a save over an earlier attributor and a push to a Hub on this machine, each killed before every system call
          that writes, renames, deletes, syncs or sends (Linux on x86-64)
erased    every file that is left after compact, save and push, searched for what belonged to images that left
growth    an inverted file that grows by a fifth in a region that it does not know, then compact
million   a folder of a million images: opened, one changed, all changed, asked with a restriction

With --json and --parts, the figures of other parts that are in the file already stay there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
from huggingface_hub import constants, snapshot_download

from fastattr import FastAttributor
from fastattr.core.files import read_json
from fastattr.index.choose import IndexConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
import machine
from storm import storm, unit

from tests.made import attributor_of

DIM = 16
TOKEN = "hf_loopback_write"


def made(folder: Path, vectors: np.ndarray, factory: str = "SQfp16") -> Path:
    """An attributor on made features."""
    config = IndexConfig(factory=factory, plain="")
    return attributor_of(vectors, folder, config, name="image-{}", caption="subject number {} in a street at night")


STRIDE, REPOSITORY = 3, "tester/model"  # processes that share the calls of one operation
CALLS = {1, 18, 20, 26, 40, 44, 74, 75, 76, 77, 82, 83, 84, 86, 87, 88, 258, 263, 264, 265, 266, 285, 296, 316, 326}
"""On x86-64: write, pwrite, msync, sendfile, send, fsync, truncate, rename, mkdir, rmdir, link, unlink, fallocate, ..."""
OPEN, CREATES = {2: 104, 257: 96}, os.O_CREAT | os.O_TRUNC  # opening is one of them if it makes a file: where its flags are


def killed_at(step: int, work: Callable[..., object], *arguments: object) -> bool:
    """Do work in a forked child that is killed before its step-th such system call; whether it came so far."""
    ptrace = ctypes.CDLL(None).ptrace
    ptrace.argtypes, ptrace.restype = [ctypes.c_long] * 4, ctypes.c_long
    child = os.fork()
    if child == 0:
        ptrace(0, 0, 0, 0)  # PTRACE_TRACEME
        os.kill(os.getpid(), signal.SIGSTOP)
        try:
            work(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.waitpid(child, 0)
    ptrace(0x4200, child, 0, 0x100009)  # PTRACE_SETOPTIONS: say what is a system call, follow threads, end with us
    ptrace(24, child, 0, 0)  # PTRACE_SYSCALL: go on to the next one
    left = step
    while True:
        thread, status = os.waitpid(-1, 0x40000000)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if thread != child:
                continue
            if os.waitstatus_to_exitcode(status) not in {0, -9}:
                raise RuntimeError(f"what was to be killed ended by itself with {os.waitstatus_to_exitcode(status)}")
            return os.WIFSIGNALED(status)
        stopped = os.WSTOPSIG(status)
        if stopped == signal.SIGTRAP | 0x80 and ptrace(3, thread, 80, 0) == -errno.ENOSYS:  # it is about to be done
            call = ptrace(3, thread, 120, 0)
            left -= call in CALLS or (call in OPEN and bool(ptrace(3, thread, OPEN[call], 0) & CREATES))
            if left == 0:
                os.kill(child, signal.SIGKILL)
        own = {signal.SIGTRAP, signal.SIGTRAP | 0x80, signal.SIGSTOP}
        ptrace(24, thread, 0, 0 if stopped in own else stopped)


@contextlib.contextmanager
def hub() -> Iterator[None]:
    """A Hub on this machine, in a process of its own."""
    address = ("127.0.0.1", int(os.environ["HF_ENDPOINT"].rpartition(":")[2]))
    server = os.fork()
    if server == 0:
        from tests.loopback_hub import Server

        with Server(socket.create_server(address)):
            signal.pause()
    try:
        for _ in range(600):
            with socket.socket() as client:
                if client.connect_ex(address) == 0:
                    break
            time.sleep(0.1)
        yield
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)


def killed(work: Path, quick: bool) -> dict[str, Any]:
    """Kill compact, a save over an earlier attributor, and a push, before every system call that changes something."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise SystemExit("the part `killed` needs Linux on x86-64")
    own = FastAttributor.from_pretrained(made(work / "start", unit(0, 50, DIM)))
    own.save_pretrained(work / "earlier")
    own.add_features(unit(1, 1, DIM), ["c"], [{"image_id": "new"}])
    own.remove(["image-3"])
    shares = [(1, 20)] if quick else [(first + 1, STRIDE) for first in range(STRIDE)]
    tasks = [(work, what, *share) for what in ("compact", "save") for share in shares]
    with hub(), ProcessPoolExecutor(len(tasks) + 1, multiprocessing.get_context("fork")) as pool:
        FastAttributor.from_pretrained(work / "earlier").push_to_hub(REPOSITORY)
        doing = [pool.submit(_killed, *task) for task in (*tasks, (work, "push", 1, 20 if quick else 1))]
        done = [future.result() for future in doing]
    points = {f"kill_points_{what}": sum(n for name, n, _ in done if name == what) for what in ("compact", "save", "push")}
    return {"kill_points": sum(points.values()), **points, "kill_points_not_loadable": sum(bad for *_, bad in done)}


def _killed(work: Path, what: str, first: int, stride: int) -> tuple[str, int, int]:
    """What was killed at every stride-th call; how often, and after how many of these a folder or repository was wrong."""
    points, bad, folder, target = 0, 0, work / f"{what}-{first}", work / f"{what}-{first}-target"
    before, came, step = {f"image-{i}" for i in range(50)}, True, first
    while came:
        for copy, of in ((folder, work / "start"), (target, work / "earlier")):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(of, copy)
        own = FastAttributor.from_pretrained(folder)
        do = {"compact": (own.compact,), "save": (own.save_pretrained, target), "push": (own.push_to_hub, REPOSITORY)}
        came = killed_at(step, *do[what])
        points += came
        for place in {"save": (folder, target), "compact": (folder,), "push": (folder, REPOSITORY)}[what]:
            try:
                ids = set(FastAttributor.from_pretrained(place).catalog["image_id"].to_pylist())
                bad += ids != before - {"image-3"} | {"new"} and not (place != folder and came and ids == before)
            except Exception as error:
                print(what, step, place, repr(error), file=sys.stderr)
                bad += 1
        step += stride
    return what, points, bad


def erased(work: Path, quick: bool) -> dict[str, Any]:
    """Search every file for what belonged to images that left: captions, thumbnails, embeddings, codes, re-rank rows, ids."""
    FastAttributor.from_pretrained("emoji").save_pretrained(work / "emoji")
    made(work / "exact", unit(0, 500, DIM))
    made(work / "reranked", unit(0, 5000, DIM), "PCAR8,IVF16,SQ4")
    found, marks, there = 0, 0, 0
    with hub():
        for name in ("exact", "reranked", *(() if quick else ("emoji",))):
            attributor = FastAttributor.from_pretrained(work / name)
            fresh = unit(1, 50, attributor.config["feature_dim"])
            texts = [f"a secret caption, number {i}." for i in range(50)]
            pictures = [f"a secret picture, number {i}.".encode() for i in range(50)]
            attributor.add_features(fresh, texts, [{"image_id": f"new-{i}"} for i in range(50)], thumbnails=pictures)
            before = belongings(attributor)
            gone = {f"new-{i}" for i in range(25)} | set(attributor.catalog["image_id"].to_pylist()[3:300:11])
            attributor.remove(sorted(gone))
            attributor.push_to_hub(f"tester/{name}")
            attributor.save_pretrained(work / f"{name}-saved")
            stay = set().union(*(before[image_id] for image_id in before.keys() - gone))
            left = set().union(*(before[image_id] for image_id in gone)) - stay
            marks, there = marks + len(left), there + traces(work / name, left)  # so that what finds nothing is known to find
            attributor.compact()
            pulled = Path(snapshot_download(f"tester/{name}", local_dir=work / f"{name}-pulled"))
            found += sum(traces(place, left) for place in (work / name, work / f"{name}-saved", pulled))
    return {"removed_bytes_found": found, "removed_bytes_before_compact": there, "removed_bytes_looked_for": marks}


def traces(folder: Path, marks: set[bytes | str]) -> int:
    """How many of the marks a file of a folder holds, for every file."""
    found = 0
    for path in filter(Path.is_file, folder.rglob("*")):
        data, cells = contents(path)
        found += sum(mark in cells or (isinstance(mark, bytes) and mark in data) for mark in marks)
    return found


def belongings(attributor: FastAttributor) -> dict[str, set[bytes | str]]:
    """What a folder holds of each image: texts as they stand in a table's cells, all else as bytes."""
    records, own = attributor.catalog.to_pylist(), dict[str, set[bytes | str]]()
    codes = []
    for name in ("index.faiss", "plain.faiss"):
        index = faiss.read_index(str(attributor.folder / name)) if (attributor.folder / name).exists() else None
        if hasattr(index, "codes"):
            codes.append(faiss.vector_to_array(index.codes).reshape(index.ntotal, -1))
    embeddings = attributor.embeddings(np.arange(len(records)))
    for row, (record, embedding) in enumerate(zip(records, embeddings, strict=True)):
        secret = [record["caption"].encode()] if record["image_id"].startswith("new-") else []
        parts = [embedding.tobytes(), embedding.astype("<f2").tobytes(), record.get("thumbnail"), record["caption"], *secret]
        parts += [table[row].tobytes() for table in codes if row < len(table)]
        own[record["image_id"]] = {part for part in parts if part} | {record["image_id"]}
    return own


def contents(path: Path) -> tuple[bytes, set[Any]]:
    """The bytes of a file, and the cells of a table, but for the prompts of drawings, which may be worded like a caption."""
    cells = set[Any]()
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        for name in set(table.column_names) - {"prompt"}:
            for value in table[name].to_pylist():
                cells.update(map(str, value) if isinstance(value, list) else [str(value) if isinstance(value, dict) else value])
    return path.read_bytes(), cells


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
    folder = made(work / "million", unit(0, rows, DIM), "SQ8")
    found: dict[str, Any] = {}

    def seconds(call: Callable[[], object]) -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    found["open_million_seconds"] = seconds(lambda: FastAttributor.from_pretrained(folder))
    own = FastAttributor.from_pretrained(folder)
    own.update({"image-1": {"creator": "first"}})  # makes the database
    one = [seconds(lambda i=i: own.update({f"image-{i + 2}": {"creator": "next"}})) for i in range(21)]
    found["update_million_seconds"] = float(np.median(one))
    found["update_all_seconds"] = seconds(lambda: own.update({f"image-{i}": {"creator": f"c{i % 100}"} for i in range(rows)}))
    asks = [
        seconds(lambda i=i: own.attribute_features(unit(i, 1, DIM), ["x"], 10, where={"creator": f"c{i}"})) for i in range(21)
    ]
    return {**found, "where_after_million_seconds": float(np.median(asks[1:]))}


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "storm": storm,
    "killed": killed,
    "erased": erased,
    "growth": growth,
    "million": million,
}


def main() -> None:
    """Run the parts that are asked for; each is written to the file as it ends."""
    parser = machine.parser(__doc__, quick="small sizes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--work", type=Path, help="where the storm keeps its folder and notes, so that another run goes on")
    parser.add_argument("--minutes", type=float, default=60.0, help="end the storm after so long (%(default)s)")
    options = parser.parse_args()
    if os.environ.get("HF_TOKEN") != TOKEN:  # a Hub on this machine, whose address the client reads as it is imported
        with socket.create_server(("127.0.0.1", 0)) as free:
            settings = {"HF_ENDPOINT": f"http://127.0.0.1:{free.getsockname()[1]}", "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
        settings |= {"HF_HUB_DISABLE_XET": "1", "TQDM_DISABLE": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})
    result = read_json(options.json) if options.json and options.json.exists() else {}
    result = result if result.get("quick") == options.quick else {}
    for part in options.parts:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="fastattr-") as name:
            constants.HF_HUB_CACHE = str(Path(name) / "hub")
            more = [options.minutes] if part == "storm" else []
            result |= PARTS[part](options.work if more and options.work else Path(name), options.quick, *more)
        result = machine.finish({**result, f"{part}_seconds": round(time.perf_counter() - started, 1)}, options)


if __name__ == "__main__":
    machine.run(main)
