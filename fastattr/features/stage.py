"""Features stage: every encoder reads every training image and every query.

Reads corpus/ and queries/; writes features/<encoder>/ and query_features/<encoder>/ (store.py says what a folder holds).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image

from fastattr.core.errors import InputError
from fastattr.core.settings import at_least
from fastattr.core.stages import MANIFEST, fingerprint, make, open_stage
from fastattr.corpus.store import Corpus
from fastattr.features.encoder import Encoder, encode_all
from fastattr.features.gradient import RECIPES, fit_gradient_encoder
from fastattr.features.kinds import open_encoder
from fastattr.features.store import slug, write_features
from fastattr.generators.generator import Generator

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastattr.generators.queries import Queries

PART_ROWS = 4096  # images whose features go into one file; a killed run loses at most one part a process


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Which encoders describe images and prompts."""

    encoders: tuple[str, ...] = ("open_clip-image:encoder", "open_clip-text:encoder")
    """Specifications; 'encoder' as REF is the run folder's own encoder."""
    captions: Literal["first", "mean"] = "first"
    """'first' or 'mean': how several captions of one image become one text feature."""
    batch_size: int = 256
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of weights and activations; features are float32, and stored as float16, in any case."""

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size")
        if not self.encoders:
            raise InputError("name at least one encoder")


def run(config: FeaturesConfig, run_dir: Path) -> dict[str, Any]:
    """Encode corpus and queries with every encoder, on all processes; returns each folder's manifest by name."""
    from accelerate import Accelerator  # here, so that a query need not wait for it

    from fastattr.generators.queries import Queries

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
        encoder = open_encoder(
            specification,
            folder=run_dir,
            captions=config.captions,
            device=str(accelerator.device),
            dtype=getattr(torch, config.dtype),
            backend="torch",
        )
        manifests |= encode_sets(encoder, corpus, queries, run_dir, config, accelerator)
    return manifests


def encode_sets(
    encoder: Encoder, corpus: Corpus, queries: Queries, folder: Path, config: FeaturesConfig, accelerator: Accelerator
) -> dict[str, dict[str, Any]]:
    """Write an encoder's features of corpus and queries under `folder`, as `run` has them; returns the manifests."""
    manifests = {}
    sets = (
        ("features", corpus.fingerprint, corpus.image_ids, corpus.image, corpus.captions),
        ("query_features", queries.fingerprint, queries.query_ids, queries.image, [[prompt] for prompt in queries.prompts]),
    )
    for name, source, ids, images, captions in sets:
        target = folder / name / slug(encoder.specification)
        inputs = {"source": source, "encoder": encoder.fingerprint}
        manifests[f"{name}/{target.name}"] = _encode_set(
            config, target, encoder, ids, images, captions, accelerator, inputs=inputs
        )
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
    from fastattr.core.processes import in_parts

    settings = {"captions": config.captions} | ({} if config.dtype == "float32" else {"dtype": config.dtype})
    settings, inputs = _as_recorded(folder, settings, inputs, encoder)
    parts = folder / f"parts-{fingerprint([settings, inputs, encoder.specification])}"

    def work() -> dict[str, Any]:
        ready = len(list(parts.glob("*.npy"))) * PART_ROWS
        started = time.monotonic()
        features = in_parts(
            parts,
            len(ids),
            PART_ROWS,
            lambda rows: encode_all(encoder, images, captions, batch_size=config.batch_size, rows=rows, ids=ids),
            accelerator,
            description=f"{folder.parent.name} {encoder.specification}",
        )
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


def _as_recorded(
    folder: Path, settings: dict[str, Any], inputs: dict[str, str], encoder: Encoder
) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings and inputs as a finished folder of an earlier version names them, if they are the same.

    Earlier versions recorded batch size and other encoders, which change no feature, and gave encoders other fingerprints.
    """
    if not (folder / MANIFEST).exists():
        return settings, inputs
    found = open_stage(folder, "features")
    settings |= {name: found["config"][name] for name in ("encoders", "batch_size") if name in found["config"]}
    same = found["inputs"].get("encoder") == encoder.former
    return settings, inputs | ({"encoder": encoder.former} if same else {})
