"""A Milvus collection of an attributor: the same search and records from a server (or a cluster), beyond one machine.

`MilvusBackend` answers as `catalogue.Catalogue` does. What the attributor's own changes have removed is dropped here as well,
so that not even a collection that lags behind names it. A server's limits are kept on this side (Milvus Lite has none).
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from fastattr.attributor.changes import Image
from fastattr.attributor.folder import versions
from fastattr.attributor.inputs import COLUMNS, Where, restriction_of
from fastattr.core.errors import ArtifactMismatchError, ArtifactNotFoundError, InputError, MissingExtraError
from fastattr.index.search import require_finite_queries

try:
    from pymilvus import DataType, MilvusClient as MilvusClient
    from pymilvus.exceptions import MilvusException as MilvusException
except ImportError as failure:
    raise MissingExtraError(f"Milvus needs pymilvus ({failure}); run: pip install 'fastattr[milvus]'") from failure

logger = logging.getLogger(__name__)

MAX_TOPK = 16_384  # results of one query
MAX_CALL = 64_000_000  # bytes of one call, in or out
TEXT = 4_096  # bytes of one text; Milvus keeps them to a given length
LONGEST_ID = 512  # bytes of an image id
FIELDS = (*COLUMNS, "date")
STATE = "fastattr_state"  # property of a collection: the versions that it was brought up to


def connect(uri: str, token: str = "") -> MilvusClient:
    """A client; the environment may give its token (FASTATTR_MILVUS_TOKEN) and its authority's file (FASTATTR_MILVUS_CA)."""
    authority = os.environ.get("FASTATTR_MILVUS_CA")
    secured = {"secure": True, "server_pem_path": authority} if authority else {}
    try:
        return MilvusClient(uri=uri, token=token or os.environ.get("FASTATTR_MILVUS_TOKEN", ""), timeout=30, **secured)
    except (MilvusException, OSError, ValueError) as error:
        raise ArtifactNotFoundError(f"no Milvus answers at {uri!r} ({error}); start it, or give another --uri.") from error


def collection_of(config: Mapping[str, Any]) -> str:
    """The collection of an attributor: two models never share one."""
    return f"fastattr_{config['sha256']['model.safetensors'][:16]}"


def rows_a_call(dim: int, *, texts: int = len(FIELDS)) -> int:
    """Rows whose insertion stays well below `MAX_CALL`."""
    return max(1, min(10_000, MAX_CALL // 2 // (4 * dim + 256 * texts)))


def queries_a_call(dim: int, k: int) -> int:
    """Queries whose vectors and answers (an id of up to 512 bytes and a number each) stay well below `MAX_CALL`."""
    return max(1, min(1_000, MAX_CALL // 2 // (4 * dim + 544 * k)))


def state_of(client: MilvusClient, collection: str) -> dict[str, Any]:
    """The versions that a collection was last brought up to; empty if it never was."""
    return dict(json.loads(client.describe_collection(collection).get("properties", {}).get(STATE, "{}")))


def create(client: MilvusClient, collection: str, dim: int, index_type: str) -> None:
    """An empty collection for embeddings of (dim,) values and the fields of the catalogue."""
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("image_id", DataType.VARCHAR, is_primary=True, max_length=LONGEST_ID)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=dim)
    for name in FIELDS:
        if name != "image_id":
            schema.add_field(name, DataType.VARCHAR, max_length=TEXT)
    index = client.prepare_index_params()
    index.add_index("embedding", index_type=index_type, metric_type="IP", params={})
    client.create_collection(collection, schema=schema, index_params=index, consistency_level="Strong")


def literal(value: str | Sequence[str]) -> str:
    """A text, or a list of texts, as a literal of Milvus's language: whatever it holds, it stays one value.

    Milvus binds parameters itself, but Milvus Lite does not, and the client's own `get` and `delete` splice ids.
    """
    if not isinstance(value, str):
        return f"[{', '.join(map(literal, value))}]"
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        value = value.replace(plain, escaped)
    return f'"{value}"'


def ids_among(ids: Sequence[str]) -> str:
    """The condition that an image is one of these."""
    return f"image_id in {literal(ids)}"


def filter_of(where: Where) -> str:
    """A restriction in Milvus's words."""
    wanted = restriction_of(where)
    terms = [f"{name} in {literal(values)}" for name, values in wanted.values.items()]
    if wanted.dated:
        terms += [f"date >= {literal(wanted.since)}", f"date <= {literal(wanted.until + chr(0x10FFFF))}", 'date != ""']
    return " and ".join(terms)


class MilvusBackend:
    """Search and records from a collection; a row is what `search` gives `fetch`, the number of an image in this process."""

    def __init__(self, client: MilvusClient, collection: str, config: Mapping[str, Any]) -> None:
        self._client, self._collection = client, collection
        self._dim = int(config["student"]["embed_dim"])
        self.removed: dict[str, None] = {}  # ids that have left
        self._rows: dict[str, int] = {}  # numbers of the images that searches have found, in order
        self.ntotal = int(client.query(collection, filter="", output_fields=["count(*)"])[0]["count(*)"])

    @classmethod
    def open(cls, uri: str, config: Mapping[str, Any]) -> MilvusBackend:
        """The backend of an attributor; its config has the present 'catalog_version'."""
        client, collection = connect(uri), collection_of(config)
        if not client.has_collection(collection):
            fill = f"fill it with `fastattr index --backend milvus --uri {uri} ATTRIBUTOR`"
            raise ArtifactNotFoundError(f"{uri} has no collection of this attributor ({collection}); {fill}.")
        client.load_collection(collection)
        state, own = state_of(client, collection), versions(config)
        if state.get("model") != own["model"]:
            raise ArtifactMismatchError(f"the collection {collection} at {uri} was not filled to its end; fill it again.")
        there, here = state["catalog_version"], own["catalog_version"]
        if there != here:
            logger.warning("Milvus has version %s of the catalogue, not %s: bring it up with `fastattr index`", there, here)
        if state.get("missing"):
            logger.warning("Milvus lacks %d images that could not be loaded; see `fastattr index`", state["missing"])
        return cls(client, collection, config)

    def without(self, removed: Iterable[str]) -> MilvusBackend:
        """The backend when these ids, and no others, have left."""
        other = copy.copy(self)
        other.removed = dict.fromkeys(removed)
        return other

    def applied(self, images: Sequence[Image]) -> MilvusBackend:
        """The backend when changes of images are taken up, as far as they have left or come."""
        other = self.without(self.removed)
        for image in images:
            if image.has_left or image.vector is not None:
                other.removed.pop(image.image_id, None)
            if image.has_left:
                other.removed[image.image_id] = None
        return other

    def count(self, where: Where | None) -> int:
        """How many images the collection holds; a restriction is the server's to count."""
        return self.ntotal

    @property
    def table(self) -> pa.Table:
        """Not here, but on the server."""
        raise InputError("the catalogue is in Milvus; load the attributor without index_uri to read all of it.")

    def search(self, queries: np.ndarray, k: int, *, where: Where | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As `Catalogue.search`; InputError if k is more than a Milvus server gives."""
        require_finite_queries(queries)
        if k > MAX_TOPK:
            raise InputError(f"Milvus gives at most {MAX_TOPK} images a query, asked for {k}.")
        expression = filter_of(where) if where else ""
        fetch = min(k + min(len(self.removed), k), MAX_TOPK)
        while True:
            answers = self._ask(queries, fetch, expression)
            kept = [[hit for hit in hits if hit[0] not in self.removed] for hits in answers]
            ends = [len(hits) >= k or len(found) < fetch for hits, found in zip(kept, answers, strict=True)]
            if fetch == MAX_TOPK or all(ends):
                break
            fetch = min(2 * fetch, MAX_TOPK)
        width = min(k, min((len(hits) for hits in kept), default=0))
        known = self._rows
        rows = np.array([[known.setdefault(name, len(known)) for name, _ in hits[:width]] for hits in kept], dtype=np.int64)
        similarities = np.array([[value for _, value in hits[:width]] for hits in kept], dtype=np.float32)
        return similarities.reshape(len(queries), width), rows.reshape(len(queries), width)

    def _ask(self, queries: np.ndarray, k: int, expression: str) -> list[list[tuple[str, float]]]:
        answers: list[list[tuple[str, float]]] = []
        size, parameters = queries_a_call(self._dim, k), {"metric_type": "IP", "params": {"ef": max(k, 64)}}
        for start in range(0, len(queries), size):
            data = queries[start : start + size].tolist()
            found = self._client.search(self._collection, data=data, limit=k, filter=expression, search_params=parameters)
            answers += [[(str(hit["image_id"]), float(hit["distance"])) for hit in hits] for hits in found]
        return answers

    def fetch(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """The records of rows that `search` gave."""
        names = list(self._rows)
        ids = [names[row] for row in rows]
        found: dict[str, dict[str, Any]] = {}
        for start in range(0, len(ids), 1000):
            chosen = ids_among(ids[start : start + 1000])
            for record in self._client.query(self._collection, filter=chosen, output_fields=list(FIELDS)):
                found[record["image_id"]] = dict(record)
        missing = [image_id for image_id in ids if image_id not in found]
        if missing:
            raise ArtifactMismatchError(f"Milvus found {missing[0]!r} and no longer has it; ask again, it is being changed.")
        return [found[image_id] for image_id in ids]
