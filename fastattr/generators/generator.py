"""Generator adapter: what fastattr asks of a diffusers text-to-image pipeline, whichever family it is.

The teacher sees only `encode_image`, `encode_prompt`, `training_loss`, `modules_to_unlearn` and `fingerprint`; what
differs between families is in fastattr/generators/families.py. A LoRA can lie on the pipeline, and be what is unlearned.
Noise is a function of (id, draw, seed) alone, so losses do not depend on batches, order or processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from fastattr.core.errors import (
    ArtifactDamagedError,
    ArtifactMismatchError,
    ArtifactNotFoundError,
    InputError,
    MissingExtraError,
)
from fastattr.core.files import read_json, sha256_file
from fastattr.core.models import PIPELINE_FILES, locate
from fastattr.core.stages import fingerprint
from fastattr.generators.conditioning import Conditioning
from fastattr.generators.families import CROSS_ATTENTION_KV as CROSS_ATTENTION_KV, Options, read_schedule, recognise, vae_factor
from fastattr.generators.layers import Layer, default_pattern

logger = logging.getLogger(__name__)

LORA = r"\.lora_[AB]\."
"""Matrices of LoRA adapters, by the names that peft gives them."""
LORA_FILES = ("*.safetensors", "adapter_config.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions that a manifest may name."""


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
        """Wrap a loaded diffusers pipeline.

        Args:
            pipeline: of a family that `fastattr.generators.families.recognise` knows.
            name: what to call it in results.
            defaults: 'steps' and 'guidance' used where the caller gives none; else the pipeline's own.
            unlearn: 'base' (text-side key and value projections) or 'lora' (the matrices of its LoRA).
            options: what its files don't say.
            checkpointing: whether backward passes compute activations anew, which takes less memory and more time.
            offload: whether autoencoder and text encoders wait on the CPU until they are needed.

        Raises:
            InputError: the family, the variant or the scheduler is not supported, or there is no LoRA to unlearn.
        """
        if unlearn not in {"base", "lora"}:
            raise InputError(f"unlearn must be 'base' or 'lora', got {unlearn!r}")
        self.family = recognise(pipeline)
        self.pipeline = pipeline
        self.name = name
        self.unlearn = unlearn
        self.options = options or Options()
        self._offload = offload
        self.denoiser: Any = getattr(pipeline, self.family.denoiser)
        self.defaults = sampling_defaults(type(pipeline)) | dict(defaults or {})
        self.evaluations = {"forward": 0, "backward": 0}
        """Latents that went through the denoiser for a loss, and those of them whose gradient could be taken."""
        self._schedule = read_schedule(pipeline.scheduler.config)
        self._dtype: torch.dtype = pipeline.unet.dtype if self.family.denoiser == "unet" else pipeline.transformer.dtype
        step = vae_factor(pipeline) * self.family.patch(pipeline)
        if self.image_size % step:
            raise InputError(
                f"{self.image_size} pixels don't fit {type(pipeline).__name__}; its images' sides are multiples of {step}."
            )
        if unlearn == "lora" and not any(re.search(LORA, module) for module, _ in self.denoiser.named_modules()):
            raise InputError("there is no LoRA on the denoiser to unlearn; name one (`lora`), or set unlearn to 'base'.")
        self.pipeline.set_progress_bar_config(disable=True)
        for part in self._parts():
            part.requires_grad_(False).eval()
        if self.family.denoiser == "unet":
            self.denoiser.to(memory_format=torch.channels_last)  # convolutions run 1.4 times as fast on a CPU
        if checkpointing:
            self.denoiser.enable_gradient_checkpointing()

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
        dtype: torch.dtype | None = None,
        lora: str | Path | None = None,
        unlearn: str | None = None,
        options: Options | None = None,
    ) -> Generator:
        """Load a generator: an embedded one ('emoji'), a diffusers folder, or a Hub repository 'org/name[@revision]'.

        A folder may hold nothing but a manifest that refers to another pipeline and a LoRA (fastattr/generators/pretrained.py).

        Args:
            name_or_path: which.
            revision: branch, tag or commit on the Hub; this and the next four as of `FastAttributor.from_pretrained`.
            cache_dir: where the Hub client keeps downloads.
            token: Hub access token.
            local_files_only: take the cached copy, ask no network.
            force_download: fetch again what the cache holds.
            device: where to run; None takes an accelerator if there is one.
            dtype: precision of the weights; None is what the manifest says, or float32.
            lora: a LoRA to lay on it: a safetensors file, a folder with one, or a Hub repository 'org/name[@revision]'.
            unlearn: 'base' or 'lora'; None is what the manifest says, or 'base'.
            options: what the files don't say; None is what the manifest says.

        Raises:
            ArtifactNotFoundError: there is no such model.
            HubError: the Hub refuses, or can't be reached.
            ArtifactDamagedError: its files cannot be loaded, or their checksums are not those of its manifest.
            InputError: it is of no supported family.
        """
        from diffusers import DiffusionPipeline

        hub: dict[str, Any] = {
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }
        folder = locate(name_or_path, "generator", files=PIPELINE_FILES, revision=revision, **hub)
        manifest = read_json(folder / "manifest.json") if (folder / "manifest.json").exists() else {}
        reference: dict[str, Any] = manifest.get("reference", {})
        if reference:
            folder = locate(reference["pretrained"], "generator", files=PIPELINE_FILES, revision=reference["revision"], **hub)
            dtype = dtype or DTYPES[reference["dtype"]]
            unlearn = unlearn or reference["unlearn"]
            options = options or Options(**reference["options"])
        for file, expected in manifest.get("sha256", {}).items():
            if not (folder / file).exists() or sha256_file(folder / file) != expected:
                raise ArtifactDamagedError(
                    f"{folder / file} is missing or not the file of its manifest; fetch the generator again."
                )
        try:
            with _quiet_diffusers():
                pipeline = DiffusionPipeline.from_pretrained(
                    folder, dtype=dtype or torch.float32, local_files_only=True, use_safetensors=True
                )
        except Exception as error:  # diffusers raises many types for a damaged folder
            raise ArtifactDamagedError(f"{folder} cannot be loaded as a diffusers pipeline: {_first_line(error)}") from error
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if lora:
            load_lora(pipeline, locate_lora(lora, **hub))
        elif reference.get("lora"):
            adapter = locate_lora(reference["lora"], revision=reference["lora_revision"], **hub)
            if sha256_file(adapter) != reference["lora_sha256"]:
                raise ArtifactMismatchError(f"{adapter} has changed since {name_or_path} was made; use another run folder.")
            load_lora(pipeline, adapter)
        generator = cls(
            pipeline,
            name=str(name_or_path),
            defaults=manifest.get("defaults"),
            unlearn=unlearn or "base",
            options=options,
            checkpointing=bool(reference.get("checkpointing")),
            offload=bool(reference.get("offload")),
        )
        for part in [generator.denoiser] if generator._offload else generator._parts():
            part.to(device)
        return generator

    @staticmethod
    def read_defaults(name_or_path: str | Path) -> dict[str, float]:
        """The `defaults` that `from_pretrained(name_or_path)` will have, without loading it.

        Raises:
            ArtifactNotFoundError: there is no such model.
        """
        folder = locate(name_or_path, "generator", files=["manifest.json", "model_index.json"])
        manifest: dict[str, Any] = read_json(folder / "manifest.json") if (folder / "manifest.json").exists() else {}
        found: dict[str, float] = manifest.get("defaults", {})
        if {"steps", "guidance"} <= set(found):
            return found
        import diffusers

        return sampling_defaults(getattr(diffusers, read_json(folder / "model_index.json")["_class_name"])) | found

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        device: torch.device = next(self.denoiser.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the denoiser; layers that are unlearned have float32 or better in any case."""
        return self._dtype

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
        digest = hashlib.sha256()
        for part in self._parts():
            for name, value in sorted(part.state_dict().items()):
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        digest.update(
            fingerprint(
                {key: value for key, value in self.pipeline.scheduler.config.items() if not key.startswith("_")}
            ).encode()
        )
        if self.options != Options():
            digest.update(fingerprint(asdict(self.options)).encode())
        if scales := [_lora_scales(part) for part in self._parts() if _lora_scales(part)]:
            digest.update(fingerprint(scales).encode())
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

        def after_step(_pipeline: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None:
                on_step(step + 1, steps)
            return values

        known = inspect.signature(type(self.pipeline).__call__).parameters
        others = {"use_resolution_binning": False, "clean_caption": False, "callback_on_step_end": after_step}
        if self.options.max_tokens:
            others["max_sequence_length"] = self.options.max_tokens
        if "callback_on_step_end" not in known:  # PixArt keeps diffusers' older form
            others["callback"] = lambda step, timestep, latents: after_step(None, step, timestep, {})
        with self._at_hand("vae", *self.family.text_encoders):
            result = self.pipeline(
                prompt=list(prompts),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=self.image_size,
                width=self.image_size,
                **{name: value for name, value in others.items() if name in known},
            )
        images: list[Image.Image] = result.images
        return images

    @torch.no_grad()
    def encode_image(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(B, L, h, w) scaled latents (posterior means) of RGB images, whose middle square is resized to `image_size`."""
        size, vae = (self.image_size, self.image_size), self.pipeline.vae
        pixels = np.stack(
            [
                np.asarray(image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS))
                for image in images
            ]
        )
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device, vae.dtype).div(127.5).sub(1.0)
        with self._at_hand("vae"):
            encoded = vae.encode(tensor)
        latents: torch.Tensor = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
        mean, spread, shift = (vae.config.get(name) for name in ("latents_mean", "latents_std", "shift_factor"))
        if mean is not None and spread is not None:  # channel by channel
            latents = (latents - latents.new_tensor(mean)[:, None, None]) / latents.new_tensor(spread)[:, None, None]
        scaled: torch.Tensor = (latents if shift is None else latents - shift) * vae.config.scaling_factor
        return scaled

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> Conditioning:
        """Text conditioning of B prompts, as the pipeline itself would compute it."""
        with self._at_hand(*self.family.text_encoders):
            return self.family.encode(self.pipeline, list(prompts), self.options)

    def training_loss(
        self, latents: torch.Tensor, conditioning: Conditioning, timesteps: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """(B,) denoising loss, mean squared error per latent element, of what the scheduler has the denoiser predict.

        Args:
            latents: (B, L, h, w) scaled, clean.
            conditioning: B rows.
            timesteps: (B,) integers below `train_timesteps`; higher = noisier.
            noise: (B, L, h, w) standard normal.
        """
        prediction = self.predict(latents, conditioning, timesteps, noise)
        target = self._schedule.target(latents, noise, timesteps)
        losses: torch.Tensor = (prediction - target.to(prediction.dtype)).square().mean(dim=(1, 2, 3))
        return losses

    def sampled_loss(
        self,
        latents: torch.Tensor,
        conditioning: Conditioning,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
        target_noise: torch.Tensor,
    ) -> torch.Tensor:
        """(B,) losses against targets drawn from the model's own Gaussian; their gradients' second moment is the true Fisher.

        The variance is half the number of latent elements, so that the Fisher equals the Gauss-Newton matrix of
        `training_loss`; `target_noise` (B, L, h, w) is standard normal, the other arguments are those of `training_loss`.
        """
        prediction = self.predict(latents, conditioning, timesteps, noise)
        spread = (prediction[0].numel() / 2) ** 0.5
        target = prediction.detach() + spread * target_noise.to(prediction.dtype)
        losses: torch.Tensor = (prediction - target).square().mean(dim=(1, 2, 3))
        return losses

    def squared_output(
        self, latents: torch.Tensor, conditioning: Conditioning, timesteps: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """(B,) mean square of the network's prediction per latent element; arguments as `training_loss`. For D-TRAK."""
        squares: torch.Tensor = self.predict(latents, conditioning, timesteps, noise).square().mean(dim=(1, 2, 3))
        return squares

    def predict(
        self, latents: torch.Tensor, conditioning: Conditioning, timesteps: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """(B, L, h, w) the denoiser's prediction for noised latents, in float32 or better."""
        self.evaluations["forward"] += len(latents)
        self.evaluations["backward"] += len(latents) if torch.is_grad_enabled() else 0
        noisy = self._schedule.noised(latents, noise, timesteps).to(self.dtype)
        told = self._schedule.told(timesteps)
        prediction = self.family.predict(self.pipeline, noisy, told, conditioning.to(self.dtype), self.options)
        prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        return self._schedule.scaled(prediction, timesteps)

    def modules_to_unlearn(self, pattern: str = "") -> dict[str, Layer]:
        """The denoiser's linear layers and convolutions whose name matches `pattern`, by name.

        Where the denoiser has less than float32, these layers are put into float32 (and see their inputs so), since a step
        that raises a loss by some percent changes weights by less than half precision resolves.

        Args:
            pattern: regular expression. '' is the generator's own choice: the matrices of the LoRA where `unlearn` is
                'lora', else `fastattr.generators.layers.default_pattern`.

        Raises:
            InputError: no layer matches.
        """
        lora = self.unlearn == "lora"
        pattern = pattern or (LORA if lora else default_pattern(self.denoiser, self.family.text_projections))
        layers: dict[str, Layer] = {
            name: module
            for name, module in self.denoiser.named_modules()
            if (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
            and bool(re.search(LORA, name)) == lora
        }
        # peft keeps the layer that a LoRA lies on as its `base_layer`.
        found = {name: layer for name, layer in layers.items() if re.search(pattern, name.removesuffix(".base_layer"))}
        if not found:
            raise InputError(f"no layer of the denoiser matches {pattern!r}; it has e.g. {sorted(layers)[:5]}.")
        if any(layer.weight.dtype.itemsize < 4 for layer in found.values()):
            _ = self.fingerprint  # of the weights as they were loaded
            for layer in found.values():
                if layer.weight.dtype.itemsize < 4:
                    _put_into_float32(layer, casts=self.unlearn == "base")  # peft casts by itself
        return found


def sampling_defaults(pipeline: type) -> dict[str, float]:
    """'steps' and 'guidance' that a class of pipelines takes where the caller gives none."""
    parameters = inspect.signature(pipeline.__call__).parameters
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
    return {name: float(parameters[theirs].default) for name, theirs in names.items()}


def locate_lora(name_or_path: str | Path, **hub: Any) -> Path:
    """The one safetensors file of a LoRA: the path of a file, or what a folder or Hub repository holds.

    Args:
        name_or_path: which.
        hub: arguments of `fastattr.core.models.locate` besides.

    Raises:
        ArtifactNotFoundError: there is no such file, or there are several.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    folder = locate(name_or_path, "generator", files=LORA_FILES, **hub)
    files = sorted(folder.glob("*.safetensors"))
    usual = [file for file in files if file.name == "pytorch_lora_weights.safetensors"]
    if len(usual or files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise ArtifactNotFoundError(
            f"{name_or_path} should hold one LoRA, found {names}; give the path of one safetensors file."
        )
    return (usual or files)[0]


def load_lora(pipeline: Any, file: Path) -> None:
    """Lay a LoRA on a pipeline's networks, as diffusers does; it stays apart from their weights.

    Raises:
        MissingExtraError: peft is not installed.
        ArtifactDamagedError: the file is no LoRA of this pipeline.
    """
    from diffusers.utils import is_peft_available

    if not is_peft_available():
        raise MissingExtraError("a LoRA needs peft; install it with `pip install 'fastattr[lora]'`.")
    try:
        with _quiet_diffusers():
            pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="lora", local_files_only=True)
    except Exception as error:  # diffusers and peft raise many types
        raise ArtifactDamagedError(f"{file} cannot be laid on {type(pipeline).__name__}: {_first_line(error)}") from error


def _lora_scales(network: nn.Module) -> dict[str, float]:
    """Factor on each LoRA of a network, which its matrices don't say; {} where there is none."""
    scales = {name: getattr(module, "scaling", None) for name, module in network.named_modules()}
    return {name: float(scale["lora"]) for name, scale in scales.items() if isinstance(scale, dict) and "lora" in scale}


def _put_into_float32(layer: Layer, *, casts: bool) -> None:
    """Put a layer into float32 for good; with `casts`, what comes in is cast, and what goes out is cast back."""
    dtype = layer.weight.dtype
    layer.float()
    if casts:
        layer.register_forward_pre_hook(lambda _layer, inputs: (inputs[0].float(), *inputs[1:]))
        layer.register_forward_hook(lambda _layer, _inputs, output: output.to(dtype))


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
