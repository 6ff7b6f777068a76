"""Attribute: from an image and its prompt to the training images that influenced it most.

`FastAttributor` holds encoders, student, index and catalogue; `Attribution` is the answer to one query.
An attributor folder holds config.json (shape, encoders, fingerprints, SHA-256 of every other file),
model.safetensors, index.faiss (or its shards), catalog.parquet, thumbnails.parquet, metrics.json and, where it brings
its own, encoder/.
"""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from fastattr.artifacts import atomic_path, fingerprint, open_stage, read_json, require_same, sha256_file, write_json
from fastattr.calibrate import FILE as CALIBRATION, Calibration, estimate_shares, families_of, load_calibration
from fastattr.corpus import Corpus, load_rgb, to_rgb
from fastattr.distill import load_student, open_student, save_student
from fastattr.errors import ArtifactDamagedError, EncoderMismatchError, FormatVersionError, InputError, MissingFileError
from fastattr.features import Encoder, folders, modality, open_encoder, read_features
from fastattr.hub import commit_of, locate, split_revision
from fastattr.index import (
    IndexConfig,
    Searchable,
    Shards,
    build_index,
    load_index,
    save_index,
    search,
    split_index,
    stored_vectors,
)
from fastattr.student import Student, StudentConfig, embed

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from matplotlib.figure import Figure

FORMAT_VERSION = 2
"""2 keeps the thumbnails apart from the catalogue, and may split the index; 1 is read, too."""
CATALOG_COLUMNS = ("image_id", "caption", "creator", "license", "source", "url", "group", "subgroup", "family")
THUMBNAIL_SIDE = 48
"""Pixels; the catalogue of 15,351 emoji is 6 MB with 48 and 8 MB with 64."""

UNASSIGNED = "no one in particular"
"""Name of the last row of `Attribution.shares`: influence that is no one's more than anyone else's."""
REACH = 20_000
"""Most similar images that shares are taken of; those of a larger corpus beyond them count as unrelated."""
PLAIN = "plain.faiss"
"""The index of the untuned features."""

ImageLike = Image.Image | np.ndarray | str | Path


@dataclass(frozen=True)
class Influence:
    """One training image in an attribution."""

    rank: int
    """0 = most influential."""
    image_id: str
    similarity: float
    """Cosine between the student's embeddings of query and training image, -1 to 1; orders like influence."""
    caption: str
    creator: str
    license: str
    source: str
    url: str
    percentile: float | None = None
    """Expected percentile, by the teacher, among all training images: 100 = the most influential; None if not calibrated."""
    image_part: float | None = None
    """How much of `similarity` is the image's doing, ..."""
    text_part: float | None = None
    """... and how much the prompt's: Shapley values, which add up to it; a part is taken away by putting the corpus' mean
    in its place. None if the attributor has no means, or encoders that read both."""


@dataclass(frozen=True)
class Reach:
    """What the shares of one attribution are taken of."""

    catalog: pa.Table
    """Of the whole corpus."""
    rows: np.ndarray
    """(M,) rows of the catalogue, most similar first."""
    similarities: np.ndarray
    """(M,)."""
    weights: np.ndarray | None
    """(M,) what an image counts where there is no calibration."""
    calibration: Calibration | None

    def names(self, column: str) -> np.ndarray:
        """(M,) values of one column of the catalogue; '' where there is none."""
        values = self.catalog[column].take(pa.array(self.rows)).to_pylist()
        return np.array(["" if value is None else str(value) for value in values])


@dataclass(frozen=True)
class Attribution:
    """The training images that influenced one image most, most influential first."""

    results: list[Influence]
    prompt: str
    seconds: dict[str, float]
    """Time spent in each step."""
    model: dict[str, Any]
    """Name, fingerprints and versions of what answered."""
    warnings: list[str] = field(default_factory=list)
    _reach: Reach | None = field(default=None, repr=False, compare=False)
    _thumbnails: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)

    def to_pandas(self) -> pd.DataFrame:
        """One row a training image, most influential first."""
        import pandas as pd

        return pd.DataFrame([asdict(result) for result in self.results])

    def to_dict(self) -> dict[str, Any]:
        """Everything but the thumbnails, as plain values."""
        return {
            "results": [asdict(result) for result in self.results],
            "prompt": self.prompt,
            "seconds": self.seconds,
            "model": self.model,
            "warnings": self.warnings,
        }

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def shares(self, by: str = "creator") -> pd.DataFrame:
        """How the query's positive influence divides by creator, licence, source or another column of the catalogue.

        With a calibration, a share is what the teacher is expected to find, over the whole corpus: the influence of a
        creator's images beyond what as many unrelated images have, over all positive influence. Near-duplicates (one
        `family`) count once together. What is left belongs to no one in particular and is the last row, `UNASSIGNED`, with
        the images that lack a name in that column. Intervals are of 95%, found on validation queries (docs/student.md).

        Without a calibration shares are of the listed images together, each counting with the student's estimate of its
        closeness to the top of the teacher's ranking; intervals are NaN and nothing is left unassigned.

        Args:
            by: 'creator', 'license', 'source' or another column of the catalogue.

        Returns:
            Columns `by`, 'share' (sums to 1), 'low', 'high', 'images' (how many hold it), largest share first.

        Raises:
            InputError: there is no such column.
        """
        import pandas as pd

        if self._reach is None:
            raise InputError("this attribution was made without a catalogue; shares need one.")
        catalog = self._reach.catalog
        known = [name for name in catalog.column_names if name not in {"image_id", "thumbnail"}]
        if by not in known:
            raise InputError(f"shares can be taken by {', '.join(known)}, not by {by!r}")
        names = self._reach.names(by)
        if self._reach.calibration is None:
            weights = self._reach.weights
            counted = pd.DataFrame({by: names, "share": weights, "images": 1}).groupby(by, as_index=False).sum()
            counted["share"] /= counted["share"].sum()
            table = counted.assign(low=float("nan"), high=float("nan"))
            last = (0.0, float("nan"), float("nan"))
        else:
            every = families_of(catalog["family"].to_pylist()) if "family" in catalog.column_names else np.arange(len(catalog))
            found = estimate_shares(
                self._reach.calibration,
                self._reach.similarities,
                names,
                every[self._reach.rows],
                family_sizes=np.bincount(every)[every[self._reach.rows]],
                beyond=len(catalog) - len(names),
            )
            columns = {by: found.names, "share": found.share, "low": found.low, "high": found.high, "images": found.images}
            table = pd.DataFrame(columns).query("images > 0")
            last = found.unassigned
        table = table.sort_values(["share", by], ascending=[False, True])
        rest = {by: [UNASSIGNED], "share": last[0], "low": last[1], "high": last[2], "images": 0}
        return pd.concat([table, pd.DataFrame(rest)], ignore_index=True)[[by, "share", "low", "high", "images"]]

    @property
    def dominant(self) -> str | None:
        """The creator whose share is certainly the largest; None if intervals overlap: there is no dominant source.

        Certainly: the lower end of its interval lies above the upper ends of all other creators', and above 0.
        """
        table = self.shares(by="creator").iloc[:-1]
        if table.empty or not table["low"].iloc[0] > max(0.0, table["high"].iloc[1:].max() if len(table) > 1 else 0.0):
            return None
        return str(table["creator"].iloc[0])

    def thumbnail(self, image_id: str) -> Image.Image:
        """Small RGB picture of one of the results.

        Raises:
            InputError: it is none of them, or the attributor was loaded without thumbnails.
        """
        if self.results and not self._thumbnails:
            raise InputError("the attributor has no thumbnails, or was loaded with thumbnails=False.")
        if image_id not in self._thumbnails:
            raise InputError(f"{image_id!r} is not among the {len(self.results)} results of this attribution.")
        return load_rgb(self._thumbnails[image_id])

    def figure(self) -> Figure:
        """The results as a matplotlib figure: thumbnails with rank, similarity, caption and creator."""
        from matplotlib.figure import Figure

        columns = min(5, len(self.results))
        rows = -(-len(self.results) // columns)
        figure = Figure(figsize=(2.4 * columns, 2.7 * rows), layout="constrained")
        for axes, result in zip(figure.subplots(rows, columns, squeeze=False).flat, self.results, strict=False):
            axes.imshow(self.thumbnail(result.image_id))
            axes.set_title(f"{result.rank + 1}. {result.caption[:34]}\n{result.creator}, {result.similarity:.3f}", fontsize=7)
        for axes in figure.axes:
            axes.axis("off")
        return figure


class FastAttributor:
    """Names the training images that influenced a generated image most."""

    def __init__(
        self,
        *,
        config: dict[str, Any],
        encoders: Sequence[Encoder],
        student: Student,
        index: Searchable,
        catalog: pa.Table,
        metrics: dict[str, Any],
        folder: Path,
        name: str,
        calibration: Calibration | None = None,
        plain_index: Searchable | None = None,
    ) -> None:
        """Use `from_pretrained`, or `build_attributor` for a run folder."""
        self.config = config
        self.name = name
        self.catalog = catalog
        """(N rows) image_id, caption, creator, license, source, url, group, subgroup, family; thumbnail (WebP) if loaded."""
        self.metrics = metrics
        self._encoders, self._student, self._index, self._folder = list(encoders), student, index, folder
        self._calibration, self._plain = calibration, plain_index

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
        thumbnails: bool = True,
        shards: Sequence[int] | None = None,
    ) -> FastAttributor:
        """Load an attributor: an embedded one ('emoji'), a local folder, or a Hub repository 'org/name[@revision]'.

        Args:
            name_or_path: which one.
            revision: branch, tag or commit on the Hub.
            cache_dir: where the Hub client keeps downloads.
            token: Hub access token; None takes the stored one.
            local_files_only: take the cached copy, ask no network.
            force_download: fetch again what the cache holds.
            device: where the feature encoders run; None takes CUDA if there is one.
            dtype: of the feature encoders; None is float32.
            thumbnails: whether to fetch and load the training images' thumbnails.
            shards: which shards of the index to fetch and search, counted from 0; None takes all.

        Raises:
            ArtifactNotFoundError: there is no such model (RevisionNotFoundError: no such revision of it;
                MissingFileError: a file of it is missing; IncompleteDownloadError: the cache holds a part of it only).
            ArtifactDamagedError: a file's checksum is not that of config.json.
            FormatVersionError: it was written by a newer fastattr.
            EncoderMismatchError: its feature encoders have other weights than those the student was trained on.
            HubError: the Hub refuses, or can't be reached.
            InputError: there is no such shard.
        """
        import torch

        folder, config = _open_folder(
            name_or_path,
            lambda config: _files(config, thumbnails=thumbnails, shards=shards),
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        encoders = [
            open_encoder(specification, folder=folder, captions=config["captions"], device=device, dtype=dtype or torch.float32)
            for specification in config["encoders"]
        ]
        found = [encoder.fingerprint for encoder in encoders]
        if found != config["encoder_fingerprints"]:
            raise EncoderMismatchError(
                f"{folder} needs the encoders {config['encoders']} with fingerprints {config['encoder_fingerprints']}, those "
                f"loaded have {found}. Fetch the revision of the encoders that the attributor's card names, or the attributor "
                "that was trained on these."
            )
        shape = StudentConfig.from_json(config["student"])
        catalog = pq.read_table(folder / "catalog.parquet")
        if thumbnails and "thumbnails.parquet" in config["sha256"]:
            catalog = _with_thumbnails(catalog, pq.read_table(folder / "thumbnails.parquet"))
        return cls(
            config=config,
            encoders=encoders,
            student=load_student(folder / "model.safetensors", feature_dim=config["feature_dim"], config=shape),
            index=_load_shards(folder, config, shards),
            catalog=catalog,
            metrics=read_json(folder / "metrics.json"),
            folder=folder,
            name=str(name_or_path),
            calibration=(
                load_calibration(folder / CALIBRATION, feature_dim=config["feature_dim"])
                if CALIBRATION in config["sha256"]
                else None
            ),
            plain_index=(
                load_index(folder / PLAIN, sha256=config["sha256"][PLAIN])
                if PLAIN in config["sha256"] and shards is None
                else None
            ),
        )

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def attribute(
        self, image: ImageLike | Sequence[ImageLike], prompt: str | Sequence[str], k: int = 20
    ) -> Attribution | list[Attribution]:
        """Name the k training images that influenced a generated image most.

        Args:
            image: the generated image (Pillow image, (H, W, 3) uint8 array or file), or a list of them.
            prompt: its prompt, or as many prompts.
            k: how many training images, 1 to the size of the corpus.

        Returns:
            One `Attribution`, or a list of them if a list was given.

        Raises:
            InputError: an image can't be read, a prompt is empty, or k is out of range.
        """
        return self._answer(image, prompt, k, self._search)

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
        return self._answer(image, prompt, k, self._search_plain)

    def _answer(
        self,
        image: ImageLike | Sequence[ImageLike],
        prompt: str | Sequence[str],
        k: int,
        search_features: Callable[[np.ndarray, Sequence[str], int, dict[str, float]], list[Attribution]],
    ) -> Attribution | list[Attribution]:
        """`attribute` or `plain`, of one or many."""
        if isinstance(image, list | tuple):
            prompts = list(prompt) if not isinstance(prompt, str) else [prompt] * len(image)
            if len(prompts) != len(image):
                raise InputError(f"{len(image)} images came with {len(prompts)} prompts; give one prompt an image.")
            features, seconds = self._encode([open_image(one) for one in image], prompts, k)
            return search_features(features, prompts, k, seconds)
        if not isinstance(prompt, str):
            raise InputError("one image needs one prompt, a string.")
        features, seconds = self._encode([open_image(image)], [prompt], k)
        return search_features(features, [prompt], k, seconds)[0]

    def _encode(self, images: Sequence[Image.Image], prompts: Sequence[str], k: int) -> tuple[np.ndarray, dict[str, float]]:
        """(Q, F) features, once all is checked, and the seconds they took."""
        for text in prompts:
            if not text.strip():
                raise InputError("the prompt is empty; give the prompt that the image was made from.")
        if not 1 <= k <= len(self):
            raise InputError(f"top-k must be between 1 and {len(self)} (the images in the corpus), got {k}.")
        if not self._encoders:
            raise InputError(f"{self.name} has no feature encoders; give features to `attribute_features` instead.")
        started = time.perf_counter()
        features = np.concatenate([encoder.encode(images, [[text] for text in prompts]) for encoder in self._encoders], axis=1)
        return features, {"features": time.perf_counter() - started}

    def attribute_features(self, features: np.ndarray, prompts: Sequence[str], k: int = 20) -> list[Attribution]:
        """Name the k training images that influenced each of Q images most, from features computed elsewhere.

        Args:
            features: (Q, F) finite, the encoders' outputs side by side, as the student was trained on.
            prompts: Q prompts, kept in the answers.
            k: how many training images, 1 to the size of the corpus.

        Raises:
            InputError: the features have another shape or are not finite, or k is out of range.
        """
        width = self.config["feature_dim"]
        if features.ndim != 2 or features.shape[1] != width or len(features) != len(prompts):
            raise InputError(f"features must be ({len(prompts)}, {width}), one row a prompt, got {features.shape}.")
        if not np.isfinite(features).all():
            raise InputError("features must be finite; some are NaN or infinite.")
        return self._search(features, prompts, k, {})

    def _search(self, features: np.ndarray, prompts: Sequence[str], k: int, seconds: dict[str, float]) -> list[Attribution]:
        """By the student."""
        import torch

        started = time.perf_counter()
        queries = embed(self._student, features, query=True)
        rows, similarities = search(self._index, queries, k)
        parts = self._parts(features, rows, similarities)
        reaches = [(own, values, None) for own, values in zip(rows, similarities, strict=True)]
        if self._calibration is None:
            with torch.no_grad():
                weights = torch.sigmoid(self._student.logits(torch.from_numpy(similarities))).double().numpy()
            reaches = [(own, values, weight) for (own, values, _), weight in zip(reaches, weights, strict=True)]
        else:
            farther = search(self._index, queries, min(len(self), max(k, REACH)))
            reaches = [(own[own >= 0], values[own >= 0], None) for own, values in zip(*farther, strict=True)]
        warnings = self._warnings(features)
        seconds = {**seconds, "search": time.perf_counter() - started}
        return [
            self._attribution(
                text,
                rows[query],
                similarities[query],
                seconds,
                parts=[part[query] for part in parts] if parts else None,
                reach=Reach(self.catalog, *reaches[query], self._calibration),
                warnings=warnings[query],
            )
            for query, text in enumerate(prompts)
        ]

    def _search_plain(
        self, features: np.ndarray, prompts: Sequence[str], k: int, seconds: dict[str, float]
    ) -> list[Attribution]:
        """By the untuned features."""
        assert self._plain is not None
        started = time.perf_counter()
        queries = plain_vectors(features)
        rows, similarities = search(self._plain, queries, k)
        images = self._columns_of({"image", "text"})
        answers = []
        for query, text in enumerate(prompts):
            vectors = stored_vectors(self._plain, rows[query])
            parts = None
            if vectors is not None and images is not None:
                products = vectors * queries[query]
                parts = [products[:, images].sum(axis=1), products[:, ~images].sum(axis=1)]
            reach = Reach(self.catalog, rows[query], similarities[query], np.maximum(similarities[query], 1e-6), None)
            answers.append(
                self._attribution(text, rows[query], similarities[query], seconds, parts=parts, reach=reach, warnings=[])
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

    def _parts(self, features: np.ndarray, rows: np.ndarray, similarities: np.ndarray) -> list[np.ndarray] | None:
        """(Q, k) what the image and (Q, k) what the prompt contributes to the similarities: Shapley values of two players.

        With v(S) the similarity when all but S is replaced by the corpus' mean, and v of nothing 0, the image's is
        (v(image) + v(both) - v(text)) / 2; what remains without either is halved between them.
        """
        images = self._columns_of({"image", "text"})
        if self._calibration is None or images is None:
            return None
        alone = []
        for kept in (images, ~images):
            replaced = np.where(kept, features, self._calibration.feature_mean)
            alone.append(embed(self._student, replaced, query=True))
        if images.all() or not images.any():
            nothing = np.zeros_like(similarities)
            return [similarities, nothing] if images.all() else [nothing, similarities]
        parts = np.empty((2, *similarities.shape))
        for query, own in enumerate(rows):
            vectors = stored_vectors(self._index, own)
            if vectors is None:
                return None
            of_image, of_text = (vectors @ embedded[query] for embedded in alone)
            parts[:, query] = (of_image - of_text) / 2, (of_text - of_image) / 2
        return list(parts + similarities / 2)

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
        rows: np.ndarray,
        similarities: np.ndarray,
        seconds: dict[str, float],
        *,
        parts: Sequence[np.ndarray] | None,
        reach: Reach,
        warnings: list[str],
    ) -> Attribution:
        records = self.catalog.take(pa.array(rows)).to_pylist()
        text_columns = ("image_id", "caption", "creator", "license", "source", "url")
        percentiles = reach.calibration.percentile_of(similarities).tolist() if reach.calibration else [None] * len(rows)
        image_parts, text_parts = [part.tolist() for part in parts] if parts else [[None] * len(rows)] * 2
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
            "index_sha256": _index_sha256(self.config),
        }
        thumbnails = {record["image_id"]: record["thumbnail"] for record in records if "thumbnail" in record}
        return Attribution(results, prompt, dict(seconds), model, warnings, reach, thumbnails)

    def info(self) -> dict[str, Any]:
        """What this attributor is: size, creators, licences, versions and metrics."""
        return _describe(self.name, self.config, self.catalog, self.metrics)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the attributor to a folder that `from_pretrained` loads; an earlier one there is replaced."""
        target = Path(folder)
        if target.resolve() == self._folder.resolve():
            return
        self._require_whole()
        with atomic_path(target) as temporary:
            temporary.mkdir(parents=True)
            for file in ["config.json", *self.config["sha256"]]:
                (temporary / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._folder / file, temporary / file)

    def _require_whole(self) -> None:
        """Raise MissingFileError if it was loaded without some of its files."""
        absent = [file for file in self.config["sha256"] if not (self._folder / file).exists()]
        if absent:
            raise MissingFileError(
                f"{self.name} was loaded without {', '.join(absent)}; load it whole (thumbnails, all shards) to pass it on."
            )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        tag: str | None = None,
        generator: str | None = None,
        scores: str | None = None,
    ) -> str:
        """Push the attributor with a card made from its metrics to a model repository, which is created if need be.

        Args:
            repo_id: 'org/name'.
            private: of a repository that is created; None leaves it to the account.
            token: Hub access token; None takes the stored one.
            revision: branch, created if need be; None is 'main'.
            create_pr: open a pull request instead of committing.
            commit_message: None says what is pushed.
            tag: name for the commit.
            generator: Hub id of the generator that it belongs to, for the card.
            scores: Hub id of the score table that it was distilled from, for the card.

        Returns:
            URL of the commit (or pull request); of the commit that is there, if nothing has changed.

        Raises:
            HubError: the Hub refuses, or can't be reached.
            InputError: `repo_id` is none, or the tag names other contents.
            MissingFileError: the attributor was loaded in part only.
        """
        from fastattr.publish import push_attributor

        self._require_whole()
        return push_attributor(
            self._folder,
            repo_id,
            generator=generator,
            scores=scores,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            message=commit_message,
            tag=tag,
        ).url


def read_info(name_or_path: str | Path) -> dict[str, Any]:
    """What `FastAttributor.from_pretrained(name_or_path).info()` says, without loading encoders, network and index.

    Raises:
        As `FastAttributor.from_pretrained`.
    """
    folder, config = _open_folder(name_or_path, lambda _: ["catalog.parquet", "metrics.json"])
    return _describe(str(name_or_path), config, pq.read_table(folder / "catalog.parquet"), read_json(folder / "metrics.json"))


def _open_folder(
    name_or_path: str | Path, files: Callable[[dict[str, Any]], list[str]], *, revision: str | None = None, **where: Any
) -> tuple[Path, dict[str, Any]]:
    """An attributor's folder and its config.json, once the checksums of the files that are asked for have been compared."""
    name, revision = split_revision(name_or_path, revision)
    folder = locate(name, "attributor", files=["config.json"], revision=revision, **where)
    config = _read_config(folder)
    wanted = files(config)
    # The rest comes from the commit that config.json came from, even if another has been pushed since.
    folder = locate(name, "attributor", files=wanted, revision=commit_of(folder) or revision, **where)
    for file in wanted:
        if not (folder / file).exists():
            raise MissingFileError(f"{folder} has no {file}, which its config.json names; fetch or build the attributor again.")
        if file.endswith(".faiss"):
            continue  # `load_index` does it, right before FAISS reads it
        if sha256_file(folder / file) != config["sha256"].get(file):
            raise ArtifactDamagedError(
                f"{folder / file} is not the file of config.json (SHA-256 differs); fetch it again with force_download=True."
            )
    return folder, config


def _read_config(folder: Path) -> dict[str, Any]:
    """An attributor's config.json, checked as far as everything else relies on it."""
    if not (folder / "config.json").exists():
        raise MissingFileError(f"{folder} has no config.json; it is no attributor, or an incomplete one.")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("format_version"), int):
        raise ArtifactDamagedError(f"{folder / 'config.json'} is not an attributor's; fetch the attributor again.")
    if config["format_version"] > FORMAT_VERSION:
        raise FormatVersionError(
            f"{folder} has format version {config['format_version']}, this fastattr reads up to {FORMAT_VERSION}; "
            "upgrade fastattr (`pip install -U fastattr`), or take an earlier revision of the attributor."
        )
    for file in config.get("sha256", {}):
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise ArtifactDamagedError(f"{folder / 'config.json'} names {file!r}, outside its folder; do not use it.")
    return config


def _shards(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The files of the index with their first rows."""
    shards: list[dict[str, Any]] = config.get("index_shards", [{"file": "index.faiss", "first_row": 0}])
    return shards


def _files(config: dict[str, Any], *, thumbnails: bool, shards: Sequence[int] | None) -> list[str]:
    """The files of an attributor that `from_pretrained` needs."""
    index = [shard["file"] for shard in _shards(config)]
    unknown = [number for number in shards or [] if not 0 <= number < len(index)]
    if unknown or (shards is not None and not shards):
        raise InputError(f"the index has the shards 0 to {len(index) - 1}, got {list(shards or [])}.")
    left_out = {file for number, file in enumerate(index) if shards is not None and number not in shards}
    if not thumbnails:
        left_out.add("thumbnails.parquet")
    if shards is not None:
        left_out.add(PLAIN)
    return [file for file in config["sha256"] if file not in left_out]


def _load_shards(folder: Path, config: dict[str, Any], numbers: Sequence[int] | None) -> Searchable:
    """The index, or the shards of it that are asked for."""
    shards = _shards(config)
    chosen = [shards[number] for number in (range(len(shards)) if numbers is None else sorted(set(numbers)))]
    loaded = [
        (load_index(folder / shard["file"], sha256=config["sha256"][shard["file"]]), int(shard["first_row"]))
        for shard in chosen
    ]
    whole: Searchable = loaded[0][0] if len(shards) == 1 else Shards(loaded)
    return whole


def _with_thumbnails(catalog: pa.Table, thumbnails: pa.Table) -> pa.Table:
    """The catalogue with its images' thumbnails, matched by image id."""
    if thumbnails["image_id"] != catalog["image_id"]:
        raise ArtifactDamagedError("catalog.parquet and thumbnails.parquet list other images; fetch the attributor again.")
    return catalog.append_column("thumbnail", thumbnails["thumbnail"])


def _index_sha256(config: dict[str, Any]) -> str:
    """Identifies the index: the checksum of its file, or of its shards' checksums."""
    checksums = [config["sha256"][shard["file"]] for shard in _shards(config)]
    return str(checksums[0]) if len(checksums) == 1 else fingerprint(checksums)


def _describe(name: str, config: dict[str, Any], catalog: pa.Table, metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "images": len(catalog),
        "creators": len(catalog["creator"].unique()),
        "licences": sorted(set(catalog["license"].to_pylist())),
        "sources": sorted(set(catalog["source"].to_pylist())),
        "encoders": config["encoders"],
        "embed_dim": config["student"]["embed_dim"],
        "index": config["index"],
        "versions": {
            "fastattr": config["fastattr_version"],
            "format": str(config["format_version"]),
            "corpus": config["corpus_fingerprint"],
            "generator": config["generator_fingerprint"],
        },
        "metrics": metrics,
    }


def open_image(image: ImageLike | Any) -> Image.Image:
    """An RGB image from a Pillow image, an (H, W, 3) uint8 array or a file.

    Raises:
        InputError: it is none of these, or can't be read.
    """
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InputError(f"an image array must be (H, W, 3) uint8, got {image.shape} {image.dtype}.")
        return Image.fromarray(image)
    path = Path(image)
    if not path.is_file():
        raise InputError(f"there is no image file {str(path)!r}.")
    try:
        return load_rgb(path)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{str(path)!r} can't be read as an image ({type(error).__name__}); give a PNG, JPEG or WebP file."
        ) from error


def thumbnail_bytes(image: Image.Image, *, quality: int) -> bytes:
    """A WebP of at most THUMBNAIL_SIDE pixels a side."""
    small = image.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=quality, method=6)
    return buffer.getvalue()


def build_attributor(
    config: IndexConfig, run_dir: Path, folder: Path, *, encoders: Sequence[str], captions: str, thumbnail_quality: int
) -> None:
    """Put a run folder's corpus, features, student and metrics together as an attributor folder.

    Args:
        config: of the index.
        run_dir: with finished corpus, features and student; evaluation/metrics.json is taken along if it is there.
        folder: where to write.
        encoders: specifications, in the order of the student's features.
        captions: 'first' or 'mean', as the features were made.
        thumbnail_quality: of the WebP thumbnails, 1 to 100.
    """
    corpus = Corpus(run_dir / "corpus")
    manifest = open_stage(run_dir / "student", "student")
    student = open_student(run_dir)
    paths = folders(run_dir, "features", encoders)
    features = read_features(paths, corpus.image_ids)
    metrics_file = run_dir / "evaluation" / "metrics.json"
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        save_student(student, temporary / "model.safetensors")
        shards = save_shards(split_index(embed(student, features), config), temporary)
        if config.plain:
            save_index(build_index(plain_vectors(features), config.plain), temporary / PLAIN)
        if (run_dir / "calibration" / CALIBRATION).exists():
            calibrated = open_stage(run_dir / "calibration", "calibration")["inputs"]["student"]
            require_same("the student of calibration/", calibrated, manifest["fingerprint"], "Run `fastattr calibrate` again.")
            shutil.copyfile(run_dir / "calibration" / CALIBRATION, temporary / CALIBRATION)
        catalog = {
            "image_id": corpus.image_ids,
            "caption": [captions[0] for captions in corpus.captions],
            **{column: corpus.column(column) for column in CATALOG_COLUMNS[2:]},
        }
        thumbnails = [thumbnail_bytes(corpus.image(row), quality=thumbnail_quality) for row in range(len(corpus))]
        for name, table in (("catalog", catalog), ("thumbnails", {"image_id": corpus.image_ids, "thumbnail": thumbnails})):
            pq.write_table(pa.table(table), temporary / f"{name}.parquet", compression="zstd", compression_level=12)
        write_json(temporary / "metrics.json", read_json(metrics_file) if metrics_file.exists() else {})
        if any(specification.endswith(":encoder") for specification in encoders):
            shutil.copytree(run_dir / "encoder", temporary / "encoder")
        own = {specification.partition(":")[2] for specification in encoders}
        for part, users in (("generator", {"generator", "gradients"}), ("gradients", {"gradients"})):
            if own & users:  # what diffusion and gradient features need at query time
                shutil.copytree(run_dir / part, temporary / part, ignore=shutil.ignore_patterns("checkpoint*"))
        opened = [open_encoder(specification, folder=temporary, captions=captions) for specification in encoders]
        write_config(
            temporary,
            encoders=list(encoders),
            encoder_fingerprints=[encoder.fingerprint for encoder in opened],
            captions=captions,
            feature_dim=manifest["feature_dim"],
            feature_blocks=[
                {"modality": modality(specification), "width": open_stage(path, "features")["width"]}
                for specification, path in zip(encoders, paths, strict=True)
            ],
            student=manifest["config"]["student"],
            index=config.factory,
            index_shards=shards,
            corpus_fingerprint=manifest["corpus_fingerprint"],
            generator_fingerprint=manifest["generator_fingerprint"],
            teacher=manifest["teacher"],
            training_queries=manifest["training_queries"],
        )


def plain_vectors(features: np.ndarray) -> np.ndarray:
    """(N, F) float32 unit vectors whose inner products are the cosines of untuned features."""
    vectors = features.astype(np.float32)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors


def save_shards(shards: Sequence[faiss.Index], folder: Path) -> list[dict[str, Any]]:
    """Write the shards of an index; returns 'file', 'first_row' and 'rows' of each, for config.json."""
    listed = []
    first_row = 0
    for number, shard in enumerate(shards):
        file = "index.faiss" if len(shards) == 1 else f"index-{number:05d}-of-{len(shards):05d}.faiss"
        save_index(shard, folder / file)
        listed.append({"file": file, "first_row": first_row, "rows": shard.ntotal})
        first_row += shard.ntotal
    return listed


def write_config(folder: Path, **settings: Any) -> None:
    """Finish an attributor folder: write config.json with these settings and the checksums of all files there."""
    from fastattr import __version__

    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    checksums = {file: sha256_file(folder / file) for file in files}
    versions = {"format_version": FORMAT_VERSION, "fastattr_version": __version__}
    write_json(folder / "config.json", {**versions, **settings, "sha256": checksums})
