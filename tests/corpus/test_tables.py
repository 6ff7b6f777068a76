"""fastattr/corpus/tables.py: every layout in which data sets keep images and captions."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastattr.core.errors import ArtifactMismatchError, InputError
from fastattr.corpus.images import load_rgb
from fastattr.corpus.stage import CorpusConfig, run
from fastattr.corpus.store import Corpus

COUNT = 4


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = [png(number) for number in range(COUNT)]
CAPTIONS = [f"caption {number}" for number in range(COUNT)]


def read(path: Path, **settings: Any) -> tuple[Corpus, dict[str, Any]]:
    out = path.parent / f"corpus-of-{path.name}-{settings.get('split')}" / "corpus"
    manifest = run(CorpusConfig(kind="dataset", path=str(path), **settings), out)
    return Corpus(out), manifest


def layouts(folder: Path) -> dict[str, pa.Array]:
    names = []
    for number, data in enumerate(IMAGES):
        (folder / f"{number}.png").write_bytes(data)
        names.append(f"{number}.png")
    return {
        "binary": pa.array(IMAGES, pa.binary()),
        "large_binary": pa.array(IMAGES, pa.large_binary()),
        "struct": pa.array([{"bytes": data, "path": None} for data in IMAGES]),
        "struct of bytes": pa.array([{"bytes": data} for data in IMAGES]),
        "struct of paths": pa.array([{"path": name} for name in names]),
        "names": pa.array(names),
        "absolute names": pa.array([str(folder / name) for name in names]),
        "names of a folder that moved": pa.array([f"C:\\data\\set\\{name}" for name in names]),
        "lists of bytes": pa.array([[data, IMAGES[0]] for data in IMAGES]),
        "lists of structs": pa.array([[{"bytes": data, "path": None}] for data in IMAGES]),
    }


@pytest.mark.parametrize(
    "layout",
    [
        *("binary", "large_binary", "struct", "struct of bytes", "struct of paths", "names", "absolute names"),
        *("names of a folder that moved", "lists of bytes", "lists of structs"),
    ],
)
def test_every_layout_of_an_image_column_is_read(tmp_path, layout):
    """Raw bytes, lists and relative names ended in tracebacks, or in rows that were dropped."""
    pq.write_table(pa.table({"image": layouts(tmp_path)[layout], "caption": CAPTIONS}), tmp_path / "rows.parquet")
    corpus, manifest = read(tmp_path / "rows.parquet")
    assert [corpus.image_bytes(row) for row in range(len(corpus))] == IMAGES
    assert (corpus.captions, manifest["skipped"]) == ([[caption] for caption in CAPTIONS], {})


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
def test_tables_of_file_names_are_read_without_naming_the_columns(tmp_path, kind):
    """'has no column image; it has []' is all that they got."""
    layouts(tmp_path)
    rows = [{"file_name": f"{number}.png", "text": caption} for number, caption in enumerate(CAPTIONS)]
    mark = {"csv": ",", "tsv": "\t"}.get(kind, "")
    lines = [mark.join(rows[0]), *(mark.join(row.values()) for row in rows)] if mark else list(map(json.dumps, rows))
    (tmp_path / f"rows.{kind}").write_text("\n".join(lines) + "\n")
    corpus, _ = read(tmp_path / f"rows.{kind}")
    assert [corpus.image_bytes(row) for row in range(len(corpus))] == IMAGES
    assert corpus.captions == [[caption] for caption in CAPTIONS]


@pytest.mark.parametrize(
    ("name", "encoding", "text"),
    [
        ("rows.csv", "utf-16", "image,caption\n0.png,Käse\n"),
        ("rows.csv", "latin-1", "image;caption\n0.png;Käse\n"),
        ("rows.tsv", "utf-8-sig", "image\tcaption\n0.png\tKäse\n"),
        ("rows.jsonl", "utf-16-le", '{"image": "0.png", "caption": "Käse"}\n'),
        ("rows.jsonl", "utf-8", '{"image": "0.png", "caption": "\\ud83dKäse"}\n'),
        ("rows.json", "cp1252", '[{"image": "0.png", "caption": "Käse"}]'),
        ("rows.JSON", "utf-8", '[{"image": "0.png", "caption": "Käse"}, {"image": "1.png", "caption": 2}]'),
    ],
)
def test_tables_are_read_as_people_write_them(tmp_path, name, encoding, text):
    """What `datasets` reads must be UTF-8 with commas: a traceback, in the middle of the work."""
    layouts(tmp_path)
    (tmp_path / name).write_bytes(text.encode(encoding))
    corpus, _ = read(tmp_path / name)
    assert corpus.captions == [["Käse"], ["2"]][: len(corpus)]
    assert corpus.image_bytes(0) == IMAGES[0]


def test_lines_that_are_no_rows_are_listed(tmp_path):
    """One bad line hid the others, or stopped them."""
    layouts(tmp_path)
    lines = ['{"image": "0.png", "caption": "a"}', "{", "[1]", '{"image": "1.png", "caption": "b"}', "null"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    corpus, manifest = read(tmp_path / "rows.jsonl")
    assert (corpus.captions, manifest["skipped"]) == ([["a"], ["b"]], {"bad line": 3})
    (tmp_path / "more.csv").write_text("image,caption\n0.png,a\n1.png,b,c\n2.png\n")
    corpus, manifest = read(tmp_path / "more.csv")
    assert (corpus.captions, manifest["skipped"]) == ([["a"]], {"bad line": 1, "no caption": 1})


@pytest.mark.parametrize("group", [1, 2, 3])
def test_a_file_that_is_damaged_further_on_is_refused_in_words(tmp_path, group):
    """`datasets` opens it, and its reader's own error came later."""
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"image": IMAGES * 50, "caption": CAPTIONS * 50}), path, row_group_size=50, use_dictionary=False)
    data = bytearray(path.read_bytes())
    at = pq.ParquetFile(path).metadata.row_group(group).column(1).data_page_offset
    data[at : at + 20] = bytes(20)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"rows\.parquet"):
        read(path)


def test_folders_of_save_to_disk_are_read(tmp_path):
    """They are no data files of any kind that `load_dataset` knows: a traceback."""
    from datasets import Dataset, DatasetDict, Features, Image as ImageFeature, Value

    features = Features({"image": ImageFeature(), "caption": Value("string"), "mask": ImageFeature()})
    cells = [{"bytes": data, "path": None} for data in IMAGES]
    saved = Dataset.from_dict({"image": cells, "caption": CAPTIONS, "mask": cells}, features=features)
    saved.save_to_disk(tmp_path / "one")
    DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "many")
    for name, split in (("one", "train"), ("many", "test")):
        corpus, _ = read(tmp_path / name, split=split)
        assert [corpus.image_bytes(row) for row in range(len(corpus))] == IMAGES
    with pytest.raises(InputError, match="split 'validation'"):
        read(tmp_path / "many", split="validation")


def test_classes_are_named_and_lists_are_joined(tmp_path):
    """WikiArt's artists are class numbers: a creator became '2', two of them "['Ada', 'Bob']"."""
    from datasets import ClassLabel, Dataset, Features, List, Value

    features = Features(
        {
            "image": Value("binary"),
            "caption": Value("int64"),
            "artist": ClassLabel(names=["Ada", "Bob", "Cyd"]),
            "genre": List(ClassLabel(names=["ink", "oil"])),
            "author": List(Value("string")),
        }
    )
    rows = {"image": IMAGES, "caption": [0, 1, 2, 3], "artist": [2, 0, -1, 1], "genre": [[0], [1, 0], [], None]}
    rows["author"] = [["x"], [], ["Di", "Ed"], None]
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    corpus, manifest = read(tmp_path / "rows.parquet")
    assert corpus.captions == [["0"], ["1"], ["2"], ["3"]]
    assert corpus.column("creator") == ["Cyd", "Ada", "Di, Ed", "Bob"]
    assert [json.loads(text or "{}").get("genre") for text in corpus.column("metadata")] == ["ink", "oil, ink", None, None]
    assert manifest["columns"] == {"artist": "creator", "author": "creator", "genre": "metadata"}


def test_missing_values_are_listed_and_empty_shards_are_no_harm(tmp_path):
    """A shard without rows stopped all the others; NaN became a caption."""
    (tmp_path / "data").mkdir()
    schema = pa.schema([("image", pa.binary()), ("caption", pa.float64())])
    shards = [([], []), (IMAGES[:3], [1.5, float("nan"), None]), ([None, b""], [1.0, 2.0])]
    for number, (images, captions) in enumerate(shards):
        table = pa.table({"image": images, "caption": captions}, schema=schema)
        pq.write_table(table, tmp_path / "data" / f"train-{number:05d}-of-00003.parquet")
    corpus, manifest = read(tmp_path / "data")
    assert corpus.captions == [["1.5"]]
    assert manifest["skipped"] == {"no caption": 2, "not a readable image": 2}


def test_an_image_folder_that_datasets_loads_keeps_its_files(tmp_path):
    """LoRA sets on the Hub are such; `decode=False` leaves a path there and no bytes."""
    folder = tmp_path / "set"
    folder.mkdir()
    layouts(folder)
    rows = [{"file_name": f"{number}.png", "text": caption} for number, caption in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus, _ = read(folder)
    assert sorted(map(corpus.image_bytes, range(len(corpus)))) == sorted(IMAGES)
    assert all(corpus.image_bytes(row) == IMAGES[int(corpus.captions[row][0][-1])] for row in range(len(corpus)))


@pytest.mark.parametrize("path", ["nothing/here", "rows.parquet"])
def test_what_is_no_dataset_is_refused_in_words(tmp_path, path, monkeypatch):
    """A traceback of another library does not say which setting is wrong."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match=path):
        run(CorpusConfig(kind="dataset", path=path), tmp_path / "run" / "corpus")


def change_captions(folder: Path) -> None:
    (folder / "1.txt").write_text("another text 1!")


def change_image(folder: Path) -> None:
    (folder / "2.png").write_bytes(png(99))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_captions, r"1 changed \(1\.txt\)"),
        (change_image, r"1 changed \(2\.png\)"),
        (lambda folder: (folder / "new.png").write_bytes(png(7)), r"1 new \(new\.png\)"),
        (lambda folder: (folder / "0.txt").unlink(), r"1 gone \(0\.txt\)"),
        (lambda folder: (folder / "0.txt").rename(folder / "00.txt"), r"1 new \(00\.txt\); 1 gone \(0\.txt\)"),
    ],
)
def test_a_source_that_changed_since_is_refused(tmp_path, change, told):
    """The build said 'done', with a corpus of pictures that are not those in the folder."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    layouts(folder)
    for number, caption in enumerate(CAPTIONS):
        (folder / f"{number}.txt").write_text(f"another {caption[-6:]}")
    config = CorpusConfig(kind="folder", path=str(folder))
    first = run(config, folder / "run" / "corpus")  # the run folder lies inside, and is no part of the source
    for path in folder.glob("*.*"):
        path.write_bytes(path.read_bytes())  # the date alone is no change
    assert run(config, folder / "run" / "corpus") == first
    change(folder)
    with pytest.raises(ArtifactMismatchError, match=told):
        run(config, folder / "run" / "corpus")


def test_images_are_read_from_disk_by_row_group(tmp_path, monkeypatch):
    """A corpus larger than memory must open; and each row must be its own image, whatever the order of asking."""
    monkeypatch.setattr("fastattr.corpus.store.GROUP_BYTES", 1000)
    monkeypatch.setattr("fastattr.corpus.store.GROUPS_KEPT", 3)
    images = [png(number) for number in range(40)]
    pq.write_table(pa.table({"image": images, "caption": list(map(str, range(40)))}), tmp_path / "rows.parquet")
    corpus, _ = read(tmp_path / "rows.parquet", duplicates="keep")
    assert len(corpus._groups) > 8
    assert "image" not in corpus.table.column_names
    for row in np.random.default_rng(0).permutation(40):
        assert corpus.image_bytes(int(row)) == images[row]
        assert len(corpus._read) <= 3
    assert corpus.image(7).tobytes() == load_rgb(images[7]).tobytes()
