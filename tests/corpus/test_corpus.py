"""fastattr/corpus/store.py and fastattr/corpus/emoji.py: every image becomes a row or is listed, drawn and named right."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastattr.core.errors import (
    ArtifactDamagedError,
    ArtifactMismatchError,
    ArtifactNotFoundError,
    InputError,
    MissingExtraError,
)
from fastattr.corpus import emoji as corpus_emoji
from fastattr.corpus.emoji import EmojiSet, fetch_package, read_emoji
from fastattr.corpus.folders import read_folder
from fastattr.corpus.images import load_rgb
from fastattr.corpus.records import Skipped, TrainingImage
from fastattr.corpus.stage import CorpusConfig, run
from fastattr.corpus.store import Corpus, write_corpus
from fastattr.corpus.tables import read_dataset

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
CONFIG = CorpusConfig(kind="folder", path="images")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def png(colour: tuple[int, int, int] = RED, side: int = 8) -> bytes:
    return encoded(Image.new("RGB", (side, side), colour))


def training_image(image_id: str, colour: tuple[int, int, int] = RED, caption: str = "a square") -> TrainingImage:
    return TrainingImage(image_id=image_id, image=png(colour), captions=[caption], creator="Ann")


@pytest.fixture
def captioned_folder(tmp_path: Path) -> Path:
    """Seven image files: four good ones, a text file, a half PNG and one without a caption; one described and absent."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "folder.png").mkdir()
    (folder / "red.png").write_bytes(png(RED))
    (folder / "sub" / "green.JPG").write_bytes(encoded(Image.new("RGB", (8, 8), GREEN), "JPEG"))
    (folder / "blue.webp").write_bytes(encoded(Image.new("RGB", (8, 8), BLUE), "WEBP", lossless=True))
    (folder / "blue.txt").write_text("a blue square\n\n  square, blue \n", encoding="utf-8")
    (folder / "white.png").write_bytes(png(WHITE))
    (folder / "text.png").write_text("no image", encoding="utf-8")
    (folder / "text.txt").write_text("a caption", encoding="utf-8")
    (folder / "half.png").write_bytes(encoded(Image.effect_noise((64, 64), 50))[:1000])
    (folder / "half.txt").write_text("a caption", encoding="utf-8")
    (folder / "silent.png").write_bytes(png())
    (folder / "silent.txt").write_text(" \n", encoding="utf-8")
    described = [
        {"file_name": "red.png", "text": "a red square", "creator": "Ann", "license": "CC0-1.0", "group": 0},
        {"file_name": "sub/green.JPG", "caption": "a green\u2028square"},
        {"file_name": "white.png", "captions": ["a white square", "", "nothing at all"]},
        {"file_name": "gone.png", "text": "an absent square"},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in described] + ["{not json", '{"text": "no file name"}', ""]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    return folder


def test_folder_reader_matches_captions_and_metadata_to_their_images(tmp_path, captioned_folder):
    """Captions shifted by one file would train and attribute without an error."""
    write_corpus(read_folder(captioned_folder), tmp_path / "corpus", CONFIG)
    corpus = Corpus(tmp_path / "corpus")
    assert dict(zip(corpus.image_ids, corpus.captions, strict=True)) == {
        "blue": ["a blue square", "square, blue"],
        "red": ["a red square"],
        "sub/green": ["a green\u2028square"],
        "white": ["a white square", "nothing at all"],
    }
    row = corpus.rows(["red"])[0]
    assert (corpus.column("creator")[row], corpus.column("license")[row], corpus.column("group")[row]) == (
        "Ann",
        "CC0-1.0",
        "0",
    )
    for image_id, colour in {"red": RED, "blue": BLUE, "white": WHITE}.items():
        assert corpus.image(corpus.rows([image_id])[0]).getpixel((4, 4)) == colour


def test_broken_images_and_missing_captions_are_listed_with_the_reason(tmp_path, captioned_folder):
    """An image that silently vanishes can never be attributed, and no one would learn why."""
    manifest = write_corpus(read_folder(captioned_folder), tmp_path / "corpus", CONFIG)
    table = pq.read_table(tmp_path / "corpus" / "skipped.parquet").to_pydict()
    skipped = dict(zip(table["name"], table["reason"], strict=True))
    assert set(skipped) == {"text", "half", "silent", "gone.png", "metadata.jsonl:5", "metadata.jsonl:6"}
    assert skipped["text"] == "not a readable image (unknown format)"
    assert skipped["half"].startswith("not a readable image (")
    assert skipped["silent"] == "no caption"
    assert skipped["gone.png"] == "named in metadata.jsonl, but there is no such image"
    assert manifest["images"] == 4
    assert manifest["skipped"] == {
        "bad line": 2,
        "not a readable image": 2,
        "no caption": 1,
        "named in metadata.jsonl, but there is no such image": 1,
    }


def test_metadata_in_an_unknown_encoding_are_refused(tmp_path):
    """Captions read with replacement characters, or in another alphabet, would be trained on."""
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "a.png", "text": "grün"}'.encode("latin-1"))
    assert [image.captions for image in read_folder(tmp_path) if isinstance(image, TrainingImage)] == [["grün"]]
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "a.png", "text": "зелёный"}'.encode("cp1251"))
    with pytest.raises(InputError, match="save it as UTF-8"):
        list(read_folder(tmp_path))


def test_nothing_skipped_still_writes_the_list(tmp_path):
    """A reader of the report must be able to tell 'none' from 'not recorded'."""
    write_corpus([training_image("a")], tmp_path / "corpus", CONFIG)
    assert pq.read_table(tmp_path / "corpus" / "skipped.parquet").num_rows == 0


def test_two_files_of_one_stem_get_two_ids(tmp_path):
    """One of `a.png` and `a.jpg` would otherwise be lost, or stop the whole corpus."""
    (tmp_path / "a.png").write_bytes(png(RED))
    (tmp_path / "a.jpg").write_bytes(encoded(Image.new("RGB", (8, 8), BLUE), "JPEG"))
    (tmp_path / "a.txt").write_text("a square", encoding="utf-8")
    assert [image.image_id for image in read_folder(tmp_path) if isinstance(image, TrainingImage)] == ["a.jpg", "a.png"]


def test_a_folder_that_is_none_is_refused(tmp_path):
    """An empty corpus instead would fail stages later, far from the mistyped path."""
    with pytest.raises(ArtifactNotFoundError, match="typo"):
        list(read_folder(tmp_path / "typo"))
    with pytest.raises(InputError, match="no usable training image"):
        write_corpus([Skipped(name="a", reason="no caption")], tmp_path / "corpus", CONFIG)
    assert not (tmp_path / "corpus").exists()


def test_dataset_reader_reads_a_parquet_file_through_datasets(tmp_path):
    """A decoded and re-encoded image would no longer be the bytes whose hash the corpus records."""
    from datasets import Dataset, Features, Image as ImageFeature, List, Value

    rows = {
        "picture": [{"bytes": png(RED), "path": None}, {"bytes": b"broken", "path": None}, {"bytes": png(BLUE), "path": None}],
        "words": [["a red square", "red"], ["broken"], ["a blue square"]],
        "license": ["CC0-1.0", "", None],
    }
    features = Features({"picture": ImageFeature(), "words": List(Value("string")), "license": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    path = str(tmp_path / "rows.parquet")
    config = CorpusConfig(kind="dataset", path=path, image_column="picture", caption_column="words")
    manifest = run(config, tmp_path / "corpus")
    corpus = Corpus(tmp_path / "corpus")
    assert corpus.image_ids == ["000000000", "000000002"]
    assert corpus.captions == [["a red square", "red"], ["a blue square"]]
    assert corpus.column("license") == ["CC0-1.0", ""]
    assert [corpus.image_bytes(row) for row in (0, 1)] == [png(RED), png(BLUE)]
    assert manifest["skipped"] == {"not a readable image": 1}


@pytest.mark.parametrize("columns", [{"image_column": "photo"}, {"caption_column": "text"}])
def test_dataset_reader_names_the_columns_it_found(tmp_path, columns):
    """Every row would otherwise be skipped for want of a caption, as if the data were at fault."""
    from datasets import Dataset, Features, Image as ImageFeature, Value

    features = Features({"image": ImageFeature(), "caption": Value("string")})
    Dataset.from_dict({"image": [{"bytes": png(), "path": None}], "caption": ["a"]}, features=features).to_parquet(
        tmp_path / "rows.parquet"
    )
    with pytest.raises(InputError, match=r"has no column .*'caption'"):
        run(CorpusConfig(kind="dataset", path=str(tmp_path / "rows.parquet"), **columns), tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_dataset_reader_keeps_ids_that_are_zero_and_lists_files_that_are_gone(tmp_path):
    """Id 0 taken for 'no id' would name one image of the corpus by another rule than the rest."""
    (tmp_path / "a.png").write_bytes(png(GREEN))
    rows = [
        {"image_id": 0, "image": {"bytes": png(), "path": None}, "caption": "a", "group": 0},
        {"image_id": 1, "image": {"bytes": None, "path": str(tmp_path / "a.png")}, "caption": "b", "group": None},
        {"image_id": 2, "image": {"bytes": None, "path": str(tmp_path / "gone.png")}, "caption": "c"},
        {"image_id": 3, "image": None, "caption": "d"},
        {"image_id": 4, "image": {"bytes": png(), "path": None}, "caption": None},
    ]
    found = list(read_dataset(rows, image_column="image", caption_column="caption"))
    assert [image.image_id for image in found if isinstance(image, TrainingImage)] == ["0", "1"]
    assert [image.group for image in found if isinstance(image, TrainingImage)] == ["0", ""]
    reasons = {image.name: image.reason.split(" (")[0] for image in found if isinstance(image, Skipped)}
    assert reasons == {"2": "not a readable image", "3": "not a readable image", "4": "no caption"}


def test_an_id_that_occurs_twice_is_refused_and_leaves_no_folder(tmp_path):
    """Rows are matched by id: the scores of one image would land on the other."""
    images = [training_image("a"), training_image("b"), training_image("a", BLUE)]
    with pytest.raises(InputError, match="'a' occurs twice"):
        write_corpus(images, tmp_path / "corpus", CONFIG)
    assert list(tmp_path.iterdir()) == []


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_images_give_the_same_bytes_twice(tmp_path, captioned_folder):
    """A time or a memory address inside would make every rebuilt corpus, or its list of skipped files, look new."""
    first = write_corpus(read_folder(captioned_folder), tmp_path / "a", CONFIG)
    second = write_corpus(read_folder(captioned_folder), tmp_path / "b", CONFIG)
    assert first == second
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize(
    "other",
    [
        [training_image("a"), training_image("b", BLUE)],
        [training_image("a"), training_image("b", caption="another")],
        [training_image("a"), training_image("c")],
        [training_image("b"), training_image("a")],
    ],
)
def test_the_fingerprint_notices_pixels_captions_ids_and_order(tmp_path, other):
    """Features of an earlier corpus would be joined with a changed one."""
    first = write_corpus([training_image("a"), training_image("b")], tmp_path / "a", CONFIG)
    second = write_corpus(other, tmp_path / "b", CONFIG)
    assert first["corpus_fingerprint"] != second["corpus_fingerprint"]


def test_shards_hold_every_row_once_and_in_order(tmp_path, monkeypatch):
    """A row lost at a shard's edge would go unnoticed in a corpus of millions."""
    monkeypatch.setattr("fastattr.corpus.store.ROWS_PER_SHARD", 4)
    images = [training_image(f"i{number:02d}", (number, 0, 0), caption=f"square {number}") for number in range(10)]
    write_corpus(images, tmp_path / "corpus", CONFIG)
    assert len(list((tmp_path / "corpus").glob("data-*.parquet"))) == 3
    corpus = Corpus(tmp_path / "corpus")
    assert corpus.image_ids == [f"i{number:02d}" for number in range(10)]
    assert corpus.captions == [[f"square {number}"] for number in range(10)]
    assert [corpus.image(row).getpixel((0, 0))[0] for row in range(10)] == list(range(10))


def test_datasets_shows_the_images(tmp_path):
    """Without the feature metadata, the Hub's viewer and `load_dataset` would show structs of bytes."""
    from datasets import Image as ImageFeature, load_dataset

    write_corpus([training_image("a", RED), training_image("b", BLUE)], tmp_path / "corpus", CONFIG)
    shards = str(tmp_path / "corpus" / "data-*.parquet")
    dataset = load_dataset("parquet", data_files=shards, split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(dataset.features["image"], ImageFeature)
    assert [row["image"].convert("RGB").getpixel((0, 0)) for row in dataset] == [RED, BLUE]
    assert dataset["captions"][:] == [["a square"], ["a square"]]
    assert dataset["sha256"][0] == hashlib.sha256(png(RED)).hexdigest()


def test_corpus_refuses_ids_it_does_not_hold(tmp_path):
    """A default row would attribute to an image that has nothing to do with the query."""
    write_corpus([training_image("a"), training_image("b")], tmp_path / "corpus", CONFIG)
    corpus = Corpus(tmp_path / "corpus")
    np.testing.assert_array_equal(corpus.rows(["b", "a", "b"]), [1, 0, 1])
    with pytest.raises(InputError, match="'c'"):
        corpus.rows(["a", "c"])
    with pytest.raises(ArtifactNotFoundError):
        Corpus(tmp_path / "typo")


def test_run_keeps_a_finished_corpus_and_refuses_another(tmp_path, captioned_folder):
    """A corpus overwritten under its features and scores would leave them pointing at other images."""
    config = CorpusConfig(kind="folder", path=str(captioned_folder))
    first = run(config, tmp_path / "corpus")
    before = files(tmp_path / "corpus")
    assert run(config, tmp_path / "corpus") == first
    with pytest.raises(ArtifactMismatchError, match="path"):
        run(replace(config, path=str(tmp_path)), tmp_path / "corpus")
    assert files(tmp_path / "corpus") == before


def half_transparent() -> Image.Image:
    """Left half opaque red, right half fully transparent blue."""
    image = Image.new("RGBA", (8, 8), (*RED, 255))
    image.paste((*BLUE, 0), (4, 0, 8, 8))
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB with a transparent colour"])
def test_transparency_is_laid_on_white(mode):
    """Dropped alpha shows the colour hidden under it: black or blue grounds that no one ever saw."""
    if mode == "RGB with a transparent colour":
        data = encoded(half_transparent().convert("RGB"), transparency=BLUE)
    elif mode == "P":
        image = half_transparent().convert("RGB").quantize(2)
        data = encoded(image, transparency=image.getpixel((6, 4)))
    else:
        data = encoded(half_transparent().convert(mode))
    drawn = load_rgb(data)
    assert drawn.mode == "RGB"
    assert drawn.getpixel((6, 4)) == WHITE
    assert drawn.getpixel((1, 4)) == ((76, 76, 76) if mode == "LA" else RED)


def test_half_transparency_is_mixed_with_white():
    """A threshold on alpha would draw hard edges around every soft one."""
    assert load_rgb(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 128)))).getpixel((1, 1)) == (255, 127, 127)


def test_a_16_bit_png_keeps_its_greys():
    """Pillow's own conversion clips 16-bit greys at 255: nearly every pixel would turn white."""
    greys = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    drawn = np.asarray(load_rgb(encoded(Image.fromarray(greys))))
    np.testing.assert_array_equal(drawn, np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=2))


def test_exif_rotation_is_applied():
    """Photographs from phones would lie on their side, for the encoder and on the page."""
    image = Image.new("RGB", (16, 8), RED)
    image.paste(BLUE, (8, 0, 16, 8))  # stored: red left, blue right
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: red above, blue below
    drawn = load_rgb(encoded(image, exif=exif))
    assert drawn.size == (8, 16)
    assert (drawn.getpixel((4, 2)), drawn.getpixel((4, 13))) == (RED, BLUE)


@pytest.mark.parametrize("settings", [{"kind": "video"}, {"kind": "folder"}, {"resolution": 4}])
def test_a_config_that_cannot_work_is_refused_at_once(settings):
    """Half a minute of drawing before the same complaint is half a minute too late."""
    with pytest.raises(InputError):
        CorpusConfig(**settings)


# The emoji corpus, from two tiny packages that a stand-in for npm 'downloads'.

LEFT_HALF_RED = '<path fill="#ff0000" d="M0 0h{half}v{side}H0z"/>'


def archive(path: Path, members: dict[str, Any]) -> str:
    """Write an npm archive; returns its integrity as npm prints it."""
    with tarfile.open(path, "w:gz") as tar:
        for name, value in members.items():
            data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def openmoji_row(hexcode: str, annotation: str, author: str, base: str = "") -> dict[str, str]:
    return {
        "hexcode": hexcode,
        "annotation": annotation,
        "openmoji_author": author,
        "group": "people-body",
        "subgroups": "hand-fingers-open",
        "skintone_base_hexcode": base,
        "tags": f"{annotation.split()[-1]}, wave, red heart",
        "openmoji_tags": "wave, Hello",
    }


@pytest.fixture
def fake_packages(tmp_path, monkeypatch) -> tuple[EmojiSet, EmojiSet]:
    """An OpenMoji package of three emojis and an Iconify package of five, one of them a mirrored alias."""
    registry, programs = tmp_path / "registry", tmp_path / "bin"
    registry.mkdir()
    programs.mkdir()
    half = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">{LEFT_HALF_RED.format(half=36, side=72)}</svg>'
    openmoji = {
        "data/openmoji.json": [
            openmoji_row("1F44B", "Waving Hand", "Änn Author"),
            openmoji_row("1F44B-1F3FD", "waving hand: medium skin tone", " A\u0308nn  Author", base="1F44B"),
            openmoji_row("2764-FE0F", "red heart", ""),
        ],
        **{f"color/svg/{code}.svg": half for code in ("1F44B", "1F44B-1F3FD", "2764-FE0F")},
    }
    icon = {"body": LEFT_HALF_RED.format(half=16, side=32)}
    icons = {
        "prefix": "tiny",
        "width": 32,
        "height": 32,
        "icons": {"waving-hand": icon, "red-heart": icon, "new-thing": icon},
        "aliases": {
            "turned-hand": {"parent": "waving-hand", "hFlip": True},
            "same-hand": {"parent": "waving-hand"},
        },
    }
    characters = {
        "1f44b": "waving-hand",
        "1f44b-1f3ff": "same-hand",
        "2764": "red-heart",
        "1fadf": "new-thing",
        "1faf2": "turned-hand",
    }
    sets = (
        replace(corpus_emoji.OPENMOJI, package="openmoji@0.0.1", integrity=archive(registry / "openmoji@0.0.1", openmoji)),
        EmojiSet(
            name="tiny",
            package="tiny@0.0.1",
            integrity=archive(registry / "tiny@0.0.1", {"icons.json": icons, "chars.json": characters}),
            license="MIT",
            creator="Tiny",
            url="https://example.org/tiny",
        ),
    )
    npm = programs / "npm"
    script = [
        "#!/bin/sh",
        f'[ "$1" = pack ] && [ -f "{registry}/$2" ] || {{ echo "no such package" >&2; exit 1; }}',
        f'cp "{registry}/$2" "./$2.tgz" && echo "$2.tgz"',
    ]
    npm.write_text("\n".join(script) + "\n", encoding="utf-8")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr(corpus_emoji, "OPENMOJI", sets[0])
    monkeypatch.setattr(corpus_emoji, "ICONIFY", sets[1:])
    return sets


def emoji_images(items: Iterable[TrainingImage | Skipped]) -> dict[str, TrainingImage]:
    return {image.image_id: image for image in items if isinstance(image, TrainingImage)}


def test_emoji_are_captioned_by_cldr_name_and_set(fake_packages):
    """A set named wrongly, or an icon's file name for its CLDR name, would teach the generator other prompts."""
    captions = {image_id: image.captions[0] for image_id, image in emoji_images(read_emoji(32, variants=True)).items()}
    assert captions == {
        "openmoji-1f44b": "waving hand, openmoji style",
        "openmoji-1f44b-1f3fd": "waving hand: medium skin tone, openmoji style",
        "openmoji-2764-fe0f": "red heart, openmoji style",
        "tiny-1f44b": "waving hand, tiny style",
        "tiny-1f44b-1f3ff": "same hand, tiny style",
        "tiny-2764": "red heart, tiny style",
        "tiny-1fadf": "new thing, tiny style",
        "tiny-1faf2": "turned hand, tiny style",
    }


def test_a_plain_corpus_has_one_picture_per_subject_and_set(fake_packages):
    """A skin tone under a second caption is one more image to learn; the only picture of a subject must stay."""
    images = emoji_images(read_emoji(32))
    assert set(images) == {"openmoji-1f44b", "openmoji-2764-fe0f", "tiny-1f44b", "tiny-2764"}  # the others have no group
    assert images["tiny-1f44b"].captions == [f"{word}, tiny style" for word in ("waving hand", "hand", "hello", "wave")]


@pytest.mark.parametrize(
    ("code", "plain"),
    [
        ("1F44B-1F3FF", "1F44B"),  # waving hand: dark skin tone
        ("1F468-1F3FB-200D-1F692", "1F9D1-200D-1F692"),  # man firefighter, light skin tone -> firefighter
        ("1F3C3-200D-2640-200D-27A1", "1F3C3"),  # woman running facing right -> person running
        ("1F469-200D-1F9B0", "1F469"),  # woman: red hair -> woman
        ("1F468-200D-1F469-200D-1F466", "1F46A"),  # family: man, woman, boy -> family
        ("1F469-200D-2764-200D-1F48B-200D-1F468", "1F48F"),  # kiss: woman, man -> kiss
        ("1FAF1-1F3FB-200D-1FAF2-1F3FC", "1F91D"),  # handshake: two skin tones -> handshake
    ],
)
def test_variants_know_their_plain_picture(code, plain):
    assert plain in corpus_emoji.plainer_codes(code)


@pytest.mark.parametrize("code", ["1F468", "1F436", "2764", "1F1EB-1F1F7", "1F441-200D-1F5E8"])
def test_what_is_plain_already_is_no_variant(code):
    """A man, a dog, a heart, a flag and an eye in a speech bubble."""
    assert not corpus_emoji.plainer_codes(code)


@pytest.mark.slow
@pytest.mark.parametrize(("variants", "expected"), [(True, (15_351, "ee0badacd8623484")), (False, (6463, "25838e7e9690f33a"))])
def test_the_emoji_corpora_are_those_that_the_models_were_trained_on(tmp_path, variants, expected):
    """Another image or caption would be another corpus under the same name."""
    try:
        manifest = run(CorpusConfig(variants=variants), tmp_path / "corpus")
    except (MissingExtraError, ArtifactDamagedError) as error:
        if "refused" in str(error):
            raise
        pytest.skip(f"the packages cannot be fetched here: {error}")
    assert (manifest["images"], manifest["corpus_fingerprint"]) == expected


def test_emoji_keep_creator_licence_and_kin(fake_packages):
    """Shares by creator are the product: a designer split in two, or a set's images under no licence, spoil it."""
    images = emoji_images(read_emoji(32, variants=True))
    assert [images[f"openmoji-{code}"].creator for code in ("1f44b", "1f44b-1f3fd", "2764-fe0f")] == [
        "Änn Author",
        "Änn Author",
        "OpenMoji",
    ]
    assert {image.license for image in images.values() if image.source == "tiny"} == {"MIT"}
    assert images["openmoji-1f44b"].family == images["openmoji-1f44b-1f3fd"].family
    assert images["tiny-1f44b"].family == images["tiny-1f44b-1f3ff"].family != images["openmoji-1f44b"].family
    assert images["tiny-1f44b-1f3ff"].subgroup == "hand-fingers-open"
    assert images["tiny-1fadf"].subgroup == ""


def test_emoji_are_drawn_on_white_and_mirrored_where_the_alias_says_so(fake_packages):
    """Left-facing and right-facing designs would share one picture under two captions."""
    images = emoji_images(read_emoji(32, variants=True))
    for image_id in ("openmoji-1f44b", "tiny-1f44b", "tiny-1f44b-1f3ff", "tiny-1faf2"):
        drawn = Image.open(io.BytesIO(images[image_id].image))
        assert (drawn.mode, drawn.size) == ("RGB", (32, 32))
        left, right = drawn.getpixel((4, 16)), drawn.getpixel((28, 16))
        assert (left, right) == ((WHITE, RED) if image_id == "tiny-1faf2" else (RED, WHITE))


def test_the_emoji_corpus_is_the_same_bytes_twice(tmp_path, fake_packages):
    """The fingerprint of every later artifact hangs on it."""
    for name in ("a", "b"):
        write_corpus(read_emoji(32, variants=True), tmp_path / name, CorpusConfig(resolution=32, variants=True))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert len(Corpus(tmp_path / "a")) == 8


def test_a_package_with_another_checksum_is_refused(tmp_path, fake_packages, monkeypatch):
    """A changed package would give another corpus under the same name, or worse."""
    changed = replace(fake_packages[0], integrity="sha512-" + base64.b64encode(bytes(64)).decode())
    monkeypatch.setattr(corpus_emoji, "OPENMOJI", changed)
    with pytest.raises(ArtifactDamagedError, match="refused"):
        write_corpus(read_emoji(32), tmp_path / "corpus", CorpusConfig(resolution=32))
    assert not (tmp_path / "corpus").exists()


def test_a_package_that_npm_cannot_give_is_named(tmp_path, fake_packages):
    """'list index out of range' does not tell a user that the network is off."""
    with pytest.raises(ArtifactDamagedError, match=r"gone@1\.0\.0 failed: no such package"):
        fetch_package(replace(fake_packages[1], package="gone@1.0.0"), tmp_path)


def test_without_npm_the_error_says_what_to_install(tmp_path, monkeypatch):
    """A newcomer without Node.js must not meet a FileNotFoundError."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtraError, match=r"Node\.js"):
        fetch_package(corpus_emoji.OPENMOJI, tmp_path)


@pytest.mark.parametrize("change", ["rotate", "vFlip"])
def test_an_alias_with_an_unknown_change_is_refused(change):
    """An icon drawn without its rotation would sit in the corpus under the wrong name."""
    icons = {"icons": {"a": {"body": ""}}, "aliases": {"b": {"parent": "a", change: 1}}}
    with pytest.raises(ArtifactDamagedError, match=change):
        corpus_emoji._resolve(icons, "b")


def test_a_corpus_of_an_earlier_version_has_empty_texts_for_later_columns(tiny_run: Path, tmp_path: Path):
    """Columns are added from time to time; corpora that are on people's disks must still be read, and copied in part."""
    shutil.copytree(tiny_run / "corpus", tmp_path / "corpus")
    for path in (tmp_path / "corpus").glob("*.parquet"):
        table = pq.read_table(path)
        if "nsfw" in table.column_names:
            pq.write_table(table.drop_columns(["nsfw"]), path)
    corpus = Corpus(tmp_path / "corpus")
    assert "nsfw" not in corpus.table.column_names
    assert corpus.column("nsfw") == [""] * len(corpus)
    assert len(list(corpus.training_images([3, 1]))) == 2
