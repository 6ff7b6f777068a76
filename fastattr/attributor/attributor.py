"""Attributor: from an image and its prompt to the training images that influenced it most."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from fastattr.attributor import bases, edits, inputs
from fastattr.attributor.answers import Asked, Model, by_features, by_student, queries_of
from fastattr.attributor.attribution import Attribution
from fastattr.attributor.changes import history, lock, plain_entries, read_journal
from fastattr.attributor.folder import versions
from fastattr.attributor.inputs import Captions, ImageLike, Images, Metadata, Prompts, Thumbnails, Where
from fastattr.attributor.load import describe, load
from fastattr.attributor.version import Parts, Version
from fastattr.core.errors import InputError, MissingFileError
from fastattr.core.models import ASSETS, commit_of

if TYPE_CHECKING:
    import torch

Answer = Attribution | list[Attribution]  # of one image, or of a list of images


class FastAttributor:
    """Names the training images that influenced a generated image most; changes and saves the folder that it answers from."""

    push_to_hub: ClassVar[Callable[..., str]]
    """Push to a model repository; `fastattr` adds it from publishing, which stands below answering."""

    def __init__(self, model: Model, version: Version, metrics: dict[str, Any]) -> None:
        """Use `from_pretrained`, or `build_attributor` for a run folder."""
        self.name, self.metrics = model.name, metrics
        self._model, self._version = model, version

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
        trusted_keys: Sequence[str] | None = None,
    ) -> FastAttributor:
        """Load an attributor: an embedded one ('emoji'), a local folder, or a Hub repository 'org/name[@revision]'.

        Args:
            name_or_path: which one; `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`: the Hub client's.
            device: where the feature encoders run; None takes CUDA if there is one, but for small CLIPs, which run in NumPy.
            dtype, backend: theirs; float32, and 'numpy' or 'torch', where None takes NumPy for small CLIPs on a CPU.
            thumbnails: whether to fetch and load the training images' thumbnails.
            shards: which shards of the index to fetch and search, counted from 0; None takes all.
            index_uri: search the Milvus server or file that `fastattr index --backend milvus` filled, and fetch no index.
            trusted_keys: ed25519 public keys (PEM), one of which must have signed it (`fastattr sign`) before it is read.

        Raises:
            ArtifactNotFoundError: there is no such model, revision or file, or the cache holds a part of it only.
            ArtifactDamagedError: a checksum or signature is wrong; FormatVersionError: a newer fastattr wrote it.
            EncoderMismatchError: its feature encoders have other weights than those the student was trained on.
            HubError: the Hub refuses, or can't be reached; InputError: there is no such shard.
        """
        hub: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token, "trusted_keys": trusted_keys}
        hub |= {"local_files_only": local_files_only, "force_download": force_download}
        encoders: dict[str, Any] = {"device": device, "dtype": dtype, "backend": backend}
        return cls(*load(name_or_path, encoders=encoders, parts=Parts(thumbnails, shards), index_uri=index_uri, **hub))

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
        """One row an image that is there: image_id, caption, creator, license, source, url, group, ...; thumbnail if loaded."""
        return self._newest().catalogue.table

    def __len__(self) -> int:
        return int(self._newest().catalogue.ntotal)

    def attribute(self, image: Images, prompt: Prompts, k: int = 20, *, where: Where | None = None) -> Answer:
        """Name the k training images that influenced a generated image most.

        Args:
            image: the generated image, anything that `inputs.open_image` opens, or a list of images.
            prompt: its prompt, or as many prompts; None attributes the image alone.
            k: how many training images, 1 to the size of the corpus.
            where: name only images with these values, e.g. {"creator": ["Ada", "Bob"], "license": "CC0-1.0"}, by a column of
                `inputs.FILTERS`; 'since' and 'until' bound the column 'date'. There may be fewer than k.

        Returns:
            One `Attribution`, or a list if a list was given. Raises InputError for an image that can't be read and a wrong k.
        """
        asked, many = queries_of(self._model, image, prompt)
        found = by_student(self._model, self._newest(), asked, k, where) if asked else []
        return found if many else found[0]

    @property
    def has_plain(self) -> bool:
        """Whether `plain` has an index to ask."""
        return self._version.plain is not None

    def plain(self, image: Images, prompt: Prompts, k: int = 20) -> Answer:
        """As `attribute`, by the untuned features: what resembles, not what influenced; InputError without an index of them."""
        asked, many = queries_of(self._model, image, prompt)
        found = by_features(self._model, self._newest(), asked, k) if asked else []
        return found if many else found[0]

    def attribute_features(
        self, features: np.ndarray, prompts: Sequence[str], k: int = 20, *, where: Where | None = None
    ) -> list[Attribution]:
        """As `attribute`, of Q images, from (Q, F) finite features computed elsewhere: the encoders' outputs side by side."""
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError("features need a list of prompts, one text a row.")
        features = inputs.checked_features(features, len(prompts), self.config["feature_dim"])
        hashes = [inputs.features_sha256(row, text) for row, text in zip(features, prompts, strict=True)]
        asked = Asked(features, list(prompts), hashes)
        return by_student(self._model, self._newest(), asked, k, where) if len(prompts) else []

    def replay(self, embedding: np.ndarray, prompt: str, k: int, *, where: Where | None = None) -> Attribution:
        """The answer to a query of which only the (D,) embedding is known, as receipts hold it; at most k images."""
        version = self._newest()
        asked = Asked(np.zeros((0, version.base["feature_dim"]), dtype=np.float32), [prompt], [""])
        k = min(k, version.catalogue.ntotal) or 1
        return by_student(self._model, version, asked, k, where, embedding[None])[0]

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        """(n, D) float32 embeddings of rows of the last `catalog`, as well as they are kept."""
        catalogue = self._version.own()
        return catalogue.embeddings(np.asarray(rows)) if len(rows) else np.zeros((0, self._model.embed_dim), dtype=np.float32)

    def versions(self) -> dict[str, Any]:
        """SHA-256 of 'model', 'index' and 'catalog', and 'catalog_version'."""
        return versions(self._newest().config)

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

    def _newest(self) -> Version:
        """The newest version, which is kept unless another thread has kept a newer one meanwhile."""
        found = self._version.newest()
        if found is not self._version:
            self._version = found
        return found

    def add(
        self, images: Sequence[ImageLike], captions: Captions, metadata: Metadata | None = None, *, readmit: bool = False
    ) -> list[str]:
        """Take n images, with one or several captions each, into the catalogue, and onto the disk; returns their ids.

        Metadata are columns of the catalogue ('creator', 'license', 'source', 'url', 'group', 'subgroup', 'family', 'date' as
        YYYY-MM-DD, 'image_id'); an id that is left out is made from pixels and caption. `readmit` lets images come back that
        were removed. Raises InputError if an image can't be read, an id is there or was removed, or there is no such column.
        """
        if not len(images) and not len(captions):
            return []
        features, texts, fields, thumbnails = edits.prepared(self._model, images, captions, metadata)
        return self.add_features(features, texts, fields, thumbnails=thumbnails, readmit=readmit)

    def add_features(
        self,
        features: np.ndarray,
        captions: Sequence[str],
        metadata: Metadata,
        *,
        thumbnails: Thumbnails = None,
        readmit: bool = False,
    ) -> list[str]:
        """As `add`, from (n, F) features computed elsewhere; metadata have an 'image_id', thumbnails are small WebP files."""
        features = inputs.checked_features(features, len(captions), self.config["feature_dim"])
        records = edits.checked_records(captions, metadata)
        if records:
            embeddings = self._model.student.embed(features)
            with self._changing() as version:
                edits.add(version, records, embeddings, thumbnails, readmit=readmit)
        return [record["image_id"] for record in records]

    def remove(self, image_ids: Sequence[str], *, reason: str = "") -> None:
        """Take images out for good: no answer names them any more; InputError if there was no such one, or it can't be kept."""
        ids = [image_ids] if isinstance(image_ids, str) else list(dict.fromkeys(image_ids))
        with self._changing() as version:
            edits.remove(version, ids, reason)

    def update(self, changes: Mapping[str, Mapping[str, str]]) -> None:
        """Change what the catalogue says of images: new values by column, by image id; InputError if there is no such one."""
        with self._changing() as version:
            edits.update(version, changes)

    def compact(self) -> None:
        """Fold all changes into a new base, which erases the data of removed images from every file of the folder."""
        with self._changing() as version:
            bases.compact(version.folder)

    def history(self) -> list[dict[str, Any]]:
        """The changes since the base was made, oldest first: version, time, operation and image ids."""
        version = self._newest()
        return history(version.folder) or plain_entries(read_journal(version.folder, version.base))

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Version]:
        """The newest version, which no one else can change until the block ends; what was changed is then taken up."""
        self._version.own()
        self._require_own()
        with lock(self._version.folder):
            version = self._newest()
            if any((version.folder / file).exists() for file in version.base.get("replaced", [])):  # its writer was killed
                bases.sweep(version.folder, version.base)
            yield version
        self._newest()

    def _require_own(self) -> None:
        """Refuse to change an embedded model or the Hub client's cache, where a change would not be kept."""
        folder = self._version.folder.resolve()  # a link may lead there, too
        if folder.is_relative_to(ASSETS.resolve()) or commit_of(folder):
            way_out = "write a copy of your own with `save_pretrained(FOLDER)`, and change FOLDER"
            raise InputError(f"{self.name} is not yours to change, so nothing was changed: {way_out}.")

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the attributor to a folder; an earlier attributor there is replaced. What has left is not written.

        A folder that holds other files is refused with an InputError; `overwrite` keeps them and replaces an attributor only.
        """
        if Path(folder).resolve() != self.folder.resolve():
            self.require_whole()
            with bases.replacing(Path(folder), overwrite=overwrite) as temporary:
                bases.copy_newest(self.folder, temporary)

    def require_whole(self) -> None:
        """Raise MissingFileError if it was loaded without some of its files."""
        version = self._newest()
        absent = [file for file in version.base["sha256"] if not (version.folder / file).exists()]
        if absent:
            whole = "load it whole (thumbnails, all shards) to pass it on"
            raise MissingFileError(f"{self.name} was loaded without {', '.join(absent)}; {whole}.")
