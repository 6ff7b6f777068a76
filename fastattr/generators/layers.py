"""The layers of a denoiser whose weights can be unlearned."""

from __future__ import annotations

import re

from torch import nn

from fastattr.core.errors import InputError
from fastattr.generators.lora import LORA

Layer = nn.Linear | nn.Conv2d
"""What EKFAC is defined for here; a convolution is a linear layer on the patches of its input."""
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
