"""Shares: how a query's influence divides among creators, collections or any other column.

What counts is influence above what unrelated images have (`Calibration.level`). Near-duplicates (the catalogue's `family`)
count once together; then images are summed by name. Creators are listed by collection (`source`): a community of many people
is compared as one with the collection of one firm. A training image that the picture copies comes before any statistics: no
validation query has shown how much so near an image holds, so copies hold `COPY_SHARE`. A name with less than `LEAST_SHARE` is
not named; of a picture that is not the generator's own, only copies are. Intervals are bootstraps over validation queries and
families of images, widened by the calibration's factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastattr.students.calibration import Calibration

if TYPE_CHECKING:
    import pandas as pd

UNASSIGNED = "spread too thinly to name"
"""What the last row of a table of shares is called; its `named` is false, whatever creators are called."""
COPY_SHARE = 0.9
"""What training images hold together that the picture copies, by convention; the others divide the rest."""
SAME = 0.999
"""Similarity above which an image is a copy whatever it looks like: its features are the query's."""
COPY_DISTANCE = 0.01
"""Copies divide their part in inverse proportion to 1 - similarity + COPY_DISTANCE."""
LEAST_SHARE = 0.01
"""Names with less are spread too thinly to name."""


@dataclass(frozen=True)
class Shares:
    """How a query's influence divides among G names, each with its 95% interval."""

    names: np.ndarray
    share: np.ndarray
    low: np.ndarray
    high: np.ndarray
    """(G,) each; shares are not negative."""
    images: np.ndarray
    """(G,) images with more than an unrelated image has."""
    unassigned: tuple[float, float, float]
    """What is not named, with its interval; the shares and this sum to 1."""
    above_noise: dict[str, float]
    """What all images hold together, named or not: 'share', 'low' and 'high'. How names are cut does not change it."""


def divide(
    calibration: Calibration,
    similarity: np.ndarray,
    names: np.ndarray,
    families: np.ndarray,
    *,
    weights: np.ndarray,
    level: np.ndarray,
    rest: float = 0.0,
    least: float = 0.0,
    copies: np.ndarray | None = None,
    seed: int = 0,
) -> Shares:
    """Divide expected influence above a level among names; zero levels divide it as it is.

    Of M images `names` are '' for no one's, `families` are drawn together in the bootstrap (`seed`), `weights` say what each
    counts, `copies` (bool) hold `COPY_SHARE` together. `level` is (1 + R,) of the curve and of each of its bootstrap draws,
    `rest` influence that belongs to the whole and to no image. Names with less than `least` are unassigned.
    """
    curves = np.vstack([calibration.influence_of(similarity), calibration.draws_of(similarity)])
    excess = np.maximum(curves - level[:, None], 0)
    _, family = np.unique(families, return_inverse=True)
    found, of_name = np.unique(names, return_inverse=True)
    rng = np.random.default_rng(seed)
    luck = rng.standard_exponential((len(level) - 1, len(families)), dtype=np.float32)[:, family]  # Bayesian bootstrap
    held = excess * weights * np.vstack([np.ones((1, len(family)), np.float32), luck])  # (1 + R, M)
    if copies is not None and copies.any():
        nearness = 1 / (np.maximum(1 - similarity[copies], 0) + COPY_DISTANCE)
        others = held[:, ~copies].sum(axis=1, keepdims=True) + rest
        held[:, copies] = others * (COPY_SHARE / (1 - COPY_SHARE)) * nearness / nearness.sum()
    order = np.argsort(of_name, kind="stable")
    starts = np.searchsorted(of_name[order], np.arange(len(found)))
    sums = np.add.reduceat(held[:, order], starts, axis=1) if len(found) else held
    shares = sums / np.maximum(held.sum(axis=1, keepdims=True) + rest, 1e-12)

    def ends(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        middle = values[0]
        low, high = np.quantile(values[1:], [0.025, 0.975], axis=0)
        low, high = np.minimum(low, middle), np.maximum(high, middle)
        low, high = middle - calibration.widening * (middle - low), middle + calibration.widening * (high - middle)
        return np.clip(low, 0, 1), np.clip(high, 0, 1)

    named = (found != "") & (shares[0] >= least)
    named &= shares[0] > 0 if least else named
    low, high = ends(shares)
    free = 1 - shares[:, named].sum(axis=1, keepdims=True)
    free_low, free_high = ends(free)
    together = held.sum(axis=1) / np.maximum(held.sum(axis=1) + rest, 1e-12)
    images = np.bincount(of_name, weights=excess[0] > 0, minlength=len(found)).astype(np.int64)
    return Shares(
        *(found[named], shares[0, named], low[named], high[named], images[named]),
        unassigned=(float(free[0, 0]), float(free_low[0]), float(free_high[0])),
        above_noise=dict(zip(("share", "low", "high"), map(float, (together[0], *ends(together))), strict=True)),
    )


def share_table(
    calibration: Calibration,
    similarity: np.ndarray,
    columns: Mapping[str, np.ndarray],
    *,
    by: str,
    families: np.ndarray,
    family_sizes: np.ndarray,
    copies: np.ndarray | None = None,
    own: bool = True,
) -> pd.DataFrame:
    """Shares of a query's influence, above what unrelated images have, by one column of the catalogue.

    The whole is the excess of all images and one unrelated image's level: so much may be chance. Of the M most similar images:
        columns: (M,) texts by name of the column, '' for no one's: `by`, and 'source' where `by` is 'creator'.
        families, family_sizes: near-duplicates share one; their members, of which the corpus has so many, count once together.
        copies: (M,) bool, images that the picture looks like a copy of; None: nobody has looked.
        own: whether the picture is the generator's own; the calibration says nothing of others, so only copies are named.

    Returns:
        Columns `by`, 'share' (sums to 1), 'low', 'high', 'images' (how many hold it) and 'named', the largest share first. The
        last row, `UNASSIGNED`, is what is spread too thinly to name; it alone has `named` false. By creator, 'source' says in
        which collection (of an image without a source: its creator's) a creator holds most, and 'source_leads' whether that
        collection's interval lies above all others'; the creators of the collection with the largest share come first.
        `attrs` has 'above_noise', see `Shares`.
    """
    import pandas as pd

    copies = (similarity > SAME) | (False if copies is None else copies)
    near = copies | (similarity > (calibration.reached if own else np.inf))  # no draw of the curve gives others any excess
    similarity, columns = similarity[near], {name: values[near] for name, values in columns.items()}

    def estimate(names: np.ndarray) -> Shares:
        above: dict[str, Any] = {"level": calibration.level, "rest": float(calibration.level[0]), "least": LEAST_SHARE}
        above["copies"] = copies[near]
        return divide(calibration, similarity, names, families[near], weights=1.0 / family_sizes[near], **above)

    found = estimate(columns[by])
    columns_of = {by: found.names, "share": found.share, "low": found.low, "high": found.high, "images": found.images}
    table, order = pd.DataFrame(columns_of).assign(named=True), ["share", by]
    last = pd.DataFrame([[UNASSIGNED, *found.unassigned, 0, False]], columns=list(table))
    if by == "creator" and "source" in columns:
        collections = np.where(columns["source"] == "", columns["creator"], columns["source"])
        every = estimate(collections)
        held = dict(zip(every.names.tolist(), every.share.tolist(), strict=True))
        excess = np.maximum(calibration.influence_of(similarity) - calibration.level[0], 0.0) + 1e-9
        of_pair = pd.Series(excess).groupby([columns["creator"], collections]).sum()
        table["source"] = [str(of_pair[name].idxmax()) for name in found.names]
        table["of_source"] = [held.get(name, 0.0) for name in table["source"]]
        table["source_leads"] = [_leads(every, name) for name in table["source"]]
        last, order = last.assign(source="", source_leads=False), ["of_source", *order]
    table = table.sort_values(order, ascending=[name == by for name in order]).drop(columns="of_source", errors="ignore")
    whole = pd.concat([table, last], ignore_index=True)
    whole.attrs["above_noise"] = found.above_noise
    return whole


def _leads(found: Shares, name: str) -> bool:
    """Whether a name's interval lies above 0 and above the intervals of all others."""
    here = found.names == name
    return bool(here.any() and found.low[here][0] > max([0.0, *found.high[~here].tolist()]))


def listed_table(weights: np.ndarray, names: np.ndarray, by: str) -> pd.DataFrame:
    """Shares without a calibration: of listed images with (M,) names, each counting with its (M,) weight.

    Columns as `share_table` has them; intervals are NaN and nothing is left unassigned.
    """
    import pandas as pd

    table = pd.DataFrame({by: names, "share": weights, "images": 1}).groupby(by, as_index=False).sum()
    table["share"] /= table["share"].sum()
    last = pd.DataFrame({by: [UNASSIGNED], "share": 0.0, "images": 0, "named": False})
    table = table.assign(named=True).sort_values(["share", by], ascending=[False, True])
    every = pd.concat([table, last], ignore_index=True).assign(low=float("nan"), high=float("nan"))
    return every[[by, "share", "low", "high", "images", "named"]]


def dominant(table: pd.DataFrame, by: str) -> str | None:
    """The name, in a table of shares, whose interval lies above 0 and above the intervals of all others, or None.

    By creator, the others are the creators of the same collection, and the collection must itself stand above all others.
    """
    named = table[table["named"]]
    if named.empty:
        return None
    first, others = named.iloc[0], named.iloc[1:]
    if "source" in named and by == "creator":
        if not first["source_leads"]:
            return None
        others = others[others["source"] == first["source"]]
    return str(first[by]) if first["low"] > max(0.0, others["high"].max() if len(others) else 0.0) else None


def teacher_shares(influence: np.ndarray, weights: np.ndarray, names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(G,) names and their shares of the positive influence; (C,) weights of the images, summing to anything."""
    found, of_name = np.unique(names, return_inverse=True)
    positive = np.maximum(influence.astype(np.float64), 0.0) * weights
    return found, np.bincount(of_name, weights=positive, minlength=len(found)) / max(positive.sum(), 1e-12)


def families_of(column: Sequence[str]) -> np.ndarray:
    """(N,) number of each image's family; an image without one is a family of its own."""
    names = np.array([name or f"\0{row}" for row, name in enumerate(column)])
    return np.unique(names, return_inverse=True)[1]
