"""Muon: momentum whose matrices are made orthogonal before each step; AdamW for everything that is no matrix.

Source: Keller Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the step's size follows arXiv:2502.16982, so that
learning rates and weight decay are those of AdamW.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Muon(torch.optim.Optimizer):
    """Muon for matrices and convolutions of `module`, AdamW for embeddings, biases and norms; frozen weights stay."""

    def __init__(self, module: nn.Module, *, learning_rate: float, weight_decay: float) -> None:
        looked_up = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.ndim >= 2 and id(parameter) not in looked_up]
        chosen = {id(parameter) for parameter in matrices}
        others = [parameter for parameter in trained if id(parameter) not in chosen]
        groups = [{"params": matrices, "matrices": True}, {"params": others, "matrices": False}]
        super().__init__([group for group in groups if group["params"]], {"lr": learning_rate, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step along the gradients; `closure` is not used."""
        for group in self.param_groups:
            direction_of = _muon if group["matrices"] else _adam
            for parameter in (each for each in group["params"] if each.grad is not None):
                direction = direction_of(parameter, self.state[parameter])
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])


def _muon(parameter: torch.Tensor, state: dict[str, torch.Tensor], momentum: float = 0.95) -> torch.Tensor:
    """Nesterov momentum made orthogonal, with the root mean square of an AdamW step."""
    if not state:
        state["momentum"] = torch.zeros_like(parameter)
    state["momentum"].lerp_(parameter.grad, 1 - momentum)  # type: ignore[arg-type]
    matrix = parameter.grad.lerp(state["momentum"], momentum).flatten(1)  # type: ignore[union-attr]
    return orthogonal(matrix).mul_(0.2 * max(matrix.shape) ** 0.5).view(parameter.shape)


def _adam(parameter: torch.Tensor, state: dict[str, torch.Tensor], betas: tuple[float, float] = (0.9, 0.99)) -> torch.Tensor:
    """AdamW's direction."""
    if not state:
        state["step"] = torch.zeros(())
        state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    state["step"] += 1
    state["mean"].lerp_(parameter.grad, 1 - betas[0])  # type: ignore[arg-type]
    state["square"].lerp_(parameter.grad.square(), 1 - betas[1])  # type: ignore[union-attr]
    mean_share, square_share = (1 - beta ** float(state["step"]) for beta in betas)
    return state["mean"] / mean_share / ((state["square"] / square_share).sqrt() + 1e-8)


def orthogonal(matrix: torch.Tensor, *, iterations: int = 5) -> torch.Tensor:
    """(R, C) matrix with the same singular vectors and singular values near 1, by Newton-Schulz iterations in bfloat16."""
    wide = matrix.bfloat16() if matrix.shape[0] <= matrix.shape[1] else matrix.T.bfloat16()
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(iterations):
        product = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * product + 2.0315 * product @ product) @ wide
    return (wide if matrix.shape[0] <= matrix.shape[1] else wide.T).to(matrix.dtype).contiguous()
