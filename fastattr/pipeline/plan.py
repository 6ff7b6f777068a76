"""Plan: what `fastattr plan` prints about a config before anything runs; docs/costs.md shows the arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastattr.core.errors import InputError
from fastattr.pipeline.check import check, check_queries
from fastattr.pipeline.config import BuildConfig
from fastattr.pipeline.costs import (
    UTILISATION,
    denoiser_of,
    denoiser_shape,
    hours_of,
    stage_costs,
    teacher_ways,
    training_images,
)
from fastattr.pipeline.networks import PEAK_FLOPS, measure_machine

DENSE = {"train-encoder", "features", "distill", "index"}
"""Stages that spend their time in large matrix products; the others spend it in the denoiser."""


def plan(config: BuildConfig, run_dir: Path, *, measure: bool = False) -> dict[str, Any]:
    """Everything that can be said of a config before it runs; what `run_dir` holds already is read instead of assumed.

    Returns:
        'stages' (each with its counts and 'hours' by accelerator), their totals, 'teacher_hours' (of `teacher_ways`, by way
        and accelerator), 'money', and 'here': 'seconds' by stage and in all, and 'rates', or 'problem'. To `measure` this
        machine takes half a minute.

    Raises:
        InputError: the number of images or the network is not known. Also what `check` and `check_queries` raise.
    """
    check(config, run_dir, planned=True)
    check_queries(config, run_dir)
    images, network = training_images(config, run_dir), denoiser_of(config, run_dir)
    stages, ways = stage_costs(config, images, network), teacher_ways(config, images, network)
    hours = {name: sum(stage.hours(name) for stage in stages) for name in PEAK_FLOPS}
    result: dict[str, Any] = {
        "name": config.name,
        "images": images,
        "queries": {split: getattr(config.queries, split) for split in ("train", "validation", "test")},
        "network": asdict(network),
        "stages": [asdict(stage) | {"hours": {name: stage.hours(name) for name in PEAK_FLOPS}} for stage in stages],
        "forward": sum(stage.forward for stage in stages),
        "backward": sum(stage.backward for stage in stages),
        "peak_memory": max(stage.memory for stage in stages),
        "disk": sum(stage.disk for stage in stages),
        "hours": hours,
        "teacher_hours": {way: {name: hours_of(flops, name) for name in PEAK_FLOPS} for way, flops in ways.items()},
        "accelerator": config.plan.accelerator,
        "money": config.plan.rate * hours[config.plan.accelerator] if config.plan.rate else None,
        "here": {"problem": "not measured"},
    }
    if measure:
        shape, teacher = denoiser_shape(config, run_dir), config.teacher
        try:
            rates = measure_machine(shape, network, teacher.pattern, teacher.batch_size, limit=config.plan.probe_seconds)
        except InputError as error:
            return result | {"here": {"problem": str(error)}}
        seconds = {stage.name: stage.flops / rates["dense" if stage.name in DENSE else "denoiser"] for stage in stages}
        result["here"] = {"seconds": {**seconds, "in all": sum(seconds.values())}, "rates": rates}
    return result


def as_table(result: Mapping[str, Any]) -> str:
    """A plan as text for a terminal."""
    here = result["here"].get("seconds", {})
    names = list(result["hours"])
    head = f"{'stage':18s} {'forward':>15s} {'backward':>15s}" + "".join(f"{name + ' h':>11s}" for name in names)
    lines = [head + f" {'memory':>10s} {'disk':>10s} {'here':>10s}"]
    total = {key: result[key] for key in ("forward", "backward", "disk", "hours")}
    total |= {"name": "in all", "memory": result["peak_memory"]}
    for stage in [*result["stages"], total]:
        hours = "".join(f"{stage['hours'][name]:11,.2f}" for name in names)
        seconds = here.get(stage["name"])
        lines.append(
            f"{stage['name']:18s} {stage['forward']:15,d} {stage['backward']:15,d}{hours} {_bytes(stage['memory']):>10s} "
            f"{_bytes(stage['disk']):>10s} {'' if seconds is None else f'{seconds:,.0f} s':>10s}"
        )
    ways = result["teacher_hours"]
    words = {
        "exact_as_published": "exactly, as the paper's code does (losses before and after for each query)",
        "exact": "exactly, the losses before measured once",
        "first_order": "to first order (teacher.linearised)",
    }
    lines.append(f"teacher of the training and validation queries, {names[0]}-hours:")
    lines += [f"  {ways[way][names[0]]:12,.1f}  {text}" for way, text in words.items()]
    if result["money"] is not None:
        lines.append(f"money: {result['money']:,.2f} at the given rate, on {result['accelerator']}")
    if "problem" in result["here"]:
        lines.append(f"this machine: {result['here']['problem']}")
    else:
        rate = f"{result['here']['rates']['denoiser'] / 1e9:,.0f} GFLOP/s"
        lines.append(f"this machine: {here['in all']:,.0f} s in all, at {rate}; reading, searching and writing come on top")
    lines.append(f"accelerators: {UTILISATION:.0%} of their dense TF32 peak, one each; memory is host and accelerator together")
    return "\n".join(lines)


def _bytes(count: float) -> str:
    size, unit = next(((size, unit) for size, unit in ((1e12, "TB"), (1e9, "GB")) if count >= size), (1e6, "MB"))
    return f"{count / size:,.1f} {unit}"
