"""Train the text-to-image generator: a small Stable Diffusion on a corpus, from nothing.

Reads corpus/ and autoencoder/; writes generator/, a `StableDiffusionPipeline` folder that plain
`DiffusionPipeline.from_pretrained` loads. Tokenizer, text encoder and U-Net are trained here; the text encoder
together with the U-Net. v-prediction on a cosine schedule, captions dropped at a set rate for classifier-free guidance;
then, if wanted, a second phase that makes styles surer (refine_generator.py).
Sources: arXiv:2112.10752 (latent diffusion), arXiv:2202.00512 (v-prediction), arXiv:2207.12598 (guidance).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
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
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fastattr.core.captions import split_caption
from fastattr.core.errors import InputError
from fastattr.core.files import read_json, sha256_file, temporary_folder, write_json
from fastattr.core.settings import at_least
from fastattr.core.stages import MANIFEST, finished, open_stage, write_manifest
from fastattr.core.training import TrainingConfig, fit, trapezoid
from fastattr.corpus.store import Corpus
from fastattr.generators.scratch.autoencoder import encode_latents, load_images
from fastattr.generators.scratch.refinement import RefinementConfig, refine

START, END = "<|startoftext|>", "<|endoftext|>"


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
    vocabulary: int = 3000
    """Size of the BPE vocabulary learned from the captions."""
    max_tokens: int = 24
    text_width: int = 192
    text_layers: int = 2
    caption_dropout: float = 0.1
    """Share of training examples that see an empty prompt."""
    subject_dropout: float = 0.1
    """Share of training examples that see only what follows their caption's last comma ('openmoji style'), so that a
    style is learned apart from the subjects that come in it."""
    style_dropout: float = 0.05
    """Share of training examples that see only what comes before their caption's last comma ('red heart'), so that a
    subject is learned apart from its styles, and prompts that name no style are known."""
    steps: int = 25
    """Default number of denoising steps."""
    guidance: float = 2.5
    """Default classifier-free guidance scale."""
    decay_share: float = 0.25
    """Share of the steps over which the learning rate falls to zero."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=6500, batch_size=128, learning_rate=1.3e-3, warmup_steps=150, ema_decay=0.999, checkpoint_every=250
        )
    )

    def __post_init__(self) -> None:
        at_least(self, 1, "channels", "layers_per_block", "head_width", "vocabulary", "text_width", "text_layers", "steps")
        at_least(self, 3, "max_tokens")  # begin, a word, end
        shares = (self.caption_dropout, self.subject_dropout, self.style_dropout, self.decay_share)
        if max(shares) > 1 or sum(shares[:3]) >= 1:
            raise InputError("the dropouts must add up to less than 1, and decay_share be at most 1")
        if any(level >= len(self.channels) for level in self.attention_levels):
            raise InputError(f"attention_levels are positions in channels, 0 to {len(self.channels) - 1}")


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


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> torch.Tensor:
    """(B, max_tokens) token ids, padded and truncated as StableDiffusionPipeline does."""
    encoded = tokenizer(
        list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    ids: torch.Tensor = encoded.input_ids
    return ids


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
        norm_num_groups=32,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_width // config.head_width,
            max_position_embeddings=config.max_tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=config.text_width,
        )
    )
    # With so few tokens, plain products train faster on a CPU in bfloat16 than fused attention, which computes the same.
    unet.set_attn_processor(AttnProcessor())
    text_encoder.set_attn_implementation("eager")
    return unet, text_encoder


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

    def noisy_and_target(
        self, latents: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L, h, w) latents with noise, and the v that the U-Net is to predict of them."""
        noisy: torch.Tensor = self._scheduler.add_noise(latents, noise, timesteps)
        target: torch.Tensor = self._scheduler.get_velocity(latents, noise, timesteps)
        return noisy, target

    def predict(self, noisy: torch.Tensor, tokens: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """(B, L, h, w) predicted v."""
        text = self.text_encoder(tokens).last_hidden_state
        prediction: torch.Tensor = self.unet(noisy, timesteps, encoder_hidden_states=text).sample
        return prediction

    def forward(
        self, latents: torch.Tensor, tokens: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Args: latents and noise (B, L, h, w), scaled; tokens (B, max_tokens); timesteps (B,)."""
        noisy, target = self.noisy_and_target(latents, timesteps, noise)
        return F.mse_loss(self.predict(noisy, tokens, timesteps).float(), target)


class TrainingExamples:
    """Latents and token ids of a corpus, and batches of them as the denoiser is trained on them."""

    def __init__(
        self, latents: torch.Tensor, captions: Sequence[str], tokenizer: CLIPTokenizer, config: GeneratorConfig, timesteps: int
    ) -> None:
        """Tokenize.

        Args:
            latents: (N, L, h, w), scaled.
            captions: (N,).
            tokenizer: the generator's.
            config: for the shares of examples that see less than their caption.
            timesteps: of the noise schedule.
        """
        self.latents = latents
        self.captions = list(captions)
        self.tokens = tokenize(tokenizer, captions)
        self.subjects = tokenize(tokenizer, [split_caption(caption)[0] for caption in captions])
        self._endings = tokenize(tokenizer, [caption.rpartition(", ")[2] for caption in captions])
        self._empty = tokenize(tokenizer, [""])
        self._shares = np.cumsum([config.caption_dropout, config.subject_dropout, config.style_dropout])[::-1].tolist()
        self._timesteps = timesteps

    def batch_of(self, rows: np.ndarray, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Latents (B, L, h, w), tokens (B, max_tokens), timesteps (B,) and noise (B, L, h, w) of these (B,) rows."""
        picked = self.latents[rows]
        # One timestep from each of B equal parts: the same uniform law with less variance over the batch.
        stratum = torch.randperm(len(rows), generator=generator) + torch.rand(len(rows), generator=generator)
        timesteps = (stratum / len(rows) * self._timesteps).long().clamp_max(self._timesteps - 1)
        lot = torch.rand(len(rows), 1, generator=generator)
        prompt = self.tokens[rows]
        for share, shorter in zip(self._shares, (self.subjects[rows], self._endings[rows], self._empty), strict=True):
            prompt = torch.where(lot < share, shorter, prompt)
        return picked, prompt, timesteps, torch.randn(picked.shape, generator=generator)


def _tidy_configs(folder: Path) -> None:
    """Take the path that a part was loaded from out of the saved configs, and name float32 as the precision to load in.

    The path names a folder of one machine. transformers obeys the stored precision and diffusers loads float32, so that
    a plain `DiffusionPipeline.from_pretrained` would put together parts that do not fit.
    """
    for path in [folder / "model_index.json", *folder.glob("*/config.json")]:
        saved = read_json(path)
        kept = {key: value for key, value in saved.items() if key != "_name_or_path"}
        write_json(path, kept | {"dtype": "float32"} if "dtype" in kept else kept)


def run(config: GeneratorConfig, run_dir: Path, refinement: RefinementConfig | None = None) -> dict[str, Any]:
    """Train the generator on run_dir/corpus with run_dir/autoencoder, in one phase or two; returns the manifest."""
    corpus = Corpus(run_dir / "corpus")
    autoencoder_manifest = open_stage(run_dir / "autoencoder", "autoencoder")
    folder = run_dir / "generator"
    inputs = {"corpus": corpus.fingerprint, "autoencoder": autoencoder_manifest["fingerprint"]}
    refined = refinement is not None and refinement.steps > 0
    settings = {**vars(config), "refinement": refinement} if refined else config
    if finished(folder, stage="generator", config=settings, inputs=inputs):
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
    captions = [captions[0] for captions in corpus.captions]
    examples = TrainingExamples(latents, captions, tokenizer, config, scheduler.config.num_train_timesteps)
    unet, text_encoder = build_denoiser(
        config, tokenizer=tokenizer, latent_channels=latents.shape[1], latent_side=latents.shape[2]
    )
    made_from = [{**vars(config), "training": None}, inputs]
    checkpoint, second_checkpoint = folder / "checkpoint.safetensors", folder / "checkpoint-refinement.safetensors"
    average = fit(
        DenoiserLoss(unet.to(memory_format=torch.channels_last), text_encoder, scheduler),
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
    if refinement is not None and refined:
        average = refine(
            average,
            examples,
            refinement,
            config.training,
            tokens_of=lambda prompts: tokenize(tokenizer, prompts),
            checkpoint=second_checkpoint,
            made_from=[made_from, vars(config.training)],
            accelerator=accelerator,
        )
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
        checkpoints = (checkpoint, second_checkpoint)
        write_manifest(
            folder,
            stage="generator",
            config=settings,
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
