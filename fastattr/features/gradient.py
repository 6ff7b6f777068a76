"""Gradient encoder: gradient features as a feature folder like any other, of training images and of later queries.

An image's row is a whitened gradient, its leading coordinates, made a unit vector. Of the denoising loss in the unlearned
layers: the cosine of a query's and a training image's row then orders training images as the linearised teacher does, up to
the length of their gradients. Of the squared norm of the network's output, in all layers and followed by a ridge kernel:
then as D-TRAK does, in the eigenbasis of EKFAC. As an encoder it is named `gradient:REF`, REF a folder that
`fit_gradient_encoder` wrote ('gradients' or 'output-gradients' in a run folder; the features stage fits it there). Noise is
one for all images, since queries have no ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from fastattr.core.errors import InputError
from fastattr.core.files import atomic_path
from fastattr.core.stages import MANIFEST, fingerprint, open_stage, require_same, write_manifest
from fastattr.corpus.store import Corpus
from fastattr.generators.families import Layer
from fastattr.generators.generator import Generator
from fastattr.gradients.compression import Compression, GradientConfig, RidgeKernel, gradient_features, leading_coordinates
from fastattr.gradients.ekfac import Factors, fit_ekfac
from fastattr.gradients.losses import EncodedImages, denoising_losses

FACTOR_IMAGES = 512
"""Training images, spread over the corpus, on which the curvature is fitted, each at `GradientConfig.draws` timesteps."""
KERNEL = "kernel.safetensors"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is differentiated, where, and how it is compared."""

    config: GradientConfig
    pattern: str = ""
    """Layers whose gradients are taken; '' as of `Generator.modules_to_unlearn`."""
    ridge: float = 0.0
    """Of the `RidgeKernel` that follows; 0 is none."""


RECIPES = {
    "gradients": Recipe(config=GradientConfig(width=2048, draws=4)),
    "output-gradients": Recipe(
        config=GradientConfig(output="squared_norm", width=4096, draws=8), pattern=r".", ridge=1.0
    ),  # layers and ridge as emoji-bench's sweep chose for D-TRAK (docs/truth.md)
}
"""By the name that a feature specification and a run folder give them."""


def encode_plainly(generator: Generator, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> EncodedImages:
    """Images with their first captions as the denoiser sees them, all with one noise."""
    latents = generator.encode_image(images)
    conditioning = generator.encode_prompt([texts[0] for texts in captions])
    return EncodedImages(["gradient features"] * len(images), latents[:, None], conditioning, np.arange(len(images) + 1))


class GradientEncoder:
    """Compressed gradients of a generator's loss as a feature encoder."""

    def __init__(
        self,
        generator: Generator,
        factors: Factors,
        coordinates: np.ndarray,
        recipe: Recipe,
        kernel: RidgeKernel | None = None,
    ) -> None:
        """Wrap a generator; its layers that match the recipe's pattern are made to require gradients."""
        config = recipe.config
        self.specification = "gradient"
        after = [recipe.pattern, coordinates.tolist()]
        if kernel is not None:
            after += [recipe.ridge, kernel.factors.tolist()]
        settings = {name: value for name, value in config.identity.items() if name != "batch_size"}
        self.fingerprint = self.former = fingerprint([generator.fingerprint, settings, *after])
        self._generator, self._config, self._kernel = generator, config, kernel
        self._layers = _require_gradients(generator, recipe.pattern)
        self._compression = Compression(self._layers, config, factors, coordinates)

    def encode(self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> np.ndarray:
        """(B, F) float32 unit vectors; see `fastattr.features.encoder.Encoder`."""
        encoded = encode_plainly(self._generator, images, captions)
        rows = gradient_features(
            self._generator, self._layers, encoded, np.arange(len(images)), self._compression, self._config
        )
        if self._kernel is not None:
            rows = self._kernel(rows)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def _require_gradients(generator: Generator, pattern: str) -> dict[str, Layer]:
    layers = generator.modules_to_unlearn(pattern)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    return layers


def fit_gradient_encoder(generator: Generator, corpus: Corpus, folder: Path, recipe: Recipe, *, reference: str) -> None:
    """Fit curvature, coordinates and kernel on a part of the corpus and write them to a folder.

    The folder gets the factor files, coordinates.npy, maybe kernel.safetensors, and manifest.json; nothing is done if it has
    them. `reference` is the generator's name, which `open_gradient_encoder` loads.
    """
    if (folder / MANIFEST).exists():
        return
    config, layers = recipe.config, _require_gradients(generator, recipe.pattern)
    rows = np.unique(np.linspace(0, len(corpus) - 1, FACTOR_IMAGES).astype(np.int64))
    encoded = encode_plainly(generator, [corpus.image(row) for row in rows], [corpus.captions[row] for row in rows])

    def batches() -> Iterator[torch.Tensor]:
        found = denoising_losses(
            generator, encoded, np.arange(len(rows)), draws=config.draws, batch_size=config.batch_size, seed=config.seed
        )
        for _, losses in found:
            yield losses.flatten() * config.draws

    factors = fit_ekfac(layers, batches)
    coordinates = leading_coordinates(generator, layers, encoded, factors, config)
    factors.save(folder, made_of={"generator": generator.fingerprint, "corpus": corpus.fingerprint})
    with atomic_path(folder / "coordinates.npy") as temporary:
        np.save(temporary, coordinates)
    if recipe.ridge:
        compression = Compression(layers, config, factors, coordinates)
        sample = [
            gradient_features(generator, layers, encoded, part, compression, config)
            for part in np.array_split(np.arange(len(rows)), -(-len(rows) // config.batch_size))
        ]
        kernel = RidgeKernel.fit(np.concatenate(sample), ridge=recipe.ridge)
        with atomic_path(folder / KERNEL) as temporary:
            save_file({"directions": kernel.directions, "factors": kernel.factors}, temporary)
    write_manifest(
        folder,
        stage="gradient_encoder",
        config=config,
        inputs={"generator": generator.fingerprint, "corpus": corpus.fingerprint},
        pattern=recipe.pattern,
        ridge=recipe.ridge,
        generator=reference,
    )


def open_gradient_encoder(folder: Path, *, run_dir: Path | None = None, device: str = "cpu") -> GradientEncoder:
    """Load what `fit_gradient_encoder` wrote, with its generator ('generator' is found in `run_dir`).

    Raises:
        ArtifactMismatchError: the generator is not the one that it was fitted for.
    """
    manifest = open_stage(folder, "gradient_encoder")
    name = manifest["generator"]
    if name == "generator" and run_dir is None:
        raise InputError(f"{folder} belongs to the generator of a run folder; open it from there.")
    generator = Generator.from_pretrained(run_dir / name if name == "generator" and run_dir else name, device=device)
    require_same("the generator", generator.fingerprint, manifest["inputs"]["generator"], "Fit the gradient encoder again.")
    factors = Factors.load(folder, generator.modules_to_unlearn(manifest["pattern"]))
    config = GradientConfig.read(manifest["config"])
    recipe = Recipe(config=config, pattern=manifest["pattern"], ridge=manifest.get("ridge", 0.0))
    coordinates = np.load(folder / "coordinates.npy", allow_pickle=False)
    kernel = RidgeKernel(**load_file(folder / KERNEL)) if recipe.ridge else None
    return GradientEncoder(generator, factors, coordinates, recipe, kernel)
