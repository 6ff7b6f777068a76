"""models.py against the loopback Hub with the real client: what is pushed comes back, faults are met or refused."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastattr import (
    ArtifactDamagedError,
    ArtifactNotFoundError,
    Attribution,
    EncoderMismatchError,
    FastAttributor,
    FormatVersionError,
    HubError,
    IncompleteDownloadError,
    InputError,
    MissingFileError,
    RevisionNotFoundError,
)
from fastattr.attributor.folder import seal
from fastattr.attributor.load import read_info
from fastattr.attributor.make import build_attributor
from fastattr.core.files import read_json, sha256_file, write_json
from fastattr.core.models import TRIES, split_revision
from fastattr.index.choose import IndexConfig
from fastattr.publishing.push import push_folder
from tests.loopback_hub import READ_TOKEN, Fault, LoopbackHub, regular
from tests.tiny import draw

ID = "org/tiny"


@pytest.fixture(scope="module")
def folder(tiny_run: Path) -> Path:
    """A finished attributor folder."""
    return tiny_run / "attributor"


@pytest.fixture(scope="module")
def sharded(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same attributor with its index in three shards."""
    target = tmp_path_factory.mktemp("sharded") / "attributor"
    config = read_json(tiny_run / "attributor" / "config.json")
    build_attributor(
        IndexConfig(factory="SQfp16", shard_rows=20),
        tiny_run,
        target,
        encoders=config["encoders"],
        captions=config["captions"],
        thumbnail_quality=40,
    )
    return target


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the clients would have waited between tries."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def push(folder: Path, **options: object) -> str:
    """Push an attributor folder as a user would; the commit's URL."""
    return FastAttributor.from_pretrained(folder).push_to_hub(ID, **options)


def answer(attributor: FastAttributor) -> Attribution:
    """All training images for one drawing."""
    result = attributor.attribute(draw("red", "ring", "plain"), "red ring, plain style", k=len(attributor))
    assert isinstance(result, Attribution)
    return result


def changed(folder: Path, target: Path, change: Callable[[dict], None]) -> Path:
    """A copy of an attributor folder with another config.json."""
    shutil.copytree(folder, target)
    config = read_json(target / "config.json")
    change(config)
    write_json(target / "config.json", seal(config))
    return target


def send(hub: LoopbackHub, folder: Path) -> None:
    """Put a folder on the Hub as it is, past fastattr's own checks."""
    push_folder(folder, ID, message="as it is")


def test_what_is_pushed_answers_to_the_bit(hub, folder):
    """A rounding, reordering or half-precision step on the way would change answers and crash nothing."""
    before = answer(FastAttributor.from_pretrained(folder))
    url = push(folder)
    pulled = FastAttributor.from_pretrained(ID)
    assert url == f"{hub.url}/{ID}/commit/{hub.repo(ID).branches['main']}"
    assert answer(pulled).results == before.results
    assert any(file.sha256 for file in hub.repo(ID).files().values())  # through LFS
    picture = before.results[0].image_id
    assert answer(pulled).thumbnail(picture).tobytes() == before.thumbnail(picture).tobytes()


def test_save_after_pull_writes_the_same_files(hub, folder, tmp_path):
    """A pulled attributor that can't be saved whole can't be passed on."""
    push(folder)
    FastAttributor.from_pretrained(ID).save_pretrained(tmp_path / "saved")
    for path in folder.rglob("*"):
        if path.is_file():
            assert sha256_file(path) == sha256_file(tmp_path / "saved" / path.relative_to(folder))


def test_pushing_the_same_again_makes_no_commit(hub, folder):
    """Every needless commit makes every user download again."""
    first = push(folder)
    assert push(folder) == first
    assert len(hub.repo(ID).log) == 2  # the Hub's own first commit, and ours


def test_dry_run_sends_nothing_and_tells_all(hub, folder):
    """A dry run that creates the repository has already published its name."""
    from fastattr.publishing.publish import push_attributor

    dry = push_attributor(folder, ID, dry_run=True, tag="auto")
    assert hub.repos == {}
    assert {line.split()[0] for line in hub.requests} == {"GET"}
    done = push_attributor(folder, ID, tag="auto")
    assert (dry.sent, dry.tag) == (done.sent, done.tag)
    assert set(hub.repo(ID).files()) == {*done.sent, ".gitattributes"}
    assert push_attributor(folder, ID, dry_run=True, tag="auto").sent == {}


def test_a_tag_names_the_contents_and_is_not_moved(hub, folder, sharded):
    """A release that changes under its name can't be reproduced."""
    push(folder, tag="v1")
    assert hub.repo(ID).tags["v1"] == hub.repo(ID).branches["main"]
    push(folder, tag="v1")
    with pytest.raises(InputError, match="already has a tag 'v1'"):
        push(sharded, tag="v1")
    assert len(hub.repo(ID).log) == 2
    push(sharded, tag="v2")
    assert answer(FastAttributor.from_pretrained(f"{ID}@v1")).model["index_sha256"] == sha256_file(folder / "index.faiss")
    assert set(hub.repo(ID).files()) & {"index.faiss"} == set()  # the old index is gone from main, not from v1


def test_branch_pull_request_and_private(hub, folder):
    """Each is an argument that a client may silently ignore."""
    url = push(folder, private=True, revision="next")
    assert hub.repo(ID).private
    assert url.endswith(hub.repo(ID).branches["next"])
    assert set(hub.repo(ID).files("main")) == {".gitattributes"}
    assert push(folder, create_pr=True) == f"{hub.url}/{ID}/discussions/1"
    assert set(hub.repo(ID).files("main")) == {".gitattributes"}
    assert len(FastAttributor.from_pretrained(ID, revision="next")) == 48
    assert len(FastAttributor.from_pretrained(ID, revision="refs/pr/1")) == 48
    with pytest.raises(InputError, match="pull request"):
        push(folder, create_pr=True, tag="v1")


def test_files_of_others_are_left_alone(hub, folder, sharded):
    """Deleting what fastattr did not write would lose a user's own pictures of the card."""
    push(folder)
    names = ["figures/own.png", "lora/mine.safetensors", "data/train.parquet", "notes.jsonl", "own.faiss", "encoder/mine.json"]
    own = {name: regular(b"mine") for name in names}
    hub.repo(ID).branches["main"] = hub.repo(ID).commit(hub.repo(ID).files() | own, "by hand")
    push(sharded)
    assert set(names) <= set(hub.repo(ID).files())
    assert "index.faiss" not in hub.repo(ID).files()


def test_a_config_of_something_else_lists_nothing_to_delete(hub, folder):
    """A repository that held another model first: its files are that model's."""
    push(folder)
    other = {"config.json": regular(b'{"sha256": {"weights.bin": "x"}}'), "weights.bin": regular(b"theirs")}
    hub.repo(ID).branches["main"] = hub.repo(ID).commit(other, "another model")
    push(folder)
    assert "weights.bin" in hub.repo(ID).files()


def test_a_dry_run_needs_no_network(folder, monkeypatch):
    """What would be published is looked at before anyone may log in."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    words = FastAttributor.from_pretrained(folder).push_to_hub(ID, dry_run=True)
    assert "would send  index.faiss" in words
    assert "Not compared with what is there" in words
    with pytest.raises(HubError):
        FastAttributor.from_pretrained(folder).push_to_hub(ID)


def test_too_many_files_are_refused_before_anything_is_sent(hub, tmp_path):
    """Above 250 files the client splits a push, and readers see half of it."""
    for number in range(251):
        (tmp_path / f"{number}.txt").write_text(str(number))
    with pytest.raises(InputError, match="251 files, a push takes at most 250"):
        push_folder(tmp_path, ID, message="many")
    assert hub.requests == []


def test_only_what_is_asked_for_is_downloaded(hub, sharded):
    """A server that needs one shard must not fetch them all, nor thumbnails that nobody will see."""
    push(sharded)
    whole = answer(FastAttributor.from_pretrained(sharded))
    hub.sent.clear()
    part = FastAttributor.from_pretrained(ID, thumbnails=False, shards=[1])
    files = read_json(sharded / "config.json")["sha256"]
    left_out = {"thumbnails.parquet", "plain.faiss", "index-00000-of-00003.faiss", "index-00002-of-00003.faiss"}
    assert set(hub.sent) == {"config.json", *files} - left_out
    catalog = part.catalog["image_id"].to_pylist()
    expected = [result.image_id for result in whole.results if 20 <= catalog.index(result.image_id) < 40]
    assert [result.image_id for result in answer(part).results] == expected
    with pytest.raises(InputError, match="thumbnails=False"):
        answer(part).thumbnail(expected[0])
    with pytest.raises(MissingFileError, match=r"loaded without .*thumbnails"):
        part.push_to_hub(ID)
    hub.sent.clear()
    assert answer(FastAttributor.from_pretrained(ID)).results == whole.results
    assert set(hub.sent) == left_out  # the rest was there
    with pytest.raises(InputError, match="shards 0 to 2"):
        FastAttributor.from_pretrained(ID, shards=[3])


def test_shards_answer_like_one_index(folder, sharded):
    """A shard whose rows start elsewhere would name other images."""
    one, three = answer(FastAttributor.from_pretrained(folder)), answer(FastAttributor.from_pretrained(sharded))
    assert three.results == one.results


def test_reading_what_is_known_fetches_no_model(hub, folder):
    """The page shows sizes and licences before the models are there."""
    push(folder)
    hub.sent.clear()
    assert read_info(ID)["images"] == 48
    assert set(hub.sent) == {"config.json", "catalog.parquet", "metrics.json"}


def test_cached_models_work_without_the_network(hub, folder, monkeypatch, waits):
    """Offline use must need no other code, whether the network is switched off or simply down."""
    from huggingface_hub import constants

    push(folder)
    expected = answer(FastAttributor.from_pretrained(ID)).results
    asked = len(hub.requests)
    assert answer(FastAttributor.from_pretrained(ID, local_files_only=True)).results == expected
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert answer(FastAttributor.from_pretrained(ID)).results == expected
    assert len(hub.requests) == asked
    hub.faults.append(Fault(".", times=1000, status=503))
    assert answer(FastAttributor.from_pretrained(ID)).results == expected


def test_every_request_says_who_asks(hub, folder):
    """The Hub counts a library's downloads by its user agent."""
    from fastattr import __version__

    push(folder)
    hub.agents.clear()
    FastAttributor.from_pretrained(ID)
    assert hub.agents
    assert all(f"fastattr/{__version__}" in agent for agent in hub.agents)


def test_dtype_of_the_encoders_changes_answers_little_and_is_not_another_encoder(folder):
    """Half precision must not be taken for weights of another revision."""
    import torch

    full = answer(FastAttributor.from_pretrained(folder))
    half = answer(FastAttributor.from_pretrained(folder, dtype=torch.bfloat16))
    similarity = {result.image_id: result.similarity for result in half.results}
    np.testing.assert_allclose(
        [similarity[result.image_id] for result in full.results], [r.similarity for r in full.results], atol=0.1
    )
    assert similarity != {result.image_id: result.similarity for result in full.results}


# Each thing that can be wrong with what is asked for is an error of its own, with the way out.


def test_wrong_revision_lists_those_there_are(hub, folder):
    """A typing error in a tag is the commonest mistake."""
    push(folder, tag="v1")
    with pytest.raises(RevisionNotFoundError, match=r"no revision 'v2'; it has the branches main and the tags v1"):
        FastAttributor.from_pretrained(ID, revision="v2")


def test_two_revisions_are_refused():
    """One of the two would be ignored."""
    assert split_revision("org/name@v1", None) == ("org/name", "v1")
    with pytest.raises(InputError, match="give one of them"):
        split_revision("org/name@v1", "v2")


def test_missing_file_is_named(hub, folder, tmp_path):
    """Loading what is there would answer with a part of the model."""
    shutil.copytree(folder, tmp_path / "part")
    (tmp_path / "part" / "index.faiss").unlink()
    send(hub, tmp_path / "part")
    with pytest.raises(MissingFileError, match=r"has no index.faiss"):
        FastAttributor.from_pretrained(ID)
    with pytest.raises(MissingFileError, match=r"no config.json"):
        FastAttributor.from_pretrained(tmp_path)


def test_newer_format_says_upgrade(hub, folder, tmp_path):
    """An old reader that guesses at a new format answers wrongly."""
    send(hub, changed(folder, tmp_path / "newer", lambda config: config.update(format_version=99)))
    with pytest.raises(FormatVersionError, match=r"format version 99.*upgrade"):
        FastAttributor.from_pretrained(ID)


def test_encoders_of_another_revision_are_refused(hub, folder, tmp_path):
    """Features of other weights look like features and rank at random."""

    def other(config: dict) -> None:
        config["encoder_fingerprints"][0] = "0" * 16

    send(hub, changed(folder, tmp_path / "other", other))
    with pytest.raises(EncoderMismatchError, match=r"fingerprints \['0000000000000000'"):
        FastAttributor.from_pretrained(ID)


def test_partial_download_is_refused_offline_and_finished_online(hub, folder):
    """A process killed half-way leaves a cache that must not pass for the model."""
    push(folder)
    read_info(ID)
    with pytest.raises(IncompleteDownloadError, match=r"only a part.*goes on where it stopped"):
        FastAttributor.from_pretrained(ID, local_files_only=True)
    assert len(FastAttributor.from_pretrained(ID)) == 48


def test_nothing_in_the_cache_is_said_so(hub, folder):
    """'Not found' alone would send users to look for a spelling mistake."""
    push(folder)
    with pytest.raises(ArtifactNotFoundError, match="not in the cache, and the network is switched off"):
        FastAttributor.from_pretrained(ID, local_files_only=True)


def test_damaged_folder_is_not_pushed(hub, folder, tmp_path):
    """The Hub would hand the damage on to everyone, each with an error of their own."""
    from fastattr.publishing.publish import push_attributor

    shutil.copytree(folder, tmp_path / "damaged")
    with (tmp_path / "damaged" / "index.faiss").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactDamagedError, match="SHA-256"):
        push_attributor(tmp_path / "damaged", ID)
    assert hub.repos == {}


def test_config_that_points_outside_its_folder_is_refused(hub, folder, tmp_path):
    """A hostile repository must not make us read a user's other files."""

    def outside(config: dict) -> None:
        config["sha256"]["../../secret"] = "0" * 64

    send(hub, changed(folder, tmp_path / "hostile", outside))
    with pytest.raises(ArtifactDamagedError, match="outside its folder"):
        FastAttributor.from_pretrained(ID)


# Faults on purpose.


def test_dropped_connection_is_taken_up_where_it_broke(hub, folder, monkeypatch, waits):
    """Starting over would never finish a large index on a bad line."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    push(folder)
    hub.faults.append(Fault("^GET .*/catalog.parquet", drop_at=3000))
    expected = answer(FastAttributor.from_pretrained(folder)).results
    assert answer(FastAttributor.from_pretrained(ID)).results == expected
    assert any(int(wanted.removeprefix("bytes=").split("-")[0]) >= 1000 for wanted in hub.ranges)


def test_connection_that_keeps_breaking_is_an_error_then_resumes(hub, folder, waits):
    """Given up, the download must neither pass for whole nor be lost."""
    push(folder)
    hub.faults.append(Fault("^GET .*/index.faiss", times=1000, drop_at=100))
    with pytest.raises(HubError, match=r"broke.*goes on where it stopped"):
        FastAttributor.from_pretrained(ID)
    hub.faults.clear()
    assert len(FastAttributor.from_pretrained(ID)) == 48


@pytest.mark.parametrize("line", ["^GET /api/models/", "^HEAD .*/resolve/", "^GET .*/resolve/"])
def test_rate_limit_is_waited_for_as_long_as_it_says(hub, folder, waits, line):
    """A client that ignores Retry-After is blocked for longer."""
    push(folder)
    hub.faults.append(Fault(line, times=2, status=429, headers={"Retry-After": "7"}))
    assert len(FastAttributor.from_pretrained(ID)) == 48
    assert any(wait >= 7 for wait in waits)


@pytest.mark.parametrize("line", ["^GET /api/models/", "^HEAD .*/resolve/", "^GET .*/resolve/"])
def test_burst_of_server_errors_is_outlasted(hub, folder, waits, line):
    """The Hub answers 5xx for some seconds now and then."""
    push(folder)
    hub.faults.append(Fault(line, times=3, status=503))
    assert len(FastAttributor.from_pretrained(ID)) == 48
    assert waits


@pytest.mark.parametrize("line", ["preupload", "objects/batch", "^PUT /lfs", "/commit/", "/api/repos/create"])
def test_push_outlasts_a_burst_of_server_errors(hub, folder, waits, line):
    """A push that dies at the last request has uploaded everything for nothing."""
    hub.faults.append(Fault(line, times=2, status=502))
    push(folder)
    assert len(hub.repo(ID).log) == 2
    assert len(FastAttributor.from_pretrained(ID)) == 48


def test_server_that_stays_down_is_an_error(hub, folder, waits):
    """Trying without end hangs a job that should fail."""
    push(folder)
    hub.faults.append(Fault(".", times=1000, status=500))
    with pytest.raises(HubError, match=r"can't be reached|failed"):
        FastAttributor.from_pretrained(ID)
    assert len(waits) < 10 * TRIES


def test_commit_that_came_in_between_is_built_upon(hub, folder, waits):
    """Overwriting it would lose the other's work; refusing would lose ours."""

    def other() -> None:
        repo = hub.repo(ID)
        files = repo.files() | {"by-another.txt": regular(b"hello")}
        repo.branches["main"] = repo.commit(files, "by another")

    hub.faults.append(Fault("/commit/main", before=other))
    push(folder)
    assert hub.repo(ID).files()["by-another.txt"].data == b"hello"
    assert hub.repo(ID).log[-2:] == ["by another", "Push attributor"]


def test_endless_conflict_is_refused_with_the_way_out(hub, folder, waits):
    """412 for ever must not loop for ever."""
    hub.faults.append(Fault("/commit/main", times=1000, status=412))
    with pytest.raises(HubError, match="push again"):
        push(folder)
    assert len(hub.repo(ID).log) == 1


def test_access_is_refused_in_words(hub, folder, monkeypatch):
    """401, 403 and 404 look alike to a user who has no account at hand."""
    push(folder, private=True)
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    with pytest.raises(HubError, match=r"refuses access.*403.*hf auth login"):
        push(folder, commit_message="mine", revision="other")
    assert len(FastAttributor.from_pretrained(ID)) == 48
    with pytest.raises(HubError, match=r"refuses access.*401"):
        FastAttributor.from_pretrained(ID, token="hf_wrong", force_download=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ArtifactNotFoundError, match="no model repository 'org/tiny', or it is private"):
        FastAttributor.from_pretrained(ID, force_download=True)
    with pytest.raises(ArtifactNotFoundError, match="no model repository 'org/nothing'"):
        FastAttributor.from_pretrained("org/nothing")


def test_gated_repository_says_where_to_ask(hub, folder):
    """A gate looks like a missing file to those who never met one."""
    push(folder)
    hub.repo(ID).gated = True
    with pytest.raises(HubError, match=rf"is gated: accept its conditions at {hub.url}/{ID}"):
        FastAttributor.from_pretrained(ID, token=READ_TOKEN)


def test_truncated_object_is_refused_and_can_be_fetched_again(hub, folder, waits):
    """A short index that FAISS reads may crash or answer from a part."""
    push(folder)
    hub.faults.append(Fault("^GET .*/index.faiss", times=1000, change=lambda data: data[:-10]))
    with pytest.raises(IncompleteDownloadError, match=r"shorter or longer.*force_download=True"):
        FastAttributor.from_pretrained(ID)
    hub.faults.clear()
    assert len(FastAttributor.from_pretrained(ID, force_download=True)) == 48


@pytest.mark.parametrize("file", ["index.faiss", "model.safetensors", "catalog.parquet", "encoder/open_clip_model.safetensors"])
def test_altered_object_is_refused_and_can_be_fetched_again(hub, folder, file):
    """The same length, other bytes: only the checksum in config.json can tell."""
    push(folder)
    hub.faults.append(Fault(f"^GET .*/{file}", times=1000, change=lambda data: data[:-1] + bytes([data[-1] ^ 1])))
    with pytest.raises(ArtifactDamagedError, match=r"SHA-256.*force_download=True"):
        FastAttributor.from_pretrained(ID)
    hub.faults.clear()
    assert len(FastAttributor.from_pretrained(ID, force_download=True)) == 48


def test_xet_carries_the_files_where_the_hub_offers_it(hub, folder, tmp_path, monkeypatch):
    """Xet is how real uploads go; its client has a local backend for this."""
    hf_xet = pytest.importorskip("hf_xet")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    files = [str(path) for path in folder.rglob("*") if path.suffix in {".faiss", ".parquet", ".safetensors"}]
    hub.xet_folder = tmp_path / "xet"
    hub.xet_folder.mkdir()
    hashes = hf_xet.hash_files(files)
    hub.xet_hashes = {sha256_file(path): found.hash for path, found in zip(files, hashes, strict=True)}
    push(folder)
    assert not any("/lfs/" in line for line in hub.requests)
    assert answer(FastAttributor.from_pretrained(ID)).results == answer(FastAttributor.from_pretrained(folder)).results
