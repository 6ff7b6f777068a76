"""Tiny, randomly initialised diffusers pipelines of the real classes, one per family; nothing is downloaded."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from fastattr.generators.scratch.denoiser import train_tokenizer

WORDS = ["a", "red", "green", "blue", "circle", "square", "triangle", "ring", "plain", "framed", "style", ",", "."]
SIDE = 16
"""Pixels of the tiny pipelines' images; latents have half of that."""


@functools.cache
def clip_tokenizer() -> CLIPTokenizer:
    """A small BPE vocabulary as CLIP's tokenizer; learned once, since ties may fall out otherwise the next time."""
    with tempfile.TemporaryDirectory() as scratch:
        return train_tokenizer([" ".join(WORDS)], vocabulary=300, max_tokens=12, scratch=Path(scratch))


def t5_tokenizer() -> T5TokenizerFast:
    """A small unigram vocabulary as T5's tokenizer, which ends a prompt with </s>."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -float(i)) for i, word in enumerate(WORDS))]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0)
    assert tokenizer("a red ring").input_ids[-1] == 1
    return tokenizer


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """A small word vocabulary that starts a prompt with <bos>, as Gemma's does."""
    vocabulary = {word: row for row, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def clip_text(tokenizer: CLIPTokenizer, *, projected: bool = False, width: int = 16) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5_text(width: int = 32) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=32, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def autoencoder(channels: int = 4, **config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=SIDE,
        **config,
    )


def unet(**config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE // 2,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        **config,
    )


def stable_diffusion(**scheduler: Any) -> StableDiffusionPipeline:
    """1.x; with prediction_type='v_prediction' 2.x."""
    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=clip_text(tokenizer),
        tokenizer=tokenizer,
        unet=unet(cross_attention_dim=16),
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1, **scheduler
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(**scheduler: Any) -> StableDiffusionXLPipeline:
    tokenizer = clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025),
        text_encoder=clip_text(tokenizer),
        text_encoder_2=clip_text(tokenizer, projected=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **scheduler),
        add_watermarker=False,
    )


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    """3.5 medium: the first block has a second, image-only attention (attn2), which must not be taken for the text's."""
    tokenizer = clip_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=SIDE // 2,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text(tokenizer, projected=True),
        tokenizer=tokenizer,
        text_encoder_2=clip_text(tokenizer, projected=True),
        tokenizer_2=tokenizer,
        text_encoder_3=t5_text(),
        tokenizer_3=t5_tokenizer(),
    )


def flux(*, guidance: bool = True) -> FluxPipeline:
    """dev; without guidance embedding schnell."""
    tokenizer = clip_tokenizer()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5_text(),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            axes_dims_rope=(2, 2, 4),
            guidance_embeds=guidance,
        ),
    )
    return pipeline


def pixart(kind: type, *, large: bool) -> Any:
    return kind(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_text(),
        vae=autoencoder(scaling_factor=0.13025),
        transformer=PixArtTransformer2DModel(
            sample_size=128 if large else SIDE // 2,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=3,
            cross_attention_dim=24,
            caption_channels=32,
            use_additional_conditions=large,
        ),
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    )


def pixart_alpha() -> PixArtAlphaPipeline:
    """The one for 1024 pixels, which is told resolution and aspect ratio."""
    return pixart(PixArtAlphaPipeline, large=True)


def pixart_sigma() -> PixArtSigmaPipeline:
    return pixart(PixArtSigmaPipeline, large=False)


def sana() -> SanaPipeline:
    block = {"block_type": "ResBlock", "block_out_channels": (8, 16), "layers_per_block": (1, 1), "qkv_multiscales": ((), ())}
    return SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=Gemma2Model(
            Gemma2Config(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
            )
        ),
        vae=AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            **{f"encoder_{name}" if name != "block_type" else "encoder_block_types": value for name, value in block.items()},
            **{f"decoder_{name}" if name != "block_type" else "decoder_block_types": value for name, value in block.items()},
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        transformer=SanaTransformer2DModel(
            sample_size=SIDE // 2,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
        ),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, beta_schedule="linear"
        ),
    )


def build(kind: str) -> Any:
    """A tiny pipeline by name, the same weights every time."""
    torch.manual_seed(0)
    makers = {
        "sd": stable_diffusion,
        "sd-v": lambda: stable_diffusion(prediction_type="v_prediction"),
        "sdxl": stable_diffusion_xl,
        "sd3": stable_diffusion_3,
        "flux-dev": flux,
        "flux-schnell": lambda: flux(guidance=False),
        "pixart-alpha": pixart_alpha,
        "pixart-sigma": pixart_sigma,
        "sana": sana,
    }
    pipeline = makers[kind]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


KINDS = ("sd", "sd-v", "sdxl", "sd3", "flux-dev", "flux-schnell", "pixart-alpha", "pixart-sigma", "sana")
