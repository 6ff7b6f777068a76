"""Loading: a diffusers pipeline from an embedded folder, a folder, or the Hub, its words, and the LoRA that lies on it.

A LoRA adds scale x B A to a layer's weight. peft, diffusers, kohya and their checkpoints name layers and scales differently,
and diffusers leaves out what it does not recognise. So every pair of matrices is counted: a layer that is not found refuses
the file, and each layer's scale is what the file says (alpha / rank, or 1).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastattr.core.errors import ArtifactDamagedError, ArtifactMismatchError, ArtifactNotFoundError, MissingExtraError
from fastattr.core.files import read_json, sha256_file
from fastattr.core.models import PIPELINE_FILES, locate
from fastattr.core.stages import fingerprint
from fastattr.generators.families import Options, sampling_defaults

LORA_FILES = ("*.safetensors", "adapter_config.json")
PARTS = {"unet": "unet", "transformer": "transformer", "te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
"""kohya's names of a pipeline's networks."""
WRAPPERS = r"^(?:base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|unet\.|transformer\.)*"
KEY = re.compile(r"(.+?)\.(?:lora_([AB])(?:\.\w+)?\.weight|lora[_.](down|up)\.weight|(alpha))")
OTHER_KINDS = re.compile(r"\.(?:hada_|lokr_|oft_|dora_scale|lora_magnitude_vector|ia3_)")


@dataclass
class Pair:
    """What a LoRA adds to one layer: `down` (rank, in) A and `up` (out, rank) B."""

    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None


def locate_lora(name_or_path: str | Path, **hub: Any) -> Path:
    """The safetensors file of a LoRA: the path of a file, or what a folder or Hub repository holds.

    Of a folder that training wrote: the finished LoRA, else that of the checkpoint-N with the highest number. `hub` are
    arguments of `fastattr.core.models.locate`. ArtifactNotFoundError if there is no such file, or there are several.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    folder = locate(name_or_path, "generator", files=LORA_FILES, **hub)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        numbered = sorted(folder.glob("checkpoint-*"), key=lambda found: int(found.name.rpartition("-")[2] or 0))
        files = sorted(numbered[-1].glob("*.safetensors")) if numbered else []
    usual = [file for file in files if file.name in {"pytorch_lora_weights.safetensors", "adapter_model.safetensors"}]
    usual = usual or [file for file in files if not re.search(r"-(\d{6}|step\d+|e\d+)$", file.stem)]
    if len(usual or files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise ArtifactNotFoundError(f"{name_or_path} should hold one LoRA, found {names}; give the path of one file.")
    return (usual or files)[0]


def load_lora(pipeline: Any, file: Path) -> None:
    """Lay a LoRA on a pipeline's networks, all of it; it stays apart from their weights. MissingExtraError without peft.

    ArtifactDamagedError if the file is no LoRA, or not one of this pipeline, or only in part.
    """
    from diffusers.utils import is_peft_available

    if not is_peft_available():
        raise MissingExtraError("a LoRA needs peft; install it with `pip install 'fastattr[lora]'`.")
    try:
        with safe_open(file, framework="pt") as opened:
            header, tensors = opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own type
        raise ArtifactDamagedError(f"{file} is no safetensors file: {error}") from error
    if other := sorted(filter(OTHER_KINDS.search, tensors)):
        raise ArtifactDamagedError(f"{file} is no plain LoRA ({other[0]}); LoHa, LoKr, DoRA and the like are not supported.")
    pairs, unknown = pairs_of(pipeline, tensors)
    if unknown and (converted := _converted(pipeline, tensors)):
        pairs, unknown = pairs_of(pipeline, converted)
    if unknown or not pairs:
        raise ArtifactDamagedError(
            f"{file} is for another network: {len(unknown)} of its names are not in this {type(pipeline).__name__}, "
            f"e.g. {sorted(unknown)[:3]}. Name the pipeline that it was trained on."
        )
    state: dict[str, Tensor] = {}
    for layer, pair in pairs.items():
        if pair.down is None or pair.up is None:
            raise ArtifactDamagedError(f"{file} holds half of a pair of matrices, for {layer}; fetch it again.")
        state |= {f"{layer}.lora_A.weight": pair.down, f"{layer}.lora_B.weight": pair.up}
    try:
        pipeline.load_lora_weights(state, adapter_name="lora")
    except Exception as error:  # diffusers and peft raise many types
        raise ArtifactDamagedError(f"{file} cannot be laid on {type(pipeline).__name__}: {first_line(error)}") from error
    scales = scales_of(pairs, header, read_json(config) if (config := file.parent / "adapter_config.json").exists() else {})
    _put_in_force(pipeline, scales, file)


def first_line(error: Exception) -> str:
    """The first line of what an error says, else its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def pairs_of(pipeline: Any, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Pair], list[str]]:
    """The pairs by 'NETWORK.LAYER' as the pipeline names them, and the names of tensors that belong to no layer of it."""
    layers = {
        f"{part}.{name}"
        for part in sorted({*PARTS.values(), "text_encoder_3"})
        if isinstance(network := getattr(pipeline, part, None), nn.Module)
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    of_parts = [(word, name, f"{part}.") for word, part in PARTS.items() for name in layers if name.startswith(f"{part}.")]
    kohya = {f"lora_{word}_{name.removeprefix(part).replace('.', '_')}": name for word, name, part in of_parts}
    pairs: dict[str, Pair] = {}
    unknown = []
    for name, tensor in tensors.items():
        match = KEY.fullmatch(name)
        spelled = match[1] if match else name
        bare = re.sub(WRAPPERS, "", spelled)
        short = re.sub(r"[._]text_model(?=[._])", "", spelled)  # newer text encoders have one module less
        known = [kohya.get(spelled), kohya.get(short), spelled, short, f"unet.{bare}", f"transformer.{bare}"]
        layer = next((one for one in known if one in layers), None)
        if match is None or layer is None:
            unknown.append(name)
            continue
        pair = pairs.setdefault(layer, Pair())
        if match[4]:
            pair.alpha = float(tensor)
        elif match[2] == "A" or match[3] == "down":
            pair.down = tensor
        else:
            pair.up = tensor
    return pairs, unknown


def _converted(pipeline: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names into which diffusers turns those of other trainers; {} where it does not know all of them."""
    try:
        found = pipeline.lora_state_dict(dict(tensors))
    except Exception:  # of a kind that it does not know, which the caller says
        return {}
    state, alphas = found if isinstance(found, tuple) else (found, {})
    if len(state) < sum(not name.endswith(".alpha") for name in tensors):
        return {}
    return {**state, **{name: torch.tensor(float(alpha)) for name, alpha in (alphas or {}).items()}}


def scales_of(pairs: Mapping[str, Pair], header: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, float]:
    """Each layer's factor on B A: from its own alpha, else from peft's config or the file's header, else 1."""
    said: dict[str, Any] = {**header, **json.loads(header.get("lora_adapter_metadata", "{}"))}
    scales = {}
    for layer, pair in pairs.items():
        assert pair.down is not None
        part, _, name = layer.partition(".")
        rank = len(pair.down)
        alpha = pair.alpha
        if alpha is None:
            patterns = config.get("alpha_pattern") or said.get(f"{part}.alpha_pattern") or {}
            fitting = [value for pattern, value in patterns.items() if re.search(rf"(^|\.){pattern}$", name)]
            alpha = fitting[0] if fitting else config.get("lora_alpha", said.get(f"{part}.lora_alpha", rank))
        stabilised = config.get("use_rslora") or said.get(f"{part}.use_rslora") in {True, "true", "True"}
        scales[layer] = float(alpha) / (rank**0.5 if stabilised else rank)
    return scales


def _put_in_force(pipeline: Any, scales: Mapping[str, float], file: Path) -> None:
    """Give every layer its scale, and see that each has its LoRA."""
    parts = sorted({layer.partition(".")[0] for layer in scales})
    modules = {f"{part}.{name}": module for part in parts for name, module in getattr(pipeline, part).named_modules()}
    missing = [layer for layer in scales if "lora" not in getattr(modules.get(layer), "lora_A", {})]
    for layer in set(scales) - set(missing):
        modules[layer].scaling["lora"] = scales[layer]
    if missing:
        raise ArtifactDamagedError(f"{file} took hold of all layers but {len(missing)}, e.g. {missing[:3]}; it is refused.")


def lora_scales(network: nn.Module) -> dict[str, float]:
    """Factor on each LoRA of a network, which its matrices don't say; {} where there is none."""
    scales = {name: getattr(module, "scaling", None) for name, module in network.named_modules()}
    return {name: float(scale["lora"]) for name, scale in scales.items() if isinstance(scale, dict) and "lora" in scale}


WORDS = "words.txt"
"""File of a generator folder: the words of its training captions, one a line."""
LITTLE_WORDS = re.compile("a|an|the|some|one|my|of|in|on|at|to|for|with|and|or|is|are|it|its|this|that|by|from|as")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions that a manifest may name."""


def load_pipeline(
    name_or_path: str | Path, *, dtype: torch.dtype | None, lora: str | Path | None, revision: str | None = None, **hub: Any
) -> tuple[Any, dict[str, Any], frozenset[str] | None]:
    """A pipeline, its manifest ({} without one), and the words that it was trained on (None if its folder does not say).

    Arguments and errors are those of `Generator.from_pretrained`.
    """
    from diffusers import DiffusionPipeline

    folder = locate(name_or_path, "generator", files=PIPELINE_FILES, revision=revision, **hub)
    manifest = _manifest_of(folder)
    reference: dict[str, Any] = manifest.get("reference", {})
    if reference:
        folder = locate(reference["pretrained"], "generator", files=PIPELINE_FILES, revision=reference["revision"], **hub)
        dtype = dtype or DTYPES[reference["dtype"]]
    for file, expected in manifest.get("sha256", {}).items():
        if not (folder / file).exists() or sha256_file(folder / file) != expected:
            raise ArtifactDamagedError(f"{folder / file} is missing or not as its manifest says; fetch the generator again.")
    try:
        with _quiet_diffusers():
            known = {"local_files_only": True, "use_safetensors": True}
            pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype or torch.float32, **known)
    except Exception as error:  # diffusers raises many types for a damaged folder
        raise ArtifactDamagedError(f"{folder} cannot be loaded as a diffusers pipeline: {first_line(error)}") from error
    with _quiet_diffusers():
        if lora:
            load_lora(pipeline, locate_lora(lora, **hub))
        elif reference.get("lora"):
            adapter = locate_lora(reference["lora"], revision=reference["lora_revision"], **hub)
            if sha256_file(adapter) != reference["lora_sha256"]:
                raise ArtifactMismatchError(f"{adapter} has changed since {name_or_path} was made; use another run folder.")
            load_lora(pipeline, adapter)
    words = frozenset((folder / WORDS).read_text(encoding="utf-8").split()) if (folder / WORDS).exists() else None
    return pipeline, manifest, words


def _manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a generator's folder; {} without one."""
    return read_json(folder / "manifest.json") if (folder / "manifest.json").exists() else {}


def read_defaults(name_or_path: str | Path) -> dict[str, float]:
    """The `defaults` that `Generator.from_pretrained(name_or_path)` will have, without loading it; ArtifactNotFoundError."""
    folder = locate(name_or_path, "generator", files=["manifest.json", "model_index.json"])
    manifest = _manifest_of(folder)
    found: dict[str, float] = manifest.get("defaults", {})
    if {"steps", "guidance"} <= set(found):
        return found
    import diffusers

    return sampling_defaults(getattr(diffusers, read_json(folder / "model_index.json")["_class_name"])) | found


def weights_fingerprint(
    networks: Sequence[nn.Module], scheduler: Mapping[str, Any], options: Options, lora_scales: Sequence[Mapping[str, float]]
) -> str:
    """Identifies all that losses depend on."""
    digest = hashlib.sha256()
    for network in networks:
        for name, value in sorted(network.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    digest.update(fingerprint({key: value for key, value in scheduler.items() if not key.startswith("_")}).encode())
    if options != Options():
        digest.update(fingerprint(asdict(options)).encode())
    if lora_scales:
        digest.update(fingerprint(lora_scales).encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Hide diffusers' progress bars and the notice about a missing safety checker while loading."""
    from diffusers.utils import logging as diffusers_logging

    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)


def words_of(text: str) -> list[str]:
    """Its words in lower case, in order: runs of letters, and of digits."""
    return re.findall(r"[^\W\d_]+|\d+", text.lower())


def unknown_words(prompt: str, known: Collection[str]) -> list[str]:
    """Words of a prompt, once each, that are not `known`, nor are in the singular; articles and the like are known."""
    unknown = []
    for word in dict.fromkeys(words_of(prompt)):
        forms = {word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word)}
        if not LITTLE_WORDS.fullmatch(word) and not any(form in known for form in forms):
            unknown.append(word)
    return unknown
