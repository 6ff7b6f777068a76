"""The better inverse: products are those of the dense Gauss-Newton matrix, and conjugate gradients end at its solution."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastattr.corpus.store import Corpus
from fastattr.generators.generator import Generator
from fastattr.gradients.ekfac import fit_ekfac
from fastattr.gradients.losses import encode_corpus
from fastattr.teachers.config import TeacherConfig
from fastattr.teachers.task import factor_batches, layers_to_unlearn
from fastattr.teachers.unlearning import GaussNewton, conjugate_gradients, refined_inverse

PATTERN = r"mid_block.*attn1\.to_[qk]$"
"""Two layers of self-attention, whose derivative goes through the attention itself."""


@pytest.fixture(scope="module")
def setting(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory):
    generator = Generator.from_pretrained(tiny_run / "generator", dtype=torch.float64)
    single = encode_corpus(generator, Corpus(tiny_run / "corpus"), batch_size=16, folder=tmp_path_factory.mktemp("encoded"))
    images = replace(single, latents=single.latents.double(), conditioning=single.conditioning.to(torch.float64))
    layers = layers_to_unlearn(generator, PATTERN)
    factors = fit_ekfac(layers, factor_batches(generator, images, TeacherConfig(factor_examples=32, batch_size=16)))
    return generator, images, layers, factors


def random_weights(layers, seed: int):
    rng = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(layer.weight.shape, dtype=torch.float64, generator=rng).flatten(1) for name, layer in layers.items()
    }


def dot(one, other) -> float:
    return sum(float((one[name] * other[name]).sum()) for name in one)


def test_products_are_those_of_differences_of_predictions(setting):
    """U G v is the mean inner product of what u and v do to the prediction, times 2 / d; a sum for a mean changes the scale."""
    generator, images, layers, _ = setting
    matrix = GaussNewton(generator, layers, images, examples=5, batch_size=2, seed=3)
    one, other = random_weights(layers, 1), random_weights(layers, 2)

    @torch.no_grad()
    def change(direction) -> torch.Tensor:
        sides = []
        for sign in (-1, 1):
            for name, layer in layers.items():
                layer.weight += sign * 1e-5 * direction[name].view(layer.weight.shape)
            sides.append(torch.cat([matrix.predicted(slice(start, start + 2)) for start in range(0, 5, 2)]))
            for name, layer in layers.items():
                layer.weight -= sign * 1e-5 * direction[name].view(layer.weight.shape)
        return (sides[1] - sides[0]) / 2e-5

    expected = float((change(one) * change(other)).sum()) * 2 / (5 * np.prod(generator.latent_shape))
    assert dot(one, matrix.product(other)) == pytest.approx(expected, rel=1e-4)
    assert dot(other, matrix.product(one)) == pytest.approx(expected, rel=1e-4)
    assert all(layer.weight.grad is None for layer in layers.values())
    assert all(isinstance(layer.weight, torch.nn.Parameter) for layer in layers.values())


def test_conjugate_gradients_solve_in_as_many_steps_as_there_are_dimensions():
    """A wrong sign or a stale direction still converges, only slowly."""
    rng = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64, generator=rng)
    matrix, target = root @ root.T + torch.eye(6), torch.randn(6, dtype=torch.float64, generator=rng)
    rough = matrix.diagonal()
    start = target / rough
    errors = []
    for steps in (0, 3, 6):
        found = conjugate_gradients(
            lambda vector: matrix @ vector,
            lambda vector: vector / rough,
            target,
            start=start,
            image=matrix @ start,
            steps=steps,
        )
        errors.append(float((found - torch.linalg.solve(matrix, target)).norm()))
    assert errors[2] < 1e-9 < errors[1] < errors[0]


def test_steps_lower_the_residual_of_the_damped_system(setting):
    """Refinement that ends further from the solution than EKFAC would be worse than none."""
    generator, images, layers, factors = setting
    matrix = GaussNewton(generator, layers, images, examples=8, batch_size=4, seed=0)
    query = random_weights(layers, 5)
    start = factors.precondition(query, damping=0.1)
    unchanged = refined_inverse(query, factors, matrix, damping=0.1, steps=0)
    for name in query:
        torch.testing.assert_close(unchanged[name], start[name])
    along, added = matrix.product(start), {name: 0.1 * float(factors.eigenvalues[name].mean()) for name in query}
    factor = (dot(start, query) - sum(added[name] * float(start[name].square().sum()) for name in query)) / dot(start, along)

    def residual(solution) -> float:
        curved = matrix.product(solution)
        left = {name: factor * curved[name] + added[name] * solution[name] - query[name] for name in query}
        natural = factors.precondition(left, damping=0.1)
        return dot(left, natural)

    sizes = [residual(refined_inverse(query, factors, matrix, damping=0.1, steps=steps)) for steps in (0, 3, 12)]
    assert sizes[2] < 0.5 * sizes[0]
    assert sizes[1] < sizes[0]
