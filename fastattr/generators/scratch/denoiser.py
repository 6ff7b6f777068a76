"""The generator's networks: a small CLIP text model with its own BPE vocabulary, a small U-Net, and their losses.

The text encoder is trained first, to say what a captioned training image looks like, of what and in which style: a linear map
    of
its last tokens is to give the image's latents, two others the subject and the style. Then it is frozen: denoising steps are
    what
costs, and two prompts that it cannot tell apart no denoiser could. The U-Net predicts v on a cosine schedule. Sources:
arXiv:2112.10752 (latent diffusion), arXiv:2202.00512 (v-prediction).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fastattr.core.errors import InputError
from fastattr.core.settings import at_least
from fastattr.core.training import TrainingConfig

START, END = "<|startoftext|>", "<|endoftext|>"
SLOTS = 8
"""Last tokens, of most prompts padding, that together tell what the image looks like."""
NO_STYLE = -100
"""Class of a prompt that names no style; cross-entropy leaves it out."""


def train_tokenizer(captions: Iterable[str], *, vocabulary: int, max_tokens: int, scratch: Path) -> CLIPTokenizer:
    """Learn a lower-casing BPE vocabulary and wrap it as the CLIP tokenizer that Stable Diffusion expects."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    splitters = [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(splitters)
    captions = list(captions)
    split = (bpe.pre_tokenizer.pre_tokenize_str(bpe.normalizer.normalize_str(caption)) for caption in captions)
    # The trainer numbers a word's last letters in an order of its own in every process, and breaks ties by these numbers.
    ends = sorted({word[-1] + "</w>" for words in split for word, _ in words})
    known: dict[str, Any] = {"special_tokens": [START, END, *ends], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, **known, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(captions, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in learned["merges"]]
    (scratch / "vocab.json").write_text(json.dumps(learned["vocab"], ensure_ascii=False), encoding="utf-8")
    (scratch / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(scratch, model_max_length=max_tokens, pad_token=END)


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """(B, max_tokens) token ids, padded and truncated as StableDiffusionPipeline does."""
    fixed = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    return tokenizer(list(prompts), **fixed, return_tensors="pt").input_ids


def build_text_encoder(tokenizer: CLIPTokenizer, *, max_tokens: int, width: int, layers: int, head_width: int) -> CLIPTextModel:
    """An untrained text encoder for this tokenizer's prompts."""
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": width // head_width, "max_position_embeddings": max_tokens, "vocab_size": len(tokenizer)}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text_encoder = CLIPTextModel(CLIPTextConfig(**shape, **ids))
    # With so few tokens, plain products train faster on a CPU in bfloat16 than fused attention, which computes the same.
    text_encoder.set_attn_implementation("eager")
    return text_encoder


class CaptionLoss(nn.Module):
    """Squared error of the latents that a prompt foretells, plus cross-entropy of its subject and style.

    forward(tokens, latents, subjects, styles) -> scalar
    """

    def __init__(
        self, text_encoder: CLIPTextModel, *, latent_shape: Sequence[int], subjects: int, styles: int, name_weight: float
    ) -> None:
        super().__init__()
        width = text_encoder.config.hidden_size
        self.text_encoder = text_encoder
        self._slots = min(SLOTS, text_encoder.config.max_position_embeddings)
        self.picture = nn.Linear(self._slots * width, int(torch.tensor(latent_shape).prod()))
        self.subject, self.style = nn.Linear(width, subjects), nn.Linear(width, max(1, styles))
        self._name_weight = name_weight

    def foretell(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (B, L x h x w) and logits (B, subjects) and (B, styles) of (B, max_tokens) tokens."""
        hidden = self.text_encoder(tokens).last_hidden_state
        return self.picture(hidden[:, -self._slots :].flatten(1)), self.subject(hidden[:, -1]), self.style(hidden[:, -1])

    def forward(self, tokens: Tensor, latents: Tensor, subjects: Tensor, styles: Tensor) -> Tensor:
        """Args: tokens (B, max_tokens); latents (B, L, h, w), scaled; classes (B,), `NO_STYLE` where there is none."""
        picture, subject_logits, style_logits = self.foretell(tokens)
        named = F.cross_entropy(subject_logits.float(), subjects)
        if (styles != NO_STYLE).any():
            named = named + F.cross_entropy(style_logits.float(), styles, ignore_index=NO_STYLE)
        return F.mse_loss(picture.float(), latents.flatten(1)) + self._name_weight * named


MOST_ENCODED = 100_000
"""Encoded prompts that are kept while the denoiser is trained: 1 GB at 20 tokens of 256 numbers."""


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Settings of the denoiser and its text encoder."""

    channels: tuple[int, ...] = (96, 160, 128)
    """U-Net width at each resolution level."""
    layers_per_block: int = 1
    attention_levels: tuple[int, ...] = (1,)
    """Levels with self- and cross-attention, besides the middle block."""
    head_width: int = 32
    """Width of an attention head; 8 is ten times slower on a CPU."""
    norm_groups: int = 8
    """Groups of a group normalisation; few channels a group are slow on a CPU."""
    vocabulary: int = 4000
    """Size of the BPE vocabulary learned from the captions."""
    max_tokens: int = 20
    text_width: int = 256
    text_layers: int = 3
    name_weight: float = 0.1
    """Of subject and style in the text encoder's loss, beside the latents."""
    caption_dropout: float = 0.1
    """Share of training examples that see an empty prompt."""
    subject_dropout: float = 0.05
    """Share of training examples that see only what follows their caption's last comma ('openmoji style'), so that a
    style is learned apart from the subjects that come in it."""
    style_dropout: float = 0.2
    """Of the others: share that sees only what comes before their caption's last comma ('red heart'), so that a subject is
    learned apart from its styles, and prompts that name no style are known."""
    other_captions: float = 0.3
    """Of the others: share that sees a caption other than the first, where there is one."""
    rewritten: float = 0.15
    """Of the others: share whose caption has an article, a plural or a slip of the keyboard."""
    timestep_shift: float = 4.0
    """s of u -> s u / (1 + (s - 1) u), u uniform and 1 the noisiest; 1 leaves timesteps uniform."""
    steps: int = 25
    """Default number of denoising steps."""
    guidance: float = 3.0
    """Default classifier-free guidance scale."""
    compiled: bool = False
    """Whether to train the U-Net through torch.compile: it takes some minutes first, and saves time on a CPU with AMX
    (docs/emoji.md). It may be changed while a training is under way."""
    decay_share: float = 0.3
    """Share of the steps over which the learning rate falls to zero."""
    text_training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=1000, batch_size=256, learning_rate=3e-3, warmup_steps=50, ema_decay=0.99, optimizer="muon"
        )
    )
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=6000, batch_size=256, learning_rate=5e-3, warmup_steps=100, ema_decay=0.998, optimizer="muon"
        )
    )

    def __post_init__(self) -> None:
        at_least(self, 1, "channels", "layers_per_block", "head_width", "norm_groups", "vocabulary", "text_width")
        at_least(self, 1, "text_layers", "steps", "timestep_shift")
        at_least(self, 3, "max_tokens")  # begin, a word, end
        of_all = self.caption_dropout + self.subject_dropout
        if max(self.style_dropout, self.other_captions, self.rewritten, self.decay_share) > 1 or of_all >= 1:
            raise InputError("shares must be at most 1, and caption_dropout and subject_dropout add up to less than 1")
        if any(level >= len(self.channels) for level in self.attention_levels):
            raise InputError(f"attention_levels are positions in channels, 0 to {len(self.channels) - 1}")


def build_denoiser(
    config: GeneratorConfig, *, tokenizer: CLIPTokenizer, latent_channels: int, latent_side: int
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """An untrained U-Net and text encoder with `config`'s shape."""
    crossed = [level in config.attention_levels for level in range(len(config.channels))]
    latents = {"sample_size": latent_side, "in_channels": latent_channels, "out_channels": latent_channels}
    unet = UNet2DConditionModel(
        **latents,
        down_block_types=tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in crossed),
        up_block_types=tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(crossed)),
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        attention_head_dim=tuple(width // config.head_width for width in config.channels),  # diffusers: the number of heads
        cross_attention_dim=config.text_width,
        norm_num_groups=config.norm_groups,
    )
    unet.set_attn_processor(AttnProcessor())  # as for the text encoder: plain products are faster here
    shape = {"max_tokens": config.max_tokens, "width": config.text_width, "layers": config.text_layers}
    return unet, build_text_encoder(tokenizer, **shape, head_width=config.head_width)


def build_scheduler() -> DDIMScheduler:
    """v-prediction on a cosine schedule, sampled from its noisiest step ('trailing')."""
    trained = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    return DDIMScheduler(**trained, timestep_spacing="trailing", clip_sample=False, steps_offset=1)


class DenoiserLoss(nn.Module):
    """v-prediction loss of U-Net and text encoder; forward(latents, tokens, timesteps, noise) -> scalar."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self._scheduler = scheduler
        self._encoded: dict[bytes, Tensor] = {}

    def noisy_and_target(self, latents: Tensor, timesteps: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, h, w) latents with noise, and the v that the U-Net is to predict of them."""
        drawn = (latents, noise, timesteps)
        return self._scheduler.add_noise(*drawn), self._scheduler.get_velocity(*drawn)

    def encode(self, tokens: Tensor) -> Tensor:
        """(B, max_tokens, W) of (B, max_tokens) tokens; a frozen text encoder is not asked twice for a prompt."""
        if next(self.text_encoder.parameters()).requires_grad:
            return self.text_encoder(tokens).last_hidden_state
        keys = [row.tobytes() for row in tokens.cpu().numpy()]
        if len(self._encoded) > MOST_ENCODED:
            self._encoded.clear()
        new = {key: row for row, key in enumerate(keys) if key not in self._encoded}
        if new:
            hidden = self.text_encoder(tokens[list(new.values())]).last_hidden_state.to(torch.bfloat16)
            self._encoded |= dict(zip(new, hidden, strict=True))
        return torch.stack([self._encoded[key] for key in keys])

    def predict(self, noisy: Tensor, tokens: Tensor, timesteps: Tensor) -> Tensor:
        """(B, L, h, w) predicted v."""
        text = self.encode(tokens).to(noisy.dtype)
        return self.unet(noisy, timesteps, encoder_hidden_states=text).sample

    def forward(self, latents: Tensor, tokens: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Args: latents and noise (B, L, h, w), scaled; tokens (B, max_tokens); timesteps (B,)."""
        noisy, target = self.noisy_and_target(latents, timesteps, noise)
        return F.mse_loss(self.predict(noisy, tokens, timesteps).float(), target)
