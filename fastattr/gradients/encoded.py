"""Training images and queries as the denoiser sees them: latents and text conditioning, computed once and kept on disk."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastattr.core.files import atomic_path, read_json, write_json
from fastattr.core.processes import files_of_parts, in_parts
from fastattr.corpus.store import Corpus
from fastattr.generators.families import Conditioning
from fastattr.generators.generator import Generator


@dataclass(frozen=True)
class EncodedImages:
    """Training images as the denoiser sees them: V views (the image, perhaps its mirror image), one or more captions each."""

    image_ids: Sequence[str]
    latents: Tensor
    """(N, V, L, h, w), scaled."""
    conditioning: Conditioning
    """(M rows) text conditioning of all captions, image after image; M = N where each has one."""
    first_caption: np.ndarray
    """(N + 1,) rows of `conditioning`: the captions of image i are first_caption[i] to first_caption[i + 1] - 1."""

    @property
    def views(self) -> int:
        """V, 1 or 2."""
        return int(self.latents.shape[1])

    def first(self, count: int) -> EncodedImages:
        """The first images of these, or all if they are fewer."""
        kept = self.first_caption[: count + 1]
        rows = slice(0, int(kept[-1]))
        return EncodedImages(list(self.image_ids[:count]), self.latents[:count], self.conditioning[rows], kept)


def encode_corpus(
    generator: Generator,
    corpus: Corpus,
    *,
    batch_size: int,
    folder: Path,
    captions: str = "first",
    mirrored: bool = False,
    accelerator: Accelerator | None = None,
) -> EncodedImages:
    """Latents and conditioning of every training image, `batch_size` of them, or of their captions, at once.

    Args:
        generator: whose VAE and text encoder to use.
        corpus: the images.
        folder: what is computed is kept there for the next run; its name must say generator and corpus.
        captions: 'first' or 'all'.
        mirrored: whether to encode the mirror images as a second view.
        accelerator: the processes to split the work over; None is this one alone.
    """
    chosen = [texts if captions == "all" else texts[:1] for texts in corpus.captions]
    texts = [text for own in chosen for text in own]

    def view(rows: range, *, mirror: bool) -> np.ndarray:
        images = [corpus.image(row) for row in rows]
        encoded = generator.encode_image([ImageOps.mirror(image) for image in images] if mirror else images)
        return (encoded.float() if encoded.dtype == torch.bfloat16 else encoded).cpu().numpy()  # numpy has no bfloat16

    def conditioning(rows: range) -> Conditioning:
        return generator.encode_prompt([texts[row] for row in rows])

    def computed(name: str, count: int, compute: Callable[[range], np.ndarray]) -> Tensor:
        return torch.from_numpy(in_parts(folder / name, count, batch_size, compute, accelerator, description=f"encode {name}"))

    views = {"latents": False} | ({"mirrored": True} if mirrored else {})
    latents = [computed(name, len(corpus), partial(view, mirror=mirror)) for name, mirror in views.items()]
    told = _conditioning_in_parts(folder / f"{captions}-prompts", len(texts), batch_size, conditioning, accelerator)
    return EncodedImages(corpus.image_ids, torch.stack(latents, dim=1), told, np.cumsum([0, *map(len, chosen)]))


def _conditioning_in_parts(
    folder: Path, count: int, size: int, compute: Callable[[range], Conditioning], accelerator: Accelerator | None
) -> Conditioning:
    """As `in_parts`, of several tensors at once, in their own precision.

    Token embeddings of a large text encoder outgrow memory long before latents do, so that the result is left on disk, one
    plain file a tensor, and mapped.
    """

    def write(path: Path, rows: range) -> None:
        save_file({name: part.cpu().contiguous() for name, part in compute(rows).tensors.items()}, path)

    described = folder / "tensors.json"
    if not described.exists():
        parts = folder / "parts"
        files = files_of_parts(parts, count, size, "safetensors", write, accelerator, description="encode prompts")
        if accelerator is None or accelerator.is_main_process:
            first = load_file(files[0][1])
            for name in first:
                with atomic_path(folder / f"{name}.bin") as temporary, temporary.open("wb") as whole:
                    for _, file in files:
                        whole.write(load_file(file)[name].view(torch.uint8).numpy().data)
            shapes = {name: [str(part.dtype).removeprefix("torch."), [count, *part.shape[1:]]] for name, part in first.items()}
            write_json(described, shapes)
            shutil.rmtree(parts)
        if accelerator is not None:
            accelerator.wait_for_everyone()
    tensors = {}
    for name, (kind, shape) in read_json(described).items():
        mapped = torch.from_file(str(folder / f"{name}.bin"), size=math.prod(shape), dtype=getattr(torch, kind))
        tensors[name] = mapped.view(shape)
    return Conditioning(tensors)
