"""What a backward pass gives each layer: its inputs, the gradients of its outputs, and from them each example's gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from fastattr.core.errors import InputError, NonFiniteError
from fastattr.generators.layers import Layer


@contextmanager
def record_layers(layers: Mapping[str, Layer]) -> Iterator[dict[str, list[tuple[torch.Tensor, torch.Tensor]]]]:
    """While open, collect (inputs (B, T, in), output gradients (B, T, out)) of every backward pass, by layer name."""
    recorded: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in layers}
    handles = []
    for name, layer in layers.items():

        def forward_hook(layer: Layer, inputs: tuple[torch.Tensor, ...], output: torch.Tensor, name: str = name) -> None:
            activations = inputs[0].detach()

            def keep(gradient: torch.Tensor) -> None:
                dtype = layer.weight.dtype  # also where the network around the layer has half precision
                recorded[name].append((_input_rows(layer, activations), _output_rows(layer, gradient.detach().to(dtype))))

            output.register_hook(keep)  # one hook a call, so layers used several times in one graph pair up rightly

        handles.append(layer.register_forward_hook(forward_hook))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _input_rows(layer: Layer, inputs: torch.Tensor) -> torch.Tensor:
    """(B, ..., in) -> (B, T, in); for a convolution (B, C, H, W) -> its patches, (B, T, C x kernel)."""
    if isinstance(layer, nn.Linear):
        return _rows(inputs)
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise InputError(f"convolutions padded with {layer.padding!r} {layer.padding_mode} are not supported by EKFAC.")
    patches = F.unfold(inputs, layer.kernel_size, dilation=layer.dilation, padding=layer.padding, stride=layer.stride)
    return patches.transpose(1, 2)


def _output_rows(layer: Layer, gradients: torch.Tensor) -> torch.Tensor:
    """(B, ..., out) -> (B, T, out); for a convolution from (B, out, H, W)."""
    return _rows(gradients) if isinstance(layer, nn.Linear) else gradients.flatten(2).transpose(1, 2)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """(B, ..., W) -> (B, T, W)."""
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


def example_gradients(recorded: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """(B, out, in) weight gradients of each example of a batch, summed over the layer's calls."""
    total = None
    for activations, gradients in recorded:
        part = torch.einsum("bto,bti->boi", gradients, activations)
        total = part if total is None else total + part
    if total is None:
        raise NonFiniteError("a layer to unlearn took no part in the loss; no gradient reached it.")
    return total
