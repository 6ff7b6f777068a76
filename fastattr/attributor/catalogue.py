"""Catalogue: the training images an attributor can name, in one version; images come, leave and change."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastattr.attributor.changes import Image
from fastattr.attributor.inputs import DAY, FILTERS, Where, restriction_of
from fastattr.index.search import Ranked, best

FOLD = 1000  # changed rows of the base that are kept apart; more are written into the columns in memory


class Catalogue:
    """One version of a catalogue, with the index that finds its rows; changes make another one.

    Row i is the i-th image that has not been removed: first those of the base, then those added, in order.
    """

    def __init__(self, table: pa.Table, base: Ranked, removed: Sequence[str] = ()) -> None:
        """A base: its table (`COLUMNS`, 'date' if known, 'thumbnail' if loaded), its index, and what had left before."""
        self._table, self.base, self._rows = table, base, len(table)
        self._first = table  # as the base has it
        self._gone = np.zeros(len(table), dtype=bool)
        self._found = np.zeros(len(table), dtype=bool)
        for first, rows in base.index.ranges:
            self._found[first : first + rows] = True
        self._added: list[dict[str, Any]] = []
        self._embeddings: list[np.ndarray] = []
        self._own: dict[str, tuple[int, int]] = {}  # place and slot of the images added and not removed
        self._changed: dict[int, dict[str, str]] = {}  # of the base, by slot, until there are enough to fold them in
        self._extra: dict[str, None] = {}  # columns that changes have brought
        self.removed: dict[str, None] = dict.fromkeys(removed)  # ids that have left, in order

    def slots(self, image_ids: Sequence[str]) -> list[int]:
        """Where images are kept, base first; -1 for those that are not there."""
        column = self._table["image_id"]
        rows = np.flatnonzero(pc.is_in(column, value_set=pa.array(image_ids, pa.string())).to_numpy())
        known = dict(zip(column.take(numbers(rows)).to_pylist(), rows.tolist(), strict=True))
        slots = [self._own[name][1] if name in self._own else known.get(name, -1) for name in image_ids]
        return [-1 if slot >= 0 and self._gone[slot] else slot for slot in slots]

    def applied(self, images: Sequence[Image]) -> Catalogue:
        """The catalogue with what changes say of images, in the order of their places; this one stays as it is."""
        other = object.__new__(Catalogue)
        hidden = ("alive", "ntotal", "table", "_stacked", "_searchable")
        other.__dict__.update({name: value for name, value in self.__dict__.items() if name not in hidden})
        other._gone, other._added, other._own = self._gone.copy(), list(self._added), dict(self._own)
        other._changed, other.removed = dict(self._changed), dict(self.removed)
        other._extra = self._extra | dict.fromkeys(name for image in images for name in image.fields)
        fresh = []
        for image, slot in zip(images, self.slots([image.image_id for image in images]), strict=True):
            name, record = image.image_id, {"image_id": image.image_id, **image.fields}
            if image.vector is not None and image.thumbnail is not None:
                record["thumbnail"] = image.thumbnail  # type: ignore[assignment]
            if image.vector is not None and self._own.get(name, (0, 0))[0] == image.place and image.place:
                other._added[slot - self._rows] = record
                continue
            if image.vector is None and not image.has_left:
                if slot >= 0:
                    other._changed[slot] = dict(image.fields)
                continue
            if slot >= 0:
                other._gone[slot] = True
            other._own.pop(name, None)
            other.removed.pop(name, None)
            if image.has_left:
                other.removed[name] = None
            else:
                other._own[name] = (image.place, self._rows + len(other._added))
                other._added.append(record)
                fresh.append(np.frombuffer(image.vector or b"", dtype="<f2").astype(np.float32))
        if fresh:
            other._gone = np.concatenate([other._gone, np.zeros(len(fresh), dtype=bool)])
            other._embeddings = [*self._embeddings, np.stack(fresh)]
        if len(other._changed) > FOLD:
            other._table, other._changed = other._merged, {}
        return other

    def __len__(self) -> int:
        return len(self.alive)

    @property
    def changed(self) -> bool:
        """Whether it says anything else than its base."""
        return bool(self._gone.any() or self._added or self._changed or self._table is not self._first)

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
        base = self._merged.filter(pa.array(~self._gone[: self._rows]))
        added = self.fetch(np.arange(len(base), len(self)))
        return pa.concat_tables([base, pa.Table.from_pylist(added, schema=self._schema)])

    @property
    def has_thumbnails(self) -> bool:
        """Whether thumbnails are loaded."""
        return "thumbnail" in self._table.column_names

    @property
    def _merged(self) -> pa.Table:
        """The rows of the base, removed ones too, with what has changed of them."""
        columns = []
        for field in self._schema:
            known = field.name in self._table.column_names
            column = self._table[field.name] if known else pa.chunked_array([pa.repeat(pa.scalar("", field.type), self._rows)])
            slots = sorted(slot for slot, fields in self._changed.items() if field.name in fields)
            if slots:
                mask = np.zeros(self._rows, dtype=bool)
                mask[slots] = True
                values = pa.array([self._changed[slot][field.name] for slot in slots], field.type)
                column = pc.replace_with_mask(column.combine_chunks(), pa.array(mask), values)
            columns.append(column)
        return pa.table(columns, schema=self._schema)

    @property
    def _schema(self) -> pa.Schema:
        schema = self._table.schema
        new = [name for name in self._extra if name not in schema.names and name != "thumbnail"]
        return pa.schema([*schema, *(pa.field(name, pa.string()) for name in new)], schema.metadata)

    def fetch(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """The records of (n,) rows: what the catalogue says of each image."""
        slots = self.alive[np.asarray(rows, dtype=np.int64)]
        base = slots < self._rows
        known = iter(self._table.take(numbers(slots[base])).to_pylist())
        found = [next(known) if slot < self._rows else dict(self._added[slot - self._rows]) for slot in slots.tolist()]
        names = self._schema.names
        for slot, record in zip(slots.tolist(), found, strict=True):
            record.update(self._changed.get(slot, {}))
            for name in names:
                record.setdefault(name, b"" if name == "thumbnail" else "")
        return found

    def _matching(self, where: Where) -> np.ndarray:
        """(slots,) whether an image meets a restriction."""
        wanted = restriction_of(where)
        base = np.ones(self._rows, dtype=bool)
        for name, values in wanted.values.items():
            if name in self._table.column_names:
                base &= pc.is_in(self._table[name], value_set=pa.array(sorted(values), pa.string())).to_numpy()
            else:
                base &= "" in values
        if wanted.dated and "date" in self._table.column_names:
            column = pc.fill_null(self._table["date"], "")
            days = pc.utf8_slice_codeunits(column, 0, 10)
            inside = pc.and_(pc.greater_equal(days, wanted.since), pc.less_equal(days, wanted.until))
            base &= pc.and_(inside, pc.match_substring_regex(column, "^" + DAY.pattern)).to_numpy()
        elif wanted.dated:
            base[:] = False
        mask = np.concatenate([base, np.array([wanted.allows(record) for record in self._added], dtype=bool)])
        slots = np.array(list(self._changed), dtype=np.int64)
        plain = self._table.select([name for name in FILTERS if name in self._table.column_names])
        for slot, old in zip(slots.tolist(), plain.take(numbers(slots)).to_pylist() if len(slots) else [], strict=True):
            mask[slot] = wanted.allows({**old, **self._changed[slot]})
        return mask

    def count(self, where: Where | None) -> int:
        """How many images a search with this restriction can find."""
        return int((self._searchable & self._matching(where)).sum()) if where else self.ntotal

    def search(self, queries: np.ndarray, k: int, *, where: Where | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(Q, n) similarities and rows of the images that may be named, most similar to (Q, D) unit vectors first."""
        allowed = self._searchable & self._matching(where) if where else self._searchable
        similarities, slots = self.base.search(queries, k, allowed=allowed[: self._rows])
        fresh = np.flatnonzero(allowed[self._rows :])
        if len(fresh):
            similarities = np.concatenate([similarities, queries @ self._stacked[fresh].T], axis=1)
            slots = np.concatenate([slots, np.broadcast_to(self._rows + fresh, (len(queries), len(fresh)))], axis=1)
            similarities, slots = best(similarities, slots, k)
        return similarities, np.searchsorted(self.alive, slots)

    @property
    def first_added(self) -> int:
        """The first row of an image that was added since the base; the number of rows if there is none."""
        return int(np.searchsorted(self.alive, self._rows))

    def rows_of(self, slots: np.ndarray) -> np.ndarray:
        """(n,) rows of the images in (n,) slots; -1 for those that have been removed."""
        row = np.full(len(self._gone), -1, dtype=np.int64)
        row[self.alive] = np.arange(len(self.alive))
        return row[slots]

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        """(n, D) float32 embeddings of (n,) rows, as well as they are kept."""
        if not self.base.reads_rows:  # an inverted file without vectors gives ranges only
            low = int(rows.min())
            return self.read(low, int(rows.max()) + 1)[rows - low]
        slots = self.alive[rows]
        base = slots < self._rows
        found = np.empty((len(rows), self.base.dim), dtype=np.float32)
        found[base] = self.base.take(slots[base])
        if not base.all():
            found[~base] = self._stacked[slots[~base] - self._rows]
        return found

    def read(self, start: int, stop: int) -> np.ndarray:
        """The embeddings of rows start to stop, as well as they are kept, (stop - start, D) float32."""
        slots = self.alive[start:stop]
        base = slots[slots < self._rows]
        parts = []
        if len(base):
            low = int(base[0])
            parts.append(self.base.read(low, int(base[-1]) + 1)[base - low])
        if len(base) < len(slots):
            parts.append(self._stacked[slots[len(base) :] - self._rows])
        return np.concatenate(parts)


def numbers(values: np.ndarray) -> pa.Array:
    """(n,) int64 as Arrow; `pa.array` would import pandas, which takes longer than an answer."""
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(np.ascontiguousarray(values, dtype=np.int64))])
