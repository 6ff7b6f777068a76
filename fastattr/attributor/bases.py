"""Bases: write what one version of an attributor holds, and nothing of what has left, as a base of its own.

`compact` puts the new base beside the old one and publishes it; `copy_newest` writes it to another folder, from where it is
pushed, or takes the place of an earlier attributor in one step (`replacing`).
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

from fastattr.attributor import changes, folder as disk
from fastattr.attributor.catalogue import Catalogue
from fastattr.attributor.changes import images_of, journal_of, plain_entries, read_journal, writing
from fastattr.attributor.folder import FORMAT_VERSION, copy_base, file_of, index_files, sync as _sync, write_config
from fastattr.attributor.version import Parts, open_version
from fastattr.core.errors import FastattrError, InputError
from fastattr.core.files import atomic_path, remove, sha256_file, write_json
from fastattr.index.build import add_shards, retune
from fastattr.index.choose import keeps_vectors
from fastattr.index.files import empty_copy, load_index, save_index, write_vectors

PART = r"(catalog|thumbnails|index|vectors|journal|plain|removed|generated|counterfactuals)"
LEFTOVER = re.compile(rf"\.?{PART}-v\d+[\w.-]*|\.({PART}|config)[\w-]*\.\d+\.\w+")  # what a killed writer may have left
ATTRIBUTOR = re.compile(  # files that belong to an attributor beside those that config.json names
    rf"config\.json(\.sig)?|{re.escape(changes.FILE)}(-wal|-shm|-journal)?|\.lock|README\.md|LICENSE\.md|\.gitattributes"
)


def upgraded(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """config.json of a locked folder that is about to change, in the present format, its journal moved to changes.sqlite."""
    if config["format_version"] == FORMAT_VERSION:
        return config
    journal = journal_of(config)
    files = {part: file for part, file in config.get("files", {}).items() if part != "journal"}
    sha256 = {file: checksum for file, checksum in config["sha256"].items() if file != journal}
    new = {name: value for name, value in config.items() if name != "journal_bytes"}
    new = disk.seal({**new, "format_version": FORMAT_VERSION, "files": files, "sha256": sha256})
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
    stamp, config = disk.stamp_of(folder), upgraded(folder, disk.read_config(folder))
    sweep(folder, config)
    version = open_version(folder, config, Parts(), stamp=stamp)
    catalogue, number = version.own(), version.number + 1
    new = write_base(folder, config, catalogue, folder, suffix=f"-v{number}")
    replaced = sorted(config["sha256"].keys() - new["sha256"].keys())
    new = disk.seal({**new, "catalog_version": number, "folds": config["seal"], "replaced": replaced})
    with writing(folder, config, base=config["seal"]) as writer:
        writer.fold(new["seal"], number)
        writer.note("compact", list(catalogue.removed))
        write_config(folder, new)
    changes.erase_traces(folder)
    sweep(folder, new)


def write_base(folder: Path, config: dict[str, Any], catalogue: Catalogue, target: Path, *, suffix: str = "") -> dict[str, Any]:
    """Write a base of what a whole catalogue holds, beside the old one or to another folder; returns its config.json."""
    old_files, sha256 = config.get("files", {}), config["sha256"]
    files: dict[str, str] = {}
    table = catalogue.table
    if "thumbnail" in table.column_names:
        files["thumbnails"] = disk.write_table(table.select(["image_id", "thumbnail"]), target, f"thumbnails{suffix}")
        table = table.drop_columns(["thumbnail"])
    files["catalog"] = disk.write_table(table, target, f"catalog{suffix}")
    if catalogue.removed:
        files["removed"] = f"removed{suffix}.json"
        write_json(target / files["removed"], list(catalogue.removed))
    index = _write_index(folder, config, catalogue, target, suffix)
    plain = file_of(config, "plain")
    if plain in sha256:
        files["plain"] = f"plain{suffix}.faiss"
        untuned = load_index(folder / plain, sha256=sha256[plain])
        kept_rows = np.flatnonzero(catalogue.rows_of(np.arange(untuned.ntotal)) >= 0)  # come first in the new base, too
        copy = empty_copy(folder / plain, factory="")  # read whole: it is exhaustive
        if len(kept_rows):
            copy.add(untuned.reconstruct_batch(kept_rows))
        save_index(copy, target / files["plain"])
    replaced = {*index_files(config, vectors=True), *old_files.values(), plain}
    replaced |= {file_of(config, part) for part in ("catalog", "thumbnails", "removed")}
    tables = {name for name in [*old_files, *(sha256.keys() - replaced)] if name.endswith(".parquet") and "/" not in name}
    for name in sorted(tables):  # they may name images: see evaluation/showcase.py
        files[name] = f"{Path(name).stem}{suffix}.parquet"
        _write_without(folder / old_files.get(name, name), catalogue.removed, target / files[name])
        replaced.add(old_files.get(name, name))
    kept = [file for file in sha256 if file not in replaced]
    if target != folder:
        for file in kept:
            disk.copy_file(folder, config, file, target)
    written = [*files.values(), *index_files(index, vectors=True)]
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
    shards: list[dict[str, Any]] = config.get("index_shards") or disk.SHARDS
    empty, factory, stored = empty_copy(folder / shards[0]["file"], config["index"]), config["index"], config.get("vectors")
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


def copy_newest(folder: Path, target: Path) -> None:
    """Write the newest version of a folder into another: as it is if nothing has changed since the base, else as a new base."""

    def once() -> None:
        stamp = disk.stamp_of(folder)
        version = open_version(folder, disk.read_config(folder), Parts(), stamp=stamp)
        remove(target)
        target.mkdir(parents=True)
        if not version.own().changed and journal_of(version.base) is None:
            copy_base(folder, version.base, target)
        else:
            new = write_base(folder, version.base, version.own(), target)
            write_config(target, {**new, "catalog_version": version.number})

    disk.settled(folder, once)


@contextlib.contextmanager
def replacing(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty folder that takes the place of `target` and an attributor there; `overwrite` keeps files of others."""
    target = target.resolve()
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; give a folder.")
    foreign = list(_foreign(target)) if overwrite else list(itertools.islice(_foreign(target), 3))
    if foreign and not overwrite:
        way_out = "give another folder, or overwrite=True, which keeps such files and replaces an attributor's only"
        raise InputError(f"{target} holds {', '.join(foreign)}, which is not an attributor's; {way_out}.")
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
    config: dict[str, Any] = {"sha256": {}}
    with contextlib.suppress(FastattrError):
        config = disk.read_config(folder) if folder.is_dir() else config
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
