r"""Folders: read images whose captions stand in tables or in a text file beside each image.

- metadata.jsonl or metadata.csv in any folder: rows of file_name, text or caption, creator, ...
- NAME.txt, NAME.caption: a caption a line; NAME.json: a row for that image.
- kohya's folders, `10_ink style`: the name is the caption of images that have no other.

Every file below the folder is an image, belongs to one, is such a table, or is listed as skipped with the reason. Links are
followed. File names match in any case of letters, with / or \, and in either Unicode form, if only one file fits.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastattr.core.errors import ArtifactNotFoundError, InputError
from fastattr.core.stages import fingerprint
from fastattr.corpus.images import IMAGE_SUFFIXES, looks_like_an_image, read_bytes
from fastattr.corpus.records import (
    ROWS_AT_ONCE,
    Found,
    Part,
    Skipped,
    as_captions,
    as_text,
    as_training_image,
    decode_text,
    read_rows,
    state_of,
    take_captions,
)
from fastattr.corpus.reservations import SITE_FILE, site_rules

TABLES = ("metadata.jsonl", "metadata.csv")
SIDECARS = (".txt", ".caption", ".json")
FILE_COLUMNS = ("file_name", "filename", "file", "path", "image")
REPEATED = re.compile(r"(\d+)_(.+)")  # a kohya folder: how often its images were shown to the trainer, and what they show


@dataclass
class Listing:
    """What a folder holds."""

    files: dict[str, Path] = field(default_factory=dict)  # every readable file by its path below the folder
    images: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # image file -> its rows in tables
    sidecars: dict[str, list[str]] = field(default_factory=dict)  # image file -> the files beside it that describe it
    skipped: list[Skipped] = field(default_factory=list)


def read_folder(folder: Path, *, creator_from_folder: bool = False) -> Iterator[Found]:
    """Read a captioned image folder; see `list_folder` and `folder_parts`."""
    for part in folder_parts(list_folder(folder), creator_from_folder=creator_from_folder):
        yield from part.read()


def folder_parts(listing: Listing, *, creator_from_folder: bool = False) -> list[Part]:
    """The parts of a captioned image folder, `ROWS_AT_ONCE` images each. An image's id is its path below the folder without the
    suffix, or with it where two files would share an id. With `creator_from_folder`, the first folder of that path names the
    creator of images that have none.
    """
    ids = _ids(listing.images)
    parts = [Part(fingerprint([vars(skipped) for skipped in listing.skipped]), partial(iter, listing.skipped))]
    names = list(listing.images)
    for start in range(0, len(names), ROWS_AT_ONCE):
        part = names[start : start + ROWS_AT_ONCE]
        block = {name: (ids[name], listing.images[name], listing.sidecars.get(name, [])) for name in part}
        used = [name for image, (_, _, beside) in block.items() for name in (image, *beside)]
        state = [(name, state_of(listing.files[name])) for name in used]
        read = partial(_read_images, listing.files, block, creator_from_folder)
        parts.append(Part(fingerprint([state, block, creator_from_folder]), read))
    return parts


def list_folder(folder: Path, leave_out: Collection[Path] = ()) -> Listing:
    """What lies below a folder, but in `leave_out`: every file has its place in the result. Raises ArtifactNotFoundError if
    there is no such folder, InputError if a table cannot be read.
    """
    if not folder.is_dir():
        raise ArtifactNotFoundError(f"{folder} is not a folder. Give the folder that holds the images.")
    listing = Listing()
    paths = walk(folder, leave_out=leave_out, skipped=listing.skipped)
    listing.files = {path.relative_to(folder).as_posix(): path for path in paths}
    tables = [name for name in listing.files if posixpath.basename(name).lower() in TABLES]
    others = [name for name in listing.files if name not in tables and posixpath.basename(name) != SITE_FILE]
    images = [name for name in others if _is_image(listing.files[name])]
    rows = _rows_by_file(listing, tables, images)
    named = {*rows, *images}
    listing.images = {name: rows.get(name, []) for name in others if name in named}
    for name, rule in site_rules(listing.images, folder).items():
        listing.images[name] = [*listing.images[name], rule]
    _find_sidecars(listing, others)
    return listing


def walk(root: Path, *, leave_out: Collection[Path] = (), skipped: list[Skipped] | None = None) -> Iterator[Path]:
    """The files below a folder, in order, or the one file; links are followed, and what is no file is added to `skipped`."""
    away = {path.resolve() for path in leave_out}

    def skip(path: Path, reason: str) -> None:
        if skipped is not None:
            skipped.append(Skipped(name=as_id(path.relative_to(root).as_posix()), reason=reason))

    def below(path: Path, above: set[Path]) -> Iterator[Path]:
        if path.is_file():
            yield path
        elif not path.is_dir():
            skip(path, "a link to a file that does not exist" if path.is_symlink() else "not a regular file")
        elif (real := path.resolve()) in above:
            skip(path, "a link to a folder that holds it")
        elif real not in away:
            try:
                inside = sorted(path.iterdir())
            except OSError as error:
                skip(path, f"the folder cannot be read ({error.strerror})")
                return
            deeper = above | {real}
            for each in inside:
                yield from below(each, deeper)

    if root.exists():
        yield from below(root, set())


def _is_image(path: Path) -> bool:
    """By its name, or else by its first bytes; a file that describes an image is none."""
    suffix = path.suffix.lower()
    return suffix in IMAGE_SUFFIXES or (suffix not in SIDECARS and looks_like_an_image(path))


def _rows_by_file(listing: Listing, tables: Sequence[str], images: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Image file -> its rows in all tables; bad lines and rows without an image are added to `listing.skipped`."""
    found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    folded: defaultdict[str, list[str]] = defaultdict(list)
    for name in images:
        folded[_folded(name)].append(name)
    broken = {skipped.name for skipped in listing.skipped}
    for table in tables:
        absent = set[str]()
        for line, problem, row in read_rows(listing.files[table]):
            column = next((name for name in FILE_COLUMNS if row and isinstance(row.get(name), str)), None)
            if row is None or column is None:
                reason = f"bad line ({problem or 'it names no file; expected file_name'})"
                listing.skipped.append(Skipped(name=f"{table}:{line}", reason=reason))
                continue
            given = posixpath.normpath(row[column].replace("\\", "/"))
            name = posixpath.normpath(posixpath.join(posixpath.dirname(table), given))
            fits = [name] if name in listing.files else folded.get(_folded(name), [])
            if len(fits) == 1:
                found[fits[0]].append({key: value for key, value in row.items() if key != column})
            elif name not in broken and name not in absent:
                absent.add(name)
                reason = f"named in {table}, but " + ("several images have that name" if fits else "there is no such image")
                listing.skipped.append(Skipped(name=as_id(name), reason=reason))
    return found


def _find_sidecars(listing: Listing, names: Sequence[str]) -> None:
    """Give each text to the images of its name; list the texts and other files that belong to none."""
    stems: defaultdict[str, list[str]] = defaultdict(list)
    folded: defaultdict[str, set[str]] = defaultdict(set)
    for image in listing.images:
        for stem in (image, posixpath.splitext(image)[0]):
            stems[stem].append(image)
            folded[_folded(stem)].add(stem)
    for name in (name for name in names if name not in listing.images):
        stem, suffix = posixpath.splitext(name)
        fits = {stem} if stem in stems else folded.get(_folded(stem), set())
        if suffix.lower() in SIDECARS and len(fits) == 1:
            for image in stems[next(iter(fits))]:
                listing.sidecars.setdefault(image, []).append(name)
        else:
            reason = "a text that belongs to no image" if suffix.lower() in SIDECARS else "not an image"
            listing.skipped.append(Skipped(name=as_id(name), reason=reason))


def _read_images(
    files: Mapping[str, Path], block: Mapping[str, tuple[str, list[dict[str, Any]], list[str]]], creator_from_folder: bool
) -> Iterator[Found]:
    for name, (image_id, rows, sidecars) in block.items():
        captions: list[str] = []
        try:
            for beside in sorted(sidecars, key=lambda each: SIDECARS.index(posixpath.splitext(each)[1].lower())):
                text = decode_text(files[beside].read_bytes())
                if beside.lower().endswith(".json"):
                    row = json.loads(text)
                    rows = [*rows, row if isinstance(row, dict) else {"caption": row}]
                else:
                    captions += text.splitlines()
        except (InputError, OSError, ValueError) as error:
            yield Skipped(name=image_id, reason=f"its description cannot be read ({posixpath.basename(beside)}: {error})")
            continue
        rows = [dict(row) for row in rows]
        described = [caption for row in rows for caption in take_captions(row)]
        row = _merged(rows)
        repeated = REPEATED.fullmatch(posixpath.basename(posixpath.dirname(name)))
        captions = as_captions([*described, *captions]) or ([repeated[2]] if repeated else [])
        if repeated:
            row["repeats"] = repeated[1]
        if creator_from_folder and "/" in name and not as_text(row.get("creator")):
            first = name.split("/")[0]
            row["creator"] = match[2] if (match := REPEATED.fullmatch(first)) else first
        yield as_training_image(image_id=image_id, image=read_bytes(files[name]), captions=captions, metadata=row)


def _merged(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several rows of one image as one: all captions, and of other columns every distinct value."""
    if len(rows) <= 1:
        return dict(rows[0]) if rows else {}
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [text for row in rows for text in as_captions(row.get(name))] for name in names}


def _ids(names: Collection[str]) -> dict[str, str]:
    """File -> image id: its path without suffix, in Unicode's composed form, if no other file could claim it."""
    stems = {name: unicodedata.normalize("NFC", as_id(posixpath.splitext(name)[0])) for name in names}
    claims, whole = Counter(stems.values()), {as_id(name) for name in names}
    alone = {name: claims[stem] == 1 and (stem not in whole or stem == as_id(name)) for name, stem in stems.items()}
    return {name: stem if alone[name] else as_id(name) for name, stem in stems.items()}


def as_id(name: str) -> str:
    """A file name as an image id; bytes that are no UTF-8 are spelt out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
