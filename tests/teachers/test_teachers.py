"""Every way of scoring a run: stored or contracted gradients, baselines, other people's factors; and what they refuse."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastattr import ArtifactMismatchError, FastattrError, InputError, NonFiniteError, QueriesFailedError
from fastattr.core.files import read_json
from fastattr.corpus.store import Corpus
from fastattr.features.store import folders, read_features
from fastattr.generators.generator import Generator
from fastattr.generators.queries import Queries
from fastattr.pipeline.config import BuildConfig, load_config
from fastattr.pipeline.stages import STAGES
from fastattr.teachers import task
from fastattr.teachers.config import TeacherConfig, queries_a_pass, stores_gradients
from fastattr.teachers.kernels import similarity_scores, standardised
from fastattr.teachers.scores import read_scores


@pytest.fixture
def fresh(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the tiny run without scores."""
    run_dir = tmp_path / "run"
    shutil.copytree(tiny_run, run_dir)
    shutil.rmtree(run_dir / "scores")
    return run_dir


def teach(config_path: Path, run_dir: Path, **changed):
    """Score with other settings; returns the manifest and (C,) scores by query id."""
    config = load_config(config_path)
    manifest = STAGES["teach"](replace(config, teacher=replace(config.teacher, **changed)), run_dir)
    return manifest, {row.query_id: row.influence for row in read_scores(run_dir / "scores")}


def test_stored_gradients_score_as_contracted_ones(tiny_config: Path, tiny_run: Path, fresh: Path):
    """Half precision and another basis must change no more than half precision does."""
    manifest, stored = teach(tiny_config, fresh, gradients="stored", gradient_width=0)
    assert manifest["teacher"] == "abu_plus_exact+abu_plus_linearised"
    for row in read_scores(tiny_run / "scores", split="train"):
        np.testing.assert_allclose(stored[row.query_id], row.influence, atol=3e-3 * np.abs(row.influence).max())
    gradients = next((fresh / "gradients").iterdir())
    kept = read_json(gradients / "manifest.json")["bytes_per_image"]
    assert kept == 2 * np.load(gradients / "features.npy").shape[1]
    corpus = Corpus(fresh / "corpus")
    assert read_features([gradients], corpus.image_ids).shape[0] == len(corpus)  # a feature folder like any other


def test_several_passes_score_as_one(tiny_config: Path, tiny_run: Path, fresh: Path):
    """Memory for two queries' steps must not change the six queries' scores."""
    layers = Generator.from_pretrained(fresh / "generator").modules_to_unlearn(load_config(tiny_config).teacher.pattern)
    memory = 2.5 * 4 * sum(layer.weight.numel() for layer in layers.values()) / 1e9
    _, scores = teach(tiny_config, fresh, gradients="contracted", memory_gb=memory)
    for row in read_scores(tiny_run / "scores", split="train"):
        np.testing.assert_allclose(scores[row.query_id], row.influence, rtol=1e-4, atol=1e-4 * np.abs(row.influence).max())


def test_gradients_are_stored_where_one_pass_is_not_enough():
    config = TeacherConfig(memory_gb=1.0)
    assert queries_a_pass(config, parameters=1_000_000) == 250
    assert not stores_gradients(config, queries=250, parameters=1_000_000)
    assert stores_gradients(config, queries=251, parameters=1_000_000)
    assert not stores_gradients(replace(config, gradients="contracted"), queries=251, parameters=1_000_000)
    assert not stores_gradients(replace(config, mirrored=True), queries=251, parameters=1_000_000)


def test_similarity_scores_are_those_of_its_features(tiny_config: Path, fresh: Path):
    """A row of another image would still look like a score."""
    encoders = load_config(tiny_config).features.encoders
    manifest, scores = teach(tiny_config, fresh, method="similarity", similarity_features=tuple(encoders))
    assert manifest["teacher"] == "similarity"
    queries, corpus = Queries(fresh / "queries"), Corpus(fresh / "corpus")
    expected = similarity_scores(
        read_features(folders(fresh, "query_features", encoders), queries.query_ids),
        read_features(folders(fresh, "features", encoders), corpus.image_ids),
    )
    for row in read_scores(fresh / "scores"):
        query = queries.query_ids.index(row.query_id)
        np.testing.assert_allclose(scores[row.query_id], expected[query, corpus.rows(row.image_ids)], atol=1e-6)


@pytest.mark.parametrize("method", ["trak", "d-trak", "d-trak-ekfac", "averaged"])
def test_kernel_baselines_name_a_planted_training_image(tiny_config: Path, fresh: Path, method: str):
    """The image whose copy is the query must come out near the top: direction, ids and features at once."""
    queries, corpus = Queries(fresh / "queries"), Corpus(fresh / "corpus")
    planted = {query_id: row for row, query_id in zip(range(3, 39, 3), queries.query_ids, strict=True)}

    class Planted(Queries):
        """The same queries, some replaced by training images."""

        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            for query_id, row in planted.items():
                self.prompts[self.query_ids.index(query_id)] = corpus.captions[row][0]

        def image(self, row: int):
            query_id = queries.query_ids[row]
            return corpus.image(planted[query_id]) if query_id in planted else super().image(row)

    candidates = {query_id: (list(corpus.image_ids), np.zeros(len(corpus), dtype=bool)) for query_id in queries.query_ids}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastattr.teachers.teach.Queries", Planted)
        patch.setattr("fastattr.teachers.teach.read_candidates", lambda folder: candidates)
        _, scores = teach(
            tiny_config, fresh, method=method, query_draws=64, loss_draws=8, gradient_width=0, ridge=0.1, pattern="attn2"
        )
    ranks = [int((scores[query_id] > scores[query_id][row]).sum()) for query_id, row in planted.items()]
    assert np.mean(ranks) <= 12, ranks  # chance: 23.5, with a standard deviation of 4


def test_a_mean_is_that_of_its_members_standardised_for_each_query(tiny_config: Path, fresh: Path):
    """Members of other units must count alike."""
    settings = {"gradient_width": 64, "query_draws": 8, "loss_draws": 2}
    alone = {}
    for method in ("first-order", "d-trak-ekfac"):
        manifest, alone[method] = teach(tiny_config, fresh, method=method, **settings)
        shutil.rmtree(fresh / "scores")
    assert manifest["teacher"] == "d_trak_ekfac"
    manifest, mean = teach(tiny_config, fresh, method="averaged", **settings)
    assert manifest["teacher"] == "averaged"
    for query_id, scores in mean.items():
        members = [(rows[query_id] - rows[query_id].mean()) / rows[query_id].std() for rows in alone.values()]
        np.testing.assert_allclose(scores, np.mean(members, axis=0), atol=1e-4)


def test_a_mean_over_models_is_that_of_each_model_alone(tiny_config: Path, fresh: Path, tmp_path: Path):
    """The first model counted twice, or gradients of one in the curvature of the other, would look like a mean too."""
    settings = {"method": "first-order", "query_draws": 8, "loss_draws": 2}
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(fresh, elsewhere)
    weights = next((elsewhere / "generator").glob("unet/*.safetensors"))
    changed = {name: value + 0.1 * torch.randn_like(value) for name, value in load_file(weights).items()}
    save_file(changed, weights)
    (elsewhere / "generator" / "manifest.json").unlink(missing_ok=True)
    alone = [teach(tiny_config, run_dir, **settings)[1] for run_dir in (fresh, elsewhere)]
    shutil.rmtree(fresh / "scores")
    _, both = teach(tiny_config, fresh, models=(str(elsewhere / "generator"),), **settings)
    for query_id, scores in both.items():
        members = [standardised(rows[query_id][None])[0] for rows in alone]
        assert np.corrcoef(members)[0, 1] < 0.999
        np.testing.assert_allclose(scores, np.mean(members, axis=0), atol=1e-4)
    assert not list((fresh / "scores").glob("shards*"))  # nothing of the members is left


def test_a_query_that_fails_in_a_member_fails_in_the_mean(tiny_config: Path, fresh: Path, monkeypatch):
    """A mean over the members that did not fail would be another teacher's score in the same column."""
    bad, real = Queries(fresh / "queries").query_ids[1], task.query_step

    def fails_for_one(*args, **kwargs):
        if kwargs["query_id"] == bad:
            raise NonFiniteError("the loss is nan")
        return real(*args, **kwargs)

    monkeypatch.setattr(task, "query_step", fails_for_one)
    settings = {"gradient_width": 64, "query_draws": 8, "loss_draws": 2}
    with pytest.raises(QueriesFailedError, match=f"{bad}  QueriesFailedError: first-order: NonFiniteError: the loss is nan"):
        teach(tiny_config, fresh, method="averaged", **settings)


def test_factors_of_another_corpus_are_refused_before_anything_is_scored(tiny_config: Path, fresh: Path, tmp_path: Path):
    fitted = next((fresh / "ekfac").iterdir())
    copy = tmp_path / "factors"
    shutil.copytree(fitted, copy)
    made_of = copy / "made_of.json"
    made_of.write_text(made_of.read_text().replace(Corpus(fresh / "corpus").fingerprint, "0123456789abcdef"))
    with pytest.raises(ArtifactMismatchError, match="the corpus of the factors"):
        teach(tiny_config, fresh, factors=str(copy))
    assert not list((fresh / "scores").rglob("*.parquet"))
    _, scores = teach(tiny_config, fresh, factors=str(fitted))
    assert all(np.isfinite(values).all() for values in scores.values())


def test_unknown_and_missing_candidates_are_refused(tiny_config: Path, fresh: Path):
    """A candidate that is not in the corpus, or a query without any, would fail only when its turn comes."""
    path = fresh / "candidates" / "data.parquet"
    table = pq.read_table(path).to_pylist()
    for ids, message in ((["no-such-image"], "no-such-image"), ([], "have no candidates")):
        changed = [dict(row) for row in table]
        changed[2] |= {"image_ids": ids, "is_outsider": [False] * len(ids)}
        pq.write_table(type(pq.read_table(path)).from_pylist(changed), path)
        with pytest.raises(InputError, match=message):
            teach(tiny_config, fresh)


def test_a_nan_loss_names_the_image_before_any_query_is_scored(tiny_config: Path, fresh: Path, monkeypatch):
    """One broken image would make its column NaN in every query's scores, after weeks."""
    real = Generator.training_loss
    corpus = Corpus(fresh / "corpus")

    def broken(self, latents, *rest):
        losses = real(self, latents, *rest)
        with torch.no_grad():
            bad = self.encode_image([corpus.image(7)])
        return torch.where((latents - bad).abs().amax(dim=(1, 2, 3)) < 1e-6, float("nan"), losses)

    STAGES["teach"](load_config(tiny_config), fresh)  # factors are there now
    shutil.rmtree(fresh / "scores")
    shutil.rmtree(fresh / "base_loss")
    monkeypatch.setattr(Generator, "training_loss", broken)
    with pytest.raises(FastattrError, match=f"the loss of image {corpus.image_ids[7]} is not finite"):
        teach(tiny_config, fresh)


@pytest.mark.parametrize(
    "changed",
    [
        {"method": "tarot"},
        {"method": "similarity"},
        {"members": ()},
        {"members": ("similarity",)},
        {"similarity_features": ("x",)},
        {"gradients": "kept"},
        {"gradients": "stored", "mirrored": True},
        {"memory_gb": 0},
        {"ridge": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused(changed: dict[str, object]):
    with pytest.raises(InputError):
        TeacherConfig(**changed)


def test_config_files_may_name_the_baselines(tmp_path: Path, tiny_config: Path):
    text = tiny_config.read_text().replace("teacher: {", "teacher: {method: similarity, similarity_features: [a, b], ")
    (tmp_path / "x.yaml").write_text(text)
    config = load_config(tmp_path / "x.yaml")
    assert isinstance(config, BuildConfig)
    assert config.teacher.similarity_features == ("a", "b")
