"""Answers: what one version of an attributor says of queries, by the student or by the untuned features."""

from __future__ import annotations

import base64
import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from PIL import Image

from fastattr.attributor.attribution import REACH, Attribution, Influence, Reach
from fastattr.attributor.catalogue import Catalogue
from fastattr.attributor.folder import versions
from fastattr.attributor.inputs import Where, image_sha256, open_image
from fastattr.attributor.make import plain_vectors
from fastattr.attributor.version import Version
from fastattr.core.errors import InputError
from fastattr.core.models import commit_of
from fastattr.corpus.images import load_rgb
from fastattr.corpus.near_copies import look_of, looks_of, near_copies
from fastattr.students.calibration import Calibration
from fastattr.students.light import LightStudent
from fastattr.students.ownness import measures_of

if TYPE_CHECKING:
    from fastattr.features.encoder import Encoder

MEASURED = ("rank", "similarity", "percentile", "strength", "image_part", "text_part")
RESULT_COLUMNS = ("image_id", "caption", "creator", "license", "source", "url", "family")
LOOKED_AT = 12  # most similar images, by the picture alone and by picture and prompt, that are compared with the query's look


@dataclass(frozen=True)
class Model:
    """What an attributor answers with, whichever the version."""

    name: str
    encoders: Sequence[Encoder]
    student: LightStudent
    calibration: Calibration | None
    embed_dim: int
    feature_blocks: Sequence[dict[str, Any]]

    def encode(self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> np.ndarray:
        """(n, F) features of images and captions."""
        if not self.encoders:
            raise InputError(f"{self.name} has no feature encoders; give features (`attribute_features`, `add_features`).")
        return np.concatenate([encoder.encode(images, captions) for encoder in self.encoders], axis=1)

    @property
    def image_columns(self) -> np.ndarray | None:
        """(F,) bool: which features are of images and not of texts; None if it isn't known, or some are of both."""
        if not self.feature_blocks or any(block["modality"] not in {"image", "text"} for block in self.feature_blocks):
            return None
        return np.concatenate([np.full(block["width"], block["modality"] == "image") for block in self.feature_blocks])

    def without_prompt(self, features: np.ndarray, alone: Sequence[bool]) -> np.ndarray:
        """(Q, F) features of queries; where a prompt is unknown, the corpus' mean stands in its features' place."""
        if not any(alone):
            return features
        images = self.image_columns
        if images is None or (self.calibration is None and not images.all()):
            raise InputError(f"{self.name} can't attribute an image without its prompt, having no calibration; give it.")
        if self.calibration is None:
            return features
        unknown = np.array(alone)[:, None] & ~images
        return np.where(unknown, self.calibration.feature_mean, features).astype(np.float32)


@dataclass(frozen=True)
class Asked:
    """Queries, as far as an answer depends on them."""

    features: np.ndarray  # (Q, F); (0, F) where only embeddings are known
    prompts: list[str]
    hashes: list[str]  # SHA-256 of each query
    seconds: dict[str, float] = field(default_factory=dict)  # spent on the features
    looks: list[bytes] | None = None  # of each query's picture, see corpus/near_copies.py; None where there is none
    measures: list[np.ndarray] | None = None  # of each query's picture, see students/ownness.py; None where there is none


def queries_of(model: Model, image: Any, prompt: Any) -> tuple[Asked | None, bool]:
    """What `FastAttributor.attribute` was given, checked and encoded (None for an empty list), and whether it was a list."""
    many = isinstance(image, list | tuple)
    if not many and not isinstance(prompt, str | None):
        raise InputError("one image needs one prompt, a string, or None.")
    images = list(image) if many else [image]
    prompts = [prompt] * len(images) if isinstance(prompt, str | None) else list(prompt)
    if len(prompts) != len(images):
        raise InputError(f"{len(images)} images came with {len(prompts)} prompts; give one prompt an image.")
    if not images:
        return None, many
    opened = [open_image(one) for one in images]
    for text in prompts:
        if text is not None and not (isinstance(text, str) and text.strip()):
            raise InputError("the prompt is empty; give the prompt that the image was made from, or None.")
    started, texts = time.perf_counter(), [text or "" for text in prompts]
    features = model.without_prompt(model.encode(opened, [[text] for text in texts]), [text is None for text in prompts])
    hashes = [image_sha256(image, text) for image, text in zip(opened, texts, strict=True)]
    seconds = {"features": time.perf_counter() - started}
    looks, measures = [look_of(image) for image in opened], [measures_of(image) for image in opened]
    return Asked(features, texts, hashes, seconds, looks, measures), many


def checked_k(k: Any, version: Version) -> int:
    """How many images are asked for."""
    size = version.catalogue.ntotal
    if size == 0:
        raise InputError("every image has left this attributor; add some before asking it.")
    try:
        number = operator.index(k)
    except TypeError as error:
        raise InputError(f"top-k must be a whole number, got {k!r}.") from error
    if isinstance(k, bool) or not 1 <= number <= size:
        raise InputError(f"top-k must be between 1 and {size} (the images in the corpus), got {k}.")
    return number


def by_student(
    model: Model, version: Version, asked: Asked, k: int, where: Where | None = None, embeddings: np.ndarray | None = None
) -> list[Attribution]:
    """The answers of the student to queries with features, or to those whose (Q, D) embeddings are known."""
    started = time.perf_counter()
    k, catalogue, calibration = checked_k(k, version), version.catalogue, model.calibration
    embeddings = np.ascontiguousarray(model.student.embed(asked.features) if embeddings is None else embeddings, np.float32)
    similarities, rows = catalogue.search(embeddings, k, where=where)
    nearest = list(zip(rows, similarities, strict=True))
    with_features = len(asked.features) > 0
    parts = _parts(model, asked.features, catalogue, nearest) if with_features else [None] * len(nearest)
    warnings = _warnings(calibration, asked) if with_features else [[] for _ in nearest]
    seconds = {**asked.seconds, "search": time.perf_counter() - started}
    size = catalogue.count(where)
    answers = []
    for query, (rows, values) in enumerate(nearest):
        records = catalogue.fetch(rows)
        table, find = partial(getattr, catalogue, "table"), partial(_known, rows, values)
        if not isinstance(catalogue, Catalogue):  # a server's catalogue stays there: shares are of what was found
            table, find = partial(pa.Table.from_pylist, records), partial(_known, np.arange(len(records)), values)
        elif calibration:  # shares are of everything that may be named
            find = partial(_reached, catalogue, embeddings[query], min(max(k, REACH), size), where)
        weights = None if calibration else model.student.closeness(values)
        reach = Reach(table, find, weights, calibration, size, own=not warnings[query])
        embedding = base64.b64encode(embeddings[query].astype("<f4").tobytes()).decode()
        described = {"sha256": asked.hashes[query], "embedding": embedding, "k": k}
        described |= {"where": dict(where)} if where else {}
        answer = _attribution(model, version, asked.prompts[query], records, values, parts[query], described, reach)
        answers.append(replace(answer, seconds=dict(seconds), warnings=warnings[query]))
    return _with_copies(model, version, asked, answers)


def by_features(model: Model, version: Version, asked: Asked, k: int) -> list[Attribution]:
    """The images that are most similar by the untuned features."""
    started = time.perf_counter()
    k, catalogue, plain = checked_k(k, version), version.catalogue, version.plain
    if plain is None or not isinstance(catalogue, Catalogue):
        raise InputError(f"{model.name} holds no index of untuned features (index.plain), or was loaded in part.")
    queries = plain_vectors(asked.features)
    present = catalogue.rows_of(np.arange(plain.ntotal))  # its rows are those of the base
    similarities, found = plain.search(queries, k, allowed=present >= 0)
    images = model.image_columns
    answers = []
    for query, (own, values) in enumerate(zip(found, similarities, strict=True)):
        parts = None
        if plain.reads_rows and images is not None:
            products = plain.take(own) * queries[query]
            parts = products[:, images].sum(axis=1), products[:, ~images].sum(axis=1)
        rows = present[own]
        described = {"sha256": asked.hashes[query], "k": k}
        table, find = partial(getattr, catalogue, "table"), partial(_known, rows, values)
        reach = Reach(table, find, np.maximum(values, 1e-6), None, catalogue.ntotal)
        records = catalogue.fetch(rows)
        answers.append(_attribution(model, version, asked.prompts[query], records, values, parts, described, reach))
    spent = time.perf_counter() - started
    for answer in answers:
        answer.seconds.update(asked.seconds, search=spent)
        answer.model["method"] = "plain similarity"
    return _with_copies(model, version, asked, answers)


def _known(rows: np.ndarray, similarities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `Reach.find` gives where it is known already."""
    return rows, similarities


def _reached(catalogue: Catalogue, embedding: np.ndarray, count: int, where: Where | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows and similarities of the images that shares of one query are taken of."""
    similarities, rows = catalogue.search(embedding[None], count, where=where)
    return rows[0], similarities[0]


def _parts(
    model: Model, features: np.ndarray, catalogue: Any, nearest: Sequence[tuple[np.ndarray, np.ndarray]]
) -> list[tuple[np.ndarray, np.ndarray] | None]:
    """For each query what image and prompt contribute to its (k,) similarities: Shapley values of two players.

    The value of one alone is the similarity with the corpus' mean in the other's place; that of none is 0.
    """
    images = model.image_columns
    readable = isinstance(catalogue, Catalogue) and catalogue.base.reads_rows
    if model.calibration is None or images is None or not readable:
        return [None] * len(nearest)
    if images.all() or not images.any():
        both = [(values, np.zeros_like(values)) for _, values in nearest]
        return [pair if images.all() else pair[::-1] for pair in both]
    mean = model.calibration.feature_mean
    alone = [model.student.embed(np.where(kept, features, mean)) for kept in (images, ~images)]
    parts: list[tuple[np.ndarray, np.ndarray] | None] = []
    for query, (rows, similarities) in enumerate(nearest):
        of_image, of_text = (catalogue.embeddings(rows) @ embedded[query] for embedded in alone)
        parts.append(((similarities + of_image - of_text) / 2, (similarities + of_text - of_image) / 2))
    return parts


def _warnings(calibration: Calibration | None, asked: Asked) -> list[list[str]]:
    """For each query what its reader should know."""
    if calibration is None or calibration.ownness is None:
        return [[] for _ in asked.prompts]
    text = "Image and prompt do not look like this generator's output: {}. For an image that it did not make, these are the "
    every = calibration.ownness.doubts(asked.features, asked.prompts, asked.measures)
    return [[f"{text.format('; '.join(doubts))}training images that resemble it."] if doubts else [] for doubts in every]


def _attribution(
    model: Model,
    version: Version,
    prompt: str,
    records: list[dict[str, Any]],
    similarities: np.ndarray,
    parts: tuple[np.ndarray, np.ndarray] | None,
    query: dict[str, Any],
    reach: Reach,
) -> Attribution:
    """An answer without seconds and warnings."""
    calibration = reach.calibration
    percentiles = calibration.percentile_of(similarities).tolist() if calibration else [None] * len(records)
    strengths = calibration.strengths_of(similarities) if calibration and reach.own else [None] * len(records)
    columns = [percentiles, strengths, *([part.tolist() for part in parts] if parts else [[None] * len(records)] * 2)]
    rows = zip(range(len(records)), similarities.tolist(), *columns, strict=True)
    fields: list[dict[str, Any]] = [dict(zip(MEASURED, values, strict=True)) for values in rows]
    for record, each in zip(records, fields, strict=True):
        each |= {name: record.get(name) or "" for name in RESULT_COLUMNS}
    results = [Influence(**each) for each in fields]
    config, known = version.config, versions(version.config)
    described = {key: config[key] for key in ("fastattr_version", "corpus_fingerprint", "generator_fingerprint")}
    described |= {"name": model.name, "model_sha256": known["model"], "index_sha256": known["index"]}
    described["revision"] = commit_of(version.folder) or ""
    thumbnails = {record["image_id"]: record["thumbnail"] for record in records if record.get("thumbnail")}
    return Attribution(results, prompt, {}, described, [], query, None, known, reach, thumbnails)


def _with_copies(model: Model, version: Version, asked: Asked, answers: list[Attribution]) -> list[Attribution]:
    """The answers, each with the near-copies of the query's picture among what resembles it most; needs thumbnails."""
    catalogue = version.catalogue
    if asked.looks is None or not isinstance(catalogue, Catalogue) or not catalogue.has_thumbnails:
        return answers
    resembling = _by_picture(model, version, asked.features)
    checked = []
    for look, rows, answer in zip(asked.looks, resembling, answers, strict=True):
        pictures = {result.image_id: answer._thumbnails.get(result.image_id) for result in answer.results[:LOOKED_AT]}
        pictures |= {record["image_id"]: record["thumbnail"] for record in catalogue.fetch(rows)}
        named = [(name, load_rgb(data)) for name, data in pictures.items() if data]
        copies: list[int] = []
        if named:
            copies = near_copies(looks_of([look]), looks_of([look_of(picture) for _, picture in named]))[0].tolist()
        checked.append(replace(answer, near_copies=[named[copy][0] for copy in copies]))
    return checked


def _by_picture(model: Model, version: Version, features: np.ndarray) -> list[np.ndarray]:
    """For each query the rows of the images that resemble it most by the picture alone, whatever the prompt."""
    catalogue, images = version.catalogue, model.image_columns
    assert isinstance(catalogue, Catalogue)
    if images is None or not images.any():
        return [np.zeros(0, dtype=np.int64) for _ in features]
    count = min(LOOKED_AT, catalogue.ntotal)
    found = []
    if model.calibration is not None:
        alone = model.student.embed(np.where(images, features, model.calibration.feature_mean))
        found.append(catalogue.search(alone, count)[1])
    if version.plain is not None:
        present = catalogue.rows_of(np.arange(version.plain.ntotal))
        queries = plain_vectors(np.where(images, features, 0.0))
        found.append(present[version.plain.search(queries, count, allowed=present >= 0)[1]])
    none = np.zeros(0, dtype=np.int64)
    return [np.unique(np.concatenate([none, *(rows[query] for rows in found)])) for query in range(len(features))]
