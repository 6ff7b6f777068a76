"""Milvus: bring a collection up to an attributor's catalogue; `collection.MilvusBackend` then answers from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from fastattr.attributor.attributor import FastAttributor
from fastattr.attributor.collection import (
    FIELDS,
    MAX_TOPK,
    STATE,
    MilvusClient,
    collection_of,
    connect,
    create,
    rows_a_call,
    state_of,
)
from fastattr.attributor.folder import versions


def load(name: str, uri: str, *, token: str = "", index_type: str = "") -> dict[str, Any]:
    """Bring a collection up to an attributor's catalogue: create and fill it, or add, change and delete what has changed.

    Args:
        name: 'emoji', an attributor folder or a Hub id.
        uri: 'http://HOST:PORT', or a file ending in .db.
        token: 'user:password', or a key.
        index_type: of Milvus: 'FLAT', 'HNSW', 'IVF_FLAT', 'AUTOINDEX'; '' takes FLAT for a file and AUTOINDEX for a server.

    Returns:
        'images', 'inserted', 'deleted' and 'catalog_version'.
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
    wanted = {name: {field: str(record.get(field) or "") for field in FIELDS} for name, record in current.items()}
    state = state_of(client, collection)
    fresh = {image_id for entry in attributor.history() if entry["operation"] == "add" for image_id in entry["image_ids"]}
    if state.get("index") != attributor.versions()["index"]:  # another base: its embeddings may differ
        fresh |= wanted.keys()
    new = [row for row, (name, record) in enumerate(wanted.items()) if name in fresh or present.get(name) != record]
    for start in range(0, len(stale), 1000):
        client.delete(collection, ids=stale[start : start + 1000])
    records = list(wanted.values())
    size = rows_a_call(dim)
    for start in tqdm(range(0, len(new), size), desc="milvus", unit="call", disable=len(new) <= size):
        rows = new[start : start + size]
        vectors = attributor.embeddings(np.array(rows))
        client.upsert(collection, [{**records[row], "embedding": v.tolist()} for row, v in zip(rows, vectors, strict=True)])
    client.flush(collection)
    client.alter_collection_properties(collection, {STATE: json.dumps(versions(attributor.config))})
    return {
        "images": len(current),
        "inserted": len(new),
        "deleted": len(stale),
        "catalog_version": attributor.versions()["catalog_version"],
        "collection": collection,
    }


def _stored(client: MilvusClient, collection: str) -> Iterator[tuple[str, dict[str, str]]]:
    """What a collection holds, without embeddings: (image id, record)."""
    last = ""
    while True:  # by id, since an offset may not pass 16,384
        found = client.query(
            collection, filter=f"image_id > {json.dumps(last)}", output_fields=list(FIELDS), limit=MAX_TOPK, order_by="image_id"
        )
        rows = sorted((dict(row) for row in found), key=lambda row: row["image_id"])
        for row in rows:
            yield row["image_id"], {field: row[field] for field in FIELDS}
        if len(rows) < MAX_TOPK:
            return
        last = rows[-1]["image_id"]
