"""fastattr/corpus/folders.py: what people have in their folders comes in as they meant it, or is listed with the reason."""

from __future__ import annotations

import json
import os
import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastattr.core.errors import InputError
from fastattr.corpus.folders import list_folder, read_folder
from fastattr.corpus.records import Skipped, TrainingImage, as_captions, as_text, decode_text
from fastattr.corpus.stage import CorpusConfig, run
from fastattr.corpus.store import Corpus


def picture(path: Path, number: int = 0, kind: str = "PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path, kind)
    return path


def read(folder: Path, **options: Any) -> tuple[dict[str, TrainingImage], dict[str, str]]:
    found = list(read_folder(folder, **options))
    kept = {each.image_id: each for each in found if isinstance(each, TrainingImage)}
    skipped = {each.name: each.reason for each in found if isinstance(each, Skipped)}
    assert len(kept) + len(skipped) == len(found)
    return kept, skipped


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_a_caption_is_the_text_that_was_written(tmp_path, encoding):
    """Notepad writes UTF-16 and marks; they became part of the caption, or mojibake that a model was trained on."""
    text = "a café — “quoted” cat, ink"
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(f"{text}\r\n".encode(encoding))
    assert read(tmp_path)[0]["a"].captions == [text]


@pytest.mark.parametrize("encoding", ["cp1251", "shift-jis", "euc-kr", "gb18030", "iso8859-7"])
def test_a_caption_in_an_unknown_alphabet_is_listed(tmp_path, encoding):
    """Read as Western European, it would be a row of accented letters that no one wrote."""
    words = {
        "cp1251": "красная шляпа",
        "shift-jis": "赤い帽子",
        "euc-kr": "빨간 모자",
        "gb18030": "红色的帽子",
        "iso8859-7": "κόκκινο",
    }
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(words[encoding].encode(encoding))
    kept, skipped = read(tmp_path)
    assert not kept
    assert skipped["a"].startswith("its description cannot be read (a.txt: the text is in no known encoding")


def test_values_become_texts_that_can_be_stored():
    """Half a character stopped the corpus; a list became "['Ada', 'Bob']", a number no caption at all."""
    assert as_text("lone \ud83e surrogate") == "lone  surrogate"
    assert as_text("whole \ud83e\udd8a pair") == "whole 🦊 pair"
    assert as_text(["Ada", "Bob", None, "Ada"]) == "Ada, Bob"
    assert [as_text(value) for value in (None, float("nan"), 0, 1.5, True, " x ")] == ["", "", "0", "1.5", "True", "x"]
    assert as_captions([3, None, "", "a cat", "a cat"]) == ["3", "a cat"]
    assert as_captions(float("nan")) == as_captions(None) == []
    with pytest.raises(InputError):
        decode_text(b"\xff\xfe\x00")


def test_several_rows_of_one_file_are_all_kept(tmp_path):
    """Flickr's and COCO's tables have five rows an image; the last one was kept, four captions were lost."""
    picture(tmp_path / "a.png")
    rows = [{"file_name": "a.png", "text": f"caption {number}", "creator": "Ada", "mood": number % 2} for number in range(5)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.txt").write_text("caption 2\na caption beside it")
    image = read(tmp_path)[0]["a"]
    assert image.captions == [*(f"caption {number}" for number in range(5)), "a caption beside it"]
    assert (image.creator, json.loads(image.metadata)) == ("Ada", {"mood": "0, 1"})


@pytest.mark.parametrize("name", ["artist", "Author", "photographer", "ILLUSTRATOR", "creators"])
def test_creators_are_found_under_their_other_names_and_other_columns_are_kept(tmp_path, name):
    """The creator was dropped without a word, and nobody could be paid."""
    picture(tmp_path / "pictures" / "a.png")
    row = {"file_name": "a.png", "Text": "a cat", name: ["Ada", "Bob"], "camera": "Leica", "iso": 400, "vector": [0.5] * 3000}
    (tmp_path / "pictures" / "metadata.jsonl").write_text(json.dumps(row))
    manifest = run(CorpusConfig(kind="folder", path=str(tmp_path / "pictures")), tmp_path / "corpus")
    corpus = Corpus(tmp_path / "corpus")
    assert (corpus.captions, corpus.column("creator")) == ([["a cat"]], ["Ada, Bob"])
    assert json.loads(corpus.column("metadata")[0]) == {"camera": "Leica", "iso": "400", "vector": "0.5"}
    assert manifest["columns"] == {name: "creator", "camera": "metadata", "iso": "metadata", "vector": "metadata"}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "csv;", "METADATA.JSONL"])
def test_tables_in_sub_folders_describe_the_files_beside_them(tmp_path, kind):
    """`datasets` reads a table in every folder; an image below was 'no caption'."""
    picture(tmp_path / "train" / "deep" / "a.png")
    row = {"file_name": "deep/a.png", "text": 'a "cat", red'}
    sub = tmp_path / "train"
    if kind.startswith("csv"):
        mark = kind[3:] or ","
        (sub / "metadata.csv").write_text(f'file_name{mark}text\r\ndeep/a.png{mark}"a ""cat"", red"\r\n')
    else:
        (sub / (kind if "." in kind else "metadata.jsonl")).write_text(json.dumps(row))
    kept, skipped = read(tmp_path)
    assert (kept["train/deep/a"].captions, skipped) == (['a "cat", red'], {})


@pytest.mark.parametrize(
    ("on_disk", "named"),
    [
        ("a.png", "./a.png"),
        ("sub/a.png", "sub\\a.png"),
        ("UP.PNG", "up.png"),
        (unicodedata.normalize("NFD", "café.png"), unicodedata.normalize("NFC", "café.png")),
        (unicodedata.normalize("NFC", "Ärger.png"), unicodedata.normalize("NFD", "ärger.png")),
        ("sub/a.png", "sub/../sub//a.png"),
    ],
)
def test_names_match_as_they_do_on_the_systems_that_wrote_them(tmp_path, on_disk, named):
    """Windows writes backslashes, macOS decomposed accents: each of them was 'no such image'."""
    picture(tmp_path / on_disk)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": named, "text": "t"}))
    kept, skipped = read(tmp_path)
    assert [image.captions for image in kept.values()] == [["t"]]
    assert skipped == {}


def test_a_name_that_fits_two_files_is_listed(tmp_path):
    """Either could be meant."""
    for number, name in enumerate(("A.png", "a.PNG")):
        picture(tmp_path / name, number)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "t"}))
    kept, skipped = read(tmp_path)
    assert not kept
    assert skipped["a.png"] == "named in metadata.jsonl, but several images have that name"


@pytest.mark.parametrize("beside", ["UP.TXT", "up.txt", "UP.caption", "UP.PNG.txt", "UP.json"])
def test_descriptions_beside_an_image_are_found(tmp_path, beside):
    """Upper-case suffixes and kohya's .caption were 'no caption'."""
    picture(tmp_path / "UP.PNG")
    (tmp_path / beside).write_text(json.dumps({"caption": "t"}) if beside.endswith("json") else "t")
    kept, skipped = read(tmp_path)
    assert (kept["UP"].captions, skipped) == (["t"], {})


def test_kohyas_folders_name_captions_and_creators(tmp_path):
    """They are what LoRA trainers' users have; all their images were 'no caption'."""
    picture(tmp_path / "10_ada ink" / "a.png", 1)
    (picture(tmp_path / "10_ada ink" / "b.png", 2).with_suffix(".caption")).write_text("a fox")
    (picture(tmp_path / "Bob" / "sketches" / "c.png", 3).with_suffix(".txt")).write_text("a cat")
    (picture(tmp_path / "d.png", 4).with_suffix(".json")).write_text('{"caption": "a dog", "artist": "Cyd"}')
    kept, _ = read(tmp_path)
    assert {name: image.captions for name, image in kept.items()} == {
        "10_ada ink/a": ["ada ink"],
        "10_ada ink/b": ["a fox"],
        "Bob/sketches/c": ["a cat"],
        "d": ["a dog"],
    }
    assert json.loads(kept["10_ada ink/a"].metadata) == {"repeats": "10"}
    assert {image.creator for image in kept.values()} == {"", "Cyd"}
    kept, _ = read(tmp_path, creator_from_folder=True)
    assert [image.creator for image in kept.values()] == ["ada ink", "ada ink", "Bob", "Cyd"]


def test_links_are_followed_once_and_broken_ones_are_listed(tmp_path):
    """A shared disk linked into the folder vanished; a broken link stopped the corpus; a circle never ends."""
    elsewhere = tmp_path / "elsewhere"
    (picture(elsewhere / "sub" / "k.png").with_suffix(".txt")).write_text("k")
    folder = tmp_path / "pictures"
    picture(folder / "a.png")
    (folder / "nas").symlink_to(elsewhere / "sub", target_is_directory=True)
    (folder / "b.png").symlink_to(tmp_path / "gone.png")
    (folder / "circle").symlink_to(folder, target_is_directory=True)
    os.mkfifo(folder / "pipe.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "b"}')
    kept, skipped = read(folder)
    assert list(kept) == ["nas/k"]
    assert skipped == {
        "a": "no caption",
        "b.png": "a link to a file that does not exist",
        "circle": "a link to a folder that holds it",
        "pipe.png": "not a regular file",
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[("a.avif", "AVIF"), ("a.jfif", "JPEG"), ("a.jpe", "JPEG"), ("a.jp2", "JPEG2000"), ("a.ppm", "PPM"), ("a.tga", "TGA")],
        *[("a.apng", "PNG"), ("a.png ", "PNG"), ("a", "WEBP"), ("a.dat", "GIF"), ("a.qoi", "QOI"), ("a.TIF", "TIFF")],
    ],
)
def test_pictures_are_found_under_every_suffix(tmp_path, name, kind):
    """They were neither read nor listed."""
    picture(tmp_path / name, kind=kind)
    (tmp_path / "a.txt").write_text("t")
    kept, skipped = read(tmp_path)
    assert ([image.captions for image in kept.values()], skipped) == ([["t"]], {})


def test_every_other_file_is_listed(tmp_path):
    """What is not read and not listed is lost without a word."""
    (picture(tmp_path / "a.png").with_suffix(".txt")).write_text("t")
    for name, data in {
        "notes.pdf": b"%PDF-1.7",
        "README.txt": b"hello",
        ".DS_Store": b"\0\0",
        "b.heic": b"\0\0\0\x18ftypheic",
    }.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "b.txt").write_text("t")
    kept, skipped = read(tmp_path)
    assert list(kept) == ["a"]
    assert skipped == {
        "notes.pdf": "not an image",
        "README.txt": "a text that belongs to no image",
        ".DS_Store": "not an image",
        "b": "not a readable image (unknown format)",
    }


def test_ids_are_unique_whatever_the_names(tmp_path):
    """Two images of one id stop the corpus."""
    names = ["a.png", "a.jpg", "a.png.webp", "b.png", "b.png.png", "\u00e9.png", "e\u0301.png", os.fsdecode(b"\xe9.png")]
    for number, name in enumerate(names):
        picture(tmp_path / name, number)
        (tmp_path / f"{name}.txt").write_text("t")
    kept, skipped = read(tmp_path)
    assert (len(kept), skipped) == (len(names), {})
    assert all(name.encode() for name in kept)  # the names of no encoding, too, can be stored


STEMS = ["a", "A", "b.c", "\u00e9", "e\u0301", "10_x", " ", "metadata", "日本", ".hidden", "a b", "x" * 60]
SUFFIXES = [
    ".png",
    ".PNG",
    ".jpg",
    ".webp",
    ".gif",
    ".txt",
    ".TXT",
    ".caption",
    ".json",
    ".csv",
    ".jsonl",
    ".pdf",
    ".avif",
    "",
    ".svg",
]
TEXTS = [
    "a cat\n",
    "\u00e9 \ufeff",
    '{"caption": "x"}',
    "file_name,text\na.png,b\n",
    "",
    '{"file_name": "a.png", "text": "t"}',
    "[1]",
]


def fuzz(folder: Path, rng: random.Random) -> None:
    """A folder as strangers have it: any names, formats, tables, links and rubbish."""
    folders = [folder]
    for _ in range(rng.randint(0, 3)):
        deeper = rng.choice(folders) / rng.choice(["10_ink style", "Ada", "\u00e9", ".git", "sub"])
        deeper.mkdir(exist_ok=True)
        folders.append(deeper)
    for number in range(rng.randint(1, 12)):
        path = rng.choice(folders) / (rng.choice(STEMS) + rng.choice(SUFFIXES))
        kind = rng.choice(["picture", "picture", "picture", "text", "bytes", "empty", "link", "broken link", "folder link"])
        table = path.name in {"metadata.csv", "metadata.jsonl"}  # one in no known encoding is refused
        if path.exists() or path.is_symlink():
            continue
        if table or kind == "text":
            path.write_bytes(rng.choice(TEXTS).encode(rng.choice(["utf-8", "utf-16", "utf-8-sig"])))
        elif kind == "picture":
            picture(path, number, rng.choice(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]))
        elif kind in {"bytes", "empty"}:
            path.write_bytes(rng.randbytes(rng.randint(1, 300)) if kind == "bytes" else b"")
        else:
            some = rng.choice(folders)
            path.symlink_to({"link": some / "a.png", "broken link": folder / "gone", "folder link": some}[kind].absolute())


@pytest.mark.parametrize("seed", [*range(25), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(25, 500))])
def test_every_file_is_kept_or_listed(tmp_path, seed):
    """The rule of the whole module: images that are kept and files that are skipped are all files, each of them once."""
    fuzz(tmp_path, random.Random(seed))
    listing, found = list_folder(tmp_path), list(read_folder(tmp_path))
    kept = [each.image_id for each in found if isinstance(each, TrainingImage)]
    described = {name for beside in listing.sidecars.values() for name in beside}
    tables = {
        name for name in listing.files if Path(name).name.lower() in {"metadata.csv", "metadata.jsonl", "metadata.parquet"}
    }
    rows = [each for each in found if isinstance(each, Skipped) and ("named in" in each.reason or "bad line" in each.reason)]
    links = [each for each in found if isinstance(each, Skipped) and each.reason.startswith("a link")]
    assert len(found) - len(rows) - len(links) == len(set(listing.files) - described - tables)
    assert len(set(kept)) == len(kept) <= len(listing.images)
    walked = [Path(top) / name for top, _, files in os.walk(tmp_path, followlinks=False) for name in files]
    assert {path.relative_to(tmp_path).as_posix() for path in walked if path.exists()} <= set(listing.files)
