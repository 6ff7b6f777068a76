"""The index at 1 and 10 million images: recall, latency, memory, disk, build time.

    python benchmarks/index.py --json benchmarks/results/index.json            # about an hour on 2 cores, 20 GB of disk
    python benchmarks/index.py --quick                                         # tiny sizes, less than 2 minutes

Every part runs in a process of its own (its peak memory is its own) and leaves its figures in --work, so that an interrupted
run goes on with the next part; --part runs one. Vectors are made from the distribution of the real ones (`Population`), and
so are queries, which are in no index and tuned nothing. An answer is timed as a user gets it, one query at a time: 100
neighbours, short list ranked again from float16 vectors whose digests are compared. Recall is against exhaustive search.

Keys are PART_KIND_FIGURE, e.g. 1m_ivf_rabitq_recall100; those that the project promises stand alone (`promised`).
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import machine
import numpy as np
import threadpoolctl

from fastattr.core.files import atomic_path, read_json, sha256_file, write_json
from fastattr.core.models import ASSETS
from fastattr.index.build import build
from fastattr.index.choose import IndexConfig, coarse_lists
from fastattr.index.files import Read, reader
from fastattr.index.search import open_ranked
from fastattr.index.tune import exact_neighbours, recall_of

SIZES = {"1m": 1_000_000, "10m": 10_000_000}
QUICK_SIZES = {"1m": 8_000, "10m": 12_000}
DIM, NEIGHBOURS, SPREAD, LENGTH, TAIL = 768, 8, 0.8, 0.5, 0.5
"""Of made vectors, see `Population`."""
BLOCK = 65_536
"""Made vectors that come from one seed."""
K = 100
LONGEST_TIMING = 15.0
"""Seconds after which the timing of a slow kind ends, with as many queries as there were."""


def real_embeddings(folder: Path = ASSETS / "emoji" / "attributor") -> np.ndarray:
    """(15351, 128) float32 unit vectors: the embeddings in the embedded attributor's index."""
    index = faiss.read_index(str(folder / "index.faiss"))
    vectors = index.reconstruct_n(0, index.ntotal)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Population:
    """An endless stream of vectors like the real ones; row i is the same whenever it is drawn.

    A made vector is a smoothed bootstrap of the real ones, so that it stays on the same curved sheet of low dimension:

        y = unit(x_i + SPREAD * sum_j g_j (x_nj - x_i) / sqrt(NEIGHBOURS)),  g_j standard normal, n_1 ... the nearest of x_i.

    To get the 768 dimensions of DINO or CLIP, y is followed by 640 smooth functions of it, cos(w y + b) with w normal of scale
    1 / LENGTH (random Fourier features), weighted by TAIL. The inner product of two such vectors is
    (y y' + TAIL k(y, y')) / (1 + TAIL) with k the Gaussian kernel, a rising function of y y': neighbours keep their order.
    """

    def __init__(self, real: np.ndarray, *, seed: int) -> None:
        rng, width = np.random.default_rng(seed), DIM - real.shape[1]
        self.real, self.seed = real, seed
        flat = faiss.IndexFlatIP(real.shape[1])
        flat.add(real)
        self.neighbours = flat.search(real, NEIGHBOURS + 1)[1][:, 1:]
        self._frequencies = (rng.standard_normal((real.shape[1], width)) / LENGTH).astype(np.float32)
        self._phases = rng.uniform(0, 2 * np.pi, width).astype(np.float32)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop, (stop - start, 768) float32 unit vectors."""
        parts = []
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            low, high = max(start - block * BLOCK, 0), min(stop - block * BLOCK, BLOCK)
            parts.append(self._block(block, high)[low:])
        return np.concatenate(parts)

    def _block(self, number: int, rows: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, number])
        parents = rng.integers(len(self.real), size=BLOCK)[:rows]
        steps = rng.standard_normal((BLOCK, NEIGHBOURS), dtype=np.float32)[:rows] * np.float32(SPREAD / NEIGHBOURS**0.5)
        small = self.real[parents] * (1 - steps.sum(axis=1, keepdims=True))
        for j in range(NEIGHBOURS):
            small += steps[:, j, None] * self.real[self.neighbours[parents, j]]
        small /= np.linalg.norm(small, axis=1, keepdims=True)
        waves = small @ self._frequencies
        waves += self._phases
        np.cos(waves, out=waves)
        waves *= np.float32((2 * TAIL / waves.shape[1]) ** 0.5)
        whole = np.concatenate([small, waves], axis=1)
        return whole / np.linalg.norm(whole, axis=1, keepdims=True)


def stored(rows: int, path: Path) -> Read:
    """The made vectors, written once as float16: what is compared exhaustively is what is indexed."""
    if not path.exists():
        made = Population(real_embeddings(), seed=0)
        with atomic_path(path) as temporary, temporary.open("wb") as out:
            for start in range(0, rows, BLOCK):
                out.write(made.read(start, min(start + BLOCK, rows)).astype(np.float16).tobytes())
    return reader(path, DIM)


def kinds(rows: int) -> dict[str, str]:
    """Factory strings by name, for one size; docs/search-index.md says what is left out, and why."""
    lists = coarse_lists(rows)
    inverted = {"ivf_rabitq": f"PCAR256,IVF{lists},RaBitQ", "ivf_sq4": f"PCAR128,IVF{lists},SQ4"}
    inverted["ivf_pq64"] = f"PCAR256,IVF{lists},PQ64"
    return inverted | ({"sqfp16": "SQfp16", "sq8": "SQ8", "hnsw": "HNSW32_SQ8"} if rows <= 1_000_000 else {})


def measure(
    prefix: str, factory: str, read: Read, rows: int, queries: np.ndarray, exact: np.ndarray, folder: Path, *, timed: int
) -> dict[str, Any]:
    """Build an index in a folder (or find it there) and measure it; keys begin with `prefix`."""
    finished = folder / "settings.json"
    if not finished.exists():
        started, spent = time.perf_counter(), time.process_time()
        settings = build(read, rows, queries.shape[1], IndexConfig(factory=factory), folder)
        seconds = {"build_seconds": time.perf_counter() - started, "build_cpu_seconds": time.process_time() - spent}
        write_json(finished, {**settings, **seconds, "build_peak_gb": peak_gb()})
    settings = read_json(finished)
    files = [path for path in folder.iterdir() if path.is_file() and path != finished]
    checksums = {path.name: sha256_file(path) for path in files if path.suffix != ".f16"}
    ranked = open_ranked(folder, settings, checksums)
    in_memory = sum(path.stat().st_size for path in files if path.suffix != ".f16")
    result: dict[str, Any] = {
        "factory": factory,
        "build_seconds": settings["build_seconds"],
        "build_cpu_seconds": settings["build_cpu_seconds"],
        "bytes_per_image": in_memory / rows,
        "disk_bytes_per_image": sum(path.stat().st_size for path in files) / rows,
        "nprobe": settings["search"]["nprobe"],
        "shortlist": settings["search"]["shortlist"],
        "recall_when_tuned": settings["recall_of_search"],
    }
    found = ranked.search(queries, K)[1]
    result |= {"recall10": recall_of(found[:, :10], exact[:, :10]), "recall100": recall_of(found, exact)}
    for threads in (1, 2):
        faiss.omp_set_num_threads(threads)
        suffix = "" if threads == 1 else "_2_threads"
        with threadpoolctl.threadpool_limits(threads):
            timed_here = latencies(lambda query: ranked.search(query[None], K), queries, timed)
        result |= {f"{key}{suffix}": value for key, value in timed_here.items()}
    return {f"{prefix}_{name}": value for name, value in result.items()}


def latencies(search: Callable[[np.ndarray], Any], queries: np.ndarray, timed: int) -> dict[str, float]:
    """Milliseconds of single searches, after a few that warm up, queries in turn: median, 99th percentile, processor time.

    Where other work shares the processor, the median of the processor time says more than that of the clock.
    """
    clock, processor = [], []
    until = time.perf_counter() + LONGEST_TIMING
    for number in range(timed + 5):
        if number > 10 and time.perf_counter() > until:
            break
        before, spent = time.perf_counter(), time.process_time()
        search(queries[number % len(queries)])
        clock.append(1000 * (time.perf_counter() - before))
        processor.append(1000 * (time.process_time() - spent))
    return {
        "p50_ms": float(np.median(clock[5:])),
        "p99_ms": float(np.percentile(clock[5:], 99)),
        "cpu_ms": float(np.median(processor[5:])),
    }


def truth(read: Read, rows: int, queries: np.ndarray, path: Path) -> np.ndarray:
    """(Q, K) exact neighbours, kept in a file."""
    if not path.exists():
        faiss.omp_set_num_threads(os.cpu_count() or 1)
        with atomic_path(path) as temporary:
            np.save(temporary, exact_neighbours(queries, read, rows, K)[1])
    return np.asarray(np.load(path))


def peak_gb() -> float:
    """The most memory this process has held, in 10^9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def part_size(name: str, work: Path, quick: bool) -> dict[str, Any]:
    """A made corpus of one size: every kind of index that can be built here."""
    rows = (QUICK_SIZES if quick else SIZES)[name]
    made = Population(real_embeddings(), seed=0)
    queries = made.read(10**9, 10**9 + (50 if quick else 200))  # far beyond any corpus
    read = stored(rows, work / f"{name}.f16")
    exact = truth(read, rows, queries, work / f"{name}.npy")
    results: dict[str, Any] = {f"{name}_rows": rows, f"{name}_dim": DIM, f"{name}_queries": len(queries)}
    for kind, factory in kinds(rows).items():
        if quick and kind == "ivf_pq64":  # slow to train
            continue
        faiss.omp_set_num_threads(os.cpu_count() or 1)
        folder = work / name / kind
        results |= measure(f"{name}_{kind}", factory, read, rows, queries, exact, folder, timed=20 if quick else 500)
        results[f"{name}_{kind}_peak_gb"] = max(peak_gb(), read_json(folder / "settings.json")["build_peak_gb"])
        if kind != "ivf_rabitq":
            shutil.rmtree(folder)
    return results


def part_latency(work: Path, quick: bool) -> dict[str, Any]:
    """1 M and 10 M in one run, beside what the authors' demo does with 1 M: the product with all vectors and a full sort."""
    queries = Population(real_embeddings(), seed=0).read(10**9, 10**9 + 200)
    results: dict[str, Any] = {}
    faiss.omp_set_num_threads(1)
    with threadpoolctl.threadpool_limits(1):
        for name in ("1m", "10m"):
            folder = work / name / "ivf_rabitq"
            files = {path.name: sha256_file(path) for path in folder.iterdir() if path.suffix not in {".f16", ".json"}}
            ranked = open_ranked(folder, read_json(folder / "settings.json"), files)
            figures = latencies(lambda query, ranked=ranked: ranked.search(query[None], K), queries, 100 if quick else 1000)
            results |= {f"{key}_{name}": value for key, value in figures.items()}
        rows = (QUICK_SIZES if quick else SIZES)["1m"]
        vectors = stored(rows, work / "1m.f16")(0, rows)
        theirs = latencies(lambda query: np.argsort(-(vectors @ query)), queries, 20)
        results |= {f"exhaustive_sort_{key}_1m": value for key, value in theirs.items()}
    results["speedup_over_exhaustive_sort_1m"] = theirs["p50_ms"] / results["p50_ms_1m"]
    results["latency_growth_1m_to_10m"] = results["p50_ms_10m"] / results["p50_ms_1m"]
    return results


PARTS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "1m": lambda work, quick: part_size("1m", work, quick),
    "10m": lambda work, quick: part_size("10m", work, quick),
    "latency": part_latency,
}


def promised(results: dict[str, Any]) -> dict[str, Any]:
    """The figures that the project promises and that no part gives under their own names."""
    return {
        "recall100_1m": results["1m_ivf_rabitq_recall100"],
        "bytes_per_image_1m": results["1m_ivf_rabitq_bytes_per_image"],
        "peak_memory_gb_10m": results["10m_ivf_rabitq_peak_gb"],
    }


def table(results: dict[str, Any]) -> str:
    """Every index at every size, as docs/search-index.md shows it."""
    figures = ("recall10", "recall100", "p50_ms", "p99_ms", "p50_ms_2_threads")
    header = ["images", "index", "recall@10", "recall@100", "p50 ms", "p99 ms", "p50, 2 threads"]
    rows = []
    for size in SIZES:
        for key in [key for key in results if key.startswith(f"{size}_") and key.endswith("_factory")]:
            prefix = key.removesuffix("_factory")
            cells = [f"{results[f'{prefix}_{figure}']:.{3 if 'recall' in figure else 2}f}" for figure in figures]
            cells += [f"{results[f'{prefix}_{figure}']:,.0f}" for figure in ("bytes_per_image", "disk_bytes_per_image")]
            rows.append([size, f"`{results[key]}`", *cells, f"{results[f'{prefix}_build_seconds']:,.1f}"])
    return "\n".join(machine.table([*header, "bytes in memory", "on disk", "build s"], rows))


def main() -> None:
    """Run the parts that have not run, each in a process of its own, or one of them here, and report."""
    parser = machine.parser(__doc__, quick="tiny sizes")
    parser.add_argument("--work", type=Path, default=Path("runs/index"), help="vectors, indexes, figures (%(default)s)")
    parser.add_argument("--part", choices=list(PARTS), help="only this part")
    parser.add_argument("--table", type=Path, help="only print the table of an earlier run's JSON")
    options = parser.parse_args()
    if options.table:
        return print(table(read_json(options.table)))
    work = options.work / ("quick" if options.quick else "full")
    work.mkdir(parents=True, exist_ok=True)
    if options.part:
        figures = PARTS[options.part](work, options.quick)
        seconds = {f"{options.part}_part_seconds": time.perf_counter() - machine.STARTED}
        return write_json(work / f"part-{options.part}.json", figures | seconds)
    results: dict[str, Any] = {}
    for name in PARTS:
        if not (work / f"part-{name}.json").exists():
            extra = ["--quick"] if options.quick else []
            subprocess.run([sys.executable, __file__, "--part", name, "--work", str(options.work), *extra], check=True)
        results |= read_json(work / f"part-{name}.json")
    machine.finish({**promised(results), **results}, options)
    return None


if __name__ == "__main__":
    machine.run(main)
