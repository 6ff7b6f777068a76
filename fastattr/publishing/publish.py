"""Publish: lay out generator, attributor and Space as the Hub wants them, and push each as one commit.

What is pushed is what a run folder or an embedded model holds, plus a card (cards.py) and LICENSE.md (licences.py).
"""

from __future__ import annotations

import glob
import importlib.util
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from fastattr.attributor.bases import copy_newest
from fastattr.attributor.folder import read_config
from fastattr.attributor.version import Parts, open_version
from fastattr.core.errors import ArtifactDamagedError, ArtifactNotFoundError, HubError, MissingFileError
from fastattr.core.files import read_json, write_json
from fastattr.core.models import ASSETS, check_repo_id, embedded_models, fetch
from fastattr.publishing.cards import attributor_card, generator_card
from fastattr.publishing.licences import corpus_table, license_text, provenance
from fastattr.publishing.push import Push, send, send_with_card
from fastattr.publishing.score_tables import push_scores

KINDS = ("generator", "scores", "attributor", "space")
"""What can be pushed, in the order in which they refer to each other."""


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
    folder: Path,
    repo_id: str,
    *,
    generator: str | None = None,
    scores: str | None = None,
    message: str | None = None,
    **target: Any,
) -> Push:
    """Push an attributor folder with its card to a model repository.

    Args:
        folder: as `FastAttributor.save_pretrained` writes it.
        repo_id: 'org/name'.
        generator: Hub id of its generator, for the card.
        scores: Hub id of the score table it was distilled from, for the card.
        message: of the commit.
        target: private, token, revision, create_pr, tag, dry_run, as `push.push_folder`; the tag 'auto' names the contents.

    Raises:
        MissingFileError: the folder lacks a file that its config.json names.
        ArtifactDamagedError: a file's checksum is not that of config.json.
        As `push.push_folder`.
    """
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as name:
        staged = Path(name) / "attributor"
        copy_newest(folder, staged)
        card, licences = attributor_texts(staged, repo_id, generator=generator, scores=scores)
        replaces = [glob.escape(name) for name in _files_there(repo_id, target)]
        return send_with_card(
            staged, repo_id, card, licences, message=message or "Push attributor", replaces=replaces, **target
        )


def _files_there(repo_id: str, target: Mapping[str, Any]) -> list[str]:
    """The files of the attributor that a repository holds already, as its config.json names them; nobody else's."""
    where = {key: target[key] for key in ("token", "revision") if key in target}
    try:
        return [*read_config(fetch(repo_id, "model", ["config.json"], **where))["sha256"], "config.json.sig"]
    except (ArtifactNotFoundError, MissingFileError, ArtifactDamagedError):
        return []  # the repository or the branch is yet to be made, or its config.json is no attributor's
    except HubError:
        if target.get("dry_run"):
            return []
        raise


def attributor_texts(folder: Path, repo_id: str, *, generator: str | None = None, scores: str | None = None) -> tuple[str, str]:
    """The card (README.md) and LICENSE.md of an attributor folder; arguments as `push_attributor`."""
    config = read_config(folder)
    catalog = _catalog(folder, config)
    entries = provenance(catalog)
    card = attributor_card(
        repo_id=repo_id,
        config=config,
        metrics=read_json(folder / "metrics.json"),
        entries=entries,
        example=catalog["caption"][0].as_py() if len(catalog) else "",
        generator=generator,
        scores=scores,
    )
    return card, license_text(entries, config.get("source", {}).get("license"))


def push_generator(
    folder: Path, repo_id: str, *, images: pa.Table | None = None, message: str | None = None, **target: Any
) -> Push:
    """Push a diffusers pipeline with its card to a model repository.

    Args and errors beside those of `push_attributor`:
        folder: as `StableDiffusionPipeline.save_pretrained` writes it; the checkpoints of a training are left out.
        images: its training images, with the columns caption, source, license and creator, for the card.
        ArtifactNotFoundError: the folder holds no pipeline.
    """
    check_repo_id(repo_id)
    if not (folder / "model_index.json").exists():
        raise ArtifactNotFoundError(f"{folder} is no diffusers pipeline: it has no model_index.json.")
    entries = provenance(images) if images is not None else []
    example = images["caption"][0].as_py() if images is not None and len(images) else "a picture"
    manifest = read_json(folder / "manifest.json") if (folder / "manifest.json").exists() else {}
    card = generator_card(repo_id=repo_id, manifest=manifest, entries=entries, example=example)
    with tempfile.TemporaryDirectory() as name:
        staged = Path(name) / "generator"
        shutil.copytree(folder, staged, ignore=shutil.ignore_patterns("checkpoint*", "*.bin", "*.ckpt", "*.pt", "*.pth"))
        if manifest:
            _load_in_full_precision(staged)
        parts = [path.parent.name for path in staged.glob("*/*.safetensors")]
        replaces = [f"{part}/{name}*.safetensors" for part in parts for name in ("diffusion_pytorch_model", "model")]
        licences = license_text(entries)
        return send_with_card(staged, repo_id, card, licences, message=message or "Push generator", replaces=replaces, **target)


def push_space(
    repo_id: str, *, generator: str, attributor: str, scores: str | None = None, message: str | None = None, **target: Any
) -> Push:
    """Push the page as a Space that shows a generator and an attributor.

    Args and errors beside those of `push_attributor`:
        generator: its Hub id; may end in '@revision', to show that one for good.
        attributor: the same.
    """
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
        return send(
            staged,
            repo_id,
            message=message or "Push Space",
            repo_type="space",
            variables={"FASTATTR_GENERATOR": generator, "FASTATTR_ATTRIBUTOR": attributor},
            **target,
        )


def push_all(source: str | Path, name: str, namespace: str, kinds: Sequence[str] = KINDS, **target: Any) -> list[Push]:
    """Push what a run folder or an embedded model holds, to NAMESPACE/NAME-generator, -scores, -attributor and -space.

    Args:
        source: run folder, or an embedded model's name, which has no score table.
        name: first part of the repositories' names.
        namespace: user or organisation.
        kinds: some of `KINDS`, pushed in its order.
        target: see `push_attributor`, also for errors.

    Raises:
        ArtifactNotFoundError: the source lacks one of them.
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
        return (
            push_scores(folder, ids[kind], **target)
            if kind == "scores"
            else push_attributor(folder, ids[kind], **refers, **target)
        )

    return [push(kind) for kind in KINDS if kind in kinds]


def part_of(source: str | Path, part: str) -> Path:
    """The folder of an embedded model's or run folder's generator, attributor or scores; or `source` itself, if it is one.

    Raises:
        ArtifactNotFoundError: there is no such folder.
    """
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
        return corpus_table(folder)
    attributor = folder / "attributor"
    return _catalog(attributor, read_config(attributor)) if (attributor / "config.json").exists() else None


def _catalog(folder: Path, config: dict[str, Any]) -> pa.Table:
    """Caption, source, licence and creator of the images that an attributor names."""
    table = open_version(folder, config, Parts(thumbnails=False), stamp=()).catalogue.table
    return table.select(["caption", "source", "license", "creator"])


def _load_in_full_precision(pipeline: Path) -> None:
    """Make a plain `DiffusionPipeline.from_pretrained` give parts of one precision.

    fastattr keeps weights in half precision, to be small. Of those, diffusers loads its own parts in float32, transformers
    its parts as their config.json says: it must say the same.
    """
    for path in pipeline.glob("*/config.json"):
        config = read_json(path)
        if config.get("dtype") == "float16":
            write_json(path, {**config, "dtype": "float32"})
