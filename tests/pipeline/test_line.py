"""The whole line on 48 small pictures: build, resume, attribute, save and load."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastattr import (
    ArtifactDamagedError,
    ArtifactMismatchError,
    ArtifactNotFoundError,
    FastAttributor,
    Generator,
    InputError,
    NonFiniteError,
    QueriesFailedError,
)
from fastattr.cli.main import main
from fastattr.corpus.store import Corpus
from fastattr.features.candidates import read_candidates
from fastattr.generators.queries import Queries
from fastattr.pipeline.build import embed_assets, run
from fastattr.pipeline.config import load_config
from fastattr.pipeline.stages import STAGES
from fastattr.students.shares import UNASSIGNED
from fastattr.teachers import task, teach
from fastattr.teachers.scores import read_scores
from tests.tiny import draw


@pytest.fixture(scope="module")
def attributor(tiny_run: Path) -> FastAttributor:
    return FastAttributor.from_pretrained(tiny_run / "attributor")


def test_build_resumes_without_redoing_anything(tiny_run: Path, tiny_config: Path):
    """A second build that trained again would change the weights under scores that exist already."""
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*") if path.is_file()}
    run(load_config(tiny_config), tiny_run)
    after = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*") if path.is_file()}
    assert after == before


def test_other_settings_are_refused_in_the_same_run_folder(tiny_run: Path, tiny_config: Path, tmp_path: Path):
    """Silently keeping the old candidates would make every later figure one of other settings than the config's."""
    changed = tmp_path / "changed.yaml"
    changed.write_text(tiny_config.read_text().replace("per_query: 12", "per_query: 13"))
    with pytest.raises(ArtifactMismatchError, match="per_query: found 12, wanted 13"):
        STAGES["candidates"](load_config(changed), tiny_run)


def test_killed_teacher_finishes_the_rest_with_the_same_scores(tiny_run: Path, tiny_config: Path, tmp_path: Path, monkeypatch):
    """Resuming must neither skip nor repeat a query, nor draw other noise."""
    again = tmp_path / "run"
    shutil.copytree(tiny_run, again)
    shutil.rmtree(again / "scores")
    monkeypatch.setattr(teach, "PART_ROWS", 10)
    queries = Queries(again / "queries")
    trained = [query for query, split in zip(queries.query_ids, queries.splits, strict=True) if split == "train"]
    exact = len(queries.query_ids) - len(trained)
    candidates = read_candidates(again / "candidates")
    union = set().union(*(candidates[query][0] for query in trained))
    # Exact scores first, then the other queries' steps, then one pass over their candidates in parts of 10 images.
    deaths = {"query_step": {2, exact + 3}, "linearised_scores": {3}}
    calls = dict.fromkeys(deaths, 0)

    def dying(name, real):
        def call(*args, **kwargs):
            calls[name] += 1
            if calls[name] in deaths[name]:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    for module, name in ((task, "query_step"), (teach, "linearised_scores")):
        monkeypatch.setattr(module, name, dying(name, getattr(module, name)))
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            STAGES["teach"](load_config(tiny_config), again)
    STAGES["teach"](load_config(tiny_config), again)
    # Only what was interrupted was done twice.
    assert calls == {"query_step": len(queries.query_ids) + 2, "linearised_scores": -(-len(union) // 10) + 1}
    for ours, theirs in zip(read_scores(again / "scores"), read_scores(tiny_run / "scores"), strict=True):
        assert ours.query_id == theirs.query_id
        np.testing.assert_allclose(ours.influence, theirs.influence, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_failing_query_is_tried_three_times_then_passed_over(
    tiny_run: Path, tiny_config: Path, tmp_path: Path, monkeypatch, capsys, split: str
):
    """One bad query in weeks of scoring must cost neither the others nor go unseen."""
    again = tmp_path / "run"
    shutil.copytree(tiny_run, again)
    shutil.rmtree(again / "scores")
    queries = Queries(again / "queries")
    bad = queries.query_ids[queries.of_split(split)[1]]
    real, calls = task.query_step, []

    def fails_for_one(*args, **kwargs):
        calls.append(kwargs["query_id"])
        if kwargs["query_id"] == bad:
            raise NonFiniteError("the loss is nan")
        return real(*args, **kwargs)

    config = load_config(tiny_config)
    with monkeypatch.context() as patch:
        patch.setattr(task, "query_step", fails_for_one)
        with pytest.raises(QueriesFailedError, match=f"{bad}  NonFiniteError: the loss is nan"):
            STAGES["teach"](config, again)
        assert calls.count(bad) == 3
        assert main(["teach", str(tiny_config), "--run", str(again)]) == 2
        assert any(line.split()[:1] == [bad] for line in capsys.readouterr().err.splitlines())  # a line of the table
        calls = calls[: len(calls) - 3]
        assert len(calls) == len(queries.query_ids) + 2
        tolerant = replace(config, teacher=replace(config.teacher, allow_failures=1))
        copy = tmp_path / "tolerant"
        shutil.copytree(again, copy)
        manifest = STAGES["teach"](tolerant, copy)
        assert manifest["failures"] == {bad: "NonFiniteError: the loss is nan"}
        assert {query.query_id for query in read_scores(copy / "scores")} == set(queries.query_ids) - {bad}
    STAGES["teach"](config, again)
    for ours, theirs in zip(read_scores(again / "scores"), read_scores(tiny_run / "scores"), strict=True):
        assert ours.query_id == theirs.query_id
        np.testing.assert_allclose(ours.influence, theirs.influence, rtol=1e-5, atol=1e-6)


def test_training_and_test_queries_share_no_prompt_subject(tiny_run: Path):
    """A test prompt seen in training would make the student look better than it is."""
    queries = Queries(tiny_run / "queries")
    subjects = {
        split: {queries.prompts[row].split(", ")[0] for row in queries.of_split(split)}
        for split in ("train", "validation", "test")
    }
    assert not subjects["train"] & subjects["test"]
    assert not subjects["train"] & subjects["validation"]
    assert not subjects["validation"] & subjects["test"]


def test_score_table_loads_with_plain_datasets(tiny_run: Path, tmp_path: Path):
    """Splits, list columns and order as written, whole or streamed."""
    import datasets

    expected = {split: read_scores(tiny_run / "scores", split=split) for split in ("train", "validation", "test")}
    for streaming in (False, True):
        loaded = datasets.load_dataset(str(tiny_run / "scores"), streaming=streaming, cache_dir=str(tmp_path))
        assert set(loaded) == set(expected)
        for split, queries in expected.items():
            for record, query in zip(loaded[split], queries, strict=True):
                assert (record["query_id"], record["image_ids"]) == (query.query_id, query.image_ids)
                np.testing.assert_array_equal(np.float32(record["influence"]), query.influence)
                assert record["rank"][int(np.argmax(query.influence))] == 0


def test_generator_folder_loads_with_plain_diffusers(tiny_run: Path):
    """The generator is promised as a StableDiffusionPipeline that needs nothing of ours."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(tiny_run / "generator")  # no precision given: all parts must agree
    image = pipeline("red circle, plain style", num_inference_steps=2, guidance_scale=3.0).images[0]
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert image.size == (16, 16)


def test_generation_depends_on_prompt_and_seed_alone(tiny_run: Path):
    """A receipt that names prompt and seed must reproduce its image."""
    generator = Generator.from_pretrained(tiny_run / "generator")
    first = np.asarray(generator.generate("red circle", seed=5), dtype=int)
    np.testing.assert_array_equal(first, np.asarray(generator.generate("red circle", seed=5), dtype=int))
    assert np.abs(first - np.asarray(generator.generate("red circle", seed=6), dtype=int)).max() > 0
    batch = generator.generate_batch(["blue ring", "red circle"], seeds=[1, 5])
    assert np.abs(first - np.asarray(batch[1], dtype=int)).max() <= 1


def test_planted_copy_comes_first(tiny_run: Path, attributor: FastAttributor):
    """Rows shifted against ids anywhere in the line would name a neighbour instead."""
    corpus = Corpus(tiny_run / "corpus")
    images = [corpus.image(row) for row in range(len(corpus))]
    answers = attributor.attribute(images, [captions[0] for captions in corpus.captions], k=3)
    assert [answer.results[0].image_id for answer in answers] == corpus.image_ids


def test_results_equal_exhaustive_search_in_the_embeddings(attributor: FastAttributor):
    """Sorting the wrong way round, or by distance, would pass every test of shapes."""
    answer = attributor.attribute(draw("red", "ring", "plain"), "red ring, plain style", k=len(attributor))
    similarities = [result.similarity for result in answer.results]
    assert similarities == sorted(similarities, reverse=True)
    assert [result.rank for result in answer.results] == list(range(len(attributor)))
    assert {result.image_id for result in answer.results} == set(attributor.catalog["image_id"].to_pylist())


def test_one_image_and_a_batch_get_the_same_answer(attributor: FastAttributor):
    """An encoder that normalises over the batch would make answers depend on who else is asking."""
    images, prompts = [draw("red", "ring", "plain"), draw("blue", "square", "framed")], ["red ring", "a blue square"]
    together = attributor.attribute(images, prompts, k=5)
    for image, prompt, batch_answer in zip(images, prompts, together, strict=True):
        alone = attributor.attribute(image, prompt, k=5)
        assert [row.image_id for row in alone.results] == [row.image_id for row in batch_answer.results]
        np.testing.assert_allclose(
            [row.similarity for row in alone.results], [row.similarity for row in batch_answer.results], atol=1e-5
        )


def test_save_then_load_changes_nothing(attributor: FastAttributor, tmp_path: Path):
    """A file left out of the copy would only be missed on another machine."""
    attributor.save_pretrained(tmp_path / "copy")
    again = FastAttributor.from_pretrained(tmp_path / "copy")
    image = draw("green", "triangle", "plain")
    ours, theirs = (model.attribute(image, "green triangle", k=9).results for model in (attributor, again))
    assert ours == theirs


def test_shares_sum_to_one_and_follow_the_named_column(attributor: FastAttributor):
    """Shares of rows grouped by the wrong column would pay the wrong people."""
    answer = attributor.attribute(draw("red", "circle", "plain"), "red circle, plain style", k=7)
    for column in ("creator", "license", "source", "caption"):
        shares = answer.shares(by=column)
        assert list(shares)[:6] == [column, "share", "low", "high", "images", "named"]
        assert shares["share"].sum() == pytest.approx(1)
        assert shares[column].iloc[-1] == UNASSIGNED
        assert shares["named"].tolist() == [True] * (len(shares) - 1) + [False]
        assert set(shares[column].iloc[:-1]) <= set(attributor.catalog[column].to_pylist())
    with pytest.raises(InputError, match="not by 'colour'"):
        answer.shares(by="colour")


def test_thumbnails_belong_to_their_images(tiny_run: Path, attributor: FastAttributor):
    """A shifted thumbnail would show one creator's picture under another's name."""
    corpus = Corpus(tiny_run / "corpus")
    answer = attributor.attribute(draw("red", "circle", "plain"), "red circle, plain style", k=20)
    for result in answer.results:
        real = np.asarray(corpus.image(int(corpus.rows([result.image_id])[0])), dtype=float)
        assert np.abs(np.asarray(answer.thumbnail(result.image_id), dtype=float) - real).mean() < 25


@pytest.mark.parametrize("file", ["index.faiss", "model.safetensors", "catalog.parquet", "encoder/open_clip_model.safetensors"])
def test_damaged_file_is_refused(tiny_run: Path, tmp_path: Path, file: str):
    """A flipped bit in an index answers with wrong names, or crashes native code."""
    copy = tmp_path / "attributor"
    shutil.copytree(tiny_run / "attributor", copy)
    data = bytearray((copy / file).read_bytes())
    data[len(data) // 2] ^= 0x40
    (copy / file).write_bytes(bytes(data))
    with pytest.raises(ArtifactDamagedError, match=file):
        FastAttributor.from_pretrained(copy)
    (copy / file).unlink()
    with pytest.raises(ArtifactNotFoundError, match=file):
        FastAttributor.from_pretrained(copy)


def test_newer_format_is_refused(tiny_run: Path, tmp_path: Path):
    """Reading a newer layout with old eyes gives wrong answers without an error."""
    copy = tmp_path / "attributor"
    shutil.copytree(tiny_run / "attributor", copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    with pytest.raises(ArtifactMismatchError, match="upgrade"):
        FastAttributor.from_pretrained(copy)


def test_command_line_prints_the_promised_json(tiny_run: Path, tmp_path: Path, capsys):
    """Scripts parse these keys."""
    picture = tmp_path / "x.png"
    arguments = [
        "generate",
        str(tiny_run / "generator"),
        "--prompt",
        "red circle",
        "--seed",
        "3",
        "--out",
        str(picture),
        "--json",
    ]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 3
    arguments = [
        "attribute",
        str(tiny_run / "attributor"),
        "--image",
        str(picture),
        "--prompt",
        "red circle",
        "--top-k",
        "4",
        "--json",
    ]
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {"results", "seconds", "model"} <= set(printed)
    assert {"rank", "image_id", "similarity", "caption", "creator", "license", "source"} <= set(printed["results"][0])
    assert [row["rank"] for row in printed["results"]] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("image", "prompt", "top_k", "message"),
    [
        ("missing.png", "a cat", "5", "no image file"),
        ("text.png", "a cat", "5", "can't be read as an image"),
        ("empty.png", "a cat", "5", "can't be read as an image"),
        ("good.png", "  ", "5", "prompt is empty"),
        ("good.png", "a cat", "0", "top-k must be between 1 and 48"),
        ("good.png", "a cat", "49", "top-k must be between 1 and 48"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(tiny_run: Path, tmp_path: Path, capsys, image, prompt, top_k, message):
    """A traceback tells a user nothing, and exit code 0 or 1 tells a script the wrong thing."""
    (tmp_path / "text.png").write_text("this is no image")
    (tmp_path / "empty.png").write_bytes(b"")
    draw("red", "ring", "plain").save(tmp_path / "good.png")
    model = str(tiny_run / "attributor")
    assert main(["attribute", model, "--image", str(tmp_path / image), "--prompt", prompt, "--top-k", top_k]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("fastattr:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in error


def test_unknown_model_names_what_there_is(capsys):
    """'No such file' for a mistyped model name sends people looking for files."""
    assert main(["info", "emojii"]) == 2
    assert "there is no model 'emojii'" in capsys.readouterr().err


def test_embedded_models_hold_generator_attributor_and_how(tiny_run: Path, tiny_config: Path, tmp_path: Path):
    """Assets without their manifest could not be rebuilt or trusted."""
    manifest = embed_assets(load_config(tiny_config), tiny_run, tmp_path / "assets")
    assert set(manifest["stages"]) >= {"generator", "scores", "student"}
    generator = Generator.from_pretrained(tmp_path / "assets" / "generator")
    attributor = FastAttributor.from_pretrained(tmp_path / "assets" / "attributor")
    assert attributor.config["generator_fingerprint"] == generator.fingerprint
