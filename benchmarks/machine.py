"""What every benchmark shares: the machine it ran on, shares with their standard error, one flat JSON.

A benchmark's result is one flat object, so that two of them can be compared key by key.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fastattr.core.errors import FastattrError
from fastattr.core.files import write_json

LIBRARIES = ("fastattr", "torch", "diffusers", "transformers", "open_clip_torch", "faiss-cpu", "numpy")


def describe() -> dict[str, Any]:
    """The processor, the cores this process may use, torch's threads, date, command and library versions."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "python_version": platform.python_version(),
        **{f"{name}_version": version(name) for name in LIBRARIES},
    }


def command() -> str:
    """The command line of this process: the script relative to the repository, other absolute paths by their last part."""
    script = Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parents[1]
    name = script.relative_to(root) if script.is_relative_to(root) else Path(script.name)
    arguments = [Path(one).name if Path(one).is_absolute() else one for one in sys.argv[1:]]
    return shlex.join(["python", str(name), *arguments])


def _cpu_model() -> str:
    """The processor's own name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def share(name: str, right: np.ndarray) -> dict[str, float | int]:
    """`name`, its standard error and its sample size, from (N,) bool.

    The standard error is that of (k + 1) / (n + 2), so that 200 right of 200 is not shown as known without error.

    Raises:
        ValueError: there is nothing to take a share of.
    """
    if len(right) == 0:
        raise ValueError(f"no cases for {name}")
    smoothed = (np.sum(right) + 1) / (len(right) + 2)
    error = (smoothed * (1 - smoothed) / len(right)) ** 0.5
    return {name: float(np.mean(right)), f"{name}_se": float(error), f"{name}_n": len(right)}


def report(results: Mapping[str, Any], path: Path | None) -> None:
    """Print the results and, if `path` is given, write them there, atomically.

    Raises:
        ValueError: a value is a list or an object.
    """
    nested = [name for name, value in results.items() if not isinstance(value, str | int | float | bool)]
    if nested:
        raise ValueError(f"results must be flat, but {nested} are not")
    if path is not None:
        write_json(path, dict(results))
    print(json.dumps(results, indent=2, ensure_ascii=False))


@contextmanager
def served(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`fastattr ARGUMENTS --port PORT` in a process of its own, once it answers, and its port; ended afterwards.

    Raises:
        RuntimeError: it ended by itself.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "fastattr", *arguments, "--port", str(port)]
    server = subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if server.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended by itself with {server.returncode}")
            time.sleep(0.02)
        yield server, port
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def run(main: Callable[[], object]) -> None:
    """Run a script; an error of the library is one line and exit code 2."""
    try:
        main()
    except FastattrError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
