"""Catalogue: the training images an attributor can name, in one version; images come, leave and change.

Removed rows are left out in one place, `Catalogue.search`, whichever path found them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastattr.core.errors import ArtifactDamagedError, InputError
from fastattr.index.search import Ranked

COLUMNS = ("image_id", "caption", "creator", "license", "source", "url", "group", "subgroup", "family")
FILTERS = ("creator", "license", "source", "group", "subgroup", "family", "date")
"""Columns that a search can be restricted by."""
Where = Mapping[str, "str | Sequence[str]"]
"""Values by column (one of `FILTERS`); 'since' and 'until' bound the column 'date', both included."""


class Catalogue:
    """One version of a catalogue, with the index that finds its rows; changes make another one.

    Row i is the i-th image that has not been removed: first those of the base, then those added, in order.
    """

    def __init__(self, table: pa.Table, base: Ranked) -> None:
        """A base without changes.

        Args:
            table: (N rows) with the columns `COLUMNS`, 'date' if known and 'thumbnail' if loaded.
            base: the index of its rows; may lack shards, whose images are then not found.
        """
        self._table, self.base = table, base
        self._gone = np.zeros(len(table), dtype=bool)
        self._found = np.zeros(len(table), dtype=bool)
        for first, rows in base.index.ranges:
            self._found[first : first + rows] = True
        self._added: list[dict[str, Any]] = []
        self._embeddings: list[np.ndarray] = []
        self._changed: dict[int, dict[str, Any]] = {}
        self._slots: dict[str, int] | None = None
        self.removed: dict[str, None] = {}
        """Ids that have left, in order."""

    # ---- changes: each returns the next version and leaves this one as it is

    def _next(self) -> Catalogue:
        other = object.__new__(Catalogue)
        hidden = ("alive", "ntotal", "table", "_stacked", "_searchable")
        other.__dict__.update({name: value for name, value in self.__dict__.items() if name not in hidden})
        return other

    def slots(self, image_ids: Sequence[str]) -> list[int]:
        """Where images are kept, base first; -1 for those that are not there."""
        if self._slots is None:
            if len(image_ids) < len(self._table) // 100:  # a few ids of a large base: no table of all of them
                known = pc.index_in(pa.array(image_ids, pa.string()), value_set=self._table["image_id"]).to_pylist()
                added = {record["image_id"]: len(self._table) + i for i, record in enumerate(self._added)}
                found = [
                    added.get(image_id, -1 if slot is None else slot) for image_id, slot in zip(image_ids, known, strict=True)
                ]
                return [-1 if slot >= 0 and self._gone[slot] else slot for slot in found]
            ids = [*self._table["image_id"].to_pylist(), *(record["image_id"] for record in self._added)]
            self._slots = {image_id: slot for slot, image_id in enumerate(ids) if not self._gone[slot]}
        return [self._slots.get(image_id, -1) for image_id in image_ids]

    def with_added(self, records: Sequence[dict[str, Any]], embeddings: np.ndarray) -> Catalogue:
        """With more images: records with the columns of the catalogue, (n, D) float32 embeddings."""
        other = self._next()
        other._added = [*self._added, *records]
        other._embeddings = [*self._embeddings, np.asarray(embeddings, dtype=np.float32)]
        other._gone = np.concatenate([self._gone, np.zeros(len(records), dtype=bool)])
        other._slots = None if self._slots is None else dict(self._slots)
        for offset, record in enumerate(records):
            if other._slots is not None:
                other._slots[record["image_id"]] = len(self._gone) + offset
        back = {record["image_id"] for record in records} & self.removed.keys()
        if back:
            other.removed = dict.fromkeys(image_id for image_id in self.removed if image_id not in back)
        return other

    def with_removed(self, image_ids: Sequence[str]) -> Catalogue:
        """Without these images; unknown ids are only remembered."""
        other = self._next()
        slots = [slot for slot in self.slots(image_ids) if slot >= 0]
        other._gone = self._gone.copy()
        other._gone[slots] = True
        other._slots = None if self._slots is None else {**self._slots}
        for image_id in image_ids:
            if other._slots is not None:
                other._slots.pop(image_id, None)
        other.removed = self.removed | dict.fromkeys(image_ids)
        return other

    def with_updated(self, changes: Mapping[str, Mapping[str, Any]]) -> Catalogue:
        """With new metadata: columns by image id."""
        other = self._next()
        other._changed = dict(self._changed)
        for slot, fields in zip(self.slots(list(changes)), changes.values(), strict=True):
            if slot >= 0:
                other._changed[slot] = {**other._changed.get(slot, {}), **fields}
        return other

    def applied(self, entry: Mapping[str, Any]) -> Catalogue:
        """With one line of the journal."""
        operation = entry["operation"]
        if operation == "add":
            records = [_record(image) for image in entry["images"]]
            return self.with_added(records, np.stack([decode_vector(image["embedding"]) for image in entry["images"]]))
        if operation == "remove":
            return self.with_removed(entry["image_ids"])
        if operation == "update":
            return self.with_updated(
                {each["image_id"]: {k: v for k, v in each.items() if k != "image_id"} for each in entry["images"]}
            )
        if operation == "compact":  # the first line after a base: who left before it was made
            other = self._next()
            other.removed = dict.fromkeys(entry["removed"])
            return other
        raise ArtifactDamagedError(f"the journal has an operation {operation!r}, which this fastattr does not know.")

    # ---- contents

    def __len__(self) -> int:
        return len(self.alive)

    @cached_property
    def alive(self) -> np.ndarray:
        """(rows) slots of the images that have not been removed."""
        return np.flatnonzero(~self._gone)

    @cached_property
    def ntotal(self) -> int:
        """Images that a search can find."""
        return int(self._searchable.sum())

    @cached_property
    def _searchable(self) -> np.ndarray:
        return np.concatenate([self._found, np.ones(len(self._added), dtype=bool)]) & ~self._gone

    @cached_property
    def _stacked(self) -> np.ndarray:
        """(M, D) embeddings of the images added since the base."""
        if len(self._embeddings) > 1:
            self._embeddings = [np.concatenate(self._embeddings)]
        return self._embeddings[0] if self._embeddings else np.zeros((0, 0), dtype=np.float32)

    @cached_property
    def table(self) -> pa.Table:
        """All images that have not been removed, one row each."""
        if not self._added and not self._changed and not self._gone.any():
            return self._table
        rows = len(self._table)
        columns = []
        for field in self._schema:
            known = field.name in self._table.column_names
            column = self._table[field.name] if known else pa.chunked_array([pa.array([""] * rows, field.type)])
            slots = sorted(slot for slot, fields in self._changed.items() if slot < rows and field.name in fields)
            if slots:
                mask = np.zeros(rows, dtype=bool)
                mask[slots] = True
                values = pa.array([self._changed[slot][field.name] for slot in slots], field.type)
                column = pc.replace_with_mask(column.combine_chunks(), pa.array(mask), values)
            columns.append(column)
        base = pa.table(columns, schema=self._schema).filter(pa.array(~self._gone[:rows]))
        added = self.fetch(np.arange(len(base), len(self)))
        return pa.concat_tables([base, pa.Table.from_pylist(added, schema=self._schema)])

    @property
    def _schema(self) -> pa.Schema:
        schema = self._table.schema
        fields = ((record, name) for record in [*self._added, *self._changed.values()] for name in record)
        for name in dict.fromkeys(name for _, name in fields if name not in schema.names and name != "thumbnail"):
            schema = schema.append(pa.field(name, pa.string()))
        return schema

    def fetch(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """The records of (n,) rows: what the catalogue says of each image."""
        slots = self.alive[np.asarray(rows, dtype=np.int64)]
        base = slots < len(self._table)
        known = iter(self._table.take(_numbers(slots[base])).to_pylist())
        found = [
            next(known) if slot < len(self._table) else dict(self._added[slot - len(self._table)]) for slot in slots.tolist()
        ]
        names = self._schema.names
        for slot, record in zip(slots.tolist(), found, strict=True):
            record.update(self._changed.get(slot, {}))
            for name in names:
                record.setdefault(name, b"" if name == "thumbnail" else "")
        return found

    def _matching(self, where: Where) -> np.ndarray:
        """Which slots meet a restriction."""
        allowed = dict(where)
        bounds = allowed.pop("since", ""), allowed.pop("until", "\U0010ffff")
        unknown = set(allowed) - set(FILTERS)
        if unknown:
            raise InputError(
                f"a search can be restricted by {', '.join(FILTERS)}, since and until, not by {sorted(unknown)[0]!r}."
            )
        wanted = {name: {value} if isinstance(value, str) else set(value) for name, value in allowed.items()}
        dated = "since" in where or "until" in where

        def meets(record: Mapping[str, Any]) -> bool:
            date = record.get("date") or ""
            return all(record.get(name, "") in values for name, values in wanted.items()) and (
                not dated or (date != "" and str(bounds[0]) <= date[:10] <= str(bounds[1]))
            )

        base = np.ones(len(self._table), dtype=bool)
        for name, values in wanted.items():
            if name in self._table.column_names:
                base &= pc.is_in(self._table[name], value_set=pa.array(sorted(values), pa.string())).to_numpy()
            else:
                base &= "" in values
        if dated and "date" in self._table.column_names:
            days = pc.utf8_slice_codeunits(self._table["date"], 0, 10)
            inside = pc.and_(pc.greater_equal(days, str(bounds[0])), pc.less_equal(days, str(bounds[1])))
            base &= pc.and_(inside, pc.not_equal(days, "")).to_numpy()
        elif dated:
            base[:] = False
        mask = np.concatenate([base, np.array([meets(record) for record in self._added], dtype=bool)])
        for slot, fields in self._changed.items():
            old = self._table.slice(slot, 1).to_pylist()[0] if slot < len(self._table) else self._added[slot - len(self._table)]
            mask[slot] = meets({**old, **fields})
        return mask

    # ---- search

    def search(self, queries: np.ndarray, k: int, *, where: Where | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k most similar images that have not been removed and meet the restriction.

        Args:
            queries: (Q, D) float32 unit vectors.
            k: how many.
            where: restriction; None for none.

        Returns:
            (Q, n) similarities, best first, and rows; n is k, or as many images as there are.

        Raises:
            InputError: the restriction names another column.
        """
        allowed = self._searchable & self._matching(where) if where else self._searchable
        base_rows = len(self._table)
        similarities, slots = self.base.search(queries, k, allowed=allowed[:base_rows])
        fresh = np.flatnonzero(allowed[base_rows:])
        if len(fresh):
            similarities = np.concatenate([similarities, queries @ self._stacked[fresh].T], axis=1)
            slots = np.concatenate([slots, np.broadcast_to(base_rows + fresh, (len(queries), len(fresh)))], axis=1)
            best = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
            similarities, slots = np.take_along_axis(similarities, best, axis=1), np.take_along_axis(slots, best, axis=1)
        return similarities, np.searchsorted(self.alive, slots)

    def rows_of(self, slots: np.ndarray) -> np.ndarray:
        """(n,) rows of the images in (n,) slots; -1 for those that have been removed."""
        row = np.full(len(self._gone), -1, dtype=np.int64)
        row[self.alive] = np.arange(len(self.alive))
        found: np.ndarray = row[slots]
        return found

    def vectors(self, rows: np.ndarray) -> np.ndarray | None:
        """(n, D) float32 embeddings of (n,) rows, as well as they are kept; None if the index can't give single ones back."""
        if not self.base.reads_rows:
            return None
        slots = self.alive[rows]
        base = slots < len(self._table)
        found = np.empty((len(rows), self.base.dim), dtype=np.float32)
        found[base] = self.base.take(slots[base])
        if not base.all():
            found[~base] = self._stacked[slots[~base] - len(self._table)]
        return found

    def read(self, start: int, stop: int) -> np.ndarray:
        """The embeddings of rows start to stop, as well as they are kept, (stop - start, D) float32."""
        slots = self.alive[start:stop]
        base = slots[slots < len(self._table)]
        parts = []
        if len(base):
            low = int(base[0])
            parts.append(self.base.read(low, int(base[-1]) + 1)[base - low])
        if len(base) < len(slots):
            parts.append(self._stacked[slots[len(base) :] - len(self._table)])
        return np.concatenate(parts)


def _numbers(values: np.ndarray) -> pa.Array:
    """(n,) int64 as Arrow; `pa.array` would import pandas, which takes longer than an answer."""
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(np.ascontiguousarray(values, dtype=np.int64))])


# ---- records and vectors in the journal


def encode_vector(vector: np.ndarray) -> str:
    """(D,) floats as text: float16, little-endian, base64."""
    return base64.b64encode(np.asarray(vector, dtype="<f2").tobytes()).decode()


def decode_vector(text: str) -> np.ndarray:
    """(D,) float32 of `encode_vector`'s text."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f2").astype(np.float32)


def _record(image: Mapping[str, Any]) -> dict[str, Any]:
    """A journal's image as a record."""
    record = {name: value for name, value in image.items() if name != "embedding"}
    if "thumbnail" in record:
        record["thumbnail"] = base64.b64decode(record["thumbnail"])
    return record
