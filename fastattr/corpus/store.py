"""Store: write a corpus folder in parts, and open it; the package's docstring lists its files."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from fastattr.core.errors import InputError
from fastattr.core.files import atomic_path, temporary_folder
from fastattr.core.stages import fingerprint, open_stage, write_manifest
from fastattr.corpus.images import load_rgb
from fastattr.corpus.near_copies import ALIKE, Looks, look_of, looks_of, originals
from fastattr.corpus.records import ROWS_AT_ONCE, TEXT_COLUMNS, Skipped, TrainingImage

logger = logging.getLogger(__name__)

ROWS_PER_SHARD = 50_000
GROUP_BYTES = 4_000_000  # image bytes of a parquet row group, which is what reading one image reads; an image may be larger
GROUPS_KEPT = 16  # row groups that an open corpus holds in memory


def corpus_schema() -> pa.Schema:
    """Arrow schema of the corpus, with the metadata by which `datasets` shows the images."""
    from datasets import Features, Image as ImageFeature, List, Value

    columns = {"image_id": Value("string"), "image": ImageFeature(), "captions": List(Value("string"))}
    return Features(columns | {name: Value("string") for name in (*TEXT_COLUMNS, "sha256")}).arrow_schema


def write_part(images: Iterable[TrainingImage | Skipped], path: Path, *, description: str | None = None) -> None:
    """Write one part of a corpus: PATH.skipped, and once it is complete `path`, parquet with a look beside each image."""
    schema = corpus_schema().append(pa.field("look", pa.binary()))
    skipped: list[Skipped] = []
    columns: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    with atomic_path(path) as temporary:
        with pq.ParquetWriter(temporary, schema) as writer:
            for image in tqdm(images, desc=description, unit="image", disable=description is None):
                if isinstance(image, Skipped):
                    skipped.append(image)
                    continue
                columns |= image.columns
                rows.append(_row(image))
                if len(rows) >= ROWS_AT_ONCE or sum(len(row["image"]["bytes"]) for row in rows) >= GROUP_BYTES:
                    writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                    rows.clear()
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        with atomic_path(path.with_suffix(".skipped")) as report:
            _write_skipped(skipped, report, columns)


def _row(image: TrainingImage) -> dict[str, Any]:
    row = {name: getattr(image, name) for name in ("image_id", "captions", *TEXT_COLUMNS)}
    row |= {"image": {"bytes": image.image, "path": None}, "look": look_of(load_rgb(image.image))}
    return row | {"sha256": hashlib.sha256(image.image).hexdigest()}


def _write_skipped(skipped: Sequence[Skipped], path: Path, columns: Mapping[str, str]) -> None:
    values = {name: [getattr(item, name) for item in skipped] for name in ("name", "reason", "url")}
    metadata = {"columns": json.dumps(dict(sorted(columns.items())))}
    pq.write_table(pa.table(values, schema=pa.schema([(name, pa.string()) for name in values], metadata)), path)


def join_parts(
    parts: Sequence[Path], folder: Path, *, duplicates: str = "keep", more: Sequence[Skipped] = ()
) -> dict[str, Any]:
    """Write a corpus folder from files of `write_part`, in their order, all but the manifest; returns its facts.

    These are 'images', 'skipped' (count by reason; `more` was skipped elsewhere), 'near_copies' (how many were kept as family,
    see `CorpusConfig.duplicates`), 'columns' (of the source, and what became of each), and 'corpus_fingerprint' (over ids,
    image bytes, captions). Raises InputError if two images share an id, or there is no usable image at all.
    """
    wanted = ["image_id", "sha256", "family", "captions", "look"]
    table = pa.concat_tables([pq.read_table(path, columns=wanted) for path in parts])
    ids: list[str] = table["image_id"].to_pylist()
    twice = next((image_id for image_id, count in Counter(ids).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"image id {twice!r} occurs twice; ids must be unique in a corpus.")
    reports = [pq.read_table(path.with_suffix(".skipped")) for path in parts]
    skipped = [*(Skipped(**row) for report in reports for row in report.to_pylist()), *more]
    places = [json.loads(report.schema.metadata[b"columns"]) for report in reports]
    columns: dict[str, str] = {name: place for each in places for name, place in each.items()}
    if not ids:
        reasons = Counter(item.reason.split(" (")[0] for item in skipped)
        raise InputError(f"no usable training image was found; skipped: {dict(reasons) or 'nothing'}.")
    digests: list[str] = table["sha256"].to_pylist()
    looks = looks_of(table["look"].to_pylist())
    first = np.arange(len(ids)) if duplicates == "keep" else _firsts(digests, looks)
    copies = np.flatnonzero(first != np.arange(len(ids)))
    kept = np.ones(len(ids), dtype=bool)
    families: list[str] = table["family"].to_pylist()
    captions = table["captions"].to_pylist()
    apart = np.abs(looks.colours.astype(np.int16) - looks.colours[first]).max(axis=1)
    for row in copies:
        original = first[row]
        if duplicates == "skip" and (captions[row] == captions[original] or apart[row] <= ALIKE):
            kind = "same bytes as" if digests[row] == digests[original] else "near-copy of"
            skipped.append(Skipped(name=ids[row], reason=f"{kind} another image ({ids[original]})"))
            kept[row] = False
        else:
            families[original] = families[original] or ids[original]
            families[row] = families[original]
    identity = [(ids[row], digests[row], captions[row]) for row in np.flatnonzero(kept)]
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        _write_shards(parts, temporary, kept, families)
        pq.write_table(table.select(["image_id", "look"]).filter(pa.array(kept)), temporary / "looks.parquet")
        _write_skipped(skipped, temporary / "skipped.parquet", columns)
    if columns:
        logger.info("columns: %s", ", ".join(f"{name} -> {place}" for name, place in sorted(columns.items())))
    if skipped:
        logger.warning("%d of %d skipped; see %s", len(skipped), len(skipped) + kept.sum(), folder / "skipped.parquet")
    return {
        "images": int(kept.sum()),
        "skipped": dict(Counter(item.reason.split(" (")[0] for item in skipped)),
        "near_copies": int(kept[copies].sum()),
        "columns": dict(sorted(columns.items())),
        "corpus_fingerprint": fingerprint(identity),
    }


def _firsts(digests: Sequence[str], looks: Looks) -> np.ndarray:
    """(N,) row of the first image with the same bytes, or else of the first that it is a near-copy of, or its own."""
    earliest: dict[str, int] = {}
    first = np.array([earliest.setdefault(digest, row) for row, digest in enumerate(digests)], dtype=np.int64)
    distinct = np.unique(first)
    near = np.arange(len(digests))
    near[distinct] = distinct[originals(looks[distinct])]
    return near[first]


def _write_shards(parts: Sequence[Path], folder: Path, kept: np.ndarray, families: Sequence[str]) -> None:
    """Copy the kept rows of the parts into data-*.parquet of `ROWS_PER_SHARD` rows, with their families, by row group."""
    schema = corpus_schema()
    shard, rows, start = 0, 0, 0
    writer: pq.ParquetWriter | None = None
    for path in parts:
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group).drop_columns(["look"])
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


def write_corpus(images: Iterable[TrainingImage | Skipped], folder: Path, config: Any) -> dict[str, Any]:
    """Write a corpus folder of these images, in this order and copies included; returns its manifest."""
    with temporary_folder(folder.parent) as scratch:
        write_part(images, scratch / "part.parquet", description="corpus")
        facts = join_parts([scratch / "part.parquet"], folder)
    return write_manifest(folder, stage="corpus", config=config, inputs={}, **facts)


class Corpus:
    """A written corpus, opened: ids, captions and metadata in memory; images are read from disk when asked for."""

    def __init__(self, folder: str | Path) -> None:
        """Open `folder`; raises ArtifactNotFoundError if it is not a finished corpus."""
        self.folder = Path(folder)
        self.manifest = open_stage(self.folder, "corpus")
        files = [pq.ParquetFile(path) for path in sorted(self.folder.glob("data-*.parquet"))]
        names = [name for name in files[0].schema_arrow.names if name != "image"]
        self.table = pa.concat_tables([file.read(columns=names) for file in files])
        self._groups = [(file, group) for file in files for group in range(file.num_row_groups)]
        self._ends = np.cumsum([file.metadata.row_group(group).num_rows for file, group in self._groups])
        self._read: dict[int, pa.ChunkedArray] = {}
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
        """(N,) row numbers of these ids; InputError if one is not in the corpus."""
        unknown = [image_id for image_id in image_ids if image_id not in self._row]
        if unknown:
            raise InputError(f"{len(unknown)} image ids are not in the corpus {self.folder}, e.g. {unknown[:3]}.")
        return np.array([self._row[image_id] for image_id in image_ids], dtype=np.int64)

    def column(self, name: str) -> list[str]:
        """One metadata column, in row order; texts that a corpus of an earlier version does not have are empty."""
        if name in TEXT_COLUMNS and name not in self.table.column_names:
            return [""] * len(self)
        return self.table[name].to_pylist()

    def image_bytes(self, row: int) -> bytes:
        """The encoded image file of one row."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        images = self._read.pop(number, None)
        if images is None:
            file, group = self._groups[number]
            images = pc.struct_field(file.read_row_group(group, columns=["image"])["image"], "bytes")
        self._read[number] = images  # the last one read is the last one to leave
        while len(self._read) > GROUPS_KEPT:
            self._read.pop(next(iter(self._read)), None)
        return images[row - int(self._ends[number])].as_py()

    def image(self, row: int) -> Image.Image:
        """The decoded RGB image of one row."""
        return load_rgb(self.image_bytes(row))

    def training_images(self, rows: Iterable[int]) -> Iterator[TrainingImage]:
        """The training images of these rows, in their order: what `write_corpus` takes to write a part of this corpus."""
        for row in rows:
            values = self.table.slice(row, 1).drop_columns(["sha256"]).to_pylist()[0]
            yield TrainingImage(image=self.image_bytes(row), **values)

    def looks(self) -> Looks:
        """What the images look like, in row order, for `near_copies`."""
        return looks_of(pq.read_table(self.folder / "looks.parquet")["look"].to_pylist())
