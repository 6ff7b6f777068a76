"""Ground truth by retraining: emoji-bench, its small generator trained again and again on parts of its corpus.

    python benchmarks/ground_truth.py --run runs/bench [--processes 2] [--only lds|groups|leave-k-out]

Which models there are: fastattr/evaluation/subsets.py; the recipe and their numbers: benchmarks/emoji-bench.yaml. Leave-K-out
removes what RUN/rankings.parquet says, which benchmarks/truth.py --rankings writes. Each model is a process of its own with
one thread, --processes of them side by side; the command may be killed and started again at any time. A new run folder takes
what the ground truth in --out already has, if recipe, images and queries are the same.

Reads the emoji corpus (--corpus, or built from npm packages) and the embedded autoencoder; writes RUN/ and, once models
are there, the ground truth (fastattr/evaluation/truth.py) to --out.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import machine

from fastattr.core.errors import FastattrError
from fastattr.core.models import ASSETS
from fastattr.core.settings import read_yaml
from fastattr.core.stages import MANIFEST
from fastattr.corpus import stage as corpora
from fastattr.corpus.stage import CorpusConfig
from fastattr.evaluation.record import make_ground_truth
from fastattr.evaluation.retrain import Retraining, prepare, run_all, run_one
from fastattr.evaluation.subsets import WHAT, Model, RetrainConfig

CONFIG = Path(__file__).parent / "emoji-bench.yaml"
OUT = Path(__file__).resolve().parent / "truth" / "emoji-bench"
AUTOENCODER = ASSETS / "emoji" / "generator" / "vae"


def open_run(config: RetrainConfig, run_dir: Path, source: Path | None) -> Retraining:
    """The run folder, prepared; without a finished corpus, in it or in `source`, the emoji corpus is built there."""
    if source is None:
        source = run_dir / "source"
        if not (run_dir / "corpus" / MANIFEST).exists():
            corpora.run(CorpusConfig(variants=True), source)
    return prepare(config, run_dir, autoencoder=AUTOENCODER, source=source)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, then write the ground truth."""
    parser = argparse.ArgumentParser(description="Train emoji-bench's models again and again; resumes.")
    parser.add_argument("--run", type=Path, default=Path("runs/bench"), help="run folder (%(default)s)")
    parser.add_argument("--config", type=Path, default=CONFIG, help="the benchmark's settings (%(default)s)")
    parser.add_argument("--corpus", type=Path, help="a finished emoji corpus; else it is built in the run folder")
    parser.add_argument("--processes", type=int, default=2, help="models side by side, one thread each (%(default)s)")
    parser.add_argument("--only", choices=WHAT, action="append", help="train these models alone; may be repeated")
    parser.add_argument("--out", type=Path, default=OUT, help="where the ground truth is written (%(default)s)")
    parser.add_argument("--model", help="train and measure this one model in this process, write no ground truth")
    options = parser.parse_args(arguments)
    run = open_run(read_yaml(options.config, RetrainConfig), options.run, options.corpus)
    if options.model:
        return run_one(run, options.model)

    def command(model_id: str) -> list[str]:
        return [sys.executable, __file__, "--run", str(options.run), "--config", str(options.config), "--model", model_id]

    def train_all(models: Sequence[Model], description: str) -> None:
        logs = options.run / "logs"
        failed = run_all(models, command, logs, processes=options.processes, description=description)
        if failed:
            raise FastattrError(f"{len(failed)} models failed ({', '.join(failed)}); see {logs}, run again.")

    manifest = make_ground_truth(run, options.out, options.only or WHAT, train_all, machine=machine.describe())
    if options.out.resolve() != OUT:  # the card says how to read any of these
        shutil.copyfile(OUT / "README.md", options.out / "README.md")
    print(f"{options.out}: {manifest['models']}")
    return None


if __name__ == "__main__":
    machine.run(main)
