"""Candidates, metrics, index, score tables and student: small functions against brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, ndcg_score

from fastattr.core.errors import ArtifactDamagedError, InputError, NonFiniteError
from fastattr.core.training import TrainingConfig
from fastattr.features.candidates import choose_candidates
from fastattr.index.build import build_index
from fastattr.index.files import load_index, save_index
from fastattr.index.search import Ranked, Shards
from fastattr.students.distill import DistillConfig, distill, load_student, save_student
from fastattr.students.pairs import labels_of, make_table, targets_of
from fastattr.students.ranking import (
    average_precision,
    ndcg,
    paired_bootstrap,
    spearman,
    teacher_average_precision,
    top_k_overlap,
)
from fastattr.students.student import Student, StudentConfig, embed
from fastattr.teachers.scores import ScoredQuery, ranks_of
from tests.tiny import unit


def test_candidates_are_the_nearest_by_each_encoder_and_distinct_outsiders():
    """Taking the farthest, or one encoder only, would starve the teacher of influential images."""
    rng = np.random.default_rng(0)
    first, second = rng.random(50), rng.random(50)
    rows, is_outsider = choose_candidates([first, second], size=20, outsiders=4, rng=rng)
    assert len(set(rows.tolist())) == 20
    assert is_outsider.sum() == 4
    neighbours = set(rows[~is_outsider].tolist())
    for values in (first, second):
        assert set(np.argsort(-values)[:8].tolist()) <= neighbours
    assert not neighbours & set(rows[is_outsider].tolist())


def test_candidates_can_be_the_whole_corpus():
    """The edge where there are no more outsiders to draw."""
    rows, _ = choose_candidates([np.arange(10.0)], size=10, outsiders=2, rng=np.random.default_rng(0))
    assert sorted(rows.tolist()) == list(range(10))


def test_average_precision_equals_scikit_learn():
    """An independent implementation."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        scores, relevant = rng.random(40), rng.random(40) < 0.3
        relevant[0] = True
        assert average_precision(scores, relevant) == pytest.approx(average_precision_score(relevant, scores))


def test_average_precision_of_a_hand_computed_ranking():
    """Relevant at places 1 and 3 of four: (1/1 + 2/3) / 2."""
    assert average_precision(np.array([4.0, 3.0, 2.0, 1.0]), np.array([True, False, True, False])) == pytest.approx(5 / 6)


def test_equal_scores_earn_nothing():
    """A method that scores all images alike must not look good by luck of the order."""
    relevant = np.array([True, False, False, False])
    assert average_precision(np.zeros(4), relevant) == pytest.approx(1 / 4)


def test_metrics_are_highest_for_the_teachers_own_ranking_and_lowest_reversed():
    """Higher is better, everywhere."""
    teacher = np.random.default_rng(2).random(30)
    assert teacher_average_precision(teacher, teacher, positives=5) == 1
    assert spearman(teacher, teacher) == pytest.approx(1)
    assert top_k_overlap(teacher, teacher, 5) == 1
    assert teacher_average_precision(-teacher, teacher, positives=5) < 0.2
    assert spearman(-teacher, teacher) == pytest.approx(-1)
    assert top_k_overlap(-teacher, teacher, 5) == 0


@pytest.mark.parametrize("k", [None, 7])
def test_ndcg_equals_scikit_learn(k: int | None):
    """An independent implementation, whole and cut off."""
    rng = np.random.default_rng(12)
    for _ in range(20):
        scores, relevance = rng.random(40), rng.random(40) * (rng.random(40) < 0.4)
        assert ndcg(scores, relevance, k=k) == pytest.approx(ndcg_score(relevance[None], scores[None], k=k))


def test_ndcg_of_a_hand_computed_ranking():
    """Relevances 1, 3 in that order: (1 / log2(2) + 3 / log2(3)) over (3 / log2(2) + 1 / log2(3))."""
    found = ndcg(np.array([2.0, 1.0]), np.array([1.0, 3.0]))
    assert found == pytest.approx((1 + 3 / np.log2(3)) / (3 + 1 / np.log2(3)))
    assert ndcg(np.zeros(2), np.array([1.0, 3.0])) == found  # equal scores are placed worst


def test_ndcg_refuses_what_has_no_gain():
    """A division by zero would become NaN in a mean."""
    with pytest.raises(InputError, match="somewhere positive"):
        ndcg(np.arange(3.0), np.zeros(3))
    with pytest.raises(InputError, match="k must be between 1 and 3"):
        ndcg(np.arange(3.0), np.ones(3), k=4)


def test_paired_bootstrap_sees_a_constant_gain_and_no_gain():
    """An unpaired interval would hide a small gain behind the spread of the queries."""
    values = np.random.default_rng(3).random(40)
    mean, low, high = paired_bootstrap(values + 0.01, values)
    assert (mean, low, high) == pytest.approx((0.01, 0.01, 0.01))
    noise = np.random.default_rng(4).normal(size=40)
    _, low, high = paired_bootstrap(values + noise - noise.mean(), values)
    assert low < 0 < high


def test_ranks_count_from_the_most_influential():
    """Rank 0 is the highest score."""
    assert ranks_of(np.array([0.1, 0.9, -3.0, 0.5])).tolist() == [2, 0, 3, 1]
    with pytest.raises(NonFiniteError, match="1 of 2"):
        ranks_of(np.array([0.0, float("nan")]))


def test_targets_fall_with_rank_and_outsiders_are_worst():
    """A sign error here trains a student that ranks backwards, with a falling loss."""
    targets = targets_of(np.array([0.1, 0.9, 0.5, 0.7]), np.array([False, False, False, True]))
    assert targets.tolist() == [0.25, 1.0, 0.5, 0.0]


def test_search_equals_brute_force():
    """Ids and similarities, best first."""
    rng = np.random.default_rng(5)
    vectors, queries = unit(rng, 200, 16), unit(rng, 5, 16)
    similarities, rows = Ranked(Shards([(build_index(vectors, "Flat"), 0)])).search(queries, 10)
    expected = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(similarities, np.take_along_axis(queries @ vectors.T, expected, axis=1), rtol=1e-5)


@pytest.mark.parametrize(("k", "found"), [(0, 0), (-1, 0), (201, 200)])
def test_k_out_of_range_finds_what_there_is(k: int, found: int):
    """FAISS itself fills up with id -1, which would index the last row of the catalogue."""
    vectors = unit(np.random.default_rng(6), 200, 8)
    rows = Ranked(Shards([(build_index(vectors, "SQfp16"), 0)])).search(vectors[:1], k)[1]
    assert rows.shape == (1, found)
    assert (rows >= 0).all()


def test_unknown_index_is_refused():
    """FAISS's own error is a C++ stack."""
    with pytest.raises(InputError, match="FAISS does not know"):
        build_index(unit(np.random.default_rng(7), 10, 8), "Hnsw_of_a_kind")


def test_index_with_another_checksum_is_not_read(tmp_path: Path):
    """FAISS parses untrusted bytes in native code."""
    save_index(build_index(unit(np.random.default_rng(8), 10, 8), "Flat"), tmp_path / "index.faiss")
    with pytest.raises(ArtifactDamagedError, match="SHA-256"):
        load_index(tmp_path / "index.faiss", sha256="0" * 64)


def planted(queries: int, images: int, width: int) -> tuple[list[ScoredQuery], np.ndarray, np.ndarray]:
    """A teacher that looks only at the last quarter of the features, which untuned cosines drown in the rest."""
    rng = np.random.default_rng(9)
    query_features, corpus_features = unit(rng, queries, width), unit(rng, images, width)
    signal = width // 4
    scores = query_features[:, -signal:] @ corpus_features[:, -signal:].T
    nobody = np.zeros(images, dtype=bool)
    names = [str(row) for row in range(images)]
    scored = [ScoredQuery(str(q), "", "train", names, scores[q].astype(np.float32), nobody, 0.02) for q in range(queries)]
    return scored, query_features, corpus_features


def test_student_learns_what_untuned_features_do_not_show(tmp_path: Path):
    """On new queries the student must follow the teacher better than its own starting point does."""
    scored, query_features, corpus_features = planted(120, 300, 16)
    config = DistillConfig(
        student=StudentConfig(embed_dim=16, hidden=(64,)),
        images_per_step=100,
        training=TrainingConfig(steps=150, batch_size=16, learning_rate=3e-3, warmup_steps=5, ema_decay=0.95),
    )
    table = make_table(labels_of(scored[:100], [np.arange(300)] * 100), corpus_size=300)
    student = distill(table, query_features[:100], corpus_features, config, checkpoint=tmp_path / "c.safetensors")
    learned = embed(student, query_features[100:]) @ embed(student, corpus_features).T
    untuned = query_features[100:] @ corpus_features.T
    teacher = np.stack([query.influence for query in scored[100:]])
    gains = [spearman(mine, real) - spearman(raw, real) for mine, raw, real in zip(learned, untuned, teacher, strict=True)]
    assert np.mean(gains) > 0.1


@pytest.mark.parametrize("width", [12, 200])
def test_untrained_student_keeps_the_features_cosines(width: int):
    """Its starting point must be the untuned ranking, not a random one, also where features are wider than they are many."""
    features = unit(np.random.default_rng(10), 60, width)
    student = Student(width, StudentConfig(embed_dim=min(60, width), hidden=(8,)))
    student.start_from(features)
    vectors = embed(student, features)
    np.testing.assert_allclose(vectors @ vectors.T, features @ features.T, atol=1e-5)


def test_saved_student_loads_strictly(tmp_path: Path):
    """A missing weight that stays random ranks at random."""
    torch.manual_seed(0)
    config = StudentConfig(embed_dim=4, hidden=(8,))
    student = Student(6, config)
    save_student(student, tmp_path / "model.safetensors")
    features = unit(np.random.default_rng(11), 5, 6)
    again = load_student(tmp_path / "model.safetensors", feature_dim=6, config=config)
    np.testing.assert_array_equal(embed(student.half().float(), features), embed(again, features))
    with pytest.raises(RuntimeError, match="Missing key"):
        load_student(tmp_path / "model.safetensors", feature_dim=6, config=StudentConfig(embed_dim=4, hidden=(8, 8)))
