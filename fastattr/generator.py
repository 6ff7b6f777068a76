"""Generator adapter: what fastattr asks of a diffusers text-to-image pipeline, whichever family it is.

The teacher sees only `encode_image`, `encode_prompt`, `training_loss`, `modules_to_unlearn` and `fingerprint`.
Noise is a function of (id, draw, seed) alone, so losses do not depend on batches, order or processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastattr.artifacts import fingerprint, read_json, sha256_file
from fastattr.ekfac import Layer
from fastattr.errors import ArtifactDamagedError, InputError
from fastattr.hub import PIPELINE_FILES, locate

logger = logging.getLogger(__name__)

CROSS_ATTENTION_KV = r"attn2\.to_[kv]$"
"""Key and value projections of a U-Net's cross-attention, the weights that the paper unlearns (sec. 3)."""

DEFAULTS = {"steps": 50.0, "guidance": 7.5}
"""Sampling settings of a pipeline that names none, as diffusers has them for Stable Diffusion."""


def noise_for(ids: Sequence[str], draws: Sequence[int], *, seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """(B, *shape) standard normal noise, each row a function of its id, its draw number and the seed only.

    Args:
        ids: (B,) image or query ids.
        draws: (B,) draw numbers.
        seed: of the whole run.
        shape: of one latent, (L, h, w).
    """
    rows = []
    for name, draw in zip(ids, draws, strict=True):
        key = int.from_bytes(hashlib.sha256(f"{seed}/{draw}/{name}".encode()).digest()[:16], "little")
        rows.append(np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32))
    return torch.from_numpy(np.stack(rows))


def spread_timesteps(draws: int, *, train_timesteps: int) -> np.ndarray:
    """(draws,) timesteps in the middles of `draws` equal parts of the schedule; draw d always has the d-th."""
    return ((np.arange(draws) + 0.5) / draws * train_timesteps).astype(np.int64)


class Generator:
    """A Stable Diffusion pipeline, to generate with and to unlearn from."""

    def __init__(self, pipeline: Any, *, name: str, defaults: dict[str, float] | None = None) -> None:
        """Wrap a loaded `StableDiffusionPipeline`.

        Args:
            pipeline: with `vae`, `text_encoder`, `tokenizer`, `unet` and a scheduler for epsilon or v-prediction.
            name: what to call it in results.
            defaults: 'steps' and 'guidance' used where the caller gives none.

        Raises:
            InputError: the pipeline lacks one of these parts or its prediction type is not supported yet.
        """
        missing = [part for part in ("vae", "text_encoder", "tokenizer", "unet", "scheduler") if not hasattr(pipeline, part)]
        if missing:
            raise InputError(f"{type(pipeline).__name__} has no {', '.join(missing)}; a StableDiffusionPipeline is expected.")
        kind = pipeline.scheduler.config.prediction_type
        if kind not in {"epsilon", "v_prediction"}:
            raise InputError(f"the scheduler predicts {kind!r}; 'epsilon' and 'v_prediction' are supported.")
        self.pipeline = pipeline
        self.name = name
        self.defaults = DEFAULTS | (defaults or {})
        self.evaluations = {"forward": 0, "backward": 0}
        """Latents that went through the U-Net for a loss, and those of them whose gradient could be taken."""
        self.pipeline.set_progress_bar_config(disable=True)
        for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
            part.requires_grad_(False).eval()
        pipeline.unet.to(memory_format=torch.channels_last)  # convolutions run 1.4 times as fast on a CPU, faster on GPUs too

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Generator:
        """Load a generator: an embedded one ('emoji'), a diffusers folder, or a Hub repository 'org/name[@revision]'.

        The arguments are those of `FastAttributor.from_pretrained`.

        Raises:
            ArtifactNotFoundError: there is no such model.
            HubError: the Hub refuses, or can't be reached.
            ArtifactDamagedError: its files cannot be loaded, or their checksums are not those of its manifest.
        """
        from diffusers import DiffusionPipeline

        folder = locate(
            name_or_path,
            "generator",
            files=PIPELINE_FILES,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        manifest = read_json(folder / "manifest.json") if (folder / "manifest.json").exists() else {}
        for file, expected in manifest.get("sha256", {}).items():
            if not (folder / file).exists() or sha256_file(folder / file) != expected:
                raise ArtifactDamagedError(
                    f"{folder / file} is missing or not the file of its manifest; fetch the generator again."
                )
        try:
            with _quiet_diffusers():
                pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
        except Exception as error:  # diffusers raises many types for a damaged folder
            raise ArtifactDamagedError(f"{folder} cannot be loaded as a diffusers pipeline: {_first_line(error)}") from error
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(pipeline.to(device), name=str(name_or_path), defaults=manifest.get("defaults"))

    @staticmethod
    def read_defaults(name_or_path: str | Path) -> dict[str, float]:
        """The `defaults` that `from_pretrained(name_or_path)` will have, without loading it.

        Raises:
            ArtifactNotFoundError: there is no such model.
        """
        manifest = locate(name_or_path, "generator", files=["manifest.json"]) / "manifest.json"
        return DEFAULTS | (read_json(manifest).get("defaults", {}) if manifest.exists() else {})

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        device: torch.device = self.pipeline.unet.device
        return device

    @property
    def train_timesteps(self) -> int:
        """Length of the training schedule, usually 1000."""
        return int(self.pipeline.scheduler.config.num_train_timesteps)

    @cached_property
    def image_size(self) -> int:
        """Side in pixels of the images it makes."""
        factor: int = 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)
        return int(self.pipeline.unet.config.sample_size) * factor

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(L, h, w) of one latent."""
        config = self.pipeline.unet.config
        return int(config.in_channels), int(config.sample_size), int(config.sample_size)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the weights and the scheduler; two generators with one fingerprint give the same losses."""
        digest = hashlib.sha256()
        for part in (self.pipeline.vae, self.pipeline.text_encoder, self.pipeline.unet):
            for name, value in sorted(part.state_dict().items()):
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        digest.update(
            fingerprint(
                {key: value for key, value in self.pipeline.scheduler.config.items() if not key.startswith("_")}
            ).encode()
        )
        return digest.hexdigest()[:16]

    def generate(
        self,
        prompt: str,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Image.Image:
        """Draw one image.

        Args:
            prompt: what to draw; not empty.
            seed: of the starting noise, 0 to 2**63 - 1.
            steps: denoising steps, 1 to 1000; None takes the generator's default.
            guidance: classifier-free guidance scale, at least 0; None takes the generator's default.
            on_step: called with (steps done, steps in all) after each step.

        Returns:
            An RGB image of `image_size` pixels a side.

        Raises:
            InputError: a value is outside its range.
        """
        images = self.generate_batch([prompt], seeds=[seed], steps=steps, guidance=guidance, on_step=on_step)
        return images[0]

    def generate_batch(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> list[Image.Image]:
        """Draw one image per prompt and seed; each is what `generate` draws for them, up to float rounding."""
        steps = int(self.defaults["steps"] if steps is None else steps)
        guidance = float(self.defaults["guidance"] if guidance is None else guidance)
        for prompt, seed in zip(prompts, seeds, strict=True):
            if not prompt.strip():
                raise InputError("the prompt is empty; say what to draw.")
            if not 0 <= seed < 2**63:
                raise InputError(f"seed must be between 0 and 2**63 - 1, got {seed}")
        if not 1 <= steps <= self.train_timesteps:
            raise InputError(f"steps must be between 1 and {self.train_timesteps}, got {steps}")
        if guidance < 0:
            raise InputError(f"guidance must be at least 0, got {guidance}")

        def callback(_pipeline: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None:
                on_step(step + 1, steps)
            return values

        result = self.pipeline(
            prompt=list(prompts),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=steps,
            guidance_scale=guidance,
            callback_on_step_end=callback,
        )
        images: list[Image.Image] = result.images
        return images

    @torch.no_grad()
    def encode_image(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(B, L, h, w) scaled latents (posterior means) of RGB images, resized to `image_size`."""
        side = self.image_size
        pixels = np.stack(
            [
                np.asarray(image if image.size == (side, side) else image.resize((side, side), Image.Resampling.LANCZOS))
                for image in images
            ]
        )
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device, self.pipeline.vae.dtype).div(127.5).sub(1.0)
        latents: torch.Tensor = self.pipeline.vae.encode(tensor).latent_dist.mean * self.pipeline.vae.config.scaling_factor
        return latents

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> torch.Tensor:
        """(B, T, W) text conditioning, as the pipeline itself would compute it."""
        embeddings, _ = self.pipeline.encode_prompt(list(prompts), self.device, 1, False)
        return embeddings  # type: ignore[no-any-return]

    def training_loss(
        self, latents: torch.Tensor, conditioning: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """(B,) denoising loss, mean squared error per latent element, in the scheduler's own prediction type.

        Args:
            latents: (B, L, h, w) scaled, clean.
            conditioning: (B, T, W).
            timesteps: (B,) integers below `train_timesteps`.
            noise: (B, L, h, w) standard normal.
        """
        scheduler = self.pipeline.scheduler
        prediction = self._predict(latents, conditioning, timesteps, noise)
        if scheduler.config.prediction_type == "epsilon":
            target = noise
        else:
            target = scheduler.get_velocity(latents, noise, timesteps)
        losses: torch.Tensor = (prediction - target.to(prediction.dtype)).square().mean(dim=(1, 2, 3))
        return losses

    def sampled_loss(
        self,
        latents: torch.Tensor,
        conditioning: torch.Tensor,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
        target_noise: torch.Tensor,
    ) -> torch.Tensor:
        """(B,) losses against targets drawn from the model's own Gaussian; their gradients' second moment is the true Fisher.

        The variance is half the number of latent elements, so that the Fisher equals the Gauss-Newton matrix of
        `training_loss`; `target_noise` (B, L, h, w) is standard normal, the other arguments are those of `training_loss`.
        """
        prediction = self._predict(latents, conditioning, timesteps, noise)
        spread = (prediction[0].numel() / 2) ** 0.5
        target = prediction.detach() + spread * target_noise.to(prediction.dtype)
        losses: torch.Tensor = (prediction - target).square().mean(dim=(1, 2, 3))
        return losses

    def squared_output(
        self, latents: torch.Tensor, conditioning: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """(B,) mean square of the network's prediction per latent element; arguments as `training_loss`. For D-TRAK."""
        squares: torch.Tensor = self._predict(latents, conditioning, timesteps, noise).square().mean(dim=(1, 2, 3))
        return squares

    def _predict(
        self, latents: torch.Tensor, conditioning: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """(B, L, h, w) the U-Net's prediction for noised latents, in float32 or better."""
        self.evaluations["forward"] += len(latents)
        self.evaluations["backward"] += len(latents) if torch.is_grad_enabled() else 0
        noisy = self.pipeline.scheduler.add_noise(latents, noise, timesteps)
        prediction: torch.Tensor = self.pipeline.unet(noisy, timesteps, encoder_hidden_states=conditioning).sample
        return prediction.to(torch.promote_types(prediction.dtype, torch.float32))

    def modules_to_unlearn(self, pattern: str = CROSS_ATTENTION_KV) -> dict[str, Layer]:
        """The U-Net's linear layers and convolutions whose name matches `pattern`, by name.

        Raises:
            InputError: no layer matches.
        """
        layers: dict[str, Layer] = {
            name: module
            for name, module in self.pipeline.unet.named_modules()
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        }
        found = {name: layer for name, layer in layers.items() if re.search(pattern, name)}
        if not found:
            raise InputError(f"no layer of the U-Net matches {pattern!r}; it has e.g. {sorted(layers)[:5]}.")
        return found


@contextlib.contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Hide diffusers' progress bars and the notice about a missing safety checker while loading."""
    from diffusers.utils import logging as diffusers_logging

    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
