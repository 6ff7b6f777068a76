"""Receipts: what was answered is verified, and everything that differs is named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastattr import ArtifactDamagedError, Attribution, FastAttributor, FormatVersionError, InputError
from fastattr.attributor.attribution import content_sha256
from fastattr.attributor.receipts import read_receipt, verify
from fastattr.cli.main import main
from tests.made import QUERY, base_features, write_attributor
from tests.tiny import draw


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_attributor(tmp_path / "attributor")


@pytest.fixture
def receipt(folder: Path, tmp_path: Path) -> Path:
    """The receipt of ten images for one query."""
    answer = FastAttributor.from_pretrained(folder).attribute_features(QUERY[None], ["a prompt"], 10)[0]
    (tmp_path / "receipt.json").write_text(answer.to_json())
    return tmp_path / "receipt.json"


def changed(receipt: Path, change) -> Path:
    values = json.loads(receipt.read_text())
    change(values)
    receipt.write_text(json.dumps(values))
    return receipt


def test_a_receipt_holds_versions_query_and_answers(receipt):
    """An auditor has nothing else."""
    values = json.loads(receipt.read_text())
    assert set(values["versions"]) == {"model", "index", "catalog", "catalog_version"}
    assert re.fullmatch(r"[0-9a-f]{64}", values["query"]["sha256"])
    assert (values["query"]["prompt"], values["query"]["k"], len(values["results"])) == ("a prompt", 10, 10)
    assert {"image_id", "rank", "similarity", "creator", "license"} <= set(values["results"][0])


def test_an_unchanged_attributor_says_the_same(folder, receipt):
    """A check that finds differences in the same answer would be switched off."""
    assert verify(read_receipt(receipt), FastAttributor.from_pretrained(folder)) == []


def test_each_change_since_is_named(folder, receipt):
    """'Something differs' helps no auditor."""
    ids = [result["image_id"] for result in json.loads(receipt.read_text())["results"]]
    attributor = FastAttributor.from_pretrained(folder)
    attributor.remove([ids[0]])
    attributor.update({ids[1]: {"creator": "Eve"}})
    attributor.add_features(QUERY[None], ["c"], [{"image_id": "new"}])
    text = "\n".join(verify(read_receipt(receipt), attributor))
    assert "catalog_version: the receipt has 1" in text
    assert f"{ids[0]} (rank 0) has been removed" in text
    assert f"{ids[1]}: creator was" in text
    assert "is 'Eve'" in text
    assert "new is now named (rank 0)" in text
    assert len(text.splitlines()) == 5  # and the catalogue's checksum


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda values: values["results"][3].update(similarity=0.99), "similarity was 0.99"),
        (lambda values: values["results"][3].update(creator="Eve"), "creator was 'Eve'"),
        (lambda values: values["results"][0].update(image_id="base-never"), "base-never (rank 0) is not among"),
        (lambda values: values["versions"].update(index="0" * 64), "index: the receipt has 000000000000"),
    ],
)
def test_a_forged_receipt_is_found_out(folder, receipt, change, says):
    """The point of a receipt."""
    assert says in "\n".join(verify(read_receipt(changed(receipt, change)), FastAttributor.from_pretrained(folder)))


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("results"),
        lambda values: values["query"].update(embedding="!"),
        lambda values: values["query"].update(embedding="AADAfw=="),  # a NaN
        lambda values: values["results"].reverse(),
        lambda values: values.update(versions=3),
    ],
)
def test_a_damaged_receipt_is_refused(receipt, change):
    """A receipt that is read half would pass the half."""
    with pytest.raises(ArtifactDamagedError):
        read_receipt(changed(receipt, change))


def test_a_receipt_of_another_format_is_refused(receipt):
    """Fields may mean something else there."""
    with pytest.raises(FormatVersionError):
        read_receipt(changed(receipt, lambda values: values.update(format="fastattr-receipt-9")))


def test_the_image_itself_is_replayed(tiny_run, tmp_path):
    """With the image, encoders and student are held to the receipt as well; another image is not the receipt's."""
    attributor = FastAttributor.from_pretrained(tiny_run / "attributor")
    answer = attributor.attribute(draw("red", "ring", "plain"), "red ring", k=5)
    assert isinstance(answer, Attribution)
    receipt = json.loads(answer.to_json())
    assert verify(receipt, attributor, image=draw("red", "ring", "plain")) == []
    assert receipt["results"][0]["image_part"] is not None
    assert verify(receipt, attributor) == []
    assert "not those of the receipt" in verify(receipt, attributor, image=draw("blue", "ring", "plain"))[0]
    vector = np.frombuffer(np.random.default_rng(0).standard_normal(8).astype("<f4").tobytes(), dtype="<f4")
    other = attributor.replay(vector / np.linalg.norm(vector), "red ring", 5).to_dict()
    forged = {**receipt, "query": {**receipt["query"], "embedding": other["query"]["embedding"]}}
    plain = attributor.plain(draw("red", "ring", "plain"), "red ring", k=5)
    (tmp_path / "plain.json").write_text(plain.to_json())
    with pytest.raises(InputError, match="plain similarity and holds no embedding"):
        read_receipt(tmp_path / "plain.json")
    assert "embedding differs" in "\n".join(verify(forged, attributor, image=draw("red", "ring", "plain")))


@pytest.mark.parametrize(
    ("key", "says"), [("shares", "Eve: share was 0.900"), ("above_noise", "all above noise: low was 0.990")]
)
def test_a_forged_share_is_found_out(key, says):
    """Money goes by shares: a receipt that holds other ones than its attributor gives, with a fitting hash, must not pass."""
    attributor = FastAttributor.from_pretrained(Path(__file__).parent / "golden" / "tiny")
    values = json.loads(attributor.attribute(draw("red", "ring", "plain"), "red ring", k=5).to_json())
    assert values["above_noise"]["low"] <= values["above_noise"]["share"] <= values["above_noise"]["high"]
    assert verify(values, attributor) == []
    assert "its SHA-256" in verify({**values, "date": "2001-01-01"}, attributor)[0]
    row = {"creator": "Eve", "share": 0.9, "low": 0.8, "high": 1.0, "named": True}
    values[key] = [row] if key == "shares" else {"share": 0.99, "low": 0.99, "high": 1.0}
    values["sha256"] = content_sha256(values)
    assert says in "\n".join(verify(values, attributor))
    values["shares"] = [{"creator": "Eve", "named": True, "share": "all"}]
    with pytest.raises(ArtifactDamagedError, match="shares are damaged"):
        verify({**values, "sha256": content_sha256(values)}, attributor)


def test_the_command_says_same_or_what_differs(folder, receipt, capsys):
    """A pipeline goes by the exit code."""
    assert main(["verify", str(receipt)]) == 0
    assert "is what" in capsys.readouterr().out
    FastAttributor.from_pretrained(folder).remove(["base-1"])
    assert main(["verify", str(receipt), "--json"]) == 1
    captured = capsys.readouterr()
    assert not json.loads(captured.out)["same"]
    assert "differences" in captured.err
    assert main(["verify", str(receipt), "--model", "nowhere/else-x", "--revision", "v1"]) == 2


def test_commands_change_a_folder(tmp_path, tiny_run, capsys):
    """The command line is how opt-outs will be done."""
    own = tmp_path / "own"
    FastAttributor.from_pretrained(tiny_run / "attributor").save_pretrained(own)
    (tmp_path / "more").mkdir()
    draw("red", "ring", "plain").rotate(45).save(tmp_path / "more" / "turned.png")
    (tmp_path / "more" / "turned.txt").write_text("a turned ring")
    assert main(["add", str(own), str(tmp_path / "more")]) == 0
    draw("blue", "ring", "plain").rotate(45).save(tmp_path / "more" / "second.png")
    (tmp_path / "more" / "second.txt").write_text("a second ring")
    assert main(["add", str(own), str(tmp_path / "more")]) == 0  # as after a run that was stopped between the two
    assert "added 1 images, 1 were there, 0 skipped" in capsys.readouterr().out
    assert main(["update", str(own), "turned", "creator=Eve", "license=CC0-1.0"]) == 0
    first = FastAttributor.from_pretrained(own).catalog["image_id"][0].as_py()
    assert main(["remove", str(own), first, "--reason", "asked"]) == 0
    assert main(["compact", str(own)]) == 0
    catalog = {record["image_id"]: record for record in FastAttributor.from_pretrained(own).catalog.to_pylist()}
    assert len(catalog) == 49
    assert catalog["turned"]["creator"] == "Eve"
    assert first not in catalog
    capsys.readouterr()
    assert main(["remove", "emoji", first]) == 2
    assert "save_pretrained" in capsys.readouterr().err


def test_many_queries_are_divided_among_processes_and_answered_as_one_by_one(folder, tmp_path):
    """A part that is done twice, or by nobody, would be seen by no one."""
    queries = base_features(25, seed=77)
    rows = [{"query_id": f"q{i}", "prompt": "p", "features": row.tolist()} for i, row in enumerate(queries)]
    (tmp_path / "queries.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    code = (
        "import sys; from accelerate import debug_launcher; from fastattr.attributor import many; from pathlib import Path\n"
        "many.PART_ROWS = 4\n"
        "def work():\n"
        f"    many.run({str(folder)!r}, Path({str(tmp_path / 'queries.jsonl')!r}), Path({str(tmp_path / 'out')!r}), k=3)\n"
        "if __name__ == '__main__':\n    debug_launcher(work, num_processes=2)\n"
    )
    (tmp_path / "launch.py").write_text(code)
    done = subprocess.run([sys.executable, tmp_path / "launch.py"], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    import pyarrow.parquet as pq

    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["processes"] == 2
    found = [row for part in sorted((tmp_path / "out").glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
    assert sorted(row["query_id"] for row in found) == sorted(f"q{i}" for i in range(25))
    attributor = FastAttributor.from_pretrained(folder)
    for row in found:
        answer = attributor.attribute_features(queries[int(row["query_id"][1:])][None], ["p"], 3)[0]
        assert row["image_ids"] == [result.image_id for result in answer.results]
        np.testing.assert_allclose(row["similarities"], [result.similarity for result in answer.results], atol=1e-5)


def test_a_receipt_keeps_its_hash_on_the_way_through_a_browser():
    """JavaScript writes 1.0 as 1 and -0.0 as 0; the page's receipts would all count as changed."""
    sent = {"results": [{"rank": 0, "similarity": 1.0, "share": -0.0}], "model": {"name": "a"}}
    back = {"results": [{"rank": 0, "similarity": 1, "share": 0}], "model": {"name": "b"}}
    assert content_sha256(sent) == content_sha256(back)
    assert content_sha256(sent) != content_sha256({**sent, "results": [{"rank": 1, "similarity": 1.0, "share": 0.0}]})
