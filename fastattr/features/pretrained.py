"""Pretrained encoders: image and text towers that open_clip and transformers load; docs/encoders.md lists those tested."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Sequence
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


class OpenClipEncoder:
    """The image tower or the text tower of a CLIP that open_clip loads."""

    def __init__(self, reference: str, modality: str, options: Options = DEFAULTS) -> None:
        """Load the tower 'image' or 'text' of a folder with open_clip_config.json, of 'NAME/PRETRAINED', or of a Hub id."""
        import open_clip

        self.specification = f"open_clip-{modality}:{reference}"
        name, pretrained = _open_clip_name(reference)
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained, device=options.device)
        self._tokenizer = open_clip.get_tokenizer(name)
        if modality == "image":
            settings = image_settings(model.visual.preprocess_cfg)
        else:
            settings = text_settings(options.captions, _vocabulary(self._tokenizer), self._tokenizer)
        weights = _arrays(model)
        self.fingerprint = encoder_fingerprint(settings, tower(weights, modality).values())
        self.former = former_fingerprint(f"{modality}/{options.captions}/{preprocess}", weights)
        self._model = model.eval().requires_grad_(False).to(options.dtype)
        self._preprocess, self._modality, self._options = preprocess, modality, options

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> np.ndarray:
        """See `Encoder.encode`."""
        if self._modality == "image":
            pixels = torch.stack([self._preprocess(image.convert("RGB")) for image in images])
            return _unit(self._model.encode_image(pixels.to(self._options.device, self._options.dtype)))
        return encode_captions(captions, self._encode_texts, average=self._options.captions == "mean")

    def _encode_texts(self, texts: list[str]) -> np.ndarray:
        return _unit(self._model.encode_text(self._tokenizer(texts).to(self._options.device)))


class TransformersImageEncoder:
    """A vision model of transformers (DINO, DINOv2, DINOv3, CLIP, SigLIP, ...)."""

    def __init__(self, reference: str, options: Options = DEFAULTS) -> None:
        """Load `reference`, a Hub id ('org/name[@revision]') or a folder, with its own image processor."""
        from transformers import AutoImageProcessor

        self.specification = f"transformers-image:{reference}"
        name, revision = split_revision(reference, None)
        self._processor = AutoImageProcessor.from_pretrained(name, revision=revision or "main")
        model = _transformers_model(name, revision)
        if hasattr(model, "get_image_features"):  # two towers: what they compare with text
            self._features = _pooled(model.get_image_features)
        elif model.config.model_type.startswith(("clip", "siglip")):  # its pooling head
            self._features = _pooled(model)
        else:  # the class token
            model.pooler = None  # not used, and made at random where a checkpoint has none (DINO)
            self._features = lambda **inputs: model(**inputs).last_hidden_state[:, 0]
        settings = {name: value for name, value in self._processor.to_dict().items() if name in PROCESSING}
        described = json.loads(json.dumps(settings, default=_plainly))
        self.fingerprint = self.former = encoder_fingerprint(described, _arrays(model).values())
        model.to(options.device, options.dtype)
        self._options = options

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> np.ndarray:
        """See `Encoder.encode`."""
        inputs = self._processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        return _unit(self._features(**inputs.to(self._options.device, self._options.dtype)))


class TransformersTextEncoder:
    """The text tower of a CLIP or SigLIP that transformers loads, or a CLIP text encoder alone."""

    def __init__(self, reference: str, options: Options = DEFAULTS) -> None:
        """Load `reference`, a Hub id ('org/name[@revision]') or a folder, with its own tokenizer."""
        from transformers import AutoTokenizer

        self.specification = f"transformers-text:{reference}"
        name, revision = split_revision(reference, None)
        self._tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main")
        model = _transformers_model(name, revision)
        self._features = _pooled(getattr(model, "get_text_features", model))
        config = getattr(model.config, "text_config", model.config)
        self._length = int(config.max_position_embeddings)
        # SigLIP was trained to see its padding; CLIP never looks behind the end of the text.
        self._masked = not model.config.model_type.startswith("siglip")
        settings = text_settings(options.captions, self._tokenizer.get_vocab(), lambda texts: self._tokens(texts)["input_ids"])
        own = [value for name, value in _arrays(model).items() if not name.startswith("vision_model.")]
        self.fingerprint = self.former = encoder_fingerprint(settings | {"masked": self._masked}, own)
        model.to(options.device, options.dtype)
        self._options = options

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> np.ndarray:
        """See `Encoder.encode`."""
        return encode_captions(captions, self._encode_texts, average=self._options.captions == "mean")

    def _tokens(self, texts: list[str]) -> Any:
        return self._tokenizer(texts, padding="max_length", max_length=self._length, truncation=True, return_tensors="pt")

    def _encode_texts(self, texts: list[str]) -> np.ndarray:
        tokens = self._tokens(texts)
        wanted = ("input_ids", "attention_mask") if self._masked else ("input_ids",)
        return _unit(self._features(**{name: tokens[name].to(self._options.device) for name in wanted if name in tokens}))


def _transformers_model(name: str, revision: str | None) -> Any:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(name, revision=revision or "main", use_safetensors=True, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def _pooled(forward: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """`forward` with its pooled output as the result."""
    return lambda **inputs: forward(**inputs).pooler_output


def _unit(features: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(features.float(), dim=1).cpu().numpy()


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


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    """Token -> id, of open_clip's own tokenizer or of the one of transformers that it wraps."""
    wrapped = getattr(tokenizer, "tokenizer", None)
    return dict(tokenizer.encoder if wrapped is None else wrapped.get_vocab())


def _arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """All weights, by name, in half precision."""
    return {name: value.detach().cpu().half().numpy() for name, value in model.state_dict().items()}


def _plainly(value: Any) -> Any:
    """JSON for the sizes and enumerations that processors hold."""
    return value.value if isinstance(value, enum.Enum) else dict(value)
