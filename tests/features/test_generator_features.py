"""Features that know the generator: its middle block's activations and its compressed gradients, as encoders like any other."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastattr import FastAttributor, Generator
from fastattr.core.errors import ArtifactMismatchError, InputError
from fastattr.corpus.store import Corpus
from fastattr.features.by_generator import (
    PARTS,
    TIMESTEPS,
    DiffusionEncoder,
    Recipe,
    encode_plainly,
    fit_gradient_encoder,
    open_gradient_encoder,
)
from fastattr.features.kinds import open_encoder
from fastattr.features.store import folders, read_features
from fastattr.generators.families import weight_shape
from fastattr.generators.schedules import noise_for
from fastattr.gradients.compression import Compression, GradientConfig, RidgeKernel, gradient_features
from fastattr.gradients.ekfac import Factors
from fastattr.pipeline.config import load_config
from fastattr.pipeline.stages import STAGES
from fastattr.teachers.kernels import kernel_scores, similarity_scores
from fastattr.teachers.unlearning import flat_step, linearised_scores
from tests.tiny import draw

IMAGES = [draw("red", "ring", "plain"), draw("blue", "square", "framed"), draw("green", "circle", "plain")]
CAPTIONS = [["red ring"], ["a blue square"], ["green circle"]]
ENCODERS = ("open_clip-text:encoder", "diffusion:generator", "gradient:gradients", "gradient:output-gradients")


def test_diffusion_features_are_the_middle_blocks_output(tiny_run: Path):
    """A hook on another block, or kept from another timestep, gives features that look as good."""
    generator = Generator.from_pretrained(tiny_run / "generator")
    found = DiffusionEncoder(generator).encode(IMAGES, CAPTIONS)
    unet, scheduler = generator.pipeline.unet, generator.pipeline.scheduler
    parts = []
    for place, level in enumerate(TIMESTEPS):
        noise = noise_for(["diffusion features"], [place], seed=0, shape=generator.latent_shape)
        timestep = torch.tensor([int(level * generator.train_timesteps)])
        rows = []
        for image, (caption,) in zip(IMAGES, CAPTIONS, strict=True):
            kept = []
            handle = unet.mid_block.register_forward_hook(lambda *call, kept=kept: kept.append(call[2]))
            with torch.no_grad():
                noisy = scheduler.add_noise(generator.encode_image([image]), noise, timestep)
                unet(noisy, timestep, encoder_hidden_states=generator.encode_prompt([caption]).tensors["text"])
            handle.remove()
            rows.append(torch.nn.functional.adaptive_avg_pool2d(kept[0], PARTS).flatten())
        parts.append(torch.nn.functional.normalize(torch.stack(rows), dim=1))
    slow = torch.nn.functional.normalize(torch.cat(parts, dim=1), dim=1)
    np.testing.assert_allclose(found, slow.numpy(), atol=1e-5)


@pytest.mark.parametrize("captions", ["first", "mean"])
def test_diffusion_features_ignore_batching(tiny_run: Path, captions: str):
    """A query comes alone, training images in batches: the same image must have the same features."""
    encoder = open_encoder("diffusion:generator", folder=tiny_run, captions=captions)
    several = [["red ring", "a ring"], ["a blue square"], ["green circle", "circle", "green"]]
    together = encoder.encode(IMAGES, several)
    for row, (image, texts) in enumerate(zip(IMAGES, several, strict=True)):
        np.testing.assert_allclose(encoder.encode([image], [texts])[0], together[row], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_gradient_encoder_orders_as_the_linearised_teacher(tiny_run: Path, tmp_path: Path):
    """Whitened on one side only, or with another damping, it would be a gradient similarity and no teacher's."""
    generator, corpus = Generator.from_pretrained(tiny_run / "generator"), Corpus(tiny_run / "corpus")
    config = GradientConfig(width=0, draws=4, batch_size=16)
    whole = replace(config, width=10**7)
    fit_gradient_encoder(generator, corpus, tmp_path / "g", Recipe(config=whole), reference=str(tiny_run / "generator"))
    encoder = open_gradient_encoder(tmp_path / "g")
    rows = np.arange(24)
    features = encoder.encode([corpus.image(row) for row in rows], [corpus.captions[row] for row in rows])
    encoded = encode_plainly(generator, [corpus.image(row) for row in rows], [corpus.captions[row] for row in rows])
    layers = encoder._layers
    own = encoder._generator
    factors = Factors.load(tmp_path / "g", layers)
    plain = Compression(layers, replace(config, whiten=False))
    raw = torch.from_numpy(gradient_features(own, layers, encoded, np.array([3]), plain, replace(config, whiten=False))[0])
    parts = raw.split([layer.weight.numel() for layer in layers.values()])
    gradient = {name: part.reshape(weight_shape(layer)) for (name, layer), part in zip(layers.items(), parts, strict=True)}
    step = torch.from_numpy(flat_step(factors.precondition(gradient, damping=config.damping), list(layers)))[None]
    scores = linearised_scores(own, layers, encoded, rows, step, draws=4, batch_size=16, seed=0)[0]
    norms = np.linalg.norm(gradient_features(own, layers, encoded, rows, encoder._compression, whole), axis=1)
    cosines = features @ features[3]
    assert np.corrcoef(cosines, scores / norms)[0, 1] > 0.999
    assert np.argmax(cosines) == 3


@pytest.mark.parametrize(("images", "width"), [(6, 20), (20, 6)])
def test_inner_products_of_what_a_ridge_kernel_maps_are_kernel_scores(images: int, width: int):
    """Half of the inverse on one side alone would be neither TRAK's score nor a plain similarity."""
    rng = np.random.default_rng(0)
    corpus, queries = (rng.standard_normal((count, width)).astype(np.float32) for count in (images, 3))
    kernel = RidgeKernel.fit(corpus, ridge=0.5)
    found = kernel(queries) @ kernel(corpus).T
    expected = kernel_scores(queries, corpus, ridge=0.5)
    np.testing.assert_allclose(found, expected * (found[0, 0] / expected[0, 0]), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="ridge"):
        RidgeKernel.fit(corpus, ridge=0)


def test_output_gradients_order_as_d_trak_in_the_eigenbasis(tiny_run: Path, tmp_path: Path):
    """Gradients of the loss, or a kernel that is lost on the way to the disk, would order images otherwise."""
    generator, corpus = Generator.from_pretrained(tiny_run / "generator"), Corpus(tiny_run / "corpus")
    config = GradientConfig(output="squared_norm", width=200, draws=2, batch_size=16)
    fit_gradient_encoder(
        generator, corpus, tmp_path / "g", Recipe(config=config, pattern=".", ridge=1.0), reference=str(tiny_run / "generator")
    )
    encoder = open_gradient_encoder(tmp_path / "g")
    rows = np.arange(len(corpus))  # all of them: fewer than what the kernel is fitted on at most
    images, captions = [corpus.image(row) for row in rows], [corpus.captions[row] for row in rows]
    found = encoder.encode(images[:4], captions[:4]) @ encoder.encode(images, captions).T
    encoded = encode_plainly(encoder._generator, images, captions)
    raw = gradient_features(encoder._generator, encoder._layers, encoded, rows, encoder._compression, config)
    scores = kernel_scores(raw, raw, ridge=1.0)
    lengths = np.sqrt(np.diag(scores))
    np.testing.assert_allclose(found, scores[:4] / np.outer(lengths[:4], lengths), atol=1e-3)
    assert not np.allclose(found, similarity_scores(raw[:4], raw), atol=0.05)


def test_gradient_encoder_refuses_another_generator(tiny_run: Path, tmp_path: Path):
    """Gradients in another generator's eigenbasis mean nothing, and look like any others."""
    generator, corpus = Generator.from_pretrained(tiny_run / "generator"), Corpus(tiny_run / "corpus")
    config = GradientConfig(width=64, draws=2, batch_size=16)
    fit_gradient_encoder(generator, corpus, tmp_path / "g", Recipe(config=config), reference="emoji")
    with pytest.raises(ArtifactMismatchError, match="the generator is"):
        open_gradient_encoder(tmp_path / "g")


def test_concatenation_is_a_config_line_and_attribution_brings_the_generator_along(
    tiny_run: Path, tiny_config: Path, tmp_path: Path
):
    """An attributor whose features need a generator must work where only its own folder is."""
    again = tmp_path / "run"
    shutil.copytree(tiny_run, again)
    for stage in ("features", "query_features", "candidates", "scores", "student", "calibration", "evaluation", "attributor"):
        if stage not in {"candidates", "scores"}:
            shutil.rmtree(again / stage)
    shutil.rmtree(again / "attributor-manifest")
    config = load_config(tiny_config)
    config = replace(config, features=replace(config.features, encoders=ENCODERS))
    for stage in ("features", "distill", "calibrate", "evaluate", "index"):
        STAGES[stage](config, again)
    corpus = Corpus(again / "corpus")
    features = read_features(folders(again, "features", ENCODERS), corpus.image_ids)
    moved = tmp_path / "elsewhere"
    shutil.move(again / "attributor", moved)
    shutil.rmtree(again)
    attributor = FastAttributor.from_pretrained(moved)
    own = np.concatenate([encoder.encode([IMAGES[0]], [CAPTIONS[0]]) for encoder in attributor._model.encoders], axis=1)
    assert own.shape[1] == features.shape[1]
    answer = attributor.attribute(IMAGES[0], CAPTIONS[0][0], k=3)
    assert len(answer.results) == 3
    assert answer.results[0].image_part is None  # these encoders read both image and words
