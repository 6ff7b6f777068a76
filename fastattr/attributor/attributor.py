"""Attributor: from an image and its prompt to the training images that influenced it most.

`FastAttributor` holds encoders, student, index and catalogue. Its folder holds config.json (shape, encoders, fingerprints,
SHA-256 of every other file), model.safetensors, index.faiss (or its shards), catalog.parquet, thumbnails.parquet,
metrics.json and, where it brings its own, encoder/; once images have come or left, changes.sqlite.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from fastattr.attributor import bases, edits
from fastattr.attributor.answers import Asked, Model, by_embedding, by_features, by_student, checked_k
from fastattr.attributor.attribution import Attribution
from fastattr.attributor.catalogue import Catalogue
from fastattr.attributor.changes import history, lock
from fastattr.attributor.folder import read_config, settled, stamp_of
from fastattr.attributor.inputs import (
    ImageLike,
    checked_features,
    checked_metadata,
    features_sha256,
    image_sha256,
    open_image,
)
from fastattr.attributor.journal import read_journal
from fastattr.attributor.load import describe, load
from fastattr.attributor.make import thumbnail_bytes
from fastattr.attributor.restrictions import Where
from fastattr.attributor.version import Parts, Version, open_version
from fastattr.core.errors import InputError, MissingFileError
from fastattr.core.models import ASSETS, commit_of
from fastattr.corpus.near_copies import look_of

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class FastAttributor:
    """Names the training images that influenced a generated image most."""

    push_to_hub: ClassVar[Callable[..., str]]
    """Push to a model repository; `fastattr` adds it from publishing/push_to_hub.py, since pushing stands below answering."""

    def __init__(self, model: Model, version: Version, metrics: dict[str, Any]) -> None:
        """Use `from_pretrained`, or `build_attributor` for a run folder."""
        self.name, self.metrics = model.name, metrics
        self._model, self._version = model, version
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        thumbnails: bool = True,
        shards: Sequence[int] | None = None,
        index_uri: str | None = None,
    ) -> FastAttributor:
        """Load an attributor: an embedded one ('emoji'), a local folder, or a Hub repository 'org/name[@revision]'.

        Args:
            name_or_path: which one.
            revision: branch, tag or commit on the Hub.
            cache_dir: where the Hub client keeps downloads.
            token: Hub access token; None takes the stored one.
            local_files_only: take the cached copy, ask no network.
            force_download: fetch again what the cache holds.
            device: where the feature encoders run; None takes CUDA if there is one, but for small CLIPs, which run in NumPy.
            dtype: of the feature encoders; None is float32.
            backend: what computes the feature encoders: 'numpy', 'torch', or None, which takes NumPy for small CLIPs on a CPU.
            thumbnails: whether to fetch and load the training images' thumbnails.
            shards: which shards of the index to fetch and search, counted from 0; None takes all.
            index_uri: search the Milvus server or file that `fastattr index --backend milvus` filled, and fetch no index.

        Raises:
            ArtifactNotFoundError: there is no such model (RevisionNotFoundError: no such revision of it;
                MissingFileError: a file of it is missing; IncompleteDownloadError: the cache holds a part of it only).
            ArtifactDamagedError: a file's checksum is not that of config.json.
            FormatVersionError: it was written by a newer fastattr.
            EncoderMismatchError: its feature encoders have other weights than those the student was trained on.
            HubError: the Hub refuses, or can't be reached.
            InputError: there is no such shard.
        """
        found = load(
            name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
            device=device,
            dtype=dtype,
            backend=backend,
            parts=Parts(thumbnails, shards),
            index_uri=index_uri,
        )
        return cls(*found)

    @property
    def folder(self) -> Path:
        """Where its files are: yours, the package's, or the Hub client's cache."""
        return self._version.folder

    @property
    def config(self) -> dict[str, Any]:
        """config.json, with 'catalog_version' as it was when this attributor last looked."""
        return self._version.config

    @property
    def catalog(self) -> pa.Table:
        """One row an image that has not been removed.

        image_id, caption, creator, license, source, url, group, subgroup, family; thumbnail (WebP) if loaded.
        """
        return self._newest().catalogue.table

    def __len__(self) -> int:
        return int(self._newest().catalogue.ntotal)

    def attribute(
        self,
        image: ImageLike | Sequence[ImageLike],
        prompt: str | Sequence[str | None] | None,
        k: int = 20,
        *,
        where: Where | None = None,
    ) -> Attribution | list[Attribution]:
        """Name the k training images that influenced a generated image most.

        Args:
            image: the generated image (Pillow image, array, tensor, bytes or file; see `inputs.open_image`), or a list of them.
            prompt: its prompt, or as many prompts; None attributes the image alone.
            k: how many training images, 1 to the size of the corpus.
            where: name only images with these values, e.g. {"creator": ["Ada", "Bob"], "license": "CC0-1.0"}; columns are
                `restrictions.FILTERS`, and 'since' and 'until' bound the column 'date'. There may be fewer than k.

        Returns:
            One `Attribution`, or a list of them if a list was given.

        Raises:
            InputError: an image can't be read, a prompt is empty, or k is out of range.
        """
        return self._answer(image, prompt, k, lambda version, asked: by_student(self._model, version, asked, k, where))

    @property
    def has_plain(self) -> bool:
        """Whether `plain` has an index to ask."""
        return self._version.plain is not None

    def plain(
        self, image: ImageLike | Sequence[ImageLike], prompt: str | Sequence[str | None] | None, k: int = 20
    ) -> Attribution | list[Attribution]:
        """Name the k training images that are most similar by the untuned features: what resembles, not what influenced.

        Args and answer are those of `attribute`; percentiles are None and shares are of the listed images, each counting
        with its similarity.

        Raises:
            InputError: as `attribute`, or the attributor holds no index of untuned features.
        """
        return self._answer(image, prompt, k, lambda version, asked: by_features(self._model, version, asked, k))

    def _answer(
        self, image: Any, prompt: Any, k: int, find: Callable[[Version, Asked], list[Attribution]]
    ) -> Attribution | list[Attribution]:
        """`attribute` or `plain`, of one or many."""
        many = isinstance(image, list | tuple)
        if not many and not isinstance(prompt, str | None):
            raise InputError("one image needs one prompt, a string, or None.")
        images = list(image) if many else [image]
        prompts = [prompt] * len(images) if isinstance(prompt, str | None) else list(prompt)
        if len(prompts) != len(images):
            raise InputError(f"{len(images)} images came with {len(prompts)} prompts; give one prompt an image.")
        if not images:
            return []
        version = self._newest()
        checked_k(k, version)
        found = find(version, self._encode([open_image(one) for one in images], prompts))
        return found if many else found[0]

    def _encode(self, images: Sequence[Image.Image], prompts: Sequence[str | None]) -> Asked:
        """The queries with their features."""
        for text in prompts:
            if text is not None and not (isinstance(text, str) and text.strip()):
                raise InputError("the prompt is empty; give the prompt that the image was made from, or None.")
        if not self._model.encoders:
            raise InputError(f"{self.name} has no feature encoders; give features to `attribute_features` instead.")
        started = time.perf_counter()
        texts = [text or "" for text in prompts]
        encoded = [encoder.encode(images, [[text] for text in texts]) for encoder in self._model.encoders]
        features = self._model.without_prompt(np.concatenate(encoded, axis=1), [text is None for text in prompts])
        hashes = [image_sha256(image, text) for image, text in zip(images, texts, strict=True)]
        seconds = {"features": time.perf_counter() - started}
        return Asked(features, texts, hashes, seconds, [look_of(image) for image in images])

    def attribute_features(
        self, features: np.ndarray, prompts: Sequence[str], k: int = 20, *, where: Where | None = None
    ) -> list[Attribution]:
        """Name the k training images that influenced each of Q images most, from features computed elsewhere.

        Args:
            features: (Q, F) finite, the encoders' outputs side by side, as the student was trained on.
            prompts: Q prompts, kept in the answers.
            k: how many training images, 1 to the size of the corpus.
            where: see `attribute`.

        Raises:
            InputError: the features have another shape or are not finite, or k is out of range.
        """
        features = checked_features(features, len(prompts), self.config["feature_dim"])
        hashes = [features_sha256(row, text) for row, text in zip(features, prompts, strict=True)]
        asked = Asked(features, list(prompts), hashes)
        return by_student(self._model, self._newest(), asked, k, where) if len(prompts) else []

    def replay(self, embedding: np.ndarray, prompt: str, k: int, *, where: Where | None = None) -> Attribution:
        """The answer to a query of which only the (D,) embedding is known, as receipts hold it."""
        asked = Asked(np.zeros((0, self.config["feature_dim"]), dtype=np.float32), [prompt], [""])
        return by_embedding(self._model, self._newest(), asked, embedding[None], k, where)[0]

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        """(n, D) float32 embeddings of rows of the last `catalog`, as well as they are kept."""
        catalogue = self._version.catalogue
        if not isinstance(catalogue, Catalogue):
            raise InputError("embeddings are read from the attributor's own index; load it without index_uri.")
        return catalogue.embeddings(np.asarray(rows)) if len(rows) else np.zeros((0, self._model.embed_dim), dtype=np.float32)

    def versions(self) -> dict[str, Any]:
        """SHA-256 of 'model', 'index' and 'catalog', and 'catalog_version'."""
        return self._newest().versions()

    def has_left(self, image_id: str) -> bool:
        """Whether an image was in the catalogue once and has been removed."""
        return image_id in self._newest().catalogue.removed

    def file(self, name: str) -> Path | None:
        """A further file that the attributor brings along (see showcase.py), checked as it was loaded; None without."""
        version = self._newest()
        name = version.base.get("files", {}).get(name, name)
        return version.folder / name if name in version.base["sha256"] else None

    def info(self) -> dict[str, Any]:
        """What this attributor is: size, creators, licences, versions and metrics."""
        version = self._newest()
        return describe(self.name, version.config, version.catalogue.table, self.metrics)

    # ---- a living catalogue

    def _newest(self) -> Version:
        """The newest version, which is kept unless another thread has kept a newer one meanwhile."""
        found = self._version.newest()
        if found is not self._version:
            self._version = found
        return found

    def refresh(self) -> bool:
        """Take up what another process has changed since; every answer does so by itself. True if there was anything."""
        before = self._version
        return self._newest() is not before

    def add(
        self,
        images: Sequence[ImageLike],
        captions: Sequence[str | Sequence[str]],
        metadata: Sequence[Mapping[str, str]] | None = None,
        *,
        readmit: bool = False,
    ) -> list[str]:
        """Take images into the catalogue; nothing is trained. When this returns, they are on the disk.

        Args:
            images: n training images.
            captions: one, or several, of each.
            metadata: of each, columns of the catalogue ('creator', 'license', 'source', 'url', 'group', 'subgroup', 'family',
                'date' as YYYY-MM-DD, 'image_id'); an id that is left out is made from pixels and caption.
            readmit: whether images that were removed once may come back.

        Returns:
            The n image ids.

        Raises:
            InputError: an image can't be read, an id is there already or was removed, or there is such no column.
        """
        if len(images) != len(captions) or (metadata is not None and len(metadata) != len(images)):
            raise InputError(f"{len(images)} images need as many captions and metadata.")
        if not self._model.encoders:
            raise InputError(f"{self.name} has no feature encoders; give features to `add_features` instead.")
        opened = [open_image(image) for image in images]
        texts = [[text] if isinstance(text, str) else list(text) for text in captions]
        if not all(text and isinstance(text[0], str) and text[0].strip() for text in texts):
            raise InputError("every image needs a caption.")
        if not opened:
            return []
        features = np.concatenate([encoder.encode(opened, texts) for encoder in self._model.encoders], axis=1)
        names = [f"added-{image_sha256(image, text[0])[:16]}" for image, text in zip(opened, texts, strict=True)]
        fields = metadata or [{}] * len(opened)
        return self.add_features(
            features,
            [text[0] for text in texts],
            [{"image_id": name, **own} for name, own in zip(names, fields, strict=True)],
            thumbnails=[thumbnail_bytes(image, quality=40) for image in opened],
            readmit=readmit,
        )

    def add_features(
        self,
        features: np.ndarray,
        captions: Sequence[str],
        metadata: Sequence[Mapping[str, str]],
        *,
        thumbnails: Sequence[bytes] | None = None,
        readmit: bool = False,
    ) -> list[str]:
        """Take images into the catalogue from features computed elsewhere; see `add`.

        Args:
            features: (n, F) finite, as for `attribute_features`.
            captions: n.
            metadata: of each, with 'image_id'.
            thumbnails: a small WebP of each.
            readmit: whether images that were removed once may come back.
        """
        features = checked_features(features, len(captions), self.config["feature_dim"])
        if len(metadata) != len(captions):
            raise InputError(f"{len(captions)} images need as many metadata, got {len(metadata)}.")
        fields = [{"caption": caption, **own} for caption, own in zip(captions, metadata, strict=True)]
        records = [checked_metadata(own) for own in fields]
        ids = [record.get("image_id", "") for record in records]
        if "" in ids or len(set(ids)) < len(ids):
            raise InputError("every image needs an image_id of its own.")
        if ids:
            embeddings = self._model.student.embed(features)
            with self._changing() as version:
                edits.add(version, records, embeddings, thumbnails, readmit=readmit)
        return ids

    def remove(self, image_ids: Sequence[str], *, reason: str = "") -> None:
        """Take images out of the catalogue for good: no answer names them from now on. Some may have left already.

        Args:
            image_ids: which.
            reason: kept in the journal.

        Raises:
            InputError: the catalogue never had one of them.
        """
        ids = [image_ids] if isinstance(image_ids, str) else list(dict.fromkeys(image_ids))
        with self._changing() as version:
            edits.remove(version, ids, reason)

    def update(self, changes: Mapping[str, Mapping[str, str]]) -> None:
        """Change what the catalogue says of images; similarities stay as they are.

        Args:
            changes: new values by column, by image id.

        Raises:
            InputError: the catalogue has no such image, or no such column.
        """
        if any("image_id" in fields for fields in changes.values()):
            raise InputError("an image keeps its image_id; remove it and add it under another one.")
        checked = {image_id: checked_metadata(fields) for image_id, fields in changes.items()}
        with self._changing() as version:
            edits.update(version, checked)

    def compact(self) -> None:
        """Fold all changes into a new base, which erases the data of removed images from every file of the folder."""
        self.require_whole()
        with self._changing() as version:
            if not version.parts.whole:
                raise InputError("load the attributor whole (thumbnails, all shards) to compact it.")
            assert isinstance(version.catalogue, Catalogue)
            bases.compact(version.folder, bases.upgraded(version.folder, version.base), version.catalogue)

    def history(self) -> list[dict[str, Any]]:
        """The changes since the base was made, oldest first: version, time, operation and image ids."""
        version = self._newest()
        plain = ("version", "time", "operation", "image_ids", "reason", "removed")
        return history(version.folder) or [
            {name: value for name, value in entry.items() if name in plain}
            | ({"image_ids": [image["image_id"] for image in entry["images"]]} if "images" in entry else {})
            for entry in read_journal(version.folder, version.base)
        ]

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Version]:
        """The newest version, which no one else can change until the block ends; what was changed is then taken up."""
        if not isinstance(self._version.catalogue, Catalogue):
            raise InputError("change the attributor's folder, then bring Milvus up to it: `fastattr index --backend milvus`.")
        self._require_own()
        with lock(self._version.folder):
            version = self._newest()
            if bases.unswept(version.folder, version.base):
                bases.sweep(version.folder, version.base)
            yield version
        self._newest()

    def _require_own(self) -> None:
        """Work on a copy of what is not the user's to change: an embedded model, or the Hub client's cache.

        Raises:
            InputError: the user named that very folder, so that a change to a copy would not be what they asked for.
        """
        version = self._version
        if self._scratch or not (version.folder.is_relative_to(ASSETS) or commit_of(version.folder)):
            return
        if Path(self.name).is_dir():
            raise InputError(f"{self.name} is not yours to change; write a copy with `save_pretrained`, and change that.")
        self.require_whole()
        logger.warning("%s can't be changed in place: changes are kept until this process ends, or you save it.", self.name)
        self._scratch = tempfile.TemporaryDirectory(prefix="fastattr-")
        copy = Path(self._scratch.name) / "attributor"
        self.save_pretrained(copy)
        self._version = open_version(copy, read_config(copy), version.parts, stamp=stamp_of(copy))

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the attributor to a folder that `from_pretrained` loads; an earlier attributor there is replaced.

        What has left is not written. An attributor that has been changed is written as a new base, as by `compact`.

        Args:
            folder: where to.
            overwrite: whether the folder may hold other files, which are kept.

        Raises:
            InputError: the folder is a file, or holds other files.
            MissingFileError: the attributor was loaded in part only.
        """
        if Path(folder).resolve() == self._version.folder.resolve():
            return
        self.require_whole()

        def write() -> None:
            version = self._newest()
            if not version.parts.whole:
                version = open_version(version.folder, version.base, Parts(), stamp=version.stamp)
            assert isinstance(version.catalogue, Catalogue)
            with bases.replacing(Path(folder), overwrite=overwrite) as temporary:
                bases.save(version.folder, version.base, version.catalogue, version.number, temporary)

        settled(self._version.folder, write)

    def require_whole(self) -> None:
        """Raise MissingFileError if it was loaded without some of its files."""
        version = self._newest()
        absent = [file for file in version.base["sha256"] if not (version.folder / file).exists()]
        if absent:
            raise MissingFileError(
                f"{self.name} was loaded without {', '.join(absent)}; load it whole (thumbnails, all shards) to pass it on."
            )
