"""Files that stages meet on: atomic writes, checksums, fingerprints and the manifest of a stage folder.

Every stage writes one folder with its data and a `manifest.json`. The manifest is written last, so a folder
with a manifest is complete; it holds the stage's config and the fingerprints of what it was made from, and
`open_stage` refuses to join folders that do not belong together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastattr.core.errors import ArtifactDamagedError, ArtifactMismatchError, ArtifactNotFoundError

MANIFEST = "manifest.json"


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success fsync it and rename it to `path`, on error remove it.

    A file gets the same suffix as `path` (some writers look at it). A folder written there replaces an
    earlier folder of that name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    remove(temporary)
    try:
        yield temporary
        if temporary.is_file():
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        elif temporary.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Remove a file or a folder; a missing one is fine."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactNotFoundError: there is no such file.
        ArtifactDamagedError: it is not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactNotFoundError(f"{path} does not exist; the folder is incomplete or the path is wrong.") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactDamagedError(f"{path} is not valid JSON ({error}); fetch or build the folder again.") from error


def _plain(value: Any) -> Any:
    """JSON for the few non-JSON types that configs hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """16 hex digits that identify a JSON-able value (a config, a list of ids with their hashes)."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_plain)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def write_manifest(folder: Path, *, stage: str, config: Any, inputs: Mapping[str, str], **facts: Any) -> dict[str, Any]:
    """Finish a stage folder: record what made it.

    Args:
        folder: the stage's folder; everything else in it is already written.
        stage: the stage's name, e.g. 'candidates'.
        config: the stage's config dataclass.
        inputs: fingerprints of the folders it was made from, by stage name.
        facts: counts, timings and the like; kept, not compared.

    Returns:
        The manifest; its 'fingerprint' is what later stages name as their input.
    """
    from fastattr.core.version import __version__

    config = json.loads(json.dumps(config, default=_plain))
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


def finished(folder: Path, *, stage: str, config: Any, inputs: Mapping[str, str]) -> bool:
    """Whether `folder` already holds this stage's complete result for this config and these inputs.

    A setting that came after the folder was made, and has its default value now, is no difference.

    Raises:
        ArtifactMismatchError: it holds a complete result of something else, which must not be overwritten.
    """
    if not (folder / MANIFEST).exists():
        return False
    manifest = _read_manifest(folder)
    wanted = json.loads(json.dumps(config, default=_plain))
    if isinstance(manifest.get("config"), dict):
        wanted = _without_newer_defaults(wanted, config, manifest["config"])
    if manifest.get("fingerprint") == fingerprint({"stage": stage, "config": wanted, "inputs": dict(inputs)}):
        return True
    changed = _differences(manifest, config=config, inputs=inputs)
    raise ArtifactMismatchError(
        f"{folder} holds a finished '{manifest.get('stage')}' made with other settings ({changed}). "
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
    return kept


def _differences(manifest: Mapping[str, Any], *, config: Any, inputs: Mapping[str, str]) -> str:
    """The settings and inputs by which a manifest differs from what is wanted now, as one line."""
    lines = []
    for name, wanted in (("config", json.loads(json.dumps(config, default=_plain))), ("inputs", dict(inputs))):
        found = manifest.get(name, {})
        for key in sorted(set(found) | set(wanted)):
            if found.get(key) != wanted.get(key):
                lines.append(f"{key}: found {found.get(key)!r}, wanted {wanted.get(key)!r}")
    return "; ".join(lines) or "other stage"


def open_stage(folder: Path, stage: str) -> dict[str, Any]:
    """The manifest of a finished stage folder.

    Raises:
        ArtifactNotFoundError: the folder or its manifest is missing (the stage has not finished).
        ArtifactMismatchError: the folder belongs to another stage.
    """
    if not (folder / MANIFEST).exists():
        raise ArtifactNotFoundError(f"{folder} holds no finished '{stage}'. Run that stage first: it resumes where it stands.")
    manifest = _read_manifest(folder)
    if manifest.get("stage") != stage:
        raise ArtifactMismatchError(
            f"{folder} holds '{manifest.get('stage')}', expected '{stage}'. Point at the matching folder."
        )
    return manifest


def require_same(what: str, found: str, expected: str, fix: str) -> None:
    """Raise ArtifactMismatchError unless the two fingerprints are equal; `fix` says what to do."""
    if found != expected:
        raise ArtifactMismatchError(f"{what} is {found!r}, expected {expected!r}. {fix}")


@contextlib.contextmanager
def temporary_folder(beside: Path) -> Iterator[Path]:
    """A scratch folder on the same disk as `beside`, removed at the end."""
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".scratch-") as name:
        yield Path(name)
