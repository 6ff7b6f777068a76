"""Version: one state of an attributor's folder, which never changes; every answer takes all of it from the newest one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattr.attributor import changes, folder as disk
from fastattr.attributor.catalogue import Catalogue
from fastattr.attributor.changes import MovedError, images_of, read_journal
from fastattr.attributor.folder import SHARDS, check_files, file_of, needed_files, read_config, stamp_of
from fastattr.core.errors import ArtifactDamagedError, InputError
from fastattr.core.files import read_json
from fastattr.index.files import load_index
from fastattr.index.search import Ranked, Shards, open_ranked

if TYPE_CHECKING:
    from fastattr.attributor.collection import MilvusBackend


@dataclass(frozen=True)
class Parts:
    """Which parts of a folder are loaded."""

    thumbnails: bool = True
    shards: Sequence[int] | None = None  # of the index; None for all


@dataclass(frozen=True)
class Version:
    """One state of an attributor's folder."""

    folder: Path
    base: dict[str, Any]  # config.json
    parts: Parts
    stamp: tuple[int, ...]  # of config.json, when the base was read
    catalogue: Catalogue | MilvusBackend
    plain: Ranked | None  # the index of the untuned features, whose rows are the first of the base
    number: int  # rises with every change
    changes: str  # identifies what has changed since the base; '' if nothing has

    @property
    def config(self) -> dict[str, Any]:
        """config.json with the present 'catalog_version', and 'changes' where there are any."""
        return {**self.base, "catalog_version": self.number} | ({"changes": self.changes} if self.changes else {})

    def own(self) -> Catalogue:
        """The catalogue in the folder itself; InputError if it is in Milvus."""
        if not isinstance(self.catalogue, Catalogue):
            how = "to read embeddings and to change it, then fill Milvus again (`fastattr index --backend milvus`)"
            raise InputError(f"this attributor was loaded with index_uri: load its folder without it, {how}.")
        return self.catalogue

    def newest(self) -> Version:
        """The version that the folder holds now, which may be this one."""
        stamp = stamp_of(self.folder)
        if stamp == self.stamp:
            found = None
            with contextlib.suppress(MovedError):
                found = changes.read(self.folder, self.base, after=self.number)
                if found is None and not self.changes:
                    return self
            if found is not None and (found.version, found.total) == (self.number, self.changes):
                return self
            if found is not None and found.version > self.number:
                catalogue = self.catalogue.applied(found.images)
                return replace(self, catalogue=catalogue, number=found.version, changes=found.total)
        return disk.settled(self.folder, self._again)

    def _again(self) -> Version:
        stamp = stamp_of(self.folder)
        config = read_config(self.folder)
        if isinstance(self.catalogue, Catalogue):
            check_files(self.folder, config, needed_files(config, thumbnails=self.parts.thumbnails, shards=self.parts.shards))
            return open_version(self.folder, config, self.parts, stamp=stamp)
        return open_version(self.folder, config, self.parts, stamp=stamp, milvus=self.catalogue)


def open_version(
    folder: Path, config: dict[str, Any], parts: Parts, *, stamp: tuple[int, ...], milvus: MilvusBackend | None = None
) -> Version:
    """The version that a folder holds; `stamp` is of config.json before it was read, `milvus` is index and catalogue."""
    removed, file = removed_before(folder, config), file_of(config, "plain")
    catalogue = milvus.without(removed) if milvus else _open_base(folder, config, parts, removed)
    with_plain = file in config["sha256"] and parts.shards is None and not milvus
    plain = Ranked(Shards([(load_index(folder / file, sha256=config["sha256"][file]), 0)])) if with_plain else None
    current = read_changes(folder, config)
    if current.images:
        catalogue = catalogue.applied(current.images)
    return Version(folder, config, parts, stamp, catalogue, plain, current.version, current.total)


def _open_base(folder: Path, config: dict[str, Any], parts: Parts, removed: Sequence[str]) -> Catalogue:
    """The catalogue of a base."""
    table = disk.read_table(folder / file_of(config, "catalog"))
    file = file_of(config, "thumbnails")
    if parts.thumbnails and file in config["sha256"]:
        thumbnails = disk.read_table(folder / file)
        if thumbnails["image_id"] != table["image_id"]:
            raise ArtifactDamagedError(f"{folder}: catalogue and thumbnails list other images; fetch the attributor again.")
        table = table.append_column("thumbnail", thumbnails["thumbnail"])
    base = open_ranked(folder, {"index_shards": SHARDS, "index": "", **config}, config["sha256"], parts.shards)
    if parts.shards is None and base.ntotal != len(table):
        raise ArtifactDamagedError(f"{folder}: the index holds {base.ntotal} images, the catalogue {len(table)}.")
    return Catalogue(table, base, removed)


def read_changes(folder: Path, config: dict[str, Any]) -> changes.Changes:
    """What has changed since the base, by changes.sqlite or by the journal of an older format."""
    found = changes.read(folder, config)
    if found is None:
        return changes.Changes(int(config.get("catalog_version", 1)), "", images_of(read_journal(folder, config)))
    return found


def removed_before(folder: Path, config: dict[str, Any]) -> list[str]:
    """Ids of the images that had left before the base was made."""
    file = file_of(config, "removed")
    return [str(name) for name in read_json(folder / file)] if file in config["sha256"] else []
