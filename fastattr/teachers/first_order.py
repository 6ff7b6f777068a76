"""Linearised teacher: to first order, one backward pass over the corpus scores it for all queries at once.

A training image's loss changes, to first order, by the inner product of its mean loss gradient with the query's step.
The queries' steps are kept as rows of a matrix; the corpus passes by in batches, each image's gradient is contracted
with all steps and forgotten, so nothing is stored per image. As the step shrinks, the exact score divided by the
step's length converges to this one's. Source: arXiv:2511.10721, sec. 3 (the exact teacher); the expansion is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastattr.generators.generator import Generator
from fastattr.generators.layers import Layer
from fastattr.gradients.encoded import EncodedImages
from fastattr.gradients.losses import recorded_losses, require_finite
from fastattr.gradients.recording import example_gradients


def flat_step(step: Mapping[str, Tensor], layers: Sequence[str]) -> np.ndarray:
    """(P,) the changes of all layers, in the order of `layers`."""
    return torch.cat([step[name].detach().flatten() for name in layers]).cpu().numpy()


def linearised_scores(
    generator: Generator, layers: Mapping[str, Layer], images: EncodedImages, rows: np.ndarray, steps: Tensor, **drawn: Any
) -> np.ndarray:
    """First-order loss change of training images under each query's step.

    Args:
        generator: with base weights.
        layers: those that the steps change; their weights must require gradients.
        images: the encoded corpus; `rows` (C,) says which of its images.
        steps: (Q, P) change of weights by query, layers one after another in the order of `layers`, as `flat_step`.
        drawn: draws, batch_size, seed and span, as of `image_losses` in the exact teacher.

    Returns:
        (Q, C) float64 scores, higher = more influential, in the unit of the losses; the larger of two views'.

    Raises:
        NonFiniteError: a score is NaN or infinite; the image is named.
    """
    scores = torch.zeros(len(rows) * images.views, len(steps), dtype=torch.float64)
    steps = steps.to(generator.device)
    for positions, _, recorded in recorded_losses(generator, layers, images, rows, **drawn):
        gradients = torch.cat([example_gradients(recorded[name], len(positions)).flatten(1) for name in layers], dim=1)
        scores.index_add_(0, torch.from_numpy(positions), (gradients @ steps.T).double().cpu())
    largest: np.ndarray = scores.reshape(len(rows), images.views, len(steps)).amax(dim=1).numpy()
    require_finite(largest, images, rows, "first-order score")
    return largest.T
