"""Probe: how many operations a second this machine does, and what one batch of the teacher takes of its memory.

Runs in a process of its own (`python -m fastattr.pipeline.probe REQUEST`), as a process' peak memory never falls. The
denoiser is put together from its shape with random weights, so neither generator nor network is needed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastattr.core.errors import FastattrError, InputError
from fastattr.core.processes import alone, peak_memory
from fastattr.pipeline.networks import count, network_inputs, new_network, unlearned_layers

SECONDS = 3.0
"""How long each of the two rates is measured."""
WIDTH, ROWS = 768, 3152
"""Of the layers of a ViT-B/16 with 16 images of 197 tokens: what encoders and student spend their time in."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a probe found."""

    denoiser: float
    """Operations a second in the denoiser, forward and back."""
    dense: float
    """Operations a second in large matrix products."""
    peak_memory: int
    """Bytes of the process that took one batch forward and back."""
    seconds: float
    """What the probe itself took."""


def measure_machine(shape: Mapping[str, Any], pattern: str, batch_size: int, *, limit: float) -> Rates:
    """Measure this machine with one denoiser.

    Args:
        shape: of the denoiser, see `networks.shape_of`.
        pattern: of the layers to unlearn.
        batch_size: latents at once.
        limit: seconds that the probe may take.

    Raises:
        InputError: it took longer.
        FastattrError: it failed; the text is the last that it said.
    """
    started = time.monotonic()
    request = json.dumps({"shape": shape, "pattern": pattern, "batch_size": batch_size})
    command = [sys.executable, "-m", "fastattr.pipeline.probe", request]
    try:
        done = subprocess.run(command, env=alone(), capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise InputError(f"not measured: one batch takes more than {limit:g} s (plan.probe_seconds)") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it was killed: perhaps memory ran out"])[-1]
        raise FastattrError(f"not measured: the probe failed ({last})")
    found = json.loads(done.stdout.splitlines()[-1])
    return Rates(**{**found, "seconds": round(time.monotonic() - started, 1)})


def measure(shape: Mapping[str, Any], pattern: str, batch_size: int) -> Rates:
    """Measure in this process; see `measure_machine`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = count("probe", shape, pattern)
    denoiser = new_network(dict(shape["denoiser"])).requires_grad_(False).to(device)
    for layer in unlearned_layers(denoiser, pattern).values():
        layer.weight.requires_grad_(True)
    inputs = network_inputs(denoiser, shape)[0]
    batch = {name: _repeated(value, batch_size, device) for name, value in inputs.items()}

    def there_and_back() -> None:
        denoiser(**batch)[0].square().mean().backward()

    there_and_back()
    memory = peak_memory()
    square = torch.randn(WIDTH, WIDTH, device=device)
    rows = torch.randn(ROWS, WIDTH, device=device)
    return Rates(
        denoiser=3 * network.flops * batch_size / _seconds(there_and_back, device),
        dense=2.0 * ROWS * WIDTH**2 / _seconds(lambda: rows @ square, device),
        peak_memory=memory,
        seconds=0.0,
    )


def _repeated(value: Any, batch_size: int, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _repeated(each, batch_size, device) for name, each in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    if value.dim() and len(value) == 1:  # positions of patches and tokens are shared by a batch
        value = value.repeat_interleave(batch_size, dim=0)
    return value.to(device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Mean seconds of one call, warm."""
    work()
    calls, started = 0, time.monotonic()
    while True:
        work()
        calls += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        if (spent := time.monotonic() - started) > SECONDS:
            return spent / calls


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(asdict(measure(**json.loads(sys.argv[1])))))
    except FastattrError as error:
        sys.exit(" ".join(str(error).split()))
