"""Train the embedded feature encoder: a small CLIP on the corpus, with open_clip's own model and loss.

Reads corpus/; writes encoder/, a folder that `open_clip.create_model("local-dir:...")` loads. It stands in for the paper's
off-the-shelf encoders where no weights can be downloaded; it never sees the generator or the teacher. Source:
arXiv:2103.00020.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from fastattr.core.errors import InputError
from fastattr.core.files import atomic_path, temporary_folder, write_json
from fastattr.core.settings import at_least
from fastattr.core.stages import make
from fastattr.core.training import TrainingConfig, fit
from fastattr.corpus.store import Corpus
from fastattr.generators.scratch.autoencoder import load_images, pixel_tensor
from fastattr.generators.scratch.denoiser import tokenize, train_tokenizer


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Settings of the small CLIP."""

    embed_dim: int = 128
    """F, width of image and of text features."""
    image_size: int = 64
    patch_size: int = 16
    image_width: int = 160
    image_layers: int = 4
    text_width: int = 128
    text_layers: int = 3
    head_width: int = 32
    vocabulary: int = 3000
    max_tokens: int = 28
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=700, batch_size=128, learning_rate=1e-3, warmup_steps=100, ema_decay=0.995)
    )

    def __post_init__(self) -> None:
        widths = ("embed_dim", "image_size", "patch_size", "image_width", "text_width", "head_width")
        at_least(self, 1, *widths, "image_layers", "text_layers", "vocabulary", "max_tokens")
        if self.image_size % self.patch_size or self.image_width % self.head_width or self.text_width % self.head_width:
            raise InputError("image_size must be a multiple of patch_size, image_width and text_width of head_width")


def model_config(config: EncoderConfig, *, eos_id: int, pad_id: int, vocab_size: int) -> dict[str, Any]:
    """open_clip's `model_cfg` for this shape."""
    vision = {"image_size": config.image_size, "patch_size": config.patch_size, "width": config.image_width}
    vision |= {"layers": config.image_layers, "head_width": config.head_width}
    text: dict[str, Any] = {"context_length": config.max_tokens, "vocab_size": vocab_size, "hf_tokenizer_name": "local"}
    text |= {"width": config.text_width, "heads": config.text_width // config.head_width, "layers": config.text_layers}
    text |= {"pool_type": "eos", "eos_id": eos_id, "pad_id": pad_id}
    return {"embed_dim": config.embed_dim, "vision_cfg": vision, "text_cfg": text}


class ContrastiveLoss(nn.Module):
    """CLIP's symmetric contrastive loss; forward(images, tokens) -> scalar."""

    def __init__(self, clip: nn.Module) -> None:
        from open_clip.loss import ClipLoss

        super().__init__()
        self.clip = clip
        self._loss = ClipLoss()

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Args: images (B, 3, H, W) in [-1, 1]; tokens (B, max_tokens)."""
        image_features, text_features, scale = self.clip(images, tokens)
        return self._loss(image_features, text_features, scale.clamp(max=100.0))


def run(config: EncoderConfig, run_dir: Path) -> dict[str, Any]:
    """Train the encoder on run_dir/corpus; returns the manifest."""
    corpus, folder = Corpus(run_dir / "corpus"), run_dir / "encoder"
    inputs, checkpoint = {"corpus": corpus.fingerprint}, folder / "checkpoint.safetensors"
    accelerator = Accelerator(mixed_precision=config.training.mixed_precision)

    def work() -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        resumed = {"checkpoint": checkpoint, "made_from": [config, inputs], "accelerator": accelerator}
        clip, tokenizer, shape = _train(config, corpus, folder, **resumed)
        weights = {name: value.half().contiguous() for name, value in clip.state_dict().items()}
        if accelerator.is_main_process:
            tokenizer.save_pretrained(folder)
            preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
            write_json(folder / "open_clip_config.json", {"model_cfg": shape, "preprocess_cfg": preprocess})
            with atomic_path(folder / "open_clip_model.safetensors") as temporary:
                save_file(weights, temporary)
        return {"parameters": sum(value.numel() for value in weights.values())}

    return make(folder, work, stage="encoder", config=config, inputs=inputs, accelerator=accelerator, temporary=[checkpoint])


def _train(
    config: EncoderConfig, corpus: Corpus, folder: Path, **resumed: Any
) -> tuple[nn.Module, CLIPTokenizer, dict[str, Any]]:
    """The averaged CLIP, its tokenizer, and its shape as open_clip writes it."""
    from open_clip.model import CLIP

    images = load_images(corpus, config.image_size)
    with temporary_folder(folder) as scratch:
        captions = [captions[0] for captions in corpus.captions]
        tokenizer = train_tokenizer(captions, vocabulary=config.vocabulary, max_tokens=config.max_tokens, scratch=scratch)
    tokens = tokenize(tokenizer, captions)
    torch.manual_seed(config.training.seed)
    shape = model_config(config, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, vocab_size=len(tokenizer))
    text_shape = {key: value for key, value in shape["text_cfg"].items() if key != "hf_tokenizer_name"}
    loss_module = ContrastiveLoss(CLIP(config.embed_dim, shape["vision_cfg"], text_shape))

    def batch_of(rows: np.ndarray, generator: torch.Generator) -> tuple[Tensor, ...]:
        pixels = pixel_tensor(images[rows])
        row_shift, column_shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
        return pixels.roll((row_shift, column_shift), dims=(2, 3)), tokens[rows]

    average: Any = fit(loss_module, batch_of, config.training, **resumed, examples=len(corpus), description="encoder")
    return average.clip, tokenizer, shape
