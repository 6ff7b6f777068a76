"""Build: the whole line from a config, stage by stage, resuming where the run folder stands.

`STAGES` is the line; every stage reads earlier folders of the run and writes its own. `embed_assets` packs a finished
run's generator and attributor as an embedded model.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastattr import (
    attribute,
    calibrate,
    candidates,
    corpus,
    distill,
    evaluate,
    features,
    pretrained,
    queries,
    teacher,
    train_autoencoder,
    train_encoder,
    train_generator,
)
from fastattr.artifacts import atomic_path, finished, open_stage, read_json, write_json, write_manifest
from fastattr.config import BuildConfig
from fastattr.pretrained import PretrainedConfig

logger = logging.getLogger(__name__)


def run_index(config: BuildConfig, run_dir: Path) -> dict[str, Any]:
    """Put the attributor together in run_dir/attributor; returns its config.json."""
    encoders = config.features.encoders
    folder, marker = run_dir / "attributor", run_dir / "attributor-manifest"
    inputs = {
        "student": open_stage(run_dir / "student", "student")["fingerprint"],
        "features": features.features_fingerprint(features.folders(run_dir, "features", encoders)),
        "calibration": open_stage(run_dir / "calibration", "calibration")["fingerprint"],
        "evaluation": open_stage(run_dir / "evaluation", "evaluation")["fingerprint"],
    }
    settings = {"index": vars(config.index), "thumbnail_quality": config.thumbnail_quality}
    if not finished(marker, stage="attributor", config=settings, inputs=inputs):
        attribute.build_attributor(
            config.index,
            run_dir,
            folder,
            encoders=encoders,
            captions=config.features.captions,
            thumbnail_quality=config.thumbnail_quality,
        )
        write_manifest(marker, stage="attributor", config=settings, inputs=inputs)
    built: dict[str, Any] = read_json(folder / "config.json")
    return built


def run_autoencoder(config: BuildConfig, run_dir: Path) -> dict[str, Any]:
    """Train the autoencoder; a pretrained generator has its own, and there is nothing to do."""
    if isinstance(config.generator, PretrainedConfig):
        return {}
    return train_autoencoder.run(config.autoencoder, run_dir)


def run_generator(config: BuildConfig, run_dir: Path) -> dict[str, Any]:
    """Train the generator in run_dir/generator, or take the one that the config names."""
    if isinstance(config.generator, PretrainedConfig):
        return pretrained.run(config.generator, run_dir)
    return train_generator.run(config.generator, run_dir)


STAGES: dict[str, Callable[[BuildConfig, Path], dict[str, Any]]] = {
    "corpus": lambda config, run_dir: corpus.run(config.corpus, run_dir / "corpus"),
    "train-autoencoder": run_autoencoder,
    "train-generator": run_generator,
    "train-encoder": lambda config, run_dir: train_encoder.run(config.encoder, run_dir),
    "queries": lambda config, run_dir: queries.run(config.queries, run_dir),
    "features": lambda config, run_dir: features.run(config.features, run_dir),
    "candidates": lambda config, run_dir: candidates.run(config.candidates, run_dir, encoders=config.features.encoders),
    "teach": lambda config, run_dir: teacher.run(config.teacher, run_dir),
    "distill": lambda config, run_dir: distill.run(config.distill, run_dir, encoders=config.features.encoders),
    "calibrate": lambda config, run_dir: calibrate.run(config.calibrate, run_dir, encoders=config.features.encoders),
    "evaluate": lambda config, run_dir: evaluate.run(config.evaluate, run_dir, encoders=config.features.encoders),
    "index": run_index,
}
"""Stage name -> function of (config, run folder), in the order in which they run."""


def run(config: BuildConfig, run_dir: Path) -> dict[str, float]:
    """Run every stage that is not finished yet; returns the seconds each took."""
    seconds = {}
    for name, stage in STAGES.items():
        started = time.monotonic()
        logger.info("stage %s", name)
        stage(config, run_dir)
        seconds[name] = round(time.monotonic() - started, 1)
    return seconds


def embed_assets(config: BuildConfig, run_dir: Path, folder: Path) -> dict[str, Any]:
    """Copy a finished run's generator and attributor to `folder` with a manifest of how they were made.

    Returns:
        The manifest; 'bytes' is the size of all files together.
    """
    stages = (
        "corpus",
        "autoencoder",
        "generator",
        "encoder",
        "queries",
        "candidates",
        "scores",
        "student",
        "calibration",
        "evaluation",
    )
    with atomic_path(folder) as temporary:
        shutil.copytree(run_dir / "generator", temporary / "generator", ignore=shutil.ignore_patterns("checkpoint*"))
        shutil.copytree(run_dir / "attributor", temporary / "attributor")
        size = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
        manifest = {
            "name": config.name,
            "command": f"fastattr build hub_scripts/configs/{config.name}.yaml --assets fastattr/assets/{config.name}",
            "bytes": size,
            "stages": {stage: open_stage(run_dir / stage, stage) for stage in stages},
        }
        write_json(temporary / "manifest.json", manifest)
    return manifest
