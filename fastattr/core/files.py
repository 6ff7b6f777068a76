"""Files: written whole or not at all, JSON, checksums, scratch folders."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastattr.core.errors import ArtifactDamagedError, ArtifactNotFoundError


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success fsync it and rename it to `path`, on error remove it. It has the suffix
    of `path`, at which some writers look. A folder written there replaces an earlier one.
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
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=plain) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """A JSON file's value; raises ArtifactNotFoundError if there is no such file, ArtifactDamagedError if it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactNotFoundError(f"{path} does not exist; the folder is incomplete or the path is wrong.") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactDamagedError(f"{path} is not valid JSON ({error}); fetch or build the folder again.") from error


def plain(value: Any) -> Any:
    """A JSON value for a dataclass, path, or NumPy scalar: the `default` of `json.dumps` for configs."""
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


@contextlib.contextmanager
def temporary_folder(beside: Path) -> Iterator[Path]:
    """A scratch folder on the same disk as `beside`, removed at the end."""
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".scratch-") as name:
        yield Path(name)
