"""Showcase: what the page shows of an attributor beyond its answers, made beforehand and kept in the attributor's folder.

generated.parquet: images of the generator with the training images that rank first for them. counterfactuals.parquet: queries
of a ground truth, drawn again from their own noise by models that were retrained without some images. Both are optional;
config.json holds their checksums, so `push`, `from_pretrained` and `save_pretrained` treat them as any other file.

    python -m fastattr.evaluation.showcase generated ATTRIBUTOR --generator GENERATOR
    python -m fastattr.evaluation.showcase counterfactuals ATTRIBUTOR --truth FOLDER
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from fastattr.attributor.attributor import FastAttributor
from fastattr.attributor.folder import read_config, seal
from fastattr.attributor.make import thumbnail_bytes
from fastattr.core.errors import ArtifactDamagedError, FastattrError, MissingFileError
from fastattr.core.files import atomic_path, sha256_file, write_json
from fastattr.core.stages import require_same
from fastattr.corpus.images import load_rgb
from fastattr.evaluation.truth import GroundTruth
from fastattr.generators.generator import Generator

TEXT, DRAWING = pa.string(), pa.binary()
GENERATED_FILE = "generated.parquet"
SETTINGS = {"seed": pa.int64(), "steps": pa.int32(), "guidance": pa.float32()}
GENERATED = pa.schema({"prompt": TEXT, **SETTINGS, "image": DRAWING, "image_ids": pa.list_(TEXT)})
"""`image` is a WebP thumbnail, `image_ids` are the training images ranked first, most influential first."""
COUNTERFACTUALS_FILE = "counterfactuals.parquet"
COUNTERFACTUALS = pa.schema(
    {
        "query_id": TEXT,
        "prompt": TEXT,
        "seed": pa.int64(),  # of the noise that the original and all retrained models start from
        "method": TEXT,  # whose top K the model was trained without: 'influence', 'similarity' or 'random'
        "removed": pa.int32(),  # K
        "of": pa.int32(),  # images in the corpus
        "loss_before": pa.float64(),  # of the query under the model trained on everything; mean squared error
        "loss_after": pa.float64(),  # under the retrained one, with the same noise draws
        "original": DRAWING,  # lossless WebP
        "image": DRAWING,  # the same, drawn by the retrained model
    }
)
METHODS = {"influence": "student", "similarity": "similarity_both", "random": "random"}
"""What the page calls a method: its name in the ground truth."""


def pack_generated(
    generator: Generator, attributor: FastAttributor, *, count: int, first: int, seed: int = 0, batch_size: int = 25
) -> pa.Table:
    """Draw images and name the training images that influenced each most, in the schema `GENERATED`.

    Prompts are `count` captions of training images, at most, no two of one family, chosen by `seed`; image i starts from the
    noise of seed i, `batch_size` are drawn at once. Of each ranking the `first` training images are kept.

    Raises:
        ArtifactMismatchError: the attributor was trained for another generator.
    """
    wanted, fix = attributor.config["generator_fingerprint"], "Give the generator that the attributor was trained for."
    require_same("generator_fingerprint", generator.fingerprint, wanted, fix)
    columns = (attributor.catalog[name].to_pylist() for name in ("family", "image_id"))
    _, rows = np.unique([family or image_id for family, image_id in zip(*columns, strict=True)], return_index=True)
    chosen = np.sort(np.random.default_rng(seed).permutation(rows)[:count])
    prompts = attributor.catalog["caption"].take(pa.array(chosen)).to_pylist()
    settings = {"steps": int(generator.defaults["steps"]), "guidance": float(generator.defaults["guidance"])}
    records = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="generated", unit="batch"):
        own = prompts[start : start + batch_size]
        seeds = list(range(start, start + len(own)))
        images = generator.generate_batch(own, seeds=seeds)
        answers = attributor.attribute(images, own, k=min(first, len(attributor)))
        assert isinstance(answers, list)
        for prompt, image_seed, image, answer in zip(own, seeds, images, answers, strict=True):
            record = {"prompt": prompt, "seed": image_seed, **settings, "image": thumbnail_bytes(image, quality=80)}
            records.append(record | {"image_ids": [result.image_id for result in answer.results]})
    return pa.Table.from_pylist(records, schema=GENERATED)


def pack_counterfactuals(truth: GroundTruth, methods: Mapping[str, str] = METHODS) -> pa.Table:
    """All queries that every method has a retrained model for, in the schema `COUNTERFACTUALS`, one row a query and method.

    `methods` says what the page calls a method, and its name in the ground truth. Where several models belong to one method
    and query ('random'), the first by name is taken.

    Raises:
        MissingFileError: the ground truth holds no such images, or no query for which all methods have one.
    """
    table = truth.counterfactuals
    if "image" not in table.columns:
        raise MissingFileError(f"{truth.folder}/counterfactuals.parquet has no column 'image'; make the ground truth again.")
    drawn = table[table["image"].notna()].sort_values("model_id").drop_duplicates(["method", "query_id"])
    by_key = {(row["method"], row["query_id"]): row for row in drawn.to_dict("records")}
    query_ids = [query for query in truth.query_ids if all((name, query) in by_key for name in methods.values())]
    if not query_ids:
        raise MissingFileError(
            f"{truth.folder} has no query that models without the first images by {', '.join(methods.values())} have all "
            f"drawn again; it has {sorted(set(table['method']))}. Run benchmarks/ground_truth.py --only leave-k-out."
        )
    removed = {model["model_id"]: len(model["removed_image_ids"]) for model in truth.models}
    seeds = dict(zip(truth.query_ids, truth.queries["seed"].to_pylist(), strict=True))
    records = []
    for query_id in query_ids:
        shared = {"query_id": query_id, "prompt": truth.prompt(query_id), "seed": seeds[query_id], "of": len(truth.image_ids)}
        shared |= {"loss_before": truth.losses(["full"], [query_id]).item(), "original": _lossless(truth.image(query_id))}
        for method, name in methods.items():
            row = by_key[name, query_id]
            own = {"method": method, "removed": removed[row["model_id"]], "loss_after": float(row["loss"])}
            records.append({**shared, **own, "image": _lossless(load_rgb(row["image"]["bytes"]))})
    return pa.Table.from_pylist(records, schema=COUNTERFACTUALS)


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """A showcase file; ArtifactDamagedError if it has other columns than `schema`."""
    found = pq.read_schema(path).remove_metadata()
    if not found.equals(schema):
        raise ArtifactDamagedError(
            f"{path} has the columns {found.names}, not those of fastattr.evaluation.showcase; make it again."
        )
    return pq.read_table(path)


def read_generated(attributor: FastAttributor) -> list[dict[str, Any]]:
    """The generated images that an attributor brings along, as rows of `GENERATED`; none if it brings none."""
    path = attributor.file(GENERATED_FILE)
    return list(read_table(path, GENERATED).to_pylist()) if path else []


def read_counterfactuals(attributor: FastAttributor) -> list[dict[str, Any]]:
    """The images drawn by retrained models that an attributor brings along, as rows of `COUNTERFACTUALS`; none likewise."""
    path = attributor.file(COUNTERFACTUALS_FILE)
    return list(read_table(path, COUNTERFACTUALS).to_pylist()) if path else []


def attach(table: pa.Table, folder: Path, name: str) -> None:
    """Write a table into an attributor's folder and its checksum into config.json; errors as `folder.read_config`."""
    config = read_config(folder)
    with atomic_path(folder / name) as temporary:
        pq.write_table(table, temporary, compression="zstd", compression_level=12)
    config["sha256"] = dict(sorted({**config["sha256"], name: sha256_file(folder / name)}.items()))
    write_json(folder / "config.json", seal(config))


def _lossless(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=True, method=6)
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Make one of the two files and attach it."""
    parser = argparse.ArgumentParser(description="Make what the page shows beyond an attributor's answers.")
    parser.add_argument(
        "kind", choices=["generated", "counterfactuals"], help="drawings with their rankings; retrained models'"
    )
    parser.add_argument("attributor", type=Path, help="folder of the attributor")
    parser.add_argument("--generator", help="generated: folder, Hub id or embedded name")
    parser.add_argument("--count", type=int, default=200, help="generated: images to draw (%(default)s)")
    parser.add_argument("--first", type=int, default=100, help="generated: training images kept of each ranking (%(default)s)")
    parser.add_argument("--truth", type=Path, help="counterfactuals: ground truth folder with images")
    options = parser.parse_args(arguments)
    needed = "generator" if options.kind == "generated" else "truth"
    if not getattr(options, needed):
        parser.error(f"{options.kind} needs --{needed}")
    if options.kind == "generated":
        attributor, generator = FastAttributor.from_pretrained(options.attributor), Generator.from_pretrained(options.generator)
        table, name = pack_generated(generator, attributor, count=options.count, first=options.first), GENERATED_FILE
    else:
        table, name = pack_counterfactuals(GroundTruth(options.truth)), COUNTERFACTUALS_FILE
    attach(table, options.attributor, name)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FastattrError as error:
        sys.exit(str(error))
