"""The index from 15 thousand to 10 million images: recall, latency, memory, disk, build time.

    python benchmarks/index.py --json benchmarks/results/index.json            # about an hour on 2 cores, 20 GB of disk
    python benchmarks/index.py --quick                                         # tiny sizes, less than 2 minutes

Every part runs in a process of its own (its peak memory is its own) and leaves its figures in --work, so that an interrupted
run goes on with the next part; --part runs one. Vectors of 118 thousand and more are made from the distribution of the real
ones (benchmarks/population.py). Queries are made vectors that are in no index and tuned nothing; at 15 thousand they are
real ones, held out. An answer is timed as a user gets it, one query at a time: 100 neighbours, short list ranked again from
float16 vectors whose digests are compared. Recall is against exhaustive search in float32.

Keys are PART_KIND_FIGURE, e.g. 1m_ivf_rabitq_recall100; those that the project promises stand alone (`promised`).
"""

from __future__ import annotations

import argparse
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
import population
import threadpoolctl

from fastattr.core.files import atomic_path, read_json, sha256_file, write_json
from fastattr.index.build import build
from fastattr.index.choose import IndexConfig, coarse_lists
from fastattr.index.files import Read
from fastattr.index.search import open_ranked
from fastattr.index.tune import exact_neighbours, recall_of

SIZES = {"118k": 118_287, "1m": 1_000_000, "10m": 10_000_000}
QUICK_SIZES = {"118k": 6_000, "1m": 8_000, "10m": 12_000}
HELD_OUT = 200
"""Real embeddings that serve as queries."""
K = 100
LONGEST_TIMING = 15.0
"""Seconds after which the timing of a slow kind ends, with as many queries as there were."""
SLOW_TO_TRAIN = ("ivf_pq64", "ivf_opq")
WHOLE = {"flat": "Flat", "sqfp16": "SQfp16", "sq8": "SQ8", "hnsw": "HNSW32_SQ8"}
"""Kinds that compare, or link, all images."""


def kinds(rows: int, dim: int) -> dict[str, str]:
    """Factory strings by name, for one size; docs/search-index.md says what is left out, and why."""
    lists = coarse_lists(rows)
    reduced = f"PCAR{256 if dim > 256 else 64},"
    inverted = {
        "ivf_rabitq": f"{reduced}IVF{lists},RaBitQ",
        "ivf_sq4": f"{reduced.replace('256', '128')}IVF{lists},SQ4",
        "ivf_pq64": f"{reduced}IVF{lists},PQ{64 if dim > 256 else 32}",
    }
    if rows <= 120_000:
        size = 64 if dim > 256 else 32
        return {**WHOLE, **inverted, "ivf_opq": f"OPQ{size}_{4 * size if dim > 256 else 64},IVF{lists},PQ{size}"}
    if rows <= 1_000_000:
        return {**inverted, "sqfp16": "SQfp16", "sq8": "SQ8", "hnsw": WHOLE["hnsw"]}
    return inverted


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


def part_real(work: Path, quick: bool) -> dict[str, Any]:
    """The real 15,351 embeddings, 128 wide.

    mAP(L) is of the L images that a search gives, against the exact ranking's first L, 1% and 5% of the images.
    """
    real = population.real_embeddings()
    held_out = np.sort(np.random.default_rng(0).permutation(len(real))[:HELD_OUT])
    base = np.ascontiguousarray(np.delete(real, held_out, axis=0)[: 3000 if quick else None])
    read = lambda start, stop: base[start:stop]  # noqa: E731
    queries = real[held_out]
    exact = truth(read, len(base), queries, work / "real.npy")
    results: dict[str, Any] = {"15k_rows": len(base), "15k_dim": base.shape[1], "15k_queries": len(queries)}
    relevant = {1: max(1, len(base) // 100), 5: len(base) // 20}
    values = queries @ base.T
    order = np.argsort(-values, axis=1)
    for name, factory in kinds(len(base), base.shape[1]).items():
        if quick and name in SLOW_TO_TRAIN:
            continue
        folder = work / "real" / name
        results |= measure(f"15k_{name}", factory, read, len(base), queries, exact, folder, timed=20 if quick else 300)
        settings = read_json(folder / "settings.json")
        ranked = open_ranked(folder, settings, {path.name: sha256_file(path) for path in folder.iterdir()})
        for percent, count in relevant.items():
            found = zip(ranked.search(queries, count)[1], order, strict=True)
            figures = [average_precision(mine, true[:count]) for mine, true in found]
            results[f"15k_{name}_map_{percent}pct"] = float(np.mean(figures))
    return results


def average_precision(ranking: np.ndarray, relevant: np.ndarray) -> float:
    """AP of a ranking of rows, as far as it goes, with a set of relevant ones; those that it lacks count as not found."""
    hits = np.isin(ranking, relevant)
    return float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].sum() / len(relevant))


def part_size(name: str, work: Path, quick: bool) -> dict[str, Any]:
    """A made corpus of one size: every kind of index that can be built here."""
    rows = (QUICK_SIZES if quick else SIZES)[name]
    made = population.Population(population.real_embeddings(), seed=0)
    queries = made.read(10**9, 10**9 + (50 if quick else 200))  # far beyond any corpus
    read = population.stored(rows, work / f"{name}.f16")
    exact = truth(read, rows, queries, work / f"{name}.npy")
    results: dict[str, Any] = {f"{name}_rows": rows, f"{name}_dim": population.DIM, f"{name}_queries": len(queries)}
    for kind, factory in kinds(rows, population.DIM).items():
        if quick and kind in SLOW_TO_TRAIN:
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
    queries = population.Population(population.real_embeddings(), seed=0).read(10**9, 10**9 + 200)
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
        vectors = population.stored(rows, work / "1m.f16")(0, rows)
        theirs = latencies(lambda query: np.argsort(-(vectors @ query)), queries, 20)
        results |= {f"exhaustive_sort_{key}_1m": value for key, value in theirs.items()}
    results["speedup_over_exhaustive_sort_1m"] = theirs["p50_ms"] / results["p50_ms_1m"]
    results["latency_growth_1m_to_10m"] = results["p50_ms_10m"] / results["p50_ms_1m"]
    return results


PARTS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "real": part_real,
    "118k": lambda work, quick: part_size("118k", work, quick),
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
        **extrapolated(results),
    }


def extrapolated(results: dict[str, Any]) -> dict[str, Any]:
    """What 400 M images would need: bytes in proportion, milliseconds by a power law through 118 k, 1 M and 10 M."""
    sizes = [name for name in SIZES if f"{name}_ivf_rabitq_cpu_ms" in results]
    rows = np.log([results[f"{name}_rows"] for name in sizes])
    times = np.log([results[f"{name}_ivf_rabitq_cpu_ms"] for name in sizes])
    slope, start = np.polyfit(rows, times, 1)
    return {
        "latency_exponent": float(slope),
        "cpu_ms_400m": float(np.exp(start + slope * np.log(4e8))),
        "memory_gb_400m": results["10m_ivf_rabitq_bytes_per_image"] * 4e8 / 1e9,
        "disk_gb_400m": results["10m_ivf_rabitq_disk_bytes_per_image"] * 4e8 / 1e9,
        "build_cpu_hours_400m": results["10m_ivf_rabitq_build_cpu_seconds"] * 40 * 40**0.5 / 3600,
    }


def table(results: dict[str, Any]) -> str:
    """Every index at every size, as docs/search-index.md shows it."""
    figures = ("recall10", "recall100", "p50_ms", "p99_ms", "p50_ms_2_threads")
    lines = [
        "| images | index | recall@10 | recall@100 | p50 ms | p99 ms | p50, 2 threads | bytes in memory | on disk | build s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for size in ("15k", *SIZES):
        for key in [key for key in results if key.startswith(f"{size}_") and key.endswith("_factory")]:
            prefix = key.removesuffix("_factory")
            cells = [f"{results[f'{prefix}_{figure}']:.{3 if 'recall' in figure else 2}f}" for figure in figures]
            cells += [f"{results[f'{prefix}_{figure}']:,.0f}" for figure in ("bytes_per_image", "disk_bytes_per_image")]
            name = f"`{results[key]}`"
            lines.append("| " + " | ".join([size, name, *cells, f"{results[f'{prefix}_build_seconds']:,.1f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the parts that have not run, or one of them, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/index"), help="vectors, indexes, figures (%(default)s)")
    parser.add_argument("--part", choices=list(PARTS), help="only this part")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", type=Path, help="only print the table of an earlier run's JSON")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read_json(arguments.table)))
        return
    work = arguments.work / ("quick" if arguments.quick else "full")
    work.mkdir(parents=True, exist_ok=True)
    run(work, arguments.part, arguments.quick, arguments.json)


def run(work: Path, part: str | None, quick: bool, path: Path | None) -> None:
    """Run parts in processes of their own; with `part`, run that one here and leave its figures in `work`."""
    if part:
        started = time.perf_counter()
        figures = PARTS[part](work, quick)
        write_json(work / f"part-{part}.json", {**figures, f"{part}_part_seconds": time.perf_counter() - started})
        return
    for name in PARTS:
        if not (work / f"part-{name}.json").exists():
            extra = ["--quick"] if quick else []
            subprocess.run([sys.executable, __file__, "--part", name, "--work", str(work.parent), *extra], check=True)
    results: dict[str, Any] = {}
    for name in PARTS:
        results |= read_json(work / f"part-{name}.json")
    machine.report({**promised(results), **results, "seed": 0, "quick": quick, **machine.describe()}, path)


if __name__ == "__main__":
    main()
