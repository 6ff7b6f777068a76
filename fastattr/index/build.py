"""Build an index from a stream of vectors, shard by shard; an interrupted build goes on where it stopped."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from tqdm import tqdm

from fastattr.core.errors import ArtifactMismatchError, InputError
from fastattr.core.files import read_json, write_json
from fastattr.core.stages import fingerprint
from fastattr.index import choose as choosing
from fastattr.index.choose import BUILD_ROWS, TRAINING_ROWS, IndexConfig, coarse_lists, make
from fastattr.index.files import BATCH, Read, cause, is_inverted, reader, require_finite, save_index, write_vectors
from fastattr.index.tune import READ_COST, tune

FEWEST_ROWS = 1000  # an index of fewer rows is not trained again
RETUNED = ("index", "index_shards", "search", "recall_wanted", "recall_of_search")  # what `retune` may change of an index


def build_index(embeddings: np.ndarray, factory: str) -> faiss.Index:
    """An inner-product index of (N, D) float32 unit vectors, in memory; row i has id i; errors as `build`."""
    index = train(make(factory, embeddings.shape[1]), require_finite(embeddings), factory)
    index.add(embeddings)
    return index


def train(index: faiss.Index, embeddings: np.ndarray, factory: str) -> faiss.Index:
    """The index, trained on (n, D) float32 vectors; InputError if they are too few."""
    trained = on_gpu(index)
    try:
        trained.train(embeddings)
    except RuntimeError as error:
        few = f"{len(embeddings)} images are too few to train an index {factory!r}; take 'SQfp16'"
        raise InputError(f"{few}. FAISS says: {cause(error)}") from error
    return off_gpu(trained)


def on_gpu(index: faiss.Index) -> faiss.Index:
    """The index on FAISS's first GPU, or itself where FAISS sees none."""
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index) if faiss.get_num_gpus() else index


def off_gpu(index: faiss.Index) -> faiss.Index:
    """What `on_gpu` gave, back in memory, where it can be written."""
    return faiss.index_gpu_to_cpu(index) if faiss.get_num_gpus() else index


def build(
    read: Read,
    rows: int,
    dim: int,
    config: IndexConfig,
    folder: Path,
    *,
    queries: np.ndarray | None = None,
    image_ids: Sequence[str] = (),
) -> dict[str, Any]:
    """Build an index of N vectors from a stream into a folder, shard by shard; done again, it goes on where it stopped.

    `read` gives the (rows, dim) vectors, some of them twice; `queries` are (Q, D) embeddings of queries as they come, for
    whose recall the search is tuned, too; `image_ids` name images in errors. Returns what config.json says of it: 'index'
    (factory), 'index_shards', 'vectors', 'search', 'recall_wanted', 'recall_of_search' (measured).

    Raises DoesNotFitError (memory or disk), InputError (unknown kind, too few vectors), ArtifactMismatchError (the folder holds
    a half-built index with other settings) or NonFiniteError.
    """

    def finite(start: int, stop: int) -> np.ndarray:
        return require_finite(read(start, stop), image_ids[start:stop], first=start)

    factory, recall = config.factory, config.recall
    if factory == choosing.AUTO:
        memory = config.memory_gb * 1e9 or choosing.available_memory() / 2
        factory = choosing.choose(rows, dim, recall=recall, memory=memory)
    choosing.require_room(rows, dim, factory, folder, config)
    work = folder / ".build"
    work.mkdir(parents=True, exist_ok=True)
    identity = fingerprint([factory, rows, dim, config.shard_rows, finite(0, min(rows, 8)).round(4).tolist()])
    if (work / "identity.json").exists() and read_json(work / "identity.json") != identity:
        raise ArtifactMismatchError(f"{work} holds a half-built index of something else; remove it to build anew.")
    write_json(work / "identity.json", identity)
    vectors = write_vectors(finite, rows, dim, folder, "index") if choosing.keeps_vectors(make(factory, dim)) else None
    stream = reader(folder / vectors["file"], dim) if vectors else finite
    trained = _train_on_sample(stream, rows, factory, dim, work / "trained.faiss")
    shards = add_shards(trained, stream, rows, config.shard_rows, folder)
    settings: dict[str, Any] = {"index": factory, "index_shards": shards, "vectors": vectors}
    settings |= tune(folder, settings, stream, rows, recall=recall, queries=queries)
    shutil.rmtree(work)
    return settings


def retune(
    folder: Path, settings: dict[str, Any], read: Read, rows: int, dim: int, *, name: str = "index", parts: Sequence[int] = ()
) -> dict[str, Any]:
    """Tune the search of an index whose rows are no longer those that it was trained on; train it anew where that is better.

    Settings are what config.json says. `parts` are first rows of regions that must be served as promised, too, such as the
    images added last. Returns the settings of `RETUNED`; files may be replaced.
    """
    recall = float(settings.get("recall_wanted", IndexConfig.recall))
    kept = {key: settings[key] for key in ("index", "index_shards", "vectors")}
    kept |= tune(folder, kept, read, rows, recall=recall, parts=parts)
    longest = 2 * _effort(settings, rows) if settings.get("search") else math.inf
    served = kept["recall_of_search"] >= recall and _effort(kept, rows) <= longest
    if served or make(kept["index"], dim).is_trained or rows < FEWEST_ROWS:
        return {key: kept[key] for key in RETUNED}
    work = folder / ".build"
    work.mkdir(exist_ok=True)
    own, lists = re.search(r"IVF(\d+)", kept["index"]), coarse_lists(rows)
    far = own is not None and not lists / 4 < int(own[1]) < lists * 4  # from the lists that `choose` would take
    fresh = {**kept, "index": kept["index"].replace(own[0], f"IVF{lists}") if own and far else kept["index"]}
    trained = _train_on_sample(read, rows, fresh["index"], dim, work / "trained-again.faiss")
    size = int(kept["index_shards"][0]["rows"]) if len(kept["index_shards"]) > 1 else 0
    fresh["index_shards"] = add_shards(trained, read, rows, size, work, name=name)
    fresh |= tune(work, fresh, read, rows, recall=recall, parts=parts)
    worth = [(min(each["recall_of_search"], recall), -_effort(each, rows)) for each in (fresh, kept)]
    if worth[0] > worth[1]:
        for shard in fresh["index_shards"]:
            (work / shard["file"]).replace(folder / shard["file"])
    shutil.rmtree(work)
    return {key: (fresh if worth[0] > worth[1] else kept)[key] for key in RETUNED}


def _effort(settings: dict[str, Any], rows: int) -> float:
    """Codes that a search compares, vectors that it reads counted as so many codes as take the same time."""
    search, lists = settings["search"], re.findall(r"IVF(\d+)", settings["index"])
    looked_at = search["nprobe"] * rows / int(lists[0]) if lists else float(search.get("neighbours", 0))
    return looked_at + READ_COST * (search["shortlist"] if settings["vectors"] else 0)


def add_shards(
    trained: Path, read: Read, rows: int, shard_rows: int, folder: Path, *, name: str = "index"
) -> list[dict[str, Any]]:
    """Add N vectors to copies of the empty index in the file `trained`, `shard_rows` (0: all) to a file in `folder`.

    Shards that are there are left alone. Returns 'file', 'first_row' and 'rows' of each; 'own_ids' where rows are counted
    over the whole index.
    """
    inverted = is_inverted(faiss.read_index(str(trained)))
    size = shard_rows or (BUILD_ROWS if inverted else rows)
    starts = range(0, rows, size)
    listed = []
    for number, start in enumerate(tqdm(starts, desc="index", unit="shard", disable=len(starts) == 1)):
        stop = min(start + size, rows)
        file = f"{name}.faiss" if len(starts) == 1 else f"{name}-{number:05d}-of-{len(starts):05d}.faiss"
        if not (folder / file).exists():
            shard = on_gpu(faiss.read_index(str(trained)))
            for first in range(start, stop, BATCH):
                batch = read(first, min(first + BATCH, stop))
                if inverted:
                    shard.add_with_ids(batch, np.arange(first, first + len(batch)))
                else:
                    shard.add(batch)
            save_index(off_gpu(shard), folder / file)
        listed.append({"file": file, "first_row": start, "rows": stop - start} | ({"own_ids": True} if inverted else {}))
    return listed


def _train_on_sample(read: Read, rows: int, factory: str, dim: int, path: Path) -> Path:
    """The file of an empty index trained on vectors that are drawn over the whole corpus."""
    if path.exists():
        return path
    index = make(factory, dim)
    if not index.is_trained:
        lists = int(faiss.extract_index_ivf(index).nlist) if is_inverted(index) else 1024
        blocks = np.array_split(np.arange(rows), max(1, rows // 4096))
        wanted = min(rows, max(TRAINING_ROWS // 4, min(TRAINING_ROWS, 40 * lists)))
        each = math.ceil(wanted / len(blocks))
        parts = []
        for number, block in enumerate(tqdm(blocks, desc="training vectors", unit="block", disable=len(blocks) < 100)):
            picked = np.random.default_rng([0, number]).permutation(len(block))[:each]
            parts.append(read(int(block[0]), int(block[-1]) + 1)[np.sort(picked)])
        index = train(index, np.concatenate(parts)[: max(wanted, 1)], factory)
    save_index(index, path)
    return path
