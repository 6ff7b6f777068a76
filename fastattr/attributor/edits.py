"""Edits of a locked folder's catalogue: each is checked against the newest version, then written as one transaction."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastattr.attributor.answers import Model
from fastattr.attributor.bases import upgraded
from fastattr.attributor.changes import Image, Writer, writing
from fastattr.attributor.inputs import Captions, Metadata, Thumbnails, checked_metadata, image_sha256, open_image
from fastattr.attributor.make import thumbnail_bytes
from fastattr.attributor.version import Version, removed_before
from fastattr.core.errors import InputError


def prepared(
    model: Model, images: Sequence[Any], captions: Captions, metadata: Metadata | None
) -> tuple[np.ndarray, list[str], list[dict[str, str]], list[bytes]]:
    """Features, captions, metadata and thumbnails of n images, as `FastAttributor.add_features` takes them."""
    if len(images) != len(captions) or (metadata is not None and len(metadata) != len(images)):
        raise InputError(f"{len(images)} images need as many captions and metadata.")
    opened = [open_image(image) for image in images]
    texts: list[Any] = [list(text) if isinstance(text, list | tuple) else [text] for text in captions]
    if not all(text and all(isinstance(one, str) and one.strip() for one in text) for text in texts):
        raise InputError("every image needs a caption.")
    names = [f"added-{image_sha256(image, text[0])[:16]}" for image, text in zip(opened, texts, strict=True)]
    fields = [{"image_id": name, **(own or {})} for name, own in zip(names, metadata or [{}] * len(names), strict=True)]
    thumbnails = [thumbnail_bytes(image, quality=40) for image in opened]
    return model.encode(opened, texts), [text[0] for text in texts], fields, thumbnails


def checked_records(captions: Sequence[str], metadata: Metadata) -> list[dict[str, str]]:
    """What the catalogue is to say of images."""
    if len(metadata) != len(captions):
        raise InputError(f"{len(captions)} images need as many metadata, got {len(metadata)}.")
    records = [checked_metadata({"caption": caption, **own}) for caption, own in zip(captions, metadata, strict=True)]
    ids = [record.get("image_id", "") for record in records]
    if "" in ids or len(set(ids)) < len(ids):
        raise InputError("every image needs an image_id of its own.")
    return records


def add(version: Version, records: Metadata, embeddings: np.ndarray, thumbnails: Thumbnails, *, readmit: bool) -> None:
    """Take images in: fields of each, with 'image_id', and (n, D) embeddings; `readmit` those that have left, too."""
    catalogue, ids = version.own(), [record["image_id"] for record in records]
    there = [name for name, slot in zip(ids, catalogue.slots(ids), strict=True) if slot >= 0]
    left = [name for name in ids if name in catalogue.removed]
    if there:
        raise InputError(f"the catalogue already has {', '.join(there[:3])}; update it, or give another image_id.")
    if left and not readmit:
        raise InputError(f"{', '.join(left[:3])} was removed; to take it in again, say so (readmit=True).")
    pictures = thumbnails if thumbnails is not None else [None] * len(ids)
    if len(pictures) != len(ids):
        raise InputError(f"{len(ids)} images need as many thumbnails, got {len(pictures)}.")
    images = [
        Image(name, False, {key: value for key, value in record.items() if key != "image_id"}, vector.tobytes(), picture)
        for name, record, vector, picture in zip(ids, records, embeddings.astype("<f2"), pictures, strict=True)
    ]
    with _writing(version) as writer:
        writer.put(images)
        writer.note("add", ids)


def remove(version: Version, image_ids: Sequence[str], reason: str) -> None:
    """Take images out; some may have left already."""
    if not all(isinstance(name, str) for name in image_ids):
        raise InputError(f"image ids are texts; got {list(image_ids)!r:.100}.")
    leaving = [name for name in image_ids if name not in version.own().removed]
    _require(version, leaving)
    if leaving:
        with _writing(version) as writer:
            writer.put([Image(name, True, {}) for name in leaving])
            writer.note("remove", leaving, reason)


def update(version: Version, changes: Mapping[str, Mapping[str, str]]) -> None:
    """Change what the catalogue says of images."""
    if any("image_id" in fields for fields in changes.values()):
        raise InputError("an image keeps its image_id; remove it and add it under another one.")
    changes = {image_id: checked_metadata(fields) for image_id, fields in changes.items()}
    _require(version, list(changes))
    if changes:
        with _writing(version) as writer:
            known = writer.images(list(changes))
            was = (known.get(name, Image(name, False, {})) for name in changes)
            new = zip(was, changes.values(), strict=True)
            writer.put(replace(old, fields={**old.fields, **fields}, has_left=False) for old, fields in new)
            writer.note("update", list(changes))


def _require(version: Version, image_ids: Sequence[str]) -> None:
    unknown = [name for name, slot in zip(image_ids, version.own().slots(image_ids), strict=True) if slot < 0]
    if unknown:
        raise InputError(f"the catalogue has no image {', '.join(map(repr, unknown[:3]))}; nothing was changed.")


@contextlib.contextmanager
def _writing(version: Version) -> Iterator[Writer]:
    config = upgraded(version.folder, version.base)
    before = [Image(name, True, {}) for name in removed_before(version.folder, config)]
    with writing(version.folder, config, base=config["seal"], first=before) as writer:
        yield writer
