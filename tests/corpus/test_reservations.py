"""fastattr/corpus/reservations.py: a creator's no is found wherever it stands, and nothing else is taken for one."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastattr.core.errors import ArtifactMismatchError, InputError
from fastattr.core.stages import fingerprint
from fastattr.corpus import reservations as module
from fastattr.corpus.images import load_rgb
from fastattr.corpus.near_copies import look_of
from fastattr.corpus.records import Skipped, TrainingImage
from fastattr.corpus.reservations import OptOuts, honoured, reservation_of, site_rules
from fastattr.corpus.stage import CorpusConfig, run
from fastattr.corpus.store import Corpus
from tests.made import write_attributor
from tests.reserved import ATTRIBUTE, ELEMENT, FORMATS, RESOURCE, picture, signed, write_cases, xmp

HAS_C2PA = importlib.util.find_spec("c2pa") is not None
needs_c2pa = pytest.mark.skipif(not HAS_C2PA, reason="needs the extra c2pa")
SIGNED = [("JPEG", "image/jpeg"), ("PNG", "image/png"), ("WEBP", "image/webp"), ("TIFF", "image/tiff"), ("AVIF", "image/avif")]


def skipped(folder: Path) -> dict[str, str]:
    return {row["name"]: row["reason"] for row in pq.read_table(folder / "skipped.parquet").to_pylist()}


def image(image_id: str = "a", data: bytes = b"", **fields: str) -> TrainingImage:
    return TrainingImage(image_id=image_id, image=data or picture(1), captions=["x"], **fields)


def test_a_corpus_leaves_out_the_reserved_and_nothing_else(tmp_path):
    """Judged wrong either way: a creator's no is trained on, or an image that nobody reserved is missing."""
    expected = write_cases(tmp_path / "pictures", c2pa=HAS_C2PA)
    manifest = run(CorpusConfig(kind="folder", path=str(tmp_path / "pictures")), tmp_path / "corpus")
    corpus = Corpus(tmp_path / "corpus")
    assert set(corpus.image_ids) == {name for name, reserved in expected.items() if not reserved}
    reasons = skipped(tmp_path / "corpus")
    assert set(reasons) == {name for name, reserved in expected.items() if reserved}
    assert all(reason.startswith("reserved by ") for reason in reasons.values())
    assert reasons["tdm-yes"] == "reserved by tdm-reservation (1, policy https://ada.example/tdm)"
    assert reasons["xmp-yes-png"].endswith("(http://ns.useplus.org/ldf/vocab/DMI-PROHIBITED-AIMLTRAINING)")
    noted = dict(zip(corpus.image_ids, corpus.column("metadata"), strict=True))
    assert {name for name, text in noted.items() if "reserved_" in text or "tdmrep" in text} == {
        "damaged-jpeg",
        "damaged-png",
        "site/free/site-no",
    }
    assert "XMP (no element found" in noted["damaged-jpeg"]
    assert manifest["reservations"]["reserved by plus:DataMining"] == len(FORMATS)
    assert manifest["reservations"]["not read: XMP"] == 2


def test_modes_differ_in_reserved_images_only(tmp_path):
    """The default must give the corpora of before to everybody whose images are not reserved."""
    (tmp_path / "plain").mkdir()
    for number, kind in enumerate(FORMATS):
        (tmp_path / "plain" / f"{kind}.png").write_bytes(picture(number, kind, xmp("ALLOWED") if number % 2 else b""))
        (tmp_path / "plain" / f"{kind}.txt").write_text("words")
    made = {}
    for mode in module.MODES:
        manifest = run(CorpusConfig(kind="folder", path=str(tmp_path / "plain"), reservations=mode), tmp_path / mode)
        made[mode] = (manifest["corpus_fingerprint"], (tmp_path / mode / "data-00000.parquet").read_bytes())
        assert manifest["reservations"] == {}
    assert made["exclude"] == made["list"] == made["ignore"]

    found = [image("b", picture(1, "JPEG", xmp("PROHIBITED"))), Skipped(name="c", reason="no caption")]
    assert [type(each) for each in honoured(found, "exclude")] == [Skipped, Skipped]
    assert list(honoured(found, "ignore")) == found
    noted, _ = honoured(found, "list")
    assert isinstance(noted, TrainingImage)
    assert json.loads(noted.metadata)["reserved_by"].startswith("plus:DataMining (http")


def test_a_corpus_made_before_there_were_reservations_stays_finished(tmp_path):
    """Else every finished run would have to be built again."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.png").write_bytes(picture(1))
    (tmp_path / "a" / "a.txt").write_text("words")
    config = CorpusConfig(kind="folder", path=str(tmp_path / "a"))
    run(config, tmp_path / "corpus")
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    for name in ("reservations", "opt_out"):
        del manifest["config"][name]
    for name in ("reservations", "opt_out_fingerprint"):
        del manifest[name]
    manifest["fingerprint"] = fingerprint({name: manifest[name] for name in ("stage", "config", "inputs")})
    (tmp_path / "corpus" / "manifest.json").write_text(json.dumps(manifest))
    assert run(config, tmp_path / "corpus") == manifest
    with pytest.raises(InputError, match="exclude, list, ignore"):
        CorpusConfig(reservations="honour")


# ---- XMP


@pytest.mark.parametrize("form", [ELEMENT, ATTRIBUTE, RESOURCE])
@pytest.mark.parametrize("wrapped", ["{}", "\ufeff{}", '<?xpacket begin="\ufeff" id="x"?>\n{}\n   \n<?xpacket end="w"?>\0\0'])
def test_a_property_is_found_in_every_way_to_write_it(form, wrapped):
    """Photoshop writes attributes, exiftool elements; a reader of one would miss the other."""
    packet = wrapped.format(xmp("PROHIBITED", form).decode()).encode()
    assert reservation_of(picture(1, "WEBP", packet), {})[0].startswith("plus:DataMining")


def test_what_a_packet_says_of_other_pictures_does_not_count():
    """The pantry of a montage holds the packets of its parts."""
    own = xmp("ALLOWED").decode()
    other = xmp("PROHIBITED").decode()
    inner = other[other.index("<rdf:Description") : other.index("</rdf:RDF>")]
    pantry = f'<q:Pantry xmlns:q="http://ns.adobe.com/xap/1.0/mm/"><rdf:Bag><rdf:li>{inner}</rdf:li></rdf:Bag></q:Pantry>'
    packet = own.replace("</rdf:Description>", pantry + "</rdf:Description>")
    assert reservation_of(picture(1, "JPEG", packet.encode()), {}) == ("", "")
    foreign = xmp("PROHIBITED").replace(b"ns.useplus.org/ldf/xmp", b"example.org/xmp")
    assert reservation_of(picture(1, "JPEG", foreign), {}) == ("", "")


def test_hostile_packets_are_listed_and_cost_nothing(monkeypatch):
    """An entity that doubles thirty times would fill the memory of whoever reads a stranger's picture."""
    laughs = "".join(f'<!ENTITY a{step} "&a{step - 1};&a{step - 1};">' for step in range(1, 30))
    bomb = f'<!DOCTYPE x [<!ENTITY a0 "ha">{laughs}]><x>&a29;</x>'.encode()
    file = picture(1, "WEBP", bomb)
    tracemalloc.start()
    said, unread = reservation_of(file, {})
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    assert (said, unread.partition(" (")[0]) == ("", "XMP")
    monkeypatch.setattr(module, "LONGEST_XMP", 100)
    assert reservation_of(picture(1, "WEBP", xmp("PROHIBITED")), {})[1].startswith("XMP (it is longer than 100")
    for damaged in (b"\xff\xfe\x00<", b"no packet", b"<a>" * 50, b"<a>" * 200_000):
        assert reservation_of(picture(1, "WEBP", damaged), {})[1].startswith("XMP (")


def test_packets_are_found_behind_the_pixels_and_in_other_formats():
    """Exiftool wrote PNG's packet at the end for years; Pillow reads none of a PSD or JPEG 2000."""
    file = picture(3, "PNG", xmp("PROHIBITED"))
    start = file.index(b"iTXt") - 4
    end = start + 12 + int.from_bytes(file[start : start + 4], "big")
    moved = file[:start] + file[end:-12] + file[start:end] + file[-12:]
    with Image.open(io.BytesIO(moved)) as opened:
        assert "xmp" not in opened.info
    assert reservation_of(moved, {})[0].startswith("plus:DataMining")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "BMP")
    assert reservation_of(buffer.getvalue() + xmp("PROHIBITED"), {})[0].startswith("plus:DataMining")


# ---- columns and sites


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"TDM_Reservation": "1.0"}, "tdm-reservation"),
        ({"tdm-reservation": "0", "tdm-policy": "https://a.example"}, ""),
        ({"tdm-reservation": "2"}, ""),
        ({"noai": "noai"}, "noai"),
        ({"noimageai": "true"}, "noimageai"),
        ({"noai": "False", "noimageai": "0"}, ""),
        ({"X-Robots-Tag": "somebot: noindex, noimageai"}, "x-robots-tag"),
        ({"x_robots_tag": "noindex, nofollow"}, ""),
        ({"robots": "max-image-preview:large"}, ""),
        ({"tdmrep.json": "1 for /", "tdm-reservation": "0"}, ""),
        ({"tdmrep.json": "0 for /1"}, ""),
        ({"mood": "noai", "title": "tdm-reservation 1"}, ""),
    ],
)
def test_columns(row, field):
    """Pandas makes 1.0 of 1 and 'False' of nothing; what is said of the picture goes before what is said of its site."""
    said, unread = reservation_of(picture(1), row)
    assert (said.partition(" (")[0], unread) == (field, "")


def test_what_img2dataset_left_out_is_counted_as_reserved(tmp_path):
    """It obeys the header, writes no image, and a corpus would list a failed download."""
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, data in (("000000000.jpg", picture(1, "JPEG")), ("000000000.txt", b"words"), ("000000000.json", b"{}")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    message = "Use of image disallowed by X-Robots-Tag directive"
    rows = [{"key": "000000001", "status": "failed_to_download", "error_message": message, "url": "https://a.example/1.jpg"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00000.parquet")
    manifest = run(CorpusConfig(kind="webdataset", path=str(tmp_path)), tmp_path / "run" / "corpus")
    assert manifest["reservations"] == {"reserved by x-robots-tag": 1}


def test_columns_of_a_table_of_urls_are_kept(tmp_path):
    """Only known columns of such a table are held in memory; the one that says no must be among them."""
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for number in range(2):
            row = json.dumps({"url": f"https://a.example/{number}", "caption": "words"}).encode()
            for suffix, data in (("jpg", picture(number, "JPEG")), ("json", row)):
                entry = tarfile.TarInfo(f"00000000{number}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    table = [{"url": f"https://a.example/{number}", "tdm_reservation": number} for number in range(2)]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "urls.parquet")
    config = CorpusConfig(kind="urls", path=str(tmp_path / "urls.parquet"), shards=str(tmp_path))
    manifest = run(config, tmp_path / "run" / "corpus")
    assert manifest["reservations"] == {"reserved by tdm-reservation": 1}


def test_the_nearest_rule_that_matches_first_counts(tmp_path):
    """As in TDMRep's own examples; a rule for the whole site would otherwise undo the exception before it."""

    def write(folder: str, *rules: tuple[str, int]) -> None:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        rows = [{"location": location, "tdm-reservation": value} for location, value in rules]
        (tmp_path / folder / "tdmrep.json").write_text(json.dumps(rows))

    write(".", ("/set/*/old%20ones/", 1), ("/set", 0))
    write("set/b/.well-known", ("/x.png$", 1), ("/art/*.jpg$", 0), ("/art", 1))
    names = ["a/old ones/1.png", "a/1.png", "b/x.png", "b/x.png.jpg", "b/art/1.jpg", "b/art/1.jpg.png", "b/other/1.png"]
    found = site_rules(names, tmp_path / "set")
    assert [found[name]["tdmrep.json"][0] for name in names] == list("1010010")
    assert site_rules(["1.png"], tmp_path / "elsewhere" / "deep") == {}
    (tmp_path / "set" / "tdmrep.json").write_text('{"location": "/"}')
    with pytest.raises(InputError, match="no list of rules"):
        site_rules(names, tmp_path / "set")


def test_a_site_file_that_came_later_is_noticed(tmp_path):
    """A finished corpus would go on as if nobody had said anything."""
    write_cases(tmp_path / "all" / "pictures", c2pa=False)
    config = CorpusConfig(kind="folder", path=str(tmp_path / "all" / "pictures"))
    run(config, tmp_path / "corpus")
    (tmp_path / "all" / "tdmrep.json").write_text('[{"location": "/", "tdm-reservation": 1}]')
    with pytest.raises(ArtifactMismatchError, match=r"tdmrep\.json"):
        run(config, tmp_path / "corpus")
    run(config, tmp_path / "again")
    assert Corpus(tmp_path / "again").image_ids == ["site/free/site-no", "tdm-no"]  # which say otherwise nearer to them


def test_coco_has_a_site_too(tmp_path):
    """Its reader keeps few columns."""
    (tmp_path / "val").mkdir()
    (tmp_path / "annotations").mkdir()
    for number in range(2):
        (tmp_path / "val" / f"{number}.jpg").write_bytes(picture(number, "JPEG"))
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(2)]
    captions = {"images": images, "annotations": [{"image_id": number, "caption": "words"} for number in range(2)]}
    (tmp_path / "annotations" / "captions_val.json").write_text(json.dumps(captions))
    (tmp_path / "val" / "tdmrep.json").write_text(
        '[{"location": "/1.jpg", "tdm-reservation": 1, "tdm-policy": "https://a.example"}]'
    )
    run(CorpusConfig(kind="coco", path=str(tmp_path), split="val"), tmp_path / "run" / "corpus")
    assert skipped(tmp_path / "run" / "corpus") == {"1": "reserved by tdmrep.json (1 for /1.jpg, policy https://a.example)"}


# ---- C2PA


@needs_c2pa
@pytest.mark.parametrize(("kind", "mime"), SIGNED)
@pytest.mark.parametrize("who", ["c2pa", "cawg"])
def test_signed_reservations(kind, mime, who):
    """Both labels are in use; 'constrained' asks for a permission that nobody has here."""
    label, purpose = f"{who}.training-mining", f"{who}.ai_generative_training"
    for use, said in (("notAllowed", f"{label} ({purpose} notAllowed)"), ("allowed", "")):
        assert reservation_of(signed(picture(1, kind), mime, label, use), {}) == (said, "")


@needs_c2pa
def test_a_no_survives_an_edit():
    """A resized copy carries its original's manifest under its own, which says nothing, or something else."""
    original = signed(picture(1, "JPEG"), "image/jpeg", "cawg.training-mining", "notAllowed")
    for own in ({}, {"label": "cawg.training-mining", "use": "allowed"}):
        edited = signed(picture(1, "JPEG"), "image/jpeg", parent=original, **own)
        assert reservation_of(edited, {})[0].startswith("cawg.training-mining")


@needs_c2pa
def test_a_damaged_manifest_is_listed():
    """One broken file must not stop a corpus."""
    file = signed(picture(1, "WEBP"), "image/webp", "cawg.training-mining", "notAllowed")
    at = file.index(b"jumdc2pa") + 60
    said, unread = reservation_of(file[:at] + bytes(30) + file[at + 30 :], {})
    assert not said
    assert unread.startswith("C2PA manifest (")


def test_without_the_extra_a_manifest_is_listed_as_not_read(monkeypatch):
    """Kept in silence, it would look like an image without reservations."""
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.warns(UserWarning, match=r"fastattr\[c2pa\]"):
        said, unread = reservation_of(picture(1, "JPEG") + b"jumdc2pa", {})
    assert (said, unread) == ("", "C2PA manifest (pip install 'fastattr[c2pa]')")


# ---- opt-out lists


def write_list(folder: Path, *lines: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "optout.txt"
    path.write_text("# who asked\n\n" + "\n".join(lines), encoding="utf-8")
    return path


def test_a_list_names_images_in_four_ways(tmp_path):
    """A name in other letters or a URL with another scheme is the same person's or picture's."""
    look = look_of(load_rgb(picture(7))).hex()
    listed = OptOuts(
        write_list(
            tmp_path,
            "id: a b",
            "creator:  ada   LOVELACE",
            "url: https://www.site.example/x/1.png",
            "url:art.example/*",
            "url: https://*",
            f"hash: {look}",
        )
    )
    for fields, reason in (
        ({"image_id": "a b"}, "id: a b"),
        ({"creator": "Ada Lovelace"}, "creator: Ada Lovelace"),
        ({"creator": "Bob, Ada Lovelace"}, "creator: Ada Lovelace"),
        ({"url": "http://site.example/x/1.png"}, "url: http://site.example/x/1.png"),
        ({"url": "https://art.example/deep/2.png"}, "url: https://art.example/deep/2.png"),
        ({"data": picture(7, "JPEG")}, "hash: a near-copy"),
        ({"creator": "Ada", "url": "https://site.example/x/1.pngx"}, ""),
        ({"creator": "", "url": ""}, ""),
        ({"url": "https://other.example"}, ""),
    ):
        (each,) = honoured([image(**fields)], "ignore", listed)
        assert (each.reason if isinstance(each, Skipped) else "") == (f"on the opt-out list ({reason})" if reason else "")
    for wrong in ("Ada", "artist: Ada", "creator:", "hash: 12ab"):
        with pytest.raises(InputError, match=r"optout\.txt:3"):
            OptOuts(write_list(tmp_path, wrong))
    with pytest.raises(InputError, match="cannot be read"):
        OptOuts(tmp_path / "none.txt")


def test_a_corpus_obeys_its_list_and_notices_when_it_grows(tmp_path):
    """The same path with one more name is another list."""
    write_cases(tmp_path / "pictures", c2pa=False)
    file = write_list(tmp_path / "lists", "id: plain-a")
    config = CorpusConfig(kind="folder", path=str(tmp_path / "pictures"), opt_out=str(file))
    manifest = run(config, tmp_path / "corpus")
    assert skipped(tmp_path / "corpus")["plain-a"] == "on the opt-out list (id: plain-a)"
    assert manifest["reservations"]["on the opt-out list"] == 1
    assert run(config, tmp_path / "corpus") == manifest
    write_list(tmp_path / "lists", "id: plain-a", "id: plain-b")
    with pytest.raises(ArtifactMismatchError, match="opt-out list"):
        run(config, tmp_path / "corpus")
    run(config, tmp_path / "again")
    assert {"plain-a", "plain-b"} <= set(skipped(tmp_path / "again"))


def test_hashes_find_thumbnails(tmp_path):
    """An attributor has no pictures but these, small and lossy."""
    from fastattr.attributor.make import thumbnail_bytes

    pictures = [picture(number) for number in range(6)]
    listed = OptOuts(write_list(tmp_path, f"hash: {look_of(load_rgb(pictures[2])).hex()}"))
    columns = {"image_id": list("abcdef"), "creator": [""] * 6, "url": [""] * 6}
    with pytest.raises(InputError, match="thumbnails"):
        listed.listed_in(pa.table(columns))
    thumbnails = [thumbnail_bytes(load_rgb(data), quality=40) for data in pictures]
    assert listed.listed_in(pa.table(columns | {"thumbnail": thumbnails})) == ["c"]


def test_remove_and_serve_take_the_same_list(tmp_path, monkeypatch, capsys):
    """Three readers of one file would come to disagree."""
    from fastattr import FastAttributor
    from fastattr.cli.main import main

    file = write_list(tmp_path / "lists", "creator: ada", "id: base-0", "id: never-there")
    folder = write_attributor(tmp_path / "made", rows=10)
    assert main(["remove", str(folder)]) == 2
    assert main(["remove", str(folder), "--list", str(file)]) == 0
    capsys.readouterr()
    left = FastAttributor.from_pretrained(folder)
    assert left.catalog["image_id"].to_pylist() == ["base-2", "base-4", "base-6", "base-8"]
    assert left.history()[0]["reason"] == "opt-out list optout.txt"

    http = pytest.importorskip("fastattr.serving.http")
    monkeypatch.setattr(http.uvicorn, "run", lambda app, **_: served.append(app))
    served: list[object] = []
    other = write_attributor(tmp_path / "served", rows=10)
    assert main(["serve", str(other), "--opt-out", str(file)]) == 0
    assert len(served) == 1
    assert len(FastAttributor.from_pretrained(other)) == 4


def test_info_says_what_the_corpus_left_out(tmp_path, capsys):
    """Whoever gets an attributor has no skipped.parquet to count in."""
    from fastattr.attributor.folder import read_config, seal
    from fastattr.cli.main import main
    from fastattr.core.files import write_json

    folder = write_attributor(tmp_path / "made", rows=10)
    assert main(["info", str(folder), "--json"]) == 0
    assert "reservations" not in json.loads(capsys.readouterr().out)
    settings = {name: value for name, value in read_config(folder).items() if name != "seal"}
    write_json(folder / "config.json", seal({**settings, "reservations": {"reserved by noai": 3}}))
    assert main(["info", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reservations"] == {"reserved by noai": 3}
