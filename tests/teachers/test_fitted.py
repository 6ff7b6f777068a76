"""The fitted teacher: a new query's scores are those of the methods themselves, now, later, and with an honest spread."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastattr import ArtifactMismatchError, InputError
from fastattr.corpus.store import Corpus
from fastattr.generators.families import CROSS_ATTENTION_KV
from fastattr.generators.generator import Generator
from fastattr.gradients.compression import Compression, gradient_features
from fastattr.gradients.ekfac import fit_ekfac
from fastattr.gradients.losses import encode_corpus
from fastattr.teachers.config import TeacherConfig
from fastattr.teachers.fitted import FittedTeacher
from fastattr.teachers.kernels import averaged, kernel_scores
from fastattr.teachers.task import factor_batches

CONFIG = TeacherConfig(
    method="averaged",
    pattern=CROSS_ATTENTION_KV,
    gradient_width=0,
    query_draws=12,
    loss_draws=4,
    factor_examples=48,
    batch_size=16,
    ridge=1.0,
)


@pytest.fixture(scope="module")
def setting(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory):
    generator, corpus = Generator.from_pretrained(tiny_run / "generator"), Corpus(tiny_run / "corpus")
    images = encode_corpus(generator, corpus, batch_size=16, folder=tmp_path_factory.mktemp("encoded"))
    layers = generator.modules_to_unlearn(CROSS_ATTENTION_KV)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    return corpus, generator, images, layers, fit_ekfac(layers, factor_batches(generator, images, CONFIG))


@pytest.fixture(scope="module")
def fitted(setting) -> FittedTeacher:
    _, generator, images, _, factors = setting
    return FittedTeacher.fit(generator, images, CONFIG, factors=factors)


def test_scores_are_those_of_the_methods_themselves(setting, fitted: FittedTeacher):
    """A kernel applied twice, or to the wrong side, would keep the shape."""
    _, generator, images, layers, factors = setting
    queries = replace(images, image_ids=[f"q{row}" for row in range(48)])  # the same pictures at other noise
    expected = []
    for method, ridge in (("first-order", 0.0), ("d-trak-ekfac", 1.0)):
        settings = CONFIG.gradients_of(method)
        compression = Compression(layers, settings, factors)
        theirs = gradient_features(generator, layers, images, np.arange(48), compression, settings)
        own = gradient_features(generator, layers, queries, np.arange(48), compression, replace(settings, draws=12))
        expected.append(kernel_scores(own, theirs, ridge=ridge) if ridge else own @ theirs.T)
    np.testing.assert_allclose(fitted.scores(queries), averaged(*expected), rtol=1e-3, atol=1e-3)


def test_a_kept_teacher_scores_a_new_query_as_before(setting, fitted: FittedTeacher, tmp_path: Path, tiny_run: Path):
    """Half precision may cost a thousandth; another order of layers or images would cost everything."""
    corpus, generator, _, _, _ = setting
    fitted.save(tmp_path / "fitted", generator=str(tiny_run / "generator"))
    opened = FittedTeacher.open(tmp_path / "fitted")
    before = fitted.score(corpus.image(7), corpus.captions[7][0])
    after = opened.score(corpus.image(7), corpus.captions[7][0])
    assert after.image_ids == list(corpus.image_ids)
    np.testing.assert_allclose(after.influence, before.influence, atol=5e-3)
    np.testing.assert_allclose(after.error, before.error, rtol=0.02, atol=1e-3)
    other = Generator(generator.pipeline, name="other")
    vars(other)["fingerprint"] = "another"
    with pytest.raises(ArtifactMismatchError, match="the generator"):
        FittedTeacher.open(tmp_path / "fitted", generator=other)


def test_leading_coordinates_survive_the_folder(setting, tmp_path: Path, tiny_run: Path):
    """Of the eigenvectors only those that kept coordinates need are written; their places must come back with them."""
    corpus, generator, images, _, factors = setting
    teacher = FittedTeacher.fit(generator, images, replace(CONFIG, gradient_width=64), factors=factors)
    teacher.save(tmp_path / "fitted", generator=str(tiny_run / "generator"))
    opened = FittedTeacher.open(tmp_path / "fitted", generator=generator)
    query = (corpus.image(20), corpus.captions[20][0])
    np.testing.assert_allclose(opened.score(*query).influence, teacher.score(*query).influence, atol=5e-3)


def test_a_copy_of_a_training_image_names_it(setting, fitted: FittedTeacher):
    """Direction, ids and noise at once: the image itself must be near the top, and surely above the mean image."""
    corpus = setting[0]
    ranks, above = [], []
    for row in range(0, 48, 6):
        found = fitted.score(corpus.image(row), corpus.captions[row][0])
        ranks.append(int((found.influence > found.influence[row]).sum()))
        above.append(found.influence[row] / found.error[row])
    assert np.median(ranks) <= 4, ranks  # of 48, for an almost untrained generator; chance is 23.5
    assert np.median(above) > 1


def test_the_error_is_the_spread_over_draws_and_shrinks_with_them(setting, fitted: FittedTeacher):
    """An error that does not fall with the root of the draws is no standard error."""
    corpus, generator = setting[:2]
    config, member = replace(CONFIG, method="first-order"), fitted.members[0]
    single = FittedTeacher(generator, config, fitted.image_ids, [member])
    many = replace(member, gradients=replace(member.gradients, draws=16 * member.gradients.draws))
    surer = FittedTeacher(generator, config, fitted.image_ids, [many])
    shrunk, covered = [], []
    for row in (3, 17, 30):
        found, expected = (teacher.score(corpus.image(row), corpus.captions[row][0]) for teacher in (single, surer))
        shrunk.append(np.median(found.error / expected.error))
        covered.append(np.mean(np.abs(found.influence - expected.influence) < 2 * found.error))
    assert 2.5 < np.mean(shrunk) < 6  # 4, by the root of 16
    assert np.mean(covered) > 0.75


def test_a_method_that_measures_every_query_anew_is_refused(setting):
    with pytest.raises(InputError, match="can't be fitted for new queries"):
        FittedTeacher.fit(setting[1], setting[2], replace(CONFIG, method="unlearning"), factors=setting[4])
