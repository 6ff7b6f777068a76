"""Corpus: the training images and captions of a generator, with their creators and licences.

Reads an image folder, a `datasets` dataset, or the emoji packages (fastattr/corpus_emoji.py); writes
corpus/data-*.parquet (loadable by `datasets`), corpus/skipped.parquet and corpus/manifest.json.
Images that cannot be read and images without a caption are listed in skipped.parquet with the reason.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from fastattr.artifacts import MANIFEST, atomic_path, fingerprint, open_stage, write_manifest
from fastattr.errors import ArtifactNotFoundError, InputError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
ROWS_PER_SHARD = 50_000
TEXT_COLUMNS = ("creator", "license", "source", "url", "group", "subgroup", "family")


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


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """Something found that did not become a training image."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Where the training images come from."""

    kind: str = "emoji"
    """'emoji' (pinned npm packages), 'folder' (images with captions) or 'dataset' (a `datasets` name or file)."""
    path: str = ""
    """Folder, dataset id or data file; empty for 'emoji'."""
    split: str = "train"
    """Split of the dataset."""
    image_column: str = "image"
    caption_column: str = "caption"
    resolution: int = 64
    """Side in pixels at which SVG sources are drawn; other sources keep their own size."""

    def __post_init__(self) -> None:
        if self.kind not in {"emoji", "folder", "dataset"}:
            raise InputError(f"corpus kind must be 'emoji', 'folder' or 'dataset', got {self.kind!r}")
        if self.kind != "emoji" and not self.path:
            raise InputError(f"corpus kind {self.kind!r} needs a path")
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
    import json

    if not folder.is_dir():
        raise ArtifactNotFoundError(f"{folder} is not a folder. Give the folder that holds the images.")
    described: dict[str, dict[str, Any]] = {}
    if (folder / "metadata.jsonl").exists():
        try:
            lines = (folder / "metadata.jsonl").read_text(encoding="utf-8-sig").split("\n")  # captions may hold U+2028
        except UnicodeDecodeError as error:
            raise InputError(f"{folder / 'metadata.jsonl'} is not UTF-8 ({error}); save it as UTF-8.") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                described[str(row["file_name"])] = row
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                yield Skipped(name=f"metadata.jsonl:{number}", reason=f"bad line ({type(error).__name__}: {error})")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir())
    ids = Counter(path.relative_to(folder).with_suffix("").as_posix() for path in files)
    for path in files:
        name = path.relative_to(folder).as_posix()
        row = described.pop(name, {})
        sidecar = path.with_suffix(".txt")
        captions = _as_captions(row.get("captions") or row.get("caption") or row.get("text"))
        if not captions and sidecar.exists():
            captions = _as_captions(sidecar.read_text(encoding="utf-8", errors="replace").splitlines())
        stem = path.relative_to(folder).with_suffix("").as_posix()
        yield _training_image(
            image_id=stem if ids[stem] == 1 else name, image=_read_bytes(path), captions=captions, metadata=row
        )
    for name in described:
        yield Skipped(name=name, reason="named in metadata.jsonl, but there is no such image")


def read_dataset(
    rows: Iterable[dict[str, Any]], *, image_column: str, caption_column: str
) -> Iterator[TrainingImage | Skipped]:
    """Read rows of a `datasets` dataset whose image column was cast to `Image(decode=False)`.

    The image id is the row's `image_id` if it has one, else its position, zero-padded.

    Raises:
        InputError: a row lacks one of the two columns.
    """
    for position, row in enumerate(rows):
        missing = {image_column, caption_column} - set(row)
        if missing:
            raise InputError(f"the dataset has no column {sorted(missing)}; it has {sorted(row)}. Name the right ones.")
        value = row[image_column] or {}
        yield _training_image(
            image_id=_as_text(row.get("image_id")) or f"{position:09d}",
            image=value.get("bytes") or (_read_bytes(Path(value["path"])) if value.get("path") else b""),
            captions=_as_captions(row[caption_column]),
            metadata=row,
        )


def _read_bytes(path: Path) -> bytes:
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


def _training_image(*, image_id: str, image: bytes, captions: list[str], metadata: dict[str, Any]) -> TrainingImage | Skipped:
    """A training image, or why there is none."""
    if not captions:
        return Skipped(name=image_id, reason="no caption")
    problem = check_image(image)
    if problem:
        return Skipped(name=image_id, reason=problem)
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


@dataclass
class _CorpusWriter:
    """Collects rows into parquet shards."""

    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    shards: int = 0

    def add(self, image: TrainingImage) -> tuple[str, str, list[str]]:
        digest = hashlib.sha256(image.image).hexdigest()
        text = {column: getattr(image, column) for column in TEXT_COLUMNS}
        self.rows.append(
            {
                "image_id": image.image_id,
                "image": {"bytes": image.image, "path": None},
                "captions": image.captions,
                **text,
                "sha256": digest,
            }
        )
        if len(self.rows) >= ROWS_PER_SHARD:
            self.flush()
        return image.image_id, digest, image.captions

    def flush(self) -> None:
        if self.rows:
            table = pa.Table.from_pylist(self.rows, schema=corpus_schema())
            with atomic_path(self.folder / f"data-{self.shards:05d}.parquet") as temporary:
                pq.write_table(table, temporary, row_group_size=1000)
            self.shards += 1
            self.rows = []


def write_corpus(images: Iterable[TrainingImage | Skipped], folder: Path, config: CorpusConfig) -> dict[str, Any]:
    """Write a corpus folder.

    Args:
        images: training images and what was skipped, in the order to keep.
        folder: where to write; an unfinished earlier try is replaced.
        config: kept in the manifest.

    Returns:
        The manifest: 'images', 'skipped' (count by reason), 'corpus_fingerprint' (over ids, image bytes, captions).

    Raises:
        InputError: two images share an id, or there is no usable image at all.
    """
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        writer = _CorpusWriter(temporary)
        seen: set[str] = set()
        identity = []
        skipped: list[Skipped] = []
        for image in tqdm(images, desc="corpus", unit="image"):
            if isinstance(image, Skipped):
                skipped.append(image)
                continue
            if image.image_id in seen:
                raise InputError(f"image id {image.image_id!r} occurs twice; ids must be unique in a corpus.")
            seen.add(image.image_id)
            identity.append(writer.add(image))
        writer.flush()
        if not seen:
            reasons = Counter(item.reason.split(" (")[0] for item in skipped)
            raise InputError(f"no usable training image was found; skipped: {dict(reasons) or 'nothing'}.")
        reports = {"name": [item.name for item in skipped], "reason": [item.reason for item in skipped]}
        schema = pa.schema([("name", pa.string()), ("reason", pa.string())])
        pq.write_table(pa.table(reports, schema=schema), temporary / "skipped.parquet")
        manifest = write_manifest(
            temporary,
            stage="corpus",
            config=config,
            inputs={},
            images=len(seen),
            skipped=dict(Counter(item.reason.split(" (")[0] for item in skipped)),
            corpus_fingerprint=fingerprint(identity),
        )
    if skipped:
        logger.warning("%d of %d skipped; see %s", len(skipped), len(skipped) + len(seen), folder / "skipped.parquet")
    return manifest


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
        """One metadata column, in row order."""
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

    def catalog(self) -> pa.Table:
        """Everything but the images: what an attributor shows about each of them."""
        return self.table.drop_columns(["image"])


def run(config: CorpusConfig, folder: Path) -> dict[str, Any]:
    """Build the corpus that `config` describes into `folder`; returns its manifest. A finished folder is kept."""
    from fastattr.artifacts import finished, read_json

    if finished(folder, stage="corpus", config=config, inputs={}):
        manifest: dict[str, Any] = read_json(folder / MANIFEST)
        return manifest
    if config.kind == "emoji":
        from fastattr.corpus_emoji import read_emoji

        return write_corpus(read_emoji(config.resolution), folder, config)
    if config.kind == "folder":
        return write_corpus(read_folder(Path(config.path)), folder, config)
    return write_corpus(_open_dataset(config), folder, config)


def _open_dataset(config: CorpusConfig) -> Iterator[TrainingImage | Skipped]:
    """Stream a Hub dataset or a local data file with `datasets`."""
    from datasets import Image as ImageFeature, load_dataset

    path = Path(config.path)
    if path.suffix in {".parquet", ".json", ".jsonl", ".csv"}:
        kind = {".parquet": "parquet", ".csv": "csv"}.get(path.suffix, "json")
        dataset = load_dataset(kind, data_files=str(path), split="train", streaming=True)
    else:
        dataset = load_dataset(config.path, split=config.split, streaming=True)
    columns = dataset.column_names or []
    if config.image_column not in columns:
        raise InputError(f"{config.path} has no column {config.image_column!r}; it has {columns}. Pass --image-column.")
    rows = dataset.cast_column(config.image_column, ImageFeature(decode=False))
    return read_dataset(rows, image_column=config.image_column, caption_column=config.caption_column)
