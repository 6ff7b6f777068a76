"""A Milvus collection of an attributor: the same search and records from a server (or a cluster), beyond one machine.

`MilvusBackend` answers as `catalogue.Catalogue` does, with restrictions applied by the server. What the attributor's own
journal has removed is dropped here as well, so that not even a collection that lags behind names it. `milvus.load` fills the
collection. Needs `pip install 'fastattr[milvus]'`; a path that ends in .db is Milvus Lite, embedded.

The limits of a Milvus server are kept on this side (Milvus Lite has none): 16,384 results a query, 64 MB a call.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from fastattr.attributor.catalogue import COLUMNS
from fastattr.attributor.folder import versions
from fastattr.attributor.restrictions import Where, restriction_of
from fastattr.core.errors import ArtifactMismatchError, ArtifactNotFoundError, InputError, MissingExtraError
from fastattr.index.search import require_finite_queries

try:
    from pymilvus import DataType, MilvusClient
    from pymilvus.exceptions import MilvusException
except ImportError as failure:
    raise MissingExtraError(f"Milvus needs pymilvus ({failure}); run: pip install 'fastattr[milvus]'") from failure

logger = logging.getLogger(__name__)

MAX_TOPK = 16_384
"""Results of one query."""
MAX_CALL = 64_000_000
"""Bytes of one call, in or out."""
TEXT = 4_096
"""Bytes of one text; Milvus keeps them to a given length."""
LONGEST_ID = 512
"""Bytes of an image id."""
FIELDS = (*COLUMNS, "date")
STATE = "fastattr_state"
"""Property of a collection: the versions that it was brought up to."""


def connect(uri: str, token: str = "") -> MilvusClient:
    """A client; 'https://...' is encrypted.

    Without a token FASTATTR_MILVUS_TOKEN is taken, and the server's certificate is checked against the file that
    FASTATTR_MILVUS_CA names, if it is set; both hold for loading and for searching.

    Raises:
        ArtifactNotFoundError: nothing answers there.
    """
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
    state: dict[str, Any] = json.loads(client.describe_collection(collection).get("properties", {}).get(STATE, "{}"))
    return state


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
    """A restriction in Milvus's words.

    Raises:
        InputError: it names another column.
    """
    wanted = restriction_of(where)
    terms = [f"{name} in {literal(values)}" for name, values in wanted.values.items()]
    if wanted.since:
        terms.append(f"date >= {literal(wanted.since)}")
    if wanted.until:
        terms.append(f"date <= {literal(wanted.until + chr(0x10FFFF))}")
    return " and ".join([*terms, 'date != ""'] if wanted.dated else terms)


class MilvusBackend:
    """Search and records from a collection; a row is what `search` gives `fetch`, the number of an image in this process."""

    def __init__(self, client: MilvusClient, collection: str, config: Mapping[str, Any], removed: Sequence[str]) -> None:
        self._client, self._collection = client, collection
        self._dim = int(config["student"]["embed_dim"])
        self.removed = dict.fromkeys(removed)
        """Ids that have left."""
        self._ids: list[str] = []
        self._rows: dict[str, int] = {}
        self.ntotal = int(client.query(collection, filter="", output_fields=["count(*)"])[0]["count(*)"])

    @classmethod
    def open(cls, uri: str, config: Mapping[str, Any], removed: Sequence[str], token: str = "") -> MilvusBackend:
        """The backend of an attributor.

        Raises:
            ArtifactNotFoundError: nothing answers, or the collection is not there.
            ArtifactMismatchError: the collection was filled from another index.
        """
        client, collection = connect(uri, token), collection_of(config)
        if not client.has_collection(collection):
            raise ArtifactNotFoundError(
                f"{uri} has no collection of this attributor ({collection}); fill it with "
                f"`fastattr index --backend milvus --uri {uri} ATTRIBUTOR`."
            )
        client.load_collection(collection)
        state = state_of(client, collection)
        own = versions(config)
        if state.get("model") != own["model"]:
            raise ArtifactMismatchError(f"the collection {collection} at {uri} was not filled to its end; fill it again.")
        if state["catalog_version"] != own["catalog_version"]:
            logger.warning(
                "Milvus has version %s of the catalogue, the attributor version %s: bring it up with `fastattr index`",
                state["catalog_version"],
                own["catalog_version"],
            )
        if state.get("missing"):
            logger.warning("Milvus lacks %d images that could not be loaded; see `fastattr index`", state["missing"])
        return cls(client, collection, config, removed)

    def with_removed(self, removed: Sequence[str] | dict[str, None]) -> MilvusBackend:
        """The backend when these ids have left."""
        other = copy.copy(self)
        other.removed = dict.fromkeys(removed)
        return other

    def count(self, where: Where | None) -> int:
        """How many images the collection holds; a restriction is the server's to count."""
        return self.ntotal

    @property
    def table(self) -> pa.Table:
        """Not here: the catalogue is on the server.

        Raises:
            InputError: always.
        """
        raise InputError("the catalogue is in Milvus; load the attributor without index_uri to read all of it.")

    def search(self, queries: np.ndarray, k: int, *, where: Where | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As `Catalogue.search`.

        Raises:
            InputError: k is more than a Milvus server gives, a query is not finite, or the restriction names another column.
        """
        require_finite_queries(queries)
        if k > MAX_TOPK:
            raise InputError(f"Milvus gives at most {MAX_TOPK} images a query, asked for {k}.")
        expression = filter_of(where) if where else ""
        fetch = min(k + min(len(self.removed), k), MAX_TOPK)
        while True:
            answers = self._ask(queries, fetch, expression)
            kept = [[hit for hit in hits if hit[0] not in self.removed] for hits in answers]
            short = any(len(hits) < k and len(before) == fetch for hits, before in zip(kept, answers, strict=True))
            if not short or fetch == MAX_TOPK:
                break
            fetch = min(2 * fetch, MAX_TOPK)
        width = min(k, max((len(hits) for hits in kept), default=0), min((len(hits) for hits in kept), default=0))
        rows = np.array([[self._row(image_id) for image_id, _ in hits[:width]] for hits in kept], dtype=np.int64)
        similarities = np.array([[value for _, value in hits[:width]] for hits in kept], dtype=np.float32)
        return similarities.reshape(len(queries), width), rows.reshape(len(queries), width)

    def _ask(self, queries: np.ndarray, k: int, expression: str) -> list[list[tuple[str, float]]]:
        answers: list[list[tuple[str, float]]] = []
        size = queries_a_call(self._dim, k)
        for start in range(0, len(queries), size):
            found = self._client.search(
                self._collection,
                data=queries[start : start + size].tolist(),
                limit=k,
                filter=expression,
                search_params={"metric_type": "IP", "params": {"ef": max(k, 64)}},
            )
            answers += [[(str(hit["image_id"]), float(hit["distance"])) for hit in hits] for hits in found]
        return answers

    def _row(self, image_id: str) -> int:
        if image_id not in self._rows:
            self._rows[image_id] = len(self._ids)
            self._ids.append(image_id)
        return self._rows[image_id]

    def fetch(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """The records of rows that `search` gave."""
        ids = [self._ids[row] for row in rows]
        found: dict[str, dict[str, Any]] = {}
        for start in range(0, len(ids), 1000):
            chosen = ids_among(ids[start : start + 1000])
            for record in self._client.query(self._collection, filter=chosen, output_fields=list(FIELDS)):
                found[record["image_id"]] = dict(record)
        missing = [image_id for image_id in ids if image_id not in found]
        if missing:
            raise ArtifactMismatchError(f"Milvus found {missing[0]!r} and no longer has it; ask again, it is being changed.")
        return [found[image_id] for image_id in ids]
