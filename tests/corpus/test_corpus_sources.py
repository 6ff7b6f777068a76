"""COCO, webdataset shards, URLs, datasets of several files: read in parts by many, with nothing lost and nothing silent."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastattr.core.errors import ArtifactNotFoundError, InputError
from fastattr.corpus import stage as corpus_module
from fastattr.corpus.near_copies import look_of, looks_of
from fastattr.corpus.stage import CorpusConfig, open_source, run
from fastattr.corpus.store import Corpus


def jpeg(number: int, quality: int = 90) -> bytes:
    """A smooth picture of its own for each number."""
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_shard(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    with tarfile.open(path, "w") as archive:
        for key, files in samples:
            for suffix, data in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def sample(key: str, number: int, **metadata: Any) -> tuple[str, dict[str, bytes]]:
    url = f"https://host{number}.example/{number}.jpg"
    own = {"key": key, "url": url, "caption": f"picture {number}", "status": "success", **metadata}
    return key, {"jpg": jpeg(number), "txt": f"picture {number}\n".encode(), "json": json.dumps(own).encode()}


@pytest.fixture
def laion(tmp_path: Path) -> Path:
    """Two shards as img2dataset writes them: six samples, one failed download, one broken image, one without caption."""
    folder = tmp_path / "laion"
    folder.mkdir()
    first = [
        sample("000000000", 0, similarity=0.31, NSFW="UNLIKELY", LICENSE="cc-by"),
        sample("000000001", 1, similarity=None, NSFW="UNSURE", LICENSE="?"),
        ("000000002", {"jpg": b"broken", "txt": b"broken", "json": b'{"url": "https://x.example/2.jpg"}'}),
    ]
    write_shard(folder / "00000.tar", first)
    rows = [{"key": f"00000000{number}", "url": f"https://host{number}.example/{number}.jpg"} for number in range(4)]
    rows[3] |= {"status": "failed_to_download", "error_message": "HTTP Error 404: Not Found"}
    pq.write_table(pa.Table.from_pylist(rows[3:] + rows[:3]), folder / "00000.parquet")
    second = [sample("000010000", 3), sample("000010001", 4), ("000010002", {"jpg": jpeg(5), "txt": b"  "})]
    write_shard(folder / "00001.tar", second)
    return folder


def skipped(folder: Path) -> dict[str, str]:
    table = pq.read_table(folder / "skipped.parquet").to_pydict()
    return dict(zip(table["name"], table["reason"], strict=True))


def test_webdataset_keeps_captions_and_laions_columns_and_lists_what_failed(laion: Path, tmp_path: Path):
    """Failed downloads are a large part of LAION: a corpus that does not say so looks complete."""
    run(CorpusConfig(kind="webdataset", path=str(laion)), tmp_path / "corpus")
    corpus = Corpus(tmp_path / "corpus")
    assert corpus.image_ids == ["000000000", "000000001", "000010000", "000010001"]
    assert corpus.captions == [[f"picture {number}"] for number in (0, 1, 3, 4)]
    assert corpus.column("url")[0] == "https://host0.example/0.jpg"
    assert corpus.column("source")[0] == "host0.example"
    assert corpus.column("license") == ["cc-by", "?", "", ""]
    assert corpus.column("nsfw") == ["UNLIKELY", "UNSURE", "", ""]
    assert corpus.column("similarity") == ["0.31", "", "", ""]
    assert [corpus.image_bytes(row) for row in range(4)] == [jpeg(number) for number in (0, 1, 3, 4)]
    assert skipped(tmp_path / "corpus") == {
        "000000002": "not a readable image (unknown format)",
        "000000003": "not in its shard (HTTP Error 404: Not Found)",
        "000010002": "no caption",
    }


def test_a_shard_that_breaks_off_is_listed_and_the_others_are_read(laion: Path, tmp_path: Path):
    """One truncated download of thousands must not stop the corpus, nor pass unseen."""
    data = (laion / "00001.tar").read_bytes()
    (laion / "00001.tar").write_bytes(data[: len(data) // 3])
    run(CorpusConfig(kind="webdataset", path=str(laion)), tmp_path / "corpus")
    assert Corpus(tmp_path / "corpus").image_ids[:2] == ["000000000", "000000001"]
    assert any("breaks off" in reason and "00001.tar" in name for name, reason in skipped(tmp_path / "corpus").items())


def test_keys_that_count_from_0_in_every_shard_get_the_shards_name(tmp_path: Path):
    """Two images of one id would stop the corpus, or share their scores."""
    for shard, number in (("a", 0), ("b", 1)):
        write_shard(tmp_path / f"{shard}.tar", [sample("0", number)])
    run(CorpusConfig(kind="webdataset", path=str(tmp_path)), tmp_path / "corpus")
    assert Corpus(tmp_path / "corpus").image_ids == ["a/0", "b/0"]


def test_urls_find_their_images_in_the_shards_and_the_others_are_listed(laion: Path, tmp_path: Path):
    """Captions of the table go before those of the shards, and a URL without an image is no silent loss."""
    rows = [
        {"URL": f"https://host{number}.example/{number}.jpg", "TEXT": f"caption {number}", "NSFW": "NSFW"}
        for number in (0, 4, 7)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "urls.parquet")
    run(CorpusConfig(kind="urls", path=str(tmp_path / "urls.parquet"), shards=str(laion)), tmp_path / "corpus")
    corpus = Corpus(tmp_path / "corpus")
    captions = {image_id: texts[0] for image_id, texts in zip(corpus.image_ids, corpus.captions, strict=True)}
    assert captions == {
        "000000000": "caption 0",
        "000000001": "picture 1",
        "000010000": "picture 3",
        "000010001": "caption 4",
    }
    assert corpus.column("nsfw")[0] == "NSFW"
    assert skipped(tmp_path / "corpus")["https://host7.example/7.jpg"] == "its image is in no shard"
    pq.write_table(pa.table({"TEXT": ["a"]}), tmp_path / "urls.parquet")
    with pytest.raises(InputError, match="no column 'url'"):
        open_source(CorpusConfig(kind="urls", path=str(tmp_path / "urls.parquet"), shards=str(laion)))


def test_coco_keeps_all_captions_of_an_image_its_licence_and_url(tmp_path: Path):
    """COCO lists captions apart from images; matched by position they would all be wrong."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2017").mkdir()
    annotations = {
        "licenses": [{"id": 4, "name": "Attribution License"}],
        "images": [
            {"id": 9, "file_name": "000000000009.jpg", "license": 4, "flickr_url": "https://flickr.example/9"},
            {"id": 2, "file_name": "000000000002.jpg", "license": 1, "coco_url": "https://coco.example/2"},
            {"id": 5, "file_name": "000000000005.jpg"},
            {"id": 7, "file_name": "000000000007.jpg"},
        ],
        "annotations": [
            {"image_id": 2, "caption": "a dog "},
            {"image_id": 9, "caption": "a cat"},
            {"image_id": 2, "caption": "one dog"},
            {"image_id": 5, "caption": "gone"},
        ],
    }
    (tmp_path / "annotations" / "captions_train2017.json").write_text(json.dumps(annotations))
    for number in (2, 7, 9):
        (tmp_path / "train2017" / f"00000000000{number}.jpg").write_bytes(jpeg(number))
    (tmp_path / "train2017" / "other.jpg").write_bytes(jpeg(1))
    run(CorpusConfig(kind="coco", path=str(tmp_path), split="train2017"), tmp_path / "corpus")
    corpus = Corpus(tmp_path / "corpus")
    assert dict(zip(corpus.image_ids, corpus.captions, strict=True)) == {
        "000000000002": ["a dog", "one dog"],
        "000000000009": ["a cat"],
    }
    assert corpus.column("license") == ["", "Attribution License"]
    assert corpus.column("url") == ["https://coco.example/2", "https://flickr.example/9"]
    assert skipped(tmp_path / "corpus") == {
        "000000000005": "not a readable image (no bytes: the file is missing, empty or may not be read)",
        "000000000007": "no caption",
        "other.jpg": "not in captions_train2017.json",
    }
    with pytest.raises(ArtifactNotFoundError, match="captions_val"):
        run(CorpusConfig(kind="coco", path=str(tmp_path), split="val"), tmp_path / "other")


@pytest.mark.parametrize("text", ['{"images": []}', "[1]", '{"images": [{"id": 1}], "annotations": []}', '{"annotations": 3}'])
def test_annotations_that_are_not_cocos_are_refused(tmp_path: Path, text: str):
    """'KeyError: annotations' does not name the file."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_train.json").write_text(text)
    with pytest.raises(InputError, match=r"captions_train\.json is no list of COCO's captions"):
        run(CorpusConfig(kind="coco", path=str(tmp_path)), tmp_path / "corpus")


def test_a_dataset_of_several_files_keeps_its_ids(tmp_path: Path):
    """Positions counted by whichever process comes first would name other images in the next run."""
    from datasets import Dataset, Features, Image as ImageFeature, Value

    features = Features({"image": ImageFeature(), "caption": Value("string")})
    (tmp_path / "data").mkdir()
    for file in range(2):
        rows = {"image": [{"bytes": jpeg(10 * file + row), "path": None} for row in range(3)], "caption": ["a", "b", "c"]}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / f"{file}.parquet")
    manifest = run(CorpusConfig(kind="dataset", path=str(tmp_path / "data")), tmp_path / "corpus")
    expected = [f"0000{file}-00000000{row}" for file in range(2) for row in range(3)]
    assert Corpus(tmp_path / "corpus").image_ids == expected
    assert manifest == run(CorpusConfig(kind="dataset", path=str(tmp_path / "data")), tmp_path / "again")


@pytest.fixture
def with_copies(tmp_path: Path) -> Path:
    """Four pictures: b has the bytes of a, d is c saved again."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, data in {"a": jpeg(1), "b": jpeg(1), "c": jpeg(2), "d": jpeg(2, quality=70)}.items():
        (folder / f"{name}.jpg").write_bytes(data)
        (folder / f"{name}.txt").write_text(f"picture {name}")
    return folder


@pytest.mark.parametrize("duplicates", ["", "skip", "family", "keep"])
def test_copies_are_left_out_and_listed_or_kept_as_a_family(with_copies: Path, tmp_path: Path, duplicates: str):
    """A picture that is in the corpus twice would be paid twice; one that vanished without a word could never be asked for."""
    manifest = run(CorpusConfig(kind="folder", path=str(with_copies), duplicates=duplicates), tmp_path / "corpus")
    corpus = Corpus(tmp_path / "corpus")
    families = dict(zip(corpus.image_ids, corpus.column("family"), strict=True))
    if duplicates in {"", "skip"}:
        assert families == {"a": "", "c": ""}
        assert skipped(tmp_path / "corpus") == {
            "b": "same bytes as another image (a)",
            "d": "near-copy of another image (c)",
        }
        assert manifest["skipped"] == {"same bytes as another image": 1, "near-copy of another image": 1}
    elif duplicates == "family":
        assert families == {"a": "a", "b": "a", "c": "c", "d": "c"}
        assert manifest["near_copies"] == 2
    else:
        assert families == dict.fromkeys("abcd", "")
    assert len(corpus.looks()) == len(corpus)
    looks = looks_of([look_of(corpus.image(row)) for row in range(len(corpus))])
    np.testing.assert_array_equal(corpus.looks().signs, looks.signs)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_a_killed_corpus_goes_on_with_the_part_that_is_missing(laion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At LAION's size a corpus takes days: what is read once must not be read again, and must not come twice."""
    config = CorpusConfig(kind="webdataset", path=str(laion))
    run(config, tmp_path / "whole" / "corpus")
    real, read = corpus_module.write_part, []

    def dies_at_the_second(images: Any, path: Path, **options: Any) -> None:
        read.append(path.name)
        if len(read) == 2:
            raise KeyboardInterrupt
        real(images, path, **options)

    monkeypatch.setattr(corpus_module, "write_part", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "killed" / "corpus")
    run(config, tmp_path / "killed" / "corpus")
    assert len(read) == 3
    assert read[0] != read[1] == read[2]
    assert digests(tmp_path / "killed" / "corpus") == digests(tmp_path / "whole" / "corpus")
    assert list((tmp_path / "killed").iterdir()) == [tmp_path / "killed" / "corpus"]
