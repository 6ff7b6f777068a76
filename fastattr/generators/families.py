"""Families: how each kind of diffusers text-to-image pipeline encodes prompts, runs its denoiser and is trained.

A family is recognised from the pipeline's own parts, not from its name. Each follows the recipe of diffusers' own
fine-tuning scripts (examples/text_to_image, examples/dreambooth); docs/generators.md says which.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastattr.core.errors import InputError
from fastattr.generators.conditioning import Conditioning

CROSS_ATTENTION_KV = r"attn2\.to_[kv]$"
"""Key and value projections of the text in cross-attention, the weights that the paper unlearns (sec. 3)."""
JOINT_ATTENTION_KV = r"attn\.add_[kv]_proj$"
"""Those of the text's own stream where text and image attend to each other in one attention."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a pipeline's files don't say about how it is used and was fine-tuned."""

    resolution: int = 0
    """Side of the images in pixels; 0 takes the pipeline's own default."""
    max_tokens: int = 0
    """Tokens of a prompt for a T5 or Gemma text encoder; 0 takes the pipeline's own default."""
    distilled_guidance: float = 3.5
    """Guidance scale that a guidance-distilled denoiser (FLUX.1 dev) is told for a loss; 3.5 as in diffusers' script."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of pipeline."""

    name: str
    denoiser: str
    """The pipeline's attribute that holds the network to unlearn."""
    text_encoders: tuple[str, ...]
    """Attributes of the text encoders; one may be missing from a pipeline (None)."""
    text_projections: str
    """Pattern of the linear layers that make keys and values of the text."""
    encode: Callable[[Any, list[str], Options], Conditioning]
    """(pipeline, prompts, options) -> their conditioning."""
    predict: Callable[[Any, Tensor, Tensor, Conditioning, Options], Tensor]
    """(pipeline, noised latents, timesteps as told, conditioning, options) -> (B, L, h, w) prediction."""
    default_side: Callable[[Any], int]
    """pipeline -> side of its latents."""
    patch: Callable[[Any], int]
    """pipeline -> what that side must be a multiple of."""


def _encode_sd(pipeline: Any, prompts: list[str], options: Options) -> Conditioning:
    text, _ = pipeline.encode_prompt(prompts, pipeline.unet.device, 1, False)
    return Conditioning({"text": text})


def _predict_sd(pipeline: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, options: Options) -> Tensor:
    return pipeline.unet(noisy, timesteps, encoder_hidden_states=conditioning.tensors["text"]).sample


def _encode_sdxl(pipeline: Any, prompts: list[str], options: Options) -> Conditioning:
    text, _, pooled, _ = pipeline.encode_prompt(prompts, device=pipeline.unet.device, do_classifier_free_guidance=False)
    return Conditioning({"text": text, "pooled": pooled})


def _predict_sdxl(pipeline: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, options: Options) -> Tensor:
    height, width = (side * vae_factor(pipeline) for side in noisy.shape[-2:])
    # Original size, crop and target size: every image is encoded whole, at the size at which the generator draws.
    sizes = torch.tensor([height, width, 0, 0, height, width], device=noisy.device, dtype=noisy.dtype)
    added = {"text_embeds": conditioning.tensors["pooled"], "time_ids": sizes.expand(len(noisy), -1)}
    return pipeline.unet(noisy, timesteps, encoder_hidden_states=conditioning.tensors["text"], added_cond_kwargs=added).sample


def _encode_sd3(pipeline: Any, prompts: list[str], options: Options) -> Conditioning:
    text, _, pooled, _ = pipeline.encode_prompt(
        prompts,
        None,
        None,
        device=pipeline.transformer.device,
        do_classifier_free_guidance=False,
        max_sequence_length=_max_tokens(pipeline, options),
    )
    return Conditioning({"text": text, "pooled": pooled})


def _predict_sd3(pipeline: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, options: Options) -> Tensor:
    return pipeline.transformer(
        hidden_states=noisy,
        timestep=timesteps,
        encoder_hidden_states=conditioning.tensors["text"],
        pooled_projections=conditioning.tensors["pooled"],
    ).sample


def _encode_flux(pipeline: Any, prompts: list[str], options: Options) -> Conditioning:
    text, pooled, _ = pipeline.encode_prompt(
        prompts, device=pipeline.transformer.device, max_sequence_length=_max_tokens(pipeline, options)
    )
    return Conditioning({"text": text, "pooled": pooled})


def _predict_flux(pipeline: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, options: Options) -> Tensor:
    batch, channels, height, width = noisy.shape
    text = conditioning.tensors["text"]
    guidance = None
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


def _encode_masked(pipeline: Any, prompts: list[str], options: Options) -> Conditioning:
    """PixArt and Sana: one large text encoder, and a mask of its tokens."""
    text, mask, _, _ = pipeline.encode_prompt(
        prompts,
        do_classifier_free_guidance=False,
        device=pipeline.transformer.device,
        max_sequence_length=_max_tokens(pipeline, options),
    )
    return Conditioning({"text": text, "mask": mask})


def _predict_pixart(pipeline: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, options: Options) -> Tensor:
    transformer = pipeline.transformer
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if transformer.use_additional_conditions:
        height, width = (side * vae_factor(pipeline) for side in noisy.shape[-2:])
        size = torch.tensor([[height, width]], device=noisy.device, dtype=noisy.dtype)
        ratio = torch.tensor([[height / width]], device=noisy.device, dtype=noisy.dtype)
        added = {"resolution": size.expand(len(noisy), -1), "aspect_ratio": ratio.expand(len(noisy), -1)}
    prediction: Tensor = transformer(
        noisy,
        encoder_hidden_states=conditioning.tensors["text"],
        encoder_attention_mask=conditioning.tensors["mask"],
        timestep=timesteps,
        added_cond_kwargs=added,
    ).sample
    return prediction[:, : noisy.shape[1]]  # a second half, if there is one, is the variance, which no recipe trains


def _predict_sana(pipeline: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, options: Options) -> Tensor:
    return pipeline.transformer(
        noisy,
        encoder_hidden_states=conditioning.tensors["text"],
        encoder_attention_mask=conditioning.tensors["mask"],
        timestep=timesteps,
    ).sample


def _max_tokens(pipeline: Any, options: Options) -> int:
    """Tokens for T5 or Gemma: the option's, or what the pipeline takes when it draws."""
    return options.max_tokens or int(inspect.signature(type(pipeline).__call__).parameters["max_sequence_length"].default)


def vae_factor(pipeline: Any) -> int:
    """Pixels of an image along one side of a latent."""
    config = pipeline.vae.config
    blocks = config.encoder_block_out_channels if "encoder_block_out_channels" in config else config.block_out_channels
    return 2 ** (len(blocks) - 1)


def _sample_size(pipeline: Any) -> int:
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    return int(denoiser.config.sample_size)


SD = Family(
    name="sd",
    denoiser="unet",
    text_encoders=("text_encoder",),
    text_projections=CROSS_ATTENTION_KV,
    encode=_encode_sd,
    predict=_predict_sd,
    default_side=_sample_size,
    patch=lambda _: 1,
)
SDXL = replace(SD, name="sdxl", text_encoders=("text_encoder", "text_encoder_2"), encode=_encode_sdxl, predict=_predict_sdxl)
SD3 = Family(
    name="sd3",
    denoiser="transformer",
    text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
    text_projections=JOINT_ATTENTION_KV,
    encode=_encode_sd3,
    predict=_predict_sd3,
    default_side=_sample_size,
    patch=lambda pipeline: int(pipeline.transformer.config.patch_size),
)
FLUX = replace(
    SD3,
    name="flux",
    text_encoders=("text_encoder", "text_encoder_2"),
    encode=_encode_flux,
    predict=_predict_flux,
    default_side=lambda pipeline: int(pipeline.default_sample_size),
    patch=lambda _: 2,
)
PIXART = replace(
    SD3,
    name="pixart",
    text_encoders=("text_encoder",),
    text_projections=CROSS_ATTENTION_KV,
    encode=_encode_masked,
    predict=_predict_pixart,
)
SANA = replace(PIXART, name="sana", predict=_predict_sana)

TRANSFORMERS = {
    "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": FLUX,
    "PixArtTransformer2DModel": PIXART,
    "SanaTransformer2DModel": SANA,
}
"""Family by the class of the transformer."""


def recognise(pipeline: Any) -> Family:
    """The family of a loaded pipeline, from its denoiser's class and config.

    Raises:
        InputError: it is of no family that is supported, or of a variant that is trained in another way; the text says why.
    """
    kind = type(pipeline).__name__
    unet, transformer = getattr(pipeline, "unet", None), getattr(pipeline, "transformer", None)
    if transformer is not None and type(transformer).__name__ in TRANSFORMERS:
        family = TRANSFORMERS[type(transformer).__name__]
    elif unet is not None and type(unet).__name__ == "UNet2DConditionModel":
        family = SDXL if unet.config.addition_embed_type == "text_time" else SD
    else:
        raise InputError(
            f"{kind} is of no supported family; there are Stable Diffusion 1.x, 2.x, XL, 3 and 3.5, FLUX.1, PixArt and Sana."
        )
    missing = [part for part in ("vae", "tokenizer", "text_encoder", "scheduler") if getattr(pipeline, part, None) is None]
    if missing:
        raise InputError(f"{kind} has no {', '.join(missing)}; a complete text-to-image pipeline is expected.")
    config = getattr(pipeline, family.denoiser).config
    latent = pipeline.vae.config.latent_channels * (4 if family is FLUX else 1)
    if config.in_channels != latent:
        raise InputError(
            f"the denoiser of {kind} takes {config.in_channels} channels, a latent has {latent}: it wants an image beside the "
            "prompt (inpainting, editing). Only text-to-image is supported."
        )
    if config.get("time_cond_proj_dim") is not None or (family is SANA and config.get("guidance_embeds")):
        raise InputError(f"{kind} is a consistency model, trained by distillation; attribute the model it was distilled from.")
    return family
