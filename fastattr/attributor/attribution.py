"""Attribution: the answer to one query, the training images that influenced an image most.

`Attribution` holds the results, what was asked and by which version it was answered; shares, figure and receipt are made of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from PIL import Image

from fastattr.core.errors import InputError
from fastattr.corpus.store import load_rgb
from fastattr.students.calibration import Calibration
from fastattr.students.shares import estimate_shares, families_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

RECEIPT = "fastattr-receipt-1"
"""Format of `Attribution.to_dict`."""
UNASSIGNED = "no one in particular"
"""Name of the last row of `Attribution.shares`: influence that is no one's more than anyone else's."""
REACH = 20_000
"""Most similar images that shares are taken of; those of a larger corpus beyond them count as unrelated."""


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
    image_part: float | None = None
    """How much of `similarity` is the image's doing, ..."""
    text_part: float | None = None
    """... and how much the prompt's: Shapley values, which add up to it; a part is taken away by putting the corpus' mean
    in its place. None if the attributor has no means, or encoders that read both."""


@dataclass(frozen=True)
class Reach:
    """What the shares of one attribution are taken of; found when they are asked for, in the version that answered."""

    catalog: pa.Table
    """Of the whole corpus, or of these images alone."""
    find: Callable[[], tuple[np.ndarray, np.ndarray]]
    """Gives (M,) rows of the catalogue, most similar first, and their similarities."""
    weights: np.ndarray | None
    """(M,) what an image counts where there is no calibration."""
    calibration: Calibration | None
    size: int
    """N, images that could have been found; those beyond the M count as unrelated."""

    @cached_property
    def _found(self) -> tuple[np.ndarray, np.ndarray]:
        return self.find()

    @property
    def rows(self) -> np.ndarray:
        """(M,) rows of the catalogue, most similar first."""
        return self._found[0]

    @property
    def similarities(self) -> np.ndarray:
        """(M,) their similarities."""
        return self._found[1]

    def first(self, k: int) -> Reach:
        """Of an answer with k images: the same with a calibration, the first k images without."""
        if self.calibration is not None or self.weights is None:
            return self
        return replace(self, find=partial(found, self.rows[:k], self.similarities[:k]), weights=self.weights[:k])

    def names(self, column: str) -> np.ndarray:
        """(M,) values of one column of the catalogue; '' where there is none."""
        values = self.catalog[column].take(pa.array(self.rows)).to_pylist()
        return np.array(["" if value is None else str(value) for value in values])


@dataclass(frozen=True)
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
    versions: dict[str, Any] = field(default_factory=dict)
    """SHA-256 of 'model', 'index' and 'catalog', and 'catalog_version'."""
    _reach: Reach | None = field(default=None, repr=False, compare=False)
    _thumbnails: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)

    def to_pandas(self) -> pd.DataFrame:
        """One row a training image, most influential first."""
        import pandas as pd

        return pd.DataFrame([asdict(result) for result in self.results])

    def to_dict(self) -> dict[str, Any]:
        """The receipt: everything but the thumbnails, as plain values; `fastattr verify` replays it."""
        return {
            "format": RECEIPT,
            "versions": self.versions,
            "query": {**self.query, "prompt": self.prompt},
            "results": [asdict(result) for result in self.results],
            "prompt": self.prompt,
            "seconds": self.seconds,
            "model": self.model,
            "warnings": self.warnings,
        }

    def to_json(self) -> str:
        """`to_dict` as JSON, the receipt."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def first(self, k: int) -> Attribution:
        """The same answer as if only k images had been asked for."""
        return replace(
            self,
            results=self.results[:k],
            query={**self.query, "k": min(k, self.query.get("k", k))},
            _reach=self._reach.first(k) if self._reach else None,
        )

    def shares(self, by: str = "creator") -> pd.DataFrame:
        """How the query's positive influence divides by creator, licence, source or another column of the catalogue.

        With a calibration, a share is what the teacher is expected to find, over the whole corpus: the influence of a
        creator's images beyond what as many unrelated images have, over all positive influence. Near-duplicates (one
        `family`) count once together. What is left belongs to no one in particular and is the last row, `UNASSIGNED`, with
        the images that lack a name in that column. Intervals are of 95%, found on validation queries (docs/student.md).

        Without a calibration shares are of the listed images together, each counting with the student's estimate of its
        closeness to the top of the teacher's ranking; intervals are NaN and nothing is left unassigned.

        Args:
            by: 'creator', 'license', 'source' or another column of the catalogue.

        Returns:
            Columns `by`, 'share' (sums to 1), 'low', 'high', 'images' (how many hold it), largest share first.

        Raises:
            InputError: there is no such column.
        """
        import pandas as pd

        if self._reach is None:
            raise InputError("this attribution was made without a catalogue; shares need one.")
        catalog = self._reach.catalog
        known = [name for name in catalog.column_names if name not in {"image_id", "thumbnail"}]
        if by not in known:
            raise InputError(f"shares can be taken by {', '.join(known)}, not by {by!r}")
        names = self._reach.names(by)
        if self._reach.calibration is None:
            weights = self._reach.weights
            counted = pd.DataFrame({by: names, "share": weights, "images": 1}).groupby(by, as_index=False).sum()
            counted["share"] /= counted["share"].sum()
            table = counted.assign(low=float("nan"), high=float("nan"))
            last = (0.0, float("nan"), float("nan"))
        else:
            every = families_of(catalog["family"].to_pylist()) if "family" in catalog.column_names else np.arange(len(catalog))
            found = estimate_shares(
                self._reach.calibration,
                self._reach.similarities,
                names,
                every[self._reach.rows],
                family_sizes=np.bincount(every)[every[self._reach.rows]],
                beyond=self._reach.size - len(names),
            )
            columns = {by: found.names, "share": found.share, "low": found.low, "high": found.high, "images": found.images}
            table = pd.DataFrame(columns).query("images > 0")
            last = found.unassigned
        table = table.sort_values(["share", by], ascending=[False, True])
        rest = {by: [UNASSIGNED], "share": last[0], "low": last[1], "high": last[2], "images": 0}
        return pd.concat([table, pd.DataFrame(rest)], ignore_index=True)[[by, "share", "low", "high", "images"]]

    @property
    def dominant(self) -> str | None:
        """The creator whose share is certainly the largest; None if intervals overlap: there is no dominant source.

        Certainly: the lower end of its interval lies above the upper ends of all other creators', and above 0.
        """
        table = self.shares(by="creator").iloc[:-1]
        if table.empty or not table["low"].iloc[0] > max(0.0, table["high"].iloc[1:].max() if len(table) > 1 else 0.0):
            return None
        return str(table["creator"].iloc[0])

    def thumbnail(self, image_id: str) -> Image.Image:
        """Small RGB picture of one of the results.

        Raises:
            InputError: it is none of them, or the attributor was loaded without thumbnails.
        """
        if self.results and not self._thumbnails:
            raise InputError("the attributor has no thumbnails, or was loaded with thumbnails=False.")
        if image_id not in self._thumbnails:
            raise InputError(f"{image_id!r} is not among the {len(self.results)} results of this attribution.")
        return load_rgb(self._thumbnails[image_id])

    def figure(self) -> Figure:
        """The results as a matplotlib figure: thumbnails with rank, similarity, caption and creator."""
        from matplotlib.figure import Figure

        columns = min(5, len(self.results))
        rows = -(-len(self.results) // columns)
        figure = Figure(figsize=(2.4 * columns, 2.7 * rows), layout="constrained")
        for axes, result in zip(figure.subplots(rows, columns, squeeze=False).flat, self.results, strict=False):
            axes.imshow(self.thumbnail(result.image_id))
            axes.set_title(f"{result.rank + 1}. {result.caption[:34]}\n{result.creator}, {result.similarity:.3f}", fontsize=7)
        for axes in figure.axes:
            axes.axis("off")
        return figure


def found(rows: np.ndarray, similarities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `Reach.find` gives where it is known already."""
    return rows, similarities
