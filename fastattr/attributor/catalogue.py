"""Catalogue: the training images an attributor can name; images come, leave and change, and nothing is trained again.

An attributor folder is a base (index, catalogue table, vectors: files that never change) and a journal of what changed
since, one JSON line a change: additions with their embeddings, removals, new metadata. config.json names the files with
their SHA-256 and says how many bytes of the journal count. A change is appended to the journal and synced; then config.json is
written beside the old one, synced and renamed, which is the moment at which it holds. A reader reads config.json once and so
sees one version, whatever a writer does meanwhile; a process killed anywhere leaves the version before or after.
`compact` folds the journal into a new base: only then are the data of removed images gone from the disk. Their ids stay
in the journal, and are not taken in again unless it is asked for.

Removed rows are left out in one place, `Catalogue.search`, whichever path found them.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastattr.core.errors import ArtifactDamagedError, FormatVersionError, InputError, MissingFileError
from fastattr.core.files import atomic_path, read_json, remove, sha256_file, write_json
from fastattr.index.build import add_shards
from fastattr.index.files import check_file, empty_copy, load_index, save_index
from fastattr.index.search import Ranked, open_ranked
from fastattr.index.vectors import write_vectors

FORMAT_VERSION = 3
"""3 has a journal, vectors for exact re-ranking and a seal on config.json; 1 and 2 are read, too."""
COLUMNS = ("image_id", "caption", "creator", "license", "source", "url", "group", "subgroup", "family")
FILTERS = ("creator", "license", "source", "group", "subgroup", "family", "date")
"""Columns that a search can be restricted by."""
ARROW_ROWS = 100_000
"""From here on the catalogue is an Arrow file, larger, but mapped into memory and not read."""
EXACT_ROWS = 10_000
"""If a restriction leaves no more rows than this, all of them are compared."""
LINE_IMAGES = 1000
"""Images in one line of the journal."""
BASE_FILE = re.compile(r"(catalog|thumbnails|index|vectors|journal|plain)(-[\w-]+)?\.(parquet|arrow|faiss|f16|sha256|jsonl)")
"""Files that a catalogue writes, and may delete once no config.json names them."""

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
        similarities, slots = self._search_base(queries, k, allowed[:base_rows])
        fresh = np.flatnonzero(allowed[base_rows:])
        if len(fresh):
            similarities = np.concatenate([similarities, queries @ self._stacked[fresh].T], axis=1)
            slots = np.concatenate([slots, np.broadcast_to(base_rows + fresh, (len(queries), len(fresh)))], axis=1)
            best = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
            similarities, slots = np.take_along_axis(similarities, best, axis=1), np.take_along_axis(slots, best, axis=1)
        return similarities, np.searchsorted(self.alive, slots)

    def _search_base(self, queries: np.ndarray, k: int, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(Q, n) similarities and slots among the allowed rows of the base, best first; n is k or what there is."""
        count = int(allowed.sum())
        wanted = min(k, count)
        if not wanted:
            return np.zeros((len(queries), 0), dtype=np.float32), np.zeros((len(queries), 0), dtype=np.int64)
        excluded = self.base.ntotal - count
        if excluded and count <= EXACT_ROWS and self.base.reads_rows:
            rows = np.flatnonzero(allowed)
            similarities = self.base.similarities(queries, rows)
            best = np.argsort(-similarities, axis=1, kind="stable")[:, :wanted]
            return np.take_along_axis(similarities, best, axis=1), rows[best]
        fetch, widen, widest = wanted + min(excluded, wanted), 1, self.base.index.widest
        while True:
            similarities, rows = self.base.search(queries, min(fetch, self.base.ntotal), widen=widen)
            good = (rows >= 0) & allowed[rows]
            if (good.sum(axis=1) >= wanted).all():
                break
            if fetch >= self.base.ntotal and widen >= widest:
                raise ArtifactDamagedError("the index finds fewer rows than it holds; build the attributor again.")
            widen = 2 * widen if (rows < 0).any() or fetch >= self.base.ntotal else widen
            fetch *= 2
        best = np.argsort(~good, axis=1, kind="stable")[:, :wanted]
        return np.take_along_axis(similarities, best, axis=1), np.take_along_axis(rows, best, axis=1)

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


# ---- config.json


def seal(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with a checksum of all the rest."""
    rest = {name: value for name, value in config.items() if name != "seal"}
    canonical = json.dumps(rest, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return {**rest, "seal": hashlib.sha256(canonical.encode()).hexdigest()}


def read_config(folder: Path) -> dict[str, Any]:
    """An attributor's config.json, checked as far as everything else relies on it.

    Raises:
        MissingFileError: there is none.
        FormatVersionError: it was written by a newer fastattr.
        ArtifactDamagedError: it is damaged, or names files outside its folder.
    """
    path = folder / "config.json"
    if not path.exists():
        raise MissingFileError(f"{folder} has no config.json; it is no attributor, or an incomplete one.")
    config = read_json(path)
    damaged = ArtifactDamagedError(f"{path} is not an attributor's, or damaged; fetch the attributor again.")
    if not isinstance(config, dict) or not isinstance(config.get("format_version"), int):
        raise damaged
    if config["format_version"] > FORMAT_VERSION:
        raise FormatVersionError(
            f"{folder} has format version {config['format_version']}, this fastattr reads up to {FORMAT_VERSION}; "
            "upgrade fastattr (`pip install -U fastattr`), or take an earlier revision of the attributor."
        )
    if not isinstance(config.get("sha256"), dict) or not all(isinstance(value, str) for value in config["sha256"].values()):
        raise damaged
    for file in config["sha256"]:
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise ArtifactDamagedError(f"{path} names {file!r}, outside its folder; do not use it.")
    if (config["format_version"] >= 3 or "seal" in config) and config != seal(config):
        raise ArtifactDamagedError(f"{path} is not what was written (its seal differs); fetch the attributor again.")
    return config


def write_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Seal a config and put it in the place of config.json, synced; returns it."""
    config = seal(config)
    write_json(folder / "config.json", config)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself
    finally:
        os.close(descriptor)
    return config


def file_of(config: Mapping[str, Any], part: str) -> str:
    """The file that holds a part: 'catalog', 'thumbnails', 'journal' or 'plain', the index of the untuned features."""
    endings = {"catalog": "parquet", "thumbnails": "parquet", "journal": "jsonl", "plain": "faiss"}
    return str(config.get("files", {}).get(part, f"{part}.{endings[part]}"))


def versions(config: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies an attributor: SHA-256 of model, index and catalogue, and the catalogue's version."""
    sha256 = config["sha256"]
    parts = [file_of(config, "catalog"), *([file_of(config, "journal")] if file_of(config, "journal") in sha256 else [])]
    return {
        "model": sha256["model.safetensors"],
        "index": _together([sha256[file] for file in index_files(config)]),
        "catalog": _together([sha256[file] for file in parts]),
        "catalog_version": int(config.get("catalog_version", 1)),
    }


def index_files(config: Mapping[str, Any]) -> list[str]:
    """The files of the index and its vectors' digests, in order."""
    shards = config.get("index_shards") or [{"file": "index.faiss"}]
    stored = config.get("vectors")
    return [shard["file"] for shard in shards] + ([stored["digests"]] if stored else [])


def _together(checksums: Sequence[str]) -> str:
    return checksums[0] if len(checksums) == 1 else hashlib.sha256("".join(checksums).encode()).hexdigest()


# ---- reading a folder


def check_files(folder: Path, config: Mapping[str, Any], files: Iterable[str]) -> None:
    """Compare checksums of files, but for those of the index and its vectors, which are compared when they are opened.

    Raises:
        MissingFileError: a file is missing.
        ArtifactDamagedError: a checksum differs.
    """
    stored = config.get("vectors") or {}
    later = {*index_files(config), stored.get("file"), file_of(config, "journal"), file_of(config, "plain")}
    for file in files:
        if not (folder / file).exists():
            raise MissingFileError(f"{folder} has no {file}, which its config.json names; fetch or build the attributor again.")
        if file not in later:
            check_file(folder / file, config["sha256"][file])


def open_catalogue(
    folder: Path, config: Mapping[str, Any], *, thumbnails: bool = True, shards: Sequence[int] | None = None
) -> Catalogue:
    """The version of the catalogue that a config describes.

    Raises:
        MissingFileError: a file is missing.
        ArtifactDamagedError: a file is not the one of the config.
    """
    table = read_table(folder / file_of(config, "catalog"))
    if thumbnails and file_of(config, "thumbnails") in config["sha256"]:
        table = _with_thumbnails(table, read_table(folder / file_of(config, "thumbnails")))
    settings = {"index_shards": [{"file": "index.faiss", "first_row": 0}], "index": "", **config}
    base = open_ranked(folder, settings, config["sha256"], shards)
    if shards is None and base.ntotal != len(table):
        raise ArtifactDamagedError(f"{folder}: the index holds {base.ntotal} images, the catalogue {len(table)}.")
    catalogue = Catalogue(table, base)
    for entry in read_journal(folder, config):
        catalogue = catalogue.applied(entry)
    return catalogue


def read_table(path: Path) -> pa.Table:
    """A table: parquet, or Arrow, which is mapped into memory.

    Raises:
        ArtifactDamagedError: it can't be read.
    """
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all() if path.suffix == ".arrow" else pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ArtifactDamagedError(f"{path} can't be read ({error}); fetch the attributor again.") from error


def write_table(table: pa.Table, folder: Path, stem: str) -> str:
    """Write a table, small ones as parquet, large ones as Arrow; returns the file's name."""
    file = f"{stem}.{'arrow' if len(table) >= ARROW_ROWS else 'parquet'}"
    with atomic_path(folder / file) as temporary:
        if file.endswith(".arrow"):
            with pa.ipc.new_file(str(temporary), table.schema) as out:
                out.write_table(table, max_chunksize=1 << 20)
        else:
            pq.write_table(table, temporary, compression="zstd", compression_level=12)
    return file


def _with_thumbnails(catalog: pa.Table, thumbnails: pa.Table) -> pa.Table:
    """The catalogue with its images' thumbnails, matched by image id."""
    if thumbnails["image_id"] != catalog["image_id"]:
        raise ArtifactDamagedError("the catalogue and its thumbnails list other images; fetch the attributor again.")
    return catalog.append_column("thumbnail", thumbnails["thumbnail"])


def read_journal(folder: Path, config: Mapping[str, Any], *, after: int = 0) -> list[dict[str, Any]]:
    """The changes since the base, oldest first; what a killed writer left after them is not read.

    Args:
        folder: of the attributor.
        config: of the version that is wanted.
        after: bytes of the journal that are known already.

    Raises:
        MissingFileError: there is no journal where the config names one.
        ArtifactDamagedError: it is not the one of the config.
    """
    file = file_of(config, "journal")
    if file not in config["sha256"]:
        return []
    path = folder / file
    if not path.exists():
        raise MissingFileError(f"{path} does not exist; fetch the attributor again.")
    with path.open("rb") as lines:
        data = lines.read(int(config["journal_bytes"]))
    if hashlib.sha256(data).hexdigest() != config["sha256"][file]:
        raise ArtifactDamagedError(f"{path} is not the journal of config.json (SHA-256 differs); fetch the attributor again.")
    return [json.loads(line) for line in data[after:].split(b"\n") if line]


def copy_version(folder: Path, config: Mapping[str, Any], target: Path) -> None:
    """Copy one version's files, and of the journal what belongs to it; checked on the way.

    Raises:
        MissingFileError: a file is missing.
        ArtifactDamagedError: a checksum differs.
    """
    for file, expected in config["sha256"].items():
        if not (folder / file).exists():
            raise MissingFileError(f"{folder} has no {file}, which its config.json names; build the attributor again.")
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, target / file)
        if file == file_of(config, "journal"):
            os.truncate(target / file, int(config["journal_bytes"]))
        if sha256_file(target / file) != expected:
            raise ArtifactDamagedError(f"{folder / file} is not the file of config.json (SHA-256 differs); it is not pushed.")
    write_json(target / "config.json", config)


# ---- writing


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Be the only writer of a folder, waiting for another one; a killed process lets go by itself."""
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def append(folder: Path, config: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Append changes to the journal and publish the version that has them; the caller holds the lock.

    Args:
        folder: of the attributor.
        config: the present version's.
        entries: 'operation' and what belongs to it.

    Returns:
        The new version's config.json. When this returns, the changes are on the disk.
    """
    version = int(config.get("catalog_version", 1)) + 1
    now = datetime.now(UTC).isoformat(timespec="seconds")
    lines = [json.dumps({"version": version, "time": now, **entry}, ensure_ascii=False) + "\n" for entry in entries]
    data = "".join(lines).encode()
    file = file_of(config, "journal")
    path = folder / file
    present = int(config["journal_bytes"]) if file in config["sha256"] else 0
    with path.open("r+b" if path.exists() else "w+b") as journal:
        hashed = hashlib.sha256(journal.read(present))
        journal.truncate(present)  # what a killed writer left
        journal.seek(present)
        journal.write(data)
        journal.flush()
        os.fsync(journal.fileno())
    hashed.update(data)
    return write_config(
        folder,
        {
            **config,
            "format_version": FORMAT_VERSION,
            "catalog_version": version,
            "files": {**config.get("files", {}), "journal": file},
            "journal_bytes": present + len(data),
            "sha256": {**config["sha256"], file: hashed.hexdigest()},
        },
    )


def compact(folder: Path, config: Mapping[str, Any], catalogue: Catalogue) -> dict[str, Any]:
    """Fold the journal into a new base and publish it; the caller holds the lock. Files of the old base are deleted.

    Args:
        folder: of the attributor.
        config: the present version's.
        catalogue: the same version, whole, with thumbnails if it has any.

    Returns:
        The new version's config.json.

    Raises:
        InputError: no image would be left.
    """
    if not len(catalogue):
        raise InputError("every image has been removed; an attributor needs at least one.")
    sweep(folder, config)
    version = int(config.get("catalog_version", 1)) + 1
    suffix = f"-v{version}"
    written: list[str] = []
    files = dict(config.get("files", {}))
    table = catalogue.table
    if "thumbnail" in table.column_names:
        files["thumbnails"] = write_table(table.select(["image_id", "thumbnail"]), folder, f"thumbnails{suffix}")
        table = table.drop_columns(["thumbnail"])
        written.append(files["thumbnails"])
    files["catalog"] = write_table(table, folder, f"catalog{suffix}")
    files["journal"] = f"journal{suffix}.jsonl"
    old_shards = config.get("index_shards") or [{"file": "index.faiss"}]
    stored = config.get("vectors")
    if stored:
        stored = write_vectors(catalogue.read, len(catalogue), int(stored["dim"]), folder, f"index{suffix}")
        written += [stored["file"], stored["digests"]]
    work = folder / ".build"
    work.mkdir()
    save_index(empty_copy(folder / old_shards[0]["file"], config["index"]), work / "trained.faiss")
    rows = int(old_shards[0].get("rows", 0)) if len(old_shards) > 1 else 0
    shards = add_shards(work / "trained.faiss", catalogue.read, len(catalogue), rows, folder, name=f"index{suffix}")
    remove(work)
    plain = file_of(config, "plain")
    if plain in config["sha256"]:
        untuned = load_index(folder / plain, sha256=config["sha256"][plain])
        kept_rows = np.flatnonzero(catalogue.rows_of(np.arange(untuned.ntotal)) >= 0)  # they come first in the new base, too
        copy = empty_copy(folder / plain, factory="")  # read whole: it is exhaustive
        copy.add(untuned.reconstruct_batch(kept_rows))
        files["plain"] = f"plain{suffix}.faiss"
        save_index(copy, folder / files["plain"])
        written.append(files["plain"])
    written += [files["catalog"], *(shard["file"] for shard in shards)]
    old = {*index_files(config), file_of(config, "catalog"), file_of(config, "thumbnails"), file_of(config, "journal"), plain}
    old |= {config["vectors"]["file"]} if config.get("vectors") else set()
    kept = {file: checksum for file, checksum in config["sha256"].items() if file not in old}
    for file in written:
        _sync(folder / file)
    base = {
        **config,
        "files": files,
        "index_shards": shards,
        "vectors": stored,
        "catalog_version": version - 1,
        "sha256": {**kept, **{file: sha256_file(folder / file) for file in written}},
    }
    new = append(folder, base, [{"operation": "compact", "removed": list(catalogue.removed)}])
    sweep(folder, new)
    return new


def sweep(folder: Path, config: Mapping[str, Any]) -> None:
    """Delete what no version needs: the files of an earlier base, or of a base that a killed writer left half-written."""
    remove(folder / ".build")
    for path in folder.iterdir():
        unfinished = (
            path.name.startswith(".")
            and path.name != ".lock"
            and BASE_FILE.fullmatch(re.sub(r"^\.|\.\d+(?=\.\w+$)", "", path.name))
        )
        if path.is_file() and path.name not in config["sha256"] and (BASE_FILE.fullmatch(path.name) or unfinished):
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
