"""Denoising losses of training images, with noise that follows from the image's id: what every teacher differentiates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastattr.core.errors import NonFiniteError
from fastattr.generators.generator import Generator
from fastattr.generators.layers import Layer
from fastattr.generators.schedules import noise_for, spread_timesteps
from fastattr.gradients.encoded import EncodedImages
from fastattr.gradients.recording import Calls, record_layers

OUTPUTS: dict[str, Callable[..., Tensor]] = {
    "loss": lambda generator, *arguments: generator.training_loss(*arguments),
    "squared_norm": lambda generator, *arguments: generator.predict(*arguments).square().mean(dim=(1, 2, 3)),
}
"""What can be measured, (B,) each: the denoising loss, or the mean square of the prediction (D-TRAK)."""


def denoising_losses(
    generator: Generator,
    images: EncodedImages,
    rows: np.ndarray,
    *,
    draws: int,
    batch_size: int,
    seed: int,
    output: str = "loss",
    antithetic: bool = False,
    span: tuple[float, float] = (0.0, 1.0),
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Losses of training images or queries, batch by batch, with their graphs where gradients are on.

    Args:
        generator: with the weights to measure.
        images: encoded images; `rows` (C,) says which of them.
        draws: timesteps spread evenly over the span, each with noise of its own, fixed by (image id, draw, seed).
        batch_size: network evaluations at once; does not change the losses.
        seed: of the noise.
        output: one of `OUTPUTS`.
        antithetic: draws 2k and 2k + 1 have one timestep and opposite noise.
        span: the part of the schedule that timesteps are spread over, from little noise (0) to much (1).

    Yields:
        (P,) positions in the flattened (C, V) images x views, and (P, L) losses of each, L its draws x captions: means per
        latent element, divided by L, so that their sum over a position is its mean loss. A batch holds whole positions;
        one whose evaluations outnumber `batch_size` comes in several batches.
    """
    pairs = 2 if antithetic else 1
    timesteps = _timesteps(draws // pairs, generator.train_timesteps, span).repeat(pairs)
    captions = (images.first_caption[rows + 1] - images.first_caption[rows]).repeat(images.views)
    for positions, evaluations in _batches(captions * draws, batch_size):
        shape = (len(positions), len(evaluations))
        position = positions.repeat(len(evaluations))
        caption, draw = np.divmod(np.tile(evaluations, len(positions)), draws)
        image, view = np.divmod(position, images.views)
        picked = rows[image]
        noise = noise_for(
            [images.image_ids[row] for row in picked], (draw // pairs).tolist(), seed=seed, shape=generator.latent_shape
        )
        if antithetic:
            noise = noise * torch.from_numpy(1.0 - 2.0 * (draw % 2)).to(noise.dtype)[:, None, None, None]
        losses = OUTPUTS[output](
            generator,
            images.latents[picked, view].to(generator.device),
            images.conditioning[images.first_caption[picked] + caption].to(generator.device),
            torch.from_numpy(timesteps[draw]).to(generator.device),
            noise.to(generator.device),
        )
        share = torch.from_numpy(1.0 / (draws * captions[position]))
        yield positions, (losses * share.to(losses.device, losses.dtype)).view(shape)


def recorded_losses(
    generator: Generator, layers: Mapping[str, Layer], images: EncodedImages, rows: np.ndarray, **drawn: Any
) -> Iterator[tuple[np.ndarray, int, Mapping[str, Calls]]]:
    """Positions of a batch of `denoising_losses`, its number of evaluations, and what its backward pass gave each layer."""
    with record_layers(layers) as recorded:
        for positions, losses in denoising_losses(generator, images, rows, **drawn):
            losses.sum().backward()
            yield positions, losses.numel(), recorded
            for calls in recorded.values():
                calls.clear()


def _timesteps(draws: int, train_timesteps: int, span: tuple[float, float]) -> np.ndarray:
    """(draws,) timesteps in the middles of equal parts of that part of the schedule."""
    low, high = span
    if span == (0.0, 1.0):
        return spread_timesteps(draws, train_timesteps=train_timesteps)
    return ((low + (np.arange(draws) + 0.5) / draws * (high - low)) * train_timesteps).astype(np.int64)


def _batches(evaluations: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(P,) positions and the L evaluations of each: as many whole positions as `size` holds, of a larger one a part."""
    start = 0
    while start < len(evaluations):
        count, stop = int(evaluations[start]), start + 1
        while stop < len(evaluations) and evaluations[stop] == count and (stop + 1 - start) * count <= size:
            stop += 1
        for first in range(0, count, size):
            yield np.arange(start, stop), np.arange(first, min(first + size, count))
        start = stop


@torch.no_grad()
def image_losses(generator: Generator, images: EncodedImages, rows: np.ndarray, **drawn: Any) -> np.ndarray:
    """(C, V) float64 denoising losses of images, means over draws and captions; NonFiniteError names the first that is not."""
    losses: np.ndarray = np.zeros(len(rows) * images.views)
    for positions, part in denoising_losses(generator, images, rows, **drawn):
        np.add.at(losses, positions, part.sum(dim=1, dtype=torch.float64).cpu().numpy())
    require_finite(losses.reshape(len(rows), -1), images, rows, "loss")
    return losses.reshape(len(rows), images.views)


def require_finite(values: np.ndarray, images: EncodedImages, rows: np.ndarray, what: str) -> None:
    """Raise NonFiniteError, which names the first such image, if any of (C, ...) `values` of these rows is NaN or infinite."""
    bad = np.flatnonzero(~np.isfinite(values).reshape(len(rows), -1).all(axis=1))
    if len(bad):
        name = images.image_ids[rows[bad[0]]]
        raise NonFiniteError(f"the {what} of image {name} is not finite; check the image, or use float32.")
