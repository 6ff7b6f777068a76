"""Pretrained: take an existing diffusers pipeline as the run's generator, with or without a LoRA, instead of training one.

Reads the pipeline, from a folder or the Hub; writes generator/manifest.json, which refers to it by name and commit, so
that weights are not copied. `Generator.from_pretrained` on that folder follows the reference.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastattr.core.errors import InputError
from fastattr.core.files import sha256_file
from fastattr.core.models import PIPELINE_FILES, commit_of, locate, split_revision
from fastattr.core.stages import make
from fastattr.generators.families import Options
from fastattr.generators.generator import Generator
from fastattr.generators.loading import DTYPES, locate_lora


@dataclass(frozen=True, kw_only=True)
class PretrainedConfig:
    """The section `generator:` of a config that names a pipeline; the other fields are what its files don't say."""

    pretrained: str
    """A diffusers pipeline: a folder, or 'org/name[@revision]' on the Hub."""
    lora: str = ""
    """A LoRA to lay on it: a safetensors file, a folder with one, or 'org/name[@revision]'."""
    unlearn: str = "base"
    """What the teacher changes: 'base' for the text-side key and value projections, 'lora' for the LoRA's matrices."""
    dtype: str = "float32"
    """Precision of the weights: 'float32', 'bfloat16' or 'float16'; the layers that are unlearned have float32 in any case."""
    resolution: int = 0
    """Side in pixels of the images it was fine-tuned on and draws; 0 takes the pipeline's own default."""
    max_tokens: int = 0
    """Tokens of a prompt for a T5 or Gemma text encoder; 0 takes the pipeline's own default."""
    distilled_guidance: float = 3.5
    """Guidance scale that a guidance-distilled denoiser (FLUX.1 dev) is told for a loss; 3.5 as in diffusers' script."""
    checkpointing: bool = False
    """Whether backward passes compute activations anew, which takes less memory and more time."""
    offload: bool = False
    """Whether autoencoder and text encoders wait on the CPU until they are needed, so that the denoiser has the GPU alone."""
    steps: int | None = None
    """Denoising steps of the images it draws; None takes the pipeline's own default."""
    guidance: float | None = None
    """Guidance scale of the images it draws; None takes the pipeline's own default."""

    def __post_init__(self) -> None:
        if not self.pretrained:
            raise InputError("pretrained names no pipeline; write a folder or 'org/name'.")
        if self.unlearn not in {"base", "lora"}:
            raise InputError(f"unlearn must be 'base' or 'lora', got {self.unlearn!r}")
        if self.unlearn == "lora" and not self.lora:
            raise InputError("unlearn is 'lora', and there is no LoRA; name one (lora), or set unlearn to 'base'")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.resolution < 0 or self.max_tokens < 0:
            raise InputError("resolution and max_tokens must not be negative")

    @property
    def options(self) -> Options:
        """As the generator takes them."""
        return Options(resolution=self.resolution, max_tokens=self.max_tokens, distilled_guidance=self.distilled_guidance)


def run(config: PretrainedConfig, run_dir: Path) -> dict[str, Any]:
    """Load the pipeline and the LoRA once, to check them, and write run_dir/generator/manifest.json; returns it.

    Raises:
        ArtifactNotFoundError: there is no such pipeline or LoRA.
        InputError: the pipeline is of no supported family.
    """
    return make(run_dir / "generator", lambda: _look_up(config), stage="generator", config=config, inputs={})


def _look_up(config: PretrainedConfig) -> dict[str, Any]:
    """What the manifest says of the pipeline."""
    name, revision = split_revision(config.pretrained, None)
    source = locate(name, "generator", files=PIPELINE_FILES, revision=revision)
    lora_name, lora_revision = split_revision(config.lora, None)
    lora_file = locate_lora(lora_name, revision=lora_revision) if config.lora else None
    commit = commit_of(source)
    # What a branch or tag stands for today is what is attributed; a folder of this machine keeps its place.
    reference = {
        "pretrained": str(source.resolve()) if Path(name).is_dir() else name,
        "revision": commit,
        "lora": (str(lora_file.resolve()) if Path(lora_name).exists() else lora_name) if lora_file else "",
        "lora_revision": commit_of(lora_file.parent) if lora_file else None,
        "lora_sha256": sha256_file(lora_file) if lora_file else "",
        "options": asdict(config.options),
        **{key: getattr(config, key) for key in ("unlearn", "dtype", "checkpointing", "offload")},
    }
    generator = Generator.from_pretrained(
        name, revision=commit, dtype=DTYPES[config.dtype], lora=lora_file, unlearn=config.unlearn, options=config.options
    )
    asked = {"steps": config.steps, "guidance": config.guidance}
    return {
        "reference": reference,
        "family": generator.family.name,
        "generator_fingerprint": generator.fingerprint,
        "defaults": generator.defaults | {key: float(value) for key, value in asked.items() if value is not None},
    }
