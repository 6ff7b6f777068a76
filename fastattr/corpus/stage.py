"""Corpus stage: read the training images of a generator, with their creators and licences, into run_dir/corpus.

The source is a list of parts, each of which one process reads on its own and streams; ids depend on the source's own names
(keys, file names, row numbers). Parts are kept until all are there, so a killed run resumes.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator
from tqdm import tqdm

from fastattr.core.errors import ArtifactMismatchError, InputError
from fastattr.core.files import atomic_path
from fastattr.core.processes import split_between
from fastattr.core.stages import fingerprint, finished, make, open_stage, require_same
from fastattr.corpus.emoji import read_emoji
from fastattr.corpus.folders import as_id, folder_parts, list_folder, walk
from fastattr.corpus.records import Part, Skipped, state_of
from fastattr.corpus.reservations import MODES, OptOuts, count, honoured, site_files
from fastattr.corpus.shards import coco_parts, files_in, not_fetched, rows_by_url, shard_parts
from fastattr.corpus.store import join_parts, write_part
from fastattr.corpus.tables import dataset_parts

logger = logging.getLogger(__name__)
SOURCE = "source.parquet"  # in a corpus folder: the local files that it was read from
ENDS = 32_768  # bytes at the start and at the end of a file by which it is known again if its date has changed
KINDS = ("emoji", "folder", "dataset", "coco", "webdataset", "urls")


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Where the training images come from."""

    kind: str = "emoji"
    """'emoji' (pinned npm packages), 'folder' (images with captions), 'dataset' (a `datasets` name or file), 'coco'
    (annotations/captions_SPLIT.json and SPLIT/ in a folder), 'webdataset' (tar shards, as img2dataset writes them) or
    'urls' (parquet files of URLs and captions, whose images are in the tar shards of `shards`)."""
    path: str = ""  # folder, dataset id or data file; empty for 'emoji'
    split: str = "train"  # split of the dataset; of COCO 'train2017', say
    shards: str = ""  # of 'urls': the folder of tar shards
    duplicates: str = ""
    """What becomes of an image that is a copy or near-copy of an earlier one: 'skip' leaves it out and lists it, but keeps a
    near-copy that has other captions and visibly differs; 'family' keeps it with the same `family`; 'keep' does not look.
    '' is 'keep' for emoji, whose variants are no copies, else 'skip'. Near-copy: fastattr/corpus/near_copies.py."""
    image_column: str = "image"
    caption_column: str = "caption"
    creator_from_folder: bool = False  # of 'folder': the first folder below `path` names the creator of images that have none
    resolution: int = 64  # side in pixels at which SVG sources are drawn; other sources keep their own size
    variants: bool = False
    """Of 'emoji': all 15,351 images, skin tones, genders and flags included; otherwise one per subject and set."""
    reservations: str = "exclude"  # what becomes of an image whose creator says no: see `reservations.honoured`
    opt_out: str = ""  # file of an opt-out list: see `OptOuts`

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"corpus kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind != "emoji" and not self.path:
            raise InputError(f"corpus kind {self.kind!r} needs a path")
        if (self.kind == "urls") != bool(self.shards):
            raise InputError(f"corpus kind 'urls', and no other, needs `shards`; got {self.kind!r} with {self.shards!r}")
        if self.duplicates not in {"", "skip", "family", "keep"}:
            raise InputError(f"duplicates must be 'skip', 'family' or 'keep', got {self.duplicates!r}")
        if self.reservations not in MODES:
            raise InputError(f"reservations must be one of {', '.join(MODES)}, got {self.reservations!r}")
        if self.resolution < 8:
            raise InputError(f"resolution must be at least 8 pixels, got {self.resolution}")


@dataclass(frozen=True)
class Source:
    """What a corpus is read from."""

    parts: list[Part]
    missing: Callable[[Sequence[Path]], list[Skipped]] = lambda parts: []  # what the source promised and no part brought


def open_source(config: CorpusConfig, leave_out: Collection[Path] = ()) -> Source:
    """The source that a config names, without the folders in `leave_out`; errors as of its reader."""
    path = Path(config.path)
    if config.kind == "emoji":
        return Source([Part("emoji", partial(read_emoji, config.resolution, variants=config.variants))])
    if config.kind == "folder":
        return Source(folder_parts(list_folder(path, leave_out), creator_from_folder=config.creator_from_folder))
    if config.kind == "coco":
        return Source(coco_parts(path, config.split))
    if config.kind == "webdataset":
        return Source(shard_parts(files_in(path, ".tar")))
    if config.kind == "urls":
        rows = rows_by_url(path)
        made_of = fingerprint([state_of(table) for table in files_in(path, ".parquet")])
        return Source(shard_parts(files_in(Path(config.shards), ".tar"), rows, made_of), partial(not_fetched, rows))
    columns = {"image_column": config.image_column, "caption_column": config.caption_column}
    return Source(dataset_parts(config.path, config.split, **columns))


def files_of_source(config: CorpusConfig, leave_out: Collection[Path] = ()) -> dict[str, Path]:
    """The local files that a source is made of, by name; none of the emoji packages and of the Hub's datasets."""
    if config.kind == "emoji":
        return {}
    path = Path(config.path)
    roots = [path / "annotations" / f"captions_{config.split}.json", path / config.split] if config.kind == "coco" else [path]
    roots += [Path(config.shards)] if config.shards else []
    roots += site_files(path.resolve().parent) if path.exists() else []
    files = [file for root in roots for file in walk(root, leave_out=leave_out)]
    return {as_id(os.path.relpath(file, path)): file for file in files}


def run(config: CorpusConfig, folder: Path) -> dict[str, Any]:
    """Build the corpus that `config` describes into `folder`, on all processes; returns its manifest. The parts lie beside it
    until all are there: another run does what is missing, and what was read from files that have changed since. Raises
    ArtifactMismatchError if `folder` is finished, and the source's files have changed since.
    """
    accelerator = Accelerator()
    scratch = folder.with_name(f"{folder.name}-parts")
    source_dir, run_dir = Path(config.path or ".").resolve(), folder.parent.resolve()
    leave_out = [run_dir] if source_dir in run_dir.parents else [folder, scratch]
    opt_outs = OptOuts(Path(config.opt_out)) if config.opt_out else None
    opted = opt_outs.fingerprint if opt_outs else ""
    if finished(folder, stage="corpus", config=config, inputs={}):
        _check_unchanged(config, folder, leave_out)
        found = open_stage(folder, "corpus").get("opt_out_fingerprint", "")
        require_same(f"the opt-out list of {folder}", found, opted, "Use another run folder, or delete that folder.")

    def work() -> dict[str, Any]:
        source = open_source(config, leave_out)
        snapshot = _snapshot(files_of_source(config, leave_out)) if accelerator.is_main_process else None
        parts = scratch / fingerprint([vars(config), opted])
        files = [parts / f"{part.name}.parquet" for part in source.parts]
        with split_between(accelerator, [number for number, file in enumerate(files) if not file.exists()]) as mine:
            for number in tqdm(mine, desc="corpus", unit="part", disable=not accelerator.is_main_process):
                write_part(honoured(source.parts[number].read(), config.reservations, opt_outs), files[number])
        if not accelerator.is_main_process:
            return {}
        duplicates = config.duplicates or ("keep" if config.kind == "emoji" else "skip")
        facts = join_parts(files, folder, duplicates=duplicates, more=source.missing(files))
        with atomic_path(folder / SOURCE) as temporary:
            pq.write_table(snapshot, temporary)
        return facts | {"reservations": count(folder, facts["skipped"]), "opt_out_fingerprint": opted}

    return make(folder, work, stage="corpus", config=config, inputs={}, accelerator=accelerator, temporary=[scratch])


def _snapshot(files: Mapping[str, Path]) -> pa.Table:
    """(name, size, mtime_ns, digest) of files."""
    states = [state_of(path) or (0, 0) for path in files.values()]
    columns = {"name": list(files), "size": [size for size, _ in states], "mtime_ns": [time for _, time in states]}
    return pa.table(columns | {"digest": pa.array([_digest(path) for path in files.values()], pa.string())})


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(ENDS)
        file.seek(max(0, path.stat().st_size - ENDS))
        return hashlib.sha256(start + file.read()).hexdigest()


def _check_unchanged(config: CorpusConfig, folder: Path, leave_out: Collection[Path]) -> None:
    """Raise ArtifactMismatchError if files of the source came, went, or have other contents than the corpus was read from."""
    before = {row["name"]: row for row in pq.read_table(folder / SOURCE).to_pylist()} if (folder / SOURCE).exists() else {}
    now = files_of_source(config, leave_out) if before else {}
    if before and not now:
        logger.warning("%s, which %s was read from, is gone; the corpus stays as it was read", config.path, folder)
        return
    changed = [
        name
        for name in before.keys() & now.keys()
        if state_of(now[name]) != (before[name]["size"], before[name]["mtime_ns"])
        and (now[name].stat().st_size != before[name]["size"] or _digest(now[name]) != before[name]["digest"])
    ]
    found = {"new": now.keys() - before.keys(), "gone": before.keys() - now.keys(), "changed": changed}
    told = [f"{len(names)} {what} ({', '.join(sorted(names)[:3])})" for what, names in found.items() if names]
    if told:
        wrong = f"{config.path} is not what {folder} was read from: {'; '.join(told)}"
        fix = "Use another run folder, or delete that folder and those of the later stages to read it again."
        raise ArtifactMismatchError(f"{wrong}. {fix}")
