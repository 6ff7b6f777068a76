"""Light student: a trained student in NumPy, so that an answer need not wait for torch to be imported.

Reads model.safetensors; tests/students/test_light.py compares it with the student that torch trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from fastattr.core.errors import ArtifactDamagedError, NonFiniteError
from fastattr.features.light_clip import layer_norm, linear


class LightStudent:
    """What a trained student (fastattr.students.student) does for a query."""

    def __init__(self, path: Path, *, feature_dim: int, config: Mapping[str, Any]) -> None:
        """Read model.safetensors strictly.

        `feature_dim` is F, `config` a `StudentConfig` as config.json holds it. ArtifactDamagedError if the tensors are not
        those of such a student.
        """
        widths = [feature_dim, *config["hidden"], config["embed_dim"]]
        stride = 3 if config.get("dropout") else 2  # of the layers in `nn.Sequential`
        self._names = [f"mlp.{stride * layer}" for layer in range(len(widths) - 1)]
        shapes: dict[str, tuple[int, ...]] = {
            f"{name}.weight": (after, before) for name, (before, after) in zip(self._names, pairwise(widths), strict=True)
        }
        if config.get("linear_path", True):
            shapes["linear.weight"] = (config["embed_dim"], feature_dim)
        shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
        if config["input_norm"]:
            shapes["input_norm.weight"] = shapes["input_norm.bias"] = (feature_dim,)
        shapes["log_scale"] = shapes["bias"] = ()
        stored = load_file(path)
        found = {name: value.shape for name, value in stored.items()}
        if found != shapes:
            wrong = sorted(set(found.items()) ^ set(shapes.items()))
            raise ArtifactDamagedError(f"{path} is not the student that config.json describes: {wrong[:3]} differ.")
        self._weights = {name: value.astype(np.float32) for name, value in stored.items()}

    def embed(self, features: np.ndarray) -> np.ndarray:
        """(B, F) features of queries or training images -> (B, D) float32 unit embeddings.

        NonFiniteError for features that are not finite, or so large or small that an embedding is not.
        """
        head, values = self._weights, features.astype(np.float32)
        with np.errstate(all="ignore"):  # what comes of it is looked at below
            if "input_norm.weight" in head:
                values = layer_norm(values, head, "input_norm")
            hidden = values
            for name in self._names[:-1]:
                hidden = np.maximum(linear(hidden, head, name), 0)
            embedded = linear(hidden, head, self._names[-1])
            if "linear.weight" in head:
                embedded = embedded + linear(values, head, "linear")
            lengths = np.linalg.norm(embedded.astype(np.float64), axis=1, keepdims=True)
        bad = np.flatnonzero(~np.isfinite(lengths[:, 0]) | (lengths[:, 0] == 0))
        if len(bad):
            largest = np.abs(features[bad[0]]).max()
            found = (
                f"features of row {bad[0]} (largest {largest:.3g}) give no finite embedding, nor do {len(bad) - 1} other rows"
            )
            raise NonFiniteError(f"{found}; give features as the encoders make them: finite, of length about 1.")
        return (embedded / lengths).astype(np.float32)

    def closeness(self, similarity: np.ndarray) -> np.ndarray:
        """The student's estimate, 0 to 1, of how near similarities of any shape are to the top of the teacher's ranking."""
        logits = np.exp(self._weights["log_scale"].astype(np.float64)) * similarity + self._weights["bias"]
        return 1 / (1 + np.exp(-logits))
