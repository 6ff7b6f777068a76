"""fastattr/index: what is chosen fits and reaches its recall, builds resume, exact re-ranking equals a slow loop."""

from __future__ import annotations

import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest

from fastattr import ArtifactDamagedError, ArtifactMismatchError, InputError
from fastattr.core.errors import DoesNotFitError
from fastattr.core.files import sha256_file
from fastattr.index import build as building, choose as choosing, files as storing
from fastattr.index.build import build
from fastattr.index.choose import IndexConfig, choose, estimate, keeps_vectors, make
from fastattr.index.files import Read
from fastattr.index.search import Ranked, open_ranked, rerank
from fastattr.index.tune import exact_neighbours, recall_of
from tests.tiny import unit

DIM = 16


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Unit vectors in clusters, as embeddings are."""
    rng = np.random.default_rng(0)
    noisy = unit(rng, 30, DIM)[rng.integers(30, size=3000)] + 0.3 * rng.standard_normal((3000, DIM))
    return (noisy / np.linalg.norm(noisy, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(autouse=True)
def short_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shards, and training sets that are enough for small indexes."""
    for module in (building, choosing):
        monkeypatch.setattr(module, "BUILD_ROWS", 1100)
        monkeypatch.setattr(module, "TRAINING_ROWS", 1500)
    for module in (building, choosing, storing):
        monkeypatch.setattr(module, "BATCH", 256)


def opened(folder: Path, settings: dict, numbers: list[int] | None = None) -> Ranked:
    return open_ranked(folder, settings, {path.name: sha256_file(path) for path in folder.iterdir()}, numbers)


def reader(vectors: np.ndarray) -> Read:
    return lambda start, stop: vectors[start:stop]


@pytest.mark.parametrize(
    "factory",
    ["Flat", "SQfp16", "SQ8", "HNSW16", "HNSW16_SQ8", "IVF16,SQ4", "IVF16,RaBitQ", "PCAR14,IVF16,SQ4", "IVF16,Flat", "SQ4"],
)
@pytest.mark.parametrize("shard_rows", [0, 1000])
def test_every_kind_finds_what_it_promises(tmp_path, vectors, factory, shard_rows):
    """A list of one shard read with another's rows, or a short list never ranked again, lowers recall and crashes nothing."""
    settings = build(reader(vectors), len(vectors), DIM, IndexConfig(factory=factory, shard_rows=shard_rows), tmp_path)
    ranked = opened(tmp_path, settings)
    queries = vectors[::100] + 0.01
    exact = exact_neighbours(queries, reader(vectors), len(vectors), 20)
    similarities, rows = ranked.search(queries, 20)
    assert ranked.ntotal == len(vectors)
    assert recall_of(rows, exact[1]) > 0.9
    if keeps_vectors(make(factory, DIM)):
        expected = np.einsum("qd,qkd->qk", queries, vectors[rows])
        np.testing.assert_allclose(similarities, expected, atol=2e-3)
        assert settings["recall_of_search"] >= 0.95
    assert (np.diff(similarities, axis=1) <= 0).all()
    assert sum(shard["rows"] for shard in settings["index_shards"]) == len(vectors)


def test_exact_neighbours_equal_a_full_sort(vectors):
    """It is what recall is measured against."""
    similarities, rows = exact_neighbours(vectors[:5], reader(vectors), len(vectors), 7)
    expected = np.argsort(-(vectors[:5] @ vectors.T), axis=1)[:, :7]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(similarities, np.take_along_axis(vectors[:5] @ vectors.T, expected, axis=1), atol=1e-6)


def test_reranking_equals_a_slow_loop(vectors):
    """Missing rows (-1) must come last, and never be read as the last row."""
    queries = vectors[:3]
    short = np.array([[5, 9, -1, 20], [7, -1, -1, 3], [1, 2, 3, 4]])
    similarities, rows = rerank(queries, short, lambda wanted: vectors[wanted], 3)
    for query, candidates, found, values in zip(queries, short, rows, similarities, strict=True):
        order = sorted((row for row in candidates if row >= 0), key=lambda row: -float(vectors[row] @ query))
        order = (order + [-1] * 3)[:3]
        assert found.tolist() == order
        np.testing.assert_allclose(values, [float(vectors[row] @ query) if row >= 0 else -np.inf for row in order], rtol=1e-5)


@pytest.mark.parametrize("stop_after", ["vectors", "one shard"])
def test_an_interrupted_build_goes_on_and_gives_the_same(tmp_path, vectors, monkeypatch, stop_after):
    """Hours of building must not start anew; a shard left half-written must not be taken for a whole one."""
    config = IndexConfig(factory="IVF16,SQ4", shard_rows=900)
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    expected = build(reader(vectors), len(vectors), DIM, config, whole)
    saved, calls = building.save_index, []

    def failing(built: faiss.Index, path: Path) -> None:
        calls.append(path.name)
        if len(calls) > {"vectors": 0, "one shard": 2}[stop_after]:
            raise KeyboardInterrupt
        saved(built, path)

    with monkeypatch.context() as patch:
        patch.setattr(building, "save_index", failing)
        with pytest.raises(KeyboardInterrupt):
            build(reader(vectors), len(vectors), DIM, config, halved)
    with pytest.raises(ArtifactMismatchError, match="half-built"):
        build(reader(vectors[::-1]), len(vectors), DIM, config, halved)
    reads = []

    def counted(start: int, stop: int) -> np.ndarray:
        reads.append(start)
        return vectors[start:stop]

    assert build(counted, len(vectors), DIM, config, halved) == expected
    assert len(reads) < 3  # the vectors were on the disk
    for path in whole.iterdir():
        assert sha256_file(path) == sha256_file(halved / path.name)
    assert not (halved / ".build").exists()


def test_part_of_the_shards_finds_its_part_only(tmp_path, vectors):
    """Rows are counted over the whole index, whichever shards are there."""
    settings = build(reader(vectors), len(vectors), DIM, IndexConfig(factory="IVF16,SQ4", shard_rows=1000), tmp_path)
    rows = opened(tmp_path, settings, [1]).search(vectors[1500:1501], 5)[1]
    assert rows[0, 0] == 1500
    assert ((rows >= 1000) & (rows < 2000)).all()


@pytest.mark.parametrize(("rows", "dim"), [(1000, 128), (100_000, 128), (1_000_000, 768), (400_000_000, 768)])
def test_what_is_chosen_fits_the_memory_given(rows, dim):
    """A choice that does not fit is found out after hours."""
    best = choose(rows, dim)
    needed = estimate(rows, dim, best).memory
    assert choose(rows, dim, memory=needed) == best
    smaller = choose(rows, dim, memory=needed - 1)
    assert estimate(rows, dim, smaller).memory < needed
    with pytest.raises(DoesNotFitError, match=r"GB.*Milvus"):
        choose(rows, dim, memory=rows)
    assert "SQfp16" in choose(rows, dim, recall=1.0)


@pytest.mark.parametrize("factory", ["SQfp16", "SQ8", "Flat", "HNSW16", "IVF16,SQ4", "IVF16,RaBitQ", "PCAR14,IVF16,SQ4"])
def test_estimates_are_what_the_files_have(tmp_path, vectors, factory):
    """The refusal to build rests on them."""
    settings = build(reader(vectors), len(vectors), DIM, IndexConfig(factory=factory, shard_rows=len(vectors)), tmp_path)
    expected = estimate(len(vectors), DIM, factory, shard_rows=len(vectors))
    on_disk = sum(path.stat().st_size for path in tmp_path.iterdir())
    in_memory = on_disk - (tmp_path / settings["vectors"]["file"]).stat().st_size if settings["vectors"] else on_disk
    assert expected.memory == pytest.approx(in_memory, rel=0.1)
    assert expected.disk == pytest.approx(on_disk, rel=0.1)


def test_a_build_that_does_not_fit_is_refused_with_figures(tmp_path, vectors, monkeypatch):
    """Out of memory after hours, or a full disk, helps nobody."""
    monkeypatch.setattr(choosing, "available_memory", lambda: 50_000)
    with pytest.raises(DoesNotFitError, match=r"'Flat' of 3,000 x 16 takes 0\.\d+ GB of memory.*Alternatives: SQfp16"):
        build(reader(vectors), len(vectors), DIM, IndexConfig(factory="Flat"), tmp_path)
    monkeypatch.setattr(choosing, "available_memory", lambda: 10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(DoesNotFitError, match="of disk"):
        build(reader(vectors), len(vectors), DIM, IndexConfig(factory="Flat"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_too_few_images_or_an_unknown_kind_are_said_so(tmp_path, vectors):
    """FAISS's own words name a line of its source."""
    with pytest.raises(InputError, match="too few to train"):
        build(reader(vectors), 10, DIM, IndexConfig(factory="IVF64,SQ4"), tmp_path / "a")
    with pytest.raises(InputError, match="does not know"):
        build(reader(vectors), 10, DIM, IndexConfig(factory="Hnsw_of_a_kind"), tmp_path / "b")


def test_a_gpu_is_used_where_there_is_one(tmp_path, vectors, monkeypatch):
    """Without one here, only that FAISS is asked, and that what it gives back is saved."""
    moved = []
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: "resources", raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda resources, number, cpu: moved.append("to") or cpu, raising=False)
    monkeypatch.setattr(faiss, "index_gpu_to_cpu", lambda gpu: moved.append("back") or gpu, raising=False)
    settings = build(reader(vectors), len(vectors), DIM, IndexConfig(factory="IVF16,SQ4", shard_rows=1500), tmp_path)
    assert moved == ["to", "back", "to", "back", "to", "back"]  # training, and two shards
    assert opened(tmp_path, settings).search(vectors[7:8], 1)[1].tolist() == [[7]]


def test_as_many_are_found_as_are_asked_for(tmp_path, vectors):
    """More images may be asked for than the usual lists hold."""
    settings = build(reader(vectors), len(vectors), DIM, IndexConfig(factory="IVF16,SQ4"), tmp_path)
    ranked = opened(tmp_path, settings)
    assert (ranked.find(vectors[:2], len(vectors))[1] >= 0).sum() < 2 * len(vectors)
    rows = ranked.search(vectors[:2], len(vectors) + 5)[1]
    assert all(sorted(row) == list(range(len(vectors))) for row in rows.tolist())


def test_an_index_of_other_rows_is_refused(tmp_path, vectors):
    """Fewer rows than the catalogue would shift names."""
    settings = build(reader(vectors), len(vectors), DIM, IndexConfig(factory="Flat"), tmp_path)
    settings["index_shards"][0]["rows"] += 1
    with pytest.raises(ArtifactDamagedError, match="holds 3000 rows, expected 3001"):
        opened(tmp_path, settings)
