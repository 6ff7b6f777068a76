"""Loading: a diffusers pipeline from an embedded folder, a folder, or the Hub, with the LoRA that lies on it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastattr.core.errors import ArtifactDamagedError, ArtifactMismatchError
from fastattr.core.files import read_json, sha256_file
from fastattr.core.models import PIPELINE_FILES, locate
from fastattr.core.stages import fingerprint
from fastattr.generators.families import Options
from fastattr.generators.lora import load_lora, locate_lora
from fastattr.generators.prompts import WORDS
from fastattr.generators.sampling import sampling_defaults

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions that a manifest may name."""


def load_pipeline(
    name_or_path: str | Path, *, dtype: torch.dtype | None, lora: str | Path | None, revision: str | None = None, **hub: Any
) -> tuple[Any, dict[str, Any], frozenset[str] | None]:
    """A pipeline, its manifest ({} without one), and the words that it was trained on (None if its folder does not say).

    Arguments and errors are those of `Generator.from_pretrained`.
    """
    from diffusers import DiffusionPipeline

    folder = locate(name_or_path, "generator", files=PIPELINE_FILES, revision=revision, **hub)
    manifest: dict[str, Any] = read_json(folder / "manifest.json") if (folder / "manifest.json").exists() else {}
    reference: dict[str, Any] = manifest.get("reference", {})
    if reference:
        folder = locate(reference["pretrained"], "generator", files=PIPELINE_FILES, revision=reference["revision"], **hub)
        dtype = dtype or DTYPES[reference["dtype"]]
    for file, expected in manifest.get("sha256", {}).items():
        if not (folder / file).exists() or sha256_file(folder / file) != expected:
            raise ArtifactDamagedError(
                f"{folder / file} is missing or not the file of its manifest; fetch the generator again."
            )
    try:
        with _quiet_diffusers():
            pipeline = DiffusionPipeline.from_pretrained(
                folder, dtype=dtype or torch.float32, local_files_only=True, use_safetensors=True
            )
    except Exception as error:  # diffusers raises many types for a damaged folder
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArtifactDamagedError(f"{folder} cannot be loaded as a diffusers pipeline: {reason}") from error
    with _quiet_diffusers():
        if lora:
            load_lora(pipeline, locate_lora(lora, **hub))
        elif reference.get("lora"):
            adapter = locate_lora(reference["lora"], revision=reference["lora_revision"], **hub)
            if sha256_file(adapter) != reference["lora_sha256"]:
                raise ArtifactMismatchError(f"{adapter} has changed since {name_or_path} was made; use another run folder.")
            load_lora(pipeline, adapter)
    words = (folder / WORDS).read_text(encoding="utf-8").split() if (folder / WORDS).exists() else None
    return pipeline, manifest, None if words is None else frozenset(words)


def read_defaults(name_or_path: str | Path) -> dict[str, float]:
    """The `defaults` that `Generator.from_pretrained(name_or_path)` will have, without loading it.

    Raises:
        ArtifactNotFoundError: there is no such model.
    """
    folder = locate(name_or_path, "generator", files=["manifest.json", "model_index.json"])
    manifest: dict[str, Any] = read_json(folder / "manifest.json") if (folder / "manifest.json").exists() else {}
    found: dict[str, float] = manifest.get("defaults", {})
    if {"steps", "guidance"} <= set(found):
        return found
    import diffusers

    return sampling_defaults(getattr(diffusers, read_json(folder / "model_index.json")["_class_name"])) | found


def weights_fingerprint(
    networks: Sequence[nn.Module], scheduler: Mapping[str, Any], options: Options, lora_scales: Sequence[Mapping[str, float]]
) -> str:
    """Identifies all that losses depend on."""
    digest = hashlib.sha256()
    for network in networks:
        for name, value in sorted(network.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    digest.update(fingerprint({key: value for key, value in scheduler.items() if not key.startswith("_")}).encode())
    if options != Options():
        digest.update(fingerprint(asdict(options)).encode())
    if lora_scales:
        digest.update(fingerprint(lora_scales).encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Hide diffusers' progress bars and the notice about a missing safety checker while loading."""
    from diffusers.utils import logging as diffusers_logging

    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)
