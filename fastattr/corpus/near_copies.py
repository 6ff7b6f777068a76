"""Near-copies: pictures that show the same thing although their bytes differ (re-encoded, resized, retouched).

A picture's look is the 64 signs of its horizontal brightness steps (dHash) and an 8 x 8 colour thumbnail, of the whole
picture: crops and mirror images are not found. Two are near-copies if at most `MAX_BITS` of the signs differ, no value of
the thumbnails by more than `MAX_COLOUR`, and none stands out (`STANDS_OUT`), which would be another skin tone, flag or sign.
Comparing all pairs of N pictures takes time of order N^2 / 32: seconds for ten thousand, hours for millions.
Source of dHash: Neal Krawetz, "Kind of Like That" (2013); pairs are found by FAISS' multi-index hashing (arXiv:1307.2982).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

MAX_BITS = 6  # of 64; at most 7, for with eight bands of eight bits two hashes that differ in 7 bits agree in one band
MAX_COLOUR = 40  # of 255; emoji shrunk to 40 pixels and saved as JPEG of quality 60 differ by 34 at most
# Largest difference of two thumbnails, in units of `NOISE` plus their 60th percentile; resaved emoji have 3.5 at most in 99%.
STANDS_OUT, NOISE = 3.0, 4
ALIKE = 14  # largest difference of two thumbnails up to which other captions do not make another picture
FLAT = 2  # steps of brightness up to this count as none, so that the noise of a JPEG's plain areas makes no bits
SIDE = 8
AT_ONCE = 1024  # pictures whose pairs are in memory at once; a corpus may hold one picture ten thousand times


@dataclass(frozen=True)
class Looks:
    """What N pictures look like."""

    signs: np.ndarray  # (N, 8) uint8, the 64 bits of each dHash
    colours: np.ndarray  # (N, 192) uint8, the 8 x 8 RGB thumbnails

    def __len__(self) -> int:
        return len(self.signs)

    def __getitem__(self, rows: slice | np.ndarray) -> Looks:
        return Looks(self.signs[rows], self.colours[rows])


def look_of(image: Image.Image) -> bytes:
    """The look of an RGB picture, 200 bytes: 8 of signs, 192 of colours."""
    grey = np.asarray(image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX), dtype=np.int16)
    small = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.packbits(np.diff(grey, axis=1) > FLAT).tobytes() + np.asarray(small, dtype=np.uint8).tobytes()


def looks_of(looks: Sequence[bytes]) -> Looks:
    """N looks as arrays."""
    values = np.frombuffer(b"".join(looks), dtype=np.uint8).reshape(len(looks), SIDE + 3 * SIDE * SIDE)
    return Looks(np.ascontiguousarray(values[:, :SIDE]), values[:, SIDE:])


def near_copies(looks: Looks, among: Looks) -> list[np.ndarray]:
    """For each of Q pictures the rows of the N pictures `among` that are near-copies of it, the likest first."""
    import faiss

    if not len(looks) or not len(among):
        return [np.zeros(0, dtype=np.int64) for _ in range(len(looks))]
    index = faiss.IndexBinaryMultiHash(64, SIDE, SIDE)
    index.add(among.signs)
    answers = []
    for start in range(0, len(looks), AT_ONCE):
        limits, _, found = index.range_search(looks.signs[start : start + AT_ONCE], MAX_BITS + 1)  # less than
        for row, colours in enumerate(looks.colours[start : start + AT_ONCE]):
            rows = np.unique(found[limits[row] : limits[row + 1]])
            difference = np.abs(among.colours[rows].astype(np.int16) - colours.astype(np.int16))
            cells = difference.reshape(len(rows), SIDE * SIDE, 3).max(axis=2)
            worst, usual = cells.max(axis=1, initial=0), np.percentile(cells, 60, axis=1) if len(rows) else np.zeros(0)
            close = (worst <= MAX_COLOUR) & (worst <= STANDS_OUT * (NOISE + usual))
            answers.append(rows[close][np.argsort(difference.mean(axis=1)[close], kind="stable")])
    return answers


def originals(looks: Looks) -> np.ndarray:
    """(N,) for each picture the row of the first picture that it is itself a near-copy of, or its own if it is the first."""
    first = np.arange(len(looks))
    for row, rows in enumerate(near_copies(looks, looks)):
        earlier = rows[(rows < row) & (first[rows] == rows)]
        if len(earlier):
            first[row] = earlier.min()
    return first
