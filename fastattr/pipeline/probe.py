"""Probe: how many operations a second this machine does.

Runs in a process of its own (`python -m fastattr.pipeline.probe REQUEST`), which can be given up. The denoiser is put
together from its shape with random weights, so neither generator nor network is needed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastattr.core.errors import FastattrError, InputError
from fastattr.core.processes import alone
from fastattr.pipeline.networks import count, network_inputs, new_network, unlearned_layers

SECONDS = 3.0
"""How long each of the two rates is measured."""
WIDTH, ROWS = 768, 3152
"""Of the layers of a ViT-B/16 with 16 images of 197 tokens: what encoders and student spend their time in."""


def measure_machine(shape: Mapping[str, Any], pattern: str, batch_size: int, *, limit: float) -> dict[str, float]:
    """Measure this machine with one denoiser.

    Args:
        shape: of the denoiser, see `networks.shape_of`.
        pattern: of the layers to unlearn.
        batch_size: latents at once.
        limit: seconds that the probe may take.

    Returns:
        Operations a second in the denoiser, forward and back ('denoiser'), and in large matrix products ('dense'), and the
        'seconds' that the probe took.

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
    return json.loads(done.stdout.splitlines()[-1]) | {"seconds": round(time.monotonic() - started, 1)}


def measure(shape: Mapping[str, Any], pattern: str, batch_size: int) -> dict[str, float]:
    """Measure in this process; see `measure_machine`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flops = count("probe", shape, pattern).flops
    denoiser = new_network(dict(shape["denoiser"])).requires_grad_(False).to(device)
    for layer in unlearned_layers(denoiser, pattern).values():
        layer.weight.requires_grad_(True)
    batch = _repeated(network_inputs(denoiser, shape)[0], batch_size, device)
    square, rows = torch.randn(WIDTH, WIDTH, device=device), torch.randn(ROWS, WIDTH, device=device)
    there_and_back = _seconds(lambda: denoiser(**batch)[0].square().mean().backward(), device)
    product = _seconds(lambda: rows @ square, device)
    return {"denoiser": 3 * flops * batch_size / there_and_back, "dense": 2.0 * ROWS * WIDTH**2 / product}


def _repeated(value: Any, batch_size: int, device: torch.device) -> Any:
    """The arguments of one evaluation as those of a batch; positions of patches and tokens are shared by all of it."""
    if isinstance(value, dict):
        return {name: _repeated(each, batch_size, device) for name, each in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    return (value.repeat_interleave(batch_size, dim=0) if value.dim() and len(value) == 1 else value).to(device)


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
        sys.stdout.write(json.dumps(measure(**json.loads(sys.argv[1]))))
    except FastattrError as error:
        sys.exit(" ".join(str(error).split()))
