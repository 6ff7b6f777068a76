"""Diffusion features: what the generator itself sees in an image, from its own middle block at a few noise levels.

The image's latent is noised to each timestep, with one noise for all images, and passes through the denoiser once under its
caption; the middle block's activations, averaged over 2 x 2 parts of the picture, are the features. As an encoder they are
named `diffusion:REF`, REF a generator (an embedded one, a folder, a Hub id, or 'generator' for the run folder's own).
Source of the idea: arXiv:2306.03881 (DIFT) and arXiv:2303.11681, which read other blocks and other timesteps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from fastattr.core.errors import InputError
from fastattr.core.stages import fingerprint
from fastattr.features.encoder import encode_captions
from fastattr.generators.families import Conditioning
from fastattr.generators.generator import Generator
from fastattr.generators.schedules import noise_for

TIMESTEPS = (0.1, 0.3, 0.5)
"""Noise levels, as parts of the training schedule."""
PARTS = 2
"""Activations are averaged over PARTS x PARTS parts of the picture."""


class DiffusionEncoder:
    """A generator's middle block as a feature encoder of images with their captions."""

    def __init__(self, generator: Generator, *, specification: str = "diffusion", captions: str = "first") -> None:
        """Wrap a loaded generator.

        Args:
            generator: whose denoiser has a middle block.
            specification: its name in a config.
            captions: 'first' or 'mean': how several captions of one image condition the denoiser.
        """
        self.specification = specification
        self.fingerprint = self.former = fingerprint([generator.fingerprint, TIMESTEPS, PARTS, captions])
        self._generator, self._average = generator, captions == "mean"

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> np.ndarray:
        """(B, F) float32 unit vectors; see `fastattr.features.encoder.Encoder`."""
        latents = self._generator.encode_image(images)
        if not self._average:
            return middle_activations(self._generator, latents, self._generator.encode_prompt([texts[0] for texts in captions]))
        owners = np.repeat(np.arange(len(captions)), [len(texts) for texts in captions])
        flat = self._generator.encode_prompt([text for texts in captions for text in texts])
        every = middle_activations(self._generator, latents[owners], flat)
        rows = iter(every)
        return encode_captions(captions, lambda texts: np.stack([next(rows) for _ in texts]), average=True)


@torch.no_grad()
def middle_activations(generator: Generator, latents: torch.Tensor, conditioning: Conditioning) -> np.ndarray:
    """(B, F) float32 unit vectors: the middle block's activations at each timestep, normalised, side by side.

    Args:
        generator: whose denoiser.
        latents: (B, L, h, w) scaled, clean.
        conditioning: of B prompts.
    """
    parts = []
    with _listening(generator) as heard:
        for draw, level in enumerate(TIMESTEPS):
            noise = noise_for(["diffusion features"], [draw], seed=0, shape=generator.latent_shape).to(latents.device)
            timestep = int(level * generator.train_timesteps)
            timesteps = torch.full((len(latents),), timestep, device=latents.device)
            heard.clear()
            generator.training_loss(latents, conditioning, timesteps, noise.expand_as(latents).to(latents.dtype))
            parts.append(F.normalize(_pooled(heard[-1]).float(), dim=1))
    features: np.ndarray = F.normalize(torch.cat(parts, dim=1), dim=1).cpu().numpy()
    return features


def _pooled(activation: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) or (B, T, C) -> (B, C x parts)."""
    if activation.ndim == 4:
        return F.adaptive_avg_pool2d(activation, PARTS).flatten(1)
    return activation.mean(dim=1)


@contextmanager
def _listening(generator: Generator) -> Iterator[list[torch.Tensor]]:
    """What the middle block puts out while the block of code runs."""
    heard: list[torch.Tensor] = []
    handle = _middle_block(generator).register_forward_hook(
        lambda _block, _given, output: heard.append(output[-1] if isinstance(output, tuple) else output)
    )
    try:
        yield heard
    finally:
        handle.remove()


def _middle_block(generator: Generator) -> torch.nn.Module:
    """A U-Net's middle block, or the middle one of a transformer's blocks.

    Raises:
        InputError: the denoiser has neither.
    """
    pipeline: Any = generator.pipeline
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    block = getattr(denoiser, "mid_block", None)
    blocks = getattr(denoiser, "transformer_blocks", None)
    if isinstance(block, torch.nn.Module):
        return block
    if blocks is not None and len(blocks):
        middle: torch.nn.Module = blocks[len(blocks) // 2]
        return middle
    raise InputError(f"{type(denoiser).__name__} has no middle block to take diffusion features from.")
