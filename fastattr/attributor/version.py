"""Version: one state of an attributor's folder, from which a whole answer is given; `newest` gives the next one.

A version is the base (index, catalogue table, index of the untuned features) with the changes since. It never changes, so
threads may share it; every answer asks for the newest version once and takes everything from that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattr.attributor import changes
from fastattr.attributor.catalogue import Catalogue
from fastattr.attributor.changes import Image, MovedError
from fastattr.attributor.folder import check_files, file_of, needed_files, read_config, read_table, settled, stamp_of, versions
from fastattr.attributor.journal import images_of, read_journal
from fastattr.core.errors import ArtifactDamagedError
from fastattr.core.files import read_json
from fastattr.index.files import load_index
from fastattr.index.search import Ranked, Shards, open_ranked

if TYPE_CHECKING:
    from fastattr.attributor.collection import MilvusBackend


@dataclass(frozen=True)
class Parts:
    """Which parts of a folder are loaded."""

    thumbnails: bool = True
    shards: Sequence[int] | None = None
    """Of the index; None for all."""

    @property
    def whole(self) -> bool:
        """Whether nothing is left out."""
        return self.thumbnails and self.shards is None


@dataclass(frozen=True)
class Version:
    """One state of an attributor's folder."""

    folder: Path
    base: dict[str, Any]
    """config.json."""
    parts: Parts
    stamp: tuple[int, ...]
    """Of config.json, when the base was read."""
    catalogue: Catalogue | MilvusBackend
    plain: Ranked | None
    """The index of the untuned features, whose rows are the first of the base."""
    number: int
    """Rises with every change."""
    changes: str
    """Identifies what has changed since the base; '' if nothing has."""

    @property
    def config(self) -> dict[str, Any]:
        """config.json with the present 'catalog_version', and 'changes' where there are any."""
        return {**self.base, "catalog_version": self.number} | ({"changes": self.changes} if self.changes else {})

    def versions(self) -> dict[str, Any]:
        """SHA-256 of 'model', 'index' and 'catalog', and 'catalog_version'."""
        return versions(self.config)

    def newest(self) -> Version:
        """The version that the folder holds now, which may be this one."""
        stamp = stamp_of(self.folder)
        if stamp == self.stamp:
            try:
                found = changes.read(self.folder, self.base, after=self.number)
            except MovedError:
                found = None
            else:
                if found is None and not self.changes:
                    return self
            if found is not None and (found.version, found.total) == (self.number, self.changes):
                return self
            if found is not None and found.version > self.number:
                return replace(self._with(found.images), number=found.version, changes=found.total)
        return settled(self.folder, self._again)

    def _again(self) -> Version:
        stamp = stamp_of(self.folder)
        config = read_config(self.folder)
        if not isinstance(self.catalogue, Catalogue):
            current = read_changes(self.folder, config)
            removed = left(removed_before(self.folder, config), current.images)
            return replace(
                self,
                base=config,
                stamp=stamp,
                catalogue=self.catalogue.with_removed(removed),
                number=current.version,
                changes=current.total,
            )
        check_files(self.folder, config, needed_files(config, thumbnails=self.parts.thumbnails, shards=self.parts.shards))
        return open_version(self.folder, config, self.parts, stamp=stamp)

    def _with(self, images: Sequence[Image]) -> Version:
        if isinstance(self.catalogue, Catalogue):
            return replace(self, catalogue=self.catalogue.applied(images))
        return replace(self, catalogue=self.catalogue.with_removed(left(self.catalogue.removed, images)))


def open_version(folder: Path, config: dict[str, Any], parts: Parts, *, stamp: tuple[int, ...]) -> Version:
    """The version that a folder holds.

    Args:
        folder: of the attributor.
        config: its config.json.
        parts: what to load; an index of untuned features is loaded with a whole index only.
        stamp: of config.json, from before it was read.
    """
    catalogue = open_base(folder, config, parts)
    file = file_of(config, "plain")
    with_plain = file in config["sha256"] and parts.shards is None
    plain = Ranked(Shards([(load_index(folder / file, sha256=config["sha256"][file]), 0)])) if with_plain else None
    current = read_changes(folder, config)
    if current.images:
        catalogue = catalogue.applied(current.images)
    return Version(folder, config, parts, stamp, catalogue, plain, current.version, current.total)


def open_base(folder: Path, config: dict[str, Any], parts: Parts = Parts()) -> Catalogue:
    """The catalogue of a base; errors as `open_version`."""
    table = read_table(folder / file_of(config, "catalog"))
    file = file_of(config, "thumbnails")
    if parts.thumbnails and file in config["sha256"]:
        thumbnails = read_table(folder / file)
        if thumbnails["image_id"] != table["image_id"]:
            raise ArtifactDamagedError(f"{folder}: catalogue and thumbnails list other images; fetch the attributor again.")
        table = table.append_column("thumbnail", thumbnails["thumbnail"])
    settings = {"index_shards": [{"file": "index.faiss", "first_row": 0}], "index": "", **config}
    base = open_ranked(folder, settings, config["sha256"], parts.shards)
    if parts.shards is None and base.ntotal != len(table):
        raise ArtifactDamagedError(f"{folder}: the index holds {base.ntotal} images, the catalogue {len(table)}.")
    return Catalogue(table, base, removed_before(folder, config))


def read_changes(folder: Path, config: dict[str, Any]) -> changes.Changes:
    """What has changed since the base, by changes.sqlite or by the journal of an older format."""
    found = changes.read(folder, config)
    if found is None:
        images = images_of(read_journal(folder, config))
        return changes.Changes(int(config.get("catalog_version", 1)), "", images)
    return found


def removed_before(folder: Path, config: dict[str, Any]) -> list[str]:
    """Ids of the images that had left before the base was made."""
    file = file_of(config, "removed")
    return [str(name) for name in read_json(folder / file)] if file in config["sha256"] else []


def left(removed: Sequence[str] | dict[str, None], images: Sequence[Image]) -> dict[str, None]:
    """Ids that have left, once changes of images are taken up."""
    found = dict.fromkeys(removed)
    for image in images:
        if image.has_left or image.vector is not None:
            found.pop(image.image_id, None)
        if image.has_left:
            found[image.image_id] = None
    return found
