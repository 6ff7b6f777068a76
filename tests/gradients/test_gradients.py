"""Gradient features and the baselines on them: the same scores as the linearised teacher, short rows, resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from fastattr.core.errors import InputError
from fastattr.corpus.store import Corpus
from fastattr.generators.families import CROSS_ATTENTION_KV, weight_shape
from fastattr.generators.generator import Generator
from fastattr.gradients.compression import (
    Compression,
    GradientConfig,
    gradient_features,
    gradients_of_draws,
    leading_coordinates,
)
from fastattr.gradients.ekfac import fit_ekfac
from fastattr.gradients.losses import denoising_losses, encode_corpus
from fastattr.teachers import task as module
from fastattr.teachers.config import TeacherConfig
from fastattr.teachers.kernels import kernel_scores, similarity_scores
from fastattr.teachers.task import factor_batches, layers_to_unlearn, write_gradient_features
from fastattr.teachers.unlearning import flat_step, linearised_scores

CONFIG = GradientConfig(width=0, draws=3, batch_size=16)


@pytest.fixture(scope="module")
def setting(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory):
    """A generator in double precision, since whitening multiplies tiny gradients with large numbers."""
    generator = Generator.from_pretrained(tiny_run / "generator", dtype=torch.float64)
    encoded = encode_corpus(generator, Corpus(tiny_run / "corpus"), batch_size=16, folder=tmp_path_factory.mktemp("encoded"))
    images = replace(encoded, latents=encoded.latents.double(), conditioning=encoded.conditioning.to(torch.float64))
    layers = layers_to_unlearn(generator, CROSS_ATTENTION_KV)
    factors = fit_ekfac(layers, factor_batches(generator, images, TeacherConfig(factor_examples=48, batch_size=16)))
    return generator, images, layers, factors


def features_of(setting, rows, config: GradientConfig) -> np.ndarray:
    generator, images, layers, factors = setting
    return gradient_features(generator, layers, images, np.array(rows), Compression(layers, config, factors), config)


def test_inner_products_are_the_linearised_teachers_scores(setting):
    """Another damping, layer order or rotation on one side would keep the shape and change every score."""
    generator, images, layers, factors = setting
    rows = np.array([3, 20, 41, 8])
    whitened = features_of(setting, rows, CONFIG)
    plain = features_of(setting, rows, replace(CONFIG, whiten=False))
    sizes = [layer.weight.numel() for layer in layers.values()]
    steps = []
    for row in plain:
        parts = torch.from_numpy(row).double().split(sizes)
        gradient = {name: part.reshape(layers[name].weight.shape) for name, part in zip(layers, parts, strict=True)}
        steps.append(flat_step(factors.precondition(gradient, damping=CONFIG.damping), list(layers)))
    expected = linearised_scores(
        generator, layers, images, rows, torch.from_numpy(np.stack(steps)), draws=3, batch_size=16, seed=0
    )
    np.testing.assert_allclose(whitened @ whitened.T, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_sketches_keep_inner_products_on_average(setting):
    """A bucket without its sign would add up what should cancel."""
    rows = [3, 20, 41, 8]
    exact = features_of(setting, rows, CONFIG).astype(np.float64)
    generator, _, layers, factors = setting
    products = []
    for seed in range(40):
        compression = Compression(layers, replace(CONFIG, width=64, seed=seed), factors)
        sizes = [layer.weight.shape for layer in layers.values()]
        assert compression.width == 64
        # The sketch is linear, so it may be taken of what is whitened already.
        compression.turns = {}
        parts = torch.from_numpy(exact).split([shape.numel() for shape in sizes], dim=1)
        sketch = compression({name: part.reshape(-1, *shape) for name, part, shape in zip(layers, parts, sizes, strict=True)})
        products.append((sketch @ sketch.T).numpy())
    mean, error = np.mean(products, axis=0), np.std(products, axis=0) / np.sqrt(len(products))
    assert np.all(np.abs(mean - exact @ exact.T) < 4 * error + 1e-9 * np.abs(mean).max())
    assert generator is not None


@pytest.mark.parametrize("output", ["loss", "squared_norm"])
def test_features_ignore_batching_and_company(setting, output: str):
    """A gradient that leaks into a neighbour's row would crash nothing."""
    config = replace(CONFIG, width=50, output=output)
    together = features_of(setting, [9, 2, 40, 31, 8], replace(config, batch_size=4))
    for position, row in enumerate((9, 2, 40, 31, 8)):
        alone = features_of(setting, [row], config)[0]
        np.testing.assert_allclose(together[position], alone, rtol=1e-4, atol=1e-6 * np.abs(alone).max())


def test_the_two_outputs_differ(setting):
    """D-TRAK is not TRAK under another name."""
    loss, norm = (
        features_of(setting, [5], replace(CONFIG, whiten=False, output=output)) for output in ("loss", "squared_norm")
    )
    assert np.abs(np.corrcoef(loss[0], norm[0])[0, 1]) < 0.99


def test_a_killed_store_finishes_with_the_same_rows(setting, tmp_path: Path, monkeypatch):
    """Weeks of gradients must survive a kill, and half precision must not lose small ones."""
    generator, images, layers, factors = setting
    config = replace(CONFIG, width=30)
    compression = Compression(layers, config, factors)
    monkeypatch.setattr(module, "PART_ROWS", 10)
    real, calls = module.gradient_features, []

    def dies_at_the_fourth(*args):
        calls.append(args[3])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "gradient_features", dies_at_the_fourth)
    settings = (generator, layers, images, compression, config, Accelerator())
    with pytest.raises(KeyboardInterrupt):
        write_gradient_features(tmp_path, *settings, inputs={"source": "corpus"})
    manifest = write_gradient_features(tmp_path, *settings, inputs={"source": "corpus"})
    assert manifest["bytes_per_image"] == 60
    assert len(calls) == 4 + 1 + 3  # each run looks at a sample for the scale; two parts of five were done before the kill
    stored = np.load(tmp_path / "features.npy")
    assert stored.dtype == np.float16
    assert {path.name for path in tmp_path.iterdir()} == {"features.npy", "ids.parquet", "manifest.json"}
    assert write_gradient_features(tmp_path, *settings, inputs={"source": "corpus"}) == manifest
    assert len(calls) == 8  # nothing was done again
    expected = real(generator, layers, images, np.arange(len(images.image_ids)), compression, config)
    np.testing.assert_allclose(stored / manifest["scale"], expected, rtol=2e-3, atol=1e-3 * np.abs(expected).max())


def test_leading_coordinates_are_those_of_most_energy(setting):
    """Coordinates of another order, or of unwhitened gradients, would be no better than chance."""
    generator, images, layers, factors = setting
    rows = np.arange(48)
    whole = features_of(setting, rows, CONFIG)
    config = replace(CONFIG, width=128)
    kept = leading_coordinates(generator, layers, images, factors, config)
    assert kept.shape == (128,)
    energy = np.square(whole.astype(np.float64)).sum(axis=0)
    start = 0
    for layer in layers.values():  # each layer keeps the same part of its numbers
        own = energy[start : start + layer.weight.numel()]
        chosen = kept[(kept >= start) & (kept < start + len(own))] - start
        assert len(chosen) == pytest.approx(128 * len(own) / len(energy), abs=1)
        assert own[chosen].sum() == pytest.approx(np.sort(own)[-len(chosen) :].sum(), rel=1e-6)  # of all 48 images
        start += len(own)
    cut = Compression(layers, config, factors, kept)
    short = gradient_features(generator, layers, images, rows, cut, config)
    np.testing.assert_allclose(short, whole[:, kept], rtol=1e-5, atol=1e-8)


def test_kernel_scores_are_those_of_the_dual_form():
    """Ridge regression has two forms; the other one, over training images, must give the same numbers."""
    rng = np.random.default_rng(0)
    corpus, queries = rng.normal(size=(30, 8)), rng.normal(size=(3, 8))
    ridge = 0.3 * np.trace(corpus.T @ corpus) / 8
    dual = queries @ corpus.T @ np.linalg.inv(corpus @ corpus.T + ridge * np.eye(30))
    np.testing.assert_allclose(kernel_scores(queries, corpus, ridge=0.3), dual, rtol=1e-9)
    few = corpus[:5]  # fewer images than numbers: the other kernel is the smaller one, with five eigenvalues
    primal = queries @ np.linalg.inv(few.T @ few + 0.3 * np.trace(few.T @ few) / 5 * np.eye(8)) @ few.T
    np.testing.assert_allclose(kernel_scores(queries, few, ridge=0.3), primal, rtol=1e-9)


def test_scores_of_other_widths_are_refused():
    with pytest.raises(InputError, match="3 columns"):
        similarity_scores(np.ones((1, 3)), np.ones((2, 4)))
    with pytest.raises(InputError, match="ridge must be positive"):
        kernel_scores(np.ones((1, 3)), np.ones((2, 3)), ridge=0.0)


def test_similarity_is_the_cosine():
    scores = similarity_scores(np.array([[2.0, 0.0]]), np.array([[3.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 1.0]]))
    np.testing.assert_allclose(scores, [[1.0, 0.0, -1.0, np.sqrt(0.5)]])


def test_whitening_without_factors_is_refused(setting):
    with pytest.raises(InputError, match="need EKFAC factors"):
        Compression(setting[2], CONFIG)


def rotated_draw_by_draw(setting, rows, config: GradientConfig) -> np.ndarray:
    """The slow loop: every draw's gradient by its own backward pass, rotated and scaled on its own, then averaged."""
    generator, images, layers, factors = setting
    found = []
    for row in rows:
        total = 0
        batches = denoising_losses(generator, images, np.array([row]), **replace(config, batch_size=1).drawn)
        for _, loss in batches:
            gradients = torch.autograd.grad(loss.sum(), [layer.weight for layer in layers.values()])
            parts = []
            for name, gradient in zip(layers, gradients, strict=True):
                left, right = factors.gradient_eigenvectors[name], factors.activation_eigenvectors[name]
                scale = factors.damped(name, config.damping).rsqrt()
                parts.append(((left.T @ gradient.flatten(1) @ right) * scale).flatten())
            total = total + torch.cat(parts)
        found.append(total.numpy())
    return np.stack(found)


@pytest.fixture(scope="module")
def whole_network(setting):
    """The same generator with all layers, convolutions included; its normalisations have one channel a group."""
    generator, images, _, _ = setting
    layers = layers_to_unlearn(generator, "")
    config = TeacherConfig(factor_examples=12, batch_size=12)
    return generator, images, layers, fit_ekfac(layers, factor_batches(generator, images, config))


@pytest.mark.parametrize("batch_size", [2, 7, 64])
def test_rotating_the_sum_of_draws_gives_what_rotating_each_draw_gives(whole_network, batch_size: int):
    """Draws of two images that fall into one group, or a rotation in another order, would keep the shape."""
    config = replace(CONFIG, batch_size=batch_size, span=(0.2, 0.9), antithetic=True, draws=4)
    expected = rotated_draw_by_draw(whole_network, [3, 20, 41], config)
    found = features_of(whole_network, [3, 20, 41], config)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_kept_coordinates_alone_are_computed_and_unchanged(whole_network):
    """Eigenvectors left out with their coordinates must take no other's place, in whatever layer they are."""
    whole = features_of(whole_network, [3, 20], CONFIG)
    kept = np.sort(np.random.default_rng(0).choice(whole.shape[1], 40, replace=False))
    generator, images, layers, factors = whole_network
    config = replace(CONFIG, width=40)
    cut = Compression(layers, config, factors, kept)
    found = gradient_features(generator, layers, images, np.array([3, 20]), cut, config)
    np.testing.assert_allclose(found, whole[:, kept], rtol=1e-4, atol=1e-6 * np.abs(whole).max())


def test_draws_have_the_features_as_their_mean_and_opposite_noise_in_pairs(setting):
    """The spread over draws is only the mean's uncertainty if the mean is theirs."""
    generator, images, layers, factors = setting
    config = replace(CONFIG, draws=4, antithetic=True, batch_size=3)
    compression = Compression(layers, config, factors)
    each = gradients_of_draws(generator, layers, images, 7, compression, config)
    assert len(each) == 4
    np.testing.assert_allclose(each.mean(axis=0), features_of(setting, [7], config)[0], rtol=1e-4, atol=1e-9)


def test_layers_that_the_loss_ignores_score_nothing(whole_network):
    """One channel a group: the normalisation takes the time's shift away, and whitening would blow rounding errors up."""
    _, _, layers, factors = whole_network
    ignored = [name for name in layers if "time_emb" in name]
    assert ignored
    assert all(torch.isinf(factors.damped(name, 0.1)).all() for name in ignored)
    seen = [name for name in layers if name not in ignored]
    assert all(torch.isfinite(factors.damped(name, 0.1)).all() for name in seen)
    ones = {name: torch.ones(weight_shape(layer), dtype=torch.float64) for name, layer in layers.items()}
    natural = factors.precondition(ones, damping=0.1)
    assert all(not natural[name].any() for name in ignored)
    assert all(natural[name].any() for name in seen)
