"""Features stage: every encoder reads every training image and every query; store.py says what a folder holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from fastattr.core.errors import InputError
from fastattr.core.processes import in_parts
from fastattr.core.settings import at_least
from fastattr.core.stages import fingerprint, make
from fastattr.corpus.store import Corpus
from fastattr.features.by_generator import RECIPES, fit_gradient_encoder
from fastattr.features.encoder import Encoder, encode_all
from fastattr.features.kinds import open_encoder
from fastattr.features.store import slug, write_features
from fastattr.generators.generator import Generator
from fastattr.generators.queries import Queries

PART_ROWS = 4096  # images whose features go into one file; a killed run loses at most one part a process


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Which encoders describe images and prompts."""

    encoders: tuple[str, ...] = ("open_clip-image:encoder", "open_clip-text:encoder")
    """Specifications; 'encoder' as REF is the run folder's own encoder."""
    captions: Literal["first", "mean"] = "first"  # 'first' or 'mean': how several captions of one image become one text feature
    batch_size: int = 256
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of weights and activations; features are float32, and stored as float16, in any case."""

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size")
        if not self.encoders:
            raise InputError("name at least one encoder")


def run(config: FeaturesConfig, run_dir: Path) -> dict[str, Any]:
    """Encode corpus and queries with every encoder, on all processes; returns each folder's manifest by name."""
    accelerator = Accelerator()
    corpus = Corpus(run_dir / "corpus")
    queries = Queries(run_dir / "queries")
    manifests: dict[str, Any] = {}
    for specification in config.encoders:
        kind, _, reference = specification.partition(":")
        if kind == "gradient" and reference in RECIPES and accelerator.is_main_process:
            generator = Generator.from_pretrained(run_dir / "generator")
            fit_gradient_encoder(generator, corpus, run_dir / reference, RECIPES[reference], reference="generator")
        accelerator.wait_for_everyone()
        where: dict[str, Any] = {"folder": run_dir, "device": str(accelerator.device), "backend": "torch"}
        encoder = open_encoder(specification, captions=config.captions, dtype=getattr(torch, config.dtype), **where)
        prompts = [[prompt] for prompt in queries.prompts]
        for name, source, ids, captions in (
            ("features", corpus, corpus.image_ids, corpus.captions),
            ("query_features", queries, queries.query_ids, prompts),
        ):
            target = run_dir / name / slug(specification)
            inputs = {"source": source.fingerprint, "encoder": encoder.fingerprint}
            made = _encode_set(config, target, encoder, ids, source.image, captions, accelerator, inputs=inputs)
            manifests[f"{name}/{target.name}"] = made
    return manifests


def _encode_set(
    config: FeaturesConfig,
    folder: Path,
    encoder: Encoder,
    ids: Sequence[str],
    images: Callable[[int], Image.Image],
    captions: Sequence[Sequence[str]],
    accelerator: Accelerator,
    *,
    inputs: dict[str, str],
) -> dict[str, Any]:
    """One feature folder, in parts that are split over the processes and kept if killed; returns its manifest."""
    settings = {"captions": config.captions} | ({} if config.dtype == "float32" else {"dtype": config.dtype})
    parts = folder / f"parts-{fingerprint([settings, inputs, encoder.specification])}"

    def work() -> dict[str, Any]:
        def encode(rows: range) -> np.ndarray:
            return encode_all(encoder, images, captions, batch_size=config.batch_size, rows=rows, ids=ids)

        ready = len(list(parts.glob("*.npy"))) * PART_ROWS
        started, label = time.monotonic(), f"{folder.parent.name} {encoder.specification}"
        features = in_parts(parts, len(ids), PART_ROWS, encode, accelerator, description=label)
        seconds = time.monotonic() - started
        if accelerator.is_main_process:
            write_features(folder, features, ids)
        return {
            "width": features.shape[1],
            "rows": len(ids),
            "encoder": encoder.specification,
            "dtype": config.dtype,
            "device": accelerator.device.type,
            "processes": accelerator.num_processes,
            "seconds": round(seconds, 2),
            # Reading, preparing and encoding, by all processes together; of what the run that finished encoded itself.
            "images_per_second": round(max(0, len(ids) - ready) / seconds, 1),
        }

    return make(folder, work, stage="features", config=settings, inputs=inputs, accelerator=accelerator, temporary=[parts])
