"""Feature folders: features.npy (float16, one row an image), ids.parquet and manifest.json, one folder an encoder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastattr.core.errors import InputError
from fastattr.core.files import atomic_path
from fastattr.core.stages import fingerprint, open_stage, require_same


def slug(specification: str) -> str:
    """A folder name for an encoder."""
    return re.sub(r"[^\w.-]+", "_", specification)


def folders(run_dir: Path, name: str, encoders: Sequence[str]) -> list[Path]:
    """The feature folders of these encoders; `name` is 'features' or 'query_features'."""
    return [run_dir / name / slug(specification) for specification in encoders]


def features_fingerprint(paths: Sequence[Path]) -> str:
    """Identifies a set of feature folders."""
    return fingerprint([open_stage(path, "features")["fingerprint"] for path in paths])


def check_source(path: Path, expected: str) -> None:
    """Refuse a feature folder of another corpus or other queries."""
    found = open_stage(path, "features")["inputs"]["source"]
    require_same(f"the source of {path}", found, expected, "Run the features stage in this run folder again.")


def write_features(folder: Path, features: np.ndarray, ids: Sequence[str]) -> None:
    """Write (N, F) features and the ids of their rows."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "features.npy") as temporary:
        np.save(temporary, features)
    with atomic_path(folder / "ids.parquet") as temporary:
        pq.write_table(pa.table({"id": list(ids)}), temporary)


def read_features(folders: Sequence[Path], ids: Sequence[str]) -> np.ndarray:
    """(N, F) float32 features of `ids`, the encoders' features side by side; InputError if an id has none in a folder."""
    stored = [np.load(folder / "features.npy", mmap_mode="r")[require_rows(folder, ids)] for folder in folders]
    return np.concatenate(stored, axis=1, dtype=np.float32)


def read_ids(folder: Path) -> list[str]:
    """The ids of a feature folder's rows."""
    return pq.read_table(folder / "ids.parquet")["id"].to_pylist()


def require_rows(folder: Path, ids: Sequence[str]) -> np.ndarray:
    """(N,) rows of `ids` in a feature folder; InputError if an id has no features there."""
    open_stage(folder, "features")
    row_of = {name: row for row, name in enumerate(read_ids(folder))}
    missing = [name for name in ids if name not in row_of]
    if missing:
        raise InputError(f"{len(missing)} ids have no features in {folder}, e.g. {missing[:3]}; run the features stage again.")
    return np.array([row_of[name] for name in ids], dtype=np.int64)
