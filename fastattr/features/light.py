"""Light: small CLIPs and students in NumPy, so that a first answer need not wait for torch and open_clip to be imported.

Importing torch and open_clip takes longer than everything else that a first answer needs (benchmarks/startup.py). What runs
here is the forward pass of what they would run: a CLIP of open_clip's plain shape (vision transformer, text transformer) and
the student's network. tests/features/test_light.py holds both against the originals. A shape that is not known here, another
device or precision goes through open_clip and torch instead (`FastAttributor.from_pretrained` decides).
Reads open_clip_config.json, open_clip_model.safetensors and tokenizer.json of an encoder folder.
"""

from __future__ import annotations

import hashlib
import html
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from fastattr.core.errors import ArtifactDamagedError
from fastattr.core.files import read_json
from fastattr.core.models import ASSETS, embedded_models

WEIGHTS, CONFIG, TOKENIZER = "open_clip_model.safetensors", "open_clip_config.json", "tokenizer.json"
VISION_KEYS = {"image_size", "patch_size", "width", "layers", "head_width"}
TEXT_KEYS = {"context_length", "vocab_size", "hf_tokenizer_name", "width", "heads", "layers", "pool_type", "eos_id", "pad_id"}
PREPROCESS = (
    "Compose(\n    Resize(size=({side}, {side}), interpolation=bicubic, max_size=None, antialias=True)\n"
    "    MaybeConvertMode()\n    MaybeToTensor()\n    Normalize(mean={mean}, std={std})\n)"
)
"""How torchvision prints open_clip's preprocessing; part of an encoder's fingerprint."""


def supports(folder: Path) -> bool:
    """Whether the CLIP in `folder` has the plain shape that `LightClip` computes."""
    if not all((folder / file).is_file() for file in (WEIGHTS, CONFIG, TOKENIZER)):
        return False
    config = read_json(folder / CONFIG)
    model, preprocessing = config["model_cfg"], config["preprocess_cfg"]
    return (
        set(model) == {"embed_dim", "vision_cfg", "text_cfg"}
        and set(model["vision_cfg"]) == VISION_KEYS
        and set(model["text_cfg"]) == TEXT_KEYS
        and model["text_cfg"]["pool_type"] == "eos"
        and (preprocessing["interpolation"], preprocessing["resize_mode"]) == ("bicubic", "squash")
    )


def open_light(specification: str, folder: Path, *, captions: str) -> LightClip | None:
    """The encoder that a specification of fastattr.features.features names, or None if it is none that is known here.

    Args:
        specification: 'open_clip-image:REF' or 'open_clip-text:REF'.
        folder: where a REF of 'encoder' is found.
        captions: 'first' or 'mean'.
    """
    kind, _, reference = specification.partition(":")
    if kind not in {"open_clip-image", "open_clip-text"}:
        return None
    embedded = reference in embedded_models()
    path = ASSETS / reference / "attributor" / "encoder" if embedded else folder / "encoder"
    if not (embedded or reference == "encoder") or not supports(path):
        return None
    encoder = LightClip(path, kind.removeprefix("open_clip-"), captions=captions)
    encoder.specification = specification
    return encoder


class LightClip:
    """The image tower or the text tower of a small CLIP; an `Encoder` as those of fastattr.features.features."""

    def __init__(self, folder: Path, modality: str, *, captions: str = "first") -> None:
        """Load it.

        Args:
            folder: for which `supports` is true.
            modality: 'image' or 'text'.
            captions: 'first' or 'mean': how several captions of one image become one feature.
        """
        config = read_json(folder / CONFIG)
        self.specification = f"open_clip-{modality}:{folder}"
        self._folder, self._modality, self._captions = folder, modality, captions
        self._vision, self._text = config["model_cfg"]["vision_cfg"], config["model_cfg"]["text_cfg"]
        self._preprocessing = config["preprocess_cfg"]
        stored = load_file(folder / WEIGHTS)
        self.fingerprint = self._fingerprint(stored)
        own = {name: value for name, value in stored.items() if name.startswith("visual.") == (modality == "image")}
        self._weights = {name.removeprefix("visual."): value.astype(np.float32) for name, value in own.items()}

    def _fingerprint(self, weights: Mapping[str, np.ndarray]) -> str:
        """The same as fastattr.features.features gives to this encoder when open_clip loads it."""
        side = self._vision["image_size"]
        mean, std = self._preprocessing["mean"], self._preprocessing["std"]
        printed = f"{self._modality}/{self._captions}/{PREPROCESS.format(side=side, mean=mean, std=std)}"
        digest = hashlib.sha256(printed.encode())
        for name, value in sorted(weights.items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(value, dtype=np.float16).tobytes())
        return digest.hexdigest()[:16]

    def encode(self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> np.ndarray:
        """(B, F) float32 unit vectors; an image encoder ignores the captions, a text encoder the images."""
        if self._modality == "image":
            return _unit(self._encode_images(images))
        if self._captions == "first":
            return _unit(self._encode_texts([texts[0] for texts in captions]))
        vectors = _unit(self._encode_texts([text for texts in captions for text in texts]))
        ends = np.cumsum([len(texts) for texts in captions])
        return _unit(np.stack([part.mean(axis=0) for part in np.split(vectors, ends[:-1])]))

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
        hidden = _layer_norm(hidden, weights, "ln_pre")
        heads = self._vision["width"] // self._vision["head_width"]
        hidden = _transformer(hidden, weights, layers=self._vision["layers"], heads=heads, causal=False)
        pooled: np.ndarray = _layer_norm(hidden[:, 0], weights, "ln_post") @ weights["proj"]
        return pooled

    def _encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """(B, F) features before normalisation."""
        ids = np.array([encoding.ids for encoding in self._tokenizer.encode_batch([_clean(text) for text in texts])])
        weights = self._weights
        hidden = weights["token_embedding.weight"][ids] + weights["positional_embedding"]
        hidden = _transformer(hidden, weights, layers=self._text["layers"], heads=self._text["heads"], causal=True)
        ends = (ids == self._text["eos_id"]).argmax(axis=1)
        last = _layer_norm(hidden[np.arange(len(ids)), ends], weights, "ln_final")
        pooled: np.ndarray = last @ weights["text_projection"]
        return pooled

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self._folder / TOKENIZER))
        tokenizer.enable_truncation(self._text["context_length"])
        tokenizer.enable_padding(length=self._text["context_length"], pad_id=self._text["pad_id"])
        return tokenizer


class LightStudent:
    """What a trained student (fastattr.students.student) does for a query."""

    def __init__(self, path: Path, *, feature_dim: int, config: Mapping[str, Any]) -> None:
        """Read model.safetensors strictly.

        Args:
            path: the file.
            feature_dim: F.
            config: a `StudentConfig` as config.json holds it.

        Raises:
            ArtifactDamagedError: the file's tensors are not those of such a student.
        """
        widths = [feature_dim, *config["hidden"], config["embed_dim"]]
        stride = 3 if config.get("dropout") else 2  # of the layers in `nn.Sequential`
        self._names = [f"mlp.{stride * layer}" for layer in range(len(widths) - 1)]
        shapes: dict[str, tuple[int, ...]] = {
            f"{name}.weight": (after, before) for name, (before, after) in zip(self._names, pairwise(widths), strict=True)
        }
        if config.get("linear_path", True):
            shapes["linear.weight"] = (config["embed_dim"], feature_dim)
        shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
        if config["input_norm"]:
            shapes["input_norm.weight"] = shapes["input_norm.bias"] = (feature_dim,)
        self._head = "query_head." if config.get("separate_heads") else ""
        if self._head:
            shapes |= {self._head + name: shape for name, shape in shapes.items()}
        shapes["log_scale"] = shapes["bias"] = ()
        stored = {
            name: value for name, value in load_file(path).items() if not name.startswith("popularity_head.")
        }  # no query's
        found = {name: value.shape for name, value in stored.items()}
        if found != shapes:
            wrong = sorted(set(found.items()) ^ set(shapes.items()))
            raise ArtifactDamagedError(f"{path} is not the student that config.json describes: {wrong[:3]} differ.")
        self._weights = {name: value.astype(np.float32) for name, value in stored.items()}

    def embed_queries(self, features: np.ndarray) -> np.ndarray:
        """(Q, F) features -> (Q, D) float32 unit embeddings."""
        return self._embed(features, self._head)

    def embed_images(self, features: np.ndarray) -> np.ndarray:
        """(N, F) features of training images -> (N, D) float32 unit embeddings."""
        return self._embed(features, "")

    def _embed(self, features: np.ndarray, prefix: str) -> np.ndarray:
        head = {name.removeprefix(prefix): value for name, value in self._weights.items() if name.startswith(prefix)}
        values = features.astype(np.float32)
        if "input_norm.weight" in head:
            values = _layer_norm(values, head, "input_norm")
        hidden = values
        for name in self._names[:-1]:
            hidden = np.maximum(_linear(hidden, head, name), 0)
        projected = _linear(hidden, head, self._names[-1])
        return _unit(projected + _linear(values, head, "linear") if "linear.weight" in head else projected)

    def closeness(self, similarity: np.ndarray) -> np.ndarray:
        """The student's estimate, 0 to 1, of how near similarities of any shape are to the top of the teacher's ranking."""
        logits = np.exp(self._weights["log_scale"].astype(np.float64)) * similarity + self._weights["bias"]
        estimate: np.ndarray = 1 / (1 + np.exp(-logits))
        return estimate


def _clean(text: str) -> str:
    """As open_clip cleans a text before its tokenizer sees it."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def _transformer(hidden: np.ndarray, weights: Mapping[str, np.ndarray], *, layers: int, heads: int, causal: bool) -> np.ndarray:
    """(B, T, W) through pre-norm residual attention blocks."""
    from scipy.special import erf

    tokens = hidden.shape[1]
    mask = np.triu(np.full((tokens, tokens), -np.inf, dtype=np.float32), 1) if causal else np.float32(0)
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}"
        joint = _layer_norm(hidden, weights, f"{block}.ln_1") @ weights[f"{block}.attn.in_proj_weight"].T
        joint += weights[f"{block}.attn.in_proj_bias"]
        query, key, value = (
            part.reshape(*part.shape[:2], heads, -1).transpose(0, 2, 1, 3) for part in np.split(joint, 3, axis=2)
        )  # each (B, heads, T, width of a head)
        attention = query @ key.transpose(0, 1, 3, 2) / np.float32(np.sqrt(query.shape[-1])) + mask
        attention = np.exp(attention - attention.max(axis=-1, keepdims=True))
        attention /= attention.sum(axis=-1, keepdims=True)
        mixed = (attention @ value).transpose(0, 2, 1, 3).reshape(hidden.shape)
        hidden = hidden + _linear(mixed, weights, f"{block}.attn.out_proj")
        wide = _linear(_layer_norm(hidden, weights, f"{block}.ln_2"), weights, f"{block}.mlp.c_fc")
        wide *= 0.5 * (1 + erf(wide / np.float32(np.sqrt(2))))  # GELU
        hidden = hidden + _linear(wide, weights, f"{block}.mlp.c_proj")
    return hidden


def _linear(values: np.ndarray, weights: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    found: np.ndarray = values @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
    return found


def _layer_norm(values: np.ndarray, weights: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    centred = values - values.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + np.float32(1e-5))
    found: np.ndarray = scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]
    return found


def _unit(vectors: np.ndarray) -> np.ndarray:
    unit: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit
