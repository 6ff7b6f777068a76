"""Build: the whole line from a config, stage by stage, resuming where the run folder stands.

`STAGES` is the line; every stage reads earlier folders of the run and writes its own. `run` plans first (once: plan.json),
asks above a limit, and keeps the config in config.yaml and what each stage took in spent.json. Under `accelerate launch`
the stages up to the teacher share all processes; the rest, which is small and whose sums would depend on the number of
processes, is done by one of its own. `embed_assets` packs a finished run's generator and attributor as an embedded model.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from fastattr.attributor.make import build_attributor
from fastattr.core.errors import FastattrError, InputError
from fastattr.core.files import MANIFEST, atomic_path, fingerprint, finished, open_stage, read_json, write_json, write_manifest
from fastattr.core.processes import alone
from fastattr.corpus import store as corpus
from fastattr.evaluation import against_teacher
from fastattr.features import candidates, stage as features
from fastattr.features.store import features_fingerprint, folders
from fastattr.generators import pretrained, queries
from fastattr.generators.pretrained import PretrainedConfig
from fastattr.generators.scratch import autoencoder as train_autoencoder, clip as train_encoder, denoiser as train_generator
from fastattr.pipeline import costs, report
from fastattr.pipeline.config import BuildConfig, save_config
from fastattr.publishing import publish
from fastattr.students import calibrate, distill
from fastattr.teachers import teach

logger = logging.getLogger(__name__)


def run_index(config: BuildConfig, run_dir: Path) -> dict[str, Any]:
    """Put the attributor together in run_dir/attributor; returns its config.json."""
    encoders = config.features.encoders
    folder, marker = run_dir / "attributor", run_dir / "attributor-manifest"
    inputs = {
        "student": open_stage(run_dir / "student", "student")["fingerprint"],
        "features": features_fingerprint(folders(run_dir, "features", encoders)),
        "calibration": open_stage(run_dir / "calibration", "calibration")["fingerprint"],
        "evaluation": open_stage(run_dir / "evaluation", "evaluation")["fingerprint"],
    }
    settings = {"index": vars(config.index), "thumbnail_quality": config.thumbnail_quality}
    if not finished(marker, stage="attributor", config=settings, inputs=inputs):
        build_attributor(
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
    return train_generator.run(config.generator, run_dir, config.refinement)


def run_encoder(config: BuildConfig, run_dir: Path) -> dict[str, Any]:
    """Train the run's own feature encoder, if the features are its."""
    if not any(specification.endswith(":encoder") for specification in config.features.encoders):
        return {}
    return train_encoder.run(config.encoder, run_dir)


def run_card(config: BuildConfig, run_dir: Path) -> dict[str, Any]:
    """Write run_dir/card: README.md and LICENSE.md as they will stand beside the attributor on the Hub."""
    folder = run_dir / "card"
    inputs = {"attributor": open_stage(run_dir / "attributor-manifest", "attributor")["fingerprint"]}
    if not finished(folder, stage="card", config=config.push, inputs=inputs):
        repo_id = f"{config.push.namespace or 'NAMESPACE'}/{config.name}-attributor"
        card, licences = publish.attributor_texts(run_dir / "attributor", repo_id)
        with atomic_path(folder) as temporary:
            temporary.mkdir(parents=True)
            (temporary / "README.md").write_text(card, encoding="utf-8")
            (temporary / "LICENSE.md").write_text(licences, encoding="utf-8")
            write_manifest(temporary, stage="card", config=config.push, inputs=inputs)
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    return manifest


def run_push(config: BuildConfig, run_dir: Path) -> dict[str, Any]:
    """Push what `push.kinds` names to `push.namespace`, if there is one; unchanged parts make no commit."""
    if not config.push.namespace:
        return {}
    pushes = publish.push_all(
        run_dir, config.name, config.push.namespace, config.push.kinds, private=config.push.private, tag=publish.AUTO
    )
    return {"pushed": [push.in_words() for push in pushes]}


STAGES: dict[str, Callable[[BuildConfig, Path], dict[str, Any]]] = {
    "corpus": lambda config, run_dir: corpus.run(config.corpus, run_dir / "corpus"),
    "train-autoencoder": run_autoencoder,
    "train-generator": run_generator,
    "train-encoder": run_encoder,
    "queries": lambda config, run_dir: queries.run(config.queries, run_dir),
    "features": lambda config, run_dir: features.run(config.features, run_dir),
    "candidates": lambda config, run_dir: candidates.run(config.candidates, run_dir, encoders=config.features.encoders),
    "teach": lambda config, run_dir: teach.run(config.teacher, run_dir),
    "distill": lambda config, run_dir: distill.run(config.distill, run_dir, encoders=config.features.encoders),
    "calibrate": lambda config, run_dir: calibrate.run(config.calibrate, run_dir, encoders=config.features.encoders),
    "evaluate": lambda config, run_dir: against_teacher.run(config.evaluate, run_dir, encoders=config.features.encoders),
    "index": run_index,
    "card": run_card,
    "push": run_push,
    "report": report.run,
}
"""Stage name -> function of (config, run folder), in the order in which they run."""
SHARED = ("corpus", "train-autoencoder", "train-generator", "train-encoder", "queries", "features", "candidates", "teach")
"""Stages that all processes of `accelerate launch` do together."""


def run_stage(name: str, config: BuildConfig, run_dir: Path) -> dict[str, Any]:
    """Run one stage, in its own precision: Accelerate would keep that of the stage before in the same process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    return STAGES[name](config, run_dir)


def planned(config: BuildConfig, run_dir: Path, config_file: Path | None) -> dict[str, Any]:
    """The plan of a run, made once and kept in run_dir/plan.json for as long as the config stays the same.

    Where nothing says how many training images there are, the corpus is read first.
    """
    file, identity = run_dir / "plan.json", fingerprint(config)
    if file.exists():
        kept: dict[str, Any] = read_json(file)
        if kept["config"] == identity:
            return kept
    try:
        costs.training_images(config, run_dir)
    except InputError:
        STAGES["corpus"](config, run_dir)
    plan = costs.plan(config, run_dir, config_file=config_file) | {"config": identity}
    write_json(file, plan)
    return plan


def run(
    config: BuildConfig,
    run_dir: Path,
    *,
    config_file: Path | None = None,
    confirm: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, float]:
    """Run every stage that is not finished yet, on all processes.

    Args:
        config: of the whole line.
        run_dir: where the stages' folders are.
        config_file: the config's file, to measure this machine with before anything runs.
        confirm: is given the plan, and raises if nothing shall be built; None makes no plan.

    Returns:
        The seconds each stage took now; run_dir/spent.json adds up what finished stages took in all runs.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.utils import InitProcessGroupKwargs

    # The others wait while one does what is left. (PartialState alone would not see ACCELERATE_USE_CPU.)
    Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))])
    state = PartialState()
    seconds: dict[str, float] = {}
    if state.is_main_process:
        save_config(config, run_dir / "config.yaml")
        if confirm is not None:
            confirm(planned(config, run_dir, config_file))
    state.wait_for_everyone()
    for name in STAGES:
        if state.num_processes > 1 and name not in SHARED:
            continue
        started, before = time.monotonic(), _manifests(run_dir)
        logger.info("stage %s", name)
        run_stage(name, config, run_dir)
        state.wait_for_everyone()
        seconds[name] = round(time.monotonic() - started, 2)
        if state.is_main_process and _manifests(run_dir) != before:
            spent = read_json(run_dir / "spent.json") if (run_dir / "spent.json").exists() else {}
            write_json(run_dir / "spent.json", spent | {name: seconds[name]})
    if state.num_processes > 1 and state.is_main_process:
        command = [
            sys.executable,
            "-m",
            "fastattr",
            "build",
            str(run_dir / "config.yaml"),
            "--run",
            str(run_dir),
            "--no-plan",
        ]
        if subprocess.run(command, env=alone(), check=False).returncode:
            raise FastattrError("the stages after the teacher failed; run the same command again to go on there.")
    state.wait_for_everyone()
    return seconds


def _manifests(run_dir: Path) -> set[tuple[str, int]]:
    """What is finished in a run folder, and since when."""
    return {(str(path), path.stat().st_mtime_ns) for path in run_dir.glob(f"**/{MANIFEST}")}


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
