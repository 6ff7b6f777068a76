"""Families: how each kind of diffusers text-to-image pipeline encodes prompts, runs its denoiser and is trained.

A family is recognised from the pipeline's own parts, not from its name. Each follows the recipe of diffusers' own
fine-tuning scripts (examples/text_to_image, examples/dreambooth); docs/generators.md says which.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastattr.core.errors import InputError

CROSS_ATTENTION_KV = r"attn2\.to_[kv]$"
"""Key and value projections of the text in cross-attention, the weights that the paper unlearns (sec. 3)."""
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
    asked = {
        "device": getattr(pipeline, family.denoiser).device,
        "num_images_per_prompt": 1,
        "prompt_2": None,
        "prompt_3": None,
    }
    asked |= {"do_classifier_free_guidance": False}
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
        sizes = (
            {"resolution": [[height, width]], "aspect_ratio": [[height / width]]}
            if transformer.use_additional_conditions
            else {}
        )
        of_each = {key: noisy.new_tensor(value).expand(len(noisy), -1) for key, value in sizes.items()}
        told["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None, **of_each}
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
