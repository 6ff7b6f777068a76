"""Loading: a diffusers pipeline from an embedded folder, a folder, or the Hub, with the LoRA that lies on it and its words."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastattr.core.errors import ArtifactDamagedError, ArtifactMismatchError
from fastattr.core.files import read_json, sha256_file
from fastattr.core.models import PIPELINE_FILES, locate
from fastattr.core.stages import fingerprint
from fastattr.generators.families import Options, sampling_defaults
from fastattr.generators.lora import first_line, load_lora, locate_lora

WORDS = "words.txt"
"""File of a generator folder: the words of its training captions, one a line."""
LITTLE_WORDS = re.compile("a|an|the|some|one|my|of|in|on|at|to|for|with|and|or|is|are|it|its|this|that|by|from|as")
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
    manifest = _manifest_of(folder)
    reference: dict[str, Any] = manifest.get("reference", {})
    if reference:
        folder = locate(reference["pretrained"], "generator", files=PIPELINE_FILES, revision=reference["revision"], **hub)
        dtype = dtype or DTYPES[reference["dtype"]]
    for file, expected in manifest.get("sha256", {}).items():
        if not (folder / file).exists() or sha256_file(folder / file) != expected:
            raise ArtifactDamagedError(f"{folder / file} is missing or not as its manifest says; fetch the generator again.")
    try:
        with _quiet_diffusers():
            known = {"local_files_only": True, "use_safetensors": True}
            pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype or torch.float32, **known)
    except Exception as error:  # diffusers raises many types for a damaged folder
        raise ArtifactDamagedError(f"{folder} cannot be loaded as a diffusers pipeline: {first_line(error)}") from error
    with _quiet_diffusers():
        if lora:
            load_lora(pipeline, locate_lora(lora, **hub))
        elif reference.get("lora"):
            adapter = locate_lora(reference["lora"], revision=reference["lora_revision"], **hub)
            if sha256_file(adapter) != reference["lora_sha256"]:
                raise ArtifactMismatchError(f"{adapter} has changed since {name_or_path} was made; use another run folder.")
            load_lora(pipeline, adapter)
    words = frozenset((folder / WORDS).read_text(encoding="utf-8").split()) if (folder / WORDS).exists() else None
    return pipeline, manifest, words


def _manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a generator's folder; {} without one."""
    return read_json(folder / "manifest.json") if (folder / "manifest.json").exists() else {}


def read_defaults(name_or_path: str | Path) -> dict[str, float]:
    """The `defaults` that `Generator.from_pretrained(name_or_path)` will have, without loading it; ArtifactNotFoundError."""
    folder = locate(name_or_path, "generator", files=["manifest.json", "model_index.json"])
    manifest = _manifest_of(folder)
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


def words_of(text: str) -> list[str]:
    """Its words in lower case, in order: runs of letters, and of digits."""
    return re.findall(r"[^\W\d_]+|\d+", text.lower())


def unknown_words(prompt: str, known: Collection[str]) -> list[str]:
    """Words of a prompt, once each, that are not `known`, nor are in the singular; articles and the like are known."""
    unknown = []
    for word in dict.fromkeys(words_of(prompt)):
        forms = {word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word)}
        if not LITTLE_WORDS.fullmatch(word) and not any(form in known for form in forms):
            unknown.append(word)
    return unknown
