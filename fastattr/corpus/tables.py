"""Tables: read a Hub dataset, a folder of one, or a local data file, streamed by `datasets`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattr.core.errors import InputError
from fastattr.core.stages import fingerprint
from fastattr.corpus.images import read_bytes
from fastattr.corpus.records import CAPTION_COLUMNS, Part, Skipped, TrainingImage, as_training_image, state_of
from fastattr.corpus.text import as_captions, as_text

if TYPE_CHECKING:
    from datasets import IterableDataset

KINDS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png", "webp", "file_name", "image_path", "path", "file")
ROWS_PER_PART = 10_000
"""Of a dataset saved with `save_to_disk`, which can be split anywhere."""


def dataset_parts(source: str, split: str, *, image_column: str, caption_column: str) -> list[Part]:
    """The files of a dataset as parts.

    Args:
        source: a Hub repository, a folder that `datasets` loads, a folder of `save_to_disk`, or a data file (`KINDS`).
        split: of the dataset; a data file has none.
        image_column: images, bytes, or file names beside the data file. If it is 'image' and there is none, the first of
            `IMAGE_COLUMNS` counts.
        caption_column: texts or lists of texts. If it is 'caption' and there is none, the first of `CAPTION_COLUMNS` counts.

    Raises:
        InputError: it cannot be opened, or lacks one of the two columns.
    """
    from datasets import List, Sequence

    dataset, made_of = _open(source, split)
    features = dataset.features or {}
    columns = list(features) or list(next(iter(dataset), {}))  # a CSV or JSON file says with its first row
    if not columns:
        raise InputError(f"{source} has no rows.")
    image_column = _column(source, columns, image_column, IMAGE_COLUMNS, "--image-column")
    caption_column = _column(source, columns, caption_column, CAPTION_COLUMNS, "--caption-column")
    classes = {}
    for name, feature in features.items():
        inner = feature.feature if isinstance(feature, List | Sequence) else feature
        if hasattr(inner, "names"):
            classes[name] = inner.names
        if hasattr(inner, "decode_example"):  # an image is wanted as it is stored; other media are not wanted at all
            dataset = dataset.cast_column(name, _undecoded(feature)) if name == image_column else dataset.remove_columns(name)
    path = Path(source)
    options = {
        "image_column": image_column,
        "caption_column": caption_column,
        "classes": classes,
        "base": path.parent if path.is_file() else path,
    }
    count = dataset.num_shards

    def read(number: int) -> Iterator[TrainingImage | Skipped]:
        rows = dataset.shard(count, number) if count > 1 else dataset
        return read_dataset(rows, **options, prefix=f"{number:05d}-" if count > 1 else "")

    return [Part(fingerprint([made_of, split, number, count]), partial(read, number)) for number in range(count)]


def _open(source: str, split: str) -> tuple[IterableDataset, Any]:
    """The dataset, streamed, and a value that changes with its files."""
    from datasets import DatasetDict, load_dataset_builder, load_from_disk

    path = Path(source)
    local = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    made_of: Any = [(str(each), state_of(each)) for each in local if each.is_file()]
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = load_from_disk(source)
            if isinstance(saved, DatasetDict):
                if split not in saved:
                    raise InputError(f"{source} has no split {split!r}; it has {', '.join(saved)}.")
                saved = saved[split]
            return saved.to_iterable_dataset(num_shards=max(1, len(saved) // ROWS_PER_PART)), made_of
        if path.is_file() and path.suffix.lower() in KINDS:
            kind = KINDS[path.suffix.lower()]
            more = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
            return load_dataset_builder(kind, data_files=source, **more).as_streaming_dataset(split="train"), made_of
        builder = load_dataset_builder(source)
        if not local:
            made_of = [source, {str(name): files.origin_metadata for name, files in (builder.config.data_files or {}).items()}]
        return builder.as_streaming_dataset(split=split), made_of
    except (FileNotFoundError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"{source!r} cannot be opened as a dataset with a split {split!r} ({reason}).") from error


def _undecoded(feature: Any) -> Any:
    """The feature of an image column, or of a column of lists of images, without decoding."""
    from datasets import Image, List

    return Image(decode=False) if isinstance(feature, Image) else List(Image(decode=False))


def _column(source: str, columns: list[str], wanted: str, others: tuple[str, ...], option: str) -> str:
    """The column that is wanted, or the first of `others` if the default is wanted and there is none."""
    if wanted in columns:
        return wanted
    found = next((name for name in others if name in columns), None) if wanted in {"image", "caption"} else None
    if found is None:
        raise InputError(f"{source} has no column {wanted!r}; it has {columns}. Pass {option}.")
    return found


def read_dataset(
    rows: Iterable[dict[str, Any]],
    *,
    image_column: str,
    caption_column: str,
    prefix: str = "",
    classes: Mapping[str, list[str]] | None = None,
    base: Path = Path(),
) -> Iterator[TrainingImage | Skipped]:
    """Read rows of a `datasets` dataset whose images are not decoded.

    The image id is the row's `image_id` if it has one, else `prefix` and its position, zero-padded.

    Args:
        rows: the rows.
        image_column: see `image_of`.
        caption_column: texts, numbers, or lists of them.
        prefix: of the ids.
        classes: names of the classes in columns that hold class numbers.
        base: folder that file names start from.

    Raises:
        InputError: a row lacks one of the two columns.
    """
    for position, row in enumerate(rows):
        missing = {image_column, caption_column} - set(row)
        if missing:
            raise InputError(f"the dataset has no column {sorted(missing)}; it has {sorted(row)}. Name the right ones.")
        named = row | {name: _named(row.get(name), names) for name, names in (classes or {}).items()}
        yield as_training_image(
            image_id=as_text(row.get("image_id")) or f"{prefix}{position:09d}",
            image=image_of(row[image_column], base),
            captions=as_captions(named[caption_column]),
            metadata={name: value for name, value in named.items() if name not in {image_column, caption_column}},
        )


def _named(value: Any, names: list[str]) -> Any:
    """Class numbers as names; -1 means that there is no class."""
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None if value == -1 else value


def image_of(value: Any, base: Path) -> bytes:
    """The image file in a cell of an image column; empty if it holds none or names a file that does not exist.

    Args:
        value: bytes, a file name, a place in a Hub repository or archive, base64 text, {'bytes': ..., 'path': ...}, or a
            list of such, of which the first counts.
        base: folder that file names start from. A path that exists nowhere is looked for by its last parts, too, since data
            sets are moved together with their tables.
    """
    if isinstance(value, list | tuple):
        return image_of(value[0], base) if value else b""
    if isinstance(value, Mapping):
        return image_of(value.get("bytes") or value.get("path"), base)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if not isinstance(value, str) or not value:
        return b""
    if "://" in value and not value.startswith("http"):
        from datasets.utils.file_utils import xopen

        try:
            with xopen(value, "rb") as file:
                return bytes(file.read())
        except FileNotFoundError:
            return b""
    parts = Path(value.replace("\\", "/")).parts
    places = [base / value, Path(value), *(base.joinpath(*parts[start:]) for start in range(len(parts)))]
    found = next((path for path in places if _is_file(path)), None)
    return read_bytes(found) if found else _from_base64(value)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a name: base64
        return False


def _from_base64(text: str) -> bytes:
    import base64

    try:
        return base64.b64decode(text.partition("base64,")[2] or text, validate=True)
    except ValueError:
        return b""
