"""Pairs: score tables and features as memory-mapped arrays, and blocks of them in which every pair is used.

A block takes some queries and some training images; each passes through the student once, and each pair whose score the table
holds is a label. Outsiders of the table are labelled worst. Source of the latter: arXiv:2511.10721, sec. 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from fastattr.core.errors import InputError
from fastattr.core.files import read_json, write_json
from fastattr.core.stages import open_stage
from fastattr.features.store import require_rows
from fastattr.teachers.scores import ScoredQuery, ranks_of

TARGETS = ("ranks", "scores")

Labels = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of one query: (C,) rows of the corpus, (C,) influence, (C,) is_outsider."""


def targets_of(influence: np.ndarray, is_outsider: np.ndarray) -> np.ndarray:
    """(C,) float32 targets of one query's candidates with (C,) scores and is_outsider.

    1 for the most influential, falling towards 0 for the least; outsiders have 0.
    """
    closeness = 1.0 - ranks_of(influence) / len(influence)
    return np.where(is_outsider, 0.0, closeness).astype(np.float32)


def standardised(influence: np.ndarray) -> np.ndarray:
    """(C,) float64 scores with mean 0 and standard deviation 1; zeros if they are all alike."""
    ranks_of(influence)  # refuses scores that are not finite
    values = influence.astype(np.float64)
    spread = values.std()
    return (values - values.mean()) / (spread if spread > 0 else 1.0)


@dataclass(frozen=True)
class PairTable:
    """What a teacher says of Q queries' pairs with N training images, as targets of a loss."""

    rows: np.ndarray
    """(Q, C) int32 rows of the corpus, -1 behind the last where a query has fewer."""
    targets: np.ndarray
    """(Q, C) float32."""
    corpus_size: int
    """N."""

    def __len__(self) -> int:
        return len(self.targets)

    def draw(self, queries: np.ndarray, count: int, generator: torch.Generator) -> np.ndarray:
        """At most `count` distinct rows of the corpus, rising, drawn from pairs of these queries that the table holds.

        An image is the likelier to be drawn the more of them have it as a candidate, so that blocks are well filled.
        """
        width = self.rows.shape[1]
        total = len(queries) * width
        if total > 8 * count:
            places = torch.randint(total, (2 * count,), generator=generator).numpy()
        else:
            places = torch.randperm(total, generator=generator).numpy()
        found = self.rows[queries[places // width], places % width]
        _, first = np.unique(found, return_index=True)
        distinct = found[np.sort(first)]
        return np.sort(distinct[distinct >= 0][:count])

    def block(self, queries: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, M) float32 targets of all pairs of (B,) rows of the table and (M,) distinct rows of the corpus.

        0 where nothing is known; with them (B, M) bool, where something is.
        """
        place = np.full(self.corpus_size + 1, len(images))  # padding, and images not asked for: a column that is cut off
        place[images] = np.arange(len(images))
        columns = place[self.rows[queries]]
        targets = np.zeros((len(queries), len(images) + 1), dtype=np.float32)
        known = np.zeros(targets.shape, dtype=bool)
        np.put_along_axis(targets, columns, np.asarray(self.targets[queries]), axis=1)
        np.put_along_axis(known, columns, True, axis=1)
        return targets[:, :-1], known[:, :-1]


def make_table(
    labels: Callable[[], Iterable[Labels]], *, corpus_size: int, kind: str = "ranks", folder: Path | None = None
) -> PairTable:
    """Turn scores into a table of targets.

    `labels` gives the queries in order, as often as it is called. `kind` is 'ranks' (1 for the first, outsiders 0) or 'scores'
    (standardised). The table is written to `folder`, to be mapped into memory; None keeps it there. InputError if there is no
    query, or the kind is unknown; NonFiniteError if a score is.
    """
    if kind not in TARGETS:
        raise InputError(f"targets must be one of {', '.join(TARGETS)}, got {kind!r}")
    lengths = [len(rows) for rows, _, _ in labels()]
    if not lengths:
        raise InputError("there is no training query to distill from; score some with `fastattr teach`.")
    shape = (len(lengths), max(lengths))
    all_rows, all_targets = _array(folder, "rows", shape, np.int32), _array(folder, "targets", shape, np.float32)
    for query, (rows, influence, is_outsider) in enumerate(labels()):
        targets = targets_of(influence, is_outsider) if kind == "ranks" else standardised(influence)
        all_rows[query, : len(rows)], all_rows[query, len(rows) :] = rows, -1
        all_targets[query, : len(rows)], all_targets[query, len(rows) :] = targets, 0.0
    if folder is None:
        return PairTable(all_rows, all_targets, corpus_size)
    write_json(folder / "table.json", {"corpus_size": corpus_size})
    return open_table(folder)


def open_table(folder: Path) -> PairTable:
    """A table that `make_table` wrote, mapped into memory."""
    rows, targets = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("rows", "targets"))
    return PairTable(rows, targets, **read_json(folder / "table.json"))


def _array(folder: Path | None, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    if folder is None:
        return np.empty(shape, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    return np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)


def labels_of(scored: Sequence[ScoredQuery], rows: Sequence[np.ndarray]) -> Callable[[], Iterator[Labels]]:
    """For `make_table`, from queries in memory and the (C,) corpus rows of their candidates."""
    return lambda: ((own, query.influence, query.is_outsider) for query, own in zip(scored, rows, strict=True))


def stream_labels(folder: Path, image_ids: Sequence[str], *, split: str = "train") -> Callable[[], Iterator[Labels]]:
    """For `make_table`, from a score table, a few queries in memory at a time; `image_ids` are the corpus', in row order."""
    open_stage(folder, "scores")
    known = pa.array(image_ids)

    def labels() -> Iterator[Labels]:
        for path in sorted(folder.glob(f"{split}-*.parquet")):
            for batch in pq.ParquetFile(path).iter_batches(64, columns=["image_ids", "influence", "is_outsider"]):
                found = pc.index_in(batch["image_ids"].flatten(), value_set=known)
                if found.null_count:
                    raise InputError(f"{path} names {found.null_count} image ids that are not in the corpus; score it again.")
                ends = np.cumsum(pc.list_value_length(batch["image_ids"]).to_numpy())[:-1]
                flat = (found, batch["influence"].flatten(), batch["is_outsider"].flatten())
                parts = [np.split(values.to_numpy(zero_copy_only=False), ends) for values in flat]
                yield from zip(*parts, strict=True)

    return labels


def split_query_ids(folder: Path, split: str) -> list[str]:
    """Ids of a split's queries, in the order of `stream_labels`."""
    paths = sorted(folder.glob(f"{split}-*.parquet"))
    return [query_id for path in paths for query_id in pq.read_table(path, columns=["query_id"])["query_id"].to_pylist()]


class MappedFeatures:
    """Feature folders side by side, mapped into memory; `features[rows]` is (B, F) float32."""

    def __init__(self, folders: Sequence[Path], ids: Sequence[str]) -> None:
        """Open them; rows are those of `ids`. Raises InputError for an id without features in one of the folders."""
        self._stored = [np.load(folder / "features.npy", mmap_mode="r") for folder in folders]
        self._rows = [require_rows(folder, ids) for folder in folders]
        self.shape = (len(ids), sum(stored.shape[1] for stored in self._stored))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        parts = [stored[order[rows]] for stored, order in zip(self._stored, self._rows, strict=True)]
        return np.concatenate(parts, axis=1, dtype=np.float32)


FeatureRows = np.ndarray | MappedFeatures
"""(N, F), all in memory or not."""
