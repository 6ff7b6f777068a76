"""What every benchmark shares: its options, the machine it ran on, shares with standard errors, one flat JSON, tables in docs.

A benchmark's result is one flat object, so that two of them can be compared key by key.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fastattr.core.errors import FastattrError, InputError
from fastattr.core.files import atomic_path, write_json

STARTED = time.perf_counter()
LIBRARIES = ("fastattr", "torch", "diffusers", "transformers", "open_clip_torch", "faiss-cpu", "numpy")


def parser(about: str | None, *, json: Path | None = None, quick: str = "", seed: str = "") -> argparse.ArgumentParser:
    """A parser with --json and, where words say what they do, --quick and --seed."""
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--json", type=Path, default=json, help="file for the figures (%(default)s)")
    if quick:
        found.add_argument("--quick", action="store_true", help=quick)
    if seed:
        found.add_argument("--seed", type=int, default=0, help=f"{seed} (%(default)s)")
    return found


def finish(results: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """`report` the results with how and where they were made; returns all."""
    made = {"seed": getattr(options, "seed", 0), "quick": getattr(options, "quick", False), **describe()}
    whole = {**results, **made, "benchmark_seconds": round(time.perf_counter() - STARTED, 1)}
    report(whole, options.json)
    return whole


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
    """`name`, its standard error, that of (k + 1) / (n + 2), and its sample size, from (N,) bool."""
    if len(right) == 0:
        raise ValueError(f"no cases for {name}")
    smoothed = (np.sum(right) + 1) / (len(right) + 2)
    error = (smoothed * (1 - smoothed) / len(right)) ** 0.5
    return {name: float(np.mean(right)), f"{name}_se": float(error), f"{name}_n": len(right)}


def report(results: Mapping[str, Any], path: Path | None) -> None:
    """Print flat results and, if `path` is given, write them there, atomically."""
    nested = [name for name, value in results.items() if not isinstance(value, str | int | float | bool)]
    if nested:
        raise ValueError(f"results must be flat, but {nested} are not")
    if path is not None:
        write_json(path, dict(results))
    print(json.dumps(results, indent=2, ensure_ascii=False))


@contextmanager
def served(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`fastattr ARGUMENTS --port PORT` in a process of its own, once it answers, and its port; ended afterwards."""
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


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def span(values: Mapping[str, Any], key: str = "", *, factor: float = 1.0, digits: int = 3) -> str:
    """'0.434 [0.359, 0.486]': `key` with `key_low` and `key_high`, or 'mean' with 'low' and 'high' where there is no key."""
    names = (key, f"{key}_low", f"{key}_high") if key else ("mean", "low", "high")
    value, low, high = (f"{values[name] * factor:.{digits}f}" for name in names)
    return f"{value} [{low}, {high}]"


def with_error(values: Mapping[str, Any], key: str, *, factor: float = 1.0, digits: int = 3) -> str:
    """'34.67 ± 4.24': a value with its standard error `key_se`; nothing where it was not measured."""
    if values[key] is None:
        return ""
    return f"{values[key] * factor:.{digits}f} ± {values[f'{key}_se'] * factor:.{digits}f}"


def number(value: float | None, digits: int = 3) -> str:
    """A number, nothing where there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def pairs(results: Mapping[str, Any], *names: str) -> list[str]:
    """A table of keys and what was measured; keys that were not are left out."""

    def short(value: Any) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    return table(["key", "measured"], [[f"`{name}`", short(results[name])] for name in names if name in results])


def where(results: Mapping[str, Any]) -> str:
    """By which command, with which seed, on which machine and when."""
    return (
        f"`{results['command']}`, seed {results['seed']}, {results['cpu']}, {results['cores']} cores, {results['date'][:10]}."
    )


def fill(path: Path, parts: Mapping[str, Iterable[str]]) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- end NAME -->` in a document."""
    text = path.read_text(encoding="utf-8")
    for name, lines in parts.items():
        opening, closing = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        before, found, rest = text.partition(opening)
        _, ended, after = rest.partition(closing)
        if not found or not ended:
            raise InputError(f"{path} lacks the marks {opening.strip()} and {closing}.")
        text = before + opening + "\n".join(lines) + "\n" + closing + after
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
