"""Config files: one YAML for the whole line, one section a stage, checked before anything runs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from fastattr.core.errors import InputError
from fastattr.core.files import atomic_path, plain
from fastattr.core.settings import at_least, read_yaml
from fastattr.corpus.stage import CorpusConfig
from fastattr.evaluation.against_teacher import EvaluateConfig
from fastattr.features.candidates import CandidatesConfig
from fastattr.features.stage import FeaturesConfig
from fastattr.generators.pretrained import PretrainedConfig
from fastattr.generators.queries import QueriesConfig
from fastattr.generators.scratch.autoencoder import AutoencoderConfig
from fastattr.generators.scratch.clip import EncoderConfig
from fastattr.generators.scratch.denoiser import GeneratorConfig
from fastattr.index.choose import IndexConfig
from fastattr.pipeline.networks import SHAPES
from fastattr.publishing.publish import PushConfig
from fastattr.students.calibrate import CalibrateConfig
from fastattr.students.distill import DistillConfig
from fastattr.teachers.config import TeacherConfig


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What a plan can't read from the files that are there yet, and when a build asks before it starts."""

    network: str = ""
    """Name of the denoiser's shape in fastattr/pipeline/networks.py, e.g. 'stable-diffusion-1'; '' reads the generator."""
    images: int = 0
    """Training images; 0 counts those of the corpus, or of its folder."""
    captions_per_image: float = 1.0
    """Mean number of captions of an image."""
    bytes_per_image: int = 60_000
    """Mean size of an image file."""
    accelerator: Literal["A100", "H100", "L4"] = "A100"
    """Whose hours are paid."""
    rate: float = 0.0
    """Money for an hour of it, in any currency; 0 leaves the money out."""
    confirm_hours: float = 1.0
    """A build that will take longer than this on this machine asks first."""
    probe_seconds: int = 60
    """Longest that measuring this machine may take."""

    def __post_init__(self) -> None:
        if self.network and self.network not in SHAPES:
            raise InputError(f"plan.network must be one of {', '.join(SHAPES)}, got {self.network!r}")
        at_least(self, 1, "probe_seconds", "captions_per_image")


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """All stages of one line; a section left out keeps its stage's defaults."""

    name: str
    """Names the run folder, runs/NAME, unless --run gives another."""
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
    thumbnail_quality: int = 40
    """WebP quality of the catalogue's thumbnails, 1 to 100."""

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
