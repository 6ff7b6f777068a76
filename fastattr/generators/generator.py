"""Generator adapter: what fastattr asks of a diffusers text-to-image pipeline, whichever family it is.

The teacher sees only `encode_image`, `encode_prompt`, `training_loss`, `modules_to_unlearn` and `fingerprint`; what
differs between families is in fastattr/generators/families.py. A LoRA can lie on the pipeline, and be what is unlearned.
Noise is a function of (id, draw, seed) alone, so losses do not depend on batches, order or processes.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fastattr.core.errors import InputError
from fastattr.generators import families
from fastattr.generators.families import LORA, Conditioning, Layer, OnStep, Options, vae_factor
from fastattr.generators.loading import load_pipeline, lora_scales, read_defaults, unknown_words, weights_fingerprint
from fastattr.generators.schedules import read_schedule

logger = logging.getLogger(__name__)


class Generator:
    """A text-to-image pipeline, to generate with and to unlearn from."""

    def __init__(
        self,
        pipeline: Any,
        *,
        name: str,
        defaults: Mapping[str, float] | None = None,
        unlearn: str = "base",
        options: Options | None = None,
        checkpointing: bool = False,
        offload: bool = False,
    ) -> None:
        """Wrap a loaded diffusers pipeline, of a family that `fastattr.generators.families.recognise` knows.

        `name` is what to call it in results. `defaults` are 'steps' and 'guidance' used where the caller gives none; else the
        pipeline's own. `unlearn`, `options`, `checkpointing` and `offload` are as `PretrainedConfig` has them.

        Raises:
            InputError: the family, the variant or the scheduler is not supported, or there is no LoRA to unlearn.
        """
        if unlearn not in {"base", "lora"}:
            raise InputError(f"unlearn must be 'base' or 'lora', got {unlearn!r}")
        self.family, self.pipeline, self.name, self.unlearn = families.recognise(pipeline), pipeline, name, unlearn
        self.options, self._offload = options or Options(), offload
        self.denoiser: Any = getattr(pipeline, self.family.denoiser)
        self.defaults = families.sampling_defaults(type(pipeline)) | dict(defaults or {})
        self.manifest: dict[str, Any] = {}
        """What its folder says of how it was made; {} without a manifest."""
        self._words: frozenset[str] | None = None
        self.evaluations = {"forward": 0, "backward": 0}
        """Latents that went through the denoiser for a loss, and those of them whose gradient could be taken."""
        self._schedule = read_schedule(pipeline.scheduler.config)
        self.dtype: torch.dtype = self.denoiser.dtype
        """Precision of the denoiser; layers that are unlearned have float32 or better in any case."""
        step = vae_factor(pipeline) * self.family.patch(pipeline)
        if self.image_size % step:
            kind = type(pipeline).__name__
            raise InputError(f"{self.image_size} pixels don't fit {kind}; its images' sides are multiples of {step}.")
        if unlearn == "lora" and not any(re.search(LORA, module) for module, _ in self.denoiser.named_modules()):
            raise InputError("there is no LoRA on the denoiser to unlearn; name one (`lora`), or set unlearn to 'base'.")
        self.pipeline.set_progress_bar_config(disable=True)
        for part in self._parts():
            part.requires_grad_(False).eval()
        if self.family.denoiser == "unet":
            self.denoiser.to(memory_format=torch.channels_last)  # convolutions run 1.4 times as fast on a CPU
        if checkpointing:
            self.denoiser.enable_gradient_checkpointing()

    read_defaults = staticmethod(read_defaults)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        lora: str | Path | None = None,
        unlearn: str | None = None,
        options: Options | None = None,
        **hub: Any,
    ) -> Generator:
        """Load a generator: an embedded one ('emoji'), a diffusers folder, or a Hub repository 'org/name[@revision]'.

        A folder may hold nothing but a manifest that refers to another pipeline and a LoRA
        (fastattr/generators/pretrained.py). `device` None takes an accelerator if there is one. `lora` is laid on it: a
        safetensors file, a folder with one, or a Hub repository. `dtype`, `unlearn` and `options` None are what the manifest
        says, or float32, 'base' and the pipeline's own. `hub`: revision, cache_dir, token, local_files_only and
        force_download, as of `FastAttributor.from_pretrained`.

        Raises:
            ArtifactNotFoundError: there is no such model.
            HubError: the Hub refuses, or can't be reached.
            ArtifactDamagedError: its files cannot be loaded, or their checksums are not those of its manifest.
            InputError: it is of no supported family.
        """
        pipeline, manifest, words = load_pipeline(name_or_path, dtype=dtype, lora=lora, **hub)
        reference: dict[str, Any] = manifest.get("reference", {})
        said: dict[str, Any] = {name: bool(reference.get(name)) for name in ("checkpointing", "offload")}
        said |= {"name": str(name_or_path), "defaults": manifest.get("defaults")}
        options = options or Options(**reference.get("options", {}))
        generator = cls(pipeline, unlearn=unlearn or reference.get("unlearn", "base"), options=options, **said)
        generator.manifest, generator._words = manifest, words
        for part in [generator.denoiser] if generator._offload else generator._parts():
            part.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return generator

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    def _parts(self) -> list[nn.Module]:
        """All networks: autoencoder, text encoders, denoiser."""
        names = ("vae", *self.family.text_encoders, self.family.denoiser)
        return [part for part in (getattr(self.pipeline, name, None) for name in names) if part is not None]

    @property
    def train_timesteps(self) -> int:
        """Length of the training schedule, usually 1000."""
        return int(self.pipeline.scheduler.config.num_train_timesteps)

    @contextlib.contextmanager
    def _at_hand(self, *names: str) -> Iterator[None]:
        """While open, these parts of the pipeline are where the denoiser is; with `offload` they are not, otherwise."""
        parts = [part for name in names if (part := getattr(self.pipeline, name, None)) is not None] if self._offload else []
        for part in parts:
            part.to(self.device)
        try:
            yield
        finally:
            for part in parts:
                part.to("cpu")

    @cached_property
    def image_size(self) -> int:
        """Side in pixels of the images it makes."""
        return self.options.resolution or self.family.default_side(self.pipeline) * vae_factor(self.pipeline)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(L, h, w) of one latent."""
        side = self.image_size // vae_factor(self.pipeline)
        return int(self.pipeline.vae.config.latent_channels), side, side

    @cached_property
    def fingerprint(self) -> str:
        """Identifies weights, scheduler and options; two generators with one fingerprint give the same losses."""
        scales = list(filter(None, map(lora_scales, self._parts())))
        return weights_fingerprint(self._parts(), self.pipeline.scheduler.config, self.options, scales)

    def generate(
        self,
        prompt: str,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        on_step: OnStep | None = None,
    ) -> Image.Image:
        """Draw one RGB image of `image_size` pixels a side.

        `prompt` is not empty; `seed` is of the starting noise, 0 to 2**63 - 1; `steps` (1 to 1000) and `guidance`
        (classifier-free, at least 0) None take the generator's defaults. `on_step` is called with (steps done, steps in all)
        after each step. InputError if a value is outside its range.
        """
        return self.generate_batch([prompt], seeds=[seed], steps=steps, guidance=guidance, on_step=on_step)[0]

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of a prompt that no training caption has, in order; [] too where the generator does not say its words."""
        return [] if self._words is None else unknown_words(prompt, self._words)

    def generate_batch(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """Draw one image per prompt and seed; each is what `generate` draws for them, up to float rounding."""
        asked = {"steps": steps, "guidance": guidance}
        settings = self.defaults | {name: value for name, value in asked.items() if value is not None}
        families.check_sampling(prompts, seeds, settings, most_steps=self.train_timesteps)
        with self._at_hand("vae", *self.family.text_encoders):
            sizes = {"side": self.image_size, "max_tokens": self.options.max_tokens}
            return families.sample(self.pipeline, prompts, seeds, settings, **sizes, on_step=on_step)

    @torch.no_grad()
    def encode_image(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, L, h, w) scaled latents (posterior means) of RGB images, whose middle square is resized to `image_size`."""
        with self._at_hand("vae"):
            return families.encode_pixels(self.pipeline.vae, images, side=self.image_size)

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> Conditioning:
        """Text conditioning of B prompts, as the pipeline itself would compute it."""
        with self._at_hand(*self.family.text_encoders):
            return families.encode(self.family, self.pipeline, list(prompts), self.options)

    def training_loss(self, latents: Tensor, conditioning: Conditioning, timesteps: Tensor, noise: Tensor) -> Tensor:
        """(B,) denoising loss, mean squared error per latent element, of what the scheduler has the denoiser predict.

        `latents` (B, L, h, w) are scaled and clean, `timesteps` (B,) integers below `train_timesteps`, higher = noisier,
        `noise` (B, L, h, w) is standard normal.
        """
        prediction = self.predict(latents, conditioning, timesteps, noise)
        target = self._schedule.target(latents, noise, timesteps)
        return (prediction - target.to(prediction.dtype)).square().mean(dim=(1, 2, 3))

    def sampled_loss(
        self, latents: Tensor, conditioning: Conditioning, timesteps: Tensor, noise: Tensor, target_noise: Tensor
    ) -> Tensor:
        """(B,) losses against targets drawn from the model's own Gaussian; their gradients' second moment is the true Fisher.

        The variance is half the number of latent elements, so that the Fisher equals the Gauss-Newton matrix of
        `training_loss`; `target_noise` (B, L, h, w) is standard normal, the other arguments are those of `training_loss`.
        """
        prediction = self.predict(latents, conditioning, timesteps, noise)
        spread = (prediction[0].numel() / 2) ** 0.5
        target = prediction.detach() + spread * target_noise.to(prediction.dtype)
        return (prediction - target).square().mean(dim=(1, 2, 3))

    def predict(self, latents: Tensor, conditioning: Conditioning, timesteps: Tensor, noise: Tensor) -> Tensor:
        """(B, L, h, w) the denoiser's prediction for noised latents, in float32 or better."""
        self.evaluations["forward"] += len(latents)
        self.evaluations["backward"] += len(latents) if torch.is_grad_enabled() else 0
        noisy = self._schedule.noised(latents, noise, timesteps).to(self.dtype)
        told = self._schedule.told(timesteps)
        prediction = self.family.predict(self.pipeline, noisy, told, conditioning.to(self.dtype), self.options)
        prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        return self._schedule.scaled(prediction, timesteps)

    def modules_to_unlearn(self, pattern: str = "") -> dict[str, Layer]:
        """The denoiser's linear layers and convolutions whose name matches a regular expression, by name.

        '' is the generator's own choice: the matrices of the LoRA where `unlearn` is 'lora', else
        `fastattr.generators.families.default_pattern`. Where the denoiser has less than float32, these layers are put into
        float32 (and see their inputs so), since a step that raises a loss by some percent changes weights by less than half
        precision resolves. InputError if no layer matches.
        """
        lora = self.unlearn == "lora"
        pattern = pattern or (LORA if lora else families.default_pattern(self.denoiser, self.family.text_projections))
        found = families.find_layers(self.denoiser, pattern, of_lora=lora)
        for layer in found.values():
            if layer.weight.dtype.itemsize < 4:
                _ = self.fingerprint  # of the weights as they were loaded
                families.put_into_float32(layer, casts=not lora)  # peft casts by itself
        return found
