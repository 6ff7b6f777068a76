"""Receipts: replay what an attributor answered, against a named revision, and say what differs.

A receipt is `Attribution.to_json()`. With its embedding the search is replayed; with the image itself also everything before
it, and that it is the image of the receipt. Its own SHA-256 shows damage; nothing in it is signed: it shows what an attributor
says, not who asked.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastattr.attributor.attribution import RECEIPT, Attribution, content_sha256
from fastattr.attributor.attributor import FastAttributor
from fastattr.attributor.inputs import ImageLike, image_sha256, open_image
from fastattr.core.errors import ArtifactDamagedError, FormatVersionError, InputError
from fastattr.core.files import read_json

PARTS = ("image_part", "text_part")
TOLERANCE = 2e-3  # by which a similarity may differ: other processors and batch sizes round otherwise
SHARE_TOLERANCE = 0.01  # the same of a share, which follows from similarities


def read_receipt(path: Path) -> dict[str, Any]:
    """A receipt from a file; ArtifactDamagedError, FormatVersionError, or InputError if it is of plain similarity."""
    return checked(read_json(path), str(path))


def checked(receipt: Any, path: str) -> dict[str, Any]:
    """A receipt whose parts are what they must be; errors, which name where it is from, as `read_receipt`."""
    damaged = ArtifactDamagedError(f"{path} is no receipt, or damaged; a receipt is what Attribution.to_json() gives.")
    if not isinstance(receipt, dict) or not isinstance(receipt.get("format"), str):
        raise damaged
    if receipt["format"] != RECEIPT:
        raise FormatVersionError(f"{path} has the format {receipt['format']!r}, this fastattr reads {RECEIPT!r}.")
    query, model = receipt.get("query"), receipt.get("model")
    if isinstance(query, dict) and isinstance(model, dict) and "embedding" not in query:
        method = model.get("method", "an unknown method")
        raise InputError(f"{path} is of {method} and holds no embedding: only what `attribute` answers can be replayed.")
    try:
        vector, query = decode_embedding(receipt), receipt["query"]
        texts = [query["sha256"], query["prompt"], receipt["model"]["name"], *(each["image_id"] for each in receipt["results"])]
        numbers = [query["k"], *(each["similarity"] for each in receipt["results"])]
        ranks = [each["rank"] for each in receipt["results"]]
        whole = all(isinstance(text, str) for text in texts) and isinstance(receipt["versions"], dict)
        whole &= bool(np.isfinite(vector).all() and np.isfinite(numbers).all()) and ranks == list(range(len(ranks)))
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise damaged from error
    if not whole or type(query["k"]) is not int:
        raise damaged
    return receipt


def decode_embedding(receipt: Mapping[str, Any]) -> np.ndarray:
    """(D,) float32, the query's embedding."""
    return np.frombuffer(base64.b64decode(receipt["query"]["embedding"], validate=True), dtype="<f4").copy()


def verify(receipt: Mapping[str, Any], attributor: FastAttributor, *, image: ImageLike | None = None) -> list[str]:
    """Replay a receipt against an attributor, with its image from the encoders on: a sentence for each difference.

    Raises InputError if the embedding is not as wide as this attributor's.
    """
    query, embedding, wide = receipt["query"], decode_embedding(receipt), attributor.config["student"]["embed_dim"]
    if len(embedding) != wide:
        raise InputError(f"the receipt's embedding is {len(embedding)} wide, {attributor.name} makes embeddings {wide} wide.")
    answer, differences = attributor.replay(embedding, query["prompt"], query["k"], where=query.get("where")), []
    if image is not None:
        opened = open_image(image)
        if image_sha256(opened, query["prompt"]) != query["sha256"]:
            differences = version_differences(receipt["versions"], answer.versions, attributor.name)
            return [*differences, "the image and prompt are not those of the receipt (their SHA-256 differs)."]
        asked = attributor.attribute(opened, query["prompt"] or None, k=len(answer) or 1, where=query.get("where"))
        assert isinstance(asked, Attribution)
        answer, again = asked, decode_embedding(asked.to_dict())
        if abs(float(again @ embedding) - 1) > TOLERANCE:
            differences.append(f"the image's embedding differs (cosine {float(again @ embedding):.4f} with the receipt's).")
    differences += version_differences(receipt["versions"], answer.versions, attributor.name)  # of the version that answered
    # How much is the image's doing and how much the prompt's is known only with the image.
    unknown = dict.fromkeys(PARTS if image is None else ())
    was, now = ([{**row, **unknown} for row in rows] for rows in (receipt["results"], answer.to_dict()["results"]))
    differences += result_differences(was, now, attributor)
    if "sha256" in receipt and content_sha256(receipt) != receipt["sha256"]:
        differences.append("the receipt was changed after it was made: its SHA-256 is not that of its content.")
    if "shares" in receipt and answer._reach is not None and not differences:  # else they may follow
        if image is None:  # what is known only with the image is taken from the receipt
            reach = dataclasses.replace(answer._reach, own=not receipt.get("warnings"))
            answer = dataclasses.replace(answer, near_copies=receipt.get("near_copies"), _reach=reach)
        try:
            differences += share_differences(receipt, json.loads(answer.to_json()))
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactDamagedError("the receipt's shares are damaged; they are no rows of Attribution.shares().") from error
    return differences


def share_differences(receipt: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A sentence for each creator whose share or interval is another, and for all of them together."""

    def table(values: Mapping[str, Any]) -> dict[str, Any]:
        rows = {row["creator"]: row for row in values["shares"] if row["named"]}
        return rows | {"all above noise": values.get("above_noise") or {}}

    was, found, lines = table(receipt), table(now), []
    for name in sorted(was.keys() | found.keys()):
        for key in ("share", "low", "high"):
            before, after = (each.get(name, {}).get(key) or 0.0 for each in (was, found))
            if abs(before - after) > SHARE_TOLERANCE:
                lines.append(f"{name}: {key} was {before:.3f}, is {after:.3f}.")
    return lines


def version_differences(receipt: Mapping[str, Any], now: Mapping[str, Any], name: str) -> list[str]:
    """A sentence for each part whose version is another."""
    parts = ((part, receipt.get(part), found) for part, found in now.items() if receipt.get(part) != found)
    return [f"{part}: the receipt has {str(was)[:12]}, {name} has {str(found)[:12]}." for part, was, found in parts]


def result_differences(receipt: list[dict[str, Any]], now: list[dict[str, Any]], attributor: FastAttributor) -> list[str]:
    """A sentence for each image that is named no more, or anew, or of which something else is said."""
    lines = []
    was, found = ({each["image_id"]: each for each in rows} for rows in (receipt, now))
    lowest = min((each["similarity"] for each in receipt), default=0.0)
    for image_id in was.keys() - found.keys():
        if attributor.has_left(image_id):
            lines.append(f"{image_id} (rank {was[image_id]['rank']}) has been removed from the catalogue since.")
        elif was[image_id]["similarity"] > lowest + TOLERANCE:
            lines.append(f"{image_id} (rank {was[image_id]['rank']}) is not among the first {len(now)} any more.")
    lines += [
        f"{image_id} is now named (rank {found[image_id]['rank']}), and is not in the receipt."
        for image_id in found.keys() - was.keys()
        if found[image_id]["similarity"] > lowest + TOLERANCE
    ]
    for image_id in was.keys() & found.keys():
        for name in was[image_id].keys() - {
            "rank",
            "strength",
        }:  # they follow from the similarities; equal ones may change places
            value, other = was[image_id][name], found[image_id].get(name)
            numbers = isinstance(value, int | float) and isinstance(other, int | float)
            if not (abs(value - other) <= TOLERANCE * max(1.0, abs(value)) if numbers else value == other):
                lines.append(f"{image_id}: {name} was {value!r}, is {other!r}.")
    order = [image_id for image_id in was if image_id in found]
    lines += [
        f"{before} stood before {after}, and is now behind it."
        for before, after in itertools.pairwise(order)
        if found[before]["similarity"] < found[after]["similarity"] - 2 * TOLERANCE
    ]
    return sorted(lines)
