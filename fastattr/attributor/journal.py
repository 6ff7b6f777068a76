"""Journal: the changes of format 3, one JSON line each, as older attributors bring them along.

Nothing is written to it: the first change moves its lines to changes.sqlite.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastattr.attributor.changes import Image
from fastattr.core.errors import ArtifactDamagedError, MissingFileError

JOURNAL = "journal.jsonl"


def journal_of(config: Mapping[str, Any]) -> str | None:
    """The journal's file; None for an attributor without one."""
    file = config.get("files", {}).get("journal", JOURNAL)
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
    return [
        {name: value for name, value in {**entry, **own}.items() if name in plain}
        for entry, own in zip(entries, ids, strict=True)
    ]


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
