"""Many: attribute very many queries, divided among the processes of `accelerate launch`, each with the mapped index.

Reads a table (.parquet, .jsonl) with the columns 'query_id', 'prompt' and either 'image' (a file, relative to the table) or
'features' (numbers); writes OUT/part-*.parquet, one row a query. A killed run goes on with the parts that are there, if they
are of the same table, settings and catalogue version: their names say so.
"""

from __future__ import annotations

import re
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
from fastattr.core.errors import ArtifactMismatchError, ArtifactNotFoundError, InputError
from fastattr.core.files import atomic_path, sha256_file
from fastattr.core.stages import MANIFEST, fingerprint, make

PART_ROWS = 1024  # queries in one part, which is what a killed process loses at most
BATCH = 64  # queries that are encoded at once
PART = re.compile(r"part-([0-9a-f]{16}-)?\d{6}\.parquet")  # files of this stage


def _read_queries(path: Path) -> pa.Table:
    if not path.is_file():
        raise ArtifactNotFoundError(f"there is no file {path}; give a .parquet or .jsonl table of queries.")
    try:
        table = pq.read_table(path) if path.suffix == ".parquet" else pj.read_json(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    columns = set(table.column_names)
    if not {"query_id", "prompt"} <= columns or len({"image", "features"} & columns) != 1:
        raise InputError(f"{path} needs the columns 'query_id', 'prompt' and 'image' or 'features', not {sorted(columns)}.")
    if any(table[name].null_count for name in {"query_id", "image"} & columns):
        raise InputError(f"{path}: a query lacks its id or its image.")
    if "image" in columns and not pa.types.is_string(table["image"].type):
        raise InputError(f"{path}: the column 'image' must hold file names, found {table['image'].type}.")
    if len(table["query_id"].unique()) < len(table):
        raise InputError(f"{path}: query ids occur twice.")
    return table


def run(model: str, queries: Path, out: Path, *, k: int = 100, receipts: bool = False) -> dict[str, Any]:
    """Attribute all queries of a table with an attributor ('emoji', a folder, a Hub id); k images each."""
    state = Accelerator()
    table = _read_queries(queries)
    attributor = FastAttributor.from_pretrained(model, thumbnails=False)
    config: dict[str, Any] = {"k": k} | ({"receipts": True} if receipts else {})
    inputs = {"queries": sha256_file(queries), **{name: str(v) for name, v in attributor.versions().items()}}
    files = [out / f"part-{fingerprint([config, inputs])}-{part:06d}.parquet" for part in range(-(-len(table) // PART_ROWS))]

    def work() -> dict[str, int]:
        out.mkdir(parents=True, exist_ok=True)
        mine = range(state.process_index, len(files), state.num_processes)
        for number in tqdm(mine, desc="attribute", unit="part", disable=not state.is_main_process):
            if not files[number].exists():
                answers = _attribute(attributor, table.slice(number * PART_ROWS, PART_ROWS), queries.parent, k, receipts)
                if set(answers["catalog_version"].to_pylist()) - {int(inputs["catalog_version"])}:
                    raise ArtifactMismatchError(f"the catalogue of {model} changed meanwhile; run again, to ask all anew.")
                with atomic_path(files[number]) as temporary:
                    pq.write_table(answers, temporary, compression="zstd")
        state.wait_for_everyone()
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise ArtifactMismatchError(f"another process has not written {missing[0]}; run again, it goes on.")
        for path in set(out.glob("part-*.parquet")) - set(files) if state.is_main_process else ():
            if PART.fullmatch(path.name):
                path.unlink()
        return {"queries": len(table), "processes": state.num_processes}

    make(out, work, stage="attributions", config=config, inputs=inputs, accelerator=state)
    return {"queries": len(table), "out": str(out), "manifest": str(out / MANIFEST)}


def _attribute(attributor: FastAttributor, rows: pa.Table, beside: Path, k: int, receipts: bool) -> pa.Table:
    """The answers to some rows of the table."""
    answers: list[Attribution] = []
    for start in range(0, len(rows), BATCH):
        batch = rows.slice(start, BATCH).to_pylist()
        prompts = [row["prompt"] for row in batch]
        if "features" in rows.column_names:
            features: Any = [row["features"] for row in batch]
            answers += attributor.attribute_features(features, prompts, k)
        else:
            found = attributor.attribute([beside / row["image"] for row in batch], prompts, k)
            assert isinstance(found, list)
            answers += found
    table = pa.table(
        {
            "query_id": rows["query_id"].cast(pa.string()),
            "prompt": rows["prompt"],
            "image_ids": [[result.image_id for result in answer.results] for answer in answers],
            "similarities": [np.array([r.similarity for r in answer.results], dtype=np.float32) for answer in answers],
            "catalog_version": [answer.versions["catalog_version"] for answer in answers],
        }
    )
    return table.append_column("receipt", pa.array([each.to_json() for each in answers], pa.string())) if receipts else table
