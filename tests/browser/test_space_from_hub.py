"""The Space as it was pushed, run from what is pulled, in a real Chromium: page, generator and attributor all from the Hub."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from chromium import generate, image_ids, open_browser

from fastattr import FastAttributor, Generator
from fastattr.publishing.publish import push_all
from tests.loopback_hub import LoopbackHub

pytestmark = pytest.mark.browser
PROMPT = "red circle, plain style"


def test_pushed_space_shows_what_the_pushed_models_say(hub: LoopbackHub, tiny_run: Path, tmp_path: Path) -> None:
    """A file left out of the push, or a model named wrongly, would only show on the Space's own machine."""
    from huggingface_hub import snapshot_download

    push_all(tiny_run, "tiny", "org")
    folder = snapshot_download("org/tiny-space", repo_type="space", local_dir=tmp_path / "space")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), **hub.repo("org/tiny-space", "space").variables}
    command = [sys.executable, "app.py", "--port", str(port)]
    page_server = subprocess.Popen(command, cwd=folder, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True)
    try:
        assert page_server.stdout is not None
        lines = iter(page_server.stdout.readline, "")
        assert any("fastattr is ready" in line for line in lines), "the page ended before it was ready"
        with open_browser() as browser:
            page = browser.new_page()
            requests: list[str] = []
            page.on("request", lambda sent: requests.append(sent.url))
            page.goto(f"http://127.0.0.1:{port}")
            generate(page, PROMPT)
            shown = image_ids(page)
            assert all(url.startswith((f"http://127.0.0.1:{port}", "data:", "blob:")) for url in requests)
    finally:
        page_server.terminate()
        page_server.wait(10)
    image = Generator.from_pretrained(tiny_run / "generator").generate(PROMPT, seed=0)
    expected = FastAttributor.from_pretrained(tiny_run / "attributor").attribute(image, PROMPT, k=20)
    assert sorted(shown) == sorted(result.image_id for result in expected.results)
