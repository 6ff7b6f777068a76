"""Folders: read images with captions from metadata.jsonl or from a text file beside each image."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastattr.core.errors import ArtifactNotFoundError, InputError
from fastattr.core.stages import fingerprint
from fastattr.corpus.images import IMAGE_SUFFIXES, read_bytes
from fastattr.corpus.records import ROWS_AT_ONCE, Part, Skipped, TrainingImage, as_captions, as_training_image


def read_folder(folder: Path) -> Iterator[TrainingImage | Skipped]:
    """Read a captioned image folder: `metadata.jsonl` (file_name, text or caption, creator, ...) or `NAME.txt` sidecars.

    The image id is the path below `folder` without its suffix.

    Raises:
        ArtifactNotFoundError: no such folder.
        InputError: metadata.jsonl is not UTF-8.
    """
    for part in folder_parts(folder):
        yield from part.read()


def folder_parts(folder: Path) -> list[Part]:
    """The parts of a captioned image folder, `ROWS_AT_ONCE` files each; see `read_folder`."""
    if not folder.is_dir():
        raise ArtifactNotFoundError(f"{folder} is not a folder. Give the folder that holds the images.")
    described, bad = _described(folder / "metadata.jsonl")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir())
    ids = Counter(path.relative_to(folder).with_suffix("").as_posix() for path in files)
    names = {path.relative_to(folder).as_posix() for path in files}
    absent = [
        Skipped(name=name, reason="named in metadata.jsonl, but there is no such image") for name in described.keys() - names
    ]
    blocks = [files[start : start + ROWS_AT_ONCE] for start in range(0, len(files), ROWS_AT_ONCE)]
    parts = [
        Part(fingerprint([_stamp(path) for path in block]), partial(_read_files, folder, block, described, ids))
        for block in blocks
    ]
    listed = [*bad, *sorted(absent, key=lambda skipped: skipped.name)]
    return [Part(fingerprint([vars(skipped) for skipped in listed]), partial(iter, listed)), *parts]


def _described(path: Path) -> tuple[dict[str, dict[str, Any]], list[Skipped]]:
    """The rows of a metadata.jsonl by file name, and its bad lines."""
    described: dict[str, dict[str, Any]] = {}
    bad: list[Skipped] = []
    if not path.exists():
        return described, bad
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # captions may hold U+2028
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error}); save it as UTF-8.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            described[str(row["file_name"])] = row
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            bad.append(Skipped(name=f"metadata.jsonl:{number}", reason=f"bad line ({type(error).__name__}: {error})"))
    return described, bad


def _read_files(
    folder: Path, files: Sequence[Path], described: dict[str, dict[str, Any]], ids: Counter[str]
) -> Iterator[TrainingImage | Skipped]:
    for path in files:
        name = path.relative_to(folder).as_posix()
        row = described.get(name, {})
        sidecar = path.with_suffix(".txt")
        captions = as_captions(row.get("captions") or row.get("caption") or row.get("text"))
        if not captions and sidecar.exists():
            captions = as_captions(sidecar.read_text(encoding="utf-8", errors="replace").splitlines())
        stem = path.relative_to(folder).with_suffix("").as_posix()
        yield as_training_image(
            image_id=stem if ids[stem] == 1 else name, image=read_bytes(path), captions=captions, metadata=row
        )


def _stamp(path: Path) -> tuple[str, int, int]:
    """Identifies a file as it is now, without reading it."""
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns
