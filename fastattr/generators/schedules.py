"""Schedules: how a pipeline's scheduler noises latents, and what its denoiser is trained to predict of them."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from fastattr.core.errors import InputError


class Schedule(Protocol):
    """How a latent is noised at integer timesteps 0 to N - 1, higher = noisier, and what the denoiser should then predict."""

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(B, L, h, w) noised latents."""
        ...

    def told(self, timesteps: Tensor) -> Tensor:
        """(B,) the timesteps as the denoiser is told them."""
        return timesteps

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(B, L, h, w) what the scaled prediction should be."""
        ...

    def scaled(self, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """The prediction times the square root of its weight in the loss."""
        return prediction


class DiffusionSchedule(Schedule):
    """Noise added by a table of variances; the denoiser predicts the noise, the velocity or the clean latent."""

    def __init__(self, config: Any) -> None:
        """From the config of any scheduler of that kind; `DDPMScheduler` adds noise as in training whatever samples."""
        from diffusers import DDPMScheduler

        self._scheduler = DDPMScheduler.from_config(config)
        self._kind = self._scheduler.config.prediction_type

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See `Schedule`."""
        return self._scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See `Schedule`."""
        if self._kind == "epsilon":
            return noise
        if self._kind == "sample":
            return self.scaled(latents, timesteps)
        return self._scheduler.get_velocity(latents, noise, timesteps)

    def scaled(self, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """A predicted clean latent counts by its signal-to-noise ratio, as in diffusers' script; the others as they are."""
        if self._kind != "sample":
            return prediction
        kept = self._scheduler.alphas_cumprod.to(prediction.device)[timesteps].to(prediction.dtype)
        return prediction * (kept / (1 - kept)).sqrt()[:, None, None, None]


class FlowSchedule(Schedule):
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
        """See `Schedule`."""
        level = self._level(latents, timesteps)
        return (1 - level) * latents + level * noise

    def told(self, timesteps: Tensor) -> Tensor:
        """See `Schedule`."""
        return self._told.to(timesteps.device)[timesteps]

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See `Schedule`."""
        return noise - latents


def read_schedule(config: Any) -> Schedule:
    """The schedule that a pipeline's scheduler config describes.

    Raises:
        InputError: it is of another kind.
    """
    kind = config.get("prediction_type", "flow_prediction" if "shift" in config else "none")
    if kind == "flow_prediction":
        return FlowSchedule(config)
    if kind in {"epsilon", "v_prediction", "sample"} and "beta_schedule" in config:
        return DiffusionSchedule(config)
    raise InputError(
        f"the scheduler {config.get('_class_name', '')} predicts {kind!r}; 'epsilon', 'v_prediction' and 'sample' on a table "
        "of variances are supported, and flow matching."
    )
