"""Settings for all tests: offline, no telemetry. The Hub's libraries read them when a test first imports them.

HF_ENDPOINT is an address on this machine where nothing answers until a test asks for the `hub` fixture.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.tiny import write_config, write_folder

if TYPE_CHECKING:
    from tests.loopback_hub import LoopbackHub

ENDPOINT = socket.socket()
ENDPOINT.bind(("127.0.0.1", 0))

os.environ.update(
    HF_ENDPOINT=f"http://127.0.0.1:{ENDPOINT.getsockname()[1]}",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    GRADIO_ANALYTICS_ENABLED="0",
    TOKENIZERS_PARALLELISM="false",
)


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config for the whole line on 48 small pictures."""
    folder = tmp_path_factory.mktemp("tiny")
    return write_config(folder / "tiny.yaml", write_folder(folder / "pictures"))


@pytest.fixture(scope="session")
def tiny_run(tiny_config: Path) -> Path:
    """A finished run folder of that config; tests must not change it.

    Made by one thread, as each process of `accelerate launch` has: more threads add up in another order, which may turn
    a pixel of a drawing over, and with it the drawing's scores by a per cent.
    """
    import torch

    from fastattr.pipeline.build import run
    from fastattr.pipeline.config import load_config

    run_dir, threads = tiny_config.parent / "run", torch.get_num_threads()
    torch.set_num_threads(1)
    run(load_config(tiny_config), run_dir)
    torch.set_num_threads(threads)
    return run_dir


@pytest.fixture(scope="session")
def hub_server() -> Iterator[LoopbackHub]:
    """The loopback Hub at HF_ENDPOINT, for the whole session."""
    from tests.loopback_hub import Server

    with Server(ENDPOINT) as hub:
        yield hub


@pytest.fixture
def hub(hub_server: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """An empty loopback Hub, an empty cache, and a token that may write; the network is on, as far as 127.0.0.1."""
    from huggingface_hub import constants

    from tests.loopback_hub import WRITE_TOKEN

    hub_server.reset()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    return hub_server


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate remembers one precision for a whole process: what one test has left would be another's error."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
