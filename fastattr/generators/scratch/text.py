"""The generator's text encoder: a small CLIP text model with its own BPE vocabulary, trained before the denoiser.

It learns to say what a captioned training image looks like, of what and in which style: a linear map of its last tokens is
to give the image's latents, two others the subject and the style. Then it is frozen: denoising steps are what costs, and
two prompts that it cannot tell apart no denoiser could.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

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
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    captions = list(captions)
    split = (bpe.pre_tokenizer.pre_tokenize_str(bpe.normalizer.normalize_str(caption)) for caption in captions)
    # The trainer numbers a word's last letters in an order of its own in every process, and breaks ties by these numbers.
    ends = sorted({word[-1] + "</w>" for words in split for word, _ in words})
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[START, END, *ends],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in learned["merges"]]
    (scratch / "vocab.json").write_text(json.dumps(learned["vocab"], ensure_ascii=False), encoding="utf-8")
    (scratch / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(scratch, model_max_length=max_tokens, pad_token=END)


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """(B, max_tokens) token ids, padded and truncated as StableDiffusionPipeline does."""
    encoded = tokenizer(
        list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return encoded.input_ids


def build_text_encoder(tokenizer: CLIPTokenizer, *, max_tokens: int, width: int, layers: int, head_width: int) -> CLIPTextModel:
    """An untrained text encoder for this tokenizer's prompts."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // head_width,
            max_position_embeddings=max_tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=width,
        )
    )
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
