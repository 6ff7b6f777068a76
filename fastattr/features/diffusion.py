"""Diffusion features: what the generator itself sees in an image, from its own middle block at a few noise levels.

The image's latent is noised to each timestep, with one noise for all images, and passes through the denoiser once under its
caption; the middle block's activations, averaged over 2 x 2 parts of the picture, are the features. As an encoder they are
named `diffusion:REF`, REF a generator (an embedded one, a folder, a Hub id, or 'generator' for the run folder's own).
Source of the idea: arXiv:2306.03881 (DIFT) and arXiv:2303.11681, which read other blocks and other timesteps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from fastattr.core.errors import InputError
from fastattr.core.stages import fingerprint
from fastattr.features.encoder import encode_captions
from fastattr.generators.conditioning import Conditioning
from fastattr.generators.generator import Generator
from fastattr.generators.noise import noise_for

TIMESTEPS = (0.1, 0.3, 0.5)  # noise levels, as parts of the training schedule
PARTS = 2  # activations are averaged over PARTS x PARTS parts of the picture


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
