"""The layers of a denoiser whose weights can be unlearned."""

from __future__ import annotations

from torch import nn

Layer = nn.Linear | nn.Conv2d
"""What EKFAC is defined for here; a convolution is a linear layer on the patches of its input."""


def weight_shape(layer: Layer) -> tuple[int, int]:
    """(out, in) of a layer's weight as a matrix; in = channels x kernel height x kernel width for a convolution."""
    return layer.weight.shape[0], layer.weight[0].numel()
