"""Calibration, shares, own or foreign: on data whose truth is known, and on the tiny line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from fastattr import ArtifactDamagedError, Attribution, FastAttributor, InputError
from fastattr.attributor.folder import seal
from fastattr.core.files import sha256_file
from fastattr.corpus.store import Corpus
from fastattr.features.store import folders, read_features
from fastattr.pipeline.config import load_config
from fastattr.pipeline.stages import STAGES
from fastattr.students.calibrate import fit_calibration
from fastattr.students.calibration import (
    FILE,
    Calibration,
    corpus_weights,
    fit_curves,
    load_calibration,
    relative_influence,
    save_calibration,
    teacher_percentiles,
)
from fastattr.students.distill import open_student
from fastattr.students.ownness import fit_ownness
from fastattr.students.shares import divide, teacher_shares
from fastattr.students.student import embed
from fastattr.teachers.scores import ScoredQuery
from tests.tiny import draw

CORPUS = 3000


def world(seed: int, queries: int, *, neighbours: int = 0, outsiders: int = 0) -> tuple[list[np.ndarray], list[ScoredQuery]]:
    """Similarities of a corpus of 3,000, and influence that rises with them, noisily; the whole corpus, or a table's part."""
    rng = np.random.default_rng(seed)
    similarities, scored = [], []
    for query in range(queries):
        similarity = rng.beta(2, 5, CORPUS)
        influence = (np.exp(6 * similarity) * rng.standard_exponential(CORPUS) - 3).astype(np.float32)
        is_outsider = np.zeros(CORPUS, dtype=bool)
        if neighbours:
            order = np.argsort(-similarity)
            drawn = rng.choice(order[neighbours:], outsiders, replace=False)
            kept = np.concatenate([order[:neighbours], drawn])
            is_outsider = np.arange(len(kept)) >= neighbours
            similarity, influence = similarity[kept], influence[kept]
        similarities.append(similarity)
        ids = [str(number) for number in range(len(similarity))]
        scored.append(ScoredQuery(str(query), "", "validation", ids, influence, is_outsider, 0.0))
    return similarities, scored


def flat(values: float, *, influence: tuple[float, float], widening: float = 1.0) -> Calibration:
    """A calibration with two knots and no uncertainty of its curve."""
    curve = np.array(influence)
    return Calibration(
        knots=np.array([0.0, 1.0]),
        percentile=np.array([0.0, 100.0]),
        influence=curve,
        influence_draws=np.repeat(curve[None].astype(np.float32), 100, axis=0),
        unrelated=np.full(101, values),
        level=np.full(101, values),
        queries=50,
        widening=widening,
        feature_mean=np.zeros(2, np.float32),
        ownness=None,
    )


def test_weights_stand_for_the_whole_corpus():
    """Outsiders counted once each would make the corpus look as if it were all neighbours."""
    weights = corpus_weights(np.array([False, False, True, True]), 100)
    assert weights.tolist() == [1, 1, 49, 49]
    assert corpus_weights(np.zeros(4, dtype=bool), 4).tolist() == [1, 1, 1, 1]


def test_percentiles_equal_a_slow_loop():
    """100 must be the most influential, and equal scores alike."""
    rng = np.random.default_rng(0)
    influence, weights = rng.integers(0, 9, 40).astype(float), rng.random(40)
    slow = [
        100 * (weights[influence < value].sum() + weights[influence == value].sum() / 2) / weights.sum() for value in influence
    ]
    np.testing.assert_allclose(teacher_percentiles(influence, weights), slow)


def test_a_table_of_neighbours_and_outsiders_gives_the_curve_of_the_whole_corpus():
    """Without the outsiders' weights 'percentile 50' would be the middle of the neighbours, near the top of the corpus."""
    whole = fit_curves(*world(1, 60), corpus_size=CORPUS, resamples=10, seed=0)
    table = fit_curves(*world(1, 60, neighbours=400, outsiders=100), corpus_size=CORPUS, resamples=10, seed=0)
    asked = np.linspace(0.1, 0.7, 20)
    for name, tolerance in (("percentile", 3.0), ("influence", 0.1)):
        first, second = (np.interp(asked, curves["knots"], curves[name]) for curves in (whole, table))
        np.testing.assert_allclose(first, second, atol=tolerance, rtol=0.1)


def test_percentiles_are_what_held_out_queries_have():
    """A calibration that is only monotone could be off by any amount."""
    curves = fit_curves(*world(2, 60), corpus_size=CORPUS, resamples=10, seed=0)
    similarities, scored = world(3, 60)
    expected = np.interp(np.concatenate(similarities), curves["knots"], curves["percentile"])
    found = np.concatenate([teacher_percentiles(query.influence, np.ones(CORPUS)) for query in scored])
    for low, high in ((0, 30), (30, 60), (60, 90), (90, 100)):
        inside = (expected >= low) & (expected < high)
        assert found[inside].mean() == pytest.approx(expected[inside].mean(), abs=2)


def test_intervals_hold_the_shares_of_queries_that_took_no_part():
    """Too narrow an interval names a dominant source where there is none."""
    names = np.random.default_rng(9).choice(np.array(list("abcdefgh")), CORPUS)
    families = np.arange(CORPUS)
    similarities, scored = world(4, 40)
    calibration = fit_calibration(
        similarities,
        scored,
        [names] * 40,
        [families] * 40,
        corpus_size=CORPUS,
        feature_mean=np.zeros(2),
        ownness=None,
    )
    held = []
    for similarity, query in zip(*world(5, 40), strict=True):
        found = divide(calibration, similarity, names, families, weights=np.ones(CORPUS), level=np.zeros(201))
        _, actual = teacher_shares(query.influence, np.ones(CORPUS), names)
        held.append((found.low <= actual) & (actual <= found.high))
    assert 0.88 < np.mean(held) <= 1
    assert (found.high - found.low).max() < 0.2  # and not by saying nothing


def test_save_then_load_changes_nothing_and_damage_is_refused(tmp_path: Path):
    """A curve that falls would call a nearer image less influential."""
    features = np.random.default_rng(0).standard_normal((80, 6)).astype(np.float32)
    curves = fit_curves(*world(6, 12), corpus_size=CORPUS, resamples=20, seed=0)
    image = np.arange(6) < 3
    checks = {"measures": np.ones((3, 4)), "captions": ["red ring"], "false_alarms": 0.1}
    ownness = fit_ownness(features, features, image=image, text=~image, **checks)
    ours = Calibration(**curves, widening=1.5, feature_mean=features.mean(axis=0), ownness=ownness)
    save_calibration(ours, tmp_path / FILE)
    theirs = load_calibration(tmp_path / FILE, feature_dim=6)
    similarity = np.linspace(-1, 1, 50)
    np.testing.assert_array_equal(theirs.percentile_of(similarity), ours.percentile_of(similarity))
    np.testing.assert_allclose(theirs.draws_of(similarity), ours.draws_of(similarity), rtol=1e-6)
    assert theirs.ownness.doubts(features, ["ring"] * 80) == ours.ownness.doubts(features, ["ring"] * 80)
    with pytest.raises(ArtifactDamagedError, match="width 7"):
        load_calibration(tmp_path / FILE, feature_dim=7)
    tensors = load_file(tmp_path / FILE)
    assert (theirs.queries, theirs.level.tolist()) == (12, ours.level.tolist())
    bad = {
        "percentile": tensors["percentile"][::-1].copy(),
        "more": np.zeros(1),
        "level": tensors["level"][:-1].copy(),
        "match.more": np.zeros(1),
    }
    for name, value in bad.items():
        save_file({**tensors, name: value}, tmp_path / "bad", metadata={"format": "fastattr calibration 2"})
        with pytest.raises(ArtifactDamagedError):
            load_calibration(tmp_path / "bad", feature_dim=6)


def test_a_calibration_of_format_1_is_read(tmp_path: Path):
    """Attributors on people's disks say nothing of the level of unrelated images, nor of the number of queries."""
    curves = fit_curves(*world(6, 12), corpus_size=CORPUS, resamples=20, seed=0)
    ours = Calibration(**curves, widening=1.5, feature_mean=np.zeros(6), ownness=None)
    save_calibration(ours, tmp_path / FILE)
    old = {name: value for name, value in load_file(tmp_path / FILE).items() if name not in {"level", "queries"}}
    save_file(old, tmp_path / FILE, metadata={"format": "fastattr calibration 1"})
    theirs = load_calibration(tmp_path / FILE, feature_dim=6)
    np.testing.assert_array_equal(theirs.influence, ours.influence)
    assert theirs.queries == 0
    half_normal = np.abs(np.random.default_rng(0).standard_normal(400_000)) * (np.arange(400_000) % 2)
    assert theirs.level[0] / theirs.unrelated[0] == pytest.approx(np.quantile(half_normal, 0.99) / half_normal.mean(), rel=0.01)
    save_file(old, tmp_path / FILE, metadata={"format": "fastattr calibration 2"})
    with pytest.raises(ArtifactDamagedError):
        load_calibration(tmp_path / FILE, feature_dim=6)


def test_draws_at_a_similarity_equal_interpolation_of_each_draw():
    """The curve and its uncertainty must be read at the same place."""
    curves = fit_curves(*world(7, 10), corpus_size=CORPUS, resamples=10, seed=0)
    calibration = Calibration(**curves, widening=1.0, feature_mean=np.zeros(1), ownness=None)
    asked = np.linspace(-0.5, 1.5, 200)
    slow = [np.interp(asked, curves["knots"], draw) for draw in curves["influence_draws"]]
    np.testing.assert_allclose(calibration.draws_of(asked), slow, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def attributor(tiny_run: Path) -> FastAttributor:
    return FastAttributor.from_pretrained(tiny_run / "attributor")


def test_parts_add_up_to_the_similarity_and_are_shapley_values(tiny_run: Path, attributor: FastAttributor):
    """'The words did it' must not depend on which of the two is taken away first."""
    answer = attributor.attribute(draw("red", "circle", "plain"), "red circle, plain style", k=9)
    assert isinstance(answer, Attribution)
    for row in answer.results:
        assert row.image_part + row.text_part == pytest.approx(row.similarity, abs=1e-5)
        assert 0 <= row.percentile <= 100
    percentiles = [row.percentile for row in answer.results]
    assert percentiles == sorted(percentiles, reverse=True)

    corpus, student = Corpus(tiny_run / "corpus"), open_student(tiny_run)
    features = read_features(folders(tiny_run, "features", attributor.config["encoders"]), corpus.image_ids)
    mean, query = features.mean(axis=0), features[5]
    width = attributor.config["feature_blocks"][0]["width"]
    values = {}
    for image in (False, True):
        for text in (False, True):
            seen = np.concatenate([(query if image else mean)[:width], (query if text else mean)[width:]])
            own = embed(student, features[[3]])
            values[image, text] = float((embed(student, seen[None]) @ own.T)[0, 0])
    found = attributor.attribute_features(query[None], ["x"], k=48)[0].results
    row = next(result for result in found if result.image_id == corpus.image_ids[3])
    nothing = values[False, False]
    first = values[True, False] - nothing, values[True, True] - values[False, True]
    assert row.image_part == pytest.approx(sum(first) / 2 + nothing / 2, abs=0.02)  # the index keeps half precision


def test_plain_similarity_is_the_cosine_of_the_untuned_features(tiny_run: Path, attributor: FastAttributor):
    """Offered as a comparison, it must not be the student's answer under another name."""
    corpus = Corpus(tiny_run / "corpus")
    features = read_features(folders(tiny_run, "features", attributor.config["encoders"]), corpus.image_ids)
    image, caption = corpus.image(7), corpus.captions[7][0]
    answer = attributor.plain(image, caption, k=48)
    assert isinstance(answer, Attribution)
    assert answer.results[0].image_id == corpus.image_ids[7]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = dict(zip(corpus.image_ids, unit @ unit[7], strict=True))
    for row in answer.results:
        assert row.similarity == pytest.approx(expected[row.image_id], abs=1e-3)  # features are kept in half precision
        assert row.image_part + row.text_part == pytest.approx(row.similarity, abs=1e-5)
        assert row.percentile is None
    assert answer.model["method"] == "plain similarity"


def test_an_attributor_without_calibration_still_answers(tiny_run: Path, tmp_path: Path):
    """Attributors that were made before there was one are on people's disks."""
    copy = tmp_path / "attributor"
    shutil.copytree(tiny_run / "attributor", copy)
    config = json.loads((copy / "config.json").read_text())
    for file in (FILE, "plain.faiss"):
        (copy / file).unlink()
        del config["sha256"][file]
    del config["feature_blocks"]
    for name in ("linear_path", "separate_heads", "popularity", "dropout"):
        config["student"].pop(name, None)
    (copy / "config.json").write_text(json.dumps(seal(config)))
    old = FastAttributor.from_pretrained(copy)
    answer = old.attribute(draw("red", "circle", "plain"), "red circle", k=5)
    assert isinstance(answer, Attribution)
    assert [row.percentile for row in answer.results] == [None] * 5
    assert answer.results[0].image_part is None
    assert answer.shares()["high"].isna().all()
    with pytest.raises(InputError, match="holds no index of untuned features"):
        old.plain(draw("red", "circle", "plain"), "red circle", k=5)


def test_a_damaged_calibration_is_refused(tiny_run: Path, tmp_path: Path):
    """Wrong percentages look as trustworthy as right ones."""
    copy = tmp_path / "attributor"
    shutil.copytree(tiny_run / "attributor", copy)
    data = bytearray((copy / FILE).read_bytes())
    data[-8] ^= 1
    (copy / FILE).write_bytes(bytes(data))
    with pytest.raises(ArtifactDamagedError, match=FILE):
        FastAttributor.from_pretrained(copy)


def test_test_queries_play_no_part_in_the_calibration(tiny_run: Path, tiny_config: Path, tmp_path: Path):
    """Fitted on what it is judged by, any calibration looks good."""
    again = tmp_path / "run"
    shutil.copytree(tiny_run, again)
    shutil.rmtree(again / "calibration")
    for path in (again / "scores").glob("test-*.parquet"):
        table = pq.read_table(path)
        garbage = pa.array([[7.0] * len(row) for row in table["influence"].to_pylist()], pa.list_(pa.float32()))
        pq.write_table(table.set_column(table.column_names.index("influence"), "influence", garbage), path)
    STAGES["calibrate"](load_config(tiny_config), again)
    assert sha256_file(again / "calibration" / FILE) == sha256_file(tiny_run / "calibration" / FILE)


def test_relative_influence_has_mean_one_and_no_negatives():
    """A unit that differs between queries would let one query set the curve."""
    weights = np.array([1.0, 1.0, 8.0])
    values = relative_influence(np.array([3.0, -5.0, 1.0]), weights)
    assert (values * weights).sum() / weights.sum() == pytest.approx(1)
    assert values[1] == 0
    assert relative_influence(np.array([-1.0, -2.0]), np.ones(2)).tolist() == [0, 0]
