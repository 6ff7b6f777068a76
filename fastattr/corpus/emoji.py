"""The emoji corpus: 15,351 captioned images of four openly licensed sets, drawn from pinned npm packages.

`npm pack` fetches each package; its SHA-512 must equal the pinned one. The SVGs are drawn with resvg without
system fonts, so the same packages give the same bytes on every machine with the same resvg and Pillow.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from fastattr.core.captions import split_caption
from fastattr.core.errors import ArtifactDamagedError, MissingExtraError
from fastattr.corpus.images import load_rgb
from fastattr.corpus.records import Skipped, TrainingImage

SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}


@dataclass(frozen=True)
class EmojiSet:
    """One pinned package."""

    name: str
    package: str
    integrity: str
    license: str
    creator: str
    url: str


OPENMOJI = EmojiSet(
    "openmoji",
    "openmoji@17.0.0",
    "sha512-EBnYrNGdcdw+OSXmENeNE1yBNRu6tOraTmoOyUbJkTmvT/+XETp8RZLSJFzD3lrPc5N9CzsyPnRTk0Vp4UaI9w==",
    "CC-BY-SA-4.0",
    "OpenMoji",
    "https://openmoji.org/library/emoji-{hexcode}/",
)
ICONIFY = (
    EmojiSet(
        "noto",
        "@iconify-json/noto@1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
        "Google",
        "https://github.com/googlefonts/noto-emoji",
    ),
    EmojiSet(
        "twemoji",
        "@iconify-json/twemoji@1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0",
        "Twitter / jdecked",
        "https://github.com/jdecked/twemoji",
    ),
    EmojiSet(
        "fluent",
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
        "Microsoft",
        "https://github.com/microsoft/fluentui-emoji",
    ),
)


def read_emoji(resolution: int) -> Iterator[TrainingImage | Skipped]:
    """Fetch the four packages and draw every emoji, OpenMoji first (its CLDR data names the others).

    Args:
        resolution: side of the drawn square in pixels.

    Raises:
        MissingExtraError: npm or resvg is not installed.
        ArtifactDamagedError: a package is not the pinned one.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        drawings = list(_openmoji(fetch_package(OPENMOJI, folder)))
        described = {_plain_code(image.family): image for image, _ in drawings}
        by_code = {_plain_code(image.image_id.split("-", 1)[1]): image for image, _ in drawings}
        for emoji_set in ICONIFY:
            drawings += _iconify(emoji_set, fetch_package(emoji_set, folder), by_code, described)
        with ProcessPoolExecutor() as pool:
            svgs = [svg for _, svg in drawings]
            for (image, _), png in zip(
                drawings, pool.map(partial(draw, resolution=resolution), svgs, chunksize=64), strict=True
            ):
                yield TrainingImage(**{**vars(image), "image": png})


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
    drawn = resvg_py.svg_to_bytes(
        svg_string=svg, width=resolution, height=resolution, background="#ffffff", skip_system_fonts=True
    )
    image = load_rgb(bytes(drawn))
    square = Image.new("RGB", (resolution, resolution), "white")
    square.paste(image, ((resolution - image.width) // 2, (resolution - image.height) // 2))
    buffer = io.BytesIO()
    square.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def caption_of(annotation: str, set_name: str) -> str:
    """The main caption: the CLDR annotation plus the set ('red heart, openmoji style')."""
    return f"{annotation.strip().lower()}, {set_name} style"


def _person(name: str) -> str:
    """A name in one spelling: OpenMoji has some with stray spaces and some with decomposed umlauts."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def _plain_code(code: str) -> str:
    """Codepoints in upper case without variation selectors, by which the four sets agree."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def _without_skin_tone(code: str) -> str:
    return "-".join(part for part in _plain_code(code).split("-") if part not in SKIN_TONES)


def _openmoji(archive: Path) -> Iterator[tuple[TrainingImage, str]]:
    """OpenMoji's rows in its own order, with the SVG of each."""
    with tarfile.open(archive) as tar:
        rows: list[dict[str, Any]] = json.load(_member(tar, "package/data/openmoji.json"))
        svgs = {
            Path(member.name).stem: _member(tar, member.name).read().decode()
            for member in tar.getmembers()
            if member.name.startswith("package/color/svg/")
        }
    for row in rows:
        code = row["hexcode"]
        image = TrainingImage(
            image_id=f"openmoji-{code.lower()}",
            image=b"",
            captions=[caption_of(row["annotation"], "openmoji")],
            creator=_person(row["openmoji_author"]) or OPENMOJI.creator,
            license=OPENMOJI.license,
            source="openmoji",
            url=OPENMOJI.url.format(hexcode=code),
            group=row["group"],
            subgroup=row["subgroups"],
            family=f"openmoji-{_without_skin_tone(row['skintone_base_hexcode'] or code).lower()}",
        )
        yield image, svgs[code]


def _iconify(
    emoji_set: EmojiSet, archive: Path, by_code: dict[str, TrainingImage], by_family: dict[str, TrainingImage]
) -> Iterator[tuple[TrainingImage, str]]:
    """One Iconify set's rows by codepoint, named and grouped by OpenMoji's CLDR data where it has that emoji."""
    with tarfile.open(archive) as tar:
        icons = json.load(_member(tar, "package/icons.json"))
        characters: dict[str, str] = json.load(_member(tar, "package/chars.json"))
    for code, icon_name in sorted(characters.items()):
        icon = _resolve(icons, icon_name)
        width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        family = _without_skin_tone(code)
        known = by_code.get(_plain_code(code))
        kin = known or by_code.get(family) or by_family.get(f"OPENMOJI-{family}")
        annotation = split_caption(known.captions[0])[0] if known else icon_name.replace("-", " ")
        image = TrainingImage(
            image_id=f"{emoji_set.name}-{code}",
            image=b"",
            captions=[caption_of(annotation, emoji_set.name)],
            creator=emoji_set.creator,
            license=emoji_set.license,
            source=emoji_set.name,
            url=emoji_set.url,
            group=kin.group if kin else "",
            subgroup=kin.subgroup if kin else "",
            family=f"{emoji_set.name}-{family.lower()}",
        )
        yield image, svg


def _resolve(icons: dict[str, Any], name: str) -> dict[str, Any]:
    """An icon by name, following aliases; a horizontal flip is written into the SVG body."""
    if name in icons["icons"]:
        icon: dict[str, Any] = icons["icons"][name]
        return icon
    alias = icons["aliases"][name]
    icon = dict(_resolve(icons, alias["parent"]))
    if alias.get("hFlip"):
        width = icon.get("width", icons.get("width", 16))
        icon["body"] = f'<g transform="translate({width} 0) scale(-1 1)">{icon["body"]}</g>'
    unhandled = set(alias) & {"vFlip", "rotate", "left", "top"}
    if unhandled:
        raise ArtifactDamagedError(f"alias {name!r} uses {sorted(unhandled)}, which this reader does not know.")
    return icon


def _member(tar: tarfile.TarFile, name: str) -> io.BufferedReader:
    """An open file of the archive."""
    file = tar.extractfile(name)
    if file is None or not re.match(r"package/", name):
        raise ArtifactDamagedError(f"{name} is not a file of the package")
    return file  # type: ignore[return-value]
