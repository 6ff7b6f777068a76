"""The curvature that teachers share: EKFAC factors of a corpus, given by the user, fitted earlier or fitted now."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from fastattr.generators.generator import Generator
from fastattr.generators.schedules import noise_for
from fastattr.gradients.encoded import EncodedImages
from fastattr.teachers.config import TeacherConfig


def factor_batches(
    generator: Generator, images: EncodedImages, config: TeacherConfig, accelerator: Accelerator | None = None
) -> Callable[[], Iterator[Tensor]]:
    """What `fit_ekfac` asks for: per-example losses on random images of the corpus; each process gets its own batches."""
    rng = np.random.default_rng([config.seed, 7])
    rows = rng.choice(
        len(images.image_ids), size=config.factor_examples, replace=config.factor_examples > len(images.image_ids)
    )
    timesteps = rng.integers(0, generator.train_timesteps, size=config.factor_examples)
    views = rng.integers(0, images.views, size=config.factor_examples)
    captions = rng.integers(images.first_caption[rows], images.first_caption[rows + 1])
    index, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)

    def batches() -> Iterator[Tensor]:
        starts = range(0, config.factor_examples, config.batch_size)[index::processes]
        for start in tqdm(starts, desc="EKFAC factors", unit="batch", disable=index > 0):
            part = slice(start, start + config.batch_size)
            ids = [f"factor/{position}" for position in range(config.factor_examples)[part]]
            noise, target_noise = (
                noise_for(ids, [draw] * len(ids), seed=config.seed, shape=generator.latent_shape).to(generator.device)
                for draw in (0, 1)
            )
            arguments = (
                images.latents[rows[part], views[part]].to(generator.device),
                images.conditioning[captions[part]].to(generator.device),
                torch.from_numpy(timesteps[part]).to(generator.device),
                noise,
            )
            true = config.fisher == "true"
            yield generator.sampled_loss(*arguments, target_noise) if true else generator.training_loss(*arguments)

    return batches
