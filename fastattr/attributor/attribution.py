"""Attribution: the answer to one query, of which shares, figure and receipt are made."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from PIL import Image

from fastattr.core.errors import InputError
from fastattr.core.files import atomic_path
from fastattr.corpus.images import load_rgb
from fastattr.students.calibration import Calibration
from fastattr.students.shares import dominant, families_of, listed_table, share_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

RECEIPT = "fastattr-receipt-1"  # format of `Attribution.to_dict`
FORMULA = re.compile(r"[=+\-@\t\r]")  # how a cell begins that spreadsheets take for a formula
REACH = 20_000  # most similar images that shares are taken of; those of a larger corpus beyond them count as unrelated


@dataclass(frozen=True)
class Influence:
    """One training image in an attribution."""

    rank: int
    """0 = most influential."""
    image_id: str
    similarity: float
    """Cosine between the student's embeddings of query and training image, -1 to 1; orders like influence."""
    caption: str
    creator: str
    license: str
    source: str
    url: str
    family: str
    """Near-duplicates (e.g. the skin tones of one emoji) share one name; empty where none is known."""
    percentile: float | None = None
    """Expected percentile, by the teacher, among all training images: 100 = the most influential; None if not calibrated."""
    strength: str | None = None
    """'strong', 'medium' or 'weak'; None where the calibration separates nothing, or the picture is not the generator's own."""
    image_part: float | None = None
    """How much of `similarity` is the image's doing, ..."""
    text_part: float | None = None
    """... and how much the prompt's: Shapley values, which add up to it; None without a calibration, or for joint encoders."""


@dataclass(frozen=True)
class Reach:
    """What the shares of one attribution are taken of; found when they are asked for, in the version that answered."""

    table: Callable[[], pa.Table]  # gives the catalogue of the whole corpus, or of these images alone
    find: Callable[[], tuple[np.ndarray, np.ndarray]]  # gives (M,) rows of it, most similar first, and their similarities
    weights: np.ndarray | None  # (M,) what an image counts where there is no calibration
    calibration: Calibration | None
    size: int  # N, images that could have been found; those beyond the M count as unrelated
    own: bool = True  # whether the picture looks like the generator's own; of others nobody is named

    @cached_property
    def found(self) -> tuple[np.ndarray, np.ndarray]:
        """(M,) rows of the catalogue, most similar first, and their similarities."""
        return self.find()

    def first(self, k: int) -> Reach:
        """Of an answer with k images: the same with a calibration, the first k images without."""
        if self.calibration is not None or self.weights is None:
            return self
        rows, similarities = (each[:k] for each in self.found)
        return replace(self, find=lambda: (rows, similarities), weights=self.weights[:k])

    def names(self, column: str) -> np.ndarray:
        """(M,) values of one column of the catalogue; '' where there is none."""
        values = self.table()[column].take(pa.array(self.found[0])).to_pylist()
        return np.array(["" if value is None else str(value) for value in values])


@dataclass(frozen=True, repr=False)
class Attribution:
    """The training images that influenced one image most, most influential first."""

    results: list[Influence]
    prompt: str
    seconds: dict[str, float]
    """Time spent in each step."""
    model: dict[str, Any]
    """Name, fingerprints and versions of what answered."""
    warnings: list[str] = field(default_factory=list)
    query: dict[str, Any] = field(default_factory=dict)
    """What was asked: 'sha256' of image and prompt (or features), 'embedding' (base64 float32), k, and the restriction."""
    near_copies: list[str] | None = None
    """Training images that the query's picture is a copy of, or nearly so, the likest first; None if that is unknown."""
    versions: dict[str, Any] = field(default_factory=dict)
    """SHA-256 of 'model', 'index' and 'catalog', and 'catalog_version'."""
    _reach: Reach | None = field(default=None, repr=False, compare=False)
    _thumbnails: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"), compare=False)
    """When it was answered (ISO 8601, UTC)."""

    @property
    def near_copy_of(self) -> str | None:
        """The first of `near_copies`; None if there is none, or it is unknown."""
        return self.near_copies[0] if self.near_copies else None

    def to_pandas(self) -> pd.DataFrame:
        """One row a training image, most influential first."""
        import pandas as pd

        return pd.DataFrame([asdict(result) for result in self.results])

    def to_dict(self) -> dict[str, Any]:
        """The receipt: everything but the thumbnails, as plain values; `fastattr verify` replays it."""
        plain = ("date", "versions", "prompt", "seconds", "model", "warnings", "near_copies")
        query, results = {**self.query, "prompt": self.prompt}, [asdict(result) for result in self.results]
        return {"format": RECEIPT, "query": query, "results": results, **{name: getattr(self, name) for name in plain}}

    def to_json(self) -> str:
        """`to_dict` as JSON, the receipt, with the creators' shares of at least 0.1%, 'above_noise' and its own 'sha256'."""
        values = self.to_dict()
        if self._reach is not None:
            table = self.shares()
            kept = table[(table["share"] >= 0.001) | ~table["named"]]
            values["shares"] = json.loads(kept.to_json(orient="records", double_precision=15))
            values["above_noise"] = table.attrs.get("above_noise")
        return json.dumps({**values, "sha256": content_sha256(values)}, ensure_ascii=False)

    def first(self, k: int) -> Attribution:
        """The same answer as if only k images had been asked for."""
        query, reach = {**self.query, "k": min(k, self.query.get("k", k))}, self._reach.first(k) if self._reach else None
        return replace(self, results=self.results[:k], query=query, _reach=reach)

    def shares(self, by: str = "creator") -> pd.DataFrame:
        """How the query's positive influence divides by creator, licence, source or another column of the catalogue.

        With a calibration, a share is of the influence above what unrelated images have (fastattr/students/shares.py). What is
        left is the last row, the only one with `named` false. By creator, those of the collection (`source`) with the largest
        share come first. Intervals are of 95%, found on validation queries. Without a
        calibration shares are of the listed images together, each counting with the student's estimate of its closeness to
        the top of the teacher's ranking; intervals are NaN and nothing is left unassigned.

        Returns:
            Columns `by`, 'share' (sums to 1), 'low', 'high', 'images' (how many hold it), 'named', largest share first; by
            creator also 'source' and 'source_leads', see `fastattr.students.shares.share_table`.

        Raises:
            InputError: there is no such column.
        """
        if self._reach is None:
            raise InputError("this attribution was made without a catalogue; shares need one.")
        reach, catalog = self._reach, self._reach.table()
        known = [name for name in catalog.column_names if name not in {"image_id", "thumbnail"}]
        if by not in known:
            raise InputError(f"shares can be taken by {', '.join(known)}, not by {by!r}")
        if reach.calibration is None:
            return listed_table(np.asarray(reach.weights), reach.names(by), by)
        rows, similarities = reach.found
        every = families_of(catalog["family"].to_pylist()) if "family" in known else np.arange(len(catalog))
        families, sizes = every[rows], np.bincount(every)[every[rows]]
        copies = None if self.near_copies is None else np.isin(reach.names("image_id"), self.near_copies)
        columns = {name: reach.names(name) for name in {by, "source"} & set(known)}
        counted = {"families": families, "family_sizes": sizes, "copies": copies, "own": reach.own}
        return share_table(reach.calibration, similarities, columns, by=by, **counted)

    @property
    def dominant(self) -> str | None:
        """The creator whose share is certainly the largest: its interval lies above 0 and above all others'; None for none."""
        return dominant(self.shares(by="creator"), "creator")

    def thumbnail(self, image_id: str) -> Image.Image:
        """Small RGB picture of one of the results; InputError if it is none, or no thumbnails were loaded."""
        if image_id not in self._thumbnails:
            why = "the attributor has none, or was loaded with thumbnails=False" if not self._thumbnails else "it is no result"
            raise InputError(f"there is no thumbnail of {image_id!r} in this attribution: {why}.")
        return load_rgb(self._thumbnails[image_id])

    def figure(self) -> Figure:
        """The results as a matplotlib figure: thumbnails with rank, similarity, caption and creator."""
        from matplotlib.figure import Figure

        columns = max(1, min(5, len(self.results)))
        rows = max(1, -(-len(self.results) // columns))
        figure = Figure(figsize=(2.4 * columns, 2.7 * rows), layout="constrained")
        every = figure.subplots(rows, columns, squeeze=False).flat
        for axes, result in zip(every, self.results, strict=False):
            axes.imshow(self.thumbnail(result.image_id))
            title = f"{result.rank + 1}. {_short(result.caption, 34)}\n{_short(result.creator, 24)}, {result.similarity:.3f}"
            axes.set_title(title, fontsize=7, parse_math=False)  # '$' in a name is no formula
        if not self.results:
            every[0].set_title("no training image", fontsize=7)
        for axes in figure.axes:
            axes.axis("off")
        return figure

    def save(self, path: str | Path) -> None:
        """Write the answer as the suffix says: .json (the receipt), .csv, .parquet, or a picture; InputError for others."""
        path = Path(path)
        kind = path.suffix.lower()
        if kind not in {".json", ".csv", ".parquet", ".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp"}:
            raise InputError(f"{path} needs a suffix that says what to write: .json, .csv, .parquet, .png, .svg or .pdf.")
        with atomic_path(path) as temporary:
            if kind == ".json":
                temporary.write_text(self.to_json() + "\n", encoding="utf-8")
            elif kind == ".csv":
                temporary.write_text(to_csv(self.to_pandas()), encoding="utf-8")
            elif kind == ".parquet":
                self.to_pandas().to_parquet(temporary, index=False)
            else:
                self.figure().savefig(temporary)

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, rank: int) -> Influence:
        return self.results[rank]

    def __iter__(self) -> Iterator[Influence]:
        return iter(self.results)

    def __repr__(self) -> str:
        first = ", ".join(_short(result.image_id, 40) for result in self.results[:3])
        return f"Attribution({len(self.results)} training images: {first}{', ...' if len(self.results) > 3 else ''})"

    def _repr_html_(self) -> str:
        """A table with pictures, for notebooks."""
        head = "".join(f"<th>{name}</th>" for name in ("", "", "caption", "creator", "licence", "similarity"))
        table = f"<p>near-copy of {html.escape(_short(self.near_copy_of, 80))}</p>" if self.near_copy_of else ""
        table += f"<table><tr>{head}</tr>"
        for result in self.results:
            data = base64.b64encode(self._thumbnails.get(result.image_id, b"")).decode()
            picture = f'<img src="data:image/webp;base64,{data}" width="48">' if data else ""
            texts = (_short(result.caption, 80), _short(result.creator, 40), _short(result.license, 40))
            cells = [str(result.rank + 1), picture, *map(html.escape, texts), f"{result.similarity:.3f}"]
            table += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        return f"{table}</table>"


def content_sha256(receipt: Mapping[str, Any]) -> str:
    """SHA-256 of a receipt's content, however the JSON is laid out and whether it says 1 or 1.0 (a browser drops the .0).

    'sha256', 'model' and 'generation' are left out: a page shows a model's public name, and adds how it drew; 'versions' stay.
    """
    content = {name: value for name, value in receipt.items() if name not in {"sha256", "model", "generation"}}
    content = json.loads(json.dumps(content), parse_int=float, parse_float=lambda digits: float(digits) + 0.0)  # no -0.0
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def to_csv(table: pd.DataFrame) -> str:
    """A table as CSV in which no cell is a formula to a spreadsheet: texts that begin like one get an apostrophe."""
    texts = table.select_dtypes(include=["object", "string"]).columns
    safe = {name: [_cell(value) for value in table[name]] for name in texts}
    return str(table.assign(**safe).to_csv(index=False))


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = value.replace("\r", " ")  # which the csv module does not quote: what follows would begin a row
    return f"'{text}" if FORMULA.match(value) else text


def _short(text: str, length: int) -> str:
    """The text on one line, cut to a length."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length else line[: length - 1] + "\u2026"
