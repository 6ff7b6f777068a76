"""Losses of the student: one short function each, on the matrix of a batch's queries and training images.

All take `logits` (Q, N), which rise with the cosine, and `targets` (Q, N): 1 for a query's most influential image, falling with
its rank towards 0; outsiders have 0 (for 'mse_scores' the teacher's scores instead, standardised for each query). `weights`
(Q, N) are 0 where the teacher has said nothing of a pair. All give a scalar, lower = better, and all end in a search by
cosine: no function looks at anything else of an image than its logit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Targets that the ordinal loss asks to exceed."""
TOP = 0.02
"""Decay of what the list-wise loss gives a rank, in parts of the candidate set: rank r of C counts exp(-r / (TOP C))."""


def bce(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Binary cross-entropy with targets as probabilities. Source: arXiv:2511.10721, sec. 4 (the paper's choice)."""
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (losses * weights).sum() / weights.sum().clamp_min(1e-6)


def ordinal(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Cumulative links: the logit shifted by each threshold's own logit says whether the target exceeds it.

    Source: McCullagh, J. R. Stat. Soc. B 42 (1980), with thresholds fixed at the logits of `THRESHOLDS`.
    """
    total = logits.new_zeros(())
    for threshold in THRESHOLDS:
        shift = torch.logit(torch.tensor(threshold)).item()
        total = total + bce(logits - shift, (targets > threshold).to(logits.dtype), weights)
    return total / len(THRESHOLDS)


def mse(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Squared error of the logits themselves: regression, of ranks or of scores as the targets are."""
    return ((logits - targets).square() * weights).sum() / weights.sum().clamp_min(1e-6)


def listwise(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy between softmax of the logits and the top-weighted targets, for each query over its images.

    Source: Cao et al., ICML 2007 (ListNet), with probabilities exp(-rank / (TOP C)) instead of exp(score).
    """
    known = weights > 0
    scores = logits.masked_fill(~known, -torch.inf)
    wanted = torch.exp((targets - 1) / TOP) * weights
    wanted = wanted / wanted.sum(dim=1, keepdim=True).clamp_min(1e-6)
    found = torch.log_softmax(scores, dim=1).masked_fill(~known, 0.0)
    return -(wanted * found).sum(dim=1).mean()


LOSSES: dict[str, Loss] = {"bce": bce, "ordinal": ordinal, "mse_ranks": mse, "mse_scores": mse, "listwise": listwise}
"""By the name that a config gives."""
