"""A fitted teacher: all that queries share is computed once, so that one call scores a new query over the whole corpus.

First order and the kernel methods score by inner products of compressed gradients (fastattr/gradients/compression.py). What is
kept of a training image is a row; of the generator's curvature only the eigenvectors that the kept coordinates need. A query
then costs its own gradient and one inner product an image; the spread over its draws says how sure the scores are.

A folder holds manifest.json, ids.parquet and, for each member M of the mean, M-rows.npy (N, k) and M-turns.safetensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastattr.core.errors import InputError
from fastattr.core.files import atomic_path
from fastattr.core.stages import open_stage, require_same, write_manifest
from fastattr.generators.families import Layers
from fastattr.generators.generator import Generator
from fastattr.gradients.compression import (
    Compression,
    GradientConfig,
    Turn,
    gradient_features,
    gradients_of_draws,
    leading_coordinates,
)
from fastattr.gradients.ekfac import Factors, fit_ekfac
from fastattr.gradients.losses import EncodedImages
from fastattr.teachers.config import KERNELS, TeacherConfig
from fastattr.teachers.kernels import averaged, kernel_rows
from fastattr.teachers.task import factor_batches, layers_to_unlearn

STAGE = "fitted_teacher"
QUERY = "query"
"""The id that fixes the noise of every new query, so that equal queries have equal scores."""
ROWS = 1024
"""Rows of training images that are in single precision at once."""
PART = 64
"""Images or queries whose gradients are computed at once."""


@dataclass(frozen=True)
class Member:
    """One teacher of the mean."""

    method: str
    gradients: GradientConfig
    """As taken of a query."""
    compression: Compression
    rows: np.ndarray
    """(N, k) of the training images, times `scale`; a kernel is in them already."""
    scale: float = 1.0

    def scores(self, features: np.ndarray) -> np.ndarray:
        """(B, N) float32 from (B, k) compressed gradients of queries or of a query's draws."""
        scores = np.empty((len(features), len(self.rows)), np.float32)
        for start in range(0, len(self.rows), ROWS):
            part = np.asarray(self.rows[start : start + ROWS], dtype=np.float32)
            scores[:, start : start + len(part)] = features @ part.T
        return scores / np.float32(self.scale)


@dataclass(frozen=True)
class ScoredImages:
    """A query's scores over the whole corpus."""

    image_ids: list[str]
    influence: np.ndarray
    """(N,) higher = more influential; a mean of teachers is in standard deviations over the corpus."""
    error: np.ndarray
    """(N,) standard error over the query's draws, in the same unit. Timesteps are spread evenly, so it is an upper bound."""


class FittedTeacher:
    """What scores queries by first order, TRAK, D-TRAK, D-TRAK in EKFAC's eigenbasis, or by a mean of them."""

    def __init__(self, generator: Generator, config: TeacherConfig, image_ids: list[str], members: list[Member]) -> None:
        """Keep the parts; see `fit` and `open`."""
        self.generator, self.config, self.image_ids, self.members = generator, config, image_ids, members
        self.layers = layers_to_unlearn(generator, config.pattern)

    @classmethod
    def fit(
        cls, generator: Generator, images: EncodedImages, config: TeacherConfig, *, factors: Factors | None = None
    ) -> FittedTeacher:
        """Fit to an encoded corpus of one view, in memory; the generator has base weights.

        `config` says which methods and how; `gradient_width` 0 keeps whole gradients. `factors` are EKFAC's of the layers;
        None fits them where a method needs them. InputError if a method has no inner-product form, or a setting asks for what
        is measured anew for every query.
        """
        if config.inverse_steps or config.models or config.retrained or set(config.methods) - {"first-order", *KERNELS}:
            wanted = f"first-order, {', '.join(KERNELS)} and their mean, without inverse_steps, models or retrained"
            found = ", ".join(config.methods)
            raise InputError(f"a teacher for new queries takes {wanted}; {found} can't be fitted for new queries.")
        layers, members = layers_to_unlearn(generator, config.pattern), []
        for member in config.members_of():
            settings, coordinates = member.gradients_of(member.method), None
            if settings.whiten and factors is None:
                batches = factor_batches(generator, images, config)
                factors = fit_ekfac(layers, batches, diagonal=config.curvature == "diagonal")
            if settings.whiten and settings.width and factors is not None:
                coordinates = leading_coordinates(generator, layers, images, factors, settings)
            compression = Compression(layers, settings, factors if settings.whiten else None, coordinates)
            rows = features_of(generator, layers, images, compression, settings)
            if member.method in KERNELS:
                rows = kernel_rows(rows, ridge=member.ridge)
            members.append(Member(member.method, replace(settings, draws=member.query_draws), compression, rows))
        return cls(generator, config, list(images.image_ids), members)

    def scores(self, queries: EncodedImages) -> np.ndarray:
        """(Q, N) of encoded queries, whose ids fix their noise; higher = more influential."""
        found = []
        for member in self.members:
            settings = replace(member.gradients, antithetic=self.config.antithetic)
            found.append(member.scores(features_of(self.generator, self.layers, queries, member.compression, settings)))
        return averaged(*found) if len(found) > 1 else found[0]

    def score(self, image: Image.Image, prompt: str) -> ScoredImages:
        """Score one new query over the whole corpus."""
        latents = self.generator.encode_image([image])
        query = EncodedImages([QUERY], latents[:, None], self.generator.encode_prompt([prompt]), np.arange(2))
        means, errors = [], []
        for member in self.members:
            each = gradients_of_draws(self.generator, self.layers, query, 0, member.compression, member.gradients)
            by_draw = member.scores(each)
            mean, error = by_draw.mean(axis=0), by_draw.std(axis=0, ddof=1) / np.sqrt(len(by_draw))
            spread = float(mean.std()) if len(self.members) > 1 else 1.0
            means.append(mean)
            errors.append(error / (spread or 1.0))
        influence = averaged(*(mean[None] for mean in means))[0] if len(means) > 1 else means[0]
        return ScoredImages(self.image_ids, influence, np.sqrt(np.sum(np.square(errors), axis=0)) / len(errors))

    def save(self, folder: Path, *, generator: str) -> None:
        """Write to a folder; rows in half precision. `generator` is the name by which `open` loads the generator."""
        folder.mkdir(parents=True, exist_ok=True)
        described = []
        for number, member in enumerate(self.members):
            factor = float(1 / np.sqrt(np.mean(np.square(member.rows[:PART], dtype=np.float64))))
            with atomic_path(folder / f"{number}-rows.npy") as temporary, temporary.open("wb") as file:
                np.save(file, (member.rows * factor).astype(np.float16))
            with atomic_path(folder / f"{number}-turns.safetensors") as temporary:
                save_file(_tensors(member.compression.turns), temporary)
            described.append({"method": member.method, "scale": factor * member.scale, "gradients": asdict(member.gradients)})
        with atomic_path(folder / "ids.parquet") as temporary:
            pq.write_table(pa.table({"image_id": self.image_ids}), temporary)
        inputs = {"generator": self.generator.fingerprint}
        write_manifest(folder, stage=STAGE, config=self.config, inputs=inputs, members=described, generator=generator)

    @classmethod
    def open(cls, folder: Path, *, generator: Generator | None = None) -> FittedTeacher:
        """Load what `save` wrote; rows stay on disk, mapped.

        Raises:
            ArtifactNotFoundError: there is no fitted teacher.
            ArtifactMismatchError: the generator is not the one that it was fitted to.
        """
        manifest = open_stage(folder, STAGE)
        generator = generator or Generator.from_pretrained(manifest["generator"])
        require_same("the generator", generator.fingerprint, manifest["inputs"]["generator"], "Fit the teacher again.")
        settings: dict[str, Any] = manifest["config"]
        settings |= {key: tuple(value) for key, value in settings.items() if isinstance(value, list)}
        config = TeacherConfig(**settings)
        layers = layers_to_unlearn(generator, config.pattern)
        members = []
        for number, described in enumerate(manifest["members"]):
            gradients = GradientConfig.read(described["gradients"])
            turns = _turns_of(load_file(folder / f"{number}-turns.safetensors"), layers) if gradients.whiten else None
            rows = np.load(folder / f"{number}-rows.npy", mmap_mode="r", allow_pickle=False)
            compression = Compression(layers, gradients, turns=turns)
            members.append(Member(described["method"], gradients, compression, rows, described["scale"]))
        return cls(generator, config, pq.read_table(folder / "ids.parquet")["image_id"].to_pylist(), members)


def features_of(
    generator: Generator, layers: Layers, images: EncodedImages, compression: Compression, settings: GradientConfig
) -> np.ndarray:
    """(N, k) float32 gradient features of all of them."""
    found = np.empty((len(images.image_ids), compression.width), np.float32)
    for start in range(0, len(found), PART):
        rows = np.arange(start, min(start + PART, len(found)))
        found[rows] = gradient_features(generator, layers, images, rows, compression, settings)
    return found


def _tensors(turns: Mapping[str, Turn]) -> dict[str, Tensor]:
    """The parts of all turns, by layer and name."""
    parts = {f"{name}/{part}": value for name, turn in turns.items() for part, value in vars(turn).items() if value is not None}
    return {name: value.float().contiguous() if value.is_floating_point() else value for name, value in parts.items()}


def _turns_of(tensors: Mapping[str, Tensor], layers: Layers) -> dict[str, Turn]:
    """What `_tensors` was given, in the order of the layers."""
    found = {}
    for name, layer in layers.items():
        if f"{name}/left" in tensors:
            left, right, scale = (tensors[f"{name}/{part}"].to(layer.weight) for part in ("left", "right", "scale"))
            places = tensors.get(f"{name}/places")
            found[name] = Turn(left, right, scale, None if places is None else places.to(layer.weight.device))
    return found
