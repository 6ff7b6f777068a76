"""Networks: what one evaluation of a generator's denoiser costs, and how many operations a second this machine does.

The denoiser is put together from its diffusers config, on PyTorch's 'meta' device to count its operations (a multiply-add is
two), with random weights to measure. The config is read from the generator's folder, or else from `SHAPES`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
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
from fastattr.index.choose import available_memory

SD_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
# Stable Diffusion 1.x: unet/config.json of its repository, of which these values differ from diffusers' defaults.
SD_UNET = {"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768}
# The MS-COCO latent diffusion model of the paper: github.com/PeterWang512/AttributeByUnlearning (dd10122),
# mscoco/models/diffusion/mscoco_t2i.py; 128 pixels a side, text encoder of Stable Diffusion 2.
COCO_UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "cross_attention_dim": 1024,
    "block_out_channels": [128, 256, 256, 256],
    "layers_per_block": 2,
    "attention_head_dim": 8,
}
# FLUX.1 dev: diffusers' defaults of FluxTransformer2DModel are its own; 1024 pixels a side make 64 x 64 patches.
FLUX = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}
SHAPES: dict[str, dict[str, Any]] = {
    "stable-diffusion-1": {"denoiser": SD_UNET, "tokens": 77, "vae": SD_VAE},
    "coco-ldm": {"denoiser": COCO_UNET, "tokens": 77, "vae": SD_VAE},
    "flux-dev": {"denoiser": FLUX, "side": 128, "tokens": 512, "vae": {**SD_VAE, "latent_channels": 16}},
}
# Dense TF32 peak of one accelerator, operations a second, of NVIDIA's data sheets (half of the figure with sparsity). PyTorch's
# float32 convolutions run in TF32 on them by default.
PEAK_FLOPS = {"A100": 156e12, "H100": 494.5e12, "L4": 60e12}
HUB_IDS = {  # pipelines whose shape is known without fetching them
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "stable-diffusion-1",
    "CompVis/stable-diffusion-v1-4": "stable-diffusion-1",
    "black-forest-labs/FLUX.1-dev": "flux-dev",
}
SECONDS = 3.0  # how long each rate of this machine is measured
WIDTH, ROWS = 768, 3152  # of a ViT-B/16's layers with 16 images of 197 tokens: what encoders and student spend their time in


@dataclass(frozen=True, kw_only=True)
class Network:
    """What one latent costs in the denoiser of a generator."""

    name: str
    flops: float  # of one evaluation, forward; its gradient costs twice as much again
    parameters: int  # weights of the denoiser
    activations: int  # bytes that one evaluation keeps for the gradient of the weights to unlearn, without checkpointing
    latent: int  # numbers of a latent
    conditioning: int  # numbers of a prompt's conditioning
    unlearned: int  # P, weights to unlearn
    factors: int  # bytes of their curvature while it is fitted
    encode_flops: float  # of turning one image into a latent; drawing one from its latent costs about twice as much
    image_side: int  # pixels
    guided: bool  # whether an image is drawn with two evaluations a step (classifier-free guidance)


def shape_of(source: str | Path) -> dict[str, Any]:
    """The shape of a generator: of a pipeline's folder, a name in `SHAPES`, or a Hub id in `HUB_IDS`; else InputError."""
    name = HUB_IDS.get(str(source).partition("@")[0], str(source))
    if name in SHAPES:
        return SHAPES[name]
    folder = Path(source)
    part = next((part for part in ("unet", "transformer") if (folder / part / "config.json").exists()), None)
    if part is None:
        wrong = f"it is no pipeline folder, and none of {', '.join([*SHAPES, *HUB_IDS])}"
        fix = "Set plan.network to the one that is most like it."
        raise InputError(f"the network of {str(source)!r} is not known: {wrong}. {fix}")
    text = folder / "text_encoder" / "config.json"
    tokens = read_json(text).get("max_position_embeddings", 77) if text.exists() else 77
    denoiser, vae = (read_json(folder / name / "config.json") for name in (part, "vae"))
    return {"denoiser": denoiser, "vae": vae, "tokens": tokens}


def count(name: str, shape: Mapping[str, Any], pattern: str = "") -> Network:
    """Count one evaluation of a denoiser of that shape; `pattern` is of the layers to unlearn, '' the generator's choice."""
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
    latent = torch.zeros(1, config.in_channels, side, side)
    if kind == "UNet2DConditionModel":
        inputs |= {"sample": latent, "timestep": torch.zeros(1, dtype=torch.long)}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            inputs["added_cond_kwargs"] = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}
        return inputs, latent.numel(), text.numel(), side
    if kind == "FluxTransformer2DModel":
        patches = (side // 2) ** 2
        latent = torch.zeros(1, patches, config.in_channels)
        inputs |= {"img_ids": torch.zeros(patches, 3), "txt_ids": torch.zeros(tokens, 3)}
        inputs |= {"guidance": torch.zeros(1) if config.guidance_embeds else None}
    inputs |= {"hidden_states": latent, "pooled_projections": torch.zeros(1, config.pooled_projection_dim)}
    return inputs, latent.numel(), text.numel() + config.pooled_projection_dim, side


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
        denoiser(**inputs)
    return sum(kept.values())


def unlearned_layers(denoiser: nn.Module, pattern: str) -> dict[str, Layer]:
    """The layers to unlearn, by name; '' is the generator's own choice, as `Generator.modules_to_unlearn` makes it."""
    modules = denoiser.named_modules()
    layers: dict[str, Layer] = {name: module for name, module in modules if isinstance(module, nn.Linear | nn.Conv2d)}
    joint = any(re.search(JOINT_ATTENTION_KV, name) for name in layers)
    pattern = pattern or default_pattern(denoiser, JOINT_ATTENTION_KV if joint else CROSS_ATTENTION_KV)
    found = {name: layer for name, layer in layers.items() if re.search(pattern, name)}
    if not found:
        raise InputError(f"no layer of {type(denoiser).__name__} matches {pattern!r}.")
    return found


def measure_machine(
    shape: Mapping[str, Any], network: Network, pattern: str, batch_size: int, *, limit: float
) -> dict[str, float]:
    """Operations a second here in the denoiser, forward and back ('denoiser'), and in large matrix products ('dense').
    `pattern` is of the layers to unlearn. `batch_size` is lowered, and InputError raised for one latent alone, if this would
    take longer than `limit` seconds; InputError too if the denoiser needs more memory than is free.
    """
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    square, rows = torch.randn(WIDTH, WIDTH, device=device), torch.randn(ROWS, WIDTH, device=device)
    dense = 2.0 * ROWS * WIDTH**2 / _seconds(lambda: rows @ square, device)
    one = 3 * network.flops / dense
    if one > limit / 4:
        raise InputError(f"not measured: one latent takes about {one:,.0f} s here, too long for plan.probe_seconds ({limit:g})")
    if 4 * network.parameters + network.activations > available_memory():
        raise InputError("not measured: the denoiser does not fit into the memory that is free")
    batch_size = max(1, min(batch_size, int(limit / 4 / one)))
    denoiser = new_network(dict(shape["denoiser"])).requires_grad_(False).to(device)
    for layer in unlearned_layers(denoiser, pattern).values():
        layer.weight.requires_grad_(True)
    batch = _repeated(network_inputs(denoiser, shape)[0], batch_size, device)
    there_and_back = _seconds(lambda: denoiser(**batch)[0].square().mean().backward(), device)
    rate = 3 * network.flops * batch_size / there_and_back
    return {"denoiser": rate, "dense": dense, "seconds": round(time.monotonic() - started, 1)}


def _repeated(value: Any, batch_size: int, device: torch.device) -> Any:
    """The arguments of one evaluation as those of a batch; positions of patches and tokens are shared by all of it."""
    if isinstance(value, dict):
        return {name: _repeated(each, batch_size, device) for name, each in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    return (value.repeat_interleave(batch_size, dim=0) if value.dim() and len(value) == 1 else value).to(device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Mean seconds of one call, warm."""
    work()
    calls, started = 0, time.monotonic()
    while True:
        work()
        calls += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        if (spent := time.monotonic() - started) > SECONDS:
            return spent / calls
