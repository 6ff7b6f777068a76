"""Noise and timesteps of losses: functions of (id, draw, seed) alone, so that no batch, order or process changes them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def noise_for(ids: Sequence[str], draws: Sequence[int], *, seed: int, shape: tuple[int, ...]) -> Tensor:
    """(B, *shape) standard normal noise, each row a function of its id, its draw number and the seed only.

    Args:
        ids: (B,) image or query ids.
        draws: (B,) draw numbers.
        seed: of the whole run.
        shape: of one latent, (L, h, w).
    """
    rows = []
    for name, draw in zip(ids, draws, strict=True):
        key = int.from_bytes(hashlib.sha256(f"{seed}/{draw}/{name}".encode()).digest()[:16], "little")
        rows.append(np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32))
    return torch.from_numpy(np.stack(rows))


def spread_timesteps(draws: int, *, train_timesteps: int) -> np.ndarray:
    """(draws,) timesteps in the middles of `draws` equal parts of the schedule; draw d always has the d-th."""
    return ((np.arange(draws) + 0.5) / draws * train_timesteps).astype(np.int64)
