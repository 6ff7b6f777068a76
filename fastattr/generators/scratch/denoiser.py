"""Train the text-to-image generator: a small Stable Diffusion on a corpus, from nothing.

Reads corpus/ and autoencoder/; writes generator/, a `StableDiffusionPipeline` folder that plain
`DiffusionPipeline.from_pretrained` loads. Tokenizer, text encoder and U-Net are trained here: first the text encoder alone
(text.py), then the U-Net on the frozen text encoder. v-prediction on a cosine schedule with timesteps shifted towards noise,
where the subject is decided.
Sources: arXiv:2112.10752 (latent diffusion), arXiv:2202.00512 (v-prediction), arXiv:2403.03206 (shifted timesteps).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from fastattr.core.captions import split_caption
from fastattr.core.files import (
    MANIFEST,
    finished,
    open_stage,
    read_json,
    sha256_file,
    temporary_folder,
    write_json,
    write_manifest,
)
from fastattr.core.training import TrainingConfig, fit, trapezoid
from fastattr.corpus.store import Corpus
from fastattr.generators.scratch.autoencoder import encode_latents, load_images
from fastattr.generators.scratch.prompts import PromptConfig, draw_prompt
from fastattr.generators.scratch.text import NO_STYLE, CaptionLoss, build_text_encoder, tokenize, train_tokenizer

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
    prompts: PromptConfig = field(default_factory=PromptConfig)
    timestep_shift: float = 4.0
    """s of u -> s u / (1 + (s - 1) u), u uniform and 1 the noisiest; 1 leaves timesteps uniform."""
    steps: int = 25
    """Default number of denoising steps."""
    guidance: float = 3.0
    """Default classifier-free guidance scale."""
    decay_share: float = 0.25
    """Share of the steps over which the learning rate falls to zero."""
    text_training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=1200, batch_size=256, learning_rate=2e-3, warmup_steps=50, ema_decay=0.99, optimizer="muon"
        )
    )
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=6500,
            batch_size=256,
            learning_rate=5e-3,
            warmup_steps=100,
            ema_decay=0.998,
            checkpoint_every=250,
            optimizer="muon",
        )
    )


def build_denoiser(
    config: GeneratorConfig, *, tokenizer: CLIPTokenizer, latent_channels: int, latent_side: int
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """An untrained U-Net and text encoder with `config`'s shape."""
    levels = range(len(config.channels))
    unet = UNet2DConditionModel(
        sample_size=latent_side,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=tuple(
            "CrossAttnDownBlock2D" if level in config.attention_levels else "DownBlock2D" for level in levels
        ),
        up_block_types=tuple(
            "CrossAttnUpBlock2D" if level in config.attention_levels else "UpBlock2D" for level in reversed(levels)
        ),
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        attention_head_dim=tuple(
            width // config.head_width for width in config.channels
        ),  # diffusers reads it as the number of heads
        cross_attention_dim=config.text_width,
        norm_num_groups=config.norm_groups,
    )
    unet.set_attn_processor(AttnProcessor())  # as for the text encoder: plain products are faster here
    return unet, build_text_encoder(tokenizer, width=config.text_width, layers=config.text_layers, head_width=config.head_width)


def build_scheduler() -> DDIMScheduler:
    """v-prediction on a cosine schedule, sampled from its noisiest step ('trailing')."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


class DenoiserLoss(nn.Module):
    """v-prediction loss of U-Net and text encoder; forward(latents, tokens, timesteps, noise) -> scalar."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self._scheduler = scheduler
        self._encoded: dict[bytes, torch.Tensor] = {}

    def noisy_and_target(
        self, latents: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L, h, w) latents with noise, and the v that the U-Net is to predict of them."""
        noisy: torch.Tensor = self._scheduler.add_noise(latents, noise, timesteps)
        target: torch.Tensor = self._scheduler.get_velocity(latents, noise, timesteps)
        return noisy, target

    @torch.no_grad()
    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, max_tokens, W) of (B, max_tokens) tokens by the frozen text encoder, which sees a prompt once in a while only."""
        keys = [row.tobytes() for row in tokens.cpu().numpy()]
        if len(self._encoded) > MOST_ENCODED:
            self._encoded.clear()
        new = {key: row for row, key in enumerate(keys) if key not in self._encoded}
        if new:
            hidden = self.text_encoder(tokens[list(new.values())]).last_hidden_state.to(torch.bfloat16)
            self._encoded |= dict(zip(new, hidden, strict=True))
        return torch.stack([self._encoded[key] for key in keys])

    def predict(self, noisy: torch.Tensor, tokens: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """(B, L, h, w) predicted v."""
        text = self.encode(tokens).to(noisy.dtype)
        prediction: torch.Tensor = self.unet(noisy, timesteps, encoder_hidden_states=text).sample
        return prediction

    def forward(
        self, latents: torch.Tensor, tokens: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Args: latents and noise (B, L, h, w), scaled; tokens (B, max_tokens); timesteps (B,)."""
        noisy, target = self.noisy_and_target(latents, timesteps, noise)
        return F.mse_loss(self.predict(noisy, tokens, timesteps).float(), target)


class TrainingExamples:
    """Latents and captions of a corpus, and batches of them as text encoder and denoiser are trained on them."""

    def __init__(
        self,
        latents: torch.Tensor,
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
        self._tokenizer, self._prompts = tokenizer, config.prompts
        self._shift, self._timesteps = config.timestep_shift, timesteps

    def prompts_of(self, rows: np.ndarray, generator: torch.Generator) -> list[str]:
        """(B,) prompts for these (B,) rows."""
        random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        return [draw_prompt(self.captions[row], self._prompts, random) for row in rows]

    def captions_of(self, rows: np.ndarray, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """What `CaptionLoss` takes: tokens (B, max_tokens), latents (B, L, h, w), subjects (B,) and styles (B,)."""
        prompts = self.prompts_of(rows, generator)
        named = torch.tensor([bool(split_caption(prompt)[1]) or prompt in self.styles for prompt in prompts])
        styles = torch.where(named, self._style[rows], NO_STYLE)
        return tokenize(self._tokenizer, prompts), self.latents[rows], self._subject[rows], styles

    def batch_of(self, rows: np.ndarray, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Latents (B, L, h, w), tokens (B, max_tokens), timesteps (B,) and noise (B, L, h, w) of these (B,) rows."""
        picked, prompts = self.latents[rows], self.prompts_of(rows, generator)
        # One timestep from each of B equal parts: the same law with less variance over the batch.
        stratum = torch.randperm(len(rows), generator=generator) + torch.rand(len(rows), generator=generator)
        share = stratum / len(rows)
        share = self._shift * share / (1 + (self._shift - 1) * share)
        timesteps = (share * self._timesteps).long().clamp_max(self._timesteps - 1)
        return picked, tokenize(self._tokenizer, prompts), timesteps, torch.randn(picked.shape, generator=generator)


def _tidy_configs(folder: Path) -> None:
    """Take the path that a part was loaded from out of the saved configs, and name float32 as the precision to load in.

    The path names a folder of one machine. transformers obeys the stored precision and diffusers loads float32, so that
    a plain `DiffusionPipeline.from_pretrained` would put together parts that do not fit.
    """
    for path in [folder / "model_index.json", *folder.glob("*/config.json")]:
        saved = read_json(path)
        kept = {key: value for key, value in saved.items() if key != "_name_or_path"}
        write_json(path, kept | {"dtype": "float32"} if "dtype" in kept else kept)


def train_text_encoder(
    text_encoder: CLIPTextModel,
    examples: TrainingExamples,
    config: GeneratorConfig,
    *,
    checkpoint: Path,
    made_from: object,
    accelerator: Accelerator,
) -> CLIPTextModel:
    """A copy of the text encoder, trained to foretell what prompts look like; see text.py."""
    average = fit(
        CaptionLoss(
            text_encoder,
            latent_shape=examples.latents.shape[1:],
            subjects=len(examples.subjects),
            styles=len(examples.styles),
            name_weight=config.name_weight,
        ),
        examples.captions_of,
        config.text_training,
        examples=len(examples.captions),
        checkpoint=checkpoint,
        made_from=made_from,
        accelerator=accelerator,
        description="text encoder",
    )
    trained: CLIPTextModel = average.text_encoder  # type: ignore[assignment]
    return trained


def run(config: GeneratorConfig, run_dir: Path) -> dict[str, Any]:
    """Train the generator on run_dir/corpus with run_dir/autoencoder; returns the manifest."""
    corpus = Corpus(run_dir / "corpus")
    autoencoder_manifest = open_stage(run_dir / "autoencoder", "autoencoder")
    folder = run_dir / "generator"
    inputs = {"corpus": corpus.fingerprint, "autoencoder": autoencoder_manifest["fingerprint"]}
    if finished(folder, stage="generator", config=config, inputs=inputs):
        manifest: dict[str, Any] = read_json(folder / MANIFEST)
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=config.training.mixed_precision)
    autoencoder = AutoencoderKL.from_pretrained(run_dir / "autoencoder").to(accelerator.device)
    images = load_images(corpus, autoencoder.config.sample_size)
    latents = encode_latents(autoencoder, images) * autoencoder.config.scaling_factor
    with temporary_folder(folder) as scratch:
        tokenizer = train_tokenizer(
            (caption for captions in corpus.captions for caption in captions),
            vocabulary=config.vocabulary,
            max_tokens=config.max_tokens,
            scratch=scratch,
        )
    torch.manual_seed(config.training.seed)
    scheduler = build_scheduler()
    examples = TrainingExamples(latents, corpus.captions, tokenizer, config, scheduler.config.num_train_timesteps)
    unet, text_encoder = build_denoiser(
        config, tokenizer=tokenizer, latent_channels=latents.shape[1], latent_side=latents.shape[2]
    )
    made_from = [{**vars(config), "training": None, "steps": None, "guidance": None}, inputs]
    text_checkpoint, checkpoint = folder / "checkpoint-text.safetensors", folder / "checkpoint.safetensors"
    text_encoder = train_text_encoder(
        text_encoder, examples, config, checkpoint=text_checkpoint, made_from=made_from, accelerator=accelerator
    )
    average = fit(
        DenoiserLoss(unet.to(memory_format=torch.channels_last), text_encoder.requires_grad_(False), scheduler),
        examples.batch_of,
        config.training,
        examples=len(corpus),
        checkpoint=checkpoint,
        made_from=made_from,
        accelerator=accelerator,
        schedule=trapezoid(config.decay_share),
        description="generator",
    )
    assert isinstance(average, DenoiserLoss)
    if accelerator.is_main_process:
        pipeline = StableDiffusionPipeline(
            vae=autoencoder,
            text_encoder=average.text_encoder,
            tokenizer=tokenizer,
            unet=average.unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        # Half precision is what ships, so it is also what later stages score and measure.
        pipeline.to(dtype=torch.float16).save_pretrained(folder)
        _tidy_configs(folder)
        checkpoints = (text_checkpoint, checkpoint)
        write_manifest(
            folder,
            stage="generator",
            config=config,
            inputs=inputs,
            corpus_fingerprint=corpus.fingerprint,
            sha256={
                path.relative_to(folder).as_posix(): sha256_file(path)
                for path in sorted(folder.rglob("*.safetensors"))
                if path not in checkpoints
            },
            defaults={"steps": config.steps, "guidance": config.guidance},
            unet_parameters=sum(parameter.numel() for parameter in average.unet.parameters()),
            text_parameters=sum(parameter.numel() for parameter in average.text_encoder.parameters()),
        )
        for path in checkpoints:
            path.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    manifest = read_json(folder / MANIFEST)
    return manifest
