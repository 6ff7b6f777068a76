"""Publish: lay out generator, score tables, attributor and Space as the Hub wants them, and push each as one commit.

What is pushed is what a run folder or an embedded model holds, plus README.md and LICENSE.md (cards.py). A score table is one
configuration of a dataset, CONFIG/SPLIT-*.parquet with the query images, beside CONFIG/manifest.json; the card of all
configurations is written anew from the manifests at each push.
"""

from __future__ import annotations

import glob
import importlib.util
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from fastattr.attributor.bases import copy_newest
from fastattr.attributor.folder import read_config
from fastattr.attributor.version import Parts, open_version
from fastattr.core.errors import ArtifactDamagedError, ArtifactNotFoundError, InputError, MissingFileError
from fastattr.core.files import read_json, write_json
from fastattr.core.models import ASSETS, check_repo_id, embedded_models
from fastattr.core.stages import open_stage
from fastattr.generators.queries import SPLITS, Queries, query_schema
from fastattr.publishing import cards
from fastattr.publishing.push import Push, already_there, push_folder, send_with_card
from fastattr.teachers.scores import SCHEMA

KINDS = ("generator", "scores", "attributor", "space")
"""What can be pushed, in the order in which they refer to each other."""
SHARD_BYTES = 500_000_000
"""About how large a parquet file of a score table may become."""
ROW_GROUP = 100
"""Rows a reader that streams a score table holds at once."""


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Where a build pushes what it made."""

    namespace: str = ""
    """User or organisation on the Hub; '' pushes nothing."""
    kinds: tuple[Literal["generator", "scores", "attributor", "space"], ...] = ("scores", "attributor")
    """A pretrained generator is not ours to push."""
    private: bool = True
    """Of repositories that are made."""


def push_attributor(
    folder: Path, repo_id: str, *, generator: str | None = None, scores: str | None = None, **target: Any
) -> Push:
    """Push an attributor folder with its card to a model repository.

    Args:
        folder: as `FastAttributor.save_pretrained` writes it.
        repo_id: 'org/name'.
        generator, scores: Hub ids of its generator and of the score table it was distilled from, for the card.
        target: message, private, token, revision, create_pr, tag, dry_run, as `push.push_folder`; errors likewise.

    Raises:
        MissingFileError: the folder lacks a file that its config.json names.
        ArtifactDamagedError: a file's checksum is not that of config.json.
    """
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as name:
        staged = Path(name) / "attributor"
        copy_newest(folder, staged)
        card, licences = attributor_texts(staged, repo_id, generator=generator, scores=scores)
        replaces = [glob.escape(name) for name in _files_there(repo_id, target)]
        return send_with_card(staged, repo_id, card, licences, what="attributor", replaces=replaces, **target)


def _files_there(repo_id: str, target: Mapping[str, Any]) -> list[str]:
    """The files of the attributor that a repository holds already, as its config.json names them; nobody else's."""
    try:
        folder = already_there(repo_id, "model", ["config.json"], target)
        return [*read_config(folder)["sha256"], "config.json.sig"] if folder else []
    except (MissingFileError, ArtifactDamagedError):
        return []  # its config.json is no attributor's


def attributor_texts(folder: Path, repo_id: str, *, generator: str | None = None, scores: str | None = None) -> tuple[str, str]:
    """The card (README.md) and LICENSE.md of an attributor folder; arguments as `push_attributor`."""
    config, catalog = read_config(folder), _catalog(folder)
    entries = cards.provenance(catalog)
    card = cards.attributor_card(
        repo_id=repo_id,
        config=config,
        metrics=read_json(folder / "metrics.json"),
        entries=entries,
        example=catalog["caption"][0].as_py() if len(catalog) else "",
        generator=generator,
        scores=scores,
    )
    return card, cards.license_text(entries, config.get("source", {}).get("license"))


def push_generator(folder: Path, repo_id: str, *, images: pa.Table | None = None, **target: Any) -> Push:
    """Push a diffusers pipeline with its card to a model repository.

    Checkpoints of a training are left out. `images` are its training images, with the columns caption, source, license and
    creator, for the card; the rest as `push_attributor`. ArtifactNotFoundError if the folder holds no pipeline.
    """
    check_repo_id(repo_id)
    if not (folder / "model_index.json").exists():
        raise ArtifactNotFoundError(f"{folder} is no diffusers pipeline: it has no model_index.json.")
    entries = [] if images is None else cards.provenance(images)
    example = images["caption"][0].as_py() if images is not None and entries else "a picture"
    manifest = read_json(folder / "manifest.json") if (folder / "manifest.json").exists() else {}
    card = cards.generator_card(repo_id=repo_id, manifest=manifest, entries=entries, example=example)
    with tempfile.TemporaryDirectory() as name:
        staged = Path(name) / "generator"
        shutil.copytree(folder, staged, ignore=shutil.ignore_patterns("checkpoint*", "*.bin", "*.ckpt", "*.pt", "*.pth"))
        if manifest:
            from fastattr.generators.scratch.stage import tidy_configs  # slow to import

            tidy_configs(staged)
        parts = [path.parent.name for path in staged.glob("*/*.safetensors")]
        replaces = [f"{part}/{name}*.safetensors" for part in parts for name in ("diffusion_pytorch_model", "model")]
        return send_with_card(staged, repo_id, card, cards.license_text(entries), what="generator", replaces=replaces, **target)


def push_scores(folder: Path, repo_id: str, *, config_name: str | None = None, **target: Any) -> Push:
    """Push a score table as one configuration of a dataset repository; its other configurations are kept.

    corpus/ and queries/ beside the table's folder, where they are, add licences and query images. The `config_name` None names
    teacher and generator; the rest as `push_attributor`. ArtifactNotFoundError if there is no finished table.
    """
    check_repo_id(repo_id)
    scores, beside = open_stage(folder, "scores"), folder.parent
    queries = Queries(beside / "queries") if (beside / "queries").is_dir() else None
    named = "-".join(filter(None, (scores["teacher"], scores["generator_fingerprint"][:8])))
    config_name = config_name or re.sub(r"[^\w.-]+", "_", named)
    with tempfile.TemporaryDirectory() as name:
        staged = Path(name) / "dataset"
        counts, candidates = _write_splits(folder, queries, staged / config_name)
        entries = cards.provenance(cards.corpus_table(beside)) if (beside / "corpus").is_dir() else []
        manifest = {**scores, "queries": counts, "candidates": candidates, "provenance": entries}
        write_json(staged / config_name / "manifest.json", manifest)
        manifests = {config_name: manifest, **_other_manifests(repo_id, config_name, target)}
        card = cards.scores_card(repo_id=repo_id, manifests={key: manifests[key] for key in sorted(manifests)})
        return send_with_card(
            staged,
            repo_id,
            card,
            cards.license_text(cards.merged(each["provenance"] for each in manifests.values()), scores.get("license")),
            what=f"score table {config_name}",
            repo_type="dataset",
            replaces=[f"{glob.escape(config_name)}/{split}-*-of-*.parquet" for split in SPLITS],
            **target,
        )


def _write_splits(folder: Path, queries: Queries | None, target: Path) -> tuple[dict[str, int], int]:
    """Write a score table with its query images as parquet shards; (queries by split, largest number of candidates)."""
    from datasets import Features

    row_of = {query_id: row for row, query_id in enumerate(queries.query_ids)} if queries else {}
    drawn = Features.from_arrow_schema(query_schema()) if queries else {}
    first = {name: drawn[name] for name in ("query_id", "image") if name in drawn}  # what a viewer shows first
    schema: pa.Schema = Features({**first, **Features.from_arrow_schema(SCHEMA), **drawn}).arrow_schema
    counts: dict[str, int] = {}
    most = 0
    for split in SPLITS:
        files = sorted(folder.glob(f"{split}-*.parquet"))
        rows = sum(pq.ParquetFile(path).metadata.num_rows for path in files)
        if not rows:
            continue
        counts[split], written = rows, 0
        target.mkdir(parents=True, exist_ok=True)
        shards = max(1, math.ceil(sum(path.stat().st_size for path in files) / SHARD_BYTES))
        rest = _batches(files)
        for number in range(shards):
            enough, path = rows * (number + 1) // shards, target / f"{split}-{number:05d}-of-{shards:05d}.parquet"
            with pq.ParquetWriter(path, schema, use_content_defined_chunking=True) as writer:
                while written < enough and (batch := next(rest, None)) is not None:
                    most = max(most, max(len(ids) for ids in batch["image_ids"].to_pylist()))
                    own = queries.table.take([row_of[each] for each in batch["query_id"].to_pylist()]) if queries else batch
                    columns = {each: batch[each] if each in SCHEMA.names else own[each] for each in schema.names}
                    writer.write_table(pa.table(columns).cast(schema), row_group_size=ROW_GROUP)
                    written += len(batch)
    return counts, most


def _batches(files: Sequence[Path]) -> Iterator[pa.Table]:
    for path in files:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=ROW_GROUP):
            yield pa.Table.from_batches([batch])


def _other_manifests(repo_id: str, config_name: str, target: Mapping[str, Any]) -> dict[str, Any]:
    """The manifests of the configurations that a dataset repository has already."""
    folder = already_there(repo_id, "dataset", ["*/manifest.json"], target)
    found = {path.parent.name: read_json(path) for path in folder.glob("*/manifest.json")} if folder else {}
    if any(not {"teacher", "queries", "provenance"} <= set(manifest) for manifest in found.values()):
        raise InputError(f"{repo_id} holds configurations that fastattr did not write; push to another repository.")
    return {name: manifest for name, manifest in found.items() if name != config_name}


def push_space(repo_id: str, *, generator: str, attributor: str, scores: str | None = None, **target: Any) -> Push:
    """Push the page as a Space that shows a generator and an attributor; their Hub ids may end in '@revision'."""
    from huggingface_hub import SpaceCard, constants

    spec = importlib.util.find_spec("fastattr.space")
    if spec is None or not spec.submodule_search_locations:
        raise ArtifactNotFoundError("the page's files are not installed; reinstall fastattr.")
    source = Path(spec.submodule_search_locations[0])
    with tempfile.TemporaryDirectory() as name:
        staged = Path(name)
        for path in [*source.glob("*.py"), *(source / name for name in ("page.css", "requirements.txt", "thumbnail.png"))]:
            if path.name != "__init__.py":  # on a Space the files lie side by side and are no package
                shutil.copyfile(path, staged / path.name)
        card = SpaceCard((source / "README.md").read_text(encoding="utf-8"))
        card.data["thumbnail"] = f"{constants.ENDPOINT}/spaces/{repo_id}/resolve/main/thumbnail.png"
        card.data["models"] = [each.partition("@")[0] for each in (generator, attributor)]
        if scores:
            card.data["datasets"] = [scores]
        (staged / "README.md").write_text(str(card), encoding="utf-8")
        variables = {"FASTATTR_GENERATOR": generator, "FASTATTR_ATTRIBUTOR": attributor}
        return push_folder(staged, repo_id, what="Space", repo_type="space", variables=variables, **target)


def push_all(source: str | Path, name: str, namespace: str, kinds: Sequence[str] = KINDS, **target: Any) -> list[Push]:
    """Push what a run folder or an embedded model holds, to NAMESPACE/NAME-generator, -scores, -attributor and -space.

    `source` is a run folder, or an embedded model's name, which has no score table; `kinds` are some of `KINDS`, pushed in its
    order; for `target` and errors see `push_attributor`. ArtifactNotFoundError if the source lacks one of them.
    """
    ids = {kind: f"{namespace}/{name}-{kind}" for kind in KINDS}
    scores = ids["scores"] if str(source) not in embedded_models() else None
    refers: dict[str, Any] = {"generator": ids["generator"], "scores": scores}

    def push(kind: str) -> Push:
        if kind == "space":
            return push_space(ids[kind], attributor=ids["attributor"], **refers, **target)
        folder = part_of(source, kind)
        if kind == "generator":
            return push_generator(folder, ids[kind], images=training_images(source), **target)
        if kind == "scores":
            return push_scores(folder, ids[kind], **target)
        return push_attributor(folder, ids[kind], **refers, **target)

    return [push(kind) for kind in KINDS if kind in kinds]


def part_of(source: str | Path, part: str) -> Path:
    """A generator, attributor or scores folder of `source`, or itself; ArtifactNotFoundError if there is none."""
    embedded = str(source) in embedded_models()
    folder = ASSETS / str(source) if embedded else Path(source)
    if (folder / part).is_dir():
        return folder / part
    file = {"generator": "model_index.json", "attributor": "config.json", "scores": "manifest.json"}[part]
    if embedded or not (folder / file).exists():
        raise ArtifactNotFoundError(f"{source} holds no {part}; give a run folder or an embedded model that has one.")
    return folder


def training_images(source: str | Path) -> pa.Table | None:
    """Caption, source, licence and creator of a model's training images, as far as they are recorded beside it."""
    folder = ASSETS / str(source) if str(source) in embedded_models() else Path(source)
    if (folder / "corpus").is_dir():
        return cards.corpus_table(folder)
    return _catalog(folder / "attributor") if (folder / "attributor" / "config.json").exists() else None


def _catalog(folder: Path) -> pa.Table:
    """Caption, source, licence and creator of the images that an attributor names."""
    table = open_version(folder, read_config(folder), Parts(thumbnails=False), stamp=()).catalogue.table
    return table.select(["caption", "source", "license", "creator"])
