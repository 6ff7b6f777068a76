"""Stages: each writes one folder with its data, and last a `manifest.json`, so a folder that has one is complete.

It holds the stage's config and the fingerprints of the folders that the stage read: `make` refuses to overwrite a folder that
was made with other settings, `open_stage` and `require_same` to join folders that do not belong together.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattr.core.errors import ArtifactDamagedError, ArtifactMismatchError, ArtifactNotFoundError
from fastattr.core.files import plain, read_json, remove, write_json
from fastattr.core.version import __version__

if TYPE_CHECKING:
    from accelerate import Accelerator

MANIFEST = "manifest.json"


def fingerprint(value: Any) -> str:
    """16 hex digits that identify a JSON-able value (a config, a list of ids with their hashes)."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=plain)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def write_manifest(folder: Path, *, stage: str, config: Any, inputs: Mapping[str, str], **facts: Any) -> dict[str, Any]:
    """Finish a stage folder in which everything else is written; arguments as of `make`. Returns the manifest; its
    'fingerprint' is what later stages name as their input. `facts` are kept, not compared.
    """
    config = json.loads(json.dumps(config, default=plain))
    identity = {"stage": stage, "config": config, "inputs": dict(inputs)}
    manifest = {**identity, "fingerprint": fingerprint(identity), "fastattr_version": __version__, **facts}
    write_json(folder / MANIFEST, manifest)
    return manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in `folder`; ArtifactDamagedError if it is not a JSON object."""
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict):
        raise ArtifactDamagedError(f"{folder / MANIFEST} is not a JSON object; fetch or build the folder again.")
    return manifest


def make(
    folder: Path,
    work: Callable[[], Mapping[str, Any]],
    *,
    stage: str,
    config: Any,
    inputs: Mapping[str, str],
    accelerator: Accelerator | None = None,
    temporary: Sequence[Path] = (),
) -> dict[str, Any]:
    """Run a stage unless its folder is finished; returns the manifest. A stage's `run` opens its inputs, then ends with this.

    Args:
        folder: the stage's folder; `work` creates it, so that a refused input leaves none.
        work: writes the data files and returns counts, timings and the like, which the manifest keeps but nothing compares.
            Every process calls it; what only one may write stands under `if accelerator.is_main_process` inside it.
        stage: the stage's name, e.g. 'candidates'; `config` is its config dataclass.
        inputs: fingerprints of the folders that the stage reads, by stage name.
        accelerator: the processes that call `make` together; None is this process alone.
        temporary: files and folders that a killed run resumes from (checkpoints, shards); removed once the manifest is there.

    Raises ArtifactMismatchError if `folder` holds a finished stage of other settings or inputs.
    """
    wait = accelerator.wait_for_everyone if accelerator else lambda: None
    if not finished(folder, stage=stage, config=config, inputs=inputs):
        wait()  # every process must find the folder unfinished before one can finish it
        facts = work()
        wait()
        if accelerator is None or accelerator.is_main_process:
            write_manifest(folder, stage=stage, config=config, inputs=inputs, **facts)
            for path in temporary:
                remove(path)
        wait()
    return _read_manifest(folder)


def finished(folder: Path, *, stage: str, config: Any, inputs: Mapping[str, str]) -> bool:
    """Whether `folder` already holds this stage's complete result for this config and these inputs.

    A setting that came after the folder was made, and has its default value now, is no difference; nor is one that has gone
    since, and had the value that remains (`RETIRED` of the config's class: name -> value). Raises ArtifactMismatchError if the
    folder holds a complete result of something else, which must not be overwritten.
    """
    if not (folder / MANIFEST).exists():
        return False
    manifest = _read_manifest(folder)
    wanted = json.loads(json.dumps(config, default=plain))
    if isinstance(manifest.get("config"), dict):
        wanted = _without_newer_defaults(wanted, config, manifest["config"])
    if manifest.get("fingerprint") == fingerprint({"stage": stage, "config": wanted, "inputs": dict(inputs)}):
        return True
    lines = []
    for name, now in (("config", json.loads(json.dumps(config, default=plain))), ("inputs", dict(inputs))):
        found = manifest.get(name, {})
        changed = (key for key in sorted({*found, *now}) if found.get(key) != now.get(key))
        lines += [f"{key}: found {found.get(key)!r}, wanted {now.get(key)!r}" for key in changed]
    raise ArtifactMismatchError(
        f"{folder} holds a finished '{manifest.get('stage')}' made with other settings ({'; '.join(lines) or 'other stage'}). "
        "Use another run folder, or delete that folder to build it again."
    )


def _without_newer_defaults(wanted: dict[str, Any], config: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """A config as plain values, without those at their default that `found` does not name; sections alike."""
    kept = dict(wanted)
    for item in dataclasses.fields(config) if dataclasses.is_dataclass(config) else ():
        value = getattr(config, item.name)
        if item.name not in found:
            default = item.default_factory() if callable(item.default_factory) else item.default
            if value == default:
                kept.pop(item.name, None)
        elif dataclasses.is_dataclass(value) and isinstance(found[item.name], dict):
            kept[item.name] = _without_newer_defaults(wanted[item.name], value, found[item.name])
    for name, remains in getattr(config, "RETIRED", {}).items():
        if name in found and found[name] == remains:
            kept[name] = remains
    return kept


def open_stage(folder: Path, stage: str) -> dict[str, Any]:
    """The manifest of a finished stage folder; raises ArtifactNotFoundError, or ArtifactMismatchError if it is another's."""
    if not (folder / MANIFEST).exists():
        raise ArtifactNotFoundError(f"{folder} holds no finished '{stage}'. Run that stage first: it resumes where it stands.")
    manifest = _read_manifest(folder)
    if manifest.get("stage") != stage:
        found = manifest.get("stage")
        raise ArtifactMismatchError(f"{folder} holds '{found}', expected '{stage}'. Point at the matching folder.")
    return manifest


def require_same(what: str, found: str, expected: str, fix: str) -> None:
    """Raise ArtifactMismatchError unless the two fingerprints are equal; `fix` says what to do."""
    if found != expected:
        raise ArtifactMismatchError(f"{what} is {found!r}, expected {expected!r}. {fix}")
