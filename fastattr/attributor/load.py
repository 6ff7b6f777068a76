"""Load: from a name to an attributor's folder, its model and what `info` says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from fastattr.attributor.answers import Model
from fastattr.attributor.changes import FILE, MovedError, journal_of
from fastattr.attributor.folder import file_of, needed_files, open_folder, read_config, read_table, settled, stamp_of
from fastattr.attributor.version import Parts, Version, open_version, read_changes
from fastattr.core.errors import ArtifactDamagedError, EncoderMismatchError, FastattrError
from fastattr.core.files import read_json
from fastattr.features.kinds import open_encoder
from fastattr.students.calibration import FILE as CALIBRATION, load_calibration
from fastattr.students.light import LightStudent

if TYPE_CHECKING:
    from fastattr.features.encoder import Encoder

Result = TypeVar("Result")
VERSIONS = ("fastattr_version", "format_version", "catalog_version", "corpus_fingerprint", "generator_fingerprint")


def load(
    name_or_path: str | Path, *, encoders: dict[str, Any], parts: Parts, index_uri: str | None, **where: Any
) -> tuple[Model, Version, dict[str, Any]]:
    """An attributor's model, newest version and metrics; arguments and errors as `FastAttributor.from_pretrained`."""
    wanted: dict[str, Any] = {"thumbnails": parts.thumbnails and not index_uri, "shards": parts.shards, "index": not index_uri}

    def once() -> tuple[Model, Version, dict[str, Any]]:
        folder, config = open_folder(name_or_path, lambda found: needed_files(found, **wanted), **where)
        stamp = stamp_of(folder)
        if read_config(folder)["seal"] != config["seal"]:
            raise MovedError("config.json is of another version by now")
        width, calibrated = config["feature_dim"], CALIBRATION in config["sha256"]
        model = Model(
            name=str(name_or_path),
            encoders=open_encoders(folder, config, **encoders),
            student=LightStudent(folder / "model.safetensors", feature_dim=width, config=config["student"]),
            calibration=load_calibration(folder / CALIBRATION, feature_dim=width) if calibrated else None,
            embed_dim=int(config["student"]["embed_dim"]),
            feature_blocks=config.get("feature_blocks", []),
        )
        columns = model.image_columns
        if columns is not None and len(columns) != width:
            raise ArtifactDamagedError(
                f"{folder / 'config.json'} describes {len(columns)} features of {width}; fetch it again."
            )
        milvus = None
        if index_uri:
            from fastattr.attributor.collection import MilvusBackend

            milvus = MilvusBackend.open(index_uri, {**config, "catalog_version": read_changes(folder, config).version})
        version = open_version(folder, config, parts, stamp=stamp, milvus=milvus)
        return model, version, read_json(folder / "metrics.json")

    return _sound(name_or_path, once)


def _sound(name_or_path: str | Path, load: Callable[[], Result]) -> Result:
    """What `load` gives, settled; ArtifactDamagedError for whatever a file that a stranger changed makes its reader raise."""
    try:
        return settled(Path(str(name_or_path)), load)
    except (FastattrError, OSError):
        raise
    except Exception as error:  # sealed anew, a file can hold anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ArtifactDamagedError(f"{name_or_path} is damaged ({reason}); fetch or build the attributor again.") from error


def read_info(name_or_path: str | Path) -> dict[str, Any]:
    """What `FastAttributor.from_pretrained(name_or_path).info()` says, without loading encoders, network and index."""

    def once() -> dict[str, Any]:
        folder, config = open_folder(name_or_path, lambda found: [file_of(found, "catalog"), "metrics.json"])
        catalog = read_table(folder / file_of(config, "catalog"))
        if (folder / FILE).exists() or journal_of(config):
            folder, config = open_folder(name_or_path, lambda found: needed_files(found, thumbnails=False))
            version = open_version(folder, config, Parts(thumbnails=False), stamp=stamp_of(folder))
            config, catalog = version.config, version.catalogue.table
        return describe(str(name_or_path), config, catalog, read_json(folder / "metrics.json"))

    return _sound(name_or_path, once)


def open_encoders(folder: Path, config: dict[str, Any], **options: Any) -> list[Encoder]:
    """The feature encoders of an attributor, see `open_encoder`."""
    options |= {"folder": folder, "captions": config["captions"]}
    opened = [open_encoder(specification, **options) for specification in config["encoders"]]
    found = [encoder.fingerprint for encoder in opened]
    pairs = zip(opened, config["encoder_fingerprints"], strict=True)
    if not all(wanted in {encoder.fingerprint, encoder.former} for encoder, wanted in pairs):
        needed = f"{config['encoders']} with fingerprints {config['encoder_fingerprints']}, found {found}"
        way_out = "Fetch the revision of the encoders that the attributor's card names, or the attributor trained on these."
        raise EncoderMismatchError(f"{folder} needs the encoders {needed}. {way_out}")
    return opened


def describe(name: str, config: dict[str, Any], catalog: pa.Table, metrics: dict[str, Any]) -> dict[str, Any]:
    """Size, creators, licences, versions and metrics of an attributor."""
    shown = np.linspace(0, len(catalog) - 1, min(6, len(catalog)), dtype=int)
    return {
        "name": name,
        "images": len(catalog),
        "creators": len(catalog["creator"].unique()),
        "licences": sorted(set(catalog["license"].to_pylist())),
        "sources": sorted(set(catalog["source"].to_pylist())),
        "examples": catalog["caption"].take(pa.array(shown)).to_pylist(),
        "encoders": config["encoders"],
        "embed_dim": config["student"]["embed_dim"],
        "index": config["index"],
        "files": sorted(config["sha256"]),
        "versions": {name.partition("_")[0]: str(config.get(name, 1)) for name in VERSIONS},
        **({"reservations": config["reservations"]} if "reservations" in config else {}),
        "metrics": metrics,
    }
