"""Bases: write what one version of an attributor holds, and nothing of what has left, as a base of its own.

`compact` puts the new base beside the old one and publishes it; `save` writes it to another folder, which replaces an
earlier attributor there in one step. What is pushed to the Hub is written by `save`, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastattr.attributor import changes
from fastattr.attributor.catalogue import Catalogue
from fastattr.attributor.changes import writing
from fastattr.attributor.folder import (
    FORMAT_VERSION,
    copy_base,
    copy_file,
    file_of,
    index_files,
    listed_shards,
    read_config,
    seal,
    settled,
    stamp_of,
    write_config,
    write_table,
)
from fastattr.attributor.journal import images_of, journal_of, plain_entries, read_journal
from fastattr.attributor.version import Parts, open_version
from fastattr.core.errors import FastattrError, InputError
from fastattr.core.files import atomic_path, remove, sha256_file, write_json
from fastattr.index.build import add_shards, retune
from fastattr.index.choose import keeps_vectors
from fastattr.index.files import empty_copy, load_index, save_index
from fastattr.index.vectors import write_vectors

PART = r"(catalog|thumbnails|index|vectors|journal|plain|removed|generated|counterfactuals)"
LEFTOVER = re.compile(rf"\.?{PART}-v\d+[\w.-]*|\.({PART}|config)[\w-]*\.\d+\.\w+")
"""What a killed writer may have left behind: parts of a base that was not published, and temporary files."""
ATTRIBUTOR = re.compile(
    rf"config\.json|{re.escape(changes.FILE)}(-wal|-shm|-journal)?|\.lock|README\.md|LICENSE\.md|\.gitattributes"
)
"""Files that belong to an attributor beside those that config.json names."""


def upgraded(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """config.json of a folder that is about to change, in the present format; the caller holds the lock.

    changes.sqlite takes over what an older format kept in a journal.
    """
    if config["format_version"] == FORMAT_VERSION:
        return config
    journal = journal_of(config)
    files = {part: file for part, file in config.get("files", {}).items() if part != "journal"}
    sha256 = {file: checksum for file, checksum in config["sha256"].items() if file != journal}
    new = {name: value for name, value in config.items() if name != "journal_bytes"}
    new = seal({**new, "format_version": FORMAT_VERSION, "files": files, "sha256": sha256})
    entries = read_journal(folder, config)
    if changes.read(folder, config) is None:
        with writing(folder, config, base=new["seal"]) as writer:
            writer.version = int(config.get("catalog_version", 1))
            writer.put([replace(image, place=0) for image in images_of(entries)])
            for entry in plain_entries(entries):
                ids = entry.get("image_ids", entry.get("removed", []))
                writer.note(entry["operation"], ids, entry.get("reason", ""), time=entry["time"], version=entry["version"])
    write_config(folder, new)
    if journal:
        (folder / journal).unlink(missing_ok=True)
    return new


def compact(folder: Path) -> None:
    """Fold all changes into a new base and publish it; the caller holds the lock. Files of the old base are deleted."""
    stamp, config = stamp_of(folder), upgraded(folder, read_config(folder))
    sweep(folder, config)
    version = open_version(folder, config, Parts(), stamp=stamp)
    catalogue, number = version.catalogue, version.number + 1
    assert isinstance(catalogue, Catalogue)
    new = write_base(folder, config, catalogue, folder, suffix=f"-v{number}")
    replaced = sorted(config["sha256"].keys() - new["sha256"].keys())
    new = seal({**new, "catalog_version": number, "folds": config["seal"], "replaced": replaced})
    with writing(folder, config, base=config["seal"]) as writer:
        writer.fold(new["seal"], number)
        writer.note("compact", list(catalogue.removed))
        write_config(folder, new)
    changes.erase_traces(folder)
    sweep(folder, new)


def write_base(folder: Path, config: dict[str, Any], catalogue: Catalogue, target: Path, *, suffix: str = "") -> dict[str, Any]:
    """Write a base that holds what a catalogue holds; returns its config.json, which is not written yet.

    Args:
        folder: of the attributor.
        config: its config.json.
        catalogue: what it holds, whole, with thumbnails if it has any.
        target: where the files go; if it is another folder, files that stay the same are copied.
        suffix: of the names of files, so that they can stand beside those of another base.
    """
    old_files = config.get("files", {})
    files: dict[str, str] = {}
    sha256 = config["sha256"]
    table = catalogue.table
    if "thumbnail" in table.column_names:
        files["thumbnails"] = write_table(table.select(["image_id", "thumbnail"]), target, f"thumbnails{suffix}")
        table = table.drop_columns(["thumbnail"])
    files["catalog"] = write_table(table, target, f"catalog{suffix}")
    if catalogue.removed:
        files["removed"] = f"removed{suffix}.json"
        write_json(target / files["removed"], list(catalogue.removed))
    index = _write_index(folder, config, catalogue, target, suffix)
    plain = file_of(config, "plain")
    if plain in sha256:
        files["plain"] = f"plain{suffix}.faiss"
        _write_plain(folder / plain, sha256[plain], catalogue, target / files["plain"])
    stored = config.get("vectors")
    replaced = {*index_files(config), *([stored["file"]] if stored else []), *old_files.values(), plain}
    replaced |= {file_of(config, part) for part in ("catalog", "thumbnails", "removed")}
    tables = {name for name in [*old_files, *(sha256.keys() - replaced)] if name.endswith(".parquet") and "/" not in name}
    for name in sorted(tables):  # they may name images: see evaluation/showcase.py
        files[name] = f"{Path(name).stem}{suffix}.parquet"
        _write_without(folder / old_files.get(name, name), catalogue.removed, target / files[name])
        replaced.add(old_files.get(name, name))
    kept = [file for file in sha256 if file not in replaced]
    if target != folder:
        for file in kept:
            copy_file(folder, config, file, target)
    new_stored = index["vectors"]
    written = [*files.values(), *(shard["file"] for shard in index["index_shards"])]
    written += [new_stored["file"], new_stored["digests"]] if new_stored else []
    for file in written:
        _sync(target / file)
    return {
        **{name: value for name, value in config.items() if name not in {"folds", "replaced", "journal_bytes"}},
        **index,
        "format_version": FORMAT_VERSION,
        "files": {name: file for name, file in files.items() if name != file},
        "sha256": {file: sha256[file] for file in kept} | {file: sha256_file(target / file) for file in written},
    }


def _write_index(folder: Path, config: dict[str, Any], catalogue: Catalogue, target: Path, suffix: str) -> dict[str, Any]:
    """The index of a catalogue's embeddings, of the same kind and trained as before; returns what config.json says of it."""
    shards, stored = listed_shards(config), config.get("vectors")
    empty, factory = empty_copy(folder / shards[0]["file"], config["index"]), config["index"]
    if not len(catalogue):  # every image has left
        file = f"index{suffix}.faiss"
        save_index(empty, target / file)
        own = {"own_ids": True} if "IVF" in factory else {}
        return {"index_shards": [{"file": file, "first_row": 0, "rows": 0, **own}], "vectors": None}
    dim = int(config["student"]["embed_dim"])
    if not stored and not shards[0].get("rows", 1) and keeps_vectors(empty):  # there was no image
        stored = {"dim": dim}
    if stored:
        stored = write_vectors(catalogue.read, len(catalogue), int(stored["dim"]), target, f"index{suffix}")
    work = target / ".build"
    work.mkdir()
    save_index(empty, work / "trained.faiss")
    rows = int(shards[0].get("rows", 0)) if len(shards) > 1 else 0
    name = f"index{suffix}"
    listed = add_shards(work / "trained.faiss", catalogue.read, len(catalogue), rows, target, name=name)
    remove(work)
    built = {**config, "index_shards": listed, "vectors": stored}
    parts = [catalogue.first_added] if catalogue.first_added < len(catalogue) else []
    return {"vectors": stored, **retune(target, built, catalogue.read, len(catalogue), dim, name=name, parts=parts)}


def _write_plain(path: Path, sha256: str, catalogue: Catalogue, target: Path) -> None:
    """The index of the untuned features without the images that have left; its rows come first in the new base, too."""
    untuned = load_index(path, sha256=sha256)
    kept = np.flatnonzero(catalogue.rows_of(np.arange(untuned.ntotal)) >= 0)
    copy = empty_copy(path, factory="")  # read whole: it is exhaustive
    if len(kept):
        copy.add(untuned.reconstruct_batch(kept))
    save_index(copy, target)


def _write_without(path: Path, removed: dict[str, None], target: Path) -> None:
    """A table without the rows of images that have left ('image_id'), and without their ids in lists ('image_ids')."""
    table = pq.read_table(path)
    if "image_id" in table.column_names:
        gone = pc.is_in(table["image_id"], value_set=pa.array(list(removed), pa.string()))
        table = table.filter(pc.invert(gone))
    if "image_ids" in table.column_names:
        lists = [[name for name in names if name not in removed] for names in table["image_ids"].to_pylist()]
        at = table.column_names.index("image_ids")
        table = table.set_column(at, table.schema.field(at), pa.array(lists, table.schema.field(at).type))
    with atomic_path(target) as temporary:
        pq.write_table(table, temporary, compression="zstd", compression_level=12)


def sweep(folder: Path, config: dict[str, Any]) -> None:
    """Delete the files of the base that this one replaced, and what a killed writer left of a base that was not published."""
    remove(folder / ".build")
    replaced = {name for name in config.get("replaced", []) if re.match(PART, name)}
    names = replaced | {*(path.name for path in folder.iterdir() if LEFTOVER.fullmatch(path.name))}
    for name in names - config["sha256"].keys():
        (folder / name).unlink(missing_ok=True)


def unswept(folder: Path, config: dict[str, Any]) -> bool:
    """Whether files of a replaced base are still there: its writer was killed before it could delete them."""
    return any((folder / file).exists() for file in config.get("replaced", []) if file not in config["sha256"])


# ---- another folder


def save(folder: Path, config: dict[str, Any], catalogue: Catalogue, version: int, target: Path) -> None:
    """Write a version into an empty folder: as it is if nothing has changed since the base, else as a base of its own.

    Args:
        folder: of the attributor.
        config: its config.json.
        catalogue: what it holds, whole, with thumbnails if it has any.
        version: of the catalogue.
        target: an empty folder.
    """
    if not catalogue.changed and journal_of(config) is None:
        copy_base(folder, config, target)
    else:
        write_config(target, {**write_base(folder, config, catalogue, target), "catalog_version": version})


def copy_newest(folder: Path, target: Path) -> None:
    """Write the newest version of an attributor's folder into another folder, as `save` does."""

    def once() -> None:
        stamp = stamp_of(folder)
        version = open_version(folder, read_config(folder), Parts(), stamp=stamp)
        assert isinstance(version.catalogue, Catalogue)
        remove(target)
        target.mkdir(parents=True)
        save(folder, version.base, version.catalogue, version.number, target)

    settled(folder, once)


@contextlib.contextmanager
def replacing(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty folder that takes `target`'s place when the block ends; an earlier attributor there is replaced.

    Args:
        target: where the attributor will be.
        overwrite: keep files there that are no attributor's, instead of refusing.
    """
    target = target.resolve()
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; give a folder.")
    foreign = list(_foreign(target)) if overwrite else list(itertools.islice(_foreign(target), 3))
    if foreign and not overwrite:
        raise InputError(
            f"{target} holds {', '.join(foreign)}, which is not an attributor's; give another folder, or overwrite=True, "
            "which keeps such files and replaces an attributor's only."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.new")
    remove(temporary)
    temporary.mkdir()
    try:
        yield temporary
        for name in foreign:
            if not (temporary / name).exists():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(target / name, temporary / name, follow_symlinks=False)
        _sync(temporary)
        if target.exists():
            _exchange(temporary, target)
        else:
            temporary.rename(target)
        _sync(target.parent)
    finally:
        remove(temporary)


def _foreign(folder: Path) -> Iterator[str]:
    """Files in a folder that are not an attributor's, by their names relative to it."""
    try:
        config = read_config(folder) if folder.is_dir() else {"sha256": {}}
    except FastattrError:
        config = {"sha256": {}}
    own = {*config["sha256"], *config.get("replaced", [])}
    for root, _, files in os.walk(folder):
        for file in sorted(files):
            name = (Path(root) / file).relative_to(folder).as_posix()
            if not (config["sha256"] and (name in own or ATTRIBUTOR.fullmatch(name) or LEFTOVER.fullmatch(name))):
                yield name


def _exchange(one: Path, other: Path) -> None:
    """Let two folders change places, in one step where the system can; elsewhere `other` is missing for a moment."""
    if sys.platform == "linux":
        exchange, here = 2, -100  # RENAME_EXCHANGE, AT_FDCWD
        renamed = ctypes.CDLL(None, use_errno=True).renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange)
        if renamed == 0:
            return
    aside = one.with_suffix(".old")
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


def _sync(path: Path) -> None:
    """Have a file's bytes, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
