"""Distillation: tables, blocks, losses and training against slow loops, and resumed runs against uninterrupted ones."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from fastattr import ArtifactMismatchError, InputError
from fastattr.core.training import TrainingConfig
from fastattr.corpus.store import Corpus
from fastattr.features.store import folders, read_features
from fastattr.pipeline.config import load_config
from fastattr.pipeline.stages import STAGES
from fastattr.students.distill import LOSSES, TOP, DistillConfig, Validation, distill
from fastattr.students.pairs import (
    MappedFeatures,
    labels_of,
    make_table,
    open_table,
    standardised,
    stream_labels,
    targets_of,
)
from fastattr.students.ranking import spearman
from fastattr.students.student import Student, StudentConfig, embed
from fastattr.teachers.scores import ScoredQuery, read_scores
from tests.launch import on_two_processes
from tests.tiny import unit

SMALL = DistillConfig(
    student=StudentConfig(embed_dim=16, hidden=(64,)),
    images_per_step=100,
    training=TrainingConfig(steps=120, batch_size=16, learning_rate=3e-3, warmup_steps=5, ema_decay=0.95),
)


def planted(
    queries: int = 120, images: int = 300, width: int = 16, *, candidates: int = 0
) -> tuple[list, list, np.ndarray, np.ndarray]:
    """Scores by the last quarter of the features, which untuned cosines drown; each query's rows, both kinds of features."""
    rng = np.random.default_rng(9)
    query_features, corpus_features = unit(rng, queries, width), unit(rng, images, width)
    influence = (query_features[:, -(width // 4) :] @ corpus_features[:, -(width // 4) :].T).astype(np.float32)
    scored, rows = [], []
    for query in range(queries):
        own = rng.permutation(images)[: candidates or images]
        is_outsider = np.arange(len(own)) >= 0.9 * len(own) if candidates else np.zeros(images, dtype=bool)
        rows.append(own)
        names = [str(row) for row in own]
        scored.append(ScoredQuery(str(query), "", "train", names, influence[query, own], is_outsider, 0.02))
    return scored, rows, query_features, corpus_features


def taught(scored: list, rows: list, queries: np.ndarray, images: np.ndarray, config: DistillConfig, folder: Path) -> Student:
    """A student of the first hundred queries."""
    table = make_table(labels_of(scored[:100], rows[:100]), corpus_size=len(images), kind=config.target_kind)
    return distill(table, queries[:100], images, config, checkpoint=folder / "c.safetensors")


def gain(student, query_features: np.ndarray, corpus_features: np.ndarray) -> float:
    """Mean rise of the Spearman correlation with the planted teacher, over untuned features, on the last 20 queries."""
    own, theirs = embed(student, query_features[100:]), embed(student, corpus_features)
    teacher = query_features[100:, -4:] @ corpus_features[:, -4:].T
    untuned = query_features[100:] @ corpus_features.T
    pairs = zip(own @ theirs.T, untuned, teacher, strict=True)
    return float(np.mean([spearman(mine, real) - spearman(raw, real) for mine, raw, real in pairs]))


def test_block_equals_a_slow_loop():
    """A pair labelled with its neighbour's score would train a wrong ranking with a falling loss."""
    scored, rows, _, _ = planted(12, 40, candidates=15)
    rows[3], scored[3] = (
        rows[3][:9],
        replace(scored[3], influence=scored[3].influence[:9], is_outsider=scored[3].is_outsider[:9]),
    )
    table = make_table(labels_of(scored, rows), corpus_size=40)
    queries, images = np.array([5, 3, 11]), np.array([0, 7, 8, 20, 39])
    targets, known = table.block(queries, images)
    for place, query in enumerate(queries):
        of_image = dict(zip(rows[query].tolist(), targets_of(scored[query].influence, scored[query].is_outsider), strict=True))
        assert known[place].tolist() == [image in of_image for image in images]
        np.testing.assert_array_equal(targets[place], [of_image.get(image, 0.0) for image in images])


def test_images_are_drawn_from_the_queries_candidates_without_repetition():
    """An image twice in a block would count twice; one that no query knows is a wasted pass through the network."""
    scored, rows, _, _ = planted(12, 400, candidates=15)
    table = make_table(labels_of(scored, rows), corpus_size=400)
    drawn = table.draw(np.array([2, 4]), 20, torch.Generator().manual_seed(0))
    assert len(set(drawn.tolist())) == len(drawn) == 20
    assert set(drawn.tolist()) <= set(rows[2].tolist()) | set(rows[4].tolist())


def test_streamed_and_mapped_table_equals_the_one_in_memory(tiny_run: Path, tmp_path: Path):
    """Row numbers come from ids there; a shift would be seen nowhere else."""
    corpus = Corpus(tiny_run / "corpus")
    scored = read_scores(tiny_run / "scores", split="train")
    rows = [corpus.rows(query.image_ids) for query in scored]
    for kind in ("ranks", "scores"):
        memory = make_table(labels_of(scored, rows), corpus_size=len(corpus), kind=kind)
        make_table(stream_labels(tiny_run / "scores", corpus.image_ids), corpus_size=len(corpus), kind=kind, folder=tmp_path)
        mapped = open_table(tmp_path)
        assert isinstance(mapped.rows, np.memmap)
        np.testing.assert_array_equal(mapped.rows, memory.rows)
        np.testing.assert_array_equal(mapped.targets, memory.targets)
    paths = folders(tiny_run, "features", ["open_clip-image:encoder", "open_clip-text:encoder"])
    mapped_features = MappedFeatures(paths, corpus.image_ids)
    picked = np.array([5, 0, 47])
    np.testing.assert_array_equal(mapped_features[picked], read_features(paths, corpus.image_ids)[picked])


def slow_loss(name: str, logits: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    """The losses by loops over pairs."""
    queries, images = logits.shape
    pairs = [(q, i) for q in range(queries) for i in range(images) if weights[q, i]]

    def entropy(logit: float, target: float) -> float:
        chance = 1 / (1 + np.exp(-logit))
        return -target * np.log(chance) - (1 - target) * np.log(1 - chance)

    if name == "bce":
        return float(np.mean([entropy(logits[p], targets[p]) for p in pairs]))
    if name == "ordinal":
        levels = np.arange(1, 10) / 10
        return float(np.mean([entropy(logits[p] - np.log(t / (1 - t)), float(targets[p] > t)) for p in pairs for t in levels]))
    if name.startswith("mse"):
        return float(np.mean([(logits[p] - targets[p]) ** 2 for p in pairs]))
    terms = []
    for q in range(queries):
        own = [i for i in range(images) if weights[q, i]]
        wanted = np.array([np.exp((targets[q, i] - 1) / TOP) for i in own])
        log_sum = np.log(sum(np.exp(logits[q, i]) for i in own))
        terms.append(-sum(w / wanted.sum() * (logits[q, i] - log_sum) for w, i in zip(wanted, own, strict=True)))
    return float(np.mean(terms))


@pytest.mark.parametrize("name", list(LOSSES))
def test_loss_equals_a_slow_loop_and_skips_unknown_pairs(name: str):
    """A mask that leaks teaches the student that unscored images are worst."""
    rng = np.random.default_rng(1)
    logits, targets = rng.standard_normal((4, 20)), rng.permuted(np.tile(np.arange(1, 21) / 20, (4, 1)), axis=1)
    weights = (rng.random((4, 20)) < 0.7).astype(float)
    tensors = [torch.from_numpy(values) for values in (logits, targets, weights)]
    found = LOSSES[name](*tensors).item()
    assert found == pytest.approx(slow_loss(name, logits, targets, weights), rel=1e-6)
    other = torch.where(tensors[2] > 0, tensors[0], torch.randn(4, 20, dtype=torch.float64))
    assert LOSSES[name](other, *tensors[1:]).item() == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("name", list(LOSSES))
def test_every_loss_teaches_what_untuned_features_do_not_show(name: str, tmp_path: Path):
    """A flipped sign or a detached term falls as well, and ranks backwards or not at all."""
    scored, rows, query_features, corpus_features = planted()
    config = replace(SMALL, loss=name)
    student = taught(scored, rows, query_features, corpus_features, config, tmp_path)
    assert gain(student, query_features, corpus_features) > 0.05


def test_the_papers_shape_of_student_learns(tmp_path: Path):
    """Without a linear path nothing but the gradient orders images."""
    scored, rows, query_features, corpus_features = planted()
    config = replace(SMALL, student=replace(SMALL.student, linear_path=False, dropout=0.1))
    student = taught(scored, rows, query_features, corpus_features, config, tmp_path)
    assert gain(student, query_features, corpus_features) > 0.05


def test_a_student_with_parts_that_are_gone_is_refused_and_one_without_is_read():
    """Read as if it had shared heads, its queries would go through the wrong network."""
    old = {"embed_dim": 4, "hidden": [8], "input_norm": False, "separate_heads": False, "popularity": False}
    assert StudentConfig.from_json(old) == StudentConfig(embed_dim=4, hidden=(8,))
    with pytest.raises(InputError, match="separate_heads"):
        StudentConfig.from_json({**old, "separate_heads": True})


def validation_of(scored: list, rows: list, query_features: np.ndarray) -> Validation:
    return Validation(query_features, rows, [query.influence for query in scored])


def test_killed_distillation_resumes_to_the_same_student(tmp_path: Path, monkeypatch):
    """Weights, averages, optimiser, draws and the best so far: forget one, and the resumed student is another."""
    scored, rows, query_features, corpus_features = planted(candidates=60)
    table = make_table(labels_of(scored[:100], rows[:100]), corpus_size=300)
    config = replace(SMALL, judge_every=7, training=replace(SMALL.training, steps=40, checkpoint_every=10))
    options = {"validation": validation_of(scored[100:], rows[100:], query_features[100:]), "made_from": config}
    data = (table, query_features[:100], corpus_features, config)
    whole = distill(*data, checkpoint=tmp_path / "whole.safetensors", **options)

    calls = []

    def dying(value: float) -> None:
        calls.append(value)
        if len(calls) == 4:  # at step 28, with a checkpoint of step 20
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(*data, checkpoint=tmp_path / "c.safetensors", on_judgement=dying, **options)
    resumed = distill(*data, checkpoint=tmp_path / "c.safetensors", **options)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, msg=name)
    with pytest.raises(ArtifactMismatchError):
        distill(*data, checkpoint=tmp_path / "c.safetensors", **{**options, "made_from": "something else"})


def test_training_stops_at_the_best_student_for_the_validation_queries(tmp_path: Path):
    """Judged, then thrown away for the last weights, would be no early stopping."""
    scored, rows, query_features, corpus_features = planted(queries=112, candidates=60)
    table = make_table(labels_of(scored[:6], rows[:6]), corpus_size=300)  # six queries: soon learned by heart
    config = replace(
        SMALL, judge_every=5, patience=4, training=replace(SMALL.training, steps=400, batch_size=6, learning_rate=1e-2)
    )
    validation = validation_of(scored[100:], rows[100:], query_features[100:])
    seen: list[float] = []
    student = distill(
        table,
        query_features[:6],
        corpus_features,
        config,
        checkpoint=tmp_path / "c.safetensors",
        validation=validation,
        on_judgement=seen.append,
    )
    assert len(seen) < 80
    assert len(seen) - 1 - int(np.argmax(seen)) == 4
    assert validation.mean_average_precision(student, corpus_features) == pytest.approx(max(seen))


def _two_processes(folder: str) -> None:
    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    scored, rows, query_features, corpus_features = planted(candidates=60)
    table = make_table(labels_of(scored[:100], rows[:100]), corpus_size=300)
    config = replace(SMALL, training=replace(SMALL.training, steps=60))
    validation = validation_of(scored[100:], rows[100:], query_features[100:])
    student = distill(
        table,
        query_features[:100],
        corpus_features,
        config,
        checkpoint=Path(folder) / "c.safetensors",
        validation=validation,
        accelerator=accelerator,
    )
    np.save(Path(folder) / f"{accelerator.process_index}.npy", embed(student, corpus_features))
    np.save(Path(folder) / f"gain-{accelerator.process_index}.npy", gain(student, query_features, corpus_features))


def test_two_processes_train_one_student(tmp_path: Path):
    """Processes that drift apart, or learn from the same half, save whichever happens to be first."""
    on_two_processes(_two_processes, tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "0.npy"), np.load(tmp_path / "1.npy"))
    assert np.load(tmp_path / "gain-0.npy") > 0.05


def test_test_queries_play_no_part_in_the_student(tiny_run: Path, tiny_config: Path, tmp_path: Path):
    """Selected on what it is judged by, any student looks good."""
    again = tmp_path / "run"
    shutil.copytree(tiny_run, again)
    shutil.rmtree(again / "student")
    for path in (again / "scores").glob("test-*.parquet"):
        path.unlink()
    STAGES["distill"](load_config(tiny_config), again)
    ours, theirs = ((run / "student" / "model.safetensors").read_bytes() for run in (again, tiny_run))
    assert ours == theirs
    assert not list((again / "student").glob("table*"))


def test_unknown_losses_and_targets_are_refused():
    """A misspelt loss must not train something else for an hour."""
    for options in ({"loss": "bcee"}, {"patience": 0}):
        with pytest.raises(InputError):
            DistillConfig(**options)
    with pytest.raises(InputError, match="no training query"):
        make_table(list, corpus_size=3)
    assert standardised(np.ones(3)).tolist() == [0, 0, 0]
