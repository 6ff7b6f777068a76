"""Student: a small network from frozen features to a unit embedding whose cosine orders training images.

Source: arXiv:2511.10721, sec. 4. The network is the paper's MLP plus a linear path that starts as a principal
component projection of the features, so an untrained student already ranks like untuned features.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fastattr.errors import InputError


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Shape of the network."""

    embed_dim: int = 128
    """D, width of the embedding."""
    hidden: tuple[int, ...] = (512, 512)
    """Widths of the hidden layers."""
    input_norm: bool = False
    """Normalise each feature vector (layer norm, learned) before the network."""

    def __post_init__(self) -> None:
        if self.embed_dim < 1 or any(width < 1 for width in self.hidden):
            raise InputError("embed_dim and hidden widths must be at least 1")


class Student(nn.Module):
    """Features (B, F) -> unit embeddings (B, D), with the scale and bias of the training loss."""

    def __init__(self, feature_dim: int, config: StudentConfig) -> None:
        super().__init__()
        self.input_norm = nn.LayerNorm(feature_dim) if config.input_norm else nn.Identity()
        widths = [feature_dim, *config.hidden]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        last = nn.Linear(widths[-1], config.embed_dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(*layers, last)
        self.linear = nn.Linear(feature_dim, config.embed_dim)
        self.log_scale = nn.Parameter(torch.tensor(1.5))
        """Logarithm of the factor on the cosine: the factor is positive by construction."""
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, F) -> (B, D) unit vectors."""
        features = self.input_norm(features)
        return F.normalize(self.linear(features) + self.mlp(features), dim=-1)

    @torch.no_grad()
    def set_projection(self, features: np.ndarray) -> None:
        """Start the linear path as the leading principal components of (N, F) features, without centring.

        Uncentred, so that cosines between projected features stay as near as possible to those between the features.
        """
        _, vectors = np.linalg.eigh(features.T.astype(np.float64) @ features)
        leading = np.ascontiguousarray(vectors[:, ::-1].T[: self.linear.out_features])
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.linear.weight[: len(leading)] = torch.from_numpy(leading).float()

    def logits(self, cosine: torch.Tensor) -> torch.Tensor:
        """The training loss's logit of a cosine; rises with it."""
        return self.log_scale.exp() * cosine + self.bias


@torch.no_grad()
def embed(student: Student, features: np.ndarray, *, batch_size: int = 8192) -> np.ndarray:
    """(N, D) float32 unit embeddings of (N, F) features."""
    parts = [
        student(torch.from_numpy(np.ascontiguousarray(features[start : start + batch_size])).float()).cpu().numpy()
        for start in range(0, len(features), batch_size)
    ]
    return np.concatenate(parts)
