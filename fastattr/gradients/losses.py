"""Denoising losses of training images, with noise that follows from the image's id: what every teacher differentiates."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fastattr.core.errors import NonFiniteError
from fastattr.generators.generator import Generator
from fastattr.generators.noise import noise_for, spread_timesteps
from fastattr.gradients.encoded import EncodedImages


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
        (B,) positions in the flattened (C, V) images x views, and (B,) losses, means per latent element, each divided by
        the number of draws and captions: their sum over a position is its mean loss.
    """
    measure = generator.training_loss if output == "loss" else generator.squared_output
    timesteps = spread_timesteps(draws, train_timesteps=generator.train_timesteps)
    counts = (images.first_caption[rows + 1] - images.first_caption[rows]).repeat(images.views)
    position = np.arange(len(rows) * images.views).repeat(counts * draws)
    within = np.arange(len(position)) - np.repeat(np.cumsum(counts * draws) - counts * draws, counts * draws)
    caption, draw = np.divmod(within, draws)
    image, view = np.divmod(position, images.views)
    for start in range(0, len(position), batch_size):
        part = slice(start, start + batch_size)
        picked = rows[image[part]]
        ids = [images.image_ids[row] for row in picked]
        noise = noise_for(ids, draw[part].tolist(), seed=seed, shape=generator.latent_shape)
        losses = measure(
            images.latents[picked, view[part]].to(generator.device),
            images.conditioning[images.first_caption[picked] + caption[part]].to(generator.device),
            torch.from_numpy(timesteps[draw[part]]).to(generator.device),
            noise.to(generator.device),
        )
        share = torch.from_numpy(1.0 / (draws * counts[position[part]]))
        yield position[part], losses * share.to(losses.device, losses.dtype)


@torch.no_grad()
def image_losses(
    generator: Generator, images: EncodedImages, rows: np.ndarray, *, draws: int, batch_size: int, seed: int
) -> np.ndarray:
    """(C, V) float64 denoising losses of training images, averaged over draws and captions; see `denoising_losses`.

    Raises:
        NonFiniteError: a loss is NaN or infinite; the image is named.
    """
    losses: np.ndarray = np.zeros(len(rows) * images.views)
    for positions, part in denoising_losses(generator, images, rows, draws=draws, batch_size=batch_size, seed=seed):
        np.add.at(losses, positions, part.double().cpu().numpy())
    losses = losses.reshape(len(rows), images.views)
    require_finite(losses, images, rows, "loss")
    return losses


def require_finite(values: np.ndarray, images: EncodedImages, rows: np.ndarray, what: str) -> None:
    """Raise NonFiniteError, which names the first such image, if any of (C, ...) `values` of these rows is NaN or infinite."""
    bad = np.flatnonzero(~np.isfinite(values).reshape(len(rows), -1).all(axis=1))
    if len(bad):
        name = images.image_ids[rows[bad[0]]]
        raise NonFiniteError(f"the {what} of image {name} is not finite; check the image, or use float32.")
