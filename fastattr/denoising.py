"""Denoising losses of training images, at noise that is tied to the image's id: what both teachers differentiate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from tqdm import tqdm

from fastattr.corpus import Corpus
from fastattr.generator import Generator, noise_for, spread_timesteps


@dataclass(frozen=True)
class EncodedImages:
    """Training images as the denoiser sees them."""

    image_ids: Sequence[str]
    latents: torch.Tensor
    """(N, L, h, w), scaled."""
    conditioning: torch.Tensor
    """(N, T, W) text conditioning of the first caption."""

    def rows(self, image_ids: Sequence[str]) -> np.ndarray:
        """(C,) rows of these ids."""
        return np.array([self._row_of[image_id] for image_id in image_ids], dtype=np.int64)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {image_id: row for row, image_id in enumerate(self.image_ids)}


def encode_corpus(generator: Generator, corpus: Corpus, *, batch_size: int) -> EncodedImages:
    """Latents and conditioning of every training image."""
    latents, conditioning = [], []
    for start in tqdm(range(0, len(corpus), batch_size), desc="encode corpus", unit="batch"):
        rows = range(start, min(start + batch_size, len(corpus)))
        latents.append(generator.encode_image([corpus.image(row) for row in rows]).cpu())
        conditioning.append(generator.encode_prompt([corpus.captions[row][0] for row in rows]).cpu())
    return EncodedImages(corpus.image_ids, torch.cat(latents), torch.cat(conditioning))


def denoising_losses(
    generator: Generator,
    images: EncodedImages,
    rows: np.ndarray,
    *,
    draws: int,
    batch_size: int,
    seed: int,
    output: str = "loss",
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Losses of training images, batch by batch, with their graphs where gradients are on.

    Args:
        generator: with the weights to measure.
        images: the encoded corpus.
        rows: (C,) which of them.
        draws: timesteps spread evenly over the schedule, each with noise of its own, fixed by (image id, draw, seed).
        batch_size: network evaluations at once; does not change the losses.
        seed: of the noise.
        output: 'loss', or 'squared_norm' of the network's prediction instead.

    Yields:
        (B,) positions in `rows`, and (B,) values of one draw each, means per latent element.
    """
    measure = generator.training_loss if output == "loss" else generator.squared_output
    timesteps = spread_timesteps(draws, train_timesteps=generator.train_timesteps)
    pairs = np.stack(np.divmod(np.arange(len(rows) * draws), draws), axis=1)
    for start in range(0, len(pairs), batch_size):
        positions, drawn = pairs[start : start + batch_size].T
        picked = rows[positions]
        noise = noise_for([images.image_ids[row] for row in picked], drawn.tolist(), seed=seed, shape=generator.latent_shape)
        yield (
            positions,
            measure(
                images.latents[picked].to(generator.device),
                images.conditioning[picked].to(generator.device),
                torch.from_numpy(timesteps[drawn]).to(generator.device),
                noise.to(generator.device),
            ),
        )


@torch.no_grad()
def image_losses(
    generator: Generator, images: EncodedImages, rows: np.ndarray, *, draws: int, batch_size: int, seed: int
) -> np.ndarray:
    """(C,) float64 denoising losses of training images, averaged over draws; see `denoising_losses`."""
    losses = np.zeros(len(rows))
    for positions, part in denoising_losses(generator, images, rows, draws=draws, batch_size=batch_size, seed=seed):
        np.add.at(losses, positions, part.double().cpu().numpy())
    return losses / draws
