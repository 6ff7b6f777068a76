"""Make: put a run folder's corpus, features, student and metrics together as an attributor folder."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from fastattr.attributor.bases import replacing
from fastattr.attributor.folder import FORMAT_VERSION, seal, write_table
from fastattr.attributor.inputs import COLUMNS
from fastattr.core.files import read_json, sha256_file, write_json
from fastattr.core.stages import open_stage, require_same
from fastattr.corpus.store import Corpus
from fastattr.features.kinds import open_encoder
from fastattr.index.build import build, build_index
from fastattr.index.choose import IndexConfig
from fastattr.index.files import save_index
from fastattr.students.calibration import FILE as CALIBRATION

THUMBNAIL_SIDE = 48  # pixels; the catalogue of 15,351 emoji is 6 MB with 48 and 8 MB with 64


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

    evaluation/metrics.json is taken along if it is there. Encoders are specifications, in the order of the student's features;
    captions 'first' or 'mean', as the features were made; WebP thumbnails have a quality of 1 to 100.
    """
    from fastattr.features.by_generator import RECIPES
    from fastattr.features.encoder import modality
    from fastattr.features.store import folders, read_features, read_ids
    from fastattr.students.distill import open_student, save_student
    from fastattr.students.student import embed

    corpus = Corpus(run_dir / "corpus")
    manifest = open_stage(run_dir / "student", "student")
    student = open_student(run_dir)
    paths = folders(run_dir, "features", encoders)
    features = read_features(paths, corpus.image_ids)
    metrics_file = run_dir / "evaluation" / "metrics.json"
    asked = folders(run_dir, "query_features", encoders)
    generated = all((path / "ids.parquet").exists() for path in asked)  # images as they will be asked for
    with replacing(folder) as temporary:
        save_student(student, temporary / "model.safetensors")
        embeddings = embed(student, features)
        rows, dim = embeddings.shape
        queries = embed(student, read_features(asked, read_ids(asked[0]))) if generated else None
        given: dict[str, Any] = {"queries": queries, "image_ids": corpus.image_ids}
        built = build(lambda start, stop: embeddings[start:stop], rows, dim, config, temporary, **given)
        if config.plain:
            save_index(build_index(plain_vectors(features), config.plain), temporary / "plain.faiss")
        if (run_dir / "calibration" / CALIBRATION).exists():
            calibrated = open_stage(run_dir / "calibration", "calibration")["inputs"]["student"]
            require_same("the student of calibration/", calibrated, manifest["fingerprint"], "Run `fastattr calibrate` again.")
            shutil.copyfile(run_dir / "calibration" / CALIBRATION, temporary / CALIBRATION)
        catalog = {"image_id": corpus.image_ids, "caption": [captions[0] for captions in corpus.captions]}
        catalog |= {column: corpus.column(column) for column in COLUMNS[2:]}
        thumbnails = [thumbnail_bytes(corpus.image(row), quality=thumbnail_quality) for row in range(len(corpus))]
        tables = {"catalog": catalog, "thumbnails": {"image_id": corpus.image_ids, "thumbnail": thumbnails}}
        files = {name: write_table(pa.table(columns), temporary, name) for name, columns in tables.items()}
        write_json(temporary / "metrics.json", read_json(metrics_file) if metrics_file.exists() else {})
        if any(specification.endswith(":encoder") for specification in encoders):
            shutil.copytree(run_dir / "encoder", temporary / "encoder")
        own = {specification.partition(":")[2] for specification in encoders}
        for part in ("generator", *RECIPES):  # what diffusion and gradient features need at query time
            if part in own or (part == "generator" and own & set(RECIPES)):
                shutil.copytree(run_dir / part, temporary / part, ignore=shutil.ignore_patterns("checkpoint*"))
        opened = [open_encoder(specification, folder=temporary, captions=captions) for specification in encoders]
        widths = [open_stage(path, "features")["width"] for path in paths]
        blocks = [{"modality": modality(name), "width": width} for name, width in zip(encoders, widths, strict=True)]
        names = ("feature_dim", "corpus_fingerprint", "generator_fingerprint", "teacher", "training_queries")
        settings = {name: manifest[name] for name in names} | {"student": manifest["config"]["student"]}
        settings |= {"reservations": found} if (found := corpus.manifest.get("reservations")) else {}
        settings |= {"encoders": list(encoders), "encoder_fingerprints": [encoder.fingerprint for encoder in opened]}
        seal_folder(temporary, **settings, captions=captions, feature_blocks=blocks, files=files, **built)


def plain_vectors(features: np.ndarray) -> np.ndarray:
    """(N, F) float32 unit vectors whose inner products are the cosines of untuned features."""
    vectors = features.astype(np.float32)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors


def seal_folder(folder: Path, **settings: Any) -> None:
    """Finish an attributor folder: write config.json with these settings and the checksums of all files there."""
    from fastattr.core.version import __version__

    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    checksums = {file: sha256_file(folder / file) for file in files}
    made_by = {"format_version": FORMAT_VERSION, "fastattr_version": __version__, "catalog_version": 1}
    write_json(folder / "config.json", seal(json.loads(json.dumps({**made_by, **settings, "sha256": checksums}))))
