"""Settings for all tests: offline, no telemetry. They are read at import, so they come before any other import."""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    GRADIO_ANALYTICS_ENABLED="0",
    TOKENIZERS_PARALLELISM="false",
)

from pathlib import Path

import pytest

from tests.tiny import write_config, write_folder


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config for the whole line on 48 small pictures."""
    folder = tmp_path_factory.mktemp("tiny")
    return write_config(folder / "tiny.yaml", write_folder(folder / "pictures"))


@pytest.fixture(scope="session")
def tiny_run(tiny_config: Path) -> Path:
    """A finished run folder of that config; tests must not change it."""
    from fastattr.build import run
    from fastattr.config import load_config

    run_dir = tiny_config.parent / "run"
    run(load_config(tiny_config), run_dir)
    return run_dir
