"""Gradient features: what an image's denoising loss asks of the unlearned layers, compressed to one short row an image.

With EKFAC whitening and its leading coordinates kept, the inner product of a query's row and a training image's row is the
first-order teacher's score up to the query's factor: a store of rows serves every later query without another pass over
the corpus. Without whitening, sketched, and with a ridge kernel they are the projected gradients of TRAK
(`output='loss'`, arXiv:2303.14186) and of D-TRAK (`output='squared_norm'`, arXiv:2311.00500).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from fastattr.core.errors import InputError
from fastattr.generators.generator import Generator
from fastattr.generators.layers import Layer
from fastattr.gradients.ekfac import Factors
from fastattr.gradients.encoded import EncodedImages
from fastattr.gradients.losses import denoising_losses, require_finite
from fastattr.gradients.recording import example_gradients, record_layers

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
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.output not in {"loss", "squared_norm"}:
            raise InputError(f"output must be 'loss' or 'squared_norm', got {self.output!r}")
        if self.width < 0 or min(self.draws, self.batch_size) < 1:
            raise InputError("width must not be negative; draws and batch_size must be at least 1")
        if self.damping <= 0:
            raise InputError(f"damping must be positive, got {self.damping}")


class Compression:
    """Per-layer gradients to (B, k): whitened in the EKFAC eigenbasis if asked, then cut to some coordinates or count-sketched.

    In the eigenbasis few coordinates carry most of a gradient, so keeping those serves better than sketching all. A count
    sketch adds each coordinate, with a random sign, to one of k numbers: inner products stay right in expectation, at a cost
    of one addition a coordinate. Source of the sketch: arXiv:1306.4672.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        config: GradientConfig,
        factors: Factors | None = None,
        coordinates: np.ndarray | None = None,
    ) -> None:
        """Prepare rotation and sketch; the same for the same arguments.

        Args:
            layers: whose gradients come, in this order.
            config: the settings.
            factors: EKFAC factors of these layers; needed where `config.whiten`.
            coordinates: (k,) those to keep, as `leading_coordinates` finds them; without them all are sketched.

        Raises:
            InputError: whitening was asked for and there are no factors.
        """
        if config.whiten and factors is None:
            raise InputError("whitened gradient features need EKFAC factors; fit them first, or set whiten to false.")
        self._rotations = {}
        if config.whiten and factors is not None:
            for name, layer in layers.items():
                eigenvalues = factors.eigenvalues[name]
                scale = (eigenvalues + config.damping * eigenvalues.mean()).rsqrt()
                left, right = factors.gradient_eigenvectors[name], factors.activation_eigenvectors[name]
                self._rotations[name] = (left.to(layer.weight), right.to(layer.weight), scale.to(layer.weight))
        size = sum(layer.weight.numel() for layer in layers.values())
        device = next(iter(layers.values())).weight.device
        self._coordinates = None if coordinates is None else torch.from_numpy(coordinates).to(device)
        self.width = size if not config.width else config.width if coordinates is None else len(coordinates)
        self._sketched = bool(config.width) and coordinates is None
        if self._sketched:
            rng = np.random.default_rng([config.seed, 11])
            self._buckets = torch.from_numpy(rng.integers(0, self.width, size)).to(device)
            self._signs = torch.from_numpy(rng.choice(np.array([-1, 1], dtype=np.float32), size)).to(device)

    def __call__(self, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(B, out, in) gradients by layer -> (B, k)."""
        return self._shortened({name: self._rotated(name, gradient, 1) for name, gradient in gradients.items()})

    def of_step(self, step: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(k,) from the (out, in) changes by layer: its inner product with a compressed gradient is gradient times change."""
        rotated = {name: self._rotated(name, change.unsqueeze(0), -1) for name, change in step.items()}
        return self._shortened(rotated)[0]

    def _shortened(self, rotated: Mapping[str, torch.Tensor]) -> torch.Tensor:
        flat = torch.cat([values.flatten(1) for values in rotated.values()], dim=1)
        if self._coordinates is not None:
            return flat[:, self._coordinates]
        if not self._sketched:
            return flat
        sketch = flat.new_zeros(len(flat), self.width)
        return sketch.index_add_(1, self._buckets, flat * self._signs.to(flat.dtype))

    def _rotated(self, name: str, values: torch.Tensor, power: int) -> torch.Tensor:
        """Into the EKFAC eigenbasis, where whitening is a factor a coordinate; that factor to `power`."""
        if name not in self._rotations:
            return values
        left, right, scale = self._rotations[name]
        rotated: torch.Tensor = (left.T @ values @ right) * scale**power
        return rotated


def gradient_features(
    generator: Generator,
    layers: Mapping[str, Layer],
    images: EncodedImages,
    rows: np.ndarray,
    compression: Compression,
    config: GradientConfig,
) -> np.ndarray:
    """(C, k) float32: the compressed gradient of each image's mean output over its draws.

    Args:
        generator: with base weights.
        layers: whose gradients are taken; their weights must require gradients.
        images: encoded images, of the corpus or queries.
        rows: (C,) which of them.
        compression: of the same layers.
        config: the settings.
    """
    features = torch.zeros(len(rows) * images.views, compression.width)
    batches = denoising_losses(
        generator,
        images,
        rows,
        draws=config.draws,
        batch_size=config.batch_size,
        seed=config.seed,
        output=config.output,
    )
    with record_layers(layers) as recorded:
        for positions, losses in batches:
            losses.sum().backward()
            compressed = compression({name: example_gradients(recorded[name]) for name in layers})
            features.index_add_(0, torch.from_numpy(positions), compressed.float().cpu())
            for calls in recorded.values():
                calls.clear()
    for layer in layers.values():
        layer.weight.grad = None
    mean: np.ndarray = features.reshape(len(rows), images.views, -1).mean(dim=1).numpy()
    require_finite(mean, images, rows, "gradient")
    return mean


def leading_coordinates(
    generator: Generator, layers: Mapping[str, Layer], images: EncodedImages, factors: Factors, config: GradientConfig
) -> np.ndarray:
    """(k,) coordinates, of all layers' whitened gradients side by side, with the largest mean square over a sample of images.

    Args:
        generator: with base weights.
        layers: whose gradients are taken; their weights must require gradients.
        images: the encoded corpus.
        factors: EKFAC factors of the layers.
        config: the settings; k is its width, or all coordinates if they are fewer.
    """
    whole = replace(config, width=0)
    compression = Compression(layers, whole, factors)
    rows = np.unique(np.linspace(0, len(images.image_ids) - 1, SAMPLE_ROWS).astype(np.int64))
    energy = np.zeros(compression.width)
    for start in range(0, len(rows), SCALE_ROWS):
        features = gradient_features(generator, layers, images, rows[start : start + SCALE_ROWS], compression, whole)
        energy += np.square(features, dtype=np.float64).sum(axis=0)
    return np.sort(np.argsort(-energy, kind="stable")[: config.width])
