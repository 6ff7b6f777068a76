"""Pretrained encoders: image and text towers that open_clip and transformers load; docs/encoders.md lists those tested."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastattr.core.models import locate, split_revision
from fastattr.features.encoder import (
    Options,
    encode_captions,
    encoder_fingerprint,
    former_fingerprint,
    image_settings,
    text_settings,
    tower,
)

PROCESSING = {  # settings of transformers' image processors that determine what a model sees
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_pad", "pad_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "do_convert_rgb"),
}
DEFAULTS = Options(None, "first", "cpu", torch.float32)
OPEN_CLIP_FILES = ("*.json", "*.txt", "*.model", "open_clip_model.safetensors")  # what open_clip loads a model from: no pickle


@dataclass
class PretrainedEncoder:
    """A tower of a pretrained model; an `Encoder`."""

    specification: str
    fingerprint: str
    former: str
    forward: Callable[[list[Any]], torch.Tensor]  # images or texts -> (B, F)
    captions: str = ""  # 'first' or 'mean' of several captions; '' of an image tower

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> np.ndarray:
        """See `Encoder.encode`."""
        if not self.captions:
            return self._unit([image.convert("RGB") for image in images])
        return encode_captions(captions, self._unit, average=self.captions == "mean")

    def _unit(self, inputs: list[Any]) -> np.ndarray:
        return torch.nn.functional.normalize(self.forward(inputs).float(), dim=1).cpu().numpy()


def open_clip_encoder(reference: str, modality: str, options: Options = DEFAULTS) -> PretrainedEncoder:
    """The tower 'image' or 'text' of a folder with open_clip_config.json, of 'NAME/PRETRAINED', or of a Hub id."""
    import open_clip

    name, pretrained = _open_clip_name(reference)
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained, device=options.device)
    tokenizer, weights = open_clip.get_tokenizer(name), _arrays(model)
    model.eval().requires_grad_(False).to(options.dtype)

    def of_images(batch: list[Any]) -> torch.Tensor:
        pixels = torch.stack([preprocess(image) for image in batch])
        return model.encode_image(pixels.to(options.device, options.dtype))

    def of_texts(batch: list[Any]) -> torch.Tensor:
        return model.encode_text(tokenizer(batch).to(options.device))

    if modality == "image":
        settings, forward, captions = image_settings(model.visual.preprocess_cfg), of_images, ""
    else:
        wrapped = getattr(tokenizer, "tokenizer", None)  # of transformers, or it is open_clip's own
        vocabulary = dict(tokenizer.encoder if wrapped is None else wrapped.get_vocab())
        settings, forward, captions = text_settings(options.captions, vocabulary, tokenizer), of_texts, options.captions
    former = former_fingerprint(f"{modality}/{options.captions}/{preprocess}", weights)
    fingerprint = encoder_fingerprint(settings, tower(weights, modality).values())
    return PretrainedEncoder(f"open_clip-{modality}:{reference}", fingerprint, former, forward, captions)


def transformers_image_encoder(reference: str, options: Options = DEFAULTS) -> PretrainedEncoder:
    """A vision model of transformers (DINO, DINOv2, DINOv3, CLIP, SigLIP, ...), a Hub id or folder, with its own processor."""
    from transformers import AutoImageProcessor

    name, revision = split_revision(reference, None)
    processor = AutoImageProcessor.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    model = _transformers_model(name, revision)
    two_towers = hasattr(model, "get_image_features")
    pooled = two_towers or model.config.model_type.startswith(("clip", "siglip"))  # by a head of its own; else the class token
    if not pooled:
        model.pooler = None  # not used, and made at random where a checkpoint has none (DINO)

    def forward(images: list[Image.Image]) -> torch.Tensor:
        inputs = processor(images=images, return_tensors="pt").to(options.device, options.dtype)
        output = model.get_image_features(**inputs) if two_towers else model(**inputs)
        return output.pooler_output if pooled else output.last_hidden_state[:, 0]

    settings = {name: value for name, value in processor.to_dict().items() if name in PROCESSING}
    # Processors hold sizes and enumerations.
    described = json.loads(json.dumps(settings, default=lambda each: each.value if isinstance(each, enum.Enum) else dict(each)))
    fingerprint = encoder_fingerprint(described, _arrays(model).values())
    model.to(options.device, options.dtype)
    return PretrainedEncoder(f"transformers-image:{reference}", fingerprint, fingerprint, forward)


def transformers_text_encoder(reference: str, options: Options = DEFAULTS) -> PretrainedEncoder:
    """The text tower of a CLIP or SigLIP, or a CLIP text encoder alone, a Hub id or folder, with its own tokenizer."""
    from transformers import AutoTokenizer

    name, revision = split_revision(reference, None)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    model = _transformers_model(name, revision)
    length = int(getattr(model.config, "text_config", model.config).max_position_embeddings)
    # SigLIP was trained to see its padding; CLIP never looks behind the end of the text.
    masked = not model.config.model_type.startswith("siglip")

    def tokens(texts: list[str]) -> Any:
        return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")

    def forward(texts: list[str]) -> torch.Tensor:
        given, wanted = tokens(texts), ("input_ids", "attention_mask") if masked else ("input_ids",)
        inputs = {name: given[name].to(options.device) for name in wanted if name in given}
        return getattr(model, "get_text_features", model)(**inputs).pooler_output

    settings = text_settings(options.captions, tokenizer.get_vocab(), lambda texts: tokens(texts)["input_ids"])
    own = [value for name, value in _arrays(model).items() if not name.startswith("vision_model.")]
    fingerprint = encoder_fingerprint(settings | {"masked": masked}, own)
    model.to(options.device, options.dtype)
    return PretrainedEncoder(f"transformers-text:{reference}", fingerprint, fingerprint, forward, options.captions)


def _transformers_model(name: str, revision: str | None) -> Any:
    from transformers import AutoModel

    known = {"use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32}
    model = AutoModel.from_pretrained(name, revision=revision or "main", **known)
    return model.eval().requires_grad_(False)


def _open_clip_name(reference: str) -> tuple[str, str | None]:
    """open_clip's (model name, pretrained tag) for a reference."""
    if Path(reference).is_dir():
        return f"local-dir:{reference}", None
    import open_clip

    name, _, tag = reference.partition("/")
    if name in open_clip.list_models():
        return name, tag or None
    if split_revision(reference, None)[1]:  # open_clip itself knows no revisions
        return f"local-dir:{locate(reference, 'encoder', files=OPEN_CLIP_FILES)}", None
    return f"hf-hub:{reference}", None


def _arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """All weights, by name, in half precision."""
    return {name: value.detach().cpu().half().numpy() for name, value in model.state_dict().items()}
