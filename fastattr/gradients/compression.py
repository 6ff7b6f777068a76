"""Gradient features: what an image's denoising loss asks of the unlearned layers, compressed to one short row an image.

With EKFAC whitening and its leading coordinates kept, the inner product of a query's row and a training image's row is the
first-order teacher's score up to the query's factor: a store of rows serves every later query without another pass over
the corpus. Without whitening, sketched, and with a ridge kernel they are the projected gradients of TRAK
(`output='loss'`, arXiv:2303.14186) and of D-TRAK (`output='squared_norm'`, arXiv:2311.00500).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from fastattr.core.errors import InputError
from fastattr.core.settings import at_least
from fastattr.generators.families import Layers, weight_shape
from fastattr.generators.generator import Generator
from fastattr.gradients.ekfac import Calls, Factors, example_gradients, rotated_gradients
from fastattr.gradients.losses import OUTPUTS, EncodedImages, recorded_losses, require_finite

SCALE_ROWS = 16
"""Images that set the scale at which features are stored."""
SAMPLE_ROWS = 256
"""Images, spread over the corpus, that tell which coordinates lead."""


@dataclass(frozen=True, kw_only=True)
class GradientConfig:
    """Settings of gradient features."""

    output: str = "loss"
    """What is differentiated: 'loss' (unlearning, TRAK) or 'squared_norm' of the network's output (D-TRAK)."""
    whiten: bool = True
    """Whether gradients are multiplied with the inverse root of the damped EKFAC curvature."""
    damping: float = 0.1
    """As the teacher's; used where `whiten`."""
    width: int = 4096
    """k, numbers an image; 0 keeps every coordinate."""
    draws: int = 4
    """(timestep, noise) pairs an image."""
    antithetic: bool = False
    """Take draws in pairs of opposite noise at one timestep."""
    span: tuple[float, float] = (0.0, 1.0)
    """The part of the noise schedule, from little noise to much, that timesteps are spread over."""
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.output not in OUTPUTS:
            raise InputError(f"output must be one of {', '.join(OUTPUTS)}, got {self.output!r}")
        if not 0 <= self.span[0] < self.span[1] <= 1:
            raise InputError(f"span must be a part of the schedule from 0 to 1, got {self.span}")
        at_least(self, 1, "draws", "batch_size")
        at_least(self, 0, "width")
        if self.damping <= 0:
            raise InputError(f"damping must be positive, got {self.damping}")

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> GradientConfig:
        """From what a manifest says; what an older one does not name has its default."""
        known = {name: values[name] for name in vars(cls()) if name in values}
        return cls(**known | ({"span": tuple(known["span"])} if "span" in known else {}))

    @property
    def identity(self) -> dict[str, Any]:
        """The settings for a fingerprint: those that came later count only where they are set, so that old ones stay."""
        later = {"antithetic": False, "span": (0.0, 1.0)}
        return {name: value for name, value in vars(self).items() if later.get(name, self) != value}

    @property
    def drawn(self) -> dict[str, Any]:
        """The settings that `denoising_losses` takes."""
        return {name: getattr(self, name) for name in ("draws", "batch_size", "seed", "output", "antithetic", "span")}


@dataclass(frozen=True)
class Turn:
    """How one layer's gradients get into the eigenbasis, as far as coordinates of it are kept."""

    left: Tensor
    right: Tensor
    """(out, o) and (in, i) kept eigenvectors, of the output gradients and of the inputs."""
    scale: Tensor
    """(o, i) factors that whiten."""
    places: Tensor | None
    """(n,) kept coordinates in the flattened (o, i); None keeps all."""

    @property
    def width(self) -> int:
        """n, numbers kept of a gradient of this layer."""
        return self.scale.numel() if self.places is None else len(self.places)

    def picked(self, rotated: Tensor, power: int) -> Tensor:
        """(B, n) of (B, o, i), multiplied by the factors, or divided by them where `power` is -1."""
        flat = (rotated * torch.where(self.scale > 0, self.scale**power, 0.0)).flatten(1)
        return flat if self.places is None else flat[:, self.places]


class Compression:
    """Per-layer gradients to (B, k): whitened in the EKFAC eigenbasis and cut to some coordinates, or count-sketched.

    A count sketch adds each coordinate, with a random sign, to one of k numbers: inner products stay right in expectation.
    Source of the sketch: arXiv:1306.4672.
    """

    def __init__(
        self,
        layers: Layers,
        config: GradientConfig,
        factors: Factors | None = None,
        coordinates: ndarray | None = None,
        *,
        turns: Mapping[str, Turn] | None = None,
    ) -> None:
        """Prepare rotation and sketch; the same for the same arguments. Gradients come in the order of `layers`.

        `factors` are EKFAC's of these layers; InputError where `config.whiten` and there are none. `coordinates` (k,) are
        sorted numbers of the coordinates to keep, of all layers' side by side, as `leading_coordinates` finds them; without
        them all are sketched, or kept where `config.width` is 0. `turns`: how each layer is rotated and cut, as an earlier
        compression has it, instead of both.
        """
        if config.whiten and factors is None and turns is None:
            raise InputError("whitened gradient features need EKFAC factors; fit them first, or set whiten to false.")
        self._names = list(layers)
        self.turns: Mapping[str, Turn] = turns or {}
        if config.whiten and factors is not None:
            self.turns = _turns(layers, config, factors, coordinates)
        size = sum(layer.weight.numel() for layer in layers.values())
        kept = sum(turn.width for turn in turns.values()) if turns else None if coordinates is None else len(coordinates)
        self.width = (config.width or size) if kept is None else kept
        self._sketched = bool(config.width) and kept is None
        if self._sketched:
            device = next(iter(layers.values())).weight.device
            rng = np.random.default_rng([config.seed, 11])
            self._buckets = torch.from_numpy(rng.integers(0, self.width, size)).to(device)
            self._signs = torch.from_numpy(rng.choice(np.array([-1, 1], dtype=np.float32), size)).to(device)

    def of_records(self, recorded: Mapping[str, Calls], groups: int) -> Tensor:
        """(groups, k) from what `record_layers` recorded; each row is of the sum over a group of consecutive examples."""
        if not self.turns:
            return self._short([example_gradients(recorded[name], groups).flatten(1) for name in self._names])
        rotated = (
            (turn, rotated_gradients(recorded[name], groups, turn.left, turn.right)) for name, turn in self.turns.items()
        )
        return self._short([turn.picked(gradients, 1) for turn, gradients in rotated])

    def __call__(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """(B, out, in) gradients by layer -> (B, k)."""
        return self._of_matrices(gradients, 1)

    def of_step(self, step: Mapping[str, Tensor]) -> Tensor:
        """(k,) from the (out, in) changes by layer: its inner product with a compressed gradient is gradient times change."""
        return self._of_matrices({name: change.unsqueeze(0) for name, change in step.items()}, -1)[0]

    def _of_matrices(self, matrices: Mapping[str, Tensor], power: int) -> Tensor:
        if not self.turns:
            return self._short([matrices[name].flatten(1) for name in self._names])
        kept = self.turns.items()
        return self._short([turn.picked(turn.left.T @ matrices[name] @ turn.right, power) for name, turn in kept])

    def _short(self, parts: Sequence[Tensor]) -> Tensor:
        """(B, k) of all layers side by side, which are cut already where they are rotated."""
        flat = torch.cat(list(parts), dim=1)
        if not self._sketched:
            return flat
        return flat.new_zeros(len(flat), self.width).index_add_(1, self._buckets, flat * self._signs.to(flat.dtype))


def _turns(layers: Layers, config: GradientConfig, factors: Factors, coordinates: ndarray | None) -> dict[str, Turn]:
    """The rotation of each layer of which coordinates are kept; eigenvectors that no kept coordinate needs are left out."""
    turns, start = {}, 0
    for name, layer in layers.items():
        outer, inner = weight_shape(layer)
        scale = factors.damped(name, config.damping).rsqrt()
        left, right = factors.gradient_eigenvectors[name], factors.activation_eigenvectors[name]
        places = None
        if coordinates is not None:
            first, last = np.searchsorted(coordinates, [start, start + outer * inner])
            own_left, own_right = np.divmod(coordinates[first:last] - start, inner)
            kept_left, left_places = np.unique(own_left, return_inverse=True)
            kept_right, right_places = np.unique(own_right, return_inverse=True)
            left, right, scale = left[:, kept_left], right[:, kept_right], scale[kept_left][:, kept_right]
            places = torch.from_numpy(left_places * len(kept_right) + right_places).to(layer.weight.device)
        start += outer * inner
        if places is None or len(places):
            turns[name] = Turn(left.to(layer.weight), right.to(layer.weight), scale.to(layer.weight), places)
    return turns


def gradient_features(
    generator: Generator, layers: Layers, images: EncodedImages, rows: ndarray, compression: Compression, config: GradientConfig
) -> ndarray:
    """(C, k) float32: the compressed gradient of each image's mean output over its draws.

    All draws of an image are in one batch as far as `config.batch_size` allows, and are summed before anything is rotated. The
    generator has base weights; `images` are of the corpus or queries, `rows` (C,) says which of them; `compression` is of the
    same layers.

    Raises:
        NonFiniteError: a gradient is NaN or infinite; the image is named.
    """
    features = torch.zeros(len(rows) * images.views, compression.width)
    for positions, _, recorded in recorded_losses(generator, layers, images, rows, **config.drawn):
        compressed = compression.of_records(recorded, len(positions))
        features.index_add_(0, torch.from_numpy(positions), compressed.float().cpu())
    mean: ndarray = features.reshape(len(rows), images.views, -1).mean(dim=1).numpy()
    require_finite(mean, images, rows, "gradient")
    return mean


def gradients_of_draws(
    generator: Generator, layers: Layers, images: EncodedImages, row: int, compression: Compression, config: GradientConfig
) -> ndarray:
    """(L, k) float32: what each of L draws x captions adds to `gradient_features` of one image, which are their mean."""
    passes = recorded_losses(generator, layers, images, np.array([row]), **config.drawn)
    every = torch.cat([compression.of_records(recorded, count).float().cpu() for _, count, recorded in passes])
    each: ndarray = (every * len(every)).numpy()
    require_finite(each[None], images, np.array([row]), "gradient")
    return each


def leading_coordinates(
    generator: Generator, layers: Layers, images: EncodedImages, factors: Factors, config: GradientConfig
) -> ndarray:
    """(k,) coordinates, of all layers' whitened gradients side by side, with the largest mean square over a sample of images.

    Each layer keeps the same part of its numbers: on emoji-bench that orders images by 0.79 as whole gradients do at 16,384
    numbers, the leading ones of all layers by 0.67 and a sketch by 0.73 (docs/teacher.md). k is the width of the settings, or
    all coordinates if they are fewer.
    """
    whole = replace(config, width=0)
    compression = Compression(layers, whole, factors)
    rows = np.unique(np.linspace(0, len(images.image_ids) - 1, SAMPLE_ROWS).astype(np.int64))
    energy = np.zeros(compression.width)
    for start in range(0, len(rows), SCALE_ROWS):
        features = gradient_features(generator, layers, images, rows[start : start + SCALE_ROWS], compression, whole)
        energy += np.square(features, dtype=np.float64).sum(axis=0)
    ends = np.cumsum([layer.weight.numel() for layer in layers.values()])
    counts = np.diff(np.round(min(config.width, ends[-1]) * ends / ends[-1]).astype(np.int64), prepend=0)
    parts = zip(np.split(energy, ends[:-1]), ends - np.diff(ends, prepend=0), counts, strict=True)
    kept = [start + np.argsort(-part, kind="stable")[:count] for part, start, count in parts]
    return np.sort(np.concatenate(kept))


@dataclass(frozen=True)
class RidgeKernel:
    """What makes inner products of gradient features TRAK's and D-TRAK's kernel scores, up to one factor for all of them.

    With Phi (n, k) the features of a sample of training images, it multiplies with (Phi^T Phi + lambda I)^(-1/2) lambda^(1/2):
    along each of the sample's r directions with a number below 1, and elsewhere with 1.
    Source: arXiv:2303.14186, sec. 3.2, and arXiv:2311.00500 for the ridge.
    """

    directions: ndarray
    """(r, k) float32, orthonormal."""
    factors: ndarray
    """(r,) float32 in (0, 1)."""

    @classmethod
    def fit(cls, features: ndarray, *, ridge: float) -> RidgeKernel:
        """Of (n, k) features of the sample.

        `ridge` is lambda, as a fraction of the mean of those min(n, k) eigenvalues of Phi^T Phi that can be other than 0;
        InputError if it is not positive.
        """
        if ridge <= 0:
            raise InputError(f"ridge must be positive, got {ridge}")
        _, singular, directions = np.linalg.svd(features.astype(np.float64), full_matrices=False)
        level = ridge * float(np.mean(singular**2))
        factors = np.sqrt(level / (singular**2 + level))
        return cls(directions.astype(np.float32), factors.astype(np.float32))

    def __call__(self, features: ndarray) -> ndarray:
        """(B, k) -> (B, k) float32."""
        along = features @ self.directions.T
        return (features - (along * (1 - self.factors)) @ self.directions).astype(np.float32)
