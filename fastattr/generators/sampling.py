"""Sampling: draw images with a diffusers pipeline, each from a noise of its own, and encode images."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastattr.core.errors import InputError


def sampling_defaults(pipeline: type) -> dict[str, float]:
    """'steps' and 'guidance' that a class of pipelines takes where the caller gives none."""
    parameters = inspect.signature(pipeline.__call__).parameters
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
    return {name: float(parameters[theirs].default) for name, theirs in names.items()}


def check_sampling(prompts: Sequence[str], seeds: Sequence[int], settings: Mapping[str, float], *, most_steps: int) -> None:
    """Raise InputError unless prompts, seeds, 'steps' and 'guidance' are within their ranges."""
    for prompt, seed in zip(prompts, seeds, strict=True):
        if not prompt.strip():
            raise InputError("the prompt is empty; say what to draw.")
        if not 0 <= seed < 2**63:
            raise InputError(f"seed must be between 0 and 2**63 - 1, got {seed}")
    if not 1 <= settings["steps"] <= most_steps:
        raise InputError(f"steps must be between 1 and {most_steps}, got {settings['steps']}")
    if not settings["guidance"] >= 0:
        raise InputError(f"guidance must be at least 0, got {settings['guidance']}")


OnStep = Callable[[int, int], None]
"""Called with (steps done, steps in all) after each step."""


def sample(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Mapping[str, float],
    *,
    side: int,
    max_tokens: int,
    on_step: OnStep | None,
) -> list[Image.Image]:
    """One image of `side` pixels per prompt and seed; `max_tokens` 0 and other arguments as of `Generator.generate_batch`."""
    steps = int(settings["steps"])

    def after_step(_pipeline: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(step + 1, steps)
        return values

    known = inspect.signature(type(pipeline).__call__).parameters
    others = {"use_resolution_binning": False, "clean_caption": False, "callback_on_step_end": after_step}
    others |= {"max_sequence_length": max_tokens} if max_tokens else {}
    if "callback_on_step_end" not in known:  # PixArt keeps diffusers' older form
        others["callback"] = lambda step, timestep, latents: after_step(None, step, timestep, {})
    sizes = {"num_inference_steps": steps, "guidance_scale": float(settings["guidance"]), "height": side, "width": side}
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    taken = {name: value for name, value in others.items() if name in known}
    return pipeline(prompt=list(prompts), generator=noise, **sizes, **taken).images


def encode_pixels(vae: Any, images: Sequence[Image.Image], *, side: int) -> Tensor:
    """(B, L, h, w) scaled latents (posterior means) of RGB images, whose middle square is resized to `side`."""
    size = (side, side)
    fitted = [image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS) for image in images]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in fitted])).permute(0, 3, 1, 2)
    encoded = vae.encode(pixels.to(vae.device, vae.dtype).div(127.5).sub(1.0))
    latents: Tensor = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
    mean, spread, shift = (vae.config.get(name) for name in ("latents_mean", "latents_std", "shift_factor"))
    if mean is not None and spread is not None:  # channel by channel
        latents = (latents - latents.new_tensor(mean)[:, None, None]) / latents.new_tensor(spread)[:, None, None]
    return (latents if shift is None else latents - shift) * vae.config.scaling_factor
