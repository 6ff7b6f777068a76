"""Runs a function of a test module on two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

CODE = """
import sys
from accelerate import debug_launcher
from {module} import {name}
if __name__ == "__main__":
    debug_launcher({name}, args=tuple(sys.argv[1:]), num_processes=2)
"""


def on_two_processes(function: Callable[..., Any], *arguments: object) -> None:
    """Call `function(*map(str, arguments))` in two processes of Accelerate.

    They are forked by a fresh interpreter: one that has run OpenMP's threads, as pytest's has, may hang once it is forked.
    """
    code = CODE.format(module=function.__module__, name=function.__name__)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
