"""Licences: who made the training images, under which licences, and the LICENSE.md that says so."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from fastattr.corpus.store import Corpus
from fastattr.publishing.tables import listed, table, text

HUB_LICENSES = """
    apache-2.0 mit unlicense cc0-1.0 cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 odbl gpl-3.0 bsd-3-clause
"""
"""The Hub's own names of licences that images carry."""


def corpus_table(run_dir: Path) -> pa.Table:
    """First caption, source, licence and creator of a run's training images."""
    corpus = Corpus(run_dir / "corpus")
    captions = [captions[0] for captions in corpus.captions]
    return pa.table({"caption": captions, **{name: corpus.column(name) for name in ("source", "license", "creator")}})


def provenance(images: pa.Table) -> list[dict[str, Any]]:
    """Who made the training images and under which licences, largest part first; from columns of a corpus or catalogue.

    One entry a source and licence: 'source', 'license', 'images' (how many) and 'creators' (names, most images first).
    """
    parts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    columns = (images[name].to_pylist() for name in ("source", "license", "creator"))
    for source, license_name, creator in zip(*columns, strict=True):
        parts[source, license_name][creator] += 1
    entries = []
    for (source, license_name), counts in parts.items():
        creators = sorted(filter(None, counts), key=lambda name: (-counts[name], name))
        entries.append({"source": source, "license": license_name, "images": counts.total(), "creators": creators})
    return sorted(entries, key=lambda entry: (-entry["images"], entry["source"], entry["license"]))


def merged(lists: Iterable[Sequence[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    """Several `provenance` lists as one; of entries with the same source and licence, the larger one."""
    largest: dict[tuple[str, str], Mapping[str, Any]] = {}
    for entry in (entry for entries in lists for entry in entries):
        key = entry["source"], entry["license"]
        if key not in largest or entry["images"] > largest[key]["images"]:
            largest[key] = entry
    return list(largest.values())


def license_data(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The card's licence fields: the Hub's name where all images share one licence that it knows, else 'other'."""
    names = {str(entry["license"]).lower().replace(" ", "-") for entry in entries}
    if len(names) == 1 and names <= set(HUB_LICENSES.split()):
        return {"license": names.pop()}
    return {"license": "other", "license_name": "training-images", "license_link": "LICENSE.md"}


def license_text(entries: Sequence[Mapping[str, Any]], imported: str | None = None) -> str:
    """LICENSE.md: the licences that the artifacts carry from their training images, with the creators' names."""
    parts = [
        "# Licences of the training images",
        "The weights, scores and embeddings here were computed from these images, and thumbnails are small copies of them. "
        "Treat what is recognisably derived from an image as under that image's licence, and name its creator.",
    ]
    for entry in entries:
        parts.append(f"## {text(entry['source'] or 'unnamed source')}: {text(entry['license'] or 'no licence recorded')}")
        parts.append(f"{entry['images']:,} images by {listed(entry['creators'])}.")
    if imported:
        parts += ["## Files imported from the paper's authors", imported_sentence(imported)]
    if not entries:
        parts.append("No training images are recorded here: find out their licences before you use or pass on these files.")
    return "\n\n".join(parts) + "\n"


def provenance_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """A row for each source and licence: how many images, and its first creators."""
    if not entries:
        return "The training images are not recorded with these files."
    rows = []
    for entry in entries:
        source, license_name = text(entry["source"] or "unnamed"), text(entry["license"] or "not recorded")
        rows.append([source, f"{entry['images']:,}", license_name, listed(entry["creators"], most=3)])
    return table(["source", "images", "licence", "creators"], rows)


def licence_sentence(entries: Sequence[Mapping[str, Any]]) -> str:
    """The licences that carry over from the training images."""
    named = ", ".join(map(text, sorted({str(entry["license"]) or "not recorded" for entry in entries}))) or "not recorded"
    return f"The training images' licences carry over to what is derived from them: {named}. See [LICENSE.md](LICENSE.md)."


def imported_sentence(license_name: str) -> str:
    """The licence of the files that the paper's authors released."""
    return f"Weights and features were released by the paper's authors under {text(license_name)}, which holds for all of this."
