"""Check: whether what a config names is there, and whether its numbers fit together, before anything runs.

Each value alone is checked when the file is read (core/settings.py); here are files, models and sums.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import faiss

from fastattr.core.errors import ArtifactNotFoundError, InputError
from fastattr.core.models import REPO_ID, embedded_models
from fastattr.core.settings import did_you_mean
from fastattr.core.stages import MANIFEST
from fastattr.corpus.folders import read_folder
from fastattr.corpus.records import TrainingImage
from fastattr.corpus.store import Corpus
from fastattr.features.kinds import KINDS
from fastattr.generators.pretrained import PretrainedConfig
from fastattr.generators.queries import choose_prompts
from fastattr.pipeline.config import BuildConfig

PROMPT_FILES = {".txt", ".parquet", ".csv", ".json", ".jsonl"}
READ_FOR_CAPTIONS = 50_000  # captions of a larger folder are not read for a plan


def check(config: BuildConfig, run_dir: Path, *, planned: bool = False) -> None:
    """Raise ArtifactNotFoundError if files or models of a config are not there, InputError if its settings contradict.

    What is finished in `run_dir` is not looked for any more; where `planned`, `plan.images` and `plan.network` stand for a
    corpus and a generator that are not there.
    """
    if not (run_dir / "corpus" / MANIFEST).exists() and not (planned and config.plan.images):
        if config.corpus.kind not in {"emoji", "dataset"}:
            _there("corpus.path", config.corpus.path)
        if config.corpus.shards:
            _there("corpus.shards", config.corpus.shards)
    generator = config.generator
    if isinstance(generator, PretrainedConfig) and not (run_dir / "generator" / MANIFEST).exists():
        if not (planned and config.plan.network):
            _model("generator.pretrained", generator.pretrained)
        if generator.lora and not planned:
            _model("generator.lora", generator.lora)
    if Path(config.queries.prompts).suffix in PROMPT_FILES and not planned:
        _there("queries.prompts", config.queries.prompts)
    for setting in ("factors", "retrained"):
        if path := getattr(config.teacher, setting):
            _there(f"teacher.{setting}", path)
    for model in config.teacher.models:
        _model("teacher.models", model)
    _settings(config)


def _settings(config: BuildConfig) -> None:
    encoders = dict.fromkeys(config.features.encoders, "features.encoders")
    for name, setting in (encoders | dict.fromkeys(config.teacher.similarity_features, "teacher.similarity_features")).items():
        kind, _, reference = name.partition(":")
        if kind not in KINDS or not reference:
            near = did_you_mean(kind, KINDS)
            raise InputError(f"{setting}: {name!r} is not KIND:MODEL{near}; kinds are {', '.join(KINDS)}.")
    if not getattr(config.queries, config.evaluate.split):
        raise InputError(f"evaluate.split is {config.evaluate.split!r}, and queries.{config.evaluate.split} is 0.")
    if not config.queries.train:
        raise InputError("queries.train is 0: the student would have nothing to learn from.")
    try:
        re.compile(config.teacher.pattern)
    except re.error as error:
        raise InputError(f"teacher.pattern is no regular expression: {error}.") from error
    for name, factory in (("factory", config.index.factory), ("plain", config.index.plain)):
        if factory in {"", "auto"}:
            continue
        try:
            faiss.index_factory(config.distill.student.embed_dim if name == "factory" else 2**10, factory)
        except RuntimeError as error:
            raise InputError(f"index.{name} {factory!r} is no FAISS factory string for these vectors.") from error


def _there(setting: str, path: str) -> None:
    if not Path(path).exists():
        beside = [other.name for other in Path(path).parent.iterdir()] if Path(path).parent.is_dir() else []
        raise ArtifactNotFoundError(f"{setting} is {path!r}, and there is no such file{did_you_mean(Path(path).name, beside)}.")


def _model(setting: str, name: str) -> None:
    known = embedded_models()
    if name not in known and not Path(name).exists() and not REPO_ID.fullmatch(name.partition("@")[0]):
        wrong = f"no embedded model ({', '.join(known)}){did_you_mean(name, known)}, no folder, and no Hub repository"
        raise ArtifactNotFoundError(f"{setting} is {name!r}: {wrong} 'org/name'.")


def check_queries(config: BuildConfig, run_dir: Path) -> None:
    """Raise InputError, which proposes numbers that fit, for more queries than there are captions, if these can be read."""
    if config.queries.prompts or (run_dir / "queries" / MANIFEST).exists():
        return
    captions: list[str] = []
    if (run_dir / "corpus" / MANIFEST).exists():
        captions = [captions[0] for captions in Corpus(run_dir / "corpus").captions]
    elif config.corpus.kind == "folder" and Path(config.corpus.path).is_dir():
        images = (image for image in read_folder(Path(config.corpus.path)) if isinstance(image, TrainingImage))
        captions = [image.captions[0] for image in itertools.islice(images, READ_FOR_CAPTIONS)]
    if 0 < len(captions) < READ_FOR_CAPTIONS:
        choose_prompts(captions, config.queries)
