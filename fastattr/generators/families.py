"""Families: how each kind of diffusers text-to-image pipeline encodes prompts, runs its denoiser, is trained and draws.

A family is recognised from the pipeline's own parts, not from its name. Each follows the recipe of diffusers' own fine-tuning
scripts (examples/text_to_image, examples/dreambooth); docs/generators.md says which. Here too: which layers can be unlearned.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from fastattr.core.errors import InputError

CROSS_ATTENTION_KV = r"attn2\.to_[kv]$"
"""Key and value projections of the text in cross-attention, the weights that the paper unlearns (sec. 3)."""
LORA = r"\.lora_[AB]\."
"""Matrices of LoRA adapters, by the names that peft gives them."""
JOINT_ATTENTION_KV = r"attn\.add_[kv]_proj$"
"""Those of the text's own stream where text and image attend to each other in one attention."""


@dataclass(frozen=True)
class Conditioning:
    """Of M prompts, one a row; a row means the same in every tensor."""

    tensors: Mapping[str, Tensor]
    """(M, ...) each, by name: 'text' (M, T, W) token embeddings, 'pooled' (M, P), 'mask' (M, T), as the family has them."""

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Any) -> Conditioning:
        """The rows that a slice, a list, an array or a tensor of row numbers picks."""
        return Conditioning({name: tensor[rows] for name, tensor in self.tensors.items()})

    def to(self, target: torch.device | str | torch.dtype) -> Conditioning:
        """On another device, or in another precision; integers and masks keep theirs."""
        kept = {name for name, part in self.tensors.items() if isinstance(target, torch.dtype) and not part.is_floating_point()}
        return Conditioning({name: part if name in kept else part.to(target) for name, part in self.tensors.items()})

    @staticmethod
    def concatenated(parts: Sequence[Conditioning]) -> Conditioning:
        """All rows of several, in order."""
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a pipeline's files don't say about how it is used and was fine-tuned: see `PretrainedConfig`, which has the same."""

    resolution: int = 0
    max_tokens: int = 0
    distilled_guidance: float = 3.5


@dataclass(frozen=True)
class Family:
    """One kind of pipeline."""

    name: str
    denoiser: str
    """The pipeline's attribute that holds the network to unlearn."""
    text_encoders: tuple[str, ...]
    """Attributes of the text encoders; one may be missing from a pipeline (None)."""
    text_projections: str
    """Pattern of the linear layers that make keys and values of the text."""
    encoded: tuple[str, ...]
    """What `encode_prompt` of the pipeline returns, by name; '' is left out."""
    predict: Callable[[Any, Tensor, Tensor, Conditioning, Options], Tensor]
    """(pipeline, noised latents, timesteps as told, conditioning, options) -> (B, L, h, w) prediction."""

    def default_side(self, pipeline: Any) -> int:
        """The side of a pipeline's latents."""
        return int(pipeline.default_sample_size if self.name == "flux" else getattr(pipeline, self.denoiser).config.sample_size)

    def patch(self, pipeline: Any) -> int:
        """What that side must be a multiple of."""
        return 2 if self.name == "flux" else int(getattr(pipeline, self.denoiser).config.get("patch_size", 1))


def encode(family: Family, pipeline: Any, prompts: list[str], options: Options) -> Conditioning:
    """The conditioning of (M,) prompts, as the pipeline itself would compute it, without guidance."""
    known = inspect.signature(pipeline.encode_prompt).parameters
    asked = {"device": getattr(pipeline, family.denoiser).device, "num_images_per_prompt": 1}
    asked |= {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False}
    if "max_sequence_length" in known:  # of T5 or Gemma: the option's, or what the pipeline takes when it draws
        drawn = inspect.signature(type(pipeline).__call__).parameters["max_sequence_length"].default
        asked["max_sequence_length"] = options.max_tokens or int(drawn)
    found = pipeline.encode_prompt(prompts, **{name: value for name, value in asked.items() if name in known})
    return Conditioning({name: tensor for name, tensor in zip(family.encoded, found, strict=False) if name})


def _predict_sd(pipeline: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, options: Options) -> Tensor:
    return pipeline.unet(noisy, timesteps, encoder_hidden_states=conditioning.tensors["text"]).sample


def _predict_sdxl(pipeline: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, options: Options) -> Tensor:
    height, width = (side * vae_factor(pipeline) for side in noisy.shape[-2:])
    # Original size, crop and target size: every image is encoded whole, at the size at which the generator draws.
    sizes = torch.tensor([height, width, 0, 0, height, width], device=noisy.device, dtype=noisy.dtype)
    added = {"text_embeds": conditioning.tensors["pooled"], "time_ids": sizes.expand(len(noisy), -1)}
    return pipeline.unet(noisy, timesteps, encoder_hidden_states=conditioning.tensors["text"], added_cond_kwargs=added).sample


def _predict_sd3(pipeline: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, options: Options) -> Tensor:
    text, pooled = conditioning.tensors["text"], conditioning.tensors["pooled"]
    return pipeline.transformer(noisy, timestep=timesteps, encoder_hidden_states=text, pooled_projections=pooled).sample


def _predict_flux(pipeline: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, options: Options) -> Tensor:
    batch, channels, height, width = noisy.shape
    text, guidance = conditioning.tensors["text"], None
    if pipeline.transformer.config.guidance_embeds:
        guidance = torch.full((batch,), options.distilled_guidance, device=noisy.device)
    packed = pipeline.transformer(
        hidden_states=pipeline._pack_latents(noisy, batch, channels, height, width),
        timestep=timesteps / 1000,  # the transformer multiplies it again
        guidance=guidance,
        pooled_projections=conditioning.tensors["pooled"],
        encoder_hidden_states=text,
        txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device, dtype=noisy.dtype),
        img_ids=pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, noisy.dtype),
    ).sample
    factor = vae_factor(pipeline)
    return pipeline._unpack_latents(packed, height * factor, width * factor, factor)


def _predict_masked(pipeline: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, options: Options) -> Tensor:
    """PixArt and Sana: one large text encoder, and a mask of its tokens."""
    transformer = pipeline.transformer
    told: dict[str, Any] = {"encoder_hidden_states": conditioning.tensors["text"], "timestep": timesteps}
    if hasattr(transformer, "use_additional_conditions"):  # PixArt, of which the large ones are told the picture's size
        height, width = (side * vae_factor(pipeline) for side in noisy.shape[-2:])
        sizes = {"resolution": [[height, width]], "aspect_ratio": [[height / width]]}
        of_each = {key: noisy.new_tensor(value).expand(len(noisy), -1) for key, value in sizes.items()}
        told["added_cond_kwargs"] = of_each if transformer.use_additional_conditions else dict.fromkeys(sizes)
    prediction = transformer(noisy, encoder_attention_mask=conditioning.tensors["mask"], **told).sample
    return prediction[:, : noisy.shape[1]]  # a second half, if there is one, is the variance, which no recipe trains


def vae_factor(pipeline: Any) -> int:
    """Pixels of an image along one side of a latent."""
    config = pipeline.vae.config
    blocks = config.encoder_block_out_channels if "encoder_block_out_channels" in config else config.block_out_channels
    return 2 ** (len(blocks) - 1)


TWO, THREE = ("text_encoder", "text_encoder_2"), ("text_encoder", "text_encoder_2", "text_encoder_3")
SD = Family("sd", "unet", ("text_encoder",), CROSS_ATTENTION_KV, ("text",), _predict_sd)
SDXL = Family("sdxl", "unet", TWO, CROSS_ATTENTION_KV, ("text", "", "pooled"), _predict_sdxl)
SD3 = Family("sd3", "transformer", THREE, JOINT_ATTENTION_KV, ("text", "", "pooled"), _predict_sd3)
FLUX = Family("flux", "transformer", TWO, JOINT_ATTENTION_KV, ("text", "pooled"), _predict_flux)
PIXART = Family("pixart", "transformer", ("text_encoder",), CROSS_ATTENTION_KV, ("text", "mask"), _predict_masked)
SANA = replace(PIXART, name="sana")
TRANSFORMERS = {"SD3": SD3, "Flux": FLUX, "PixArt": PIXART, "Sana": SANA}
"""Family by the class of the transformer, less 'Transformer2DModel'."""


def recognise(pipeline: Any) -> Family:
    """The family of a loaded pipeline, from its denoiser's class and config.

    Raises:
        InputError: it is of no family that is supported, or of a variant that is trained in another way; the text says why.
    """
    kind = type(pipeline).__name__
    unet, transformer = getattr(pipeline, "unet", None), getattr(pipeline, "transformer", None)
    known = {f"{name}Transformer2DModel": family for name, family in TRANSFORMERS.items()}
    if type(transformer).__name__ in known:
        family = known[type(transformer).__name__]
    elif unet is not None and type(unet).__name__ == "UNet2DConditionModel":
        family = SDXL if unet.config.addition_embed_type == "text_time" else SD
    else:
        known_ones = "Stable Diffusion 1.x, 2.x, XL, 3 and 3.5, FLUX.1, PixArt and Sana"
        raise InputError(f"{kind} is of no supported family; there are {known_ones}.")
    missing = [part for part in ("vae", "tokenizer", "text_encoder", "scheduler") if getattr(pipeline, part, None) is None]
    if missing:
        raise InputError(f"{kind} has no {', '.join(missing)}; a complete text-to-image pipeline is expected.")
    config = getattr(pipeline, family.denoiser).config
    latent = pipeline.vae.config.latent_channels * (4 if family is FLUX else 1)
    if config.in_channels != latent:
        found = f"the denoiser of {kind} takes {config.in_channels} channels, a latent has {latent}"
        why = "it wants an image beside the prompt (inpainting, editing). Only text-to-image is supported."
        raise InputError(f"{found}: {why}")
    if config.get("time_cond_proj_dim") is not None or (family is SANA and config.get("guidance_embeds")):
        raise InputError(f"{kind} is a consistency model, trained by distillation; attribute the model it was distilled from.")
    return family


Layer = nn.Linear | nn.Conv2d
"""What EKFAC is defined for here; a convolution is a linear layer on the patches of its input."""
Layers = Mapping[str, Layer]
"""By name."""
ALL_LAYERS = r"."
LARGE = 50_000_000
"""Weights of a denoiser above which the gradient of all of them is too long to keep for every training image."""


def weight_shape(layer: Layer) -> tuple[int, int]:
    """(out, in) of a layer's weight as a matrix; in = channels x kernel height x kernel width for a convolution."""
    return layer.weight.shape[0], layer.weight[0].numel()


def default_pattern(denoiser: nn.Module, text_projections: str) -> str:
    """Which layers are unlearned where the settings name none: all of a small U-Net, the text-side projections of others.

    Gradients of all layers foretell retraining twice as well (docs/truth.md). In a transformer some layers take no part in a
    loss, and a large denoiser's gradient has billions of numbers.
    """
    small = sum(weight.numel() for weight in denoiser.parameters()) <= LARGE
    return ALL_LAYERS if small and hasattr(denoiser, "down_blocks") else text_projections


def find_layers(denoiser: nn.Module, pattern: str, *, of_lora: bool) -> dict[str, Layer]:
    """The linear layers and convolutions whose name matches, by name, of a LoRA or all others; InputError if there is none."""
    layers: dict[str, Layer] = {
        name: module
        for name, module in denoiser.named_modules()
        if (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
        and bool(re.search(LORA, name)) == of_lora
    }
    # peft keeps the layer that a LoRA lies on as its `base_layer`.
    found = {name: layer for name, layer in layers.items() if re.search(pattern, name.removesuffix(".base_layer"))}
    if not found:
        raise InputError(f"no layer of the denoiser matches {pattern!r}; it has e.g. {sorted(layers)[:5]}.")
    return found


def put_into_float32(layer: Layer, *, casts: bool) -> None:
    """Put a layer into float32 for good; with `casts`, what comes in is cast, and what goes out is cast back."""
    dtype = layer.weight.dtype
    layer.float()
    if casts:
        layer.register_forward_pre_hook(lambda _layer, inputs: (inputs[0].float(), *inputs[1:]))
        layer.register_forward_hook(lambda _layer, _inputs, output: output.to(dtype))


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
