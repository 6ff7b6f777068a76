"""Training examples of the generator: latents of a corpus, each under a prompt that is drawn anew every time.

Timesteps are shifted towards noise, where the subject is decided (arXiv:2403.03206).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from fastattr.core.captions import split_caption
from fastattr.generators.scratch.denoiser import GeneratorConfig
from fastattr.generators.scratch.prompts import draw_prompt, rows_without_style
from fastattr.generators.scratch.text import NO_STYLE, tokenize


class TrainingExamples:
    """Latents and captions of a corpus, and batches of them as text encoder and denoiser are trained on them."""

    def __init__(
        self,
        latents: Tensor,
        captions: Sequence[Sequence[str]],
        tokenizer: CLIPTokenizer,
        config: GeneratorConfig,
        timesteps: int,
    ) -> None:
        """Number subjects and styles.

        Args:
            latents: (N, L, h, w), scaled.
            captions: (N,) of at least one each, the main one first.
            tokenizer: the generator's.
            config: for prompts and timesteps.
            timesteps: of the noise schedule.
        """
        self.latents, self.captions = latents, [list(of_image) for of_image in captions]
        names, styles = zip(*(split_caption(of_image[0]) for of_image in captions), strict=True)
        self.subjects, self.styles = sorted(set(names)), sorted(set(styles) - {""})
        self._subject = torch.tensor([self.subjects.index(name) for name in names])
        self._style = torch.tensor([self.styles.index(style) if style else NO_STYLE for style in styles])
        self.tokenizer, self._config = tokenizer, config
        self._without_style = rows_without_style(self.captions)
        self._shift, self._timesteps = config.timestep_shift, timesteps

    def prompts_of(self, rows: np.ndarray, generator: torch.Generator) -> tuple[list[str], np.ndarray]:
        """(B,) prompts, and the (B,) rows that they ask for: the given ones, but for prompts that name no style."""
        random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        drawn = [draw_prompt(self.captions[row], self._config, random) for row in rows]
        asked = [self._without_style[alone] if alone else row for (_, alone), row in zip(drawn, rows, strict=True)]
        return [prompt for prompt, _ in drawn], np.array(asked)

    def captions_of(self, rows: np.ndarray, generator: torch.Generator) -> tuple[Tensor, ...]:
        """What `CaptionLoss` takes: tokens (B, max_tokens), latents (B, L, h, w), subjects (B,) and styles (B,)."""
        prompts, rows = self.prompts_of(rows, generator)
        styles = torch.where(torch.tensor([bool(prompt) for prompt in prompts]), self._style[rows], NO_STYLE)
        return tokenize(self.tokenizer, prompts), self.latents[rows], self._subject[rows], styles

    def batch_of(self, rows: np.ndarray, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Latents (B, L, h, w), tokens (B, max_tokens), timesteps (B,) and noise (B, L, h, w) of these (B,) rows."""
        prompts, rows = self.prompts_of(rows, generator)
        picked = self.latents[rows]
        # One timestep from each of B equal parts: the same law with less variance over the batch.
        stratum = torch.randperm(len(rows), generator=generator) + torch.rand(len(rows), generator=generator)
        share = stratum / len(rows)
        share = self._shift * share / (1 + (self._shift - 1) * share)
        timesteps = (share * self._timesteps).long().clamp_max(self._timesteps - 1)
        return picked, tokenize(self.tokenizer, prompts), timesteps, torch.randn(picked.shape, generator=generator)
