"""Training images and queries as the denoiser sees them, computed once and kept on disk, and their denoising losses.

Noise follows from the image's id. A loss is what every teacher differentiates.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastattr.core.errors import NonFiniteError
from fastattr.core.files import atomic_path, read_json, write_json
from fastattr.core.processes import files_of_parts, in_parts
from fastattr.corpus.store import Corpus
from fastattr.generators.families import Conditioning, Layers
from fastattr.generators.generator import Generator
from fastattr.generators.schedules import noise_for, spread_timesteps
from fastattr.gradients.ekfac import Calls, record_layers


@dataclass(frozen=True)
class EncodedImages:
    """Training images as the denoiser sees them: V views (the image, perhaps its mirror image), one or more captions each."""

    image_ids: Sequence[str]
    latents: Tensor
    """(N, V, L, h, w), scaled."""
    conditioning: Conditioning
    """(M rows) text conditioning of all captions, image after image; M = N where each has one."""
    first_caption: np.ndarray
    """(N + 1,) rows of `conditioning`: the captions of image i are first_caption[i] to first_caption[i + 1] - 1."""

    @property
    def views(self) -> int:
        """V, 1 or 2."""
        return int(self.latents.shape[1])

    def first(self, count: int) -> EncodedImages:
        """The first images of these, or all if they are fewer."""
        kept = self.first_caption[: count + 1]
        rows = slice(0, int(kept[-1]))
        return EncodedImages(list(self.image_ids[:count]), self.latents[:count], self.conditioning[rows], kept)


def encode_corpus(
    generator: Generator,
    corpus: Corpus,
    *,
    batch_size: int,
    folder: Path,
    captions: str = "first",
    mirrored: bool = False,
    accelerator: Accelerator | None = None,
) -> EncodedImages:
    """Latents and conditioning of every training image, `batch_size` of them, or of their captions, at once.

    What is computed is kept in `folder` for the next run; its name must say generator and corpus. `captions` is 'first' or
    'all'; `mirrored` encodes the mirror images as a second view. `accelerator`: the processes to split the work over; None is
    this one.
    """
    chosen = [texts if captions == "all" else texts[:1] for texts in corpus.captions]
    texts = [text for own in chosen for text in own]

    def view(rows: range, *, mirror: bool) -> np.ndarray:
        images = [corpus.image(row) for row in rows]
        encoded = generator.encode_image([ImageOps.mirror(image) for image in images] if mirror else images)
        return (encoded.float() if encoded.dtype == torch.bfloat16 else encoded).cpu().numpy()  # numpy has no bfloat16

    def conditioning(rows: range) -> Conditioning:
        return generator.encode_prompt([texts[row] for row in rows])

    def computed(name: str, count: int, compute: Callable[[range], np.ndarray]) -> Tensor:
        return torch.from_numpy(in_parts(folder / name, count, batch_size, compute, accelerator, description=f"encode {name}"))

    views = {"latents": False} | ({"mirrored": True} if mirrored else {})
    latents = [computed(name, len(corpus), partial(view, mirror=mirror)) for name, mirror in views.items()]
    told = _conditioning_in_parts(folder / f"{captions}-prompts", len(texts), batch_size, conditioning, accelerator)
    whole = torch.stack(latents, dim=1) if mirrored else latents[0].unsqueeze(1)  # a single view is not copied
    return EncodedImages(corpus.image_ids, whole, told, np.cumsum([0, *map(len, chosen)]))


def _conditioning_in_parts(
    folder: Path, count: int, size: int, compute: Callable[[range], Conditioning], accelerator: Accelerator | None
) -> Conditioning:
    """As `in_parts`, of several tensors at once, in their own precision.

    Token embeddings of a large text encoder outgrow memory long before latents do, so that the result is left on disk, one
    plain file a tensor, and mapped.
    """

    def write(path: Path, rows: range) -> None:
        save_file({name: part.cpu().contiguous() for name, part in compute(rows).tensors.items()}, path)

    described = folder / "tensors.json"
    if not described.exists():
        parts = folder / "parts"
        files = files_of_parts(parts, count, size, "safetensors", write, accelerator, description="encode prompts")
        if accelerator is None or accelerator.is_main_process:
            first = load_file(files[0][1])
            for name in first:
                with atomic_path(folder / f"{name}.bin") as temporary, temporary.open("wb") as whole:
                    for _, file in files:
                        whole.write(load_file(file)[name].view(torch.uint8).numpy().data)
            shapes = {name: [str(part.dtype).removeprefix("torch."), [count, *part.shape[1:]]] for name, part in first.items()}
            write_json(described, shapes)
            shutil.rmtree(parts)
        if accelerator is not None:
            accelerator.wait_for_everyone()
    tensors = {}
    for name, (kind, shape) in read_json(described).items():
        mapped = torch.from_file(str(folder / f"{name}.bin"), size=math.prod(shape), dtype=getattr(torch, kind))
        tensors[name] = mapped.view(shape)
    return Conditioning(tensors)


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

    `rows` (C,) says which of the images. Args besides:
        draws: timesteps spread evenly over the span, each with noise of its own, fixed by (image id, draw, seed).
        batch_size: network evaluations at once; does not change the losses.
        output: one of `OUTPUTS`.
        antithetic: draws 2k and 2k + 1 have one timestep and opposite noise.
        span: the part of the schedule that timesteps are spread over, from little noise (0) to much (1).

    Yields:
        (P,) positions in the flattened (C, V) images x views, and (P, L) losses of each, L its draws x captions: means per
            latent
        element, divided by L, so that their sum over a position is its mean loss. A batch holds whole positions; one whose
        evaluations outnumber `batch_size` comes in several batches.
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
    generator: Generator, layers: Layers, images: EncodedImages, rows: np.ndarray, **drawn: Any
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
