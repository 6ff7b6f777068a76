"""The emoji corpus: captioned images of four openly licensed sets, drawn from pinned npm packages.

One picture per subject and set, with several captions each; or, with variants, all 15,351 with one caption each. The SVGs
are drawn without system fonts, so the same packages give the same bytes wherever resvg and Pillow are the same.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from fastattr.core.captions import split_caption
from fastattr.core.errors import ArtifactDamagedError, MissingExtraError
from fastattr.corpus.images import load_rgb
from fastattr.corpus.records import Found, TrainingImage

SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
MARKS = {"2640", "2642", "27A1", "1F9B0", "1F9B1", "1F9B2", "1F9B3"}  # joined: female, male, facing right, four kinds of hair
PEOPLE = {"1F466", "1F467", "1F468", "1F469", "1F9D1", "1F9D2"}
PERSON, JOINER, KISS, HEART, HANDSHAKE = "1F9D1", "200D", "1F48B", "2764", "1F91D"
SHAKING_HANDS = "1FAF1-200D-1FAF2"
COUPLE_KISSING, COUPLE_WITH_HEART, FAMILY, HOLDING_HANDS = "1F48F", "1F491", "1F46A", "1F9D1-200D-1F91D-200D-1F9D1"
NO_PICTURES = {"regional-indicator", "subdivision-flag", "skin-tone", "hair-style"}  # subgroups
FLAG_SET = "twemoji"  # the set whose flags of countries are kept
MOST_CAPTIONS = 8
MOST_SUBJECTS = 12  # a keyword that more subjects have than this says too little to be a caption


@dataclass(frozen=True)
class EmojiSet:
    """One pinned package."""

    name: str
    package: str
    integrity: str
    license: str
    creator: str
    url: str


SHA512 = {
    "openmoji": "sha512-EBnYrNGdcdw+OSXmENeNE1yBNRu6tOraTmoOyUbJkTmvT/+XETp8RZLSJFzD3lrPc5N9CzsyPnRTk0Vp4UaI9w==",
    "noto": "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    "twemoji": "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    "fluent": "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
}


def _pinned(name: str, package: str, license: str, creator: str, url: str) -> EmojiSet:
    return EmojiSet(name, package, SHA512[name], license, creator, f"https://{url}")


OPENMOJI = _pinned("openmoji", "openmoji@17.0.0", "CC-BY-SA-4.0", "OpenMoji", "openmoji.org/library/emoji-{hexcode}/")
ICONIFY = (
    _pinned("noto", "@iconify-json/noto@1.2.9", "Apache-2.0", "Google", "github.com/googlefonts/noto-emoji"),
    _pinned("twemoji", "@iconify-json/twemoji@1.2.5", "CC-BY-4.0", "Twitter / jdecked", "github.com/jdecked/twemoji"),
    _pinned("fluent", "@iconify-json/fluent-emoji-flat@1.2.6", "MIT", "Microsoft", "github.com/microsoft/fluentui-emoji"),
)


@dataclass(frozen=True)
class Drawing:
    """An image still to be drawn."""

    image: TrainingImage  # without its bytes
    svg: str
    words: tuple[str, ...] = ()  # keywords and other names of its subject


def read_emoji(resolution: int, *, variants: bool = False) -> Iterator[Found]:
    """Fetch the four packages and draw their emoji, OpenMoji first (its CLDR data names the others). A drawing has `resolution`
    pixels a side. With `variants` every emoji is drawn, with one caption; otherwise see `plain_drawings`. Raises
    MissingExtraError without npm or resvg, ArtifactDamagedError if a package is not the pinned one.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        drawings = list(openmoji_drawings(fetch_package(OPENMOJI, folder)))
        described = {plain_code(drawing.image.family): drawing for drawing in drawings}
        by_code = {_code(drawing.image): drawing for drawing in drawings}
        for emoji_set in ICONIFY:
            drawings += _iconify(emoji_set, fetch_package(emoji_set, folder), by_code, described)
        if not variants:
            drawings = plain_drawings(drawings)
        with ProcessPoolExecutor() as pool:
            pngs = pool.map(partial(draw, resolution=resolution), [drawing.svg for drawing in drawings], chunksize=64)
            for drawing, png in zip(drawings, pngs, strict=True):
                yield replace(drawing.image, image=png)


def plain_drawings(drawings: Sequence[Drawing]) -> list[Drawing]:
    """One drawing per subject and set, with up to `MOST_CAPTIONS` captions, the main one first. Skin-tone, hair, gender and
    direction variants are left out where their set has the plain picture, and so are letters of flags, flags of parts of
    countries, and flags of countries in all sets but `FLAG_SET`.
    """
    codes = {(drawing.image.source, _code(drawing.image)) for drawing in drawings}
    kept: list[Drawing] = []
    taken: set[str] = set()
    for drawing in drawings:
        image, caption = drawing.image, drawing.image.captions[0]
        flag = image.subgroup == "flags" or (image.subgroup == "country-flag" and image.source != FLAG_SET)
        variant = any((image.source, code) in codes for code in plainer_codes(_code(image)))
        if image.group and not (variant or flag or image.subgroup in NO_PICTURES or caption in taken):
            taken.add(caption)
            kept.append(drawing)
    subjects: dict[str, set[str]] = {}
    for drawing in kept:
        for word in drawing.words:
            subjects.setdefault(word, set()).add(subject_of(drawing.image))
    names = {subject_of(drawing.image) for drawing in kept}  # a word that names another subject is not said of this one
    return [_captioned(drawing, {word: len(subjects[word]) for word in drawing.words if word not in names}) for drawing in kept]


def subject_of(image: TrainingImage) -> str:
    """'red heart' of the image captioned 'red heart, openmoji style'."""
    return split_caption(image.captions[0])[0]


def _captioned(drawing: Drawing, subjects: dict[str, int]) -> Drawing:
    """The drawing with more captions: its words that few subjects have, the most telling first."""
    image, subject = drawing.image, subject_of(drawing.image)
    kind, _, name = subject.partition(": ")
    telling = [word for word in subjects if subjects[word] <= MOST_SUBJECTS]
    words = [f"{name} {kind}"] * bool(name) + sorted(telling, key=lambda word: (subjects[word], word))
    captions = [caption_of(word, image.source) for word in dict.fromkeys(words) if word != subject][: MOST_CAPTIONS - 1]
    return replace(drawing, image=replace(image, captions=image.captions + captions))


def plainer_codes(code: str) -> set[str]:
    """Codes of the pictures that `code` may be a variant of, itself left out; it is one if its set has any of them. Of a man
    firefighter with light skin: the man firefighter, the firefighter, and the firefighter with the same skin.
    """
    found = {code}
    for change in (_without_skin_tone, _without_marks, _any_person, _any_group):
        found |= {change(plain) for plain in found}
    return found - {code, ""}


def _without_marks(code: str) -> str:
    parts = code.split("-")
    marked = [index for index in range(1, len(parts)) if parts[index - 1] == JOINER and parts[index] in MARKS]
    return "-".join(part for index, part in enumerate(parts) if index not in marked and index + 1 not in marked)


def _any_person(code: str) -> str:
    """A man or woman with something joined becomes a person with it."""
    first, *others = code.split("-")
    return "-".join([PERSON, *others]) if first in PEOPLE and JOINER in others else code


def _any_group(code: str) -> str:
    """Couples, families and two hands of given people become the ones of no one in particular."""
    if _without_skin_tone(code) == SHAKING_HANDS:
        return HANDSHAKE
    parts = _without_skin_tone(code).split("-")
    if JOINER not in parts or sum(part in PEOPLE for part in parts) < 2:
        return code
    for sign, plain in ((KISS, COUPLE_KISSING), (HEART, COUPLE_WITH_HEART), (HANDSHAKE, HOLDING_HANDS)):
        if sign in parts:
            return plain
    return FAMILY


def fetch_package(emoji_set: EmojiSet, folder: Path) -> Path:
    """Download one package with `npm pack` and check its SHA-512; returns the archive's path."""
    npm = shutil.which("npm")
    if npm is None:
        raise MissingExtraError("npm was not found; the emoji corpus is read from npm packages. Install Node.js with npm.")
    done = subprocess.run([npm, "pack", emoji_set.package, "--silent"], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ArtifactDamagedError(f"npm pack {emoji_set.package} failed: {reason[0]}. Check the network, then run again.")
    archive = folder / done.stdout.strip().splitlines()[-1]
    found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != emoji_set.integrity:
        raise ArtifactDamagedError(f"{emoji_set.package} has checksum {found}, expected {emoji_set.integrity}; refused.")
    return archive


def draw(svg: str, *, resolution: int) -> bytes:
    """An SVG drawn on a white square of `resolution` pixels a side, aspect ratio kept; returns a PNG file."""
    try:
        import resvg_py
    except ImportError as error:
        raise MissingExtraError("resvg is not installed; run: pip install 'fastattr[emoji]'") from error
    sides: dict[str, Any] = {"width": resolution, "height": resolution}
    image = load_rgb(bytes(resvg_py.svg_to_bytes(svg_string=svg, **sides, background="#ffffff", skip_system_fonts=True)))
    square = Image.new("RGB", (resolution, resolution), "white")
    square.paste(image, ((resolution - image.width) // 2, (resolution - image.height) // 2))
    buffer = io.BytesIO()
    square.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def caption_of(annotation: str, set_name: str) -> str:
    """The main caption: the CLDR annotation plus the set ('red heart, openmoji style')."""
    return f"{annotation.strip().lower()}, {set_name} style"


def plain_code(code: str) -> str:
    """Codepoints in upper case without variation selectors, by which the four sets agree."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def _code(image: TrainingImage) -> str:
    return plain_code(image.image_id.split("-", 1)[1])


def _words(*listed: str) -> tuple[str, ...]:
    """Distinct lower-case words of comma-separated lists."""
    return tuple(dict.fromkeys(word.strip().lower() for words in listed for word in words.split(",") if word.strip()))


def _without_skin_tone(code: str) -> str:
    return "-".join(part for part in plain_code(code).split("-") if part not in SKIN_TONES)


def openmoji_drawings(archive: Path) -> Iterator[Drawing]:
    """OpenMoji's rows in its own order, with the SVG of each."""
    with tarfile.open(archive) as tar:
        rows: list[dict[str, Any]] = json.load(_member(tar, "package/data/openmoji.json"))
        names = [member.name for member in tar.getmembers() if member.name.startswith("package/color/svg/")]
        svgs = {Path(name).stem: _member(tar, name).read().decode() for name in names}
    for row in rows:
        code = row["hexcode"]
        author = " ".join(unicodedata.normalize("NFC", row["openmoji_author"]).split())  # stray spaces, decomposed umlauts
        found = {"creator": author or OPENMOJI.creator, "group": row["group"], "subgroup": row["subgroups"]}
        found["url"] = OPENMOJI.url.format(hexcode=code)
        image = _image(OPENMOJI, code.lower(), row["annotation"], row["skintone_base_hexcode"] or code, found)
        yield Drawing(image, svgs[code], _words(row["tags"], row["openmoji_tags"]))


def _image(emoji_set: EmojiSet, code: str, annotation: str, family: str, found: dict[str, str]) -> TrainingImage:
    """An image still to be drawn; `found` are its own fields, `family` the code of the design whose variant it is."""
    name = emoji_set.name
    known: dict[str, Any] = {"creator": emoji_set.creator, "license": emoji_set.license, "url": emoji_set.url}
    family, captions = f"{name}-{_without_skin_tone(family).lower()}", [caption_of(annotation, name)]
    return TrainingImage(image_id=f"{name}-{code}", image=b"", captions=captions, source=name, family=family, **known | found)


def _iconify(
    emoji_set: EmojiSet, archive: Path, by_code: dict[str, Drawing], by_family: dict[str, Drawing]
) -> Iterator[Drawing]:
    """One Iconify set's rows by codepoint, named and grouped by OpenMoji's CLDR data where it has that emoji."""
    with tarfile.open(archive) as tar:
        icons = json.load(_member(tar, "package/icons.json"))
        characters: dict[str, str] = json.load(_member(tar, "package/chars.json"))
    for code, icon_name in sorted(characters.items()):
        svg = _svg(icons, icon_name)
        family = _without_skin_tone(code)
        known = by_code.get(plain_code(code))
        kin = known or by_code.get(family) or by_family.get(f"OPENMOJI-{family}")
        icon_words = icon_name.replace("-", " ")
        annotation = subject_of(known.image) if known else icon_words
        found = {"group": kin.image.group, "subgroup": kin.image.subgroup} if kin else {}
        image = _image(emoji_set, code, annotation, family, found)
        yield Drawing(image, svg, _words(icon_words, *(known.words if known else ())))


def iconify_svgs(archive: Path) -> Iterator[tuple[str, str]]:
    """Name and SVG of every icon of an Iconify package, aliases last."""
    with tarfile.open(archive) as tar:
        icons = json.load(_member(tar, "package/icons.json"))
    for name in [*icons["icons"], *icons.get("aliases", {})]:
        yield name, _svg(icons, name)


def _svg(icons: dict[str, Any], name: str) -> str:
    icon = _resolve(icons, name)
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'


def _resolve(icons: dict[str, Any], name: str) -> dict[str, Any]:
    """An icon by name, following aliases; a horizontal flip is written into the SVG body."""
    if name in icons["icons"]:
        return dict(icons["icons"][name])
    alias = icons["aliases"][name]
    icon = _resolve(icons, alias["parent"])
    if alias.get("hFlip"):
        width = icon.get("width", icons.get("width", 16))
        icon["body"] = f'<g transform="translate({width} 0) scale(-1 1)">{icon["body"]}</g>'
    if unhandled := set(alias) & {"vFlip", "rotate", "left", "top"}:
        raise ArtifactDamagedError(f"alias {name!r} uses {sorted(unhandled)}, which this reader does not know.")
    return icon


def _member(tar: tarfile.TarFile, name: str) -> io.BufferedReader:
    """An open file of the archive."""
    file = tar.extractfile(name)
    if file is None or not name.startswith("package/"):
        raise ArtifactDamagedError(f"{name} is not a file of the package")
    return file  # type: ignore[return-value]
