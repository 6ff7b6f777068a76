"""Tables: read a Hub dataset or a local data file, streamed by `datasets`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fastattr.core.errors import InputError
from fastattr.corpus.images import read_bytes
from fastattr.corpus.records import Part, Skipped, TrainingImage, as_captions, as_text, as_training_image


def read_dataset(
    rows: Iterable[dict[str, Any]], *, image_column: str, caption_column: str, prefix: str = ""
) -> Iterator[TrainingImage | Skipped]:
    """Read rows of a `datasets` dataset whose image column was cast to `Image(decode=False)`.

    The image id is the row's `image_id` if it has one, else `prefix` and its position, zero-padded.

    Raises:
        InputError: a row lacks one of the two columns.
    """
    for position, row in enumerate(rows):
        missing = {image_column, caption_column} - set(row)
        if missing:
            raise InputError(f"the dataset has no column {sorted(missing)}; it has {sorted(row)}. Name the right ones.")
        value = row[image_column] or {}
        yield as_training_image(
            image_id=as_text(row.get("image_id")) or f"{prefix}{position:09d}",
            image=value.get("bytes") or (read_bytes(Path(value["path"])) if value.get("path") else b""),
            captions=as_captions(row[caption_column]),
            metadata=row,
        )


def dataset_parts(source: str, split: str, *, image_column: str, caption_column: str) -> list[Part]:
    """A Hub dataset or a local data file, streamed by `datasets`; its files are the parts.

    Raises:
        InputError: it lacks one of the two columns.
    """
    from datasets import Image as ImageFeature, load_dataset

    path = Path(source)
    if path.suffix in {".parquet", ".json", ".jsonl", ".csv"}:
        kind = {".parquet": "parquet", ".csv": "csv"}.get(path.suffix, "json")
        dataset = load_dataset(kind, data_files=str(path), split="train", streaming=True)
    else:
        dataset = load_dataset(source, split=split, streaming=True)
    columns = dataset.column_names or []
    for column, option in ((image_column, "--image-column"), (caption_column, "--caption-column")):
        if column not in columns:
            raise InputError(f"{source} has no column {column!r}; it has {columns}. Pass {option}.")
    dataset = dataset.cast_column(image_column, ImageFeature(decode=False))
    count = dataset.num_shards
    names = {"image_column": image_column, "caption_column": caption_column}

    def read(number: int) -> Iterator[TrainingImage | Skipped]:
        rows = dataset.shard(count, number) if count > 1 else dataset
        return read_dataset(rows, **names, prefix=f"{number:05d}-" if count > 1 else "")

    return [Part(f"{source} {split} {number} of {count}", partial(read, number)) for number in range(count)]
