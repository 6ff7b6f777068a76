"""The teacher: losses tied to ids, an unlearning step that raises the query's loss, scores in the right direction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageOps

from fastattr.core.errors import InputError, NonFiniteError
from fastattr.corpus.store import Corpus
from fastattr.generators.families import CROSS_ATTENTION_KV
from fastattr.generators.generator import Generator
from fastattr.generators.schedules import noise_for
from fastattr.gradients.ekfac import fit_ekfac
from fastattr.gradients.losses import EncodedImages, encode_corpus, image_losses
from fastattr.teachers.config import TeacherConfig
from fastattr.teachers.task import factor_batches, layers_to_unlearn
from fastattr.teachers.unlearning import (
    exact_scores,
    flat_step,
    influence_scores,
    linearised_scores,
    query_gradient,
    query_step,
    unlearned,
    unlearning_step,
)

CONFIG = TeacherConfig(factor_examples=48, query_draws=16, loss_draws=8, batch_size=16)


@pytest.fixture(scope="module")
def setting(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory):
    generator = Generator.from_pretrained(tiny_run / "generator")
    images = encode_corpus(generator, Corpus(tiny_run / "corpus"), batch_size=16, folder=tmp_path_factory.mktemp("encoded"))
    layers = layers_to_unlearn(generator, CROSS_ATTENTION_KV)
    factors = fit_ekfac(layers, factor_batches(generator, images, CONFIG))
    return generator, images, layers, factors


def in_double_precision(setting, tiny_run: Path):
    """The same setting for tests of small differences, which float32 rounds away."""
    generator = Generator.from_pretrained(tiny_run / "generator", dtype=torch.float64)
    layers = layers_to_unlearn(generator, CROSS_ATTENTION_KV)
    _, single, _, factors = setting
    images = replace(single, latents=single.latents.double(), conditioning=single.conditioning.to(torch.float64))
    return generator, images, layers, factors


def step_of(setting, row: int, **changed):
    generator, images, layers, factors = setting
    gradients, loss = query_gradient(
        generator, layers, images.latents[row], images.conditioning[[row]], query_id="q", draws=16, batch_size=16, seed=0
    )
    natural = factors.precondition(gradients, damping=0.1)
    return unlearning_step(gradients, natural, **{"loss": loss, "rise": 0.02, "step_size": None} | changed), loss


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_losses_ignore_batching_and_order(setting, batch_size: int):
    """Noise tied to batch position instead of image id would move every score and crash nothing."""
    generator, images, *_ = setting
    rows = np.array([11, 4, 7, 2, 30])
    alone = [image_losses(generator, images, np.array([row]), draws=3, batch_size=1, seed=0)[0] for row in rows]
    together = image_losses(generator, images, rows, draws=3, batch_size=batch_size, seed=0)
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_losses_average_over_captions_and_keep_views_apart(setting):
    """Captions of one image counted for the next, or a view at another image's place, would crash nothing."""
    generator, images, *_ = setting

    def losses(latents: torch.Tensor, conditioning: list[int], first_caption: list[int]) -> np.ndarray:
        some = EncodedImages(images.image_ids[:2], latents, images.conditioning[conditioning], np.array(first_caption))
        return image_losses(generator, some, np.array([0, 1]), draws=3, batch_size=4, seed=0)

    plain, flipped = images.latents[:2], images.latents[:2].flip(-1)
    together = losses(torch.cat([plain, flipped], dim=1), [0, 5, 1], [0, 2, 3])  # the first image has two captions
    first, second, mirrored = (
        losses(plain, [0, 1], [0, 1, 2]),
        losses(plain, [5, 1], [0, 1, 2]),
        losses(flipped, [0, 1], [0, 1, 2]),
    )
    assert together.shape == (2, 2)
    np.testing.assert_allclose(together[0, 0], (first[0, 0] + second[0, 0]) / 2, rtol=1e-5)
    np.testing.assert_allclose(together[1], [first[1, 0], mirrored[1, 0]], rtol=1e-5)


def test_mirrored_views_and_all_captions_are_encoded(tiny_run: Path, tmp_path: Path, setting):
    generator, corpus = setting[0], Corpus(tiny_run / "corpus")
    images = encode_corpus(generator, corpus, batch_size=16, folder=tmp_path, captions="all", mirrored=True)
    assert images.first_caption.tolist() == np.cumsum([0, *map(len, corpus.captions)]).tolist()
    assert len(images.conditioning) == images.first_caption[-1]
    expected = generator.encode_image([ImageOps.mirror(corpus.image(7))])
    torch.testing.assert_close(images.latents[7, 1:], expected, rtol=1e-4, atol=1e-4)


def test_what_is_encoded_once_is_read_again_unchanged(tiny_run: Path, tmp_path: Path, setting):
    """Conditioning put together in another order of its parts would give images each other's captions."""
    generator, corpus = setting[0], Corpus(tiny_run / "corpus")
    first = encode_corpus(generator, corpus, batch_size=7, folder=tmp_path)
    again = encode_corpus(generator, corpus, batch_size=7, folder=tmp_path)
    for row in (0, 6, 7, 47):
        alone = generator.encode_prompt([corpus.captions[row][0]]).tensors["text"]
        torch.testing.assert_close(first.conditioning[[row]].tensors["text"], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.conditioning.tensors, first.conditioning.tensors, rtol=0, atol=0)
    torch.testing.assert_close(again.latents, first.latents, rtol=0, atol=0)


def test_antithetic_draws_come_in_opposite_pairs(setting, monkeypatch):
    """Opposite noise at another timestep would cancel nothing."""
    generator, images, layers, _ = setting
    real, seen = generator.training_loss, []

    def watched(latents, conditioning, timesteps, noise):
        seen.append((timesteps, noise))
        return real(latents, conditioning, timesteps, noise)

    monkeypatch.setattr(generator, "training_loss", watched)
    query_gradient(
        generator,
        layers,
        images.latents[0],
        images.conditioning[[0]],
        query_id="q",
        draws=6,
        batch_size=3,
        seed=0,
        antithetic=True,
    )
    timesteps, noise = (torch.cat(parts) for parts in zip(*seen, strict=True))
    torch.testing.assert_close(noise[::2], -noise[1::2])
    assert timesteps[::2].tolist() == timesteps[1::2].tolist() == [166, 500, 833]
    assert not torch.allclose(noise[0], noise[2])


def test_noise_is_a_function_of_id_draw_and_seed():
    """Each of the three must matter, and nothing else."""
    shape = (2, 3, 3)
    base = noise_for(["a"], [0], seed=0, shape=shape)
    torch.testing.assert_close(noise_for(["b", "a"], [4, 0], seed=0, shape=shape)[1:], base, rtol=0, atol=0)
    for ids, draws, seed in ((["b"], [0], 0), (["a"], [1], 0), (["a"], [0], 1)):
        assert not torch.allclose(noise_for(ids, draws, seed=seed, shape=shape), base)
    many = noise_for([str(i) for i in range(500)], [0] * 500, seed=0, shape=shape)
    assert abs(float(many.mean())) < 0.05
    assert float(many.std()) == pytest.approx(1, abs=0.03)


def test_unlearning_raises_the_querys_loss_by_what_was_asked(setting, tiny_run: Path):
    """A step down instead of up would turn every ranking upside down; one of another size leaves the linear regime."""
    setting = generator, images, layers, _ = in_double_precision(setting, tiny_run)
    errors = []
    for rise in (0.02, 0.002, 0.0002):  # losses are float32: smaller steps drown in their rounding
        (step, predicted), before = step_of(setting, 5, rise=rise)
        with unlearned(layers, step):
            _, after = query_gradient(
                generator, layers, images.latents[5], images.conditioning[[5]], query_id="q", draws=16, batch_size=16, seed=0
            )
        assert predicted == pytest.approx(rise)
        assert after > before
        errors.append(abs((after / before - 1) / rise - 1))
    assert errors[2] < 0.02  # to first order it is what was asked
    assert errors[0] > errors[1] > errors[2]  # and the rest is of higher order


def test_weights_are_restored_bit_for_bit_even_after_an_error(setting):
    """A drift of one bit a query adds up over thousands of queries."""
    _, _, layers, _ = setting
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    (step, _), _ = step_of(setting, 3)
    with pytest.raises(RuntimeError, match="midway"), unlearned(layers, step):
        assert any(not torch.equal(before[name], layer.weight) for name, layer in layers.items())
        raise RuntimeError("midway")
    assert all(torch.equal(before[name], layer.weight) for name, layer in layers.items())


def test_a_copy_of_the_query_is_among_the_most_influential(setting):
    """The image that is the query must be among those most hurt by unlearning it: direction and ids at once."""
    generator, images, layers, factors = setting
    base = image_losses(generator, images, np.arange(48), draws=8, batch_size=16, seed=0)
    hits = []
    for row in range(0, 48, 4):
        query = {"latent": images.latents[row], "prompt": caption_of(images, row), "query_id": images.image_ids[row]}
        step, _ = query_step(generator, layers, factors, **query, config=CONFIG)
        scores = exact_scores(generator, layers, images, base, step, candidate_rows=np.arange(48), config=CONFIG)
        hits.append(int((scores > scores[row]).sum()))
    assert np.mean(hits) <= 3  # of 48, for an almost untrained generator; 23.5 by chance, near 47 in the wrong direction


def scores_of_steps(setting, steps, rows):
    generator, images, layers, _ = setting
    flat = torch.from_numpy(np.stack([flat_step(step, list(layers)) for step in steps]))
    return linearised_scores(generator, layers, images, rows, flat, draws=3, batch_size=7, seed=0)


def test_exact_scores_converge_to_the_linearised_ones_as_the_step_shrinks(setting, tiny_run: Path):
    """A lost factor, sign or layer in either teacher would stop the convergence, or change its order."""
    setting = generator, images, layers, _ = in_double_precision(setting, tiny_run)
    rows = np.array([5, 40, 3, 17, 22, 8])
    one_sided, symmetric = [], []
    for rise in (4e-4, 2e-4, 1e-4):
        (step, _), _ = step_of(setting, 5, rise=rise)
        expected = scores_of_steps(setting, [step], rows)[0]
        losses = []
        for sign in (-1, 0, 1):
            with unlearned(layers, {name: sign * change for name, change in step.items()}):
                losses.append(image_losses(generator, images, rows, draws=3, batch_size=16, seed=0))
        for errors, exact in ((one_sided, losses[2] - losses[1]), (symmetric, (losses[2] - losses[0]) / 2)):
            errors.append(np.abs(exact[:, 0] - expected).max() / np.abs(expected).max())
    # The error of half the step is a half (first order), a quarter for the symmetric step (second order).
    np.testing.assert_allclose([one_sided[0] / one_sided[1], one_sided[1] / one_sided[2]], 2, rtol=0.2)
    np.testing.assert_allclose([symmetric[0] / symmetric[1], symmetric[1] / symmetric[2]], 4, rtol=0.3)


def test_linearised_scores_ignore_batching_order_and_company(setting):
    """A gradient of one image that leaks into its neighbour's score would crash nothing."""
    steps = [step_of(setting, row)[0][0] for row in (5, 30, 11)]
    together = scores_of_steps(setting, steps, np.array([9, 2, 40, 31, 8]))
    for position, row in enumerate((9, 2, 40, 31, 8)):
        alone = scores_of_steps(setting, steps[1:2], np.array([row]))
        np.testing.assert_allclose(together[1, position], alone[0, 0], rtol=1e-3, atol=1e-8)


def caption_of(images: EncodedImages, row: int) -> str:
    colour, shape, style = images.image_ids[row].split("-")
    return f"{colour} {shape}, {style} style"


def test_scores_are_positive_where_the_loss_rose():
    """Higher is more influential, everywhere."""
    base, after = np.array([[1.0, 4.0], [2.0, 4.0]]), np.array([[1.5, 3.0], [1.0, 4.0]])
    np.testing.assert_allclose(influence_scores(base, after), [0.5, 0.0])  # the larger rise of two views
    with pytest.raises(InputError, match="one \\(C, V\\) shape"):
        influence_scores(np.zeros((2, 1)), np.zeros((3, 1)))


def test_pattern_without_layers_is_refused(setting):
    """Unlearning nothing would score every image zero, after hours."""
    with pytest.raises(InputError, match="no layer of the denoiser matches"):
        setting[0].modules_to_unlearn("no_such_layer")


def test_not_finite_gradient_names_layer_and_query(setting):
    """A NaN step would make every score of the query NaN."""
    generator, images, layers, _ = setting
    with pytest.raises(NonFiniteError, match="for query q"):
        query_gradient(
            generator,
            layers,
            images.latents[0] * float("nan"),
            images.conditioning[[0]],
            query_id="q",
            draws=4,
            batch_size=4,
            seed=0,
        )
