"""Shards: read COCO, webdataset shards as img2dataset writes them, and URLs with the shards of their images."""

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
from fastattr.core.stages import fingerprint
from fastattr.corpus.folders import walk
from fastattr.corpus.images import IMAGE_SUFFIXES, read_bytes
from fastattr.corpus.records import (
    KNOWN,
    ROWS_AT_ONCE,
    Found,
    Part,
    Skipped,
    as_captions,
    as_text,
    as_training_image,
    decode_text,
    state_of,
    take_captions,
)
from fastattr.corpus.reservations import COLUMNS, SITE_FILE, site_rules


def files_in(path: Path, suffix: str) -> list[Path]:
    """A file, or all files of a kind in a folder, sorted; raises ArtifactNotFoundError if there is none."""
    files = [path] if path.is_file() else sorted(path.glob(f"*{suffix}"))
    if not files:
        raise ArtifactNotFoundError(f"{path} is neither a {suffix} file nor a folder that holds one.")
    return files


def coco_parts(folder: Path, split: str) -> list[Part]:
    """COCO: `annotations/captions_SPLIT.json` and the images in `SPLIT/`; the image id is the file's name without suffix.
    InputError if the annotations are not COCO's.
    """
    listed = folder / "annotations" / f"captions_{split}.json"
    try:
        rows = _coco_rows(read_json(listed), folder / split)
    except (KeyError, TypeError, AttributeError) as error:
        told = f"{type(error).__name__}: {error}; expected 'images' and 'annotations'"
        raise InputError(f"{listed} is no list of COCO's captions ({told}).") from error
    known = {path for path, *_ in rows}
    others = [path.name for path in walk(folder / split) if path not in known and path.name != SITE_FILE]
    skipped = [Skipped(name=name, reason=f"not in {listed.name}") for name in others]
    blocks = [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]
    states = [[(path.name, *row, state_of(path)) for path, *row in block] for block in blocks]
    parts = [Part(fingerprint(state), partial(_read_coco, block)) for state, block in zip(states, blocks, strict=True)]
    return [*parts, Part(fingerprint(others), partial(iter, skipped))]


def _coco_rows(annotations: Any, images: Path) -> list[tuple[Path, list[str], dict[str, Any]]]:
    captions: dict[int, list[str]] = {}
    for annotation in annotations["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    licenses = {item["id"]: item["name"] for item in annotations.get("licenses", [])}
    rules = site_rules((f"{images.name}/{image['file_name']}" for image in annotations["images"]), images.parent)
    rows: list[tuple[Path, list[str], dict[str, Any]]] = []
    for image in sorted(annotations["images"], key=lambda image: image["id"]):
        found = {"license": licenses.get(image.get("license", -1)), "url": image.get("flickr_url") or image.get("coco_url")}
        found |= rules.get(f"{images.name}/{image['file_name']}", {})
        written = as_captions(captions.get(image["id"], []))
        rows.append((images / image["file_name"], written, {"source": f"coco-{images.name}", **found}))
    return rows


def _read_coco(block: Sequence[tuple[Path, list[str], dict[str, Any]]]) -> Iterator[Found]:
    for path, captions, metadata in block:
        yield as_training_image(image_id=path.stem, image=read_bytes(path), captions=captions, metadata=metadata)


def shard_parts(shards: Sequence[Path], rows: Mapping[str, Mapping[str, Any]] | None = None, made_of: str = "") -> list[Part]:
    """A part a tar shard; arguments as `read_shard`, and `made_of` identifies `rows`."""
    states = [[shard.name, state_of(shard), state_of(shard.with_suffix(".parquet")), made_of] for shard in shards]
    return [Part(fingerprint(state), partial(read_shard, shard, rows)) for state, shard in zip(states, shards, strict=True)]


def read_shard(shard: Path, rows: Mapping[str, Mapping[str, Any]] | None = None) -> Iterator[Found]:
    """Read one tar shard, a sample at a time, with img2dataset's NNNNN.parquet of columns and failures if it is beside it. The
    image id is the sample's key; a key that does not begin with the shard's name gets it as a prefix, as such keys count from 0
    in every shard. `rows` is metadata by URL, which goes before the shard's own.
    """
    beside = shard.with_suffix(".parquet")
    rows_beside = pq.read_table(beside).to_pylist() if beside.exists() else []
    listed = {str(row["key"]): row for row in rows_beside if row.get("key") is not None}
    for key, files in _samples(shard):
        if isinstance(files, Skipped):
            yield files
            continue
        image_id = key if key.startswith(shard.stem) else f"{shard.stem}/{key}"
        try:
            own = json.loads(decode_text(files.get(".json", b"{}")))
            written = as_captions(decode_text(files.get(".txt", b"")))
        except ValueError as error:  # InputError is one
            yield Skipped(name=image_id, reason=f"its description cannot be read ({error})")
            continue
        metadata = _lowered(listed.pop(key, {})) | _lowered(own)
        given = _lowered(rows.get(str(metadata.get("url", "")), {})) if rows is not None else {}
        captions = take_captions(given) or written or take_captions(metadata)
        metadata |= given
        metadata["source"] = urlsplit(str(metadata.get("url", ""))).hostname or ""
        image = next((data for suffix, data in files.items() if suffix in IMAGE_SUFFIXES), None)
        if image is None:
            yield Skipped(name=image_id, reason=f"no image in the sample (it has {', '.join(files)})")
            continue
        yield as_training_image(image_id=image_id, image=image, captions=captions, metadata=metadata)
    for key, row in listed.items():
        problem = row.get("error_message") or row.get("status") or "no reason given"
        yield Skipped(name=key, reason=f"not in its shard ({problem})", url=as_text(row.get("url")))


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
        if files:
            yield key, files
    except (tarfile.TarError, EOFError, OSError) as error:  # the last sample may lack its end, so it is not taken
        reason = f"the shard breaks off here ({type(error).__name__}: {error})"
        yield shard.name, Skipped(name=f"{shard.name}: after {key or 'its start'}", reason=reason)


def _lowered(row: Any) -> dict[str, Any]:
    """The values of a row that are not missing, by names in small letters; none of what is no row."""
    return {str(name).lower(): value for name, value in row.items() if value not in (None, "")} if isinstance(row, dict) else {}


def rows_by_url(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of parquet files of URLs, all in memory, about 500 bytes each; raises InputError without a column of URLs."""
    rows: dict[str, dict[str, Any]] = {}
    for file in files_in(path, ".parquet"):
        names = pq.read_schema(file).names
        column = next((name for name in names if name.lower() == "url"), None)
        if column is None:
            raise InputError(f"{file} has no column 'url'; it has {names}.")
        wanted = [name for name in names if name.lower().replace("_", "-") in {*KNOWN, *COLUMNS}]
        rows |= {row[column]: row for row in pq.read_table(file, columns=wanted).to_pylist() if row[column]}
    return rows


def not_fetched(rows: Mapping[str, Mapping[str, Any]], parts: Sequence[Path]) -> list[Skipped]:
    """The URLs whose image is in no shard and in no shard's list of failures."""
    seen: set[str] = set()
    for part in parts:
        for file in (part, part.with_suffix(".skipped")):
            seen.update(pq.read_table(file, columns=["url"])["url"].to_pylist())
    return [Skipped(name=url, reason="its image is in no shard", url=url) for url in rows if url not in seen]
