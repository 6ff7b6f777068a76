"""Kinds of encoders: a new one is an entry of `KINDS`, a function from the reference and the `Options` to an `Encoder`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fastattr.core.errors import InputError
from fastattr.core.models import ASSETS, embedded_models
from fastattr.features.encoder import Encoder, Options
from fastattr.features.light_clip import LightClip, supports

if TYPE_CHECKING:
    import torch

BACKENDS = ("numpy", "torch")  # what computes a small CLIP: NumPy, so that a first answer need not load torch, or open_clip


def _pretrained(name: str, *modality: str) -> Callable[[str, Options], Encoder]:
    """A function of `pretrained`, which loads torch, by its name."""

    def opened(reference: str, options: Options) -> Encoder:
        from fastattr.features import pretrained

        return getattr(pretrained, name)(reference, *modality, options)

    return opened


def _diffusion(reference: str, options: Options) -> Encoder:
    from fastattr.features.by_generator import DiffusionEncoder
    from fastattr.generators.generator import Generator

    name = options.folder / reference if reference == "generator" and options.folder is not None else reference
    generator = Generator.from_pretrained(name, device=options.device, dtype=options.dtype)
    return DiffusionEncoder(generator, captions=options.captions)


def _gradient(reference: str, options: Options) -> Encoder:
    from fastattr.features.by_generator import RECIPES, open_gradient_encoder

    path = options.folder / reference if reference in RECIPES and options.folder is not None else Path(reference)
    return open_gradient_encoder(path, run_dir=options.folder, device=options.device)


KINDS: dict[str, Callable[[str, Options], Encoder]] = {  # a kind that ends in '-image' or '-text' looks at nothing else
    "open_clip-image": _pretrained("open_clip_encoder", "image"),
    "open_clip-text": _pretrained("open_clip_encoder", "text"),
    "transformers-image": _pretrained("transformers_image_encoder"),
    "transformers-text": _pretrained("transformers_text_encoder"),
    "diffusion": _diffusion,
    "gradient": _gradient,
}


def open_encoder(
    specification: str,
    *,
    folder: Path | None = None,
    captions: str = "first",
    device: str | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Encoder:
    """Load the encoder that a specification, KIND:REF, names; folder, captions, device and dtype as of `Options`.

    A device of None is CUDA if there is one, but for the NumPy back end; a dtype of None is float32; a back end of None is
    NumPy for a small CLIP on the CPU in float32, torch for everything else. Raises InputError if the specification is not of a
    known form, or the NumPy back end does not compute this encoder.
    """
    kind, _, reference = specification.partition(":")
    if not reference:
        raise InputError(f"encoder {specification!r} has no model; write e.g. 'open_clip-image:ViT-B-32/laion2b_s34b_b79k'.")
    if kind not in KINDS:
        raise InputError(f"unknown encoder kind {kind!r}; use one of {', '.join(KINDS)}.")
    if backend not in {None, *BACKENDS}:
        raise InputError(f"backend must be 'numpy', 'torch' or None, got {backend!r}")
    if reference == "encoder" and folder is not None:
        reference = str(folder / "encoder")
    elif reference in embedded_models():
        reference = str(ASSETS / reference / "attributor" / "encoder")
    plain = device in {None, "cpu"} and str(dtype) in {"None", "torch.float32"}
    if backend != "torch" and plain and kind.startswith("open_clip-") and supports(Path(reference)):
        encoder: Encoder = LightClip(Path(reference), kind.removeprefix("open_clip-"), captions=captions)
    elif backend == "numpy":
        raise InputError(f"the NumPy back end does not compute {specification!r} here; leave out backend, or write 'torch'.")
    else:
        import torch

        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        encoder = KINDS[kind](reference, Options(folder, captions, chosen, dtype or torch.float32))
    encoder.specification = specification
    return encoder
