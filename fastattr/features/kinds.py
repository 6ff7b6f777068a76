"""Kinds of encoders: what opens a specification KIND:REF.

    open_clip-image   open_clip-text   transformers-image   transformers-text   diffusion   gradient

A new kind is one more entry of `KINDS`: a function from the reference and the `Options` to an `Encoder`.
"""

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

BACKENDS = ("numpy", "torch")
"""What computes a small CLIP: NumPy, which a first answer need not wait for, or torch through open_clip."""


def _open_clip(modality: str) -> Callable[[str, Options], Encoder]:
    def opened(reference: str, options: Options) -> Encoder:
        from fastattr.features.pretrained import OpenClipEncoder

        return OpenClipEncoder(reference, modality, options)

    return opened


def _transformers_image(reference: str, options: Options) -> Encoder:
    from fastattr.features.pretrained import TransformersImageEncoder

    return TransformersImageEncoder(reference, options)


def _transformers_text(reference: str, options: Options) -> Encoder:
    from fastattr.features.pretrained import TransformersTextEncoder

    return TransformersTextEncoder(reference, options)


def _diffusion(reference: str, options: Options) -> Encoder:
    from fastattr.features.diffusion import DiffusionEncoder
    from fastattr.generators.generator import Generator

    name = options.folder / reference if reference == "generator" and options.folder is not None else reference
    generator = Generator.from_pretrained(name, device=options.device, dtype=options.dtype)
    return DiffusionEncoder(generator, captions=options.captions)


def _gradient(reference: str, options: Options) -> Encoder:
    from fastattr.features.gradient import RECIPES, open_gradient_encoder

    path = options.folder / reference if reference in RECIPES and options.folder is not None else Path(reference)
    return open_gradient_encoder(path, run_dir=options.folder, device=options.device)


KINDS: dict[str, Callable[[str, Options], Encoder]] = {
    "open_clip-image": _open_clip("image"),
    "open_clip-text": _open_clip("text"),
    "transformers-image": _transformers_image,
    "transformers-text": _transformers_text,
    "diffusion": _diffusion,
    "gradient": _gradient,
}  # by the first word of a specification; a kind that ends in '-image' or '-text' looks at nothing else


def open_encoder(
    specification: str,
    *,
    folder: Path | None = None,
    captions: str = "first",
    device: str | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Encoder:
    """Load the encoder that a specification names.

    Args:
        specification: KIND:REF, see `fastattr.features.encoder`.
        folder: where a REF of 'encoder', 'generator' or 'gradients' is found (a run folder or an attributor's folder).
        captions: 'first' or 'mean', for encoders that read text.
        device: where to run; None is CUDA if there is one, but for the NumPy back end.
        dtype: of weights and activations; None is float32.
        backend: 'numpy' or 'torch'; None takes NumPy for a small CLIP on the CPU in float32, torch for everything else.

    Raises:
        InputError: the specification is not of a known form, or the NumPy back end does not compute this encoder.
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
