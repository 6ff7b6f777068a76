"""Tables: read a Hub dataset, a folder of one, or a local data file, streamed by `datasets`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fastattr.core.errors import InputError
from fastattr.core.stages import fingerprint
from fastattr.corpus.folders import walk
from fastattr.corpus.images import read_bytes
from fastattr.corpus.records import (
    CAPTION_COLUMNS,
    Found,
    Part,
    Skipped,
    as_captions,
    as_text,
    as_training_image,
    read_rows,
    state_of,
)

KINDS = {".parquet": "parquet", ".arrow": "arrow"}  # data files that `datasets` streams
TEXT_KINDS = (".csv", ".tsv", ".json", ".jsonl")  # data files that are read as people write them, see `read_rows`
IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png", "webp", "file_name", "image_path", "path", "file")
ROWS_PER_PART = 10_000  # of a dataset saved with `save_to_disk`, which can be split anywhere


def dataset_parts(source: str, split: str, *, image_column: str, caption_column: str) -> list[Part]:
    """The files of a dataset as parts; InputError if it cannot be opened, or lacks one of the two columns.

    `source` is a Hub repository, a folder that `datasets` loads, a folder of `save_to_disk`, or a data file (`KINDS`,
    `TEXT_KINDS`), which has no split. For columns 'image' and 'caption' that are not there the first of `IMAGE_COLUMNS` and
    `CAPTION_COLUMNS` count.
    """
    path = Path(source)
    base = path.parent if path.is_file() else path

    def named(columns: list[str]) -> dict[str, Any]:
        image = _column(source, columns, image_column, IMAGE_COLUMNS)
        return {
            "image_column": image,
            "caption_column": _column(source, columns, caption_column, CAPTION_COLUMNS),
            "base": base,
        }

    if path.is_file() and path.suffix.lower() in TEXT_KINDS:
        rows: list[dict[str, Any] | Skipped] = [
            Skipped(name=f"{path.name}:{line}", reason=f"bad line ({told})") if row is None else row
            for line, told, row in read_rows(path)
        ]
        names = named(list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row)))
        return [Part(fingerprint([source, state_of(path)]), partial(read_dataset, rows, **names))]
    dataset, made_of = _open(source, split)
    features = dataset.features or {}
    dataset = dataset.decode(False) if features else dataset
    names = named(list(features) or list(next(_readable(source, dataset), {})))
    inner = {name: getattr(feature, "feature", feature) for name, feature in features.items()}  # of a list, its elements'
    names["classes"] = {name: feature.names for name, feature in inner.items() if hasattr(feature, "names")}
    count = dataset.num_shards

    def read(number: int) -> Iterator[Found]:
        shard = _readable(source, dataset.shard(count, number) if count > 1 else dataset)
        return read_dataset(shard, **names, prefix=f"{number:05d}-" if count > 1 else "")

    return [Part(fingerprint([made_of, split, number, count]), partial(read, number)) for number in range(count)]


def _readable(source: str, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows; InputError at the first that cannot be read."""
    try:
        yield from rows
    except Exception as error:  # `datasets` and its readers raise many types on damaged files
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(f"{source!r} cannot be read ({reason}).") from error


def _open(source: str, split: str) -> tuple[Any, Any]:
    """The dataset, streamed, and a value that changes with its files."""
    from datasets import DatasetDict, load_dataset_builder, load_from_disk

    path = Path(source)
    made_of: Any = [(str(file), state_of(file)) for file in walk(path)]
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = load_from_disk(source)
            if isinstance(saved, DatasetDict):
                saved = saved[split]
            return saved.to_iterable_dataset(num_shards=max(1, len(saved) // ROWS_PER_PART)), made_of
        if path.is_file() and (kind := KINDS.get(path.suffix.lower())):
            builder, split = load_dataset_builder(kind, data_files=source), "train"
        else:
            builder = load_dataset_builder(source)
        if hasattr(builder.config, "batch_size"):  # of parquet; its default is the first row group's size, which may be 0
            builder.config.batch_size = 100
        files = builder.config.data_files or {}
        made_of = made_of or [source, {str(name): listed.origin_metadata for name, listed in files.items()}]
        return builder.as_streaming_dataset(split=split), made_of
    except (OSError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{source!r} cannot be opened as a dataset with a split {split!r} ({reason}).") from error


def _column(source: str, columns: list[str], wanted: str, others: tuple[str, ...]) -> str:
    """The column that is wanted, or the first of `others` if the default is wanted and there is none."""
    known = (wanted, *others) if wanted in {"image", "caption"} else (wanted,)
    found = next((name for name in known if name in columns), None)
    if found is None:
        raise InputError(f"{source} has no column {wanted!r}; it has {columns}. Pass --image-column or --caption-column.")
    return found


def read_dataset(
    rows: Iterable[dict[str, Any] | Skipped],
    *,
    image_column: str,
    caption_column: str,
    prefix: str = "",
    classes: Mapping[str, list[str]] | None = None,
    base: Path = Path(),
) -> Iterator[Found]:
    """Read rows of a `datasets` dataset whose images are not decoded; `classes` names the classes of columns of numbers. The
    image id is the row's `image_id` if it has one, else `prefix` and its position, zero-padded.
    """
    for position, row in enumerate(rows):
        if isinstance(row, Skipped):
            yield row
            continue
        named = row | {name: _named(row.get(name), names) for name, names in (classes or {}).items()}
        yield as_training_image(
            image_id=as_text(row.get("image_id")) or f"{prefix}{position:09d}",
            image=image_of(row.get(image_column), base),
            captions=as_captions(named.get(caption_column)),
            metadata={name: value for name, value in named.items() if name not in {image_column, caption_column}},
        )


def _named(value: Any, names: list[str]) -> Any:
    """Class numbers as names; -1 means that there is no class."""
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def image_of(value: Any, base: Path) -> bytes:
    """The image file in a cell of an image column; empty if it holds none or names a file that does not exist.

    The cell holds bytes, a file name, a place in a Hub repository or archive, {'bytes': ..., 'path': ...}, or a list of such,
    of which the first counts. File names start from `base`; a path that exists nowhere is looked for by its last parts, too,
    since data sets are moved together with their tables.
    """
    if isinstance(value, list):
        return image_of(value[0], base) if value else b""
    if isinstance(value, Mapping):
        return image_of(value.get("bytes") or value.get("path"), base)
    if isinstance(value, bytes) or not isinstance(value, str) or not value:
        return value if isinstance(value, bytes) else b""
    if "://" in value and not value.startswith("http"):
        from datasets.utils.file_utils import xopen

        try:
            with xopen(value, "rb") as file:
                return bytes(file.read())
        except FileNotFoundError:
            return b""
    parts = Path(value.replace("\\", "/")).parts
    places = [base / value, Path(value), *(base.joinpath(*parts[start:]) for start in range(len(parts)))]
    return next((data for data in map(read_bytes, places) if data), b"")
