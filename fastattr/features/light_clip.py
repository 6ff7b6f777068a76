"""Light CLIP: small CLIPs in NumPy, so that a first answer need not wait for torch and open_clip to be imported.

Computes the forward pass of a CLIP of open_clip's plain shape (vision transformer, text transformer) from the files that
open_clip writes. open_clip computes any other shape, device or precision (`fastattr.features.kinds.open_encoder` decides).
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from fastattr.core.files import read_json
from fastattr.features.encoder import (
    encode_captions,
    encoder_fingerprint,
    former_fingerprint,
    image_settings,
    text_settings,
    tower,
    unit_vectors,
)

WEIGHTS, CONFIG, TOKENIZER = "open_clip_model.safetensors", "open_clip_config.json", "tokenizer.json"
VISION_KEYS = {"image_size", "patch_size", "width", "layers", "head_width"}
TEXT_KEYS = {"context_length", "vocab_size", "hf_tokenizer_name", "width", "heads", "layers", "pool_type", "eos_id", "pad_id"}
PREPROCESS = (  # how torchvision prints open_clip's preprocessing; part of the fingerprint that earlier versions gave
    "Compose(\n    Resize(size=({side}, {side}), interpolation=bicubic, max_size=None, antialias=True)\n"
    "    MaybeConvertMode()\n    MaybeToTensor()\n    Normalize(mean={mean}, std={std})\n)"
)


def supports(folder: Path) -> bool:
    """Whether the CLIP in `folder` has the plain shape that `LightClip` computes."""
    if not all((folder / file).is_file() for file in (WEIGHTS, CONFIG, TOKENIZER)):
        return False
    config = read_json(folder / CONFIG)
    model, preprocessing = config["model_cfg"], config["preprocess_cfg"]
    if set(model) != {"embed_dim", "vision_cfg", "text_cfg"} or set(model["vision_cfg"]) != VISION_KEYS:
        return False
    how = (model["text_cfg"].get("pool_type"), preprocessing["interpolation"], preprocessing["resize_mode"])
    return set(model["text_cfg"]) == TEXT_KEYS and how == ("eos", "bicubic", "squash")


class LightClip:
    """The image tower or the text tower of a small CLIP; an `Encoder`."""

    def __init__(self, folder: Path, modality: str, *, captions: str = "first") -> None:
        """Load the tower 'image' or 'text' of a folder for which `supports` is true."""
        config = read_json(folder / CONFIG)
        self.specification = f"open_clip-{modality}:{folder}"
        self._folder, self._modality, self._captions = folder, modality, captions
        self._vision, self._text = config["model_cfg"]["vision_cfg"], config["model_cfg"]["text_cfg"]
        self._preprocessing = config["preprocess_cfg"]
        stored = load_file(folder / WEIGHTS)
        own = tower(stored, modality)
        if modality == "image":
            side = self._vision["image_size"]
            settings = image_settings({**self._preprocessing, "size": (side, side), "mode": "RGB"})
        else:
            settings = text_settings(captions, self._tokenizer.get_vocab(), self._token_ids)
        self.fingerprint = encoder_fingerprint(settings, own.values())
        mean, std = self._preprocessing["mean"], self._preprocessing["std"]
        printed = PREPROCESS.format(side=self._vision["image_size"], mean=mean, std=std)
        self.former = former_fingerprint(f"{modality}/{captions}/{printed}", stored)
        self._weights = {name.removeprefix("visual."): value.astype(np.float32) for name, value in own.items()}

    def encode(self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> np.ndarray:
        """(B, F) float32 unit vectors; an image encoder ignores the captions, a text encoder the images."""
        if self._modality == "image":
            return unit_vectors(self._encode_images(images))
        return encode_captions(captions, self._encode_texts, average=self._captions == "mean")

    def _encode_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """(B, F) features before normalisation."""
        side, patch, weights = self._vision["image_size"], self._vision["patch_size"], self._weights
        sized = [image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC) for image in images]
        pixels = np.stack([np.asarray(image, dtype=np.float32) / 255 for image in sized])  # (B, H, W, 3)
        pixels = (pixels - np.float32(self._preprocessing["mean"])) / np.float32(self._preprocessing["std"])
        grid = side // patch
        patches = pixels.reshape(len(images), grid, patch, grid, patch, 3).transpose(0, 1, 3, 5, 2, 4)
        tokens = patches.reshape(len(images), grid * grid, -1) @ weights["conv1.weight"].reshape(self._vision["width"], -1).T
        first = np.broadcast_to(weights["class_embedding"], (len(images), 1, self._vision["width"]))
        hidden = np.concatenate([first, tokens], axis=1) + weights["positional_embedding"]
        hidden = layer_norm(hidden, weights, "ln_pre")
        heads = self._vision["width"] // self._vision["head_width"]
        hidden = _transformer(hidden, weights, layers=self._vision["layers"], heads=heads, causal=False)
        return layer_norm(hidden[:, 0], weights, "ln_post") @ weights["proj"]

    def _encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """(B, F) unit vectors."""
        ids = np.array(self._token_ids(texts))
        weights = self._weights
        hidden = weights["token_embedding.weight"][ids] + weights["positional_embedding"]
        hidden = _transformer(hidden, weights, layers=self._text["layers"], heads=self._text["heads"], causal=True)
        ends = (ids == self._text["eos_id"]).argmax(axis=1)
        last = layer_norm(hidden[np.arange(len(ids)), ends], weights, "ln_final")
        return unit_vectors(last @ weights["text_projection"])

    def _token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The texts cleaned as open_clip does, and their tokens."""
        import ftfy

        clean = [" ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()) for text in texts]
        return [encoding.ids for encoding in self._tokenizer.encode_batch(clean)]

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self._folder / TOKENIZER))
        tokenizer.enable_truncation(self._text["context_length"])
        tokenizer.enable_padding(length=self._text["context_length"], pad_id=self._text["pad_id"])
        return tokenizer


def _transformer(hidden: np.ndarray, weights: Mapping[str, np.ndarray], *, layers: int, heads: int, causal: bool) -> np.ndarray:
    """(B, T, W) through pre-norm residual attention blocks."""
    tokens = hidden.shape[1]
    mask = np.triu(np.full((tokens, tokens), -np.inf, dtype=np.float32), 1) if causal else np.float32(0)
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}"
        joint = layer_norm(hidden, weights, f"{block}.ln_1") @ weights[f"{block}.attn.in_proj_weight"].T
        joint += weights[f"{block}.attn.in_proj_bias"]
        parts = np.split(joint, 3, axis=2)
        query, key, value = (part.reshape(*part.shape[:2], heads, -1).transpose(0, 2, 1, 3) for part in parts)
        attention = query @ key.transpose(0, 1, 3, 2) / np.float32(np.sqrt(query.shape[-1])) + mask
        attention = np.exp(attention - attention.max(axis=-1, keepdims=True))
        attention /= attention.sum(axis=-1, keepdims=True)
        mixed = (attention @ value).transpose(0, 2, 1, 3).reshape(hidden.shape)
        hidden = hidden + linear(mixed, weights, f"{block}.attn.out_proj")
        wide = linear(layer_norm(hidden, weights, f"{block}.ln_2"), weights, f"{block}.mlp.c_fc")
        wide *= 0.5 * (1 + _erf(wide / np.float32(np.sqrt(2))))  # GELU
        hidden = hidden + linear(wide, weights, f"{block}.mlp.c_proj")
    return hidden


def _erf(values: np.ndarray) -> np.ndarray:
    """The error function to 2e-7 (Abramowitz and Stegun, 7.1.26); to import scipy.special takes longer than an answer."""
    size = np.abs(values)
    inverse = 1 / (1 + np.float32(0.3275911) * size)
    series = np.zeros_like(values)
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + np.float32(factor)) * inverse
    return np.copysign(1 - series * np.exp(-size * size), values)


def linear(values: np.ndarray, weights: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """(..., F) values through the linear layer of that name."""
    return values @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(values: np.ndarray, weights: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """(..., F) values through the layer norm of that name."""
    centred = values - values.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + np.float32(1e-5))
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]
