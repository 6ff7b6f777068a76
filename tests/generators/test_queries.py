"""Queries: prompts from files and datasets, split by their text, and drawings that copy a training image."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastattr import ArtifactNotFoundError, InputError
from fastattr.corpus.store import Corpus
from fastattr.generators import queries as module
from fastattr.generators.queries import SPLITS, Queries, QueriesConfig, choose_prompts, read_prompts, run
from fastattr.pipeline.config import load_config
from tests.corpus.test_near_copies import retouched

PROMPTS = [f"prompt {number}" for number in range(60)]


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "parquet"])
def test_prompts_are_read_from_any_table(tmp_path: Path, suffix: str):
    """A header or an empty line taken for a prompt would be drawn and attributed."""
    path, texts = tmp_path / f"prompts.{suffix}", ["a cat", "", "a dog, sitting"]
    if suffix == "txt":
        path.write_text("\n".join(texts) + "\n")
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps({"p": text, "n": 1}) + "\n" for text in texts))
    elif suffix == "csv":
        path.write_text("n,p\n" + "".join(f'1,"{text}"\n' for text in texts))
    else:
        pq.write_table(pa.table({"n": [1, 2, 3], "p": texts}), path)
    assert list(read_prompts(str(path), "p")) == ["a cat", "a dog, sitting"]
    if suffix != "txt":
        with pytest.raises(InputError, match="prompt_column"):
            list(read_prompts(str(path), "q"))
    with pytest.raises(ArtifactNotFoundError):
        list(read_prompts(str(path.with_name(f"typo.{suffix}")), "p"))


def test_prompts_of_a_table_are_used_once_and_keep_their_split(tmp_path: Path):
    """A prompt in two splits, or one that changes its split as the table grows, leaks the test into the training."""
    config = QueriesConfig(train=10, validation=3, test=5, caption_share=0.0, recombined_share=0.0)
    chosen = choose_prompts(["a caption"], config, [*PROMPTS, *PROMPTS])
    assert len({prompt.text for prompt in chosen}) == len(chosen) == 18
    assert {prompt.kind for prompt in chosen} == {"free"}
    assert choose_prompts(["a caption"], config, PROMPTS[::-1]) == chosen
    split = {prompt.text: prompt.split for prompt in chosen}
    larger = choose_prompts(["a caption"], config, [*PROMPTS, *(f"other {number}" for number in range(60))])
    assert all(split.get(prompt.text, prompt.split) == prompt.split for prompt in larger)
    with pytest.raises(InputError, match="too few"):
        choose_prompts(["a caption"], config, PROMPTS[:5])


def test_training_prompts_are_drawn_several_times_and_no_other():
    """A prompt in two splits would leak; subjects shared out by drawings instead of prompts would leave the test too few."""
    captions = [f"thing {number}, {style} style" for number in range(60) for style in ("round", "flat")]
    sizes = {"validation": 10, "test": 20, "caption_share": 1.0, "recombined_share": 0.0}
    once = choose_prompts(captions, QueriesConfig(train=15, **sizes))
    often = choose_prompts(captions, QueriesConfig(train=58, train_drawings=4, **sizes))
    assert set(once) == set(often)
    counts = {split: Counter(prompt.text for prompt in often if prompt.split == split) for split in SPLITS}
    assert {split: sum(found.values()) for split, found in counts.items()} == {"train": 58, "validation": 10, "test": 20}
    assert set(counts["train"].values()) == {3, 4}
    assert set(counts["test"].values()) == {1}


def test_a_drawing_that_copies_a_training_image_names_it(
    tiny_run: Path, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A generator that has learned pictures by heart is what its owner must hear of first."""
    for part in ("corpus", "generator"):
        shutil.copytree(tiny_run / part, tmp_path / part)
    corpus, real = Corpus(tmp_path / "corpus"), module.draw_queries

    def draws_a_copy(*arguments, first: int, **options):
        rows = real(*arguments, first=first, **options)
        if first == 0:
            image = retouched(corpus.image(7)).resize((16, 16))
            image.save(tmp_path / "copy.png")
            rows[2]["image"] = {"bytes": (tmp_path / "copy.png").read_bytes(), "path": None}
        return rows

    monkeypatch.setattr(module, "draw_queries", draws_a_copy)
    config = replace(load_config(tiny_config).queries, train=3, validation=1, test=1, batch_size=5)
    manifest = run(config, tmp_path)
    assert Queries(tmp_path / "queries").table["near_copy_of"].to_pylist() == ["", "", corpus.image_ids[7], "", ""]
    assert manifest["near_copies"] == 1
