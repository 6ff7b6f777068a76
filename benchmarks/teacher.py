"""Benchmark of the teacher: how far does first order hold, and what gradients.py measures.

    python benchmarks/teacher.py --json FILE [--quick] [--run runs/emoji] [--work runs/teacher-benchmark]

Scores queries of its own, drawn by the embedded emoji generator, over random images of the corpus, with the real teacher,
once for each setting. The corpus is RUN's or, without one, made for the moment (needs npm). What is in WORK is not done
again, so a killed benchmark goes on where it stood; without --work everything is temporary. Correlations are means over
queries with 95% bootstrap intervals (_low, _high).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradients
import lab
import machine
import numpy as np

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

    def __init__(self, work: Path, corpus: Corpus, sizes: Sizes, *, seed: int) -> None:
        self.work, self.sizes, self.seed = work, sizes, seed
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

    def folder(self, name: str) -> Path:
        """A run folder with queries that all have the same random candidates."""
        run_dir, count = self.work / name, self.sizes.queries
        run_dir.mkdir(exist_ok=True)
        targets = {"corpus": self.corpus.folder, "generator": GENERATOR, **{shared: self.work / shared for shared in SHARED}}
        for link, target in targets.items():
            if not (run_dir / link).is_symlink():
                (run_dir / link).symlink_to(target.resolve(), target_is_directory=True)
        asked = {"train": 0, "validation": 0, "test": count, "steps": 25, "guidance": 2.5, "seed": self.seed + 100}
        draw_queries(QueriesConfig(**asked), run_dir)
        rows = np.random.default_rng([self.seed, 5]).choice(len(self.corpus), self.sizes.candidates, replace=False)
        if not (run_dir / "candidates" / MANIFEST).exists():
            chosen = [(rows, np.ones(len(rows), dtype=bool))] * count
            made = {"config": {"size": len(rows)}, "inputs": {"rows": fingerprint(rows.tolist())}}
            write_candidates(run_dir / "candidates", self.corpus, Queries(run_dir / "queries"), lambda: chosen, **made)
        return run_dir

    def teach(self, run_dir: Path, config: TeacherConfig) -> np.ndarray:
        """(Q, C) scores, in the order of the ids, of the teacher in a run folder; it runs unless it has with these settings."""
        kept = run_dir / f"scores-{fingerprint(vars(config))}"
        if not (kept / MANIFEST).exists():
            teach.run(config, run_dir)
            shutil.move(run_dir / "scores", kept)
        rows = sorted(read_scores(kept), key=lambda row: row.query_id)
        return np.stack([row.influence[np.argsort(row.image_ids)] for row in rows])


def agreement(name: str, first: np.ndarray, second: np.ndarray, *, seed: int) -> dict[str, float | int]:
    """Mean over queries of Spearman's correlation and of the shared part of the top 1%, with 95% bootstrap intervals."""
    found: dict[str, float | int] = {f"queries_{name}": len(first)}
    draws = np.random.default_rng([seed, 6]).integers(0, len(first), (2000, len(first)))
    for key, values in zip(("spearman", "top1pct_overlap"), gradients.agreements(first, second), strict=True):
        low, high = interval(values[draws].mean(axis=1))
        found |= {f"{key}_{name}": float(values.mean()), f"{key}_{name}_low": low, f"{key}_{name}_high": high}
    return found


def first_order(bench: Bench) -> dict[str, float | int]:
    """How far the first-order scores agree with exact ones, by the step's length, and with those of stored gradients."""
    run_dir = bench.folder("queries")
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
    options = parser.parse_args(arguments)
    sizes, seed = QUICK if options.quick else Sizes(), options.seed
    with gradients.open_emoji(options.run) as corpus, tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        results = first_order(Bench(work, corpus, sizes, seed=seed)) | {"corpus_images": len(corpus)}
        gradient_sizes = gradients.QUICK if options.quick else gradients.Sizes()
        results |= gradients.measure(corpus, gradient_sizes, seed)
        results |= gradients.measure_curve(lab.OUT, work / "bench", options.run / "corpus", gradient_sizes, seed)
    machine.finish({**results, **vars(sizes)}, options)


if __name__ == "__main__":
    machine.run(main)
