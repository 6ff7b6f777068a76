"""The layers of a denoiser whose weights can be unlearned."""

from __future__ import annotations

from torch import nn

Layer = nn.Linear | nn.Conv2d
"""What EKFAC is defined for here; a convolution is a linear layer on the patches of its input."""


def weight_shape(layer: Layer) -> tuple[int, int]:
    """(out, in) of a layer's weight as a matrix; in = channels x kernel height x kernel width for a convolution."""
    return layer.weight.shape[0], layer.weight[0].numel()


ALL_LAYERS = r"."
LARGE = 50_000_000
"""Weights of a denoiser above which the gradient of all of them is too long to keep for every training image."""


def default_pattern(denoiser: nn.Module, text_projections: str) -> str:
    """Which layers are unlearned where the settings name none: all of a small U-Net, the text-side projections of others.

    Gradients of all layers foretell retraining twice as well as those of the text-side projections (docs/truth.md), and a
    generator that was trained from scratch here is small. In a transformer some layers take no part in a loss, and a large
    denoiser's gradient has billions of numbers.
    """
    small = sum(weight.numel() for weight in denoiser.parameters()) <= LARGE
    return ALL_LAYERS if small and hasattr(denoiser, "down_blocks") else text_projections
