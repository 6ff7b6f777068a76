"""hub_scripts/: every config is valid and says what it is, every script explains itself, runs and pushes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastattr.pipeline.config import load_config
from tests.loopback_hub import LoopbackHub

SCRIPTS = Path(__file__).parents[2] / "hub_scripts"
CONFIGS = sorted(SCRIPTS.rglob("*.yaml"))
RUNNABLE = sorted(path for path in SCRIPTS.glob("*.py") if path.name != "common.py")
ONE_PROCESS_FOR_ALL = """
import contextlib, io, runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    with contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    print("=====")
"""


def run(*command: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a command from the repository; its output."""
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **settings},
        cwd=SCRIPTS.parent,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_there_is_a_config_for_each_kind_of_user():
    """The walk below would pass on an empty folder."""
    assert {path.stem for path in CONFIGS} >= {"emoji", "folder-lora", "coco", "sd15-laion"}


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_config_is_valid_and_opens_with_source_cost_and_launch(path: Path):
    """A setting that was renamed would be found by whoever starts a run of a thousand hours."""
    assert load_config(path).name == path.stem
    opening = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))[0]
    for heading in ("# Source", "# Cost: ", "# Launch: "):
        assert heading in opening
    commands = re.findall(r"hub_scripts/[\w./-]+", opening)
    assert commands
    assert all((SCRIPTS.parent / name).exists() for name in commands)
    assert any(name.endswith(path.name) for name in commands)


def test_every_script_explains_itself():
    """--help is the only documentation that is always at hand."""
    done = run("-c", ONE_PROCESS_FOR_ALL, *map(str, RUNNABLE), PYTHONPATH=str(SCRIPTS))
    helps = done.stdout.split("=====")[:-1]
    assert len(helps) == len(RUNNABLE) >= 4, done.stderr[-3000:]
    for script, text in zip(RUNNABLE, helps, strict=True):
        for words in ("--config", "--push-to-hub NAMESPACE", "--dry-run", f"python hub_scripts/{script.name} --config"):
            assert words in text
        assert re.search(r"accelerate launch", text) or script.name == "push.py"


def test_script_pushes_what_it_made(hub: LoopbackHub, tiny_run: Path, tiny_config: Path, tmp_path: Path):
    """The flag must push the stage's own artifact, and nothing else."""
    settings = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "ACCELERATE_USE_CPU": "true"}
    options = ["--config", str(tiny_config), "--run", str(tiny_run), "--push-to-hub", "org", "--private"]
    done = run(str(SCRIPTS / "distill.py"), *options, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(hub.repos) == {("model", "org/tiny-attributor")}
    assert hub.repo("org/tiny-attributor").private
    assert len(hub.repo("org/tiny-attributor").tags) == 1
    assert f"{hub.url}/org/tiny-attributor/commit/" in done.stdout
