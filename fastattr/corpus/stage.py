"""Corpus stage: read the training images of a generator, with their creators and licences, into run_dir/corpus.

Reads an image folder, a `datasets` dataset, COCO, webdataset shards, or the emoji packages. The source is a list of parts,
each of which one process reads on its own and streams; ids depend on the source's own names (keys, file names, row
numbers), never on the order in which processes come to them. Parts are kept until all are there, so a killed run resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastattr.core.errors import InputError
from fastattr.core.stages import fingerprint, make
from fastattr.corpus.folders import folder_parts
from fastattr.corpus.records import Part, Skipped
from fastattr.corpus.shards import coco_parts, files_of, not_fetched, rows_by_url, shard_part
from fastattr.corpus.store import join_parts, write_part
from fastattr.corpus.tables import dataset_parts

KINDS = ("emoji", "folder", "dataset", "coco", "webdataset", "urls")


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Where the training images come from."""

    kind: str = "emoji"
    """'emoji' (pinned npm packages), 'folder' (images with captions), 'dataset' (a `datasets` name or file), 'coco'
    (annotations/captions_SPLIT.json and SPLIT/ in a folder), 'webdataset' (tar shards, as img2dataset writes them) or
    'urls' (parquet files of URLs and captions, whose images are in the tar shards of `shards`)."""
    path: str = ""
    """Folder, dataset id or data file; empty for 'emoji'."""
    split: str = "train"
    """Split of the dataset; of COCO 'train2017', say."""
    shards: str = ""
    """Of 'urls': the folder of tar shards."""
    duplicates: str = ""
    """What becomes of an image that is a copy or near-copy of an earlier one: 'skip' leaves it out and lists it, 'family'
    keeps it with the same `family`, 'keep' does not look. '' is 'keep' for emoji, whose variants are no copies, else
    'skip'. Near-copy: fastattr/corpus/near_copies.py."""
    image_column: str = "image"
    caption_column: str = "caption"
    resolution: int = 64
    """Side in pixels at which SVG sources are drawn; other sources keep their own size."""
    variants: bool = False
    """Of 'emoji': all 15,351 images, skin tones, genders and flags included; otherwise one per subject and set."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"corpus kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind != "emoji" and not self.path:
            raise InputError(f"corpus kind {self.kind!r} needs a path")
        if (self.kind == "urls") != bool(self.shards):
            raise InputError(f"corpus kind 'urls', and no other, needs `shards`; got {self.kind!r} with {self.shards!r}")
        if self.duplicates not in {"", "skip", "family", "keep"}:
            raise InputError(f"duplicates must be 'skip', 'family' or 'keep', got {self.duplicates!r}")
        if self.resolution < 8:
            raise InputError(f"resolution must be at least 8 pixels, got {self.resolution}")


def _nothing(parts: Sequence[Path]) -> list[Skipped]:
    return []


@dataclass(frozen=True)
class Source:
    """What a corpus is read from."""

    parts: list[Part]
    missing: Callable[[Sequence[Path]], list[Skipped]] = _nothing
    """From all written parts, what the source promised and no part brought."""


def open_source(config: CorpusConfig) -> Source:
    """The source that a config names.

    Raises:
        ArtifactNotFoundError: there is no such folder or file.
        InputError: a dataset lacks the columns.
    """
    if config.kind == "emoji":
        from fastattr.corpus.emoji import read_emoji

        return Source([Part("emoji", partial(read_emoji, config.resolution, variants=config.variants))])
    path = Path(config.path)
    if config.kind == "folder":
        return Source(folder_parts(path))
    if config.kind == "coco":
        return Source(coco_parts(path, config.split))
    if config.kind == "webdataset":
        return Source([shard_part(shard, None) for shard in files_of(path, ".tar")])
    if config.kind == "urls":
        rows = rows_by_url(path)
        return Source([shard_part(shard, rows) for shard in files_of(Path(config.shards), ".tar")], partial(not_fetched, rows))
    return Source(
        dataset_parts(config.path, config.split, image_column=config.image_column, caption_column=config.caption_column)
    )


def run(config: CorpusConfig, folder: Path) -> dict[str, Any]:
    """Build the corpus that `config` describes into `folder`, on all processes; returns its manifest.

    A finished folder is kept. The parts lie beside it until all are there: another run does what is missing.
    """
    from accelerate import Accelerator

    from fastattr.core.processes import split_between

    accelerator = Accelerator()
    scratch = folder.with_name(f"{folder.name}-parts")

    def work() -> dict[str, Any]:
        source = open_source(config)
        parts = scratch / fingerprint([vars(config), [part.name for part in source.parts]])
        files = [parts / f"{number:06d}.parquet" for number in range(len(source.parts))]
        with split_between(accelerator, [number for number, file in enumerate(files) if not file.exists()]) as mine:
            for number in tqdm(mine, desc="corpus", unit="part", disable=not accelerator.is_main_process):
                write_part(source.parts[number].read(), files[number])
        if not accelerator.is_main_process:
            return {}
        duplicates = config.duplicates or ("keep" if config.kind == "emoji" else "skip")
        return join_parts(files, folder, duplicates=duplicates, more=source.missing(files))

    return make(folder, work, stage="corpus", config=config, inputs={}, accelerator=accelerator, temporary=[scratch])
