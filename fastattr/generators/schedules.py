"""Noise: what a loss draws for an image, and how a pipeline's scheduler noises latents and what its denoiser then predicts.

Noise and timesteps are functions of (id, draw, seed) alone, so that no batch, order or process changes them. Integer
timesteps go from 0 to N - 1, higher = noisier. Of a schedule, `noised` gives (B, L, h, w) noised latents, `told` (B,) the
timesteps as the denoiser is told them, `scaled` a prediction times the root of its weight in the loss, and `target`
(B, L, h, w) what that should be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastattr.core.errors import InputError


def noise_for(ids: Sequence[str], draws: Sequence[int], *, seed: int, shape: tuple[int, ...]) -> Tensor:
    """(B, *shape) standard normal noise, each row a function of its id, its draw number and the seed of the run only.

    `ids` (B,) are of images or queries, `draws` (B,) draw numbers, `shape` is one latent's, (L, h, w).
    """
    rows = []
    for name, draw in zip(ids, draws, strict=True):
        key = int.from_bytes(hashlib.sha256(f"{seed}/{draw}/{name}".encode()).digest()[:16], "little")
        rows.append(np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32))
    return torch.from_numpy(np.stack(rows))


def spread_timesteps(draws: int, *, train_timesteps: int) -> np.ndarray:
    """(draws,) timesteps in the middles of `draws` equal parts of the schedule; draw d always has the d-th."""
    return ((np.arange(draws) + 0.5) / draws * train_timesteps).astype(np.int64)


class DiffusionSchedule:
    """Noise added by a table of variances; the denoiser predicts the noise, the velocity or the clean latent."""

    def __init__(self, config: Any) -> None:
        """From the config of any scheduler of that kind; `DDPMScheduler` adds noise as in training whatever samples."""
        from diffusers import DDPMScheduler

        self._scheduler = DDPMScheduler.from_config(config)
        self._kind = self._scheduler.config.prediction_type

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents with noise."""
        return self._scheduler.add_noise(latents, noise, timesteps)

    def told(self, timesteps: Tensor) -> Tensor:
        """The timesteps themselves."""
        return timesteps

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise, the velocity, or the clean latent, weighted."""
        if self._kind == "sample":
            return self.scaled(latents, timesteps)
        return noise if self._kind == "epsilon" else self._scheduler.get_velocity(latents, noise, timesteps)

    def scaled(self, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """A predicted clean latent counts by its signal-to-noise ratio, as in diffusers' script; the others as they are."""
        if self._kind != "sample":
            return prediction
        kept = self._scheduler.alphas_cumprod.to(prediction.device)[timesteps].to(prediction.dtype)
        return prediction * (kept / (1 - kept)).sqrt()[:, None, None, None]


class FlowSchedule:
    """Straight lines from latent to noise; the denoiser predicts their direction, noise - latent."""

    def __init__(self, config: Any) -> None:
        """From the config of a scheduler for flow matching; its shift says how the noise levels lie between 0 and 1."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=config["num_train_timesteps"],
            shift=config.get("shift", config.get("flow_shift", 1.0)),
            use_dynamic_shifting=config.get("use_dynamic_shifting", False),  # such a shift applies to sampling alone
        )
        self._levels, self._told = scheduler.sigmas.flip(0), scheduler.timesteps.flip(0)

    def _level(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        """(B, 1, 1, 1) share of noise."""
        return self._levels.to(latents.device, latents.dtype)[timesteps][:, None, None, None]

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """A point on the line."""
        level = self._level(latents, timesteps)
        return (1 - level) * latents + level * noise

    def told(self, timesteps: Tensor) -> Tensor:
        """The timesteps as the scheduler shifts them."""
        return self._told.to(timesteps.device)[timesteps]

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The line's direction."""
        return noise - latents

    def scaled(self, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """The prediction itself."""
        return prediction


def read_schedule(config: Any) -> DiffusionSchedule | FlowSchedule:
    """The schedule that a pipeline's scheduler config describes; InputError if it is of another kind."""
    kind = config.get("prediction_type", "flow_prediction" if "shift" in config else "none")
    if kind == "flow_prediction":
        return FlowSchedule(config)
    if kind in {"epsilon", "v_prediction", "sample"} and "beta_schedule" in config:
        return DiffusionSchedule(config)
    known = "'epsilon', 'v_prediction' and 'sample' on a table of variances are supported, and flow matching"
    raise InputError(f"the scheduler {config.get('_class_name', '')} predicts {kind!r}; {known}.")
