"""Stores of gradients: the compressed gradient of every training image on disk, which serves every later query.

Writes features.npy (half precision), ids.parquet and manifest.json, as every feature folder has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from fastattr.core.processes import in_parts
from fastattr.core.stages import fingerprint, make
from fastattr.features.store import write_features
from fastattr.generators.generator import Generator
from fastattr.generators.layers import Layer
from fastattr.gradients.compression import SCALE_ROWS, Compression, GradientConfig, gradient_features
from fastattr.gradients.encoded import EncodedImages

PART_ROWS = 512
"""Images whose features go into one file; a killed run loses at most one part."""


def write_gradient_features(
    folder: Path,
    generator: Generator,
    layers: Mapping[str, Layer],
    images: EncodedImages,
    compression: Compression,
    config: GradientConfig,
    accelerator: Accelerator,
    *,
    inputs: Mapping[str, str],
) -> dict[str, Any]:
    """Write the gradient features of all images, in parts split over the processes and kept if killed.

    Args:
        folder: gets features.npy, (N, k) float16, ids.parquet and manifest.json; if it has them already, nothing is done.
        generator: this and the next four as of `gradient_features`.
        inputs: fingerprints of what the features are made from besides the generator: 'source' (the corpus) and others.

    Returns:
        The manifest. Its 'scale' is the factor on the stored numbers, since half precision needs them near 1: true
        features = stored / scale. 'bytes_per_image' is what the store keeps of each.
    """
    parts = folder / f"parts-{fingerprint([config.identity, generator.fingerprint, list(images.image_ids), sorted(layers)])}"

    def work() -> dict[str, Any]:
        sample = np.arange(min(SCALE_ROWS, len(images.image_ids)))
        features = gradient_features(generator, layers, images, sample, compression, config)
        scale = float(1 / np.sqrt(np.mean(features.astype(np.float64) ** 2)))

        def part(rows: range) -> np.ndarray:
            features = gradient_features(generator, layers, images, np.array(rows), compression, config)
            return (features * scale).astype(np.float16)

        stored = in_parts(parts, len(images.image_ids), PART_ROWS, part, accelerator, description="gradient features")
        if accelerator.is_main_process:
            write_features(folder, stored, images.image_ids)
        return {"layers": sorted(layers), "scale": scale, "bytes_per_image": stored[0].nbytes}

    made_of = {"generator": generator.fingerprint, **inputs}
    return make(folder, work, stage="features", config=config, inputs=made_of, accelerator=accelerator, temporary=[parts])
