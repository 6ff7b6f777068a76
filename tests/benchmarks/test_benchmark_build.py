"""The build's benchmark: its config is a user's, and its pictures are new to the generator."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import build as benchmark

from fastattr.corpus.emoji import ICONIFY, OPENMOJI
from fastattr.pipeline.config import load_config


@pytest.mark.parametrize("sizes", [benchmark.FULL, benchmark.QUICK])
def test_the_config_has_ten_lines_and_is_valid(tmp_path: Path, sizes: dict[str, int]):
    """The promise is ten lines, and a config that is refused would show only after the LoRA is trained."""
    text = benchmark.CONFIG.format(folder=tmp_path, **sizes)
    (tmp_path / "studio.yaml").write_text(text)
    assert len(text.splitlines()) == 10
    assert load_config(tmp_path / "studio.yaml").generator.unlearn == "lora"


def test_the_pictures_are_none_that_the_generator_was_made_from():
    """A generator that knows the pictures already would make the LoRA's attribution look easy."""
    packages = {each.package.rpartition("@")[0] for each in (OPENMOJI, *ICONIFY)}
    assert not packages & {each.package.rpartition("@")[0] for each in benchmark.SETS}
