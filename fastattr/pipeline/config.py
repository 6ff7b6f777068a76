"""Config files: one YAML for the whole line, one section a stage, checked before anything runs.

core/settings.py checks each value alone when a file is read; `check` looks for files, models and sums that fit together.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import faiss
import yaml

from fastattr.core.errors import ArtifactNotFoundError, InputError
from fastattr.core.files import atomic_path, plain
from fastattr.core.models import REPO_ID, embedded_models
from fastattr.core.settings import at_least, did_you_mean, read_yaml
from fastattr.core.stages import MANIFEST
from fastattr.corpus.folders import read_folder
from fastattr.corpus.records import TrainingImage
from fastattr.corpus.stage import CorpusConfig
from fastattr.corpus.store import Corpus
from fastattr.evaluation.against_teacher import EvaluateConfig
from fastattr.features.candidates import CandidatesConfig
from fastattr.features.kinds import KINDS
from fastattr.features.stage import FeaturesConfig
from fastattr.generators.pretrained import PretrainedConfig
from fastattr.generators.queries import QueriesConfig, choose_prompts
from fastattr.generators.scratch.autoencoder import AutoencoderConfig
from fastattr.generators.scratch.clip import EncoderConfig
from fastattr.generators.scratch.denoiser import GeneratorConfig
from fastattr.index.choose import IndexConfig
from fastattr.pipeline.networks import SHAPES
from fastattr.publishing.publish import PushConfig
from fastattr.students.calibrate import CalibrateConfig
from fastattr.students.distill import DistillConfig
from fastattr.teachers.config import TeacherConfig

PROMPT_FILES = {".txt", ".parquet", ".csv", ".json", ".jsonl"}
READ_FOR_CAPTIONS = 50_000  # captions of a larger folder are not read for a plan


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What a plan can't read from the files that are there yet, and when a build asks before it starts."""

    network: str = ""
    """Name of the denoiser's shape in fastattr/pipeline/networks.py, e.g. 'stable-diffusion-1'; '' reads the generator."""
    images: int = 0  # training images; 0 counts those of the corpus, or of its folder
    captions_per_image: float = 1.0  # mean number of captions of an image
    bytes_per_image: int = 60_000  # mean size of an image file
    accelerator: Literal["A100", "H100", "L4"] = "A100"  # whose hours are paid
    rate: float = 0.0  # money for an hour of it, in any currency; 0 leaves the money out
    confirm_hours: float = 1.0  # a build that will take longer than this on this machine asks first
    probe_seconds: int = 60  # longest that measuring this machine may take

    def __post_init__(self) -> None:
        if self.network and self.network not in SHAPES:
            raise InputError(f"plan.network must be one of {', '.join(SHAPES)}, got {self.network!r}")
        at_least(self, 1, "probe_seconds", "captions_per_image")


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """All stages of one line; a section left out keeps its stage's defaults."""

    name: str  # names the run folder, runs/NAME, unless --run gives another
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    generator: GeneratorConfig | PretrainedConfig = field(default_factory=GeneratorConfig)
    """`pretrained: NAME` takes an existing pipeline; without it one is trained."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    queries: QueriesConfig = field(default_factory=QueriesConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    candidates: CandidatesConfig = field(default_factory=CandidatesConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    push: PushConfig = field(default_factory=PushConfig)
    thumbnail_quality: int = 40  # WebP quality of the catalogue's thumbnails, 1 to 100

    def __post_init__(self) -> None:
        if not 1 <= self.thumbnail_quality <= 100:
            raise InputError(f"thumbnail_quality must be 1 to 100, got {self.thumbnail_quality}")


def load_config(path: str | Path) -> BuildConfig:
    """Read and check the config file of a whole line; see `read_yaml`."""
    return read_yaml(path, BuildConfig)


def save_config(config: BuildConfig, path: Path) -> None:
    """Write a config with all its settings, defaults too, as a file that `load_config` reads; an equal one is left alone."""
    text = yaml.safe_dump(json.loads(json.dumps(config, default=plain)), sort_keys=False, allow_unicode=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def check(config: BuildConfig, run_dir: Path, *, planned: bool = False) -> None:
    """Raise ArtifactNotFoundError if files or models of a config are not there, InputError if its settings contradict. What is
    finished in `run_dir` is not looked for any more; where `planned`, `plan.images` and `plan.network` stand for a corpus and a
    generator that are not there.
    """
    if not (run_dir / "corpus" / MANIFEST).exists() and not (planned and config.plan.images):
        if config.corpus.kind not in {"emoji", "dataset"}:
            _there("corpus.path", config.corpus.path)
        if config.corpus.shards:
            _there("corpus.shards", config.corpus.shards)
    if config.corpus.opt_out:
        _there("corpus.opt_out", config.corpus.opt_out)
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
