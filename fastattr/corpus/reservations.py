"""Reservations: a creator's no, found in the picture's file, in its row, beside its folder or on a list, and kept at the door.

Read are IPTC/PLUS `plus:DataMining` in XMP, columns (`tdm-reservation`, `noai`, `noimageai`, `x-robots-tag`), `tdmrep.json`,
C2PA's and CAWG's training-and-data-mining assertions, and opt-out lists. What each does not cover: docs/reservations.md.
Sources: ns.useplus.org/LDF/ldf-XMPSpecification; w3.org/2022/tdmrep; cawg.io/training-and-data-mining.
"""

from __future__ import annotations

import io
import json
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from fastattr.core.errors import InputError
from fastattr.core.stages import fingerprint
from fastattr.corpus.images import FORMATS, load_rgb
from fastattr.corpus.near_copies import MAX_BITS, look_of, looks_of, near_copies
from fastattr.corpus.records import Found, Skipped, decode_text

MODES = ("exclude", "list", "ignore")
SITE_FILE = "tdmrep.json"
COLUMNS = ("tdm-reservation", "tdm-policy", "noai", "noimageai", "x-robots-tag", "robots")  # with - or _, in any case
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
DATA_MINING = "{http://ns.useplus.org/ldf/xmp/1.0/}DataMining"
LONGEST_XMP = 16_000_000  # characters
MANIFEST = b"jumdc2pa"  # what a C2PA manifest begins with, in a file of any format
LISTED = "on the opt-out list"
# What `metadata` of an image that is kept may say, and how the manifest counts it.
KEPT = {"reserved_by": "kept, reserved by ", "reserved_unread": "not read: "}
LINE = re.compile("(id|creator|url): *(.+)|(hash): *([0-9a-fA-F]{400})")
YES = frozenset({"1", "1.0", "true", "yes"})
NO_AI = frozenset({"noai", "noimageai"})


def honoured(found: Iterable[Found], mode: str, opt_outs: OptOuts | None = None) -> Iterator[Found]:
    """What a reader found, without the images whose creators said no, or that are on a list.

    Mode 'exclude' skips reserved images, 'list' keeps them and notes it in their metadata, 'ignore' does not look.
    """
    for each in found:
        if isinstance(each, Skipped):
            obeyed = mode != "ignore" and "X-Robots-Tag" in each.reason  # by img2dataset, which left the image out
            yield replace(each, reason=f"reserved by x-robots-tag ({each.reason})") if obeyed else each
            continue
        row: dict[str, str] = json.loads(each.metadata or "{}")
        said, unread = reservation_of(each.image, row) if mode != "ignore" else ("", "")
        listed = opt_outs.why(each.image_id, each.creator, each.url, each.image) if opt_outs else ""
        if listed or (said and mode == "exclude"):
            reason = f"{LISTED} ({listed})" if listed else f"reserved by {said}"
            yield Skipped(name=each.image_id, reason=reason, url=each.url)
        elif said or unread:
            row |= {name: text for name, text in zip(KEPT, (said, unread), strict=True) if text}
            yield replace(each, metadata=json.dumps(row, ensure_ascii=False, sort_keys=True))
        else:
            yield each


def reservation_of(image: bytes, row: Mapping[str, str]) -> tuple[str, str]:
    """A creator's no in an image file or in its row as 'field (value)', and what is not read as 'what (why)'; '' without."""
    if said := _in_columns({name.lower().replace("_", "-"): value for name, value in row.items()}):
        return said, ""
    unread, (kind, packet) = [], xmp_of(image)
    try:
        said = _in_xmp(packet) if packet else ""
    except (ElementTree.ParseError, ValueError) as error:
        unread.append(f"XMP ({error})")
    if not said and MANIFEST in image:
        try:
            said = _in_c2pa(image, kind)
        except Exception as error:  # c2pa raises many types on damaged manifests; each means the same to us
            unread.append(f"C2PA manifest ({error})")
    return said, "; ".join(unread)


def _said(field: str, value: str, policy: str = "") -> str:
    return f"{field} ({value}, policy {policy})" if policy else f"{field} ({value})"


def _has(words: frozenset[str], value: str) -> bool:
    return not words.isdisjoint(re.split(r"[\s,;:]+", value.lower()))


def _in_columns(row: Mapping[str, str]) -> str:
    own = row.get("tdm-reservation", "")
    if _has(YES, own):
        return _said("tdm-reservation", own, row.get("tdm-policy", ""))
    if not own and _has(YES, row.get(SITE_FILE, "").partition(" ")[0]):  # the picture's own word goes before its site's
        return _said(SITE_FILE, row[SITE_FILE])
    for name in COLUMNS[2:]:
        if _has(NO_AI | YES if name in NO_AI else NO_AI, row.get(name, "")):
            return _said(name, row[name])
    return ""


def xmp_of(image: bytes) -> tuple[str, bytes]:
    """The format of an image file, as Pillow names it, and its XMP packet; no bytes without one."""
    with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
        if opened.format == "PNG" and b"XML:com.adobe.xmp" in image and "xmp" not in opened.info:
            opened.load()  # it stands behind the pixels
        kind, packet = str(opened.format), opened.info.get("xmp") or opened.info.get("XML:com.adobe.xmp") or b""
    if not packet and (start := image.find(b"<x:xmpmeta")) >= 0:  # in a format of which Pillow reads none
        packet = image[start:].partition(b"</x:xmpmeta>")[0] + b"</x:xmpmeta>"
    packet = packet.encode() if isinstance(packet, str) else packet
    return kind, packet.strip(b"\0 \t\r\n") if isinstance(packet, bytes) else b""


def _in_xmp(packet: bytes) -> str:
    """What a packet says of its own picture, not of those that it was made from; raises ParseError or ValueError."""
    text = packet.decode("utf-8-sig")
    if len(text) > LONGEST_XMP or "<!DOCTYPE" in text:  # the one place that can declare entities
        raise ValueError(f"it is longer than {LONGEST_XMP} characters, or declares a document type")
    root = ElementTree.fromstring(text)
    for resource in root if root.tag == f"{RDF}RDF" else root.iterfind(f"{RDF}RDF/*"):
        parts = [part.get(f"{RDF}resource") or "".join(part.itertext()) for part in resource.iterfind(DATA_MINING)]
        for value in map(str.strip, [resource.get(DATA_MINING, ""), *parts]):
            if value.rpartition("/")[2].upper().startswith("DMI-PROHIBITED"):
                return _said("plus:DataMining", value)
    return ""


def _in_c2pa(image: bytes, kind: str) -> str:
    """What a file's manifest forbids, or that of a picture it was edited from: a later yes does not lift an earlier no."""
    try:
        import c2pa
    except ImportError as error:
        warnings.warn("C2PA manifests, which may reserve images, are not read; run: pip install 'fastattr[c2pa]'")
        raise ValueError("pip install 'fastattr[c2pa]'") from error
    with c2pa.Reader(Image.MIME["JPEG" if kind == "MPO" else kind], io.BytesIO(image)) as reader:
        store = json.loads(reader.json())
    labels = [store["active_manifest"]]
    while labels:
        manifest = store["manifests"].pop(labels.pop(), {})
        for each in manifest.get("assertions", []):
            for purpose, entry in sorted(each["data"]["entries"].items()) if "training-mining" in each["label"] else ():
                if entry["use"] in {"notAllowed", "constrained"} and not purpose.endswith("inference"):
                    return _said(each["label"], f"{purpose} {entry['use']}", entry.get("constraint_info", ""))
        parents = (each for each in manifest.get("ingredients", []) if each.get("relationship") == "parentOf")
        labels += [each["active_manifest"] for each in parents if "active_manifest" in each]
    return ""


def site_files(folder: Path) -> list[Path]:
    """The files by which a site's folder may reserve its contents."""
    return [path for path in (folder / SITE_FILE, folder / ".well-known" / SITE_FILE) if path.is_file()]


def site_rules(names: Iterable[str], root: Path) -> dict[str, dict[str, str]]:
    """Image -> what the nearest `tdmrep.json` says of it, as a row, for images by their path below `root`; none without a rule.

    The file lies in a folder above the image, the one around `root` at most, or in .well-known there. Locations are paths below
    that folder, as robots.txt writes them; the first that matches counts. Raises InputError for a file that cannot be read.
    """

    @cache
    def rules_in(folder: Path) -> list[tuple[str, dict[str, Any]]]:
        rules: list[tuple[str, dict[str, Any]]] = []
        for path in site_files(folder):
            try:
                rules += [(re.escape(unquote(rule["location"])), rule) for rule in json.loads(path.read_bytes())]
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise InputError(
                    f"{path} is no list of rules with a location ({error!r}); mend it, or take it away."
                ) from error
        return [(re.sub(r"\\\$$", "$", pattern.replace(r"\*", ".*")), rule) for pattern, rule in rules]

    rows, root = {}, root.resolve()
    for name in names:
        parts = (root.name, *name.split("/"))
        places = [(root.parent.joinpath(*parts[:depth]), "/" + "/".join(parts[depth:])) for depth in range(len(parts))]
        rules = (rule for folder, path in reversed(places) for pattern, rule in rules_in(folder) if re.match(pattern, path))
        if rule := next(rules, None):
            policy = f", policy {rule['tdm-policy']}" if rule.get("tdm-policy") else ""
            rows[name] = {SITE_FILE: f"{rule.get('tdm-reservation')} for {rule['location']}{policy}"}
    return rows


def count(folder: Path, skipped: Mapping[str, int]) -> dict[str, int]:
    """How many images of a corpus folder were left out (`skipped` by reason), kept although reserved, or not read, by field."""
    found = Counter({reason: number for reason, number in skipped.items() if reason.startswith(("reserved by ", LISTED))})
    for file in sorted(folder.glob("data-*.parquet")):
        metadata = pq.read_table(file, columns=["metadata"])["metadata"]
        for row in map(json.loads, metadata.filter(pc.match_substring(metadata, '"reserved_')).to_pylist()):
            found.update(words + row[name].split(" (")[0] for name, words in KEPT.items() if name in row)
    return dict(found)


class OptOuts:
    """An opt-out list: lines `id:`, `creator:`, `url:` (a * at its end stands for any end) and `hash:` (`look_of` in hex)."""

    def __init__(self, path: Path) -> None:
        """Read a list; empty lines and those that begin with # say nothing. Raises InputError for any other line."""
        try:
            lines = decode_text(path.read_bytes()).splitlines()
        except (OSError, InputError) as error:
            raise InputError(f"the opt-out list {path} cannot be read ({error}).") from error
        found: dict[str, list[str]] = {"id": [], "creator": [], "url": [], "hash": []}
        for number, line in enumerate(map(str.strip, lines), start=1):
            if match := LINE.fullmatch(line):
                prefix, value = filter(None, match.groups())
                found[prefix].append(value)
            elif line and not line.startswith("#"):
                raise InputError(f"{path}:{number}: expected id:, creator:, url: or hash: and its value, found {line[:60]!r}.")
        self.fingerprint = fingerprint(found)
        self.ids, self.urls = set(found["id"]), set(map(_plain, found["url"]))
        self.creators = set(map(_plain, found["creator"]))
        self.sites = tuple(url[:-1] for url in self.urls - {"*"} if url.endswith("*"))
        self.looks = looks_of(list(map(bytes.fromhex, found["hash"])))

    def why(self, image_id: str, creator: str, url: str, thumbnail: bytes) -> str:
        """The line by which an image is on the list, or ''; one of several creators is enough."""
        if image_id in self.ids:
            return f"id: {image_id}"
        for name in (creator, *creator.split(", ")):
            if _plain(name) in self.creators:
                return f"creator: {name}"
        if url and (_plain(url) in self.urls or _plain(url).startswith(self.sites)):
            return f"url: {url}"
        if len(self.looks):
            look = looks_of([look_of(load_rgb(thumbnail))])
            close = np.unpackbits(self.looks.signs ^ look.signs, axis=1).sum(axis=1) <= MAX_BITS
            if len(near_copies(look, self.looks[np.flatnonzero(close)])[0]):
                return "hash: a near-copy"
        return ""

    def listed_in(self, catalog: pa.Table) -> list[str]:
        """The ids of a catalogue's images that are on the list; of hashes by their thumbnails, or InputError without them."""
        if len(self.looks) and "thumbnail" not in catalog.column_names:
            raise InputError("the opt-out list has hashes, which are compared with thumbnails; load the attributor with them.")
        names = ["image_id", "creator", "url", *["thumbnail"] * bool(len(self.looks))]
        rows = (row for batch in catalog.select(names).to_batches(10_000) for row in batch.to_pylist())
        return [row["image_id"] for row in rows if self.why(**{"thumbnail": b"", **row})]


def _plain(text: str) -> str:
    """A name or URL in one spelling, without scheme, 'www.' and a slash at its end."""
    text = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return re.sub(r"^(https?://)?(www\.)?", "", text).rstrip("/")
