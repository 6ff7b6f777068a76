"""Unlearning: the natural-gradient step that makes the generator forget a query, and the scores that it gives.

Exactly: every candidate's loss is measured again after the step (AbU+, arXiv:2511.10721, sec. 3; where we differ:
docs/differences.md). To first order (ours): a training image's loss changes by the inner product of its mean loss gradient
    with
the step. The queries' steps are rows of a matrix; the corpus passes by once, each image's gradient is contracted with all
    steps
and forgotten. As the step shrinks, the exact score divided by the step's length converges to that.

A better inverse than EKFAC's, which takes layers to be independent: (c G + D) x = g is solved by conjugate gradients with G
the Gauss-Newton matrix of the mean training loss on a batch, D the damping that EKFAC adds to each layer, and c the factor by
which EKFAC's curvature and G agree along EKFAC's own solution, which is the start; EKFAC is the preconditioner. For a squared
error averaged over d outputs G v is the mean over examples of (2 / d) J^T (J v): a forward-mode derivative and a backward
pass. Source: arXiv:2507.14740 (ASTRA).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastattr.core.errors import InputError, NonFiniteError
from fastattr.generators.families import Conditioning, Layers
from fastattr.generators.generator import Generator
from fastattr.generators.schedules import noise_for
from fastattr.gradients.ekfac import Factors, example_gradients
from fastattr.gradients.losses import EncodedImages, denoising_losses, image_losses, recorded_losses, require_finite
from fastattr.teachers.config import TeacherConfig

Weights = Mapping[str, Tensor]
"""(out, in) numbers by layer."""


class GaussNewton:
    """The Gauss-Newton matrix of the mean denoising loss over random (image, timestep, noise) triples, by its products."""

    def __init__(
        self, generator: Generator, layers: Layers, images: EncodedImages, *, examples: int, batch_size: int, seed: int
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
        given: tuple[Any, ...] = (latents, conditioning, self._timesteps[part], noise.to(latents.dtype))
        return generator.predict(*(each.to(generator.device) for each in given))


@contextmanager
def _varied(layers: Layers, direction: Weights) -> Iterator[None]:
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

        def product(vector: Tensor) -> Tensor:
            return factor * curved(vector) + diagonal * vector

        image = factor * along + diagonal * start
        solution = conjugate_gradients(product, precondition, target, start=start, image=image, steps=steps)
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


def query_gradient(
    generator: Generator, layers: Layers, latent: Tensor, conditioning: Conditioning, *, query_id: str, **drawn: Any
) -> tuple[dict[str, Tensor], float]:
    """(out, in) mean gradient of the query's denoising loss by layer (a convolution's as `weight_shape`), and the mean loss.

    The generator has base weights, the layers' weights require gradients; `latent` is (1, L, h, w), `conditioning` of one
    prompt. `query_id` fixes the noise, together with draw number and seed; `drawn` is as of `denoising_losses`. NonFiniteError
    names a layer whose gradient is missing or not finite.
    """
    query, total = EncodedImages([query_id], latent[None], conditioning, np.arange(2)), 0.0
    for layer in layers.values():
        layer.weight.grad = None
    for _, losses in denoising_losses(generator, query, np.array([0]), **drawn):
        losses.sum().backward()
        total += float(losses.detach().double().sum())
    gradients = {}
    for name, layer in layers.items():
        gradient = layer.weight.grad
        if gradient is None or not torch.isfinite(gradient).all():
            raise NonFiniteError(f"the gradient of layer {name} for query {query_id} is missing or not finite.")
        gradients[name] = gradient.flatten(1).clone()
        layer.weight.grad = None
    return gradients, total


def unlearning_step(
    gradients: Weights, natural: Weights, *, loss: float, rise: float, step_size: float | None
) -> tuple[dict[str, Tensor], float]:
    """The change of weights that unlearns a query: uphill in its loss, along the natural gradient.

    `gradients` are (out, in) of the query's loss, by layer, `natural` the same, preconditioned by the curvature. The step
    should raise the loss by the part `rise` of itself, to first order; `step_size` is a fixed factor instead. Returns (out,
    in) change by layer, and the relative rise that it gives to first order. NonFiniteError if there is no way up: the gradient
    is zero or not finite.
    """
    slope = sum(float((gradients[name].double() * natural[name].double()).sum()) for name in gradients)
    if not slope > 0:
        raise NonFiniteError(f"the query's loss {loss:.4g} has the slope {slope:.4g} along its natural gradient, not above 0.")
    factor = rise * loss / slope if step_size is None else step_size
    return {name: factor * value for name, value in natural.items()}, factor * slope / loss


@contextmanager
def unlearned(layers: Layers, step: Weights) -> Iterator[None]:
    """Weights changed by a step while open; restored bit for bit at the end, whatever happened inside."""
    kept = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight += step[name].view(layer.weight.shape)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(kept[name])


def influence_scores(base_loss: np.ndarray, unlearned_loss: np.ndarray) -> np.ndarray:
    """Score each candidate by how much unlearning the query hurt it.

    Both (C, V) losses are of each view, mean squared error per latent element, with the same noise draws; InputError if the
    shapes differ. Returns (C,) in the unit of the losses; of two views (image and mirror image) the larger rise counts. Higher
    is more influential; values may be negative.
    """
    if base_loss.shape != unlearned_loss.shape or base_loss.ndim != 2:
        raise InputError(f"losses must share one (C, V) shape, got {base_loss.shape} and {unlearned_loss.shape}")
    return (unlearned_loss - base_loss).max(axis=1)  # positive where unlearning the query hurt


def exact_scores(
    generator: Generator,
    layers: Layers,
    images: EncodedImages,
    base_loss: np.ndarray,
    step: Weights,
    *,
    candidate_rows: np.ndarray,
    config: TeacherConfig,
) -> np.ndarray:
    """(C,) influence of each candidate on the query that a step unlearns; higher = more influential.

    The generator has base weights, again on return; `candidate_rows` (C,) says which of the images; `base_loss` (N, V) are
    losses of the whole corpus before unlearning; `step` is (out, in) change by layer, as `query_step` gives it.
    """

    def losses() -> np.ndarray:
        return image_losses(generator, images, candidate_rows, **config.measured)

    base = base_loss[candidate_rows]
    with unlearned(layers, step):
        after = losses()
    if config.symmetric:  # half the difference between the two sides, around the loss before
        with unlearned(layers, {name: -change for name, change in step.items()}):
            after = base + (after - losses()) / 2
    return influence_scores(base, after)


def query_step(
    generator: Generator,
    layers: Layers,
    factors: Factors,
    *,
    latent: Tensor,
    prompt: str,
    query_id: str,
    config: TeacherConfig,
    matrix: GaussNewton | None = None,
) -> tuple[dict[str, Tensor], float]:
    """The change of weights that unlearns a query, by layer, and how much it raises the query's loss to first order.

    `matrix` is needed where `config.inverse_steps` is not 0; the other arguments are those of `query_gradient`.
    """
    conditioning = generator.encode_prompt([prompt])
    total = {name: torch.zeros_like(layer.weight).flatten(1) for name, layer in layers.items()}
    total_rise = 0.0
    drawn = {**config.measured, "draws": config.query_draws, "antithetic": config.antithetic}
    for _ in range(config.unlearning_steps):
        with unlearned(layers, total):
            gradients, loss = query_gradient(generator, layers, latent, conditioning, query_id=query_id, **drawn)
            natural = (
                factors.precondition(gradients, damping=config.damping)
                if matrix is None
                else refined_inverse(gradients, factors, matrix, damping=config.damping, steps=config.inverse_steps)
            )
        wanted = config.query_loss_rise / config.unlearning_steps
        step, rise = unlearning_step(gradients, natural, loss=loss, rise=wanted, step_size=config.step_size)
        total = {name: total[name] + change for name, change in step.items()}
        total_rise += rise
    return total, total_rise


def flat_step(step: Weights, layers: Sequence[str]) -> np.ndarray:
    """(P,) the changes of all layers, in the order of `layers`."""
    return torch.cat([step[name].detach().flatten() for name in layers]).cpu().numpy()


def linearised_scores(
    generator: Generator, layers: Layers, images: EncodedImages, rows: np.ndarray, steps: Tensor, **drawn: Any
) -> np.ndarray:
    """(Q, C) float64 first-order loss change of training images under each query's step; higher = more influential.

    The generator has base weights; weights of the layers that the steps change must require gradients. `rows` (C,) says which
    of the images; of two views the larger change counts. `steps` (Q, P) are changes of weights by query, as `flat_step` has
    them; `drawn` is as of `image_losses` in the exact teacher. NonFiniteError names an image whose score is NaN or infinite.
    """
    scores = torch.zeros(len(rows) * images.views, len(steps), dtype=torch.float64)
    steps = steps.to(generator.device)
    for positions, _, recorded in recorded_losses(generator, layers, images, rows, **drawn):
        gradients = torch.cat([example_gradients(recorded[name], len(positions)).flatten(1) for name in layers], dim=1)
        scores.index_add_(0, torch.from_numpy(positions), (gradients @ steps.T).double().cpu())
    largest = scores.reshape(len(rows), images.views, len(steps)).amax(dim=1).numpy()
    require_finite(largest, images, rows, "first-order score")
    return largest.T
