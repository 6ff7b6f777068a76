"""Attributor: from an image and its prompt to the training images that influenced it most.

`FastAttributor` holds encoders, student, index and catalogue. Its folder holds config.json (shape, encoders, fingerprints,
SHA-256 of every other file), model.safetensors, index.faiss (or its shards), catalog.parquet, thumbnails.parquet,
metrics.json and, where it brings its own, encoder/.
"""

from __future__ import annotations

import base64
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from fastattr.attributor import journal as living
from fastattr.attributor.attribution import REACH, Attribution, Influence, Reach, found as _found
from fastattr.attributor.catalogue import Catalogue, Where, encode_vector
from fastattr.attributor.folder import (
    check_files,
    copy_version,
    file_of,
    needed_files,
    open_folder,
    read_config,
    read_table,
    settled,
    stamp_of,
    versions,
)
from fastattr.attributor.inputs import ImageLike, checked_metadata, features_sha256, image_sha256, open_image
from fastattr.attributor.journal import open_catalogue
from fastattr.attributor.make import plain_vectors, thumbnail_bytes
from fastattr.core.errors import EncoderMismatchError, InputError, MissingFileError
from fastattr.core.files import atomic_path, read_json
from fastattr.core.models import ASSETS, commit_of
from fastattr.features.kinds import open_encoder
from fastattr.index.files import load_index
from fastattr.index.search import search, stored_vectors
from fastattr.students.calibration import FILE as CALIBRATION, Calibration, load_calibration
from fastattr.students.light import LightStudent

if TYPE_CHECKING:
    import faiss
    import torch

    from fastattr.attributor.collection import MilvusBackend
    from fastattr.features.encoder import Encoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """Queries, as far as an answer depends on them."""

    features: np.ndarray
    """(Q, F)."""
    prompts: list[str]
    hashes: list[str]
    """SHA-256 of each query."""
    seconds: dict[str, float]
    """Spent on the features."""


class FastAttributor:
    """Names the training images that influenced a generated image most."""

    push_to_hub: ClassVar[Callable[..., str]]
    """Push to a model repository; `fastattr` adds it from publishing/push_to_hub.py, since pushing stands below answering."""

    def __init__(
        self,
        *,
        config: dict[str, Any],
        encoders: Sequence[Encoder],
        student: LightStudent,
        catalogue: Catalogue | MilvusBackend,
        metrics: dict[str, Any],
        folder: Path,
        name: str,
        calibration: Calibration | None = None,
        plain_index: faiss.Index | None = None,
    ) -> None:
        """Use `from_pretrained`, or `build_attributor` for a run folder."""
        self.config = config
        self.name = name
        self.metrics = metrics
        self._encoders, self._student, self._catalogue, self._folder = list(encoders), student, catalogue, folder
        self._calibration, self._plain = calibration, plain_index
        self._stamp = stamp_of(folder)
        self._shards: Sequence[int] | None = None
        self._thumbnails = True
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

        def load() -> FastAttributor:
            folder, config = open_folder(
                name_or_path,
                lambda config: needed_files(
                    config, thumbnails=thumbnails and not index_uri, shards=shards, index=not index_uri
                ),
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                force_download=force_download,
            )
            catalogue: Catalogue | MilvusBackend
            if index_uri:
                from fastattr.attributor.collection import MilvusBackend

                catalogue = MilvusBackend.open(index_uri, folder, config)
            else:
                catalogue = open_catalogue(folder, config, thumbnails=thumbnails, shards=shards)
            width = config["feature_dim"]
            loaded = cls(
                config=config,
                encoders=_open_encoders(folder, config, device, dtype, backend),
                student=LightStudent(folder / "model.safetensors", feature_dim=width, config=config["student"]),
                catalogue=catalogue,
                metrics=read_json(folder / "metrics.json"),
                folder=folder,
                name=str(name_or_path),
                calibration=(
                    load_calibration(folder / CALIBRATION, feature_dim=width) if CALIBRATION in config["sha256"] else None
                ),
                plain_index=_open_plain(folder, config) if shards is None and not index_uri else None,
            )
            loaded._shards, loaded._thumbnails = shards, thumbnails
            return loaded

        return settled(Path(str(name_or_path)), load)

    @property
    def catalog(self) -> pa.Table:
        """One row an image that has not been removed.

        image_id, caption, creator, license, source, url, group, subgroup, family; thumbnail (WebP) if loaded.
        """
        return self._catalogue.table

    def __len__(self) -> int:
        return int(self._catalogue.ntotal)

    def attribute(
        self, image: ImageLike | Sequence[ImageLike], prompt: str | Sequence[str], k: int = 20, *, where: Where | None = None
    ) -> Attribution | list[Attribution]:
        """Name the k training images that influenced a generated image most.

        Args:
            image: the generated image (Pillow image, (H, W, 3) uint8 array or file), or a list of them.
            prompt: its prompt, or as many prompts.
            k: how many training images, 1 to the size of the corpus.
            where: name only images with these values, e.g. {"creator": ["Ada", "Bob"], "license": "CC0-1.0"}; columns are those
                of `catalogue.FILTERS`, and 'since' and 'until' bound the column 'date'. There may be fewer than k.

        Returns:
            One `Attribution`, or a list of them if a list was given.

        Raises:
            InputError: an image can't be read, a prompt is empty, or k is out of range.
        """
        return self._answer(image, prompt, lambda asked: self._search(asked, k, where), k)

    @property
    def has_plain(self) -> bool:
        """Whether `plain` has an index to ask."""
        return self._plain is not None

    def plain(
        self, image: ImageLike | Sequence[ImageLike], prompt: str | Sequence[str], k: int = 20
    ) -> Attribution | list[Attribution]:
        """Name the k training images that are most similar by the untuned features: what resembles, not what influenced.

        Args and answer are those of `attribute`; percentiles are None and shares are of the listed images, each counting
        with its similarity.

        Raises:
            InputError: as `attribute`, or the attributor holds no index of untuned features.
        """
        if self._plain is None:
            raise InputError(
                f"{self.name} holds no index of untuned features, or was loaded in part; build it with index.plain set."
            )
        return self._answer(image, prompt, lambda asked: self._search_plain(asked, k), k)

    def _answer(
        self,
        image: ImageLike | Sequence[ImageLike],
        prompt: str | Sequence[str],
        find: Callable[[Asked], list[Attribution]],
        k: int,
    ) -> Attribution | list[Attribution]:
        """`attribute` or `plain`, of one or many."""
        if isinstance(image, list | tuple):
            prompts = list(prompt) if not isinstance(prompt, str) else [prompt] * len(image)
            if len(prompts) != len(image):
                raise InputError(f"{len(image)} images came with {len(prompts)} prompts; give one prompt an image.")
            return find(self._encode([open_image(one) for one in image], prompts, k))
        if not isinstance(prompt, str):
            raise InputError("one image needs one prompt, a string.")
        return find(self._encode([open_image(image)], [prompt], k))[0]

    def _encode(self, images: Sequence[Image.Image], prompts: Sequence[str], k: int) -> Asked:
        """The queries with their features, once all is checked."""
        self.refresh()
        for text in prompts:
            if not text.strip():
                raise InputError("the prompt is empty; give the prompt that the image was made from.")
        if not 1 <= k <= len(self):
            raise InputError(f"top-k must be between 1 and {len(self)} (the images in the corpus), got {k}.")
        if not self._encoders:
            raise InputError(f"{self.name} has no feature encoders; give features to `attribute_features` instead.")
        started = time.perf_counter()
        features = np.concatenate([encoder.encode(images, [[text] for text in prompts]) for encoder in self._encoders], axis=1)
        hashes = [image_sha256(image, text) for image, text in zip(images, prompts, strict=True)]
        return Asked(features, list(prompts), hashes, {"features": time.perf_counter() - started})

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
        self._check_features(features, len(prompts))
        self.refresh()
        hashes = [features_sha256(row, text) for row, text in zip(features, prompts, strict=True)]
        return self._search(Asked(features, list(prompts), hashes, {}), k, where)

    def replay(self, embedding: np.ndarray, prompt: str, k: int, *, where: Where | None = None) -> Attribution:
        """The answer to a query of which only the (D,) embedding is known, as receipts hold it."""
        asked = Asked(np.zeros((0, self.config["feature_dim"]), dtype=np.float32), [prompt], [""], {})
        return self._answers(asked, embedding[None], k, where, started=time.perf_counter())[0]

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        """(n, D) float32 embeddings of rows of `catalog`, as well as they are kept."""
        if not isinstance(self._catalogue, Catalogue):
            raise InputError("embeddings are read from the attributor's own index; load it without index_uri.")
        if not len(rows):
            return np.zeros((0, int(self.config["student"]["embed_dim"])), dtype=np.float32)
        found = self._catalogue.vectors(rows)
        if found is None:  # an inverted file without vectors gives ranges only
            low = int(rows.min())
            found = self._catalogue.read(low, int(rows.max()) + 1)[rows - low]
        return found

    def versions(self) -> dict[str, Any]:
        """SHA-256 of 'model', 'index' and 'catalog', and 'catalog_version'."""
        return versions(self.config)

    def has_left(self, image_id: str) -> bool:
        """Whether an image was in the catalogue once and has been removed."""
        return image_id in self._catalogue.removed

    def _check_features(self, features: np.ndarray, count: int) -> None:
        width = self.config["feature_dim"]
        if features.ndim != 2 or features.shape[1] != width or len(features) != count:
            raise InputError(f"features must be ({count}, {width}), one row a prompt, got {features.shape}.")
        if not np.isfinite(features).all():
            raise InputError("features must be finite; some are NaN or infinite.")

    def _search(self, asked: Asked, k: int, where: Where | None = None) -> list[Attribution]:
        """By the student."""
        started = time.perf_counter()
        embeddings = self._student.embed_queries(asked.features)
        return self._answers(asked, embeddings, k, where, started=started)

    def _answers(
        self, asked: Asked, embeddings: np.ndarray, k: int, where: Where | None, *, started: float
    ) -> list[Attribution]:
        """The answers to queries whose (Q, D) embeddings are known; their features may be missing."""
        catalogue = self._catalogue  # one version, whatever another thread takes up meanwhile
        found = _nearest(catalogue, embeddings, k, where)
        parts = self._parts(asked.features, catalogue, found) if len(asked.features) else [None] * len(found)
        warnings = self._warnings(asked.features) if len(asked.features) else [[] for _ in found]
        seconds = {**asked.seconds, "search": time.perf_counter() - started}
        answers = []
        for row, (rows, similarities) in enumerate(found):
            records = catalogue.fetch(rows)
            weights = None if self._calibration else self._student.closeness(similarities)
            find = partial(_found, rows, similarities)
            table = catalogue.table if isinstance(catalogue, Catalogue) else pa.Table.from_pylist(records)
            if not isinstance(catalogue, Catalogue):  # a server's catalogue stays there: shares are of what was found
                find = partial(_found, np.arange(len(records)), similarities)
            elif self._calibration:  # shares are of the whole corpus, whatever the restriction
                find = partial(_reached, catalogue, embeddings[row], max(k, REACH))
            answers.append(
                self._attribution(
                    asked.prompts[row],
                    records,
                    similarities,
                    seconds,
                    _query(asked.hashes[row], embeddings[row], k, where),
                    parts=parts[row],
                    reach=Reach(table, find, weights, self._calibration, catalogue.ntotal, own=not warnings[row]),
                    warnings=warnings[row],
                )
            )
        return answers

    def _search_plain(self, asked: Asked, k: int) -> list[Attribution]:
        """By the untuned features."""
        assert self._plain is not None
        assert isinstance(self._catalogue, Catalogue)
        started = time.perf_counter()
        catalogue, plain = self._catalogue, self._plain
        queries = plain_vectors(asked.features)
        present = catalogue.rows_of(np.arange(plain.ntotal))  # its rows are those of the base
        wanted = min(k, int((present >= 0).sum()))
        slots, similarities = search(plain, queries, min(wanted + int((present < 0).sum()), plain.ntotal))
        images = self._columns_of({"image", "text"})
        answers = []
        for query, (own, values) in enumerate(zip(slots, similarities, strict=True)):
            kept = np.flatnonzero(present[own] >= 0)[:wanted]
            own, values = own[kept], values[kept]
            vectors = stored_vectors(plain, own)
            parts = None
            if vectors is not None and images is not None:
                products = vectors * queries[query]
                parts = products[:, images].sum(axis=1), products[:, ~images].sum(axis=1)
            rows = present[own]
            reach = Reach(catalogue.table, partial(_found, rows, values), np.maximum(values, 1e-6), None, catalogue.ntotal)
            answers.append(
                self._attribution(
                    asked.prompts[query],
                    catalogue.fetch(rows),
                    values,
                    asked.seconds,
                    {"sha256": asked.hashes[query], "k": k},
                    parts=parts,
                    reach=reach,
                    warnings=[],
                )
            )
        spent = time.perf_counter() - started
        for answer in answers:
            answer.seconds["search"] = spent
            answer.model["method"] = "plain similarity"
        return answers

    def _columns_of(self, kinds: set[str]) -> np.ndarray | None:
        """(F,) bool: which features are of images, if all are of one of these kinds; None otherwise or if it isn't known."""
        blocks = self.config.get("feature_blocks", [])
        if not blocks or not {block["modality"] for block in blocks} <= kinds:
            return None
        return np.concatenate([np.full(block["width"], block["modality"] == "image") for block in blocks])

    def _parts(
        self, features: np.ndarray, catalogue: Catalogue | MilvusBackend, found: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> list[tuple[np.ndarray, np.ndarray] | None]:
        """For each query what image and prompt contribute to its (k,) similarities: Shapley values of two players.

        With v(S) the similarity when all but S is replaced by the corpus' mean, and v of nothing 0, the image's is
        (v(image) + v(both) - v(text)) / 2; what remains without either is halved between them.
        """
        images = self._columns_of({"image", "text"})
        if self._calibration is None or images is None or not isinstance(catalogue, Catalogue):
            return [None] * len(found)
        if images.all() or not images.any():
            both = [(values, np.zeros_like(values)) for _, values in found]
            return [pair if images.all() else pair[::-1] for pair in both]
        alone = [
            self._student.embed_queries(np.where(kept, features, self._calibration.feature_mean)) for kept in (images, ~images)
        ]
        parts: list[tuple[np.ndarray, np.ndarray] | None] = []
        for query, (rows, similarities) in enumerate(found):
            vectors = catalogue.vectors(rows)
            if vectors is None:
                parts.append(None)
                continue
            of_image, of_text = (vectors @ embedded[query] for embedded in alone)
            parts.append(((similarities + of_image - of_text) / 2, (similarities + of_text - of_image) / 2))
        return parts

    def _warnings(self, features: np.ndarray) -> list[list[str]]:
        """For each query what its reader should know."""
        density = self._calibration.density if self._calibration else None
        if density is None:
            return [[] for _ in features]
        return [
            [
                f"Image and prompt do not look like this generator's output (distance {distance:.2f}; its own stay below "
                f"{density.threshold:.2f}). For an image that it did not make, these are the training images that resemble it."
            ]
            if distance > density.threshold
            else []
            for distance in density.distance(features)
        ]

    def _attribution(
        self,
        prompt: str,
        records: list[dict[str, Any]],
        similarities: np.ndarray,
        seconds: dict[str, float],
        query: dict[str, Any],
        *,
        parts: tuple[np.ndarray, np.ndarray] | None,
        reach: Reach,
        warnings: list[str],
    ) -> Attribution:
        text_columns = ("image_id", "caption", "creator", "license", "source", "url", "family")
        percentiles = reach.calibration.percentile_of(similarities).tolist() if reach.calibration else [None] * len(records)
        image_parts, text_parts = [part.tolist() for part in parts] if parts else [[None] * len(records)] * 2
        results = [
            Influence(
                rank=rank,
                similarity=float(similarities[rank]),
                **{column: record[column] for column in text_columns},
                percentile=percentiles[rank],
                image_part=image_parts[rank],
                text_part=text_parts[rank],
            )
            for rank, record in enumerate(records)
        ]
        model = {
            "name": self.name,
            "fastattr_version": self.config["fastattr_version"],
            "corpus_fingerprint": self.config["corpus_fingerprint"],
            "generator_fingerprint": self.config["generator_fingerprint"],
            "model_sha256": self.config["sha256"]["model.safetensors"],
            "index_sha256": versions(self.config)["index"],
            "revision": commit_of(self._folder) or "",
        }
        thumbnails = {record["image_id"]: record["thumbnail"] for record in records if record.get("thumbnail")}
        return Attribution(results, prompt, dict(seconds), model, warnings, query, versions(self.config), reach, thumbnails)

    def file(self, name: str) -> Path | None:
        """A further file that the attributor brings along (see showcase.py), checked as it was loaded; None without."""
        return self._folder / name if name in self.config["sha256"] else None

    def info(self) -> dict[str, Any]:
        """What this attributor is: size, creators, licences, versions and metrics."""
        return _describe(self.name, self.config, self.catalog, self.metrics)

    # ---- a living catalogue

    def refresh(self) -> bool:
        """Take up what another process has published since; `attribute` does so before it answers. True if there was any."""
        stamp = stamp_of(self._folder)
        if stamp == self._stamp or not isinstance(self._catalogue, Catalogue):
            return False

        def load() -> tuple[dict[str, Any], Catalogue]:
            config = read_config(self._folder)
            base = ("files", "index_shards", "vectors")
            if "journal_bytes" in self.config and all(config.get(name) == self.config.get(name) for name in base):
                catalogue = self._catalogue
                assert isinstance(catalogue, Catalogue)
                for entry in living.read_journal(self._folder, config, after=self.config["journal_bytes"]):
                    catalogue = catalogue.applied(entry)
                return config, catalogue
            check_files(self._folder, config, needed_files(config, thumbnails=self._thumbnails, shards=self._shards))
            if self._plain is not None:
                self._plain = _open_plain(self._folder, config)
            return config, open_catalogue(self._folder, config, thumbnails=self._thumbnails, shards=self._shards)

        self.config, self._catalogue = settled(self._folder, load)
        self._stamp = stamp
        return True

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
        if not self._encoders:
            raise InputError(f"{self.name} has no feature encoders; give features to `add_features` instead.")
        opened = [open_image(image) for image in images]
        texts = [[text] if isinstance(text, str) else list(text) for text in captions]
        if not all(text and text[0].strip() for text in texts):
            raise InputError("every image needs a caption.")
        features = np.concatenate([encoder.encode(opened, texts) for encoder in self._encoders], axis=1)
        return self.add_features(
            features,
            [text[0] for text in texts],
            [
                {"image_id": f"added-{image_sha256(image, text[0])[:16]}", **fields}
                for image, text, fields in zip(opened, texts, metadata or [{}] * len(opened), strict=True)
            ],
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
        self._check_features(features, len(captions))
        if len(metadata) != len(captions) or not len(captions):
            raise InputError(f"{len(captions)} images need as many metadata, and there must be at least one.")
        records = [{"caption": caption, **checked_metadata(fields)} for caption, fields in zip(captions, metadata, strict=True)]
        ids = [record.get("image_id", "") for record in records]
        if "" in ids or len(set(ids)) < len(ids):
            raise InputError("every image needs an image_id of its own.")
        embeddings = self._student.embed_images(features).astype(np.float16).astype(np.float32)

        def entries(catalogue: Catalogue) -> list[dict[str, Any]]:
            there = [image_id for image_id, slot in zip(ids, catalogue.slots(ids), strict=True) if slot >= 0]
            left = [image_id for image_id in ids if image_id in catalogue.removed]
            if there:
                raise InputError(f"the catalogue already has {', '.join(there[:3])}; update it, or give another image_id.")
            if left and not readmit:
                raise InputError(f"{', '.join(left[:3])} was removed; to take it in again, say so (readmit=True).")
            images: list[dict[str, Any]] = []
            for i, (record, embedding) in enumerate(zip(records, embeddings, strict=True)):
                image = {**record, "embedding": encode_vector(embedding)}
                if thumbnails is not None:
                    image["thumbnail"] = base64.b64encode(thumbnails[i]).decode()
                images.append(image)
            size = living.LINE_IMAGES
            return [{"operation": "add", "images": images[start : start + size]} for start in range(0, len(images), size)]

        self._change(entries)
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

        def entries(catalogue: Catalogue) -> list[dict[str, Any]]:
            unknown = [
                image_id
                for image_id, slot in zip(ids, catalogue.slots(ids), strict=True)
                if slot < 0 and image_id not in catalogue.removed
            ]
            if unknown:
                raise InputError(f"the catalogue has no image {', '.join(map(repr, unknown[:3]))}; nothing was removed.")
            left = [image_id for image_id in ids if image_id not in catalogue.removed]
            return [{"operation": "remove", "image_ids": left, **({"reason": reason} if reason else {})}] if left else []

        self._change(entries)

    def update(self, changes: Mapping[str, Mapping[str, str]]) -> None:
        """Change what the catalogue says of images; similarities stay as they are.

        Args:
            changes: new values by column, by image id.

        Raises:
            InputError: the catalogue has no such image, or no such column.
        """
        if any("image_id" in fields for fields in changes.values()):
            raise InputError("an image keeps its image_id; remove it and add it under another one.")
        images = [{**checked_metadata(fields), "image_id": image_id} for image_id, fields in changes.items()]

        def entries(catalogue: Catalogue) -> list[dict[str, Any]]:
            unknown = [image_id for image_id, slot in zip(changes, catalogue.slots(list(changes)), strict=True) if slot < 0]
            if unknown:
                raise InputError(f"the catalogue has no image {', '.join(map(repr, unknown[:3]))}; nothing was changed.")
            return [{"operation": "update", "images": images}] if images else []

        self._change(entries)

    def compact(self) -> None:
        """Fold all changes into a new base, which is what erases the data of removed images from the disk.

        Raises:
            InputError: no image is left.
        """
        self._require_own()
        self.require_whole()
        with living.lock(self._folder):
            self.refresh()
            assert isinstance(self._catalogue, Catalogue)
            if self._shards is not None or not self._thumbnails:
                raise InputError("load the attributor whole (thumbnails, all shards) to compact it.")
            self.config = living.compact(self._folder, self.config, self._catalogue)
            self._catalogue, self._stamp = open_catalogue(self._folder, self.config), stamp_of(self._folder)
            self._plain = _open_plain(self._folder, self.config)

    def history(self) -> list[dict[str, Any]]:
        """The changes since the base was made, oldest first: version, time, operation and image ids."""
        entries = living.read_journal(self._folder, self.config)
        plain = ("version", "time", "operation", "image_ids", "reason", "removed")
        return [
            {name: value for name, value in entry.items() if name in plain}
            | ({"image_ids": [image["image_id"] for image in entry["images"]]} if isinstance(entry.get("images"), list) else {})
            for entry in entries
        ]

    def _change(self, entries: Callable[[Catalogue], list[dict[str, Any]]]) -> None:
        """Append what `entries` makes of the newest version to the journal, and take it up."""
        if not isinstance(self._catalogue, Catalogue):
            raise InputError("change the attributor's folder, then bring Milvus up to it: `fastattr index --backend milvus`.")
        self._require_own()
        with living.lock(self._folder):
            self.refresh()
            catalogue = self._catalogue
            lines = entries(catalogue)
            if not lines:
                return
            config = living.append(self._folder, self.config, lines)
            for line in lines:
                catalogue = catalogue.applied(line)
            self.config, self._catalogue, self._stamp = config, catalogue, stamp_of(self._folder)

    def _require_own(self) -> None:
        """Work on a copy of what is not the user's to change: an embedded model, or the Hub client's cache."""
        if self._scratch or not (self._folder.is_relative_to(ASSETS) or commit_of(self._folder)):
            return
        self.require_whole()
        logger.warning("%s can't be changed in place: changes are kept until this process ends, or you save it.", self.name)
        self._scratch = tempfile.TemporaryDirectory(prefix="fastattr-")
        copy = Path(self._scratch.name) / "attributor"
        copy_version(self._folder, self.config, copy)
        self._folder, self._stamp = copy, stamp_of(copy)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the attributor to a folder that `from_pretrained` loads; an earlier one there is replaced."""
        target = Path(folder)
        if target.resolve() == self._folder.resolve():
            return
        self.require_whole()

        def copy() -> None:
            self.refresh()
            with atomic_path(target) as temporary:
                temporary.mkdir(parents=True)
                copy_version(self._folder, self.config, temporary)

        settled(self._folder, copy)

    def require_whole(self) -> None:
        """Raise MissingFileError if it was loaded without some of its files."""
        absent = [file for file in self.config["sha256"] if not (self._folder / file).exists()]
        if absent:
            raise MissingFileError(
                f"{self.name} was loaded without {', '.join(absent)}; load it whole (thumbnails, all shards) to pass it on."
            )


def read_info(name_or_path: str | Path) -> dict[str, Any]:
    """What `FastAttributor.from_pretrained(name_or_path).info()` says, without loading encoders, network and index.

    Raises:
        As `FastAttributor.from_pretrained`.
    """

    def load() -> dict[str, Any]:
        folder, config = open_folder(
            name_or_path, lambda config: needed_files(config, thumbnails=False, index=False, model=False)
        )
        catalog = read_table(folder / file_of(config, "catalog"))
        if file_of(config, "journal") in config["sha256"]:
            folder, config = open_folder(name_or_path, lambda config: needed_files(config, thumbnails=False))
            catalog = open_catalogue(folder, config, thumbnails=False).table
        return _describe(str(name_or_path), config, catalog, read_json(folder / "metrics.json"))

    return settled(Path(str(name_or_path)), load)


def _open_encoders(
    folder: Path, config: dict[str, Any], device: str | None, dtype: torch.dtype | None, backend: str | None
) -> list[Encoder]:
    """The feature encoders of an attributor, see `open_encoder`.

    Raises:
        EncoderMismatchError: they have other weights or preprocessing than those of config.json.
    """
    options = {"folder": folder, "captions": config["captions"], "device": device, "dtype": dtype, "backend": backend}
    opened = [open_encoder(specification, **options) for specification in config["encoders"]]
    found = [encoder.fingerprint for encoder in opened]
    if found != config["encoder_fingerprints"]:
        raise EncoderMismatchError(
            f"{folder} needs the encoders {config['encoders']} with fingerprints {config['encoder_fingerprints']}, those "
            f"loaded have {found}. Fetch the revision of the encoders that the attributor's card names, or the attributor "
            "that was trained on these."
        )
    return opened


def _open_plain(folder: Path, config: dict[str, Any]) -> faiss.Index | None:
    """The index of the untuned features, whose rows are the catalogue's base; None if there is none."""
    file = file_of(config, "plain")
    return load_index(folder / file, sha256=config["sha256"][file]) if file in config["sha256"] else None


def _nearest(
    catalogue: Catalogue | MilvusBackend, embeddings: np.ndarray, k: int, where: Where | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each of (Q, D) embeddings the rows of its k nearest images, or of all that meet `where`, and their similarities.

    Raises:
        InputError: k is out of range.
    """
    if not 1 <= k <= catalogue.ntotal:
        raise InputError(f"top-k must be between 1 and {catalogue.ntotal} (the images in the corpus), got {k}.")
    similarities, rows = catalogue.search(np.ascontiguousarray(embeddings, dtype=np.float32), k, where=where)
    return list(zip(rows, similarities, strict=True))


def _reached(catalogue: Catalogue, embedding: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and similarities of the images that shares of one query are taken of."""
    return _nearest(catalogue, embedding[None], min(count, catalogue.ntotal))[0]


def _query(sha256: str, embedding: np.ndarray, k: int, where: Where | None) -> dict[str, Any]:
    """What a receipt says of a query, but for its prompt."""
    query: dict[str, Any] = {
        "sha256": sha256,
        "embedding": base64.b64encode(embedding.astype("<f4").tobytes()).decode(),
        "k": k,
    }
    return query | ({"where": dict(where)} if where else {})


def _describe(name: str, config: dict[str, Any], catalog: pa.Table, metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "images": len(catalog),
        "creators": len(catalog["creator"].unique()),
        "licences": sorted(set(catalog["license"].to_pylist())),
        "sources": sorted(set(catalog["source"].to_pylist())),
        "examples": catalog["caption"]
        .take(pa.array(np.linspace(0, len(catalog) - 1, min(6, len(catalog)), dtype=int)))
        .to_pylist(),
        "encoders": config["encoders"],
        "embed_dim": config["student"]["embed_dim"],
        "index": config["index"],
        "files": sorted(config["sha256"]),
        "versions": {
            "fastattr": config["fastattr_version"],
            "format": str(config["format_version"]),
            "catalog": str(config.get("catalog_version", 1)),
            "corpus": config["corpus_fingerprint"],
            "generator": config["generator_fingerprint"],
        },
        "metrics": metrics,
    }
