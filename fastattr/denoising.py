"""Denoising losses of training images, at noise that is tied to the image's id: what both teachers differentiate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from fastattr.artifacts import atomic_path
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


def encode_corpus(
    generator: Generator, corpus: Corpus, *, batch_size: int, folder: Path, accelerator: Accelerator | None = None
) -> EncodedImages:
    """Latents and conditioning of every training image, kept in `folder` for the next run."""

    def latents(rows: range) -> np.ndarray:
        return generator.encode_image([corpus.image(row) for row in rows]).cpu().numpy()

    def conditioning(rows: range) -> np.ndarray:
        return generator.encode_prompt([corpus.captions[row][0] for row in rows]).cpu().numpy()

    encoded = [
        torch.from_numpy(
            np.concatenate(in_parts(folder / name, len(corpus), batch_size, encode, accelerator, description=f"encode {name}"))
        )
        for name, encode in (("latents", latents), ("conditioning", conditioning))
    ]
    return EncodedImages(corpus.image_ids, *encoded)


def in_parts(
    folder: Path,
    count: int,
    size: int,
    compute: Callable[[range], np.ndarray],
    accelerator: Accelerator | None,
    *,
    description: str,
) -> list[np.ndarray]:
    """Compute something for `count` rows in parts of `size`, split over the processes; what is in `folder` is not redone.

    Args:
        folder: one npy file a part; its name must say all that determines the contents.
        count: rows in all.
        size: rows a part; a killed run loses at most one part a process.
        compute: rows -> their part.
        accelerator: the processes; None is this one alone.
        description: label of the progress bar.

    Returns:
        All parts in order, on every process.
    """
    parts = {start: range(start, min(start + size, count)) for start in range(0, count, size)}
    files = {start: folder / f"{start:09d}-{size}.npy" for start in parts}
    missing = [start for start in parts if not files[start].exists()]
    with accelerator.split_between_processes(missing) if accelerator else nullcontext(missing) as mine:
        for start in tqdm(mine, desc=description, unit="part", disable=bool(accelerator and not accelerator.is_main_process)):
            with atomic_path(files[start]) as temporary:
                np.save(temporary, compute(parts[start]))
    if accelerator:
        accelerator.wait_for_everyone()
    return [np.load(file) for file in files.values()]


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
