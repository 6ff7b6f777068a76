"""Probe: how many operations a second this machine does.

The denoiser is put together from its shape with random weights, so neither generator nor network is needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastattr.core.errors import InputError
from fastattr.index.choose import available_memory
from fastattr.pipeline.networks import Network, network_inputs, new_network, unlearned_layers

SECONDS = 3.0  # how long each of the two rates is measured
WIDTH, ROWS = 768, 3152
"""Of the layers of a ViT-B/16 with 16 images of 197 tokens: what encoders and student spend their time in."""


def measure_machine(
    shape: Mapping[str, Any], network: Network, pattern: str, batch_size: int, *, limit: float
) -> dict[str, float]:
    """Measure this machine with one denoiser.

    Args:
        shape: of the denoiser, see `networks.shape_of`.
        network: the same, counted.
        pattern: of the layers to unlearn.
        batch_size: latents at once, fewer where so many would take too long.
        limit: seconds that the probe may take.

    Returns:
        Operations a second in the denoiser, forward and back ('denoiser'), and in large matrix products ('dense'), and the
        'seconds' that the probe took.

    Raises:
        InputError: one latent alone would take too long, or more memory than is free.
    """
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    square, rows = torch.randn(WIDTH, WIDTH, device=device), torch.randn(ROWS, WIDTH, device=device)
    dense = 2.0 * ROWS * WIDTH**2 / _seconds(lambda: rows @ square, device)
    one = 3 * network.flops / dense
    if one > limit / 4:
        raise InputError(f"not measured: one latent takes about {one:,.0f} s here, too long for plan.probe_seconds ({limit:g})")
    if 4 * network.parameters + network.activations > available_memory():
        raise InputError("not measured: the denoiser does not fit into the memory that is free")
    batch_size = max(1, min(batch_size, int(limit / 4 / one)))
    denoiser = new_network(dict(shape["denoiser"])).requires_grad_(False).to(device)
    for layer in unlearned_layers(denoiser, pattern).values():
        layer.weight.requires_grad_(True)
    batch = _repeated(network_inputs(denoiser, shape)[0], batch_size, device)
    there_and_back = _seconds(lambda: denoiser(**batch)[0].square().mean().backward(), device)
    rate = 3 * network.flops * batch_size / there_and_back
    return {"denoiser": rate, "dense": dense, "seconds": round(time.monotonic() - started, 1)}


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
