"""Conditioning: what a denoiser is told about prompts, as named tensors that share their first axis.

Stable Diffusion has one tensor, others several: token embeddings of some text encoders, a pooled embedding, a mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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

    @property
    def numbers(self) -> int:
        """Numbers a prompt, all tensors together."""
        return sum(tensor[0].numel() for tensor in self.tensors.values())

    def to(self, target: torch.device | str | torch.dtype) -> Conditioning:
        """On another device, or in another precision; integers and masks keep theirs."""
        if isinstance(target, torch.dtype):
            parts = {name: part.to(target) if part.is_floating_point() else part for name, part in self.tensors.items()}
            return Conditioning(parts)
        return Conditioning({name: part.to(target) for name, part in self.tensors.items()})

    def repeated(self, count: int) -> Conditioning:
        """(M x count) rows: all of them `count` times over; one prompt's take no memory of their own."""
        if len(self) == 1:
            return Conditioning({name: part.expand(count, *part.shape[1:]) for name, part in self.tensors.items()})
        return Conditioning({name: part.repeat(count, *[1] * (part.dim() - 1)) for name, part in self.tensors.items()})

    @staticmethod
    def concatenated(parts: Sequence[Conditioning]) -> Conditioning:
        """All rows of several, in order."""
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})
