"""Losses of the student: one short function each, on the matrix of a batch's queries and training images.

All take `logits` (Q, N), which rise with the cosine, and `targets` (Q, N): 1 for a query's most influential image, falling with
its rank towards 0; outsiders have 0 (for 'mse_scores' the teacher's scores instead, standardised for each query). `weights`
(Q, N) are 0 where the teacher has said nothing of a pair. All give a scalar, lower = better, and all end in a search by
cosine: no function looks at anything else of an image than its logit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Targets that the ordinal loss asks to exceed."""
TOP = 0.02
"""Decay of what top-weighted losses give a rank, in parts of the candidate set: rank r of C counts exp(-r / (TOP C))."""
POSITIVE = 0.95
"""Targets above it are the positives of the margin loss; below half, the negatives."""
HARD = 64
"""Of the student's own nearest images in the batch, how many a ranking loss looks at."""
MARGIN = 1.0
"""By how much, in logits, a positive should exceed a hard negative."""


def bce(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy with targets as probabilities. Source: arXiv:2511.10721, sec. 4 (the paper's choice)."""
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (losses * weights).sum() / weights.sum().clamp_min(1e-6)


def ordinal(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cumulative links: the logit shifted by each threshold's own logit says whether the target exceeds it.

    Source: McCullagh, J. R. Stat. Soc. B 42 (1980), with thresholds fixed at the logits of `THRESHOLDS`.
    """
    total = logits.new_zeros(())
    for threshold in THRESHOLDS:
        shift = torch.logit(torch.tensor(threshold)).item()
        total = total + bce(logits - shift, (targets > threshold).to(logits.dtype), weights)
    return total / len(THRESHOLDS)


def mse(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Squared error of the logits themselves: regression, of ranks or of scores as the targets are."""
    return ((logits - targets).square() * weights).sum() / weights.sum().clamp_min(1e-6)


def listwise(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross-entropy between softmax of the logits and the top-weighted targets, for each query over its images.

    Source: Cao et al., ICML 2007 (ListNet), with probabilities exp(-rank / (TOP C)) instead of exp(score).
    """
    known = weights > 0
    scores = logits.masked_fill(~known, -torch.inf)
    wanted = torch.exp((targets - 1) / TOP) * weights
    wanted = wanted / wanted.sum(dim=1, keepdim=True).clamp_min(1e-6)
    found = torch.log_softmax(scores, dim=1).masked_fill(~known, 0.0)
    return -(wanted * found).sum(dim=1).mean()


def margin(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Positives must exceed the hardest negatives, those that the student itself holds nearest, by a margin (smooth hinge).

    Source: Schroff et al., CVPR 2015 (hard negatives within the batch).
    """
    known = weights > 0
    count = min(HARD, logits.shape[1])
    hard = logits.masked_fill(~known | (targets >= 0.5), -torch.inf).topk(count, dim=1).values  # (Q, H)
    best = targets.masked_fill(~known, -1.0).topk(count, dim=1)
    positive = logits.gather(1, best.indices)
    valid = (best.values > POSITIVE)[:, :, None] & torch.isfinite(hard)[:, None, :]
    gaps = torch.where(valid, hard[:, None, :] - positive[:, :, None] + MARGIN, torch.zeros((), dtype=logits.dtype))
    return (F.softplus(gaps) * valid).sum() / valid.sum().clamp_min(1)


def lambdarank(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Pairs of images in the wrong order, weighted by what exchanging them would change in a top-weighted NDCG.

    Pairs are of the student's nearest images in the batch and the teacher's best ones.
    Source: Burges, MSR-TR-2010-82 (LambdaRank as a loss: Wang et al., CIKM 2018), with gains exp(-rank / (TOP C)).
    """
    known = weights > 0
    masked = logits.masked_fill(~known, -torch.inf)
    count = min(HARD, logits.shape[1])
    with torch.no_grad():
        places = torch.empty_like(masked, dtype=torch.long)
        order = masked.argsort(dim=1, descending=True)
        places.scatter_(1, order, torch.arange(logits.shape[1], device=logits.device).expand_as(order))
        picked = torch.cat([order[:, :count], targets.masked_fill(~known, -1.0).topk(count, dim=1).indices], dim=1)
        wanted = targets.gather(1, picked)
        valid = known.gather(1, picked)
        gain = torch.exp((wanted - 1) / TOP)
        discount = 1 / torch.log2(places.gather(1, picked) + 2.0)
        change = (gain[:, :, None] - gain[:, None, :]).abs() * (discount[:, :, None] - discount[:, None, :]).abs()
        change *= (wanted[:, :, None] > wanted[:, None, :]) & valid[:, :, None] & valid[:, None, :]
    chosen = logits.gather(1, picked)
    return (F.softplus(chosen[:, None, :] - chosen[:, :, None]) * change).sum() / change.sum().clamp_min(1e-6)


LOSSES: dict[str, Loss] = {
    "bce": bce,
    "ordinal": ordinal,
    "mse_ranks": mse,
    "mse_scores": mse,
    "listwise": listwise,
    "margin": margin,
    "lambdarank": lambdarank,
}
"""By the name that a config gives."""
