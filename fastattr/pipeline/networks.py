"""Networks: what one evaluation of a generator's denoiser costs, counted on its shape alone, without weights.

The denoiser is put together on PyTorch's 'meta' device from its diffusers config, one latent passes through it, and
PyTorch's own counter adds up the floating-point operations (a multiply-add is two). The config is read from the
generator's folder, or, where there is none yet, from `SHAPES`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastattr.core.errors import InputError
from fastattr.core.files import read_json
from fastattr.generators.families import CROSS_ATTENTION_KV, JOINT_ATTENTION_KV, Layer, default_pattern
from fastattr.gradients.ekfac import factor_bytes

SD_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
SHAPES: dict[str, dict[str, Any]] = {
    # Stable Diffusion 1.x: unet/config.json of its repository, of which these values differ from diffusers' defaults.
    "stable-diffusion-1": {
        "denoiser": {"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768},
        "tokens": 77,
        "vae": SD_VAE,
    },
    # The MS-COCO latent diffusion model of the paper: github.com/PeterWang512/AttributeByUnlearning (dd10122),
    # mscoco/models/diffusion/mscoco_t2i.py; 128 pixels a side, text encoder of Stable Diffusion 2.
    "coco-ldm": {
        "denoiser": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 16,
            "block_out_channels": [128, 256, 256, 256],
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 1024,
        },
        "tokens": 77,
        "vae": SD_VAE,
    },
    # FLUX.1 dev: diffusers' defaults of FluxTransformer2DModel are its own; 1024 pixels a side make 64 x 64 patches.
    "flux-dev": {
        "denoiser": {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
        "side": 128,
        "tokens": 512,
        "vae": {**SD_VAE, "latent_channels": 16},
    },
}
PEAK_FLOPS = {"A100": 156e12, "H100": 494.5e12, "L4": 60e12}
"""Dense TF32 peak of one accelerator, operations a second, half of the sparse figure that NVIDIA's data sheets give where
they give only that one (A100 SXM: 156 TFLOPS; H100 SXM: 989 with sparsity; L4: 120 with sparsity). PyTorch's float32
convolutions run in TF32 on them by default."""
HUB_IDS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "stable-diffusion-1",
    "CompVis/stable-diffusion-v1-4": "stable-diffusion-1",
    "black-forest-labs/FLUX.1-dev": "flux-dev",
}
"""Pipelines whose shape is known without fetching them."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """What one latent costs in the denoiser of a generator."""

    name: str
    flops: float
    """Of one evaluation, forward; its gradient costs twice as much again."""
    parameters: int
    """Weights of the denoiser."""
    activations: int
    """Bytes that one evaluation keeps for the gradient of the weights to unlearn, in float32, without checkpointing."""
    latent: int
    """Numbers of a latent."""
    conditioning: int
    """Numbers of a prompt's conditioning."""
    unlearned: int
    """P, weights to unlearn."""
    factors: int
    """Bytes of their curvature while it is fitted."""
    encode_flops: float
    """Of turning one image into a latent; drawing one from its latent costs about twice as much."""
    image_side: int
    """Pixels."""
    guided: bool
    """Whether an image is drawn with two evaluations a step (classifier-free guidance)."""


def shape_of(source: str | Path) -> dict[str, Any]:
    """The shape of a generator: of a pipeline's folder, a name in `SHAPES`, or a Hub id in `HUB_IDS`.

    Raises:
        InputError: it is none of them, or its denoiser is of a class that cannot be counted.
    """
    name = HUB_IDS.get(str(source).partition("@")[0], str(source))
    if name in SHAPES:
        return SHAPES[name]
    folder = Path(source)
    part = next((part for part in ("unet", "transformer") if (folder / part / "config.json").exists()), None)
    if part is None:
        raise InputError(
            f"the network of {str(source)!r} is not known: it is no pipeline folder, and none of "
            f"{', '.join([*SHAPES, *HUB_IDS])}. Set plan.network to the one that is most like it."
        )
    vae = read_json(folder / "vae" / "config.json")
    shape = {"denoiser": read_json(folder / part / "config.json"), "vae": vae, "tokens": 77}
    text = folder / "text_encoder" / "config.json"
    if text.exists():
        shape["tokens"] = read_json(text).get("max_position_embeddings", 77)
    return shape


def count(name: str, shape: Mapping[str, Any], pattern: str = "") -> Network:
    """Count one evaluation of a denoiser.

    Args:
        name: of the network.
        shape: see `shape_of`.
        pattern: of the layers to unlearn; '' is the generator's own choice.
    """
    config = dict(shape["denoiser"])
    with torch.device("meta"):
        denoiser = new_network(config)
        inputs, latent, conditioning, side = network_inputs(denoiser, shape)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            denoiser(**inputs)
        layers = unlearned_layers(denoiser, pattern)
        kept = _kept_bytes(denoiser, layers, inputs)
        vae = new_network(dict(shape["vae"]))
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        with FlopCounterMode(display=False) as encoding, torch.no_grad():
            vae.encoder(torch.zeros(1, vae.config.in_channels, side * factor, side * factor))
    return Network(
        name=name,
        flops=float(counter.get_total_flops()),
        parameters=sum(weight.numel() for weight in denoiser.parameters()),
        activations=kept,
        latent=latent,
        conditioning=conditioning,
        unlearned=sum(layer.weight.numel() for layer in layers.values()),
        factors=factor_bytes(layers),
        encode_flops=float(encoding.get_total_flops()),
        image_side=side * factor,
        guided="guidance_embeds" not in config,
    )


def new_network(config: dict[str, Any]) -> Any:
    """A network of diffusers from its config, with new weights; takes '_class_name' out of the config."""
    import diffusers

    kind = getattr(diffusers, config.pop("_class_name"))
    values = {key: value for key, value in config.items() if not key.startswith("_")}
    return kind.from_config(values).eval()


def network_inputs(denoiser: nn.Module, shape: Mapping[str, Any]) -> tuple[dict[str, Any], int, int, int]:
    """The arguments of one evaluation, the sizes of latent and conditioning, and the latent's side."""
    config: Any = denoiser.config
    tokens = shape["tokens"]
    kind = type(denoiser).__name__
    if kind not in {"UNet2DConditionModel", "FluxTransformer2DModel", "SD3Transformer2DModel"}:
        raise InputError(f"a plan can't count a {kind} yet; set plan.network to the one of {', '.join(SHAPES)} most like it.")
    side = int(shape.get("side") or getattr(config, "sample_size", None) or 64)
    width = config.cross_attention_dim if kind == "UNet2DConditionModel" else config.joint_attention_dim
    text = torch.zeros(1, tokens + (256 if kind == "SD3Transformer2DModel" else 0), width)
    inputs: dict[str, Any] = {"timestep": torch.zeros(1), "encoder_hidden_states": text}
    if kind == "UNet2DConditionModel":
        inputs |= {"sample": torch.zeros(1, config.in_channels, side, side), "timestep": torch.zeros(1, dtype=torch.long)}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            inputs["added_cond_kwargs"] = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}
        return inputs, config.in_channels * side * side, text.numel(), side
    inputs["pooled_projections"] = torch.zeros(1, config.pooled_projection_dim)
    if kind == "FluxTransformer2DModel":
        patches = (side // 2) ** 2
        inputs |= {"hidden_states": torch.zeros(1, patches, config.in_channels)}
        inputs |= {"img_ids": torch.zeros(patches, 3), "txt_ids": torch.zeros(tokens, 3)}
        inputs |= {"guidance": torch.zeros(1) if config.guidance_embeds else None}
        latent = config.in_channels * patches
    else:
        inputs |= {"hidden_states": torch.zeros(1, config.in_channels, side, side)}
        latent = config.in_channels * side * side
    return inputs, latent, text.numel() + config.pooled_projection_dim, side


def _kept_bytes(denoiser: nn.Module, layers: Mapping[str, Layer], inputs: Mapping[str, Any]) -> int:
    """Bytes of the tensors that autograd keeps for the gradient with respect to these layers, each storage once."""
    kept: dict[int, int] = {}
    denoiser.requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    weights = {id(weight) for weight in denoiser.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in weights and id(tensor._base) not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = denoiser(**inputs)
    del output
    return sum(kept.values())


def unlearned_layers(denoiser: nn.Module, pattern: str) -> dict[str, Layer]:
    """The layers to unlearn, by name; '' is the generator's own choice, as `Generator.modules_to_unlearn` makes it."""
    layers: dict[str, Layer] = {
        name: module for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }
    joint = any(re.search(JOINT_ATTENTION_KV, name) for name in layers)
    pattern = pattern or default_pattern(denoiser, JOINT_ATTENTION_KV if joint else CROSS_ATTENTION_KV)
    found = {name: layer for name, layer in layers.items() if re.search(pattern, name)}
    if not found:
        raise InputError(f"no layer of {type(denoiser).__name__} matches {pattern!r}.")
    return found
