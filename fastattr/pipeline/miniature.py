"""Miniature: the whole line of a config on a few images and queries, to measure what its stages cost on this machine.

Three lines run in one process of their own: one to load and compile everything, one small, one larger. For each stage the
larger and the small one give its time a unit of work (costs.py) and its start; the first gives what only the first
use costs. The peak memory of the process, plus what the arrays of the full line take beyond those of the miniature, is
the memory of the full line. Batches are as large as the config's, for they decide both.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattr.core.errors import FastattrError, InputError
from fastattr.core.files import read_json, write_json
from fastattr.core.processes import alone

if TYPE_CHECKING:
    from fastattr.pipeline.config import BuildConfig
    from fastattr.pipeline.costs import StageCost

SIZES = (1, 1, 3)
"""The three lines, in multiples of the smallest."""
IMAGES, QUERIES = 24, 4
"""Training images and queries of each split, of the smallest."""


def miniature(config: BuildConfig, size: int) -> BuildConfig:
    """The config with images, queries, draws and training steps cut to `size` times the smallest line."""

    def fewer(training: Any, steps: int) -> Any:
        steps = min(training.steps, size * steps)
        return replace(training, steps=steps, warmup_steps=min(training.warmup_steps, steps - 1), checkpoint_every=steps)

    teacher, queries = config.teacher, config.queries
    batch = teacher.batch_size
    counts = {split: min(getattr(queries, split), size * QUERIES) for split in ("train", "validation", "test")}
    settings: dict[str, Any] = {
        # Every prompt is free text here: a few captions would not have the subjects that three splits ask for.
        "queries": replace(
            queries, **counts, caption_share=0.0, recombined_share=0.0, prompts="", free_prompts=_prompts(counts)
        ),
        "candidates": replace(config.candidates, per_query=min(config.candidates.per_query, size * IMAGES)),
        "teacher": replace(
            teacher,
            factor_examples=min(teacher.factor_examples, 2 * size * batch),
            query_draws=min(teacher.query_draws, 2 * -(-size * batch // 2)),
            gradient_width=min(teacher.gradient_width, 1024),
        ),
        "distill": replace(config.distill, training=fewer(config.distill.training, 20)),
        "encoder": replace(config.encoder, training=fewer(config.encoder.training, 3)),
        "autoencoder": replace(config.autoencoder, training=fewer(config.autoencoder.training, 3)),
    }
    if not getattr(config.generator, "pretrained", ""):
        settings["refinement"] = replace(config.refinement, steps=min(config.refinement.steps, 3 * size))
        settings["generator"] = replace(config.generator, training=fewer(config.generator.training, 3))  # type: ignore[union-attr]
    return replace(config, **settings)


def _prompts(counts: Mapping[str, int]) -> tuple[str, ...]:
    """Enough texts that each split gets its number by hash."""
    return tuple(f"a picture of number {number}" for number in range(40 * sum(counts.values()) + 200))


def run_line(config: BuildConfig, run_dir: Path, images: int) -> dict[str, float]:
    """Run a miniature on the first `images` usable training images; seconds by stage."""
    from fastattr.corpus.records import TrainingImage
    from fastattr.corpus.stage import open_source
    from fastattr.corpus.store import write_corpus
    from fastattr.pipeline.build import STAGES, run_stage

    started = time.monotonic()
    found = (image for part in open_source(config.corpus).parts for image in part.read())
    usable = islice((image for image in found if isinstance(image, TrainingImage)), images)
    write_corpus(usable, run_dir / "corpus", config.corpus)
    seconds = {"corpus": time.monotonic() - started}
    for name in STAGES:
        if name in seconds or name == "push":
            continue
        started = time.monotonic()
        run_stage(name, config, run_dir)
        seconds[name] = time.monotonic() - started
    return seconds


def measure(config_file: Path, out: Path) -> None:
    """Run the three lines and write {'lines', 'peak_memory', 'start'} to `out`; made for a process of its own."""
    started = time.monotonic()
    import fastattr.pipeline.build
    from fastattr.core.processes import peak_memory
    from fastattr.pipeline.config import load_config

    loading = time.monotonic() - started
    logging.disable(logging.WARNING)
    config = load_config(config_file)
    lines: list[dict[str, Any]] = []
    for size in SIZES:
        small = miniature(config, size)
        with tempfile.TemporaryDirectory(dir=out.parent) as name:
            seconds = run_line(small, Path(name), size * IMAGES)
        lines.append({"size": size, "seconds": seconds})
    assert fastattr.pipeline.build
    write_json(out, {"lines": lines, "peak_memory": peak_memory(), "loading": loading})


def measure_here(config: BuildConfig, stages: Sequence[StageCost], config_file: Path) -> dict[str, Any]:
    """Seconds of each stage of the full line on this machine, in all, and its peak memory.

    Args:
        config: the full line.
        stages: its costs.
        config_file: its file.

    Returns:
        'seconds' (by stage, and 'in all'), 'peak_memory', 'measured' (what the miniature took).

    Raises:
        FastattrError: the miniature failed, or took longer than `plan.probe_seconds`; the text says what it said.
    """
    from fastattr.pipeline.costs import denoiser_of, stage_costs

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fastattr-") as name:
        out = Path(name) / "measured.json"
        command = [sys.executable, "-m", "fastattr.pipeline.miniature", str(config_file), str(out)]
        try:
            done = subprocess.run(
                command, env=alone(), capture_output=True, text=True, check=False, timeout=config.plan.probe_seconds
            )
        except subprocess.TimeoutExpired as error:
            raise InputError(
                f"not measured: even the line in miniature takes more than {config.plan.probe_seconds} s"
            ) from error
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise FastattrError(f"not measured: the line in miniature failed ({last})")
        measured = read_json(out)
    network = denoiser_of(config, Path(name))
    minis = {
        size: {cost.name: cost for cost in stage_costs(miniature(config, size), size * IMAGES, network)} for size in set(SIZES)
    }
    first, small, large = (line["seconds"] for line in measured["lines"])
    seconds = {}
    for stage in stages:
        if stage.name not in large:
            continue
        few, many = minis[SIZES[1]][stage.name].units, minis[SIZES[2]][stage.name].units
        seconds[stage.name] = extrapolate(
            first[stage.name], (few, small[stage.name]), (many, large[stage.name]), units=stage.units
        )
    seconds["start"] = measured["loading"]
    seconds["in all"] = sum(seconds.values())
    growth = max(cost.memory for cost in stages) - max(cost.memory for cost in minis[SIZES[2]].values())
    return {
        "seconds": seconds,
        "peak_memory": measured["peak_memory"] + max(0, growth),
        "measured": round(time.monotonic() - started, 1),
    }


def extrapolate(first: float, small: tuple[float, float], large: tuple[float, float], *, units: float) -> float:
    """Seconds of `units` of work.

    Args:
        first: seconds of the small amount of work when it was done first.
        small: units and seconds of it, done again.
        large: units and seconds of a larger amount.
        units: the full amount.

    Returns:
        Start, first use and time a unit times `units`; a time a unit that is not positive, which is noise, counts as the
        larger amount's own.
    """
    slope = (large[1] - small[1]) / (large[0] - small[0]) if large[0] > small[0] else 0.0
    if slope <= 0:
        slope = large[1] / large[0] if units > large[0] else 0.0
    start = max(0.0, large[1] - slope * large[0])
    return start + max(0.0, first - small[1]) + slope * units


if __name__ == "__main__":
    try:
        measure(Path(sys.argv[1]), Path(sys.argv[2]))
    except FastattrError as error:
        sys.exit(" ".join(str(error).split()))
