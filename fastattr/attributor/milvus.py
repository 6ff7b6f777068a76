"""Milvus: bring a collection up to an attributor's catalogue; `collection.MilvusBackend` then answers from it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from fastattr.attributor.attributor import FastAttributor
from fastattr.attributor.collection import (
    FIELDS,
    LONGEST_ID,
    MAX_TOPK,
    STATE,
    TEXT,
    collection_of,
    connect,
    create,
    ids_among,
    literal,
    rows_a_call,
    state_of,
)
from fastattr.attributor.folder import versions
from fastattr.core.errors import ArtifactMismatchError

from pymilvus import MilvusClient  # isort: skip  # after `collection`, which says what is missing
from pymilvus.exceptions import MilvusException  # isort: skip

logger = logging.getLogger(__name__)


def load(name: str, uri: str, *, token: str = "", index_type: str = "") -> dict[str, Any]:
    """Bring a collection up to an attributor's catalogue: create and fill it, or add, change and delete what has changed.

    Args:
        name: 'emoji', an attributor folder or a Hub id.
        uri: 'http://HOST:PORT' ('https://' for TLS), or a file ending in .db.
        token: 'user:password', or a key; see `connect`.
        index_type: of Milvus: 'FLAT', 'HNSW', 'IVF_FLAT', 'AUTOINDEX'; '' takes FLAT for a file and AUTOINDEX for a server.

    Returns:
        'images', 'inserted', 'deleted', 'catalog_version', 'collection', and 'failed': by image id, why Milvus lacks it. Those
        are tried again the next time.

    Raises:
        ArtifactMismatchError: the collection still holds images that have left.
    """
    attributor = FastAttributor.from_pretrained(name, thumbnails=False)
    client, collection = connect(uri, token), collection_of(attributor.config)
    dim = int(attributor.config["student"]["embed_dim"])
    if not client.has_collection(collection):
        create(client, collection, dim, index_type or ("FLAT" if uri.endswith(".db") else "AUTOINDEX"))
    client.load_collection(collection)
    current = {record["image_id"]: record for record in attributor.catalog.to_pylist()}
    present = dict(_stored(client, collection))
    stale = [image_id for image_id in present if image_id not in current]
    _delete(client, collection, stale)
    wanted = [{field: cut(record.get(field)) for field in FIELDS} | {"image_id": key} for key, record in current.items()]
    fresh = {image_id for entry in attributor.history() if entry["operation"] == "add" for image_id in entry["image_ids"]}
    if state_of(client, collection).get("index") != attributor.versions()["index"]:  # another base: other embeddings
        fresh |= current.keys()
    new = [row for row, each in enumerate(wanted) if each["image_id"] in fresh or present.get(each["image_id"]) != each]
    failed = {wanted[row]["image_id"]: reason for row in new if (reason := _unfit(wanted[row]["image_id"]))}
    new = [row for row in new if wanted[row]["image_id"] not in failed]
    size = rows_a_call(dim)
    for start in tqdm(range(0, len(new), size), desc="milvus", unit="call", disable=len(new) <= size):
        rows = new[start : start + size]
        vectors = attributor.embeddings(np.array(rows))
        failed |= _upsert(
            client, collection, [{**wanted[row], "embedding": v.tolist()} for row, v in zip(rows, vectors, strict=True)]
        )
    client.flush(collection)
    state = {**versions(attributor.config), "missing": len(failed)}
    client.alter_collection_properties(collection, {STATE: json.dumps(state)})
    for image_id, reason in failed.items():
        logger.warning("Milvus has no %r: %s", image_id, reason)
    return {
        "images": len(current),
        "inserted": len(new) - len(failed.keys() & {wanted[row]["image_id"] for row in new}),
        "deleted": len(stale),
        "catalog_version": attributor.versions()["catalog_version"],
        "collection": collection,
        "failed": failed,
    }


def cut(value: Any) -> str:
    """A text as Milvus can keep it: at most TEXT bytes of UTF-8."""
    return str(value or "").encode("utf-8", "replace")[:TEXT].decode("utf-8", "ignore")


def _unfit(image_id: str) -> str:
    """Why Milvus can't keep an id, which can't be cut; '' if it can."""
    try:
        length = len(image_id.encode())
    except UnicodeEncodeError:
        return "its id is no valid Unicode"
    return f"its id has {length} bytes, Milvus keeps {LONGEST_ID}" if length > LONGEST_ID else ""


def _delete(client: MilvusClient, collection: str, image_ids: Sequence[str]) -> None:
    """Delete images, and look whether they are gone."""
    for start in range(0, len(image_ids), 1000):
        chosen = ids_among(image_ids[start : start + 1000])
        client.delete(collection, filter=chosen)
        left = client.query(collection, filter=chosen, output_fields=["image_id"], consistency_level="Strong")
        if left:
            example = left[0]["image_id"]
            raise ArtifactMismatchError(
                f"Milvus still holds {len(left)} images that have left, e.g. {example!r}; load it again."
            )


def _upsert(client: MilvusClient, collection: str, records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Write records; those that Milvus refuses are found by halving, and returned with the reason by image id."""
    try:
        client.upsert(collection, list(records))
    except MilvusException as error:
        if len(records) == 1:
            return {records[0]["image_id"]: str(error).splitlines()[0][:200]}
        middle = len(records) // 2
        return _upsert(client, collection, records[:middle]) | _upsert(client, collection, records[middle:])
    return {}


def _stored(client: MilvusClient, collection: str) -> Iterator[tuple[str, dict[str, str]]]:
    """What a collection holds, without embeddings: (image id, record)."""
    last = ""
    while True:  # by id, since an offset may not pass 16,384
        found = client.query(
            collection, filter=f"image_id > {literal(last)}", output_fields=list(FIELDS), limit=MAX_TOPK, order_by="image_id"
        )
        rows = sorted((dict(row) for row in found), key=lambda row: row["image_id"])
        for row in rows:
            yield row["image_id"], {field: row[field] for field in FIELDS}
        if len(rows) < MAX_TOPK:
            return
        last = rows[-1]["image_id"]
