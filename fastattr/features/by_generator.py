"""Features by the generator itself, in feature folders like any other: `diffusion:REF` and `gradient:REF`.

Diffusion features are what its middle block puts out for an image's latent at a few noise levels, under the caption, averaged
over 2 x 2 parts of the picture. Source of the idea: arXiv:2306.03881 (DIFT), arXiv:2303.11681, at other blocks and timesteps.

Gradient features are a whitened gradient's leading coordinates, as a unit vector. Their cosines order training images as the
linearised teacher does, up to the length of the gradients ('gradients': of the denoising loss in the unlearned layers), or as
D-TRAK in the eigenbasis of EKFAC ('output-gradients': of the output's squared norm, in all layers, with a ridge kernel).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from torch.nn import functional as F

from fastattr.core.errors import InputError
from fastattr.core.files import atomic_path
from fastattr.core.stages import MANIFEST, fingerprint, open_stage, require_same, write_manifest
from fastattr.corpus.store import Corpus
from fastattr.features.encoder import encode_captions
from fastattr.generators.families import Conditioning, Layer
from fastattr.generators.generator import Generator
from fastattr.generators.schedules import noise_for
from fastattr.gradients.compression import Compression, GradientConfig, RidgeKernel, gradient_features, leading_coordinates
from fastattr.gradients.ekfac import Factors, fit_ekfac
from fastattr.gradients.losses import EncodedImages, denoising_losses

TIMESTEPS = (0.1, 0.3, 0.5)  # noise levels, as parts of the training schedule
PARTS = 2  # activations are averaged over PARTS x PARTS parts of the picture
FACTOR_IMAGES = 512  # spread over the corpus, on which the curvature is fitted, each at `GradientConfig.draws` timesteps
KERNEL = "kernel.safetensors"


class DiffusionEncoder:
    """A generator's middle block as a feature encoder of images with their captions."""

    def __init__(self, generator: Generator, *, specification: str = "diffusion", captions: str = "first") -> None:
        """Wrap a generator whose denoiser has a middle block; 'first' or 'mean': how several captions condition it."""
        self.specification = specification
        self.fingerprint = self.former = fingerprint([generator.fingerprint, TIMESTEPS, PARTS, captions])
        self._generator, self._average = generator, captions == "mean"

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> np.ndarray:
        """(B, F) float32 unit vectors; see `fastattr.features.encoder.Encoder`."""
        latents = self._generator.encode_image(images)
        counts = [len(texts) if self._average else 1 for texts in captions]
        latents = latents[np.repeat(np.arange(len(captions)), counts)]

        def encode(texts: list[str]) -> np.ndarray:
            return middle_activations(self._generator, latents, self._generator.encode_prompt(texts))

        return encode_captions(captions, encode, average=self._average)


@torch.no_grad()
def middle_activations(generator: Generator, latents: torch.Tensor, conditioning: Conditioning) -> np.ndarray:
    """(B, F) float32 unit vectors: the middle block's activations at each timestep, normalised, side by side. `latents` are (B,
    L, h, w), scaled and clean, and `conditioning` is of B prompts.
    """
    parts: list[torch.Tensor] = []

    def hear(_block: torch.nn.Module, _given: Any, output: Any) -> None:
        activation = output[-1] if isinstance(output, tuple) else output  # (B, C, h, w) or (B, T, C)
        pooled = F.adaptive_avg_pool2d(activation, PARTS).flatten(1) if activation.ndim == 4 else activation.mean(dim=1)
        parts.append(F.normalize(pooled.float(), dim=1))

    handle = _middle_block(generator).register_forward_hook(hear)
    try:
        for draw, level in enumerate(TIMESTEPS):
            noise = noise_for(["diffusion features"], [draw], seed=0, shape=generator.latent_shape).to(latents.device)
            timesteps = torch.full((len(latents),), int(level * generator.train_timesteps), device=latents.device)
            generator.training_loss(latents, conditioning, timesteps, noise.expand_as(latents).to(latents.dtype))
    finally:
        handle.remove()
    return F.normalize(torch.cat(parts, dim=1), dim=1).cpu().numpy()


def _middle_block(generator: Generator) -> torch.nn.Module:
    """A U-Net's middle block, or the middle one of a transformer's blocks; InputError if the denoiser has neither."""
    pipeline: Any = generator.pipeline
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    blocks = getattr(denoiser, "transformer_blocks", None) or [None]
    block = getattr(denoiser, "mid_block", None) or blocks[len(blocks) // 2]
    if not isinstance(block, torch.nn.Module):
        raise InputError(f"{type(denoiser).__name__} has no middle block to take diffusion features from.")
    return block


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is differentiated, where, and how it is compared."""

    config: GradientConfig
    pattern: str = ""  # layers whose gradients are taken; '' as of `Generator.modules_to_unlearn`
    ridge: float = 0.0  # of the `RidgeKernel` that follows; 0 is none


D_TRAK = GradientConfig(output="squared_norm", width=4096, draws=8)
RECIPES = {  # by the name that a feature specification and a run folder give them
    "gradients": Recipe(config=GradientConfig(width=2048, draws=4)),
    "output-gradients": Recipe(config=D_TRAK, pattern=r".", ridge=1.0),  # as emoji-bench's sweep chose (docs/truth.md)
}


def encode_plainly(generator: Generator, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> EncodedImages:
    """Images with their first captions as the denoiser sees them, all with one noise, since queries have no ids."""
    latents = generator.encode_image(images)
    conditioning = generator.encode_prompt([texts[0] for texts in captions])
    return EncodedImages(["gradient features"] * len(images), latents[:, None], conditioning, np.arange(len(images) + 1))


class GradientEncoder:
    """Compressed gradients of a generator's loss as a feature encoder."""

    def __init__(
        self, generator: Generator, factors: Factors, coordinates: np.ndarray, recipe: Recipe, kernel: RidgeKernel | None = None
    ) -> None:
        """Wrap a generator; its layers that match the recipe's pattern are made to require gradients."""
        config = recipe.config
        self.specification = "gradient"
        after = [recipe.pattern, coordinates.tolist(), *([recipe.ridge, kernel.factors.tolist()] if kernel else [])]
        settings = {name: value for name, value in config.identity.items() if name != "batch_size"}
        self.fingerprint = self.former = fingerprint([generator.fingerprint, settings, *after])
        self._generator, self._config, self._kernel = generator, config, kernel
        self._layers = _require_gradients(generator, recipe.pattern)
        self._compression = Compression(self._layers, config, factors, coordinates)

    def encode(self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> np.ndarray:
        """(B, F) float32 unit vectors; see `fastattr.features.encoder.Encoder`."""
        encoded, every = encode_plainly(self._generator, images, captions), np.arange(len(images))
        rows = gradient_features(self._generator, self._layers, encoded, every, self._compression, self._config)
        rows = self._kernel(rows) if self._kernel else rows
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def _require_gradients(generator: Generator, pattern: str) -> dict[str, Layer]:
    layers = generator.modules_to_unlearn(pattern)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    return layers


def fit_gradient_encoder(generator: Generator, corpus: Corpus, folder: Path, recipe: Recipe, *, reference: str) -> None:
    """Fit curvature, coordinates and kernel on a part of the corpus and write them to a folder, unless it is finished.
    `reference` is the generator's name, which `open_gradient_encoder` loads.
    """
    if (folder / MANIFEST).exists():
        return
    config, layers = recipe.config, _require_gradients(generator, recipe.pattern)
    rows = np.unique(np.linspace(0, len(corpus) - 1, FACTOR_IMAGES).astype(np.int64))
    encoded = encode_plainly(generator, [corpus.image(row) for row in rows], [corpus.captions[row] for row in rows])

    every, inputs = np.arange(len(rows)), {"generator": generator.fingerprint, "corpus": corpus.fingerprint}

    def batches() -> Iterator[torch.Tensor]:
        settings: dict[str, Any] = {"draws": config.draws, "batch_size": config.batch_size, "seed": config.seed}
        for _, losses in denoising_losses(generator, encoded, every, **settings):
            yield losses.flatten() * config.draws

    factors = fit_ekfac(layers, batches)
    coordinates = leading_coordinates(generator, layers, encoded, factors, config)
    factors.save(folder, made_of=inputs)
    with atomic_path(folder / "coordinates.npy") as temporary:
        np.save(temporary, coordinates)
    if recipe.ridge:
        compression = Compression(layers, config, factors, coordinates)
        parts = np.array_split(every, -(-len(rows) // config.batch_size))
        sample = [gradient_features(generator, layers, encoded, part, compression, config) for part in parts]
        kernel = RidgeKernel.fit(np.concatenate(sample), ridge=recipe.ridge)
        with atomic_path(folder / KERNEL) as temporary:
            save_file({"directions": kernel.directions, "factors": kernel.factors}, temporary)
    facts = {"pattern": recipe.pattern, "ridge": recipe.ridge, "generator": reference}
    write_manifest(folder, stage="gradient_encoder", config=config, inputs=inputs, **facts)


def open_gradient_encoder(folder: Path, *, run_dir: Path | None = None, device: str = "cpu") -> GradientEncoder:
    """Load what `fit_gradient_encoder` wrote, with its generator ('generator' is found in `run_dir`). Raises
    ArtifactMismatchError if the generator is not the one that it was fitted for.
    """
    manifest = open_stage(folder, "gradient_encoder")
    name = manifest["generator"]
    if name == "generator" and run_dir is None:
        raise InputError(f"{folder} belongs to the generator of a run folder; open it from there.")
    generator = Generator.from_pretrained(run_dir / name if name == "generator" and run_dir else name, device=device)
    require_same("the generator", generator.fingerprint, manifest["inputs"]["generator"], "Fit the gradient encoder again.")
    factors = Factors.load(folder, generator.modules_to_unlearn(manifest["pattern"]))
    config, ridge = GradientConfig.read(manifest["config"]), manifest.get("ridge", 0.0)
    recipe = Recipe(config=config, pattern=manifest["pattern"], ridge=ridge)
    coordinates = np.load(folder / "coordinates.npy", allow_pickle=False)
    kernel = RidgeKernel(**load_file(folder / KERNEL)) if recipe.ridge else None
    return GradientEncoder(generator, factors, coordinates, recipe, kernel)
