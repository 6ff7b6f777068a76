"""Changes: what has happened to an attributor since its base was made, in changes.sqlite beside the base's files.

It has one row for every image that was touched, with what holds of it now, a log, and the version, which each change raises by
one. A change is one transaction, and so is reading. What leaves is overwritten with zeros (SQLite's secure_delete). Every row
has a digest, and the state has their sum: a flipped bit or a lost row is found. No connection outlives a call, so nothing is
shared between threads, or with a forked child. A new base (`compact`) is published by renaming its config.json, which says
whose changes it has folded in, before the database is emptied: killed in between, the old rows are known to be folded.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import logging
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastattr.core.errors import ArtifactDamagedError, FormatVersionError, InputError, MissingFileError

logger = logging.getLogger(__name__)

FILE = "changes.sqlite"
SCHEMA = 1  # format of the database
WAIT = 60.0  # seconds that SQLite waits for another process's transaction
NETWORK = ("nfs", "cifs", "smb", "9p", "fuse", "ceph", "lustre", "gpfs", "beegfs", "afs", "glusterfs")
"""File systems whose machines share no memory, as SQLite's write-ahead log needs it."""
TABLES = """
CREATE TABLE state (schema INTEGER, base TEXT, was TEXT, version INTEGER, total TEXT, digest TEXT);
CREATE TABLE images (place INTEGER PRIMARY KEY AUTOINCREMENT, image_id TEXT UNIQUE, version INTEGER, has_left INTEGER,
                     fields TEXT, vector BLOB, thumbnail BLOB, digest BLOB);
CREATE INDEX images_version ON images (version);
CREATE TABLE log (version INTEGER, time TEXT, operation TEXT, reason TEXT, image_ids TEXT);
"""


class MovedError(Exception):
    """The database and config.json are of two versions: another process is publishing a new base; look again."""


@dataclass(frozen=True)
class Image:
    """What holds of one image that a change has touched."""

    image_id: str
    has_left: bool
    fields: dict[str, str]  # all metadata of an added image; of one of the base, what differs
    vector: bytes | None = None  # (D,) float16, little-endian, of an added image; None for one of the base
    thumbnail: bytes | None = None
    place: int = 0  # rises with every addition, so that an image that comes back is known to be another


@dataclass(frozen=True)
class Changes:
    """Images in the order of their places, as they stand in one version."""

    version: int
    total: str  # identifies everything that has changed since the base
    images: list[Image]


def read(folder: Path, config: Mapping[str, Any], *, after: int = -1) -> Changes | None:
    """What has changed since a version of the base (-1 checks that no row is missing); None if nothing has since the base."""
    if not (folder / FILE).exists():
        return None
    with _connection(folder) as connection:
        connection.execute("BEGIN")
        state = _state(connection)
        if state is None or _folded(state, config):
            return None
        if config["seal"] not in (state["base"], state["was"]):
            raise MovedError(f"{folder / FILE} belongs to the base {state['base'][:12]}, not to {config['seal'][:12]}")
        rows = [] if state["version"] <= after else _rows(connection, "WHERE version > ? ORDER BY place", [after])
        if after < 0 and _total(int.from_bytes(row["digest"], "big") for row in rows) != state["total"]:
            raise ArtifactDamagedError(lost(folder, "rows are missing"))
    return Changes(state["version"], state["total"], [_image(row) for row in rows])


def history(folder: Path) -> list[dict[str, Any]]:
    """The log, oldest change first: 'version', 'time', 'operation', 'image_ids' ('removed' of a compaction), 'reason'."""
    if not (folder / FILE).exists():
        return []
    with _connection(folder) as connection:
        state = _state(connection)
        rows = connection.execute("SELECT * FROM log ORDER BY rowid").fetchall() if state else []
    entries = [{**dict(row), "image_ids": json.loads(row["image_ids"])} for row in rows]
    for entry in entries:
        if entry["operation"] == "compact":
            entry["removed"] = entry.pop("image_ids")
    return [{name: value for name, value in entry.items() if value != ""} for entry in entries]


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Be the only writer of a folder, waiting for another one; a killed process lets go by itself."""
    try:
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise InputError(f"{folder} can't be changed ({error.strerror}); nothing was changed.") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Writer:
    """One transaction on a folder's changes; the caller holds the lock. Nothing holds until the block ends."""

    def __init__(self, connection: sqlite3.Connection, state: dict[str, Any]) -> None:
        self._connection, self._state, self.version = connection, state, int(state["version"]) + 1
        self._sum = int(state["total"], 16)

    def put(self, images: Iterable[Image]) -> None:
        """Set what holds of images from this version on."""
        images = list(images)
        old = {row["image_id"]: row for row in self._found([image.image_id for image in images])}
        for image in images:
            was = old.get(image.image_id)
            if was:
                self._connection.execute("DELETE FROM images WHERE place = ?", (was["place"],))
                self._sum -= int.from_bytes(was["digest"], "big")
            fields = json.dumps(image.fields, ensure_ascii=False) if image.fields else ""
            row = (image.image_id, self.version, int(image.has_left), fields, image.vector, image.thumbnail)
            place, digest = image.place if image.place and was else None, _digest(*row)  # an update leaves its place
            self._connection.execute("INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (place, *row, digest))
            self._sum += int.from_bytes(digest, "big")

    def images(self, image_ids: Sequence[str]) -> dict[str, Image]:
        """What holds of these images before this change, as far as changes have touched them."""
        return {row["image_id"]: _image(row) for row in self._found(image_ids)}

    def note(self, operation: str, image_ids: Sequence[str], reason: str = "", *, time: str = "", version: int = 0) -> None:
        """Write a line of the log."""
        time = time or datetime.now(UTC).isoformat(timespec="seconds")
        values = (version or self.version, time, operation, reason, json.dumps(list(image_ids), ensure_ascii=False))
        self._connection.execute("INSERT INTO log VALUES (?, ?, ?, ?, ?)", values)

    def fold(self, base: str, version: int) -> None:
        """Begin anew upon another base: only the ids of what has left, in their order, are kept."""
        left = [row["image_id"] for row in _rows(self._connection, "WHERE has_left ORDER BY place", [])]
        self._connection.execute("DELETE FROM images")
        self._connection.execute("DELETE FROM log")
        self._sum, self.version = 0, version
        self._state |= {"base": base, "was": ""}
        self.put([Image(image_id, True, {}) for image_id in left])

    def finish(self) -> None:
        """Write the state."""
        _write_state(self._connection, self._state | {"version": self.version, "total": _total([self._sum])})

    def _found(self, image_ids: Sequence[str]) -> list[sqlite3.Row]:
        return _rows(self._connection, "WHERE image_id IN (SELECT value FROM json_each(?))", [json.dumps(list(image_ids))])


@contextlib.contextmanager
def writing(folder: Path, config: Mapping[str, Any], *, base: str, first: Sequence[Image] = ()) -> Iterator[Writer]:
    """One change of a locked folder, on the disk when the block has ended.

    `base` is the seal of the base that it belongs to; `first` are the images that had left before the base was made.
    """
    with _connection(folder, write=True) as connection:
        connection.execute("BEGIN IMMEDIATE")
        try:
            state = _state(connection)
            version = int(config.get("catalog_version", 1))
            if state is None:
                for statement in filter(str.strip, TABLES.split(";")):
                    connection.execute(statement)
                known = {"schema": SCHEMA, "base": base, "was": "" if base == config["seal"] else config["seal"]}
                writer = Writer(connection, known | {"version": version, "total": "0"})
                writer.put(first)
            else:
                writer = Writer(connection, state)
                if _folded(state, config):
                    writer.fold(config["seal"], version + 1)
                elif config["seal"] not in (state["base"], state["was"]):
                    raise ArtifactDamagedError(lost(folder, "it belongs to another base"))
            yield writer
            writer.finish()
            connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise


def erase_traces(folder: Path) -> None:
    """Give free pages back and empty the write-ahead log, so that nothing deleted is left in any file."""
    with _connection(folder, write=True) as connection:
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


@contextlib.contextmanager
def _connection(folder: Path, *, write: bool = False) -> Iterator[sqlite3.Connection]:
    """A connection for one call; SQLite's errors in words."""
    path = folder / FILE
    connection = None
    try:
        connection = _open(path, write=write)
        connection.row_factory = sqlite3.Row
        yield connection
    except sqlite3.OperationalError as error:
        if "malformed" in str(error) or "no such" in str(error):
            raise ArtifactDamagedError(lost(folder, str(error))) from error
        what = "written; nothing was changed" if write else "read"
        raise InputError(f"{path} can't be {what} ({error}): look for a full disk, and for who may write there.") from error
    except (sqlite3.DatabaseError, OverflowError) as error:
        raise ArtifactDamagedError(lost(folder, str(error))) from error
    finally:
        if connection is not None:
            connection.close()


def _open(path: Path, *, write: bool) -> sqlite3.Connection:
    address = f"file:{quote(str(path.absolute()))}"
    if write:
        connection = sqlite3.connect(f"{address}?mode=rwc", uri=True, timeout=WAIT, isolation_level=None)
        wanted = "wal" if shares_memory(path.parent) else "delete"
        (found,) = connection.execute(f"PRAGMA journal_mode = {wanted}").fetchone()
        if found != "wal":
            logger.info("%s is on a file system without shared memory: SQLite keeps a rollback journal there", path)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON")
        return connection
    connection = sqlite3.connect(f"{address}?mode=ro", uri=True, timeout=WAIT, isolation_level=None)
    try:
        connection.execute("SELECT 1 FROM sqlite_schema").fetchone()
    except sqlite3.OperationalError:
        # SQLite makes a file beside the database even to read it; where no one can write, it need not.
        connection.close()
        log = path.with_name(f"{FILE}-wal")
        if log.exists() and log.stat().st_size:
            raise
        connection = sqlite3.connect(f"{address}?mode=ro&immutable=1", uri=True, isolation_level=None)
    return connection


def shares_memory(folder: Path) -> bool:
    """Whether all processes that see a folder run on one machine, as far as the system tells."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return True
    at = str(folder.resolve())
    under = [(fields[4], fields[fields.index("-") + 1]) for fields in mounts if "-" in fields]
    kinds = [kind for point, kind in sorted(under) if point == "/" or at == point or at.startswith(point + "/")]
    return not kinds or not kinds[-1].startswith(NETWORK)


def _rows(connection: sqlite3.Connection, condition: str, values: Sequence[Any]) -> list[sqlite3.Row]:
    """Rows of `images`, each compared with its digest."""
    names = "place, image_id, version, has_left, fields, vector, thumbnail, digest"
    found = connection.execute(f"SELECT {names} FROM images {condition}", values).fetchall()
    for row in found:
        if _digest(*row[1:7]) != row["digest"]:
            raise sqlite3.DatabaseError(f"the row of {row['image_id']!r} is not what was written")
    return found


def _digest(image_id: str, version: int, has_left: int, fields: str, vector: bytes | None, thumbnail: bytes | None) -> bytes:
    text = json.dumps([image_id, version, has_left, fields, vector is None, thumbnail is None]).encode()
    return hashlib.sha256(text + (vector or b"") + (thumbnail or b"")).digest()[:16]


def _total(digests: Iterable[int]) -> str:
    return f"{sum(digests) % (1 << 128):032x}"


def _image(row: sqlite3.Row) -> Image:
    fields = json.loads(row["fields"]) if row["fields"] else {}
    return Image(row["image_id"], bool(row["has_left"]), fields, row["vector"], row["thumbnail"], row["place"])


def _state(connection: sqlite3.Connection) -> dict[str, Any] | None:
    """The database's state; None for one that a killed writer had not filled yet."""
    if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'state'").fetchone():
        return None
    found = connection.execute("SELECT schema, base, was, version, total, digest FROM state").fetchall()
    if len(found) != 1:
        raise sqlite3.DatabaseError("it has no state")
    state = dict(found[0])
    if isinstance(state["schema"], int) and state["schema"] > SCHEMA:
        raise FormatVersionError(f"{FILE} has the format {state['schema']}, this fastattr reads {SCHEMA}; upgrade fastattr.")
    if _values(state) != tuple(found[0]):
        raise sqlite3.DatabaseError("its state is not what was written")
    return state


def _write_state(connection: sqlite3.Connection, state: dict[str, Any]) -> None:
    connection.execute("DELETE FROM state")
    connection.execute("INSERT INTO state VALUES (?, ?, ?, ?, ?, ?)", _values(state))


def _values(state: Mapping[str, Any]) -> tuple[Any, ...]:
    """A row of `state`, its digest last."""
    values = [state[name] for name in ("schema", "base", "was", "version", "total")]
    return (*values, hashlib.sha256(json.dumps(values).encode()).hexdigest())


def _folded(state: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether the base of config.json holds everything that the database says."""
    return bool(config.get("folds")) and config["folds"] == state["base"] and config["seal"] != state["base"]


def lost(folder: Path, why: str) -> str:
    """What an error says of a damaged database."""
    return (
        f"{folder / FILE} is damaged or not this attributor's ({why}). Put back a copy of it; or delete {FILE} to go back to "
        "the base, which knows nothing of additions, updates and removals since it was made."
    )


def journal_of(config: Mapping[str, Any]) -> str | None:
    """The journal's file; None for an attributor without one."""
    file = config.get("files", {}).get("journal", "journal.jsonl")
    return str(file) if file in config["sha256"] else None


def read_journal(folder: Path, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The journal's lines, oldest first; none without a journal."""
    file = journal_of(config)
    if file is None:
        return []
    path = folder / file
    if not path.exists():
        raise MissingFileError(f"{path} does not exist; fetch the attributor again.")
    with path.open("rb") as lines:
        data = lines.read(int(config["journal_bytes"]))
    if hashlib.sha256(data).hexdigest() != config["sha256"][file]:
        raise ArtifactDamagedError(f"{path} is not the journal of config.json (SHA-256 differs); fetch the attributor again.")
    return [json.loads(line) for line in data.split(b"\n") if line]


def plain_entries(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the lines say of versions and ids, as `changes.history` gives it."""
    plain = ("version", "time", "operation", "image_ids", "removed", "reason")
    ids = ({"image_ids": [image["image_id"] for image in entry["images"]]} if "images" in entry else {} for entry in entries)
    every = [{**entry, **own} for entry, own in zip(entries, ids, strict=True)]
    return [{name: value for name, value in entry.items() if name in plain} for entry in every]


def images_of(entries: list[dict[str, Any]]) -> list[Image]:
    """What holds of each image once all lines of a journal have been followed, in the order of their last coming or going."""
    images: dict[str, Image] = {}
    for number, entry in enumerate(entries):
        operation = entry["operation"]
        if operation in {"remove", "compact"}:
            for name in entry["image_ids" if operation == "remove" else "removed"]:
                images.pop(name, None)
                images[name] = Image(name, True, {})
        elif operation == "add":
            for record in entry["images"]:
                fields = {key: value for key, value in record.items() if key not in {"image_id", "embedding", "thumbnail"}}
                vector = base64.b64decode(record["embedding"], validate=True)
                thumbnail = base64.b64decode(record["thumbnail"]) if "thumbnail" in record else None
                images.pop(record["image_id"], None)
                images[record["image_id"]] = Image(record["image_id"], False, fields, vector, thumbnail, number + 1)
        elif operation == "update":
            for record in entry["images"]:
                name, fields = record["image_id"], {key: value for key, value in record.items() if key != "image_id"}
                old = images.get(name, Image(name, False, {}))
                images[name] = Image(name, False, {**old.fields, **fields}, old.vector, old.thumbnail, old.place)
        else:
            raise ArtifactDamagedError(f"the journal has an operation {operation!r}, which this fastattr does not know.")
    return list(images.values())
