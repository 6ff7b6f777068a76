"""Import what the authors of the paper released: their network as an attributor, their teacher's rankings as score tables.

Their ranking is ascending in scale * cosine + bias of a ReLU MLP. Here higher is more influential: where their scale is
positive, the index holds the negated embeddings. Orders are theirs exactly, on the same features. Every function raises
ArtifactNotFoundError where a file is missing, ArtifactDamagedError where it is not what it should be, and InputError where
files do not fit one another.

Sources: the file formats of github.com/PeterWang512/FastGDA; its code is CC BY-NC-SA 4.0, and none of it is used here.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from fastattr.attributor.bases import replacing
from fastattr.attributor.inputs import COLUMNS
from fastattr.attributor.make import seal_folder
from fastattr.core.errors import ArtifactDamagedError, ArtifactNotFoundError, InputError
from fastattr.core.files import atomic_path, read_json, sha256_file, write_json
from fastattr.core.stages import MANIFEST, fingerprint, write_manifest
from fastattr.generators.queries import SPLITS
from fastattr.index.build import build
from fastattr.index.choose import IndexConfig
from fastattr.students.student import Student, StudentConfig, embed
from fastattr.teachers.scores import ScoredQuery, write_shard

LICENSE = "CC BY-NC-SA 4.0"
"""Of the released weights, features and rankings."""
SOURCE = "FastGDA (github.com/PeterWang512/FastGDA, arXiv:2511.10721)"
TEACHER = "fastgda_abu_plus"
SCORES_PER_SHARD = 2_000_000
PICKLED = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),  # how older protocols write bytes
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}
"""What a pickle of arrays in plain containers names; anything else in it is refused."""


class ArrayUnpickler(pickle.Unpickler):
    """Reads arrays, numbers, strings and plain containers; a pickle that names anything else is refused before it runs."""

    def find_class(self, module: str, name: str) -> Any:
        """The few names that arrays need; UnpicklingError for any other."""
        if (module, name) not in PICKLED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _require(path: Path, what: str) -> Path:
    if not path.is_file():
        raise ArtifactNotFoundError(f"there is no file {path}; give {what}.")
    return path


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Their state dict, read with torch's own restricted unpickler."""
    _require(path, "the released checkpoint, e.g. dino+clip_text.pth")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for files that are no checkpoints
        raise ArtifactDamagedError(f"{path} can't be read as a state dict of tensors ({type(error).__name__}).") from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ArtifactDamagedError(f"{path} is no state dict: it holds something else than named tensors.")
    return {str(name): value.float() for name, value in weights.items()}


def student_of(weights: dict[str, torch.Tensor]) -> tuple[Student, StudentConfig, int]:
    """Their network (weights mlp.layers.N, mlp.output_layer, scale, bias and maybe mlp.input_norm) as one of our students.

    Returns the student, its shape, and the sign (1 or -1) by which training images' embeddings are multiplied so that a
    higher similarity is more influential.
    """
    depth = sum(name.startswith("mlp.layers.") and name.endswith(".weight") for name in weights)
    linear = [*(f"mlp.layers.{number}" for number in range(depth)), "mlp.output_layer"]
    expected = {f"{name}.{part}" for name in linear for part in ("weight", "bias")} | {"scale", "bias"}
    norm = {"mlp.input_norm.weight", "mlp.input_norm.bias"}
    if not depth or not expected <= set(weights) or set(weights) - expected not in (set(), norm):
        missing, extra = sorted(expected - set(weights)), sorted(set(weights) - expected - norm)
        raise ArtifactDamagedError(
            f"this is no FastGDA checkpoint: missing {missing[:3] or 'mlp.layers.*'}, unknown {extra[:3] or 'nothing'}."
        )
    scale, bias = (float(weights[name].reshape(-1)[0]) for name in ("scale", "bias"))
    if not scale or not math.isfinite(scale) or not math.isfinite(bias):
        raise InputError(f"the checkpoint's scale is {scale} and its bias {bias}; such a network ranks nothing.")
    *hidden, embed_dim = (len(weights[f"{name}.bias"]) for name in linear)
    config = StudentConfig(embed_dim=embed_dim, hidden=tuple(hidden), input_norm=norm <= set(weights), linear_path=False)
    student = Student(weights[f"{linear[0]}.weight"].shape[1], config)
    ours = {f"mlp.{2 * number}": name for number, name in enumerate(linear)}  # ReLUs lie between the linear layers
    ours |= {"input_norm": "mlp.input_norm"} if config.input_norm else {}
    state = {f"{own}.{part}": weights[f"{name}.{part}"] for own, name in ours.items() for part in ("weight", "bias")}
    try:
        student.load_state_dict(state | {"log_scale": torch.tensor(math.log(abs(scale))), "bias": torch.tensor(-bias)})
    except RuntimeError as error:
        raise ArtifactDamagedError(f"the checkpoint's layers do not fit one another: {error}") from error
    return student.eval(), config, -1 if scale > 0 else 1


def read_ids(path: Path) -> pa.Table:
    """The training images' ids, in the order of the features' rows, with what else is known of them.

    `path` is .txt (an id a line), .json (a list), .npy (an array) or .parquet (column image_id and any of `COLUMNS`).
    """
    _require(path, "the training images' ids, in the order of the features' rows")
    readers: dict[str, Callable[[], Any]] = {
        ".txt": lambda: {"image_id": path.read_text(encoding="utf-8").splitlines()},
        ".json": lambda: {"image_id": read_json(path)},
        ".npy": lambda: {"image_id": np.load(path, allow_pickle=False).tolist()},
        ".parquet": lambda: pq.read_table(path).to_pydict(),
    }
    if path.suffix not in readers:
        raise InputError(f"{path} is no list of ids; write .txt (one a line), .json, .npy or .parquet.")
    known = readers[path.suffix]()
    if "image_id" not in known:
        raise InputError(f"{path} has no column image_id; it has {', '.join(known)}.")
    texts = {
        name: ["" if value is None else str(value) for value in values] for name, values in known.items() if name in COLUMNS
    }
    ids = texts["image_id"]
    if len(set(ids)) != len(ids):
        raise InputError(f"{path} names {len(ids) - len(set(ids))} ids twice; every training image needs its own.")
    return pa.table({name: pa.array(texts.get(name, [""] * len(ids)), pa.string()) for name in COLUMNS})


def import_attributor(weights: Path, features: Path, ids: Path, folder: Path) -> None:
    """Write an attributor folder from a released checkpoint and the (N, F) features of the training images.

    It has no feature encoders of its own: query it by `attribute_features`, with features from the authors' extractors
    (for dino+clip_text: DINO ViT-B/16 and CLIP ViT-B/32 text, side by side, not normalised). `ids` names N images
    (`read_ids`).
    """
    student, config, sign = student_of(read_weights(weights))
    _require(features, "the training images' features, e.g. data_feats.npy")
    try:
        values = np.load(features, mmap_mode="c", allow_pickle=False)
    except ValueError as error:
        raise ArtifactDamagedError(f"{features} can't be read as an array: {error}") from error
    catalog, width = read_ids(ids), student.feature_dim
    if values.shape != (len(catalog), width):
        need = f"{weights.name} and the ids of {ids.name} need ({len(catalog)}, {width})"
        raise InputError(f"{features} is {values.shape}; {need}.")
    signed = sign * embed(student, values)
    if not np.isfinite(signed).all():
        raise InputError(f"{features} holds values that are not finite, or too large for the network.")
    with replacing(folder) as temporary:
        save_file(student.state_dict(), temporary / "model.safetensors")  # not halved: orders are to be theirs exactly
        built = build(
            lambda start, stop: signed[start:stop], len(signed), signed.shape[1], IndexConfig(factory="Flat"), temporary
        )
        pq.write_table(catalog, temporary / "catalog.parquet", compression="zstd")
        write_json(temporary / "metrics.json", {})
        facts = {"imported from": SOURCE, "license": LICENSE}
        facts |= {"weights": f"{weights.name}, SHA-256 {sha256_file(weights)}"}
        facts |= {"features file": f"{features.name}, SHA-256 {sha256_file(features)}"}
        facts |= {"sign": f"{sign:+d} (the training images' embeddings are multiplied by it)"}
        built |= {"encoders": [], "encoder_fingerprints": [], "captions": "first", "feature_dim": width}
        made = {"corpus_fingerprint": fingerprint(catalog["image_id"].to_pylist()), "generator_fingerprint": ""}
        seal_folder(temporary, **built, **made, student=vars(config), teacher=TEACHER, source=facts)


def read_rankings(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Their teacher's rankings: (Q, C) int64 rows, most influential first, and (Q, C) float64 influence in the same order.

    `path` is a pickle of {'random': {'rank': (Q, C) rows of the training images, most influential first, and 'influence':
    (Q, N) by row, or 'influence_subset': (Q, C) in any order}}.
    """
    _require(path, "a released influence_train.pkl or influence_test.pkl")
    try:
        with path.open("rb") as file:
            table = ArrayUnpickler(file).load()["random"]
        rank, by_row = np.asarray(table["rank"]), "influence" in table
        influence = np.asarray(table["influence" if by_row else "influence_subset"])
    except Exception as error:  # a hostile or cut-off pickle may raise anything
        raise ArtifactDamagedError(f"{path} is no pickle of rankings ({type(error).__name__}: {error}).") from error
    if rank.ndim != 2 or rank.dtype.kind not in "iu" or influence.ndim != 2 or influence.dtype.kind != "f":
        found = f"rank is {rank.shape} {rank.dtype} and influence {influence.shape} {influence.dtype}"
        raise ArtifactDamagedError(f"{path}: {found}; expected (Q, C) integers and (Q, N) floats.")
    rows = influence.shape[1] if by_row else np.iinfo(np.int64).max
    if len(influence) != len(rank) or (not by_row and influence.shape != rank.shape) or not ((rank >= 0) & (rank < rows)).all():
        raise ArtifactDamagedError(f"{path}: rank {rank.shape} and influence {influence.shape} do not belong together.")
    ordered = np.take_along_axis(influence, rank, axis=1) if by_row else -np.sort(-influence, axis=1)
    if not np.isfinite(ordered).all() or (np.diff(ordered, axis=1) > 0).any():
        raise ArtifactDamagedError(f"{path}: influence is not finite, or does not fall along the ranking.")
    return rank.astype(np.int64), ordered.astype(np.float64)


def import_scores(files: Sequence[Path], ids: Path, folder: Path, *, prompts: Sequence[Path] = ()) -> dict[str, Any]:
    """Write a score table from released rankings, and return its manifest.

    Args:
        files: influence_SPLIT.pkl, with SPLIT train, validation or test.
        ids: see `read_ids`; a ranking's numbers are rows of it.
        folder: where to write.
        prompts: text files with a query's prompt a line, as many as `files`; none leaves prompts empty.
    """
    if prompts and len(prompts) != len(files):
        raise InputError(f"{len(files)} rankings came with {len(prompts)} files of prompts; give one each, or none.")
    names, splits = read_ids(ids)["image_id"].to_pylist(), [path.stem.removeprefix("influence_") for path in files]
    if not set(splits) <= set(SPLITS) or len(set(splits)) != len(splits):
        raise InputError(f"rankings are named influence_SPLIT.pkl, SPLIT one of {', '.join(SPLITS)}; got {splits}.")
    if folder.exists() and not (folder / MANIFEST).exists() and (folder.is_file() or any(folder.iterdir())):
        raise InputError(f"{folder} holds something that is no score table; give another folder.")
    queries = 0
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        for number, (path, split) in enumerate(zip(files, splits, strict=True)):
            rank, influence = read_rankings(path)
            if rank.max(initial=-1) >= len(names):
                raise InputError(f"{path} names row {rank.max()}, but {ids} has {len(names)} ids; give all, in their order.")
            texts = prompts[number].read_text(encoding="utf-8").splitlines() if prompts else [""] * len(rank)
            if len(texts) != len(rank):
                raise InputError(f"{prompts[number]} has {len(texts)} lines for the {len(rank)} queries of {path}.")
            per_shard, inside = max(1, SCORES_PER_SHARD // max(1, rank.shape[1])), np.zeros(rank.shape[1], dtype=bool)
            for shard, start in enumerate(range(0, len(rank), per_shard)):
                rows = []
                for query in range(start, min(start + per_shard, len(rank))):
                    image_ids, scores = [names[row] for row in rank[query]], influence[query].astype(np.float32)
                    shown = (f"{split}-{query:06d}", texts[query], split, image_ids, scores, inside)
                    rows.append(ScoredQuery(*shown, query_loss_rise=float("nan")))  # not recorded
                write_shard(temporary / f"{split}-{shard:05d}.parquet", rows, teacher=TEACHER, config=SOURCE)
            queries += len(rank)
        config = {"source": SOURCE, "files": [path.name for path in files]}
        inputs = {path.name: sha256_file(path) for path in files}
        facts: dict[str, Any] = {"teacher": TEACHER, "corpus_fingerprint": fingerprint(names), "generator_fingerprint": ""}
        facts |= {"queries": queries, "license": LICENSE}
        return write_manifest(temporary, stage="scores", config=config, inputs=inputs, **facts)
