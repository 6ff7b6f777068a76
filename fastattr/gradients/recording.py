"""What a backward pass gives each layer: its inputs, the gradients of its outputs, and from them the weights' gradients.

A layer's weight gradient is a sum of outer products, one a position of each call. From the recorded inputs and output
gradients it can be had for each example, or for groups of examples at once, without a backward pass for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastattr.core.errors import InputError, NonFiniteError
from fastattr.generators.layers import Layer

Calls = Sequence[tuple[Tensor, Tensor]]
"""(B, T, in) inputs and (B, T, out) output gradients of one layer, a pair for each call."""


@contextmanager
def record_layers(layers: Mapping[str, Layer]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """While open, collect inputs and output gradients (`Calls`) of every backward pass, by layer name.

    The layers' weights are frozen while it is open: a backward pass then goes no further than the layers' outputs, which saves
    a third of the work.
    """
    recorded: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    wanted = {name: layer.weight.requires_grad for name, layer in layers.items()}
    handles = []
    for name, layer in layers.items():

        def forward_hook(layer: Layer, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            if not torch.is_grad_enabled():
                return
            activations = inputs[0].detach()

            def keep(gradient: Tensor) -> None:
                dtype = layer.weight.dtype  # also where the network around the layer has half precision
                recorded[name].append((_input_rows(layer, activations), _output_rows(layer, gradient.detach().to(dtype))))

            output.requires_grad_().register_hook(keep)  # one a call, so layers used several times in a graph pair up rightly

        handles.append(layer.register_forward_hook(forward_hook))
        layer.weight.requires_grad_(False)
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            layer.weight.requires_grad_(wanted[name])


def _input_rows(layer: Layer, inputs: Tensor) -> Tensor:
    """(B, ..., in) -> (B, T, in); for a convolution (B, C, H, W) -> its patches, (B, T, C x kernel)."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise InputError(f"convolutions padded with {layer.padding!r} {layer.padding_mode} are not supported by EKFAC.")
    form = {"dilation": layer.dilation, "padding": layer.padding, "stride": layer.stride}
    return F.unfold(inputs, layer.kernel_size, **form).transpose(1, 2)


def _output_rows(layer: Layer, gradients: Tensor) -> Tensor:
    """(B, ..., out) -> (B, T, out); for a convolution from (B, out, H, W)."""
    of_linear = isinstance(layer, nn.Linear)
    return gradients.reshape(len(gradients), -1, gradients.shape[-1]) if of_linear else gradients.flatten(2).transpose(1, 2)


def joined(calls: Calls, groups: int) -> tuple[Tensor, Tensor]:
    """Inputs (groups, R, in) and output gradients (groups, R, out) of a layer: all rows of all calls of each group.

    Consecutive examples fall into groups of equal size; as many groups as examples keep them apart. NonFiniteError if
    the layer took no part in the loss.
    """
    if not calls:
        raise NonFiniteError("a layer to unlearn took no part in the loss; no gradient reached it.")
    sides = zip(*((part.reshape(groups, -1, part.shape[-1]) for part in call) for call in calls), strict=True)
    inputs, gradients = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in sides)
    return inputs, gradients


def example_gradients(calls: Calls, groups: int | None = None) -> Tensor:
    """(B, out, in) weight gradients of each example, or (groups, out, in) sums over consecutive examples; see `joined`."""
    inputs, gradients = joined(calls, groups or (len(calls[0][0]) if calls else 0))
    return torch.bmm(gradients.transpose(1, 2), inputs)


def rotated_gradients(calls: Calls, groups: int, left: Tensor, right: Tensor) -> Tensor:
    """(groups, o, i) left^T G right, G the weight gradient of a group, for (out, o) and (in, i) directions.

    Rotation is linear: it is done once a group, not once an example, and in the order that multiplies least: of the
    inputs and output gradients where few rows or few directions are wanted, of their product where there are many rows.
    """
    inputs, gradients = joined(calls, groups)
    rows, (inner, few_in), (outer, few_out) = inputs.shape[1], right.shape, left.shape
    costs = {}
    for turn_inputs in (False, True):
        for turn_outputs in (False, True):
            wide_in, wide_out = few_in if turn_inputs else inner, few_out if turn_outputs else outer
            before = rows * (inner * few_in * turn_inputs + outer * few_out * turn_outputs)
            after = few_out * outer * wide_in * (not turn_outputs) + few_out * inner * few_in * (not turn_inputs)
            costs[turn_inputs, turn_outputs] = before + rows * wide_in * wide_out + after
    turn_inputs, turn_outputs = min(costs, key=costs.__getitem__)
    gradients = gradients @ left if turn_outputs else gradients
    total = torch.bmm(gradients.transpose(1, 2), inputs @ right if turn_inputs else inputs)
    total = total if turn_outputs else left.T @ total
    return total if turn_inputs else total @ right
