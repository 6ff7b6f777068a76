"""Where new things go: each test adds one of the five that CONTRIBUTING.md names, in less than thirty lines."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastattr.core.files import sha256_file
from tests.tiny import unit


def test_a_teacher_is_a_method_and_a_function(tiny_run: Path, tiny_config: Path, tmp_path: Path, monkeypatch):
    """`teachers/config.py` names the method, `teachers/teach.py` says what scores a task's queries."""
    from fastattr.pipeline.config import load_config
    from fastattr.teachers import config, teach
    from fastattr.teachers.scores import read_scores

    def by_age(task) -> None:
        """The later an image came into the corpus, the more influential."""
        for row in range(len(task.queries.query_ids)):
            task.write(row, task.rows_of(row).astype(np.float32), 0.0)

    monkeypatch.setattr(config, "METHODS", (*config.METHODS, "age"))
    monkeypatch.setitem(teach.SCORED_BY, "age", by_age)
    run_dir = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    shutil.rmtree(run_dir / "scores")
    teach.run(replace(load_config(tiny_config).teacher, method="age"), run_dir)
    scored = read_scores(run_dir / "scores")
    assert len(scored) == 12
    assert all(query.influence.max() <= 47 for query in scored)


def test_a_feature_space_is_an_encoder_and_its_kind(tiny_run: Path, tmp_path: Path, monkeypatch):
    """`features/kinds.py` opens it by the first word of its name; the stage does the rest."""
    from fastattr.corpus.store import Corpus
    from fastattr.features import kinds, stage
    from fastattr.features.store import folders, read_features

    class MeanColour:
        """Three numbers an image."""

        specification, fingerprint = "mean-colour:1", "mean-colour-1"

        def encode(self, images, captions) -> np.ndarray:
            return np.array([np.asarray(image).mean(axis=(0, 1)) for image in images], dtype=np.float32)

    monkeypatch.setitem(kinds.KINDS, "mean-colour", lambda reference, options: MeanColour())
    run_dir = Path(shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("*features*")))
    stage.run(stage.FeaturesConfig(encoders=("mean-colour:1",)), run_dir)
    corpus = Corpus(run_dir / "corpus")
    found = read_features(folders(run_dir, "features", ["mean-colour:1"]), [corpus.image_ids[5]])[0]
    expected = np.asarray(corpus.image(5)).mean(axis=(0, 1))
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_a_corpus_reader_is_a_source_of_parts(tmp_path: Path, monkeypatch):
    """`corpus/stage.py` opens a source by its kind: parts, each of which yields training images."""
    from fastattr.corpus import stage
    from fastattr.corpus.records import Part, TrainingImage
    from fastattr.corpus.store import Corpus
    from tests.tiny import draw

    def strip(config, leave_out=()):
        """A film strip: PATH names its colours."""
        images = []
        for number, colour in enumerate(Path(config.path).read_text().split()):
            draw(colour, "circle", "plain").save(tmp_path / "frame.png")
            frame = (tmp_path / "frame.png").read_bytes()
            images.append(TrainingImage(image_id=f"{number}", image=frame, captions=[f"a {colour} circle"]))
        return stage.Source([Part("strip", lambda: iter(images))])

    opened = stage.open_source
    monkeypatch.setattr(stage, "KINDS", (*stage.KINDS, "strip"))
    monkeypatch.setattr(
        stage, "open_source", lambda config, *more: (strip if config.kind == "strip" else opened)(config, *more)
    )
    (tmp_path / "colours.txt").write_text("red green blue")
    stage.run(stage.CorpusConfig(kind="strip", path=str(tmp_path / "colours.txt"), duplicates="keep"), tmp_path / "corpus")
    assert [texts[0] for texts in Corpus(tmp_path / "corpus").captions] == ["a red circle", "a green circle", "a blue circle"]


def test_an_index_kind_is_a_line_in_what_may_be_chosen(tmp_path: Path, monkeypatch):
    """`index/choose.py` lists FAISS factory strings, the most desirable first; building and searching know any of them."""
    from fastattr.index import build as building, choose
    from fastattr.index.search import open_ranked
    from fastattr.index.tune import recall_of

    listed = choose.kinds
    monkeypatch.setattr(choose, "kinds", lambda rows, dim, *, recall: ["SQ6", *listed(rows, dim, recall=recall)])
    assert choose.choose(1000, 32) == "SQ6"
    vectors = unit(np.random.default_rng(0), 1000, 32)
    settings = building.build(lambda start, stop: vectors[start:stop], 1000, 32, choose.IndexConfig(), tmp_path)
    assert settings["index"] == "SQ6"
    ranked = open_ranked(tmp_path, settings, {path.name: sha256_file(path) for path in tmp_path.iterdir()})
    queries = unit(np.random.default_rng(1), 20, 32)
    found, exact = ranked.search(queries, 10)[1], np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    assert recall_of(found, exact) > 0.9


def test_a_page_view_is_a_function_and_its_title(tiny_run: Path, monkeypatch):
    """`space/tabs.py` lays it out, `VIEWS` in `space/app.py` names it."""
    pytest.importorskip("gradio")
    import gradio as gr
    from fastattr.space import app

    from fastattr import FastAttributor, Generator

    def creators(page: app.Page, tab: gr.Tab) -> None:
        """Everyone in the catalogue."""
        gr.Markdown("Drawn by " + ", ".join(sorted({str(name) for name in page.attributor.catalog["creator"].to_pylist()})))

    monkeypatch.setitem(app.VIEWS, "Creators", creators)
    generator = Generator.from_pretrained(tiny_run / "generator")
    demo = app.create_demo(generator, FastAttributor.from_pretrained(tiny_run / "attributor"))
    parts = [part["props"] for part in demo.config["components"]]
    assert [props["label"] for props in parts if props.get("label") == "Creators"]
    assert [props["value"] for props in parts if str(props.get("value", "")).startswith("Drawn by ")]
