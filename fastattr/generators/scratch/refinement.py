"""Refine a trained generator: draw styles more surely, for plain classifier-free guidance to amplify.

A trained denoiser knows what a style adds to a subject: the difference between its predictions for 'red heart, openmoji style'
and for 'red heart'. The second phase of training moves its targets along that difference, as the averaged weights of
the first phase give it, so that the finished pipeline needs no sampler of its own. Part of the batches asks for subjects in
styles that they do not come in; there the first phase's own prediction stands in for the target that no image gives.
Source: the idea of guidance in the training target is arXiv:2502.12154 (model guidance); the frozen direction, guidance
by the style alone and recombined prompts are ours.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from fastattr.core.captions import recombinations, recombine, split_caption
from fastattr.core.errors import InputError
from fastattr.core.training import TrainingConfig, fit, trapezoid

if TYPE_CHECKING:
    from fastattr.generators.scratch.denoiser import DenoiserLoss, TrainingExamples


@dataclass(frozen=True, kw_only=True)
class RefinementConfig:
    """Settings of the second phase of a generator's training; batch size, precision and seed are those of the first."""

    steps: int = 0
    """Optimiser steps; 0 leaves the phase out."""
    learning_rate: float = 6e-4
    """Reached after `warmup_steps`, then falling linearly to zero."""
    warmup_steps: int = 50
    ema_decay: float = 0.995
    style_guidance: float = 1.0
    """How far a target moves along what the style adds; at guidance w a drawing moves w times as far."""
    recombined_share: float = 0.2
    """Share of examples whose prompt puts a subject into a style that it does not come in."""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise InputError(f"refinement.steps must be at least 0, got {self.steps}")
        if not 0 <= self.recombined_share < 1:
            raise InputError(f"refinement.recombined_share must be in [0, 1), got {self.recombined_share}")


def is_refined_on(prompt: str) -> bool:
    """Whether a recombined prompt is one of the half that refinement uses; judge a refined generator by the other half.

    Depends on the prompt alone.
    """
    return hashlib.sha256(f"refinement {prompt}".encode()).digest()[0] < 128


class RefinementLoss(nn.Module):
    """MSE against targets with a style's guidance; forward(latents, tokens, timesteps, noise, subjects, guided, invented)."""

    def __init__(self, denoiser: DenoiserLoss, guidance: float) -> None:
        """Train `denoiser`; a frozen copy of it as it is now gives the directions.

        Args:
            denoiser: with the first phase's averaged weights.
            guidance: `RefinementConfig.style_guidance`.
        """
        super().__init__()
        self.denoiser = denoiser
        self._guidance = guidance
        # In a tuple, so that it is no part of what is trained, averaged and saved.
        self._teacher = (copy.deepcopy(denoiser).requires_grad_(False).eval(),)

    def forward(
        self,
        latents: torch.Tensor,
        tokens: torch.Tensor,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
        subjects: torch.Tensor,
        guided: torch.Tensor,
        invented: torch.Tensor,
    ) -> torch.Tensor:
        """Scalar loss.

        Args:
            latents, noise: (B, L, h, w), latents scaled.
            tokens: (B, max_tokens) of the prompts.
            timesteps: (B,).
            subjects: (B, max_tokens) of the prompts without their style.
            guided: (B,) bool, whose target moves along what the style adds.
            invented: (B,) bool, of which no image gives a target; guided too.
        """
        noisy, target = self.denoiser.noisy_and_target(latents, timesteps, noise)
        if guided.any():
            with torch.no_grad():
                whole, subject = (
                    self._teacher[0].predict(noisy[guided], text[guided], timesteps[guided]).float()
                    for text in (tokens, subjects)
                )
                own = torch.where(invented[guided].view(-1, 1, 1, 1), whole, target[guided])
                target[guided] = own + self._guidance * (whole - subject)
        return F.mse_loss(self.denoiser.predict(noisy, tokens, timesteps).float(), target)


def refine(
    denoiser: DenoiserLoss,
    examples: TrainingExamples,
    config: RefinementConfig,
    training: TrainingConfig,
    *,
    tokens_of: Callable[[Sequence[str]], torch.Tensor],
    checkpoint: Path,
    made_from: object,
    accelerator: Accelerator,
) -> DenoiserLoss:
    """Train on with guided targets; returns the averaged weights.

    Args:
        denoiser: with the first phase's averaged weights.
        examples: what the first phase was trained on.
        config: this phase's settings.
        training: the first phase's, of which batch size, precision, seed and the like are kept.
        tokens_of: prompts -> (B, max_tokens) token ids.
        checkpoint: safetensors file to resume from and write to.
        made_from: whatever else determines the run, see `fit`.
        accelerator: device, precision and processes.

    Raises:
        InputError: no caption has a style.
    """
    captions = examples.captions
    styles = [split_caption(caption)[1] for caption in captions]
    if not any(styles):
        raise InputError("refinement needs captions like 'SUBJECT, STYLE', and none has a comma; set refinement.steps to 0.")
    pairs = [(row, style) for row, style in recombinations(captions) if is_refined_on(recombine(captions[row], style))]
    share = config.recombined_share if pairs else 0.0
    pair_rows = torch.tensor([row for row, _ in pairs], dtype=torch.int64)
    pair_tokens = tokens_of([recombine(captions[row], style) for row, style in pairs]) if pairs else examples.tokens[:0]
    of_style = {style: np.flatnonzero(np.array(styles) == style) for style in set(styles)}

    def batch_of(rows: np.ndarray, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        latents, tokens, timesteps, noise = examples.batch_of(rows, generator)
        subjects = examples.subjects[rows]
        guided = (tokens == examples.tokens[rows]).all(dim=1) & (tokens != subjects).any(dim=1)
        invented = torch.arange(len(rows)) < round(share * len(rows))
        for position in torch.nonzero(invented).ravel().tolist():
            pair = int(torch.randint(len(pairs), (), generator=generator))
            like = of_style[pairs[pair][1]]
            # Half of them start from the subject as another style has it, half from another subject in the style.
            other = int(like[int(torch.randint(len(like), (), generator=generator))])
            source = other if position % 2 else int(pair_rows[pair])
            latents[position], tokens[position] = examples.latents[source], pair_tokens[pair]
            subjects[position] = examples.subjects[pair_rows[pair]]
        return latents, tokens, timesteps, noise, subjects, guided | invented, invented

    average = fit(
        RefinementLoss(denoiser.to(accelerator.device), config.style_guidance),  # its frozen copy moves with nothing else
        batch_of,
        replace(
            training,
            steps=config.steps,
            learning_rate=config.learning_rate,
            warmup_steps=config.warmup_steps,
            ema_decay=config.ema_decay,
            seed=training.seed + 1,
        ),
        examples=len(captions),
        checkpoint=checkpoint,
        made_from=[made_from, vars(config)],
        accelerator=accelerator,
        schedule=trapezoid(1.0),
        description="refinement",
    )
    refined: DenoiserLoss = average.denoiser  # type: ignore[assignment]
    return refined
