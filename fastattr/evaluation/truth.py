"""Truth: the ground truth folder, which says what became of queries once models were retrained without some images.

`GroundTruth` reads the folder that record.py writes: manifest.json, images.parquet, queries.parquet, models.parquet,
losses.parquet, counterfactuals.parquet. The loss of a query is its mean over the timesteps that methods are judged by (the
manifest names them); each timestep's own loss is kept beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fastattr.core.errors import ArtifactMismatchError, InputError
from fastattr.core.files import atomic_path
from fastattr.core.stages import open_stage
from fastattr.corpus.images import load_rgb
from fastattr.evaluation.lds import group_shares, outputs_of

TEXT = pa.string()
MODELS = pa.schema(
    {"model_id": TEXT, "kind": TEXT, "seed": pa.int64(), "subset": TEXT, "method": TEXT, "removed_image_ids": pa.list_(TEXT)}
)
LOSSES = pa.schema({"model_id": TEXT, "query_id": TEXT, "loss": pa.float64(), "by_timestep": pa.list_(pa.float32())})
"""`loss` is the mean over the timesteps that are judged by, `by_timestep` has all, from little noise to much."""


def counterfactuals_schema() -> pa.Schema:
    """Arrow schema of the queries that were drawn again, viewable by `datasets`."""
    from datasets import Features, Image as ImageFeature, Value

    text = {name: Value("string") for name in ("model_id", "method", "query_id")}
    numbers = {name: Value("float64") for name in ("loss", "mse", "similarity")}
    return Features({**text, **numbers, "image": ImageFeature()}).arrow_schema


@dataclass(frozen=True)
class Retrained:
    """Models of one kind and what became of some queries under them."""

    kept: np.ndarray  # (M, N) bool
    losses: np.ndarray  # (M, Q), over the timesteps that are judged by
    model_ids: list[str]
    subsets: list[str]
    seeds: np.ndarray  # (M,)

    def seed_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the models that were trained on a subset with a first and with a second seed."""
        rows: dict[str, list[int]] = {}
        for row in np.argsort(self.seeds, kind="stable"):
            rows.setdefault(self.subsets[row], []).append(int(row))
        pairs = np.array([found[:2] for found in rows.values() if len(found) > 1], dtype=np.int64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]


class GroundTruth:
    """A ground truth folder, opened."""

    def __init__(self, folder: str | Path) -> None:
        """Open `folder`; ArtifactNotFoundError if it is not a finished ground truth."""
        self.folder = Path(folder)
        self.manifest = open_stage(self.folder, "ground_truth")
        self.corpus_fingerprint = str(self.manifest["corpus_fingerprint"])
        self.images = pq.read_table(self.folder / "images.parquet")
        self.queries = pq.read_table(self.folder / "queries.parquet")
        self.models: list[dict[str, Any]] = pq.read_table(self.folder / "models.parquet").to_pylist()
        self.counterfactuals = pq.read_table(self.folder / "counterfactuals.parquet").to_pandas()
        self.image_ids: list[str] = self.images["image_id"].to_pylist()
        self.query_ids: list[str] = self.queries["query_id"].to_pylist()
        self._query_row = {query_id: row for row, query_id in enumerate(self.query_ids)}

    @cached_property
    def _losses(self) -> pa.Table:
        return pq.read_table(self.folder / "losses.parquet")

    @cached_property
    def _loss_row(self) -> dict[tuple[str, str], int]:
        pairs = zip(self._losses["model_id"].to_pylist(), self._losses["query_id"].to_pylist(), strict=True)
        return {pair: row for row, pair in enumerate(pairs)}

    def of_split(self, split: str) -> list[str]:
        """Ids of a split's queries; InputError if there are none."""
        splits = self.queries["split"].to_pylist()
        found = [query_id for query_id, name in zip(self.query_ids, splits, strict=True) if name == split]
        if not found:
            raise InputError(f"{self.folder} has no {split!r} query; its splits are {', '.join(sorted(set(splits)))}.")
        return found

    def measured(self, split: str) -> list[str]:
        """Ids of a split's queries whose losses are known: of training queries, the first drawing of each prompt."""
        return [query_id for query_id in self.of_split(split) if ("full", query_id) in self._loss_row]

    def prompt(self, query_id: str) -> str:
        """A query's prompt."""
        return str(self.queries["prompt"][self._query_row[query_id]].as_py())

    def image(self, query_id: str) -> Image.Image:
        """A query's RGB image."""
        return load_rgb(self.queries["image"][self._query_row[query_id]].as_py()["bytes"])

    def losses(self, model_ids: Sequence[str], query_ids: Sequence[str]) -> np.ndarray:
        """(M, Q) losses, over the timesteps that are judged by; ArtifactMismatchError if one is missing."""
        return self._losses["loss"].to_numpy()[self._loss_rows(model_ids, query_ids)]

    def losses_by_timestep(self, model_ids: Sequence[str], query_ids: Sequence[str]) -> np.ndarray:
        """(M, Q, T) losses at all timesteps, evenly spread from little noise to much; errors as `losses`."""
        rows = self._loss_rows(model_ids, query_ids)
        column = self._losses["by_timestep"].take(pa.array(rows.ravel())).combine_chunks()
        return column.flatten().to_numpy().astype(np.float64).reshape(*rows.shape, -1)

    def _loss_rows(self, model_ids: Sequence[str], query_ids: Sequence[str]) -> np.ndarray:
        """(M, Q) rows of losses.parquet."""
        try:
            rows = [[self._loss_row[model_id, query_id] for query_id in query_ids] for model_id in model_ids]
        except KeyError as error:
            model_id, query_id = error.args[0]
            raise ArtifactMismatchError(
                f"{self.folder} has no loss of query {query_id!r} under {model_id!r}; each prompt's first drawing is measured."
            ) from error
        return np.array(rows, dtype=np.int64).reshape(len(model_ids), len(query_ids))

    def retrained(self, kind: str, query_ids: Sequence[str]) -> Retrained:
        """Models of one kind ('half', 'group', ...) and the losses of these queries under them; maybe none."""
        models = [model for model in self.models if model["kind"] == kind]
        removed = [set(model["removed_image_ids"]) for model in models]
        kept = np.array([[image_id not in without for image_id in self.image_ids] for without in removed], dtype=bool)
        kept = kept.reshape(len(models), len(self.image_ids))
        model_ids, subsets, seeds = ([model[name] for model in models] for name in ("model_id", "subset", "seed"))
        return Retrained(kept, self.losses(model_ids, query_ids), model_ids, subsets, np.array(seeds))


def group_points(truth: GroundTruth, scores: np.ndarray, query_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(Q, G) shares of the groups in a method's positive scores, and (Q, G) rises of the log loss once each is left out."""
    removed = truth.retrained("group", query_ids)
    full = outputs_of(truth.losses(["full"], query_ids))
    rises = (full - outputs_of(removed.losses)).T if len(removed.kept) else np.zeros((len(query_ids), 0))
    return group_shares(scores, ~removed.kept), rises


def write_table(path: Path, records: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write one table of a ground truth folder, atomically."""
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(records), schema=schema), temporary, compression="zstd")
