"""Features: frozen image and text encoders behind one interface.

Reads corpus/ or queries/; writes features/<encoder>/ with features.npy (float16, one row an image),
ids.parquet and manifest.json. An encoder is named by a specification:

    open_clip-image:REF   open_clip-text:REF   transformers-image:REF   transformers-text:REF
    diffusion:GENERATOR   gradient:FOLDER

where REF is a model name of open_clip ('ViT-B-32/laion2b_s34b_b79k'), a Hub id ('org/name[@revision]'), a local folder,
or the name of an embedded model ('emoji'). Images are prepared as the model's own config says. A text encoder reads the
first caption (as the authors' code does) or averages all. docs/encoders.md lists the kinds that are tested.
Sources: arXiv:2511.10721, sec. 4 (image and text features, concatenated).
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from fastattr.core.errors import InputError
from fastattr.core.files import atomic_path, read_json
from fastattr.core.models import ASSETS, embedded_models, locate, split_revision
from fastattr.core.stages import MANIFEST, fingerprint, finished, open_stage, require_same, write_manifest
from fastattr.corpus.store import Corpus

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastattr.generators.queries import Queries

OPEN_CLIP_FILES = ("*.json", "*.txt", "*.model", "open_clip_model.safetensors")
"""What open_clip loads a model from: no pickle."""
DTYPES = ("float32", "bfloat16", "float16")
"""Precisions in which encoders can run; features are float32, and stored as float16, in any case."""
PART_ROWS = 4096
"""Images whose features go into one file; a killed run loses at most one part a process."""


class Encoder(Protocol):
    """A frozen encoder of images or of captions."""

    specification: str
    fingerprint: str
    """Identifies weights and preprocessing."""

    def encode(self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> np.ndarray:
        """(B, F) float32 unit vectors; an image encoder ignores the captions, a text encoder the images."""
        ...


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Which encoders describe images and prompts."""

    encoders: tuple[str, ...] = ("open_clip-image:encoder", "open_clip-text:encoder")
    """Specifications; 'encoder' as REF is the run folder's own encoder."""
    captions: str = "first"
    """'first' or 'mean': how several captions of one image become one text feature."""
    batch_size: int = 256
    dtype: str = "float32"
    """Precision of weights and activations: 'float32', 'bfloat16' or 'float16'."""

    def __post_init__(self) -> None:
        if self.captions not in {"first", "mean"}:
            raise InputError(f"captions must be 'first' or 'mean', got {self.captions!r}")
        if not self.encoders:
            raise InputError("name at least one encoder")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {self.batch_size}")


class OpenClipEncoder:
    """The image tower or the text tower of a CLIP that open_clip loads."""

    def __init__(
        self,
        reference: str,
        modality: str,
        *,
        captions: str = "first",
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load it.

        Args:
            reference: folder with open_clip_config.json, 'NAME/PRETRAINED', or a Hub id.
            modality: 'image' or 'text'.
            captions: 'first' or 'mean'.
            device: where to run.
            dtype: of weights and activations.
        """
        import open_clip

        self.specification = f"open_clip-{modality}:{reference}"
        name, pretrained = _open_clip_name(reference)
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained, device=device)
        self.fingerprint = _weights_fingerprint(model, f"{modality}/{captions}/{preprocess}")
        self._model = model.eval().requires_grad_(False).to(dtype)
        self._preprocess = preprocess
        self._tokenizer = open_clip.get_tokenizer(name)
        self._modality, self._captions, self._device, self._dtype = modality, captions, device, dtype

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> np.ndarray:
        """See `Encoder.encode`."""
        if self._modality == "image":
            pixels = torch.stack([self._preprocess(image.convert("RGB")) for image in images]).to(self._device, self._dtype)
            return _unit(self._model.encode_image(pixels))
        return encode_captions(captions, self._encode_texts, average=self._captions == "mean")

    def _encode_texts(self, texts: list[str]) -> np.ndarray:
        return _unit(self._model.encode_text(self._tokenizer(texts).to(self._device)))


class TransformersImageEncoder:
    """A vision model of transformers (DINO, DINOv2, DINOv3, CLIP, SigLIP, ...).

    Two towers give what they compare with text, an image model with a pooling head of its own (CLIP, SigLIP) what that
    gives, all others (the DINOs, ViT) their class token.
    """

    def __init__(self, reference: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Load `reference`, a Hub id ('org/name[@revision]') or a folder, with its own image processor."""
        from transformers import AutoImageProcessor

        self.specification = f"transformers-image:{reference}"
        name, revision = split_revision(reference, None)
        self._processor = AutoImageProcessor.from_pretrained(name, revision=revision or "main")
        model = _transformers_model(name, revision)
        if hasattr(model, "get_image_features"):
            self._features = _pooled(model.get_image_features)
        elif model.config.model_type.startswith(("clip", "siglip")):
            self._features = _pooled(model)
        else:
            model.pooler = None  # not used, and made at random where a checkpoint has none (DINO)
            self._features = lambda **inputs: model(**inputs).last_hidden_state[:, 0]
        self.fingerprint = _weights_fingerprint(model, str(self._processor.to_dict()))
        model.to(device, dtype)
        self._device, self._dtype = device, dtype

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> np.ndarray:
        """See `Encoder.encode`."""
        inputs = self._processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        return _unit(self._features(**inputs.to(self._device, self._dtype)))


class TransformersTextEncoder:
    """The text tower of a CLIP or SigLIP that transformers loads, or a CLIP text encoder alone."""

    def __init__(
        self, reference: str, *, captions: str = "first", device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
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
        self.fingerprint = _weights_fingerprint(model, f"text/{captions}/{self._length}/{type(self._tokenizer).__name__}")
        model.to(device, dtype)
        self._average, self._device = captions == "mean", device

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> np.ndarray:
        """See `Encoder.encode`."""
        return encode_captions(captions, self._encode_texts, average=self._average)

    def _encode_texts(self, texts: list[str]) -> np.ndarray:
        tokens = self._tokenizer(texts, padding="max_length", max_length=self._length, truncation=True, return_tensors="pt")
        wanted = ("input_ids", "attention_mask") if self._masked else ("input_ids",)
        return _unit(self._features(**{name: tokens[name].to(self._device) for name in wanted if name in tokens}))


def _transformers_model(name: str, revision: str | None) -> Any:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(name, revision=revision or "main", use_safetensors=True, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def _pooled(forward: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """`forward` with its pooled output as the result."""
    return lambda **inputs: forward(**inputs).pooler_output


def encode_captions(captions: Sequence[Sequence[str]], encode: Any, *, average: bool) -> np.ndarray:
    """(B, F) unit text features of images that may have several captions each.

    Args:
        captions: B lists of captions, none empty.
        encode: texts -> (len(texts), F) unit vectors.
        average: average all captions of an image and normalise again, instead of taking the first.
    """
    if not average:
        first: np.ndarray = encode([texts[0] for texts in captions])
        return first
    vectors = encode([text for texts in captions for text in texts])
    ends = np.cumsum([len(texts) for texts in captions])
    means = np.stack([part.mean(axis=0) for part in np.split(vectors, ends[:-1])])
    unit: np.ndarray = means / np.linalg.norm(means, axis=1, keepdims=True)
    return unit


def _unit(features: torch.Tensor) -> np.ndarray:
    values: np.ndarray = torch.nn.functional.normalize(features.float(), dim=1).cpu().numpy()
    return values


def _open_clip_name(reference: str) -> tuple[str, str | None]:
    """open_clip's (model name, pretrained tag) for a reference."""
    if Path(reference).is_dir():
        return f"local-dir:{reference}", None
    name, _, tag = reference.partition("/")
    import open_clip

    if name in open_clip.list_models():
        return name, tag or None
    if split_revision(reference, None)[1]:  # open_clip itself knows no revisions
        return f"local-dir:{locate(reference, 'encoder', files=OPEN_CLIP_FILES)}", None
    return f"hf-hub:{reference}", None


def _weights_fingerprint(model: torch.nn.Module, preprocessing: str) -> str:
    """Identifies an encoder's weights (as float16, so that a half-precision copy is the same) and preprocessing."""
    import hashlib

    digest = hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", preprocessing).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def open_encoder(
    specification: str,
    *,
    folder: Path | None = None,
    captions: str = "first",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """Load the encoder that a specification names.

    Args:
        specification: see the module's text.
        folder: where a REF of 'encoder' is found (a run folder or an attributor's folder).
        captions: 'first' or 'mean', for text encoders.
        device: where to run.
        dtype: of weights and activations; features are float32 in any case.

    Raises:
        InputError: the specification is not of a known form.
    """
    kind, _, reference = specification.partition(":")
    if not reference:
        raise InputError(f"encoder {specification!r} has no model; write e.g. 'open_clip-image:ViT-B-32/laion2b_s34b_b79k'.")
    if reference == "encoder" and folder is not None:
        reference = str(folder / "encoder")
    elif reference in embedded_models():
        reference = str(ASSETS / reference / "attributor" / "encoder")
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    encoder: Encoder
    if kind in {"open_clip-image", "open_clip-text"}:
        encoder = OpenClipEncoder(reference, kind.removeprefix("open_clip-"), captions=captions, **options)
    elif kind == "transformers-image":
        encoder = TransformersImageEncoder(reference, **options)
    elif kind == "transformers-text":
        encoder = TransformersTextEncoder(reference, captions=captions, **options)
    elif kind == "diffusion":
        from fastattr.features.diffusion import DiffusionEncoder
        from fastattr.generators.generator import Generator

        name = folder / reference if reference == "generator" and folder is not None else reference
        encoder = DiffusionEncoder(Generator.from_pretrained(name, device=device, dtype=dtype), captions=captions)
    elif kind == "gradient":
        from fastattr.features.gradient import RECIPES, open_gradient_encoder

        path = folder / reference if reference in RECIPES and folder is not None else Path(reference)
        encoder = open_gradient_encoder(path, run_dir=folder, device=device)
    else:
        raise InputError(
            f"unknown encoder kind {kind!r}; use open_clip-image, open_clip-text, transformers-image, transformers-text, "
            "diffusion or gradient."
        )
    encoder.specification = specification
    return encoder


def modality(specification: str) -> str:
    """What an encoder's features are of: 'image', 'text', or 'both', which is all that isn't said to be one of them."""
    ending = specification.partition(":")[0].rpartition("-")[2]
    return ending if ending in {"image", "text"} else "both"


def slug(specification: str) -> str:
    """A folder name for an encoder."""
    return re.sub(r"[^\w.-]+", "_", specification)


def encode_all(
    encoder: Encoder,
    images: Callable[[int], Image.Image],
    captions: Sequence[Sequence[str]],
    *,
    batch_size: int,
    rows: range | None = None,
) -> np.ndarray:
    """(N, F) float16 features of `rows`, or of all.

    Args:
        encoder: which.
        images: row -> image, so that only one batch is in memory.
        captions: of all rows.
        batch_size: images at once.
        rows: which; None is all of them.
    """
    rows = range(len(captions)) if rows is None else rows
    parts = []
    for start in range(rows.start, rows.stop, batch_size):
        batch = range(start, min(start + batch_size, rows.stop))
        parts.append(encoder.encode([images(row) for row in batch], [captions[row] for row in batch]).astype(np.float16))
    return np.concatenate(parts)


def write_features(folder: Path, features: np.ndarray, ids: Sequence[str]) -> None:
    """Write (N, F) features and the ids of their rows."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "features.npy") as temporary:
        np.save(temporary, features)
    with atomic_path(folder / "ids.parquet") as temporary:
        pq.write_table(pa.table({"id": list(ids)}), temporary)


def read_features(folders: Sequence[Path], ids: Sequence[str]) -> np.ndarray:
    """(N, F) float32 features of `ids`, the encoders' features side by side; rows are matched by id.

    Raises:
        InputError: an id has no features in one of the folders.
    """
    columns = []
    for folder in folders:
        stored = np.load(folder / "features.npy", mmap_mode="r")
        columns.append(np.asarray(stored[require_rows(folder, ids)], dtype=np.float32))
    return np.concatenate(columns, axis=1)


def require_rows(folder: Path, ids: Sequence[str]) -> np.ndarray:
    """(N,) rows of `ids` in a feature folder.

    Raises:
        InputError: an id has no features there.
    """
    open_stage(folder, "features")
    row_of = {name: row for row, name in enumerate(pq.read_table(folder / "ids.parquet")["id"].to_pylist())}
    missing = [name for name in ids if name not in row_of]
    if missing:
        raise InputError(f"{len(missing)} ids have no features in {folder}, e.g. {missing[:3]}; run the features stage again.")
    return np.array([row_of[name] for name in ids], dtype=np.int64)


def run(config: FeaturesConfig, run_dir: Path) -> dict[str, Any]:
    """Encode corpus and queries with every encoder, on all processes; returns each folder's manifest by name."""
    from accelerate import Accelerator  # here, so that a query need not wait for it

    from fastattr.generators.queries import Queries

    accelerator = Accelerator()
    corpus = Corpus(run_dir / "corpus")
    queries = Queries(run_dir / "queries")
    manifests: dict[str, Any] = {}
    for specification in config.encoders:
        kind, _, reference = specification.partition(":")
        if kind == "gradient" and accelerator.is_main_process:
            _fit_gradients(run_dir, corpus, reference)
        accelerator.wait_for_everyone()
        encoder = open_encoder(
            specification,
            folder=run_dir,
            captions=config.captions,
            device=str(accelerator.device),
            dtype=getattr(torch, config.dtype),
        )
        manifests |= encode_sets(encoder, corpus, queries, run_dir, config, accelerator)
    return manifests


def encode_sets(
    encoder: Encoder, corpus: Corpus, queries: Queries, folder: Path, config: FeaturesConfig, accelerator: Accelerator
) -> dict[str, dict[str, Any]]:
    """Write an encoder's features of corpus and queries under `folder`, as `run` has them; returns the manifests."""
    manifests = {}
    sets = (
        ("features", corpus.fingerprint, corpus.image_ids, corpus.image, corpus.captions),
        ("query_features", queries.fingerprint, queries.query_ids, queries.image, [[prompt] for prompt in queries.prompts]),
    )
    for name, source, ids, images, captions in sets:
        target = folder / name / slug(encoder.specification)
        inputs = {"source": source, "encoder": encoder.fingerprint}
        manifests[f"{name}/{target.name}"] = _encode_set(
            config, target, encoder, ids, images, captions, accelerator, inputs=inputs
        )
    return manifests


def _encode_set(
    config: FeaturesConfig,
    folder: Path,
    encoder: Encoder,
    ids: Sequence[str],
    images: Callable[[int], Image.Image],
    captions: Sequence[Sequence[str]],
    accelerator: Accelerator,
    *,
    inputs: dict[str, str],
) -> dict[str, Any]:
    """One feature folder, in parts that are split over the processes and kept if killed; returns its manifest."""
    from fastattr.core.processes import in_parts

    settings = {key: value for key, value in vars(config).items() if (key, value) != ("dtype", "float32")}  # as ever
    if not finished(folder, stage="features", config=settings, inputs=inputs):
        parts = folder / f"parts-{fingerprint([settings, inputs, encoder.specification])}"
        ready = len(list(parts.glob("*.npy"))) * PART_ROWS
        started = time.monotonic()
        features = in_parts(
            parts,
            len(ids),
            PART_ROWS,
            lambda rows: encode_all(encoder, images, captions, batch_size=config.batch_size, rows=rows),
            accelerator,
            description=f"{folder.parent.name} {encoder.specification}",
        )
        seconds = time.monotonic() - started
        if accelerator.is_main_process:
            write_features(folder, features, ids)
            write_manifest(
                folder,
                stage="features",
                config=settings,
                inputs=inputs,
                width=features.shape[1],
                rows=len(ids),
                encoder=encoder.specification,
                dtype=config.dtype,
                device=accelerator.device.type,
                processes=accelerator.num_processes,
                seconds=round(seconds, 2),
                # Reading, preparing and encoding, by all processes together; of what the run that finished encoded itself.
                images_per_second=round(max(0, len(ids) - ready) / seconds, 1),
            )
            shutil.rmtree(parts)
        accelerator.wait_for_everyone()
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    return manifest


def _fit_gradients(run_dir: Path, corpus: Corpus, name: str) -> None:
    """Prepare a gradient encoder of the run folder from its generator; one that lies elsewhere was made by someone else."""
    from fastattr.features.gradient import RECIPES, fit_gradient_encoder
    from fastattr.generators.generator import Generator

    if name in RECIPES:
        generator = Generator.from_pretrained(run_dir / "generator")
        fit_gradient_encoder(generator, corpus, run_dir / name, RECIPES[name], reference="generator")


def folders(run_dir: Path, name: str, encoders: Sequence[str]) -> list[Path]:
    """The feature folders of these encoders; `name` is 'features' or 'query_features'."""
    return [run_dir / name / slug(specification) for specification in encoders]


def features_fingerprint(paths: Sequence[Path]) -> str:
    """Identifies a set of feature folders."""
    return fingerprint([open_stage(path, "features")["fingerprint"] for path in paths])


def check_source(path: Path, expected: str) -> None:
    """Refuse a feature folder of another corpus or other queries."""
    found = open_stage(path, "features")["inputs"]["source"]
    require_same(f"the source of {path}", found, expected, "Run the features stage in this run folder again.")
