"""Score tables: what a teacher says of each (query, training image) pair; the public data set of this project.

scores/SPLIT-*.parquet, each a split of `datasets.load_dataset("scores")`, has one row a query with list columns (they stream
and compress better than one row a pair): see `SCHEMA`; influence: higher = more influential, rank: 0 = most.
scores/manifest.json says how they were made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastattr.core.errors import NonFiniteError
from fastattr.core.files import atomic_path
from fastattr.core.stages import open_stage
from fastattr.generators.queries import SPLITS

TEXT, SINGLE = pa.string(), pa.float32()
COLUMNS = {"query_id": TEXT, "prompt": TEXT, "split": TEXT, "image_ids": pa.list_(TEXT), "influence": pa.list_(SINGLE)}
COLUMNS |= {"rank": pa.list_(pa.int32()), "is_outsider": pa.list_(pa.bool_()), "query_loss_rise": SINGLE}
SCHEMA = pa.schema(COLUMNS | {"teacher": TEXT, "config": TEXT})


@dataclass(frozen=True)
class ScoredQuery:
    """One row of a score table."""

    query_id: str
    prompt: str
    split: str
    image_ids: list[str]
    influence: np.ndarray
    """(C,) float32, higher = more influential."""
    is_outsider: np.ndarray
    """(C,) bool."""
    query_loss_rise: float
    """Relative rise of the query's own loss after the unlearning step."""


def ranks_of(influence: np.ndarray) -> np.ndarray:
    """(C,) int32 ranks, 0 = most influential; equal scores keep their order. NonFiniteError if a score is not finite."""
    if not np.isfinite(influence).all():
        raise NonFiniteError(f"{int((~np.isfinite(influence)).sum())} of {len(influence)} influence scores are not finite.")
    ranks = np.empty(len(influence), dtype=np.int32)
    ranks[np.argsort(-influence, kind="stable")] = np.arange(len(influence), dtype=np.int32)
    return ranks


def write_shard(path: Path, rows: Iterable[ScoredQuery], *, teacher: str, config: str) -> None:
    """Write one shard of a score table, atomically."""
    made_by = {"teacher": teacher, "config": config}
    records = [vars(row) | {"rank": ranks_of(row.influence)} | made_by for row in rows]
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(records, schema=SCHEMA), temporary)


def read_shard(path: Path) -> ScoredQuery:
    """Read what `write_shard` wrote of one query."""
    (row,) = _rows(path)
    return row


def read_scores(folder: Path, *, split: str | None = None) -> list[ScoredQuery]:
    """Read a finished score table, or one split of it, in query order."""
    open_stage(folder, "scores")
    paths = [path for name in SPLITS if split in {None, name} for path in sorted(folder.glob(f"{name}-*.parquet"))]
    return [row for path in paths for row in _rows(path)]


def _rows(path: Path) -> list[ScoredQuery]:
    arrays = {"influence": np.float32, "is_outsider": bool}
    records = pq.read_table(path, columns=list(ScoredQuery.__annotations__)).to_pylist()
    return [ScoredQuery(**record | {name: np.array(record[name], kind) for name, kind in arrays.items()}) for record in records]
