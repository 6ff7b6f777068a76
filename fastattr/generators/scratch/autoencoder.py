"""Train the generator's autoencoder: an `AutoencoderKL` whose latents the denoiser works in.

Reads corpus/; writes autoencoder/ (a diffusers folder, with its scaling factor) and autoencoder/manifest.json.

The encoder is set, not trained: its weights compute a principal component analysis of the image's patches (one patch a latent
position). On flat artwork and a small machine that is far ahead of joint training (docs/emoji.md), and the latents are known
before the decoder is, so denoiser and decoder can train at the same time. The decoder is trained on absolute error in RGB and
in colour differences, since RGB alone lets saturated colours drift. A fixed part of the images is held out for the report.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fastattr.core.errors import InputError
from fastattr.core.settings import at_least
from fastattr.core.stages import make
from fastattr.core.training import TrainingConfig, fit
from fastattr.corpus.store import Corpus


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Settings of the autoencoder."""

    channels: tuple[int, ...] = (16, 32, 64, 128)
    """Width of each resolution level; each level but the last halves the side."""
    latent_channels: int = 24
    """Principal components kept of each patch."""
    whitening: float = 0.5
    """Component j is divided by its standard deviation to this power: 0 keeps the variances, 1 makes them equal."""
    layers_per_block: int = 1
    resolution: int = 64
    chroma_weight: float = 1.0
    """Weight of the absolute error of the colour differences R-G and B-(R+G)/2."""
    held_out_share: float = 0.02
    """Part of the image families that is not trained on."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=4500, batch_size=8, learning_rate=2e-3, warmup_steps=100, max_grad_norm=0.5
        )
    )

    def __post_init__(self) -> None:
        at_least(self, 1, "channels", "latent_channels", "layers_per_block", "resolution")
        if not 0 < self.held_out_share < 1:
            raise InputError(f"held_out_share must be between 0 and 1, got {self.held_out_share}")


def held_out(families: list[str], share: float) -> np.ndarray:
    """(N,) bool: images whose family is held out, chosen by the hash of its name, so near-duplicates stay together."""
    digits = [int(hashlib.sha256(f"held-out {family}".encode()).hexdigest()[:8], 16) / 16**8 for family in families]
    return np.array(digits) < share


def pixel_tensor(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def colour_differences(images: Tensor) -> Tensor:
    """(B, 3, H, W) RGB -> (B, 2, H, W): R-G and B-(R+G)/2; zero for every grey."""
    red, green, blue = images.unbind(dim=1)
    return torch.stack([red - green, blue - (red + green) / 2], dim=1)


class DecoderLoss(nn.Module):
    """Reconstruction loss of a decoder; forward(latents, images) -> scalar."""

    def __init__(self, autoencoder: AutoencoderKL, *, chroma_weight: float) -> None:
        super().__init__()
        self.decoder = autoencoder.decoder
        self.post_quant_conv = autoencoder.post_quant_conv
        self.chroma_weight = chroma_weight

    def forward(self, latents: Tensor, images: Tensor) -> Tensor:
        """Args: latents (B, L, h, w), unscaled; images (B, 3, H, W) in [-1, 1]."""
        reconstruction = self.decoder(self.post_quant_conv(latents))
        loss = F.l1_loss(reconstruction, images) + F.mse_loss(reconstruction, images)
        return loss + self.chroma_weight * F.l1_loss(colour_differences(reconstruction), colour_differences(images))


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """(B,) peak signal-to-noise ratio in dB of images in [-1, 1] (peak-to-peak 2)."""
    error = (images - reconstructions.clamp(-1, 1)).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4.0 / error.clamp_min(1e-12))


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderKL:
    """An untrained autoencoder with `config`'s shape; its residual branches start at zero."""
    levels = len(config.channels)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    sizes = {"block_out_channels": config.channels, "sample_size": config.resolution, "norm_num_groups": 8}
    sizes |= {name: getattr(config, name) for name in ("layers_per_block", "latent_channels")}
    autoencoder = AutoencoderKL(**blocks, **sizes, mid_block_add_attention=False)
    for name, parameter in autoencoder.named_parameters():
        if ".conv2." in name:
            nn.init.zeros_(parameter)
    return autoencoder


def principal_components(rows: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (W,), components (keep, W) and standard deviations (keep,) of (N, W) rows, largest first."""
    mean = rows.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov((rows - mean).T))
    order = np.argsort(-values)[:keep]
    return mean, vectors[:, order].T, np.sqrt(values[order].clip(1e-12))


@torch.no_grad()
def set_encoder(autoencoder: AutoencoderKL, images: np.ndarray, *, whitening: float) -> None:
    """Set the encoder's weights so that it computes the principal components of the patches of (N, H, W, 3) uint8 images.

    Every residual branch is zero, so the encoder is a chain of its linear layers: each downsampling convolution sees the 2 x 2
    positions under it and keeps their leading components. The last group normalisation and SiLU are made linear: each group
    holds a pair of large constants, which fixes its variance, and each component as a pair x, -x, since silu(x) - silu(-x) =
    x.

    The autoencoder, one convolution a level (`build_autoencoder`), is changed in place; `whitening` as in `AutoencoderConfig`.
    """
    encoder = autoencoder.encoder
    for parameter in encoder.parameters():
        nn.init.zeros_(parameter)
    current = images.astype(np.float32) / 127.5 - 1  # (N, h, w, channels), what the next convolution sees
    _copy_channels(encoder.conv_in.weight, 3)
    blocks, latent_channels = list(encoder.down_blocks), autoencoder.config.latent_channels
    for level, block in enumerate(blocks[:-1]):
        if block.resnets[0].conv_shortcut is not None:
            _copy_channels(block.resnets[0].conv_shortcut.weight, current.shape[-1])
        last = level == len(blocks) - 2
        width = 4 * current.shape[-1]
        keep = latent_channels if last else min(width, block.downsamplers[0].conv.out_channels)
        n, side, _, channels = current.shape
        cells = current.reshape(n, side // 2, 2, side // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5).reshape(-1, width)
        mean, components, deviations = principal_components(cells, keep)
        if last:
            components = components / (deviations**whitening)[:, None]
        convolution = block.downsamplers[0].conv  # pads below and to the right only, so tap (0, 0) is the cell's first pixel
        weight = components.reshape(keep, 2, 2, channels).transpose(0, 3, 1, 2)
        convolution.weight[:keep, :channels, :2, :2] = torch.from_numpy(np.ascontiguousarray(weight)).float()
        convolution.bias[:keep] = torch.from_numpy(-components @ mean).float()
        current = ((cells - mean) @ components.T).reshape(n, side // 2, side // 2, keep)
    _set_linear_head(encoder, current, latent_channels)


def _copy_channels(weight: Tensor, channels: int) -> None:
    """Make a convolution pass its first `channels` channels on unchanged."""
    middle = weight.shape[-1] // 2
    for channel in range(channels):
        weight[channel, channel, middle, middle] = 1.0


def _set_linear_head(encoder: Any, latents: np.ndarray, latent_channels: int) -> None:
    """Carry the components through the last normalisation and SiLU: see `set_encoder`."""
    norm, shortcut, head = encoder.conv_norm_out, encoder.down_blocks[-1].resnets[0].conv_shortcut, encoder.conv_out
    width = norm.num_channels // norm.num_groups
    constant = 30.0 * float(np.abs(latents).max())  # so large that the components hardly change a group's variance
    slope = float((width / 2) ** 0.5 / constant)  # what the normalisation multiplies by
    nn.init.ones_(norm.weight)
    # Component c lives in group c mod G, after the pair of constants, as the pair (+c, -c).
    for group in range(norm.num_groups):
        shortcut.bias[group * width] = constant
        shortcut.bias[group * width + 1] = -constant
    for component in range(latent_channels):
        turn, group = divmod(component, norm.num_groups)
        plus = group * width + 2 + 2 * turn
        if plus + 1 >= (group + 1) * width:
            raise InputError(f"{latent_channels} latent channels do not fit; widen the last level.")
        for channel, sign in ((plus, 1.0), (plus + 1, -1.0)):
            shortcut.weight[channel, component, 0, 0] = sign
            head.weight[component, channel, 1, 1] = sign / slope
    head.bias[latent_channels:] = -20.0  # log-variance: the posterior is a point


def load_images(corpus: Corpus, resolution: int) -> np.ndarray:
    """(N, resolution, resolution, 3) uint8 of the whole corpus, in row order."""
    images = np.empty((len(corpus), resolution, resolution, 3), dtype=np.uint8)
    for row in tqdm(range(len(corpus)), desc="decode images", unit="image"):
        image = corpus.image(row)
        images[row] = np.asarray(image if image.size == (resolution, resolution) else image.resize((resolution, resolution)))
    return images


@torch.no_grad()
def encode_latents(autoencoder: AutoencoderKL, images: np.ndarray, *, batch_size: int = 64) -> Tensor:
    """(N, L, h, w) posterior means, unscaled, of (N, H, W, 3) uint8 images."""
    starts = tqdm(range(0, len(images), batch_size), desc="encode latents", unit="batch")
    batches = (pixel_tensor(images[start : start + batch_size]).to(autoencoder.device) for start in starts)
    return torch.cat([autoencoder.encode(batch).latent_dist.mean.cpu() for batch in batches])


def run(config: AutoencoderConfig, run_dir: Path) -> dict[str, Any]:
    """Train the autoencoder on run_dir/corpus; returns the manifest with 'psnr_held_out' (dB, mean over images)."""
    corpus, folder = Corpus(run_dir / "corpus"), run_dir / "autoencoder"
    inputs, checkpoint = {"corpus": corpus.fingerprint}, folder / "checkpoint.safetensors"
    accelerator = Accelerator(mixed_precision=config.training.mixed_precision)

    def work() -> dict[str, Any]:
        return _train(config, corpus, folder, accelerator, checkpoint=checkpoint, made_from=[config, inputs])

    made_of: dict[str, Any] = {"stage": "autoencoder", "config": config, "inputs": inputs}
    return make(folder, work, **made_of, accelerator=accelerator, temporary=[checkpoint])


def _train(config: AutoencoderConfig, corpus: Corpus, folder: Path, accelerator: Accelerator, **resumed: Any) -> dict[str, Any]:
    """Set the encoder, train the decoder, write both; returns how well unseen images come back."""
    folder.mkdir(parents=True, exist_ok=True)
    images = load_images(corpus, config.resolution)
    families = [family or image_id for family, image_id in zip(corpus.column("family"), corpus.image_ids, strict=True)]
    unseen = held_out(families, config.held_out_share)
    training_rows = np.flatnonzero(~unseen)
    torch.manual_seed(config.training.seed)
    autoencoder = build_autoencoder(config)
    set_encoder(autoencoder, images[training_rows[:: max(1, len(training_rows) // 2000)]], whitening=config.whitening)
    nn.init.dirac_(autoencoder.quant_conv.weight)
    nn.init.zeros_(autoencoder.quant_conv.bias)
    latents = encode_latents(autoencoder.to(accelerator.device), images)
    autoencoder.register_to_config(scaling_factor=float(1 / latents.std()))
    if accelerator.is_main_process:
        autoencoder.save_pretrained(folder / "untrained")  # latents are final: the denoiser may start from here

    def batch_of(rows: np.ndarray, generator: torch.Generator) -> tuple[Tensor, ...]:
        picked = training_rows[rows]
        return latents[picked], pixel_tensor(images[picked])

    loss = DecoderLoss(autoencoder, chroma_weight=config.chroma_weight).to(memory_format=torch.channels_last)
    about: dict[str, Any] = {"examples": len(training_rows), "accelerator": accelerator, "description": "decoder"}
    average: Any = fit(loss, batch_of, config.training, **resumed, **about)
    autoencoder.decoder.load_state_dict(average.decoder.state_dict())
    autoencoder.post_quant_conv.load_state_dict(average.post_quant_conv.state_dict())
    autoencoder.eval()
    with torch.no_grad():
        sample = pixel_tensor(images[unseen]).to(autoencoder.device)
        quality = psnr(sample, autoencoder(sample).sample)
    if accelerator.is_main_process:
        autoencoder.save_pretrained(folder)
    spread = float(quality.std() / len(quality) ** 0.5)
    found = {"psnr_held_out": float(quality.mean()), "psnr_held_out_standard_error": spread}
    return {**found, "held_out_images": int(unseen.sum())}
