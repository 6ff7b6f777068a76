"""Stages: the line, as one table of functions of (config, run folder); a finished stage is read instead of run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastattr.attributor.make import build_attributor
from fastattr.core.files import read_json
from fastattr.core.stages import make, open_stage
from fastattr.corpus import stage as corpus
from fastattr.evaluation import against_teacher
from fastattr.features import candidates, stage as features
from fastattr.features.store import features_fingerprint, folders
from fastattr.generators import pretrained, queries
from fastattr.generators.pretrained import PretrainedConfig
from fastattr.generators.scratch import autoencoder as train_autoencoder, clip as train_encoder, stage as train_generator
from fastattr.pipeline import report
from fastattr.pipeline.config import BuildConfig
from fastattr.publishing import publish
from fastattr.publishing.push import AUTO
from fastattr.students import calibrate, distill
from fastattr.teachers import teach


def run_index(config: BuildConfig, run_dir: Path) -> dict[str, Any]:
    """Put the attributor together in run_dir/attributor; returns its config.json."""
    features, quality, folder = config.features, config.thumbnail_quality, run_dir / "attributor"
    inputs = {name: open_stage(run_dir / name, name)["fingerprint"] for name in ("student", "calibration", "evaluation")}
    inputs["features"] = features_fingerprint(folders(run_dir, "features", features.encoders))

    def work() -> dict[str, Any]:
        described: dict[str, Any] = {"encoders": features.encoders, "captions": features.captions, "thumbnail_quality": quality}
        build_attributor(config.index, run_dir, folder, **described)
        return {}

    settings = {"index": vars(config.index), "thumbnail_quality": quality}
    make(run_dir / "attributor-manifest", work, stage="attributor", config=settings, inputs=inputs)
    return read_json(folder / "config.json")


def run_generator(config: BuildConfig, run_dir: Path, *, autoencoder: bool = False) -> dict[str, Any]:
    """Train the generator, or its autoencoder, or take the pretrained one that the config names, which has its own."""
    if isinstance(config.generator, PretrainedConfig):
        return {} if autoencoder else pretrained.run(config.generator, run_dir)
    if autoencoder:
        return train_autoencoder.run(config.autoencoder, run_dir)
    return train_generator.run(config.generator, run_dir)


def run_encoder(config: BuildConfig, run_dir: Path) -> dict[str, Any]:
    """Train the run's own feature encoder, if the features are its."""
    own = any(specification.endswith(":encoder") for specification in config.features.encoders)
    return train_encoder.run(config.encoder, run_dir) if own else {}


def run_card(config: BuildConfig, run_dir: Path) -> dict[str, Any]:
    """Write run_dir/card: README.md and LICENSE.md as they will stand beside the attributor on the Hub."""
    folder = run_dir / "card"
    inputs = {"attributor": open_stage(run_dir / "attributor-manifest", "attributor")["fingerprint"]}

    def work() -> dict[str, Any]:
        repo_id = f"{config.push.namespace or 'NAMESPACE'}/{config.name}-attributor"
        card, licences = publish.attributor_texts(run_dir / "attributor", repo_id)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / "LICENSE.md").write_text(licences, encoding="utf-8")
        return {}

    return make(folder, work, stage="card", config=config.push, inputs=inputs)


def run_push(config: BuildConfig, run_dir: Path) -> dict[str, Any]:
    """Push what `push.kinds` names to `push.namespace`, if there is one; unchanged parts make no commit."""
    if not config.push.namespace:
        return {}
    push = config.push
    pushes = publish.push_all(run_dir, config.name, push.namespace, push.kinds, private=push.private, tag=AUTO)
    return {"pushed": [made.in_words() for made in pushes]}


STAGES: dict[str, Callable[[BuildConfig, Path], dict[str, Any]]] = {  # in the order in which they run
    "corpus": lambda config, run_dir: corpus.run(config.corpus, run_dir / "corpus"),
    "train-autoencoder": lambda config, run_dir: run_generator(config, run_dir, autoencoder=True),
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
FOLDERS = {  # that a stage writes; what teachers share (ekfac/, encoded/, base_loss/) is named for what it is of
    "corpus": ("corpus", "corpus-parts"),
    "train-autoencoder": ("autoencoder",),
    "train-generator": ("generator",),
    "train-encoder": ("encoder",),
    "queries": ("queries",),
    "features": ("features", "query_features"),
    "candidates": ("candidates",),
    "teach": ("scores",),
    "distill": ("student",),
    "calibrate": ("calibration",),
    "evaluate": ("evaluation",),
    "index": ("attributor", "attributor-manifest"),
    "card": ("card",),
    "report": ("report",),
}
# Stages that all processes of `accelerate launch` do together.
SHARED = ("corpus", "train-autoencoder", "train-generator", "train-encoder", "queries", "features", "candidates", "teach")
