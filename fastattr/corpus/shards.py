"""Shards: read COCO, webdataset shards, and URLs with the shards of their images.

Webdataset shards are read as img2dataset writes them: NNNNN.tar with KEY.jpg, KEY.txt and KEY.json (url, caption, and
LAION's LICENSE, NSFW, similarity), and NNNNN.parquet beside it, which also lists the URLs that could not be fetched.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.parquet as pq

from fastattr.core.errors import ArtifactNotFoundError, InputError
from fastattr.core.files import read_json
from fastattr.corpus.images import IMAGE_SUFFIXES, read_bytes
from fastattr.corpus.records import ROWS_AT_ONCE, Part, Skipped, TrainingImage, as_training_image

NAMES = {
    "caption": ("caption", "text", "alt"),
    "url": ("url",),
    "license": ("license", "licence"),
    "creator": ("creator", "author", "artist", "photographer"),
    "nsfw": ("nsfw",),
    "similarity": ("similarity",),
}
"""Our names, and theirs in any case of letters, of which the first that has a value counts."""


def files_of(path: Path, suffix: str) -> list[Path]:
    """A file, or all files of a kind in a folder, sorted.

    Raises:
        ArtifactNotFoundError: there is none.
    """
    files = [path] if path.is_file() else sorted(path.glob(f"*{suffix}"))
    if not files:
        raise ArtifactNotFoundError(f"{path} is neither a {suffix} file nor a folder that holds one.")
    return files


def coco_parts(folder: Path, split: str) -> list[Part]:
    """COCO: `annotations/captions_SPLIT.json` and the images in `SPLIT/`; the image id is the file's name without suffix.

    Raises:
        ArtifactNotFoundError: there are no such annotations.
    """
    annotations = read_json(folder / "annotations" / f"captions_{split}.json")
    captions: dict[int, list[str]] = {}
    for annotation in annotations["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
    licenses = {item["id"]: item["name"] for item in annotations.get("licenses", [])}
    images = sorted(annotations["images"], key=lambda image: image["id"])
    blocks = [images[start : start + ROWS_AT_ONCE] for start in range(0, len(images), ROWS_AT_ONCE)]
    return [
        Part(f"{split} from {block[0]['id']}", partial(_read_coco, folder / split, block, captions, licenses, f"coco-{split}"))
        for block in blocks
    ]


def _read_coco(
    folder: Path,
    images: Sequence[Mapping[str, Any]],
    captions: Mapping[int, list[str]],
    licenses: Mapping[int, str],
    source: str,
) -> Iterator[TrainingImage | Skipped]:
    for image in images:
        metadata = {"license": licenses.get(image.get("license", -1)), "source": source}
        metadata["url"] = image.get("flickr_url") or image.get("coco_url")
        yield as_training_image(
            image_id=Path(image["file_name"]).stem,
            image=read_bytes(folder / image["file_name"]),
            captions=[text for text in captions.get(image["id"], []) if text],
            metadata=metadata,
        )


def shard_part(shard: Path, rows: Mapping[str, Mapping[str, Any]] | None) -> Part:
    """One tar shard as a part; arguments as `read_shard`."""
    status = shard.stat()
    return Part(f"{shard.name} {status.st_size} {status.st_mtime_ns}", partial(read_shard, shard, rows))


def read_shard(shard: Path, rows: Mapping[str, Mapping[str, Any]] | None = None) -> Iterator[TrainingImage | Skipped]:
    """Read one tar shard, a sample at a time.

    The image id is the sample's key; a key that does not begin with the shard's name gets it as a prefix, as such keys
    count from 0 in every shard.

    Args:
        shard: NNNNN.tar; img2dataset's NNNNN.parquet beside it, if there is one, adds columns and the failed downloads.
        rows: metadata by URL, which goes before the shard's own.
    """
    listed = _listed(shard.with_suffix(".parquet"))
    for key, files in _samples(shard):
        if isinstance(files, Skipped):
            yield files
            continue
        try:
            own = json.loads(files.get(".json", b"{}"))
        except ValueError:
            own = {}
        metadata = _renamed(listed.pop(key, {})) | _renamed(own)
        if rows is not None:
            metadata |= _renamed(rows.get(metadata.get("url", ""), {}))
        caption = files.get(".txt", b"").decode("utf-8", errors="replace").strip() or metadata.get("caption", "")
        if rows is not None:
            caption = metadata.get("caption", "") or caption
        metadata["source"] = urlsplit(metadata.get("url", "")).hostname or ""
        image = next((data for suffix, data in files.items() if suffix in IMAGE_SUFFIXES), b"")
        image_id = key if key.startswith(shard.stem) else f"{shard.stem}/{key}"
        yield as_training_image(image_id=image_id, image=image, captions=[caption] if caption else [], metadata=metadata)
    for key, row in listed.items():
        problem = row.get("error_message") or row.get("status") or "no reason given"
        yield Skipped(name=key, reason=f"not in its shard ({problem})", url=_renamed(row).get("url", ""))


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, bytes] | Skipped]]:
    """(key, files by suffix) of each sample; a shard that breaks off gives what came before, then a `Skipped`."""
    key, files = "", dict[str, bytes]()
    try:
        with tarfile.open(shard, "r|*") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                found = f"{folder}/{stem}" if folder else stem
                if found != key:
                    if files:
                        yield key, files
                    key, files = found, dict[str, bytes]()
                content = archive.extractfile(member)
                files[f".{suffix.lower()}"] = content.read() if content else b""
    except (tarfile.TarError, EOFError, OSError) as error:
        # The last sample may lack its end, so it is not taken.
        reason = f"the shard breaks off here ({type(error).__name__}: {error})"
        yield f"{shard.name}", Skipped(name=f"{shard.name}: after {key or 'its start'}", reason=reason)
        return
    if files:
        yield key, files


def _listed(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of img2dataset's parquet by key."""
    if not path.exists():
        return {}
    rows = pq.read_table(path).to_pylist()
    return {str(row["key"]): row for row in rows if row.get("key") is not None}


def _renamed(row: Mapping[str, Any]) -> dict[str, str]:
    """The values that we keep, by our names; empty ones are left out."""
    lower = {str(name).lower(): value for name, value in row.items() if value is not None}
    found = {
        ours: next((lower[name] for name in theirs if str(lower.get(name, "")).strip()), "") for ours, theirs in NAMES.items()
    }
    return {name: str(value).strip() for name, value in found.items() if str(value).strip()}


def rows_by_url(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of one or more parquet files of URLs; all are in memory, about 500 bytes each.

    Raises:
        InputError: they have no column of URLs.
    """
    rows: dict[str, dict[str, Any]] = {}
    for file in files_of(path, ".parquet"):
        names = pq.read_schema(file).names
        column = next((name for name in names if name.lower() == "url"), None)
        if column is None:
            raise InputError(f"{file} has no column 'url'; it has {names}.")
        wanted = [name for name in names if name.lower() in {theirs for each in NAMES.values() for theirs in each}]
        rows |= {row[column]: row for row in pq.read_table(file, columns=wanted).to_pylist() if row[column]}
    return rows


def not_fetched(rows: Mapping[str, Mapping[str, Any]], parts: Sequence[Path]) -> list[Skipped]:
    """The URLs whose image is in no shard and in no shard's list of failures."""
    seen: set[str] = set()
    for part in parts:
        for file in (part, part.with_suffix(".skipped")):
            seen.update(pq.read_table(file, columns=["url"])["url"].to_pylist())
    return [Skipped(name=url, reason="its image is in no shard", url=url) for url in rows if url not in seen]
