"""A better inverse than EKFAC's: conjugate gradients on the Gauss-Newton matrix of the denoising loss.

EKFAC takes layers to be independent, and inputs independent of output gradients. Here (c G + D) x = g is solved with G the
Gauss-Newton matrix of the mean training loss on a batch, D the damping that EKFAC adds to each layer, and c the factor by
which EKFAC's curvature and G agree along EKFAC's own solution. That solution is the start, and EKFAC the preconditioner. For
a squared error averaged over d outputs G v is the mean over examples of (2 / d) J^T (J v): a forward-mode derivative and
a backward pass. Source: arXiv:2507.14740 (ASTRA).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastattr.core.errors import NonFiniteError
from fastattr.generators.families import Layer
from fastattr.generators.generator import Generator
from fastattr.generators.schedules import noise_for
from fastattr.gradients.ekfac import Factors
from fastattr.gradients.losses import EncodedImages

Weights = Mapping[str, Tensor]
"""(out, in) numbers by layer."""


class GaussNewton:
    """The Gauss-Newton matrix of the mean denoising loss over random (image, timestep, noise) triples, by its products."""

    def __init__(
        self,
        generator: Generator,
        layers: Mapping[str, Layer],
        images: EncodedImages,
        *,
        examples: int,
        batch_size: int,
        seed: int,
    ) -> None:
        """Choose the triples of an encoded corpus; `batch_size` of them are computed at once, which changes no product."""
        self._generator, self._layers, self._images = generator, layers, images
        self._batch_size, self._seed = batch_size, seed
        rng = np.random.default_rng([seed, 13])
        self._rows = rng.integers(0, len(images.image_ids), examples)
        self._timesteps = torch.from_numpy(rng.integers(0, generator.train_timesteps, examples))

    def product(self, direction: Weights) -> dict[str, Tensor]:
        """G times a change of weights, (out, in) by layer."""
        total = {name: torch.zeros_like(value) for name, value in direction.items()}
        weights = [layer.weight for layer in self._layers.values()]
        for start in range(0, len(self._rows), self._batch_size):
            # The plain form of attention alone has a forward-mode derivative on a CPU.
            with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), _varied(self._layers, direction):
                prediction, change = forward_ad.unpack_dual(self.predicted(slice(start, start + self._batch_size)))
                outputs = change.detach() * (2 / (prediction[0].numel() * len(self._rows)))
            for name, gradient in zip(total, torch.autograd.grad(prediction, weights, outputs), strict=True):
                total[name] += gradient.flatten(1)
        return total

    def predicted(self, part: slice) -> Tensor:
        """(B, L, h, w) predictions for some of the triples."""
        generator, images, rows = self._generator, self._images, self._rows[part]
        ids = [f"curvature/{number}" for number in range(len(self._rows))[part]]
        noise = noise_for(ids, [0] * len(rows), seed=self._seed, shape=generator.latent_shape)
        latents, conditioning = images.latents[rows, 0], images.conditioning[images.first_caption[rows]]
        device, timesteps = generator.device, self._timesteps[part]
        return generator.predict(
            latents.to(device), conditioning.to(device), timesteps.to(device), noise.to(device, latents.dtype)
        )


@contextmanager
def _varied(layers: Mapping[str, Layer], direction: Weights) -> Iterator[None]:
    """While open, each weight carries a tangent, so that what is computed with it has a forward-mode derivative."""
    kept = {name: layer._parameters["weight"] for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            tangent = direction[name].view(layer.weight.shape).to(layer.weight)
            layer._parameters["weight"] = forward_ad.make_dual(layer.weight, tangent)
        yield
    finally:
        for name, layer in layers.items():
            layer._parameters["weight"] = kept[name]


def refined_inverse(
    gradients: Weights, factors: Factors, matrix: GaussNewton, *, damping: float, steps: int
) -> dict[str, Tensor]:
    """A query's (out, in) natural gradient by layer, some steps of conjugate gradients beyond EKFAC's.

    `gradients` are the query's, `factors` of the same layers, `matrix` is G, `damping` a fraction of each layer's mean
    eigenvalue; 0 steps give EKFAC's own. NonFiniteError if G has no curvature along EKFAC's solution.
    """
    numbers = [value.numel() for value in gradients.values()]

    def flat(weights: Weights) -> Tensor:
        return torch.cat([weights[name].double().flatten() for name in gradients])

    def unflat(vector: Tensor) -> dict[str, Tensor]:
        parts = zip(gradients.items(), vector.split(numbers), strict=True)
        return {name: part.view(value.shape) for (name, value), part in parts}

    def precondition(vector: Tensor) -> Tensor:
        return flat(factors.precondition(unflat(vector), damping=damping))

    def curved(vector: Tensor) -> Tensor:
        return counted * flat(matrix.product(unflat(vector)))

    target = flat(gradients)
    start = solution = precondition(target)
    if steps:
        heard = {name: torch.isfinite(factors.damped(name, damping)).all() for name in gradients}
        counted = flat({name: torch.full_like(value, float(heard[name])) for name, value in gradients.items()})
        added = {name: damping * float(factors.eigenvalues[name].mean()) for name in gradients}
        diagonal = counted * flat({name: torch.full_like(value, added[name]) for name, value in gradients.items()})
        target, along = counted * target, curved(start)
        if not float(start @ along) > 0:
            raise NonFiniteError(f"the Gauss-Newton matrix has the curvature {float(start @ along):.4g} along a query's step.")
        factor = float(start @ (target - diagonal * start)) / float(start @ along)
        solution = conjugate_gradients(
            lambda vector: factor * curved(vector) + diagonal * vector,
            precondition,
            target,
            start=start,
            image=factor * along + diagonal * start,
            steps=steps,
        )
    return {name: value.to(gradients[name].dtype) for name, value in unflat(solution).items()}


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    target: Tensor,
    *,
    start: Tensor,
    image: Tensor,
    steps: int,
) -> Tensor:
    """(P,) x near the solution of A x = target, A and its rough inverse symmetric and positive.

    `product` is v -> A v, of which `steps` are spent, `precondition` v -> near A^-1 v, `start` the first x, and `image` A
    start.
    """
    solution, residual = start, target - image
    turned = precondition(residual)
    direction, size = turned, residual @ turned
    for _ in range(steps):
        if not size > 0:
            break  # solved
        moved = product(direction)
        length = size / (direction @ moved)
        solution = solution + length * direction
        residual = residual - length * moved
        turned = precondition(residual)
        grown = residual @ turned
        direction, size = turned + (grown / size) * direction, grown
    return solution
