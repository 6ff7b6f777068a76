"""Vectors like the emoji attributor's embeddings, as many as wanted: what the index benchmark is made of.

The 15,351 real embeddings (128 wide) are those that the embedded emoji attributor's index holds. A made vector is a
smoothed bootstrap of them: a real one, moved by a random combination of the steps to its nearest neighbours, so that it
stays on the same curved sheet of low dimension:

    y = unit(x_i + SPREAD * sum_j g_j (x_nj - x_i) / sqrt(NEIGHBOURS)),  g_j standard normal, n_1 ... the nearest of x_i.

To get the 768 dimensions of DINO or CLIP, y is followed by 640 smooth functions of it, cos(w y + b) with w normal of scale
1 / LENGTH (random Fourier features), weighted by TAIL. The inner product of two such vectors is
(y y' + TAIL k(y, y')) / (1 + TAIL) with k the Gaussian kernel, a rising function of y y': the order of neighbours is that of
the real space, while all 768 dimensions carry something.
"""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np

from fastattr.core.files import atomic_path
from fastattr.core.models import ASSETS
from fastattr.index.files import Read, reader

DIM = 768
NEIGHBOURS = 8
SPREAD = 0.8
LENGTH = 0.5
TAIL = 0.5
BLOCK = 65_536
"""Vectors that come from one seed."""


def real_embeddings(folder: Path = ASSETS / "emoji" / "attributor") -> np.ndarray:
    """(15351, 128) float32 unit vectors: the embeddings in the embedded attributor's index."""
    index = faiss.read_index(str(folder / "index.faiss"))
    vectors = index.reconstruct_n(0, index.ntotal)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Population:
    """An endless stream of made vectors; row i is the same whenever it is drawn."""

    def __init__(self, real: np.ndarray, *, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.real, self.seed = real, seed
        flat = faiss.IndexFlatIP(real.shape[1])
        flat.add(real)
        self.neighbours = flat.search(real, NEIGHBOURS + 1)[1][:, 1:]
        width = DIM - real.shape[1]
        self._frequencies = (rng.standard_normal((real.shape[1], width)) / LENGTH).astype(np.float32)
        self._phases = rng.uniform(0, 2 * np.pi, width).astype(np.float32)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop, (stop - start, 768) float32 unit vectors."""
        parts = []
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            low, high = max(start - block * BLOCK, 0), min(stop - block * BLOCK, BLOCK)
            parts.append(self._block(block, high)[low:])
        return np.concatenate(parts)

    def _block(self, number: int, rows: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, number])
        parents = rng.integers(len(self.real), size=BLOCK)[:rows]
        steps = rng.standard_normal((BLOCK, NEIGHBOURS), dtype=np.float32)[:rows] * np.float32(SPREAD / NEIGHBOURS**0.5)
        small = self.real[parents] * (1 - steps.sum(axis=1, keepdims=True))
        for j in range(NEIGHBOURS):
            small += steps[:, j, None] * self.real[self.neighbours[parents, j]]
        small /= np.linalg.norm(small, axis=1, keepdims=True)
        return self.lift(small)

    def lift(self, small: np.ndarray) -> np.ndarray:
        """(n, 768) unit vectors of (n, 128) ones."""
        waves = small @ self._frequencies
        waves += self._phases
        np.cos(waves, out=waves)
        waves *= np.float32((2 * TAIL / waves.shape[1]) ** 0.5)
        whole = np.concatenate([small, waves], axis=1)
        return whole / np.linalg.norm(whole, axis=1, keepdims=True)


def stored(rows: int, path: Path) -> Read:
    """The made vectors, written once as float16: what is compared exhaustively is what is indexed."""
    if not path.exists():
        made = Population(real_embeddings(), seed=0)
        with atomic_path(path) as temporary, temporary.open("wb") as out:
            for start in range(0, rows, BLOCK):
                out.write(made.read(start, min(start + BLOCK, rows)).astype(np.float16).tobytes())
    return reader(path, DIM)
