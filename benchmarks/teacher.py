"""Benchmark of the teacher: is it exact, how far does first order hold, and what gradients.py measures.

    python benchmarks/teacher.py --json FILE [--quick] [--run runs/emoji] [--work runs/teacher-benchmark] [--processes 2]

Scores queries of its own, drawn by the embedded emoji generator, over random images of the corpus, with the real teacher,
once for each setting. The corpus is RUN's or, without one, made for the moment (needs npm). What is in WORK is not done
again, so a killed benchmark goes on where it stood; without --work everything is temporary. Correlations are means over
queries with 95% bootstrap intervals (_low, _high).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradients
import lab
import machine
import numpy as np
import yaml

from fastattr import FastattrError
from fastattr.core.files import read_json
from fastattr.core.models import ASSETS
from fastattr.core.stages import MANIFEST, fingerprint
from fastattr.corpus.stage import CorpusConfig
from fastattr.corpus.store import Corpus, write_corpus
from fastattr.evaluation.lds import interval
from fastattr.features.candidates import write_candidates
from fastattr.generators.families import CROSS_ATTENTION_KV
from fastattr.generators.queries import Queries, QueriesConfig, run as draw_queries
from fastattr.teachers import teach
from fastattr.teachers.config import TeacherConfig
from fastattr.teachers.scores import read_scores

GENERATOR = ASSETS / "emoji" / "generator"
SCRIPT = Path(__file__).resolve().parent.parent / "hub_scripts" / "teacher.py"
LAUNCH = "--multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
"""With ACCELERATE_USE_CPU, launches that many processes on a CPU; `--cpu --num_processes 2` silently runs one."""
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
RISES = {"05pct": 0.005, "2pct": 0.02, "10pct": 0.1}
"""Relative rise of the query's own loss by the step, by its name in the results."""
SHARED = ("encoded", "ekfac", "base_loss", "gradients")
"""Stage folders that follow from corpus, generator and settings alone: all parts of the benchmark share them."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured."""

    images: int = 0
    """Random images of the corpus to take; 0 takes all."""
    queries: int = 20
    """Queries scored exactly and to first order."""
    candidates: int = 5000
    """Training images scored for each of them."""
    loss_draws: int = 2
    query_draws: int = 256
    factor_examples: int = 2048
    pattern: str = CROSS_ATTENTION_KV
    """Weights that are unlearned: those of the figures in docs/teacher.md."""


QUICK = Sizes(images=400, queries=3, candidates=300, query_draws=32, factor_examples=256)


class Bench:
    """A working folder in which the teacher runs over and over with other settings; what is done is kept."""

    def __init__(self, work: Path, corpus: Corpus, sizes: Sizes, *, processes: int, seed: int) -> None:
        self.work, self.sizes, self.processes, self.seed = work, sizes, processes, seed
        if sizes.images:
            rows = np.random.default_rng([seed, 4]).choice(len(corpus), sizes.images, replace=False)
            if not (work / "corpus" / MANIFEST).exists():
                write_corpus(corpus.training_images(rows.tolist()), work / "corpus", CorpusConfig())
            corpus = Corpus(work / "corpus")
        self.corpus = corpus
        for name in SHARED:
            (work / name).mkdir(parents=True, exist_ok=True)

    def config(self, **changed: Any) -> TeacherConfig:
        """The teacher's settings, some of them changed."""
        names = ("factor_examples", "query_draws", "loss_draws", "pattern")
        common = TeacherConfig(seed=self.seed, **{name: getattr(self.sizes, name) for name in names})
        return replace(common, **changed)

    def folder(self, name: str, *, queries: int, candidates: int, backwards: bool = False) -> Path:
        """A run folder with that many queries, all with the same random candidates, perhaps in the opposite order."""
        run_dir = self.work / name
        run_dir.mkdir(exist_ok=True)
        targets = {"corpus": self.corpus.folder, "generator": GENERATOR, **{shared: self.work / shared for shared in SHARED}}
        for link, target in targets.items():
            if not (run_dir / link).is_symlink():
                (run_dir / link).symlink_to(target.resolve(), target_is_directory=True)
        asked = {"train": 0, "validation": 0, "test": queries, "steps": 25, "guidance": 2.5, "seed": self.seed + 100}
        draw_queries(QueriesConfig(**asked), run_dir)
        rows = np.random.default_rng([self.seed, 5]).choice(len(self.corpus), candidates, replace=False)
        if not (run_dir / "candidates" / MANIFEST).exists():
            chosen = [(rows[::-1] if backwards else rows, np.ones(candidates, dtype=bool))] * queries
            made = {"config": {"size": candidates}, "inputs": {"rows": fingerprint(rows.tolist())}}
            write_candidates(run_dir / "candidates", self.corpus, Queries(run_dir / "queries"), lambda: chosen, **made)
        return run_dir

    def teach(self, run_dir: Path, config: TeacherConfig, *, processes: int | None = None) -> np.ndarray:
        """(Q, C) scores, in the order of the ids, of the teacher in a run folder; it runs unless it has with these settings."""
        count = self.processes if processes is None else processes
        kept = run_dir / f"scores-{fingerprint([vars(config), count])}"
        if not (kept / MANIFEST).exists():
            if count > 1:
                self._launch(run_dir, config, count)
            else:
                teach.run(config, run_dir)
            shutil.move(run_dir / "scores", kept)
        manifest = read_json(kept / MANIFEST)
        if manifest["processes"] != count:
            raise FastattrError(f"{count} processes were launched, {manifest['processes']} ran.")
        rows = sorted(read_scores(kept), key=lambda row: row.query_id)
        return np.stack([row.influence[np.argsort(row.image_ids)] for row in rows])

    def _launch(self, run_dir: Path, config: TeacherConfig, count: int) -> None:
        path = run_dir / "config.yaml"
        path.write_text(yaml.safe_dump({"name": run_dir.name, "teacher": json.loads(json.dumps(vars(config)))}))
        launcher = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH.split(), "--num_processes", str(count)]
        command = [*launcher, str(SCRIPT), "--config", str(path), "--run", str(run_dir)]
        done = subprocess.run(command, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise FastattrError(f"the teacher ended with code {done.returncode}: {' '.join(command)}")


def agreement(name: str, first: np.ndarray, second: np.ndarray, *, seed: int) -> dict[str, float | int]:
    """Mean over queries of Spearman's correlation and of the shared part of the top 1%, with 95% bootstrap intervals."""
    found: dict[str, float | int] = {f"queries_{name}": len(first)}
    draws = np.random.default_rng([seed, 6]).integers(0, len(first), (2000, len(first)))
    for key, values in zip(("spearman", "top1pct_overlap"), gradients.agreements(first, second), strict=True):
        low, high = interval(values[draws].mean(axis=1))
        found |= {f"{key}_{name}": float(values.mean()), f"{key}_{name}_low": low, f"{key}_{name}_high": high}
    return found


def exactness(bench: Bench) -> dict[str, float | int]:
    """The largest difference that batch size, order and a second process make to an exact score."""
    sizes = {"queries": 2, "candidates": min(64, bench.sizes.candidates)}
    run_dir, backwards = bench.folder("exactness", **sizes), bench.folder("exactness-backwards", **sizes, backwards=True)
    base, two = (bench.teach(run_dir, bench.config(), processes=count) for count in (1, 2))
    others = [bench.teach(run_dir, bench.config(batch_size=size), processes=1) for size in (1, 7, 64)]
    others.append(bench.teach(backwards, bench.config(), processes=1))
    return {
        "max_abs_diff_batching": max(float(np.abs(other - base).max()) for other in others),
        "max_abs_diff_two_processes": float(np.abs(two - base).max()),
        "max_abs_score": float(np.abs(base).max()),
        "two_processes_ran": 2,  # else `teach` would have refused
    }


def first_order(bench: Bench) -> dict[str, float | int]:
    """How far the first-order scores agree with exact ones, by the step's length, and with those of stored gradients."""
    run_dir = bench.folder("queries", queries=bench.sizes.queries, candidates=bench.sizes.candidates)
    others = {f"at_{name}_step": bench.config(query_loss_rise=rise) for name, rise in RISES.items()}
    others["at_2pct_symmetric_step"] = bench.config(query_loss_rise=RISES["2pct"], symmetric=True)
    others["stored"] = bench.config(linearised=("test",), gradients="stored")
    linearised = bench.teach(run_dir, bench.config(linearised=("test",), gradients="contracted"))
    results: dict[str, float | int] = {"bytes_per_image": 2 * bench.config().gradient_width}
    for name, config in others.items():
        results |= agreement(name, bench.teach(run_dir, config), linearised, seed=bench.seed)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    parser = machine.parser(__doc__, quick="400 images and few queries", seed="of queries, candidates and noise")
    parser.add_argument("--run", type=Path, default=Path("runs/emoji"), help="run folder with the corpus (%(default)s)")
    parser.add_argument("--work", type=Path, help="keep what is done here, and go on from it")
    parser.add_argument("--processes", type=int, help="of the teacher (default: 1 if --quick, else 2)")
    options = parser.parse_args(arguments)
    sizes, seed = QUICK if options.quick else Sizes(), options.seed
    processes = options.processes or (1 if options.quick else 2)
    with gradients.open_emoji(options.run) as corpus, tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(work, corpus, sizes, processes=processes, seed=seed)
        results = first_order(bench) | exactness(bench) | {"corpus_images": len(corpus), "processes": processes}
        gradient_sizes = gradients.QUICK if options.quick else gradients.Sizes()
        results |= gradients.measure(corpus, gradient_sizes, seed)
        results |= gradients.measure_curve(lab.OUT, work / "bench", options.run / "corpus", gradient_sizes, seed)
    machine.finish({**results, **vars(sizes)}, options)


if __name__ == "__main__":
    machine.run(main)
