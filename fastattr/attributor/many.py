"""Many: attribute very many queries, divided among the processes of `accelerate launch`, each with the mapped index.

Reads a table (.parquet, .jsonl) with the columns 'query_id', 'prompt' and either 'image' (a file, relative to the table) or
'features' (numbers); writes OUT/part-*.parquet, one row a query: 'query_id', 'prompt', 'image_ids', 'similarities',
'catalog_version'. Parts that are there are not done again, so a killed run goes on; a table's part is always the same rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pj
import pyarrow.parquet as pq
from accelerate import Accelerator
from tqdm import tqdm

from fastattr.attributor.attribution import Attribution
from fastattr.attributor.attributor import FastAttributor
from fastattr.core.errors import ArtifactNotFoundError, InputError
from fastattr.core.files import atomic_path, sha256_file
from fastattr.core.stages import MANIFEST, finished, write_manifest

PART_ROWS = 1024
"""Queries in one part, which is what a killed process loses at most."""
BATCH = 64
"""Queries that are encoded at once."""


def read_queries(path: Path) -> pa.Table:
    """The table of queries.

    Raises:
        ArtifactNotFoundError: there is no such file.
        InputError: it lacks a column, or ids occur twice.
    """
    if not path.is_file():
        raise ArtifactNotFoundError(f"there is no file {path}; give a .parquet or .jsonl table of queries.")
    table = pq.read_table(path) if path.suffix == ".parquet" else pj.read_json(path)
    if not {"query_id", "prompt"} <= set(table.column_names) or len({"image", "features"} & set(table.column_names)) != 1:
        raise InputError(
            f"{path} needs the columns 'query_id', 'prompt' and 'image' or 'features', found {table.column_names}."
        )
    if len(table["query_id"].unique()) < len(table):
        raise InputError(f"{path}: query ids occur twice.")
    return table


def run(model: str, queries: Path, out: Path, *, k: int = 100) -> dict[str, Any]:
    """Attribute all queries of a table; returns the manifest.

    Args:
        model: 'emoji', an attributor folder or a Hub id.
        queries: the table.
        out: folder of the answers.
        k: how many training images each.

    Raises:
        As `FastAttributor.from_pretrained`, `attribute` and `read_queries`.
    """
    state = Accelerator()
    table = read_queries(queries)
    attributor = FastAttributor.from_pretrained(model, thumbnails=False)
    config, inputs = {"k": k}, {"queries": sha256_file(queries), **{name: str(v) for name, v in attributor.versions().items()}}
    if finished(out, stage="attributions", config=config, inputs=inputs):
        return {"queries": len(table), "out": str(out)}
    out.mkdir(parents=True, exist_ok=True)
    starts = list(range(0, len(table), PART_ROWS))
    mine = starts[state.process_index :: state.num_processes]
    for start in tqdm(mine, desc="attribute", unit="part", disable=not state.is_main_process):
        file = out / f"part-{start // PART_ROWS:06d}.parquet"
        if not file.exists():
            answers = _attribute(attributor, table.slice(start, PART_ROWS), queries.parent, k)
            with atomic_path(file) as temporary:
                pq.write_table(answers, temporary, compression="zstd")
    state.wait_for_everyone()
    if state.is_main_process:
        write_manifest(
            out, stage="attributions", config=config, inputs=inputs, queries=len(table), processes=state.num_processes
        )
    state.wait_for_everyone()
    return {"queries": len(table), "out": str(out), "manifest": str(out / MANIFEST)}


def _attribute(attributor: FastAttributor, rows: pa.Table, beside: Path, k: int) -> pa.Table:
    """The answers to some rows of the table."""
    answers: list[Attribution] = []
    for start in range(0, len(rows), BATCH):
        batch = rows.slice(start, BATCH).to_pylist()
        prompts = [row["prompt"] for row in batch]
        if "features" in rows.column_names:
            features = np.array([row["features"] for row in batch], dtype=np.float32)
            answers += attributor.attribute_features(features, prompts, k)
        else:
            found = attributor.attribute([beside / row["image"] for row in batch], prompts, k)
            assert isinstance(found, list)
            answers += found
    return pa.table(
        {
            "query_id": rows["query_id"].cast(pa.string()),
            "prompt": rows["prompt"],
            "image_ids": [[result.image_id for result in answer.results] for answer in answers],
            "similarities": [np.array([r.similarity for r in answer.results], dtype=np.float32) for answer in answers],
            "catalog_version": [answer.versions["catalog_version"] for answer in answers],
        }
    )
