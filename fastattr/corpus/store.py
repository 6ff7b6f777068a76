"""Corpus: the training images and captions of a generator, with their creators and licences.

Reads an image folder, a `datasets` dataset, COCO, webdataset shards (fastattr/corpus/sources.py), or the emoji packages
(fastattr/corpus/emoji.py); writes corpus/data-*.parquet (loadable by `datasets`), corpus/looks.parquet (what near-copies
are found by), corpus/skipped.parquet and corpus/manifest.json. The source is read in parts that are split over the
processes and kept until all are there, so a killed run resumes; one part's images at most are in memory.
Images that cannot be read, images without a caption and copies are listed in skipped.parquet with the reason.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from fastattr.core.errors import ArtifactNotFoundError, InputError
from fastattr.core.files import (
    MANIFEST,
    atomic_path,
    fingerprint,
    finished,
    open_stage,
    read_json,
    remove,
    temporary_folder,
    write_manifest,
)
from fastattr.corpus.near_copies import Looks, look_of, looks_of, originals

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
ROWS_PER_SHARD = 50_000
ROWS_AT_ONCE = 1000
"""Images that are held in memory at once while a part is written, and rows of a parquet row group."""
TEXT_COLUMNS = ("creator", "license", "source", "url", "group", "subgroup", "family", "nsfw", "similarity")
KINDS = ("emoji", "folder", "dataset", "coco", "webdataset", "urls")


@dataclass(frozen=True, kw_only=True)
class TrainingImage:
    """One image of the corpus with its captions and provenance."""

    image_id: str
    """Stable name, unique in the corpus."""
    image: bytes
    """An encoded image file (PNG, JPEG, WebP, ...)."""
    captions: list[str]
    """At least one; the first is the main caption."""
    creator: str = ""
    license: str = ""
    source: str = ""
    """The set or site it comes from."""
    url: str = ""
    group: str = ""
    """Coarse subject class, where the corpus has one."""
    subgroup: str = ""
    """Fine subject class."""
    family: str = ""
    """Shared by near-duplicates (skin tones of one design, crops of one photo)."""
    nsfw: str = ""
    """LAION's word for it: UNLIKELY, UNSURE, NSFW, or empty."""
    similarity: str = ""
    """LAION's cosine of image and caption, as it was given."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """Something found that did not become a training image."""

    name: str
    reason: str
    url: str = ""


@dataclass(frozen=True)
class Part:
    """A piece of a source that is read on its own, by one process."""

    name: str
    """What it is of; another name is another part, so it holds sizes and times of files, too."""
    read: partial[Iterator[TrainingImage | Skipped]]


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


def check_image(data: bytes) -> str:
    """Why these bytes are no usable image, or '' if they are."""
    if not data:
        return "not a readable image (no bytes: the file is missing, empty or may not be read)"
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except UnidentifiedImageError:  # its text holds a memory address, and the report must be the same every time
        return "not a readable image (unknown format)"
    except Exception as error:  # Pillow raises many types on damaged files; each means the same to us
        return f"not a readable image ({type(error).__name__}: {error})"
    return ""


def load_rgb(data: bytes | Path) -> Image.Image:
    """Decode an image file as RGB; transparency is laid on white, EXIF rotation applied."""
    from PIL import ImageOps

    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB, transparency laid on white."""
    if image.mode in {"I;16", "I;16B", "I"}:
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


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
        captions = _as_captions(row.get("captions") or row.get("caption") or row.get("text"))
        if not captions and sidecar.exists():
            captions = _as_captions(sidecar.read_text(encoding="utf-8", errors="replace").splitlines())
        stem = path.relative_to(folder).with_suffix("").as_posix()
        yield as_training_image(
            image_id=stem if ids[stem] == 1 else name, image=read_bytes(path), captions=captions, metadata=row
        )


def _stamp(path: Path) -> tuple[str, int, int]:
    """Identifies a file as it is now, without reading it."""
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns


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
            image_id=_as_text(row.get("image_id")) or f"{prefix}{position:09d}",
            image=value.get("bytes") or (read_bytes(Path(value["path"])) if value.get("path") else b""),
            captions=_as_captions(row[caption_column]),
            metadata=row,
        )


def read_bytes(path: Path) -> bytes:
    """The file's bytes; none if it cannot be read, which `check_image` then reports."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _as_text(value: Any) -> str:
    """A metadata value as text; '' only for a missing one, as 0 may be a class or an id."""
    return "" if value is None else str(value)


def _as_captions(value: Any) -> list[str]:
    """The non-empty captions in a string or a list of strings."""
    values = [value] if isinstance(value, str) else list(value or [])
    return [text.strip() for text in values if isinstance(text, str) and text.strip()]


def as_training_image(*, image_id: str, image: bytes, captions: list[str], metadata: dict[str, Any]) -> TrainingImage | Skipped:
    """A training image, or why there is none; of the metadata, what `TEXT_COLUMNS` names is kept."""
    problem = check_image(image) if captions else "no caption"
    if problem:
        return Skipped(name=image_id, reason=problem, url=_as_text(metadata.get("url")))
    text = {column: _as_text(metadata.get(column)) for column in TEXT_COLUMNS}
    return TrainingImage(image_id=image_id, image=image, captions=captions, **text)


def corpus_schema() -> pa.Schema:
    """Arrow schema of the corpus, with the metadata by which `datasets` shows the images."""
    from datasets import Features, Image as ImageFeature, List, Value

    text = {column: Value("string") for column in TEXT_COLUMNS}
    features = Features(
        {
            "image_id": Value("string"),
            "image": ImageFeature(),
            "captions": List(Value("string")),
            **text,
            "sha256": Value("string"),
        }
    )
    schema: pa.Schema = features.arrow_schema
    return schema


def write_part(images: Iterable[TrainingImage | Skipped], path: Path, *, description: str | None = None) -> None:
    """Write one part of a corpus: `path`, a parquet file with a look beside each image, and PATH.skipped.

    Args:
        images: training images and what was skipped, in the order to keep.
        path: the file; it is there once the part is complete.
        description: label of a progress bar; None shows none.
    """
    schema = corpus_schema().append(pa.field("look", pa.binary()))
    skipped: list[Skipped] = []
    rows: list[dict[str, Any]] = []
    with atomic_path(path) as temporary:
        with pq.ParquetWriter(temporary, schema) as writer:

            def flush() -> None:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows.clear()

            for image in tqdm(images, desc=description, unit="image", disable=description is None):
                if isinstance(image, Skipped):
                    skipped.append(image)
                    continue
                rows.append(_row(image))
                if len(rows) >= ROWS_AT_ONCE:
                    flush()
            flush()
        with atomic_path(_skipped_of(path)) as report:
            _write_skipped(skipped, report)


def _row(image: TrainingImage) -> dict[str, Any]:
    return {
        "image_id": image.image_id,
        "image": {"bytes": image.image, "path": None},
        "captions": image.captions,
        **{column: getattr(image, column) for column in TEXT_COLUMNS},
        "sha256": hashlib.sha256(image.image).hexdigest(),
        "look": look_of(load_rgb(image.image)),
    }


def _skipped_of(part: Path) -> Path:
    return part.with_suffix(".skipped")


def _write_skipped(skipped: Sequence[Skipped], path: Path) -> None:
    columns = {name: [getattr(item, name) for item in skipped] for name in ("name", "reason", "url")}
    pq.write_table(pa.table(columns, schema=pa.schema([(name, pa.string()) for name in columns])), path)


def _read_skipped(path: Path) -> list[Skipped]:
    return [Skipped(**row) for row in pq.read_table(path).to_pylist()]


def join_parts(
    parts: Sequence[Path], folder: Path, config: CorpusConfig, *, duplicates: str = "keep", more: Sequence[Skipped] = ()
) -> dict[str, Any]:
    """Write a corpus folder from its parts.

    Args:
        parts: files of `write_part`, in the order to keep.
        folder: where to write; an unfinished earlier try is replaced.
        config: kept in the manifest.
        duplicates: 'skip', 'family' or 'keep', see `CorpusConfig`.
        more: what else was skipped.

    Returns:
        The manifest: 'images', 'skipped' (count by reason), 'near_copies' (how many were kept as family),
        'corpus_fingerprint' (over ids, image bytes, captions).

    Raises:
        InputError: two images share an id, or there is no usable image at all.
    """
    columns = ["image_id", "sha256", "family", "captions", "look"]
    table = pa.concat_tables([pq.read_table(path, columns=columns) for path in parts])
    ids: list[str] = table["image_id"].to_pylist()
    twice = next((image_id for image_id, count in Counter(ids).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"image id {twice!r} occurs twice; ids must be unique in a corpus.")
    skipped = [*(item for path in parts for item in _read_skipped(_skipped_of(path))), *more]
    if not ids:
        reasons = Counter(item.reason.split(" (")[0] for item in skipped)
        raise InputError(f"no usable training image was found; skipped: {dict(reasons) or 'nothing'}.")
    digests: list[str] = table["sha256"].to_pylist()
    first = np.arange(len(ids)) if duplicates == "keep" else _firsts(digests, looks_of(table["look"].to_pylist()))
    copies = np.flatnonzero(first != np.arange(len(ids)))
    kept = np.ones(len(ids), dtype=bool)
    families: list[str] = table["family"].to_pylist()
    if duplicates == "skip":
        kept[copies] = False
        for row in copies:
            kind = "same bytes as" if digests[row] == digests[first[row]] else "near-copy of"
            skipped.append(Skipped(name=ids[row], reason=f"{kind} another image ({ids[first[row]]})"))
    else:
        for row in copies:
            families[first[row]] = families[first[row]] or ids[first[row]]
            families[row] = families[first[row]]
    captions = table["captions"].to_pylist()
    identity = [(ids[row], digests[row], captions[row]) for row in np.flatnonzero(kept)]
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        _write_shards(parts, temporary, kept, families)
        looks = table.select(["image_id", "look"]).filter(pa.array(kept))
        pq.write_table(looks, temporary / "looks.parquet")
        _write_skipped(skipped, temporary / "skipped.parquet")
        manifest = write_manifest(
            temporary,
            stage="corpus",
            config=config,
            inputs={},
            images=int(kept.sum()),
            skipped=dict(Counter(item.reason.split(" (")[0] for item in skipped)),
            near_copies=len(copies) if duplicates == "family" else 0,
            corpus_fingerprint=fingerprint(identity),
        )
    if skipped:
        logger.warning("%d of %d skipped; see %s", len(skipped), len(skipped) + kept.sum(), folder / "skipped.parquet")
    return manifest


def _firsts(digests: Sequence[str], looks: Looks) -> np.ndarray:
    """(N,) row of the first image with the same bytes, or else of the first that it is a near-copy of, or its own."""
    earliest: dict[str, int] = {}
    first = np.array([earliest.setdefault(digest, row) for row, digest in enumerate(digests)], dtype=np.int64)
    distinct = np.array(sorted(earliest.values()), dtype=np.int64)
    near = distinct[originals(looks[distinct])]
    first[distinct] = near
    copies = np.setdiff1d(np.arange(len(digests)), distinct)
    first[copies] = first[first[copies]]
    return first


def _write_shards(parts: Sequence[Path], folder: Path, kept: np.ndarray, families: Sequence[str]) -> None:
    """Copy the kept rows of the parts into data-*.parquet of `ROWS_PER_SHARD` rows, with their families."""
    schema = corpus_schema()
    shard, rows, start = 0, 0, 0
    writer: pq.ParquetWriter | None = None
    for path in parts:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=ROWS_AT_ONCE):
            table = pa.Table.from_batches([batch]).drop_columns(["look"])
            own = slice(start, start + len(table))
            start += len(table)
            column = pa.array(families[own], pa.string())
            table = table.set_column(schema.get_field_index("family"), "family", column).filter(pa.array(kept[own]))
            while len(table):
                writer = writer or pq.ParquetWriter(folder / f"data-{shard:05d}.parquet", schema)
                piece = table.slice(0, ROWS_PER_SHARD - rows)
                writer.write_table(piece.cast(schema))
                table, rows = table.slice(len(piece)), rows + len(piece)
                if rows == ROWS_PER_SHARD:
                    writer.close()
                    writer, shard, rows = None, shard + 1, 0
    if writer:
        writer.close()


def write_corpus(images: Iterable[TrainingImage | Skipped], folder: Path, config: CorpusConfig) -> dict[str, Any]:
    """Write a corpus folder of these images, copies included; see `join_parts`.

    Args:
        images: training images and what was skipped, in the order to keep.
        folder: where to write; an unfinished earlier try is replaced.
        config: kept in the manifest.
    """
    with temporary_folder(folder.parent) as scratch:
        write_part(images, scratch / "part.parquet", description="corpus")
        return join_parts([scratch / "part.parquet"], folder, config)


class Corpus:
    """A written corpus, opened: ids, captions and metadata in memory, images decoded when asked for."""

    def __init__(self, folder: str | Path) -> None:
        """Open `folder`.

        Raises:
            ArtifactNotFoundError: it is not a finished corpus.
        """
        self.folder = Path(folder)
        self.manifest = open_stage(self.folder, "corpus")
        shards = sorted(self.folder.glob("data-*.parquet"))
        self.table = pa.concat_tables([pq.read_table(path, memory_map=True) for path in shards])
        self.image_ids: list[str] = self.table["image_id"].to_pylist()
        self.captions: list[list[str]] = self.table["captions"].to_pylist()
        self._row = {image_id: row for row, image_id in enumerate(self.image_ids)}

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def fingerprint(self) -> str:
        """Identifies ids, image bytes and captions."""
        return str(self.manifest["corpus_fingerprint"])

    def rows(self, image_ids: Sequence[str]) -> np.ndarray:
        """(N,) row numbers of these ids.

        Raises:
            InputError: an id is not in the corpus.
        """
        unknown = [image_id for image_id in image_ids if image_id not in self._row]
        if unknown:
            raise InputError(f"{len(unknown)} image ids are not in the corpus {self.folder}, e.g. {unknown[:3]}.")
        return np.array([self._row[image_id] for image_id in image_ids], dtype=np.int64)

    def column(self, name: str) -> list[str]:
        """One metadata column, in row order; texts that a corpus of an earlier version does not have are empty."""
        if name in TEXT_COLUMNS and name not in self.table.column_names:
            return [""] * len(self)
        values: list[str] = self.table[name].to_pylist()
        return values

    def image_bytes(self, row: int) -> bytes:
        """The encoded image file of one row."""
        data: bytes = pc.struct_field(self.table["image"].slice(row, 1), "bytes")[0].as_py()
        return data

    def image(self, row: int) -> Image.Image:
        """The decoded RGB image of one row."""
        return load_rgb(self.image_bytes(row))

    def training_images(self, rows: Iterable[int]) -> Iterator[TrainingImage]:
        """The training images of these rows, in their order: what `write_corpus` takes to write a part of this corpus."""
        for row in rows:
            values = self.table.slice(row, 1).drop_columns(["image", "sha256"]).to_pylist()[0]
            yield TrainingImage(image=self.image_bytes(row), **values)

    def looks(self) -> Looks:
        """What the images look like, in row order, for `near_copies`; computed if the corpus was written without."""
        if (self.folder / "looks.parquet").exists():
            return looks_of(pq.read_table(self.folder / "looks.parquet")["look"].to_pylist())
        return looks_of([look_of(self.image(row)) for row in range(len(self))])

    def catalog(self) -> pa.Table:
        """Everything but the images: what an attributor shows about each of them."""
        return self.table.drop_columns(["image"])


def run(config: CorpusConfig, folder: Path) -> dict[str, Any]:
    """Build the corpus that `config` describes into `folder`, on all processes; returns its manifest.

    A finished folder is kept. The parts lie beside it until all are there: another run does what is missing.
    """
    from accelerate import Accelerator

    from fastattr.core.processes import split_between
    from fastattr.corpus.sources import open_source

    if not finished(folder, stage="corpus", config=config, inputs={}):
        accelerator = Accelerator()
        source = open_source(config)
        scratch = folder.with_name(f"{folder.name}-parts-{fingerprint([vars(config), [part.name for part in source.parts]])}")
        files = [scratch / f"{number:06d}.parquet" for number in range(len(source.parts))]
        with split_between(accelerator, [number for number, file in enumerate(files) if not file.exists()]) as mine:
            for number in tqdm(mine, desc="corpus", unit="part", disable=not accelerator.is_main_process):
                write_part(source.parts[number].read(), files[number])
        if accelerator.is_main_process:
            duplicates = config.duplicates or ("keep" if config.kind == "emoji" else "skip")
            join_parts(files, folder, config, duplicates=duplicates, more=source.missing(files))
            remove(scratch)
        accelerator.wait_for_everyone()
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    return manifest
