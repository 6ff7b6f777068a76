"""Student: a small network from frozen features to a unit embedding whose cosine orders training images.

Source: arXiv:2511.10721, sec. 4. The network is the paper's MLP plus a linear path that starts as a principal
component projection of the features, so an untrained student already ranks like untuned features.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastattr.core.errors import InputError
from fastattr.core.settings import at_least


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Shape of the network."""

    RETIRED: ClassVar[Mapping[str, Any]] = {"separate_heads": False, "popularity": False}
    """Switches of earlier students, measured and given up (docs/student.md); students without them are read."""
    embed_dim: int = 128
    """D, width of the embedding."""
    hidden: tuple[int, ...] = (512, 512)
    """Widths of the hidden layers."""
    input_norm: bool = False
    """Normalise each feature vector (layer norm, learned) before the network."""
    linear_path: bool = True
    """Add a linear projection, first the features' principal components, to the MLP; the paper has the MLP alone."""
    dropout: float = 0.0
    """After each hidden layer."""

    def __post_init__(self) -> None:
        at_least(self, 1, "embed_dim", "hidden")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be in [0, 1), got {self.dropout}")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StudentConfig:
        """From a manifest or config.json; what an older one lacks keeps its default.

        InputError if it is of a student with a part that this version has no more.
        """
        used = [name for name in cls.RETIRED if values.get(name)]
        if used:
            raise InputError(f"this student was trained with {' and '.join(used)}, which this version lacks; distill it again.")
        kept = {name: value for name, value in values.items() if name not in cls.RETIRED}
        return cls(**{**kept, "hidden": tuple(values["hidden"])})


class Student(nn.Module):
    """Features (B, F) -> unit embeddings (B, D), of queries and training images alike.

    An MLP, beside it a linear path where the config says so, and the scale and bias of the training loss.
    """

    def __init__(self, feature_dim: int, config: StudentConfig) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.input_norm = nn.LayerNorm(feature_dim) if config.input_norm else nn.Identity()
        widths = [feature_dim, *config.hidden]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU(), *([nn.Dropout(config.dropout)] if config.dropout else [])]
        last = nn.Linear(widths[-1], config.embed_dim)
        if config.linear_path:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(*layers, last)
        self.linear = nn.Linear(feature_dim, config.embed_dim) if config.linear_path else None
        self.log_scale = nn.Parameter(torch.tensor(1.5))
        """Logarithm of the factor on the cosine: the factor is positive by construction."""
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) -> (B, D) unit vectors."""
        features = self.input_norm(features)
        projected = self.mlp(features)
        return F.normalize(projected if self.linear is None else projected + self.linear(features), dim=-1)

    @torch.no_grad()
    def start_from(self, features: np.ndarray) -> None:
        """Start the linear path as the leading principal components of (N, F) features, without centring.

        Uncentred, so that cosines between projected features stay as near as possible to those between the features.
        """
        if self.linear is None:
            return
        values = features.astype(np.float64)
        if len(values) < values.shape[1]:  # wide features, such as gradients
            rows = np.linalg.svd(values, full_matrices=False)[2]
        else:
            rows = np.linalg.eigh(values.T @ values)[1][:, ::-1].T
        leading = np.ascontiguousarray(rows[: self.linear.out_features])
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.linear.weight[: len(leading)] = torch.from_numpy(leading).float()

    def logits(self, cosine: Tensor) -> Tensor:
        """The training loss's logit of a cosine; rises with it."""
        return self.log_scale.exp() * cosine + self.bias


@torch.no_grad()
def embed(student: Student, features: np.ndarray, *, batch_size: int = 8192) -> np.ndarray:
    """(N, D) float32 unit embeddings of (N, F) features of queries or training images."""
    batches = (features[start : start + batch_size] for start in range(0, len(features), batch_size))
    tensors = (torch.from_numpy(np.ascontiguousarray(batch)).float() for batch in batches)
    return np.concatenate([student(batch).cpu().numpy() for batch in tensors])
