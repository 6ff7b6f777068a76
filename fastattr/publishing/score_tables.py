"""Score tables on the Hub: one configuration of a dataset, CONFIG/SPLIT-*.parquet with the query images.

CONFIG/manifest.json lies beside the shards; the card of all configurations is written anew from the manifests at each push.
"""

from __future__ import annotations

import glob
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastattr.core.errors import InputError
from fastattr.core.files import read_json, write_json
from fastattr.core.models import check_repo_id
from fastattr.core.stages import open_stage
from fastattr.generators.queries import SPLITS, Queries, query_schema
from fastattr.publishing.cards import scores_card
from fastattr.publishing.licences import corpus_table, license_text, merged, provenance
from fastattr.publishing.push import Push, already_there, send_with_card
from fastattr.teachers.scores import SCHEMA

SHARD_BYTES = 500_000_000
"""About how large a parquet file of a score table may become."""
ROW_GROUP = 100
"""Rows a reader that streams a score table holds at once."""


def push_scores(folder: Path, repo_id: str, *, config_name: str | None = None, **target: Any) -> Push:
    """Push a score table as one configuration of a dataset repository; its other configurations are kept.

    Args and errors beside those of `push_attributor`:
        folder: the table; corpus/ and queries/ beside it, where they are, add licences and query images.
        config_name: None names teacher and generator.
        ArtifactNotFoundError: there is no finished table.
    """
    check_repo_id(repo_id)
    scores, beside = open_stage(folder, "scores"), folder.parent
    queries = Queries(beside / "queries") if (beside / "queries").is_dir() else None
    named = "-".join(filter(None, (scores["teacher"], scores["generator_fingerprint"][:8])))
    config_name = config_name or re.sub(r"[^\w.-]+", "_", named)
    with tempfile.TemporaryDirectory() as name:
        staged = Path(name) / "dataset"
        counts, candidates = _write_splits(folder, queries, staged / config_name)
        entries = provenance(corpus_table(beside)) if (beside / "corpus").is_dir() else []
        manifest = {**scores, "queries": counts, "candidates": candidates, "provenance": entries}
        write_json(staged / config_name / "manifest.json", manifest)
        manifests = {config_name: manifest, **_other_manifests(repo_id, config_name, target)}
        card = scores_card(repo_id=repo_id, manifests={key: manifests[key] for key in sorted(manifests)})
        return send_with_card(
            staged,
            repo_id,
            card,
            license_text(merged(each["provenance"] for each in manifests.values()), scores.get("license")),
            what=f"score table {config_name}",
            repo_type="dataset",
            replaces=[f"{glob.escape(config_name)}/{split}-*-of-*.parquet" for split in SPLITS],
            **target,
        )


def _write_splits(folder: Path, queries: Queries | None, target: Path) -> tuple[dict[str, int], int]:
    """Write a score table with its query images as parquet shards; (queries by split, largest number of candidates)."""
    from datasets import Features

    row_of = {query_id: row for row, query_id in enumerate(queries.query_ids)} if queries else {}
    drawn = Features.from_arrow_schema(query_schema()) if queries else {}
    first = {name: drawn[name] for name in ("query_id", "image") if name in drawn}  # what a viewer shows first
    schema: pa.Schema = Features({**first, **Features.from_arrow_schema(SCHEMA), **drawn}).arrow_schema
    counts: dict[str, int] = {}
    most = 0
    for split in SPLITS:
        files = sorted(folder.glob(f"{split}-*.parquet"))
        rows = sum(pq.ParquetFile(path).metadata.num_rows for path in files)
        if not rows:
            continue
        counts[split], written = rows, 0
        target.mkdir(parents=True, exist_ok=True)
        shards = max(1, math.ceil(sum(path.stat().st_size for path in files) / SHARD_BYTES))
        rest = _batches(files)
        for number in range(shards):
            enough, path = rows * (number + 1) // shards, target / f"{split}-{number:05d}-of-{shards:05d}.parquet"
            with pq.ParquetWriter(path, schema, use_content_defined_chunking=True) as writer:
                while written < enough and (batch := next(rest, None)) is not None:
                    most = max(most, max(len(ids) for ids in batch["image_ids"].to_pylist()))
                    own = queries.table.take([row_of[each] for each in batch["query_id"].to_pylist()]) if queries else batch
                    columns = {each: batch[each] if each in SCHEMA.names else own[each] for each in schema.names}
                    writer.write_table(pa.table(columns).cast(schema), row_group_size=ROW_GROUP)
                    written += len(batch)
    return counts, most


def _batches(files: Sequence[Path]) -> Iterator[pa.Table]:
    for path in files:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=ROW_GROUP):
            yield pa.Table.from_batches([batch])


def _other_manifests(repo_id: str, config_name: str, target: Mapping[str, Any]) -> dict[str, Any]:
    """The manifests of the configurations that a dataset repository has already."""
    folder = already_there(repo_id, "dataset", ["*/manifest.json"], target)
    found = {path.parent.name: read_json(path) for path in folder.glob("*/manifest.json")} if folder else {}
    if any(not {"teacher", "queries", "provenance"} <= set(manifest) for manifest in found.values()):
        raise InputError(f"{repo_id} holds configurations that fastattr did not write; push to another repository.")
    return {name: manifest for name, manifest in found.items() if name != config_name}
