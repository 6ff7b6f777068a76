"""Folder: an attributor on disk: config.json with its seal, and the files that it names, each with its SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from fastattr.attributor.changes import FILE as CHANGES, MovedError, lost
from fastattr.core.errors import ArtifactDamagedError, FormatVersionError, InputError, MissingExtraError, MissingFileError
from fastattr.core.files import atomic_path, read_json, sha256_file, write_json
from fastattr.core.models import commit_of, locate, split_revision
from fastattr.index.files import check_file

FORMAT_VERSION = 4
"""4 keeps changes in changes.sqlite; 3 kept them in a journal; 1 and 2 had no seal on config.json. All are read."""
PARTS = {"catalog": "parquet", "thumbnails": "parquet", "plain": "faiss", "removed": "json"}
"""Parts of a base, with their files' endings; 'plain' is the index of the untuned features, 'removed' the ids that had left."""
SHARDS = [{"file": "index.faiss", "first_row": 0}]  # of an index in one file, as older formats leave it unsaid
OPTIONAL = ("thumbnails.parquet", "plain.faiss", "calibration.safetensors", "generated.parquet", "counterfactuals.parquet")
"""Files that an attributor may lack, but not hold without a checksum."""
SIGNATURE = "config.json.sig"  # raw ed25519, as `openssl pkeyutl -sign -rawin` writes it, too
ARROW_ROWS = 100_000  # from here on the catalogue is an Arrow file, larger, but mapped into memory and not read

Result = TypeVar("Result")


def seal(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with a checksum of all the rest."""
    rest = {name: value for name, value in config.items() if name != "seal"}
    canonical = json.dumps(rest, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return {**rest, "seal": hashlib.sha256(canonical.encode()).hexdigest()}


def read_config(folder: Path) -> dict[str, Any]:
    """An attributor's config.json, checked as far as everything else relies on it."""
    path = folder / "config.json"
    if not path.is_file():
        raise MissingFileError(f"{folder} has no config.json; it is no attributor, or an incomplete one.")
    config = read_json(path)
    damaged = ArtifactDamagedError(f"{path} is not an attributor's, or damaged; fetch the attributor again.")
    if not isinstance(config, dict) or not isinstance(config.get("format_version"), int):
        raise damaged
    if config["format_version"] > FORMAT_VERSION:
        found = f"{folder} has format version {config['format_version']}, this fastattr reads up to {FORMAT_VERSION}"
        raise FormatVersionError(f"{found}; upgrade fastattr (`pip install -U fastattr`), or take an earlier revision.")
    sealed = seal(config)
    if (config["format_version"] >= 3 or "seal" in config) and config != sealed:
        raise ArtifactDamagedError(f"{path} is not what was written (its seal differs); fetch the attributor again.")
    try:
        _check_names(path, sealed)
        texts = [sealed[name] for name in ("fastattr_version", "corpus_fingerprint", "generator_fingerprint")]
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise damaged from error
    if not all(isinstance(text, str) for text in texts):
        raise damaged
    return sealed


def _check_names(path: Path, config: Mapping[str, Any]) -> None:
    """Every file that a config names lies in its folder and has a checksum; a link may lead to the Hub client's cache only."""
    sha256 = config["sha256"]
    for file in [*sha256, *config.get("replaced", [])]:
        parts = file.split("/")
        if "\\" in file or "\0" in file or not all(parts) or {".", ".."} & set(parts) or Path(file).is_absolute():
            raise ArtifactDamagedError(f"{path} names {file!r}, outside its folder; do not use it.")
        if not isinstance(sha256.get(file, ""), str):
            raise ArtifactDamagedError(f"{path} has no checksum of {file!r}; fetch the attributor again.")
    named = {*index_files(config, vectors=True), *config.get("files", {}).values()}
    named |= {"model.safetensors", "metrics.json", file_of(config, "catalog")}
    own = {specification.partition(":")[2] for specification in config.get("encoders", [])} - {""}
    missing = sorted(named - sha256.keys())
    missing += sorted(part for part in own if not any(file.startswith(f"{part}/") for file in sha256))
    there = {name for name in OPTIONAL if (path.parent / name).exists()}
    there |= {file.relative_to(path.parent).as_posix() for part in own for file in (path.parent / part).rglob("*.*")}
    missing += sorted(there - sha256.keys() - set(config.get("replaced", [])))
    if missing:
        raise ArtifactDamagedError(f"{path} has no checksum of {missing[0]!r}, which is read; do not use it.")
    roots = [path.parent.resolve()]
    if commit_of(path.parent):
        roots.append(path.parents[3].resolve())
    for file in sha256:
        if not any((path.parent / file).resolve().is_relative_to(root) for root in roots):
            raise ArtifactDamagedError(f"{path.parent / file} is a link that leads out of the folder; do not use it.")


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Seal a config and put it in the place of config.json, synced."""
    write_json(folder / "config.json", seal(config))
    (folder / SIGNATURE).unlink(missing_ok=True)  # it was of the config before
    sync(folder)  # the rename itself


def sync(path: Path) -> None:
    """Have a file's bytes, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_of(config: Mapping[str, Any], part: str) -> str:
    """The file that holds one of `PARTS`."""
    return str(config.get("files", {}).get(part, f"{part}.{PARTS[part]}"))


def versions(config: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies a version of an attributor: SHA-256 of model, index and catalogue, and the catalogue's version."""
    sha256 = config["sha256"]
    journal = config.get("files", {}).get("journal")
    parts = [sha256[file_of(config, "catalog")], *([sha256[journal]] if journal else []), config.get("changes", "")]
    return {
        "model": sha256["model.safetensors"],
        "index": _together([sha256[file] for file in index_files(config)]),
        "catalog": _together([part for part in parts if part]),
        "catalog_version": int(config.get("catalog_version", 1)),
    }


def index_files(config: Mapping[str, Any], *, vectors: bool = False) -> list[str]:
    """The files of the index and its vectors' digests, in order; the vectors, too, if they are wanted."""
    stored, parts = config.get("vectors"), ("digests", "file") if vectors else ("digests",)
    files = [shard["file"] for shard in config.get("index_shards") or SHARDS]
    return files + [stored[part] for part in parts if stored]


def _together(checksums: Sequence[str]) -> str:
    return checksums[0] if len(checksums) == 1 else hashlib.sha256("".join(checksums).encode()).hexdigest()


def check_files(folder: Path, config: Mapping[str, Any], files: Iterable[str]) -> None:
    """Compare checksums of files, but for those of the index and its vectors, which are compared when they are opened."""
    later = {*index_files(config, vectors=True), config.get("files", {}).get("journal"), file_of(config, "plain")}
    for file in files:
        if not (folder / file).is_file():
            raise MissingFileError(f"{folder} has no {file}, which its config.json names; fetch or build the attributor again.")
        if file not in later:
            check_file(folder / file, config["sha256"][file])


def read_table(path: Path) -> pa.Table:
    """A table: parquet, or Arrow, which is mapped into memory."""
    try:
        if path.suffix == ".arrow":
            return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        with pq.ParquetFile(path) as file:  # `pq.read_table` would import pyarrow.dataset, and that pandas
            return file.read()
    except (pa.ArrowInvalid, OSError) as error:
        raise ArtifactDamagedError(f"{path} can't be read ({error}); fetch the attributor again.") from error


def write_table(table: pa.Table, folder: Path, stem: str) -> str:
    """Write a table, small ones as parquet, large ones as Arrow; returns the file's name."""
    file = f"{stem}.{'arrow' if len(table) >= ARROW_ROWS else 'parquet'}"
    with atomic_path(folder / file) as temporary:
        if file.endswith(".arrow"):
            with pa.ipc.new_file(str(temporary), table.schema) as out:
                out.write_table(table, max_chunksize=1 << 20)
        else:
            pq.write_table(table, temporary, compression="zstd", compression_level=12)
    return file


def copy_base(folder: Path, config: Mapping[str, Any], target: Path) -> None:
    """Copy a base's files and config.json; checked on the way."""
    for file in config["sha256"]:
        copy_file(folder, config, file, target)
    write_json(target / "config.json", config)
    if (folder / SIGNATURE).exists() and (folder / "config.json").read_bytes() == (target / "config.json").read_bytes():
        shutil.copyfile(folder / SIGNATURE, target / SIGNATURE)


def copy_file(folder: Path, config: Mapping[str, Any], file: str, target: Path) -> None:
    """Copy one of a base's files; errors as `copy_base`."""
    if not (folder / file).is_file():
        raise MissingFileError(f"{folder} has no {file}, which its config.json names; build the attributor again.")
    (target / file).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / file, target / file)
    if sha256_file(target / file) != config["sha256"][file]:
        raise ArtifactDamagedError(f"{folder / file} is not the file of config.json (SHA-256 differs); it is not copied.")


def open_folder(
    name_or_path: str | Path,
    files: Callable[[dict[str, Any]], list[str]],
    *,
    revision: str | None = None,
    trusted_keys: Sequence[str] | None = None,
    **where: Any,
) -> tuple[Path, dict[str, Any]]:
    """An attributor's folder and its config.json, once signature and checksums of the files asked for have been compared."""
    name, revision = split_revision(name_or_path, revision)
    signed = [] if trusted_keys is None else [SIGNATURE]
    folder = locate(name, "attributor", files=["config.json", *signed], revision=revision, **where)
    stamp = stamp_of(folder)
    if trusted_keys is not None:
        require_signature(folder, trusted_keys)
    config = read_config(folder)
    if stamp_of(folder) != stamp:
        raise MovedError("config.json is of another version by now")
    wanted = files(config)
    # The rest comes from the commit that config.json came from, even if another has been pushed since.
    folder = locate(name, "attributor", files=wanted, revision=commit_of(folder) or revision, **where)
    check_files(folder, config, wanted)
    return folder, config


def needed_files(
    config: dict[str, Any], *, thumbnails: bool, shards: Sequence[int] | None = None, index: bool = True
) -> list[str]:
    """The files of an attributor that are needed."""
    files = [shard["file"] for shard in config.get("index_shards") or SHARDS]
    unknown = [number for number in shards or [] if not 0 <= number < len(files)]
    if unknown or (shards is not None and not shards):
        raise InputError(f"the index has the shards 0 to {len(files) - 1}, got {list(shards or [])}.")
    left_out = {file for number, file in enumerate(files) if shards is not None and number not in shards}
    if not index:
        left_out |= {*index_files(config, vectors=True), file_of(config, "catalog"), file_of(config, "thumbnails")}
    if not thumbnails:
        left_out.add(file_of(config, "thumbnails"))
    if shards is not None or not index:
        left_out.add(file_of(config, "plain"))
    return [file for file in config["sha256"] if file not in left_out]


def settled(folder: Path, load: Callable[[], Result]) -> Result:
    """What `load` gives; done again if a writer published another version meanwhile and took files of this one away."""
    for _ in range(50):
        before = stamp_of(folder)
        try:
            return load()
        except (MissingFileError, ArtifactDamagedError, FileNotFoundError):
            if stamp_of(folder) == before:
                raise
        except MovedError as error:
            moved = error
            time.sleep(0.02)
    raise ArtifactDamagedError(lost(folder, str(moved))) from moved


def stamp_of(folder: Path) -> tuple[int, ...]:
    """Changes whenever a version is published; () where there is no config.json."""
    try:
        found = (folder / "config.json").stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


def sign(folder: Path, key: Path) -> Path:
    """Sign an attributor without changes since its base with a private key (PEM); returns the signature's file."""
    signature = _ed25519(key.read_bytes(), private=True).sign(_signed_part(folder))
    with atomic_path(folder / SIGNATURE) as temporary:
        temporary.write_bytes(signature)
    return folder / SIGNATURE


def require_signature(folder: Path, trusted_keys: Sequence[str]) -> None:
    """Raise an error unless one of these public keys (PEM) has signed config.json, and nothing has changed since its base."""
    keys, data = [_ed25519(key.encode()) for key in trusted_keys], _signed_part(folder)
    if not (folder / SIGNATURE).is_file():
        raise MissingFileError(f"{folder} has no {SIGNATURE}: nobody has signed it, so it is not read; see `fastattr sign`.")
    if not any(_is_of(key, (folder / SIGNATURE).read_bytes(), data) for key in keys):
        raise ArtifactDamagedError(
            f"{folder / SIGNATURE} is no signature of config.json by a trusted key; do not use the attributor."
        )


def _is_of(key: Any, signature: bytes, data: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, data)
    except InvalidSignature:
        return False
    return True


def _signed_part(folder: Path) -> bytes:
    """The bytes of config.json, if there is nothing that they do not cover."""
    if not (folder / "config.json").is_file():
        raise MissingFileError(f"{folder} has no config.json; it is no attributor, or an incomplete one.")
    if (folder / CHANGES).exists():
        raise InputError(f"{folder} has been changed, which a signature does not cover: save it to a new folder and sign that.")
    return (folder / "config.json").read_bytes()


def _ed25519(key: bytes, *, private: bool = False) -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
    except ImportError as error:
        raise MissingExtraError(f"signatures need cryptography ({error}); run: pip install 'fastattr[sign]'") from error
    try:
        found = load_pem_private_key(key, None) if private else load_pem_public_key(key)
    except (ValueError, TypeError) as error:
        raise InputError(f"a key can't be read ({error}); give an ed25519 key in PEM, without a password.") from error
    if not isinstance(found, Ed25519PrivateKey | Ed25519PublicKey):
        raise InputError(f"a key is a {type(found).__name__}; give an ed25519 key (`openssl genpkey -algorithm ed25519`).")
    return found
