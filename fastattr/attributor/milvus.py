"""Milvus: bring a collection up to an attributor's catalogue; `collection.MilvusBackend` then answers from it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from fastattr.attributor import collection as milvus
from fastattr.attributor.collection import FIELDS, MAX_TOPK, MilvusClient, MilvusException, ids_among, literal
from fastattr.attributor.folder import versions
from fastattr.attributor.load import load as open_attributor
from fastattr.attributor.version import Parts
from fastattr.core.errors import ArtifactMismatchError

logger = logging.getLogger(__name__)


def load(name: str, uri: str, *, token: str = "") -> dict[str, Any]:
    """Bring a collection up to an attributor's catalogue: create and fill it, or add, change and delete what has changed.

    `uri` is 'http://HOST:PORT' ('https://' for TLS), or a file ending in .db, `token` 'user:password', or a key. Returns
    'images', 'inserted', 'deleted', 'catalog_version', 'collection', and 'failed': by image id, why Milvus lacks it; these are
    tried again the next time. Raises ArtifactMismatchError if the collection still holds images that have left.
    """
    _, version, _ = open_attributor(name, encoders={}, parts=Parts(thumbnails=False), index_uri=None)
    catalogue, known = version.own(), versions(version.config)  # of one version, whatever a writer does meanwhile
    client, collection = milvus.connect(uri, token), milvus.collection_of(version.base)
    dim = int(version.base["student"]["embed_dim"])
    if not client.has_collection(collection):
        milvus.create(client, collection, dim, "FLAT" if uri.endswith(".db") else "AUTOINDEX")
    client.load_collection(collection)
    current = {record["image_id"]: record for record in catalogue.table.to_pylist()}
    present = _stored(client, collection)
    stale = [image_id for image_id in present if image_id not in current]
    _delete(client, collection, stale)
    wanted = [{field: cut(record.get(field)) for field in FIELDS} | {"image_id": key} for key, record in current.items()]
    # Another base has other embeddings; an image that was added may have left and come back as another.
    fresh = 0 if milvus.state_of(client, collection).get("index") != known["index"] else catalogue.first_added
    new = [row for row, each in enumerate(wanted) if row >= fresh or present.get(each["image_id"]) != each]
    failed = {wanted[row]["image_id"]: reason for row in new if (reason := _unfit(wanted[row]["image_id"]))}
    new = [row for row in new if wanted[row]["image_id"] not in failed]
    size = milvus.rows_a_call(dim)
    for start in tqdm(range(0, len(new), size), desc="milvus", unit="call", disable=len(new) <= size):
        rows = new[start : start + size]
        vectors = catalogue.embeddings(np.array(rows)).tolist()
        records = [{**wanted[row], "embedding": vector} for row, vector in zip(rows, vectors, strict=True)]
        failed |= _upsert(client, collection, records)
    client.flush(collection)
    client.alter_collection_properties(collection, {milvus.STATE: json.dumps({**known, "missing": len(failed)})})
    for image_id, reason in failed.items():
        logger.warning("Milvus has no %r: %s", image_id, reason)
    inserted = len({wanted[row]["image_id"] for row in new} - failed.keys())
    counts = {"images": len(current), "inserted": inserted, "deleted": len(stale), "collection": collection, "failed": failed}
    return {**counts, "catalog_version": known["catalog_version"]}


def cut(value: Any) -> str:
    """A text as Milvus can keep it: at most TEXT bytes of UTF-8."""
    return str(value or "").encode("utf-8", "replace")[: milvus.TEXT].decode("utf-8", "ignore")


def _unfit(image_id: str) -> str:
    """Why Milvus can't keep an id, which can't be cut; '' if it can."""
    try:
        length = len(image_id.encode())
    except UnicodeEncodeError:
        return "its id is no valid Unicode"
    return f"its id has {length} bytes, Milvus keeps {milvus.LONGEST_ID}" if length > milvus.LONGEST_ID else ""


def _delete(client: MilvusClient, collection: str, image_ids: Sequence[str]) -> None:
    """Delete images, and look whether they are gone."""
    for start in range(0, len(image_ids), 1000):
        chosen = ids_among(image_ids[start : start + 1000])
        client.delete(collection, filter=chosen)
        left = client.query(collection, filter=chosen, output_fields=["image_id"], consistency_level="Strong")
        if left:
            example = f"{len(left)} images that have left, e.g. {left[0]['image_id']!r}"
            raise ArtifactMismatchError(f"Milvus still holds {example}; load it again.")


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


def _stored(client: MilvusClient, collection: str) -> dict[str, dict[str, str]]:
    """What a collection holds, without embeddings: records by image id."""
    stored: dict[str, dict[str, str]] = {}
    options = {"output_fields": list(FIELDS), "limit": MAX_TOPK, "order_by": "image_id"}
    last, more = "", True
    while more:  # by id, since an offset may not pass 16,384
        found = client.query(collection, filter=f"image_id > {literal(last)}", **options)
        stored |= {row["image_id"]: {field: row[field] for field in FIELDS} for row in found}
        last, more = max(stored, default=""), len(found) == MAX_TOPK
    return stored
