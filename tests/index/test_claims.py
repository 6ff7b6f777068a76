"""What an index claims is what it was measured to do; what would spoil it is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastattr import InputError
from fastattr.core.errors import NonFiniteError
from fastattr.core.files import sha256_file
from fastattr.index.build import add_shards, build, build_index, retune
from fastattr.index.choose import IndexConfig
from fastattr.index.files import empty_copy, save_index, write_vectors
from fastattr.index.search import Ranked, Shards, open_ranked
from fastattr.index.tune import exact_neighbours
from tests.tiny import unit

ROWS, DIM = 3000, 64


def random_vectors() -> np.ndarray:
    return unit(np.random.default_rng(0), ROWS, DIM)


def mostly_copies() -> np.ndarray:
    """2,500 of 3,000 rows are equal."""
    rng = np.random.default_rng(0)
    return np.concatenate([np.repeat(unit(rng, 1, DIM), 2500, 0), unit(rng, 500, DIM)])[rng.permutation(ROWS)]


def nearly_copies() -> np.ndarray:
    """100 subjects in 30 versions that differ by less than half precision tells apart."""
    rng = np.random.default_rng(1)
    noisy = np.repeat(unit(rng, 100, DIM), 30, 0) + 1e-4 * rng.standard_normal((ROWS, DIM))
    return (noisy / np.linalg.norm(noisy, axis=1, keepdims=True)).astype(np.float32)


def opened(folder: Path, settings: dict) -> Ranked:
    return open_ranked(folder, settings, {path.name: sha256_file(path) for path in folder.iterdir()})


@pytest.mark.parametrize("corpus", [random_vectors, mostly_copies, nearly_copies])
@pytest.mark.parametrize("factory", ["HNSW32", "HNSW8_SQ8", "PCAR16,Flat", "OPQ8_16,Flat"])
def test_recall_is_claimed_only_as_measured_and_similarities_are_exact(tmp_path, factory, corpus):
    """A factory string that a user names promised 1.0 whatever it found, and gave similarities of shortened vectors."""
    vectors = corpus()
    settings = build(lambda low, high: vectors[low:high], ROWS, DIM, IndexConfig(factory=factory), tmp_path)
    queries = unit(np.random.default_rng(5), 100, DIM)
    similarities, rows = opened(tmp_path, settings).search(queries, 100)
    values = queries @ vectors.T
    least = np.sort(values, axis=1)[:, -100]
    found = np.take_along_axis(values, rows, axis=1)
    tolerance = 1e-3  # of float16, which nearly equal rows don't exceed
    assert settings["recall_of_search"] - (found >= least[:, None] - tolerance).mean() < 0.06
    assert np.abs(similarities - found).max() < (0.02 if "SQ8" in factory else 0.002)


def test_the_search_is_tuned_for_queries_as_they_come(tmp_path):
    """Generated images lie elsewhere than training images: lists that suffice for the corpus may not for them."""
    rng = np.random.default_rng(2)
    centres = unit(rng, 200, DIM)
    noisy = centres[rng.integers(200, size=10_000)] + 0.05 * rng.standard_normal((10_000, DIM))
    vectors = (noisy / np.linalg.norm(noisy, axis=1, keepdims=True)).astype(np.float32)
    queries = unit(rng, 300, DIM)  # between all clusters
    config = IndexConfig(factory="IVF128,SQ4")

    def read(low: int, high: int) -> np.ndarray:
        return vectors[low:high]

    def recall(folder: Path, settings: dict) -> float:
        found = opened(folder, settings).find(queries[200:], 100)[1]
        exact = exact_neighbours(queries[200:], read, len(vectors), 100)[1]
        return float(np.mean([np.isin(true, mine).mean() for mine, true in zip(found, exact, strict=True)]))

    alone = build(read, len(vectors), DIM, config, tmp_path / "alone")
    assert recall(tmp_path / "alone", alone) < 0.945
    tuned = build(read, len(vectors), DIM, config, tmp_path / "tuned", queries=queries[:200])
    assert recall(tmp_path / "tuned", tuned) > 0.945
    assert tuned["recall_of_search"] >= 0.95
    assert tuned["search"]["nprobe"] > alone["search"]["nprobe"]


@pytest.mark.parametrize(
    "factory", ["Flat", "SQ8", "SQ4", "PQ8x4", "RaBitQ", "HNSW16", "IVF16,Flat", "IVF16,SQ4", "PCAR32,IVF16,RaBitQ"]
)
@pytest.mark.parametrize("shard_rows", [0, 500])
def test_rows_left_out_are_never_found_and_all_others_are(tmp_path, factory, shard_rows):
    """An opt-out or a filter that FAISS applies to other rows names whom it must not, and crashes nothing."""
    vectors = random_vectors()[:1200]
    config = IndexConfig(factory=factory, shard_rows=shard_rows)
    ranked = opened(tmp_path, build(lambda low, high: vectors[low:high], 1200, DIM, config, tmp_path))
    queries = unit(np.random.default_rng(4), 5, DIM)
    assert ranked.search(queries, 5, allowed=np.zeros(1200, dtype=bool))[1].shape == (5, 0)
    for share in (0.001, 0.05, 0.6, 1.0):
        allowed = np.random.default_rng(3).random(1200) <= share
        allowed[1134] = True
        rows = ranked.search(queries, 1200, allowed=allowed)[1]
        assert all(sorted(row) == np.flatnonzero(allowed).tolist() for row in rows.tolist())
        some = ranked.search(queries, 20, allowed=allowed)[1]
        assert allowed[some].all()
        assert some.shape == (5, min(20, allowed.sum()))
        exact = np.flatnonzero(allowed)[np.argsort(-(queries @ vectors[allowed].T), axis=1)[:, :20]]
        assert np.mean([np.isin(true, mine).mean() for mine, true in zip(some, exact, strict=True)]) > 0.9


def planted(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def plant(vectors: np.ndarray) -> np.ndarray:
        vectors = vectors.copy()
        vectors[1005, 3] = value
        return vectors

    return plant


@pytest.mark.parametrize("plant", [planted(np.nan), planted(np.inf), planted(-np.inf)])
@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "IVF16,SQ4"])
def test_vectors_that_are_not_finite_are_refused_by_name(tmp_path, factory, plant):
    """One infinite row took the recall of all to 0.0, and 1.0 was claimed."""
    vectors = plant(random_vectors())
    ids = [f"image-{row}" for row in range(ROWS)]
    with pytest.raises(NonFiniteError, match="'image-1005'"):
        build(lambda low, high: vectors[low:high], ROWS, DIM, IndexConfig(factory=factory), tmp_path, image_ids=ids)
    with pytest.raises(NonFiniteError, match="row 1,005"):
        build_index(vectors, factory)


def test_a_query_that_is_not_finite_is_refused(tmp_path):
    """Features of 1e38 overflow in the student; the answer to NaN is any image."""
    vectors = random_vectors()
    ranked = Ranked(Shards([(build_index(vectors, "Flat"), 0)]))
    with pytest.raises(InputError, match="query 1 is not finite"):
        ranked.search(np.stack([vectors[0], np.full(DIM, np.nan, dtype=np.float32)]), 3)


@pytest.mark.parametrize("factory", ["NSG16", "LSH", "IVF16,PQ8x4,RFlat", "HNSW16_PQ8", "IVF16,RQ4x8"])
def test_kinds_that_would_name_removed_images_are_refused(tmp_path, factory):
    """FAISS can't leave rows out of them, or searches them by another measure."""
    with pytest.raises(InputError, match=r"FAISS does not know|removed images must be left out"):
        build(lambda low, high: random_vectors()[low:high], ROWS, DIM, IndexConfig(factory=factory), tmp_path)


def test_an_index_that_grew_in_another_region_serves_it_as_promised(tmp_path):
    """Lists and codes of the old region took the recall of the new one to 0.4; the promise stayed at 0.96."""
    rng = np.random.default_rng(6)
    old = unit(rng, 50, DIM)[rng.integers(50, size=6000)] + 0.1 * rng.standard_normal((6000, DIM))
    new = unit(rng, 1, DIM) + 0.02 * rng.standard_normal((1500, DIM))
    vectors = np.concatenate([old, new]).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    def read(low: int, high: int) -> np.ndarray:
        return vectors[low:high]

    settings = build(read, 6000, DIM, IndexConfig(factory="IVF64,RaBitQ"), tmp_path / "old")
    grown = tmp_path / "grown"
    grown.mkdir()
    save_index(empty_copy(tmp_path / "old" / "index.faiss", settings["index"]), tmp_path / "trained.faiss")
    settings["vectors"] = write_vectors(read, len(vectors), DIM, grown, "index")
    settings["index_shards"] = add_shards(tmp_path / "trained.faiss", read, len(vectors), 0, grown, name="index")
    queries = vectors[6000:6100]
    exact = exact_neighbours(queries, read, len(vectors), 100)[1]

    def recall() -> float:
        found = opened(grown, settings).search(queries, 100)[1]
        return float(np.mean([np.isin(true, mine).mean() for mine, true in zip(found, exact, strict=True)]))

    assert recall() < 0.9
    settings |= retune(grown, settings, read, len(vectors), DIM, parts=[6000])
    assert recall() >= 0.95
    assert 0.95 <= settings["recall_of_search"] <= recall() + 0.02
    assert sorted(path.name for path in grown.iterdir()) == ["index.faiss", "vectors.f16", "vectors.sha256"]


def test_a_restriction_to_a_far_region_finds_its_nearest(tmp_path):
    """The lists nearest to a query hold enough images of another region's edge, not its nearest ones: recall was 0.7."""
    rng = np.random.default_rng(8)
    centres = unit(rng, 300, DIM)
    of = rng.integers(300, size=40_000)
    vectors = centres[of] + 0.06 * rng.standard_normal((40_000, DIM))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    settings = build(lambda low, high: vectors[low:high], len(vectors), DIM, IndexConfig(factory="IVF256,SQ4"), tmp_path)
    ranked = opened(tmp_path, settings)
    allowed = vectors @ centres[0] > np.quantile(vectors @ centres[0], 0.7)
    queries = vectors[vectors @ centres[0] < 0][:20]
    found = ranked.search(queries, 50, allowed=allowed)[1]
    exact = np.argsort(-np.where(allowed, queries @ vectors.T, -9), axis=1)[:, :50]
    assert np.mean([np.isin(true, mine).mean() for mine, true in zip(found, exact, strict=True)]) > 0.95
