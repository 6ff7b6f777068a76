"""Journal: how a catalogue changes on disk, so that every reader sees one version and a killed writer loses nothing.

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

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fastattr.attributor.catalogue import Catalogue
from fastattr.attributor.folder import FORMAT_VERSION, file_of, index_files, read_table, write_config, write_table
from fastattr.core.errors import ArtifactDamagedError, InputError, MissingFileError
from fastattr.core.files import remove, sha256_file
from fastattr.index.build import add_shards
from fastattr.index.files import empty_copy, load_index, save_index
from fastattr.index.search import open_ranked
from fastattr.index.vectors import write_vectors

LINE_IMAGES = 1000
"""Images in one line of the journal."""
BASE_FILE = re.compile(r"(catalog|thumbnails|index|vectors|journal|plain)(-[\w-]+)?\.(parquet|arrow|faiss|f16|sha256|jsonl)")
"""Files that a catalogue writes, and may delete once no config.json names them."""


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
