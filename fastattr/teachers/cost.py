"""Plan: what the teacher of a config will cost, before it starts: network evaluations, memory and disk.

Evaluations follow from the settings alone. Memory is what a probe process measures here (libraries, generator, one batch
forward, one batch backward) plus the arrays that the settings ask for; the model for the arrays is `teacher_plan`.
Reads corpus/, generator/, queries/ and candidates/ of a run folder; writes nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastattr.core.errors import FastattrError, InputError
from fastattr.core.processes import peak_memory
from fastattr.corpus.store import Corpus
from fastattr.features.candidates import read_candidates
from fastattr.generators.generator import Generator
from fastattr.generators.layers import Layer
from fastattr.generators.queries import Queries
from fastattr.gradients.compression import SAMPLE_ROWS, SCALE_ROWS
from fastattr.gradients.ekfac import factor_bytes
from fastattr.teachers.config import TeacherConfig, queries_a_pass, stores_gradients
from fastattr.teachers.store import PART_ROWS


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the cost of a teacher depends on besides its settings."""

    images: int
    """N, training images of the corpus."""
    captions: int
    """M, captions that are scored, all images' together."""
    latent: int
    """Numbers of one latent."""
    conditioning: int
    """Numbers of one caption's conditioning."""
    parameters: int
    """P, weights to unlearn."""
    factors: int
    """Bytes of the curvature while it is fitted."""
    exact: tuple[int, ...]
    """C of each query that is scored exactly."""
    linearised: tuple[int, ...]
    """C of each query that is scored to first order."""
    union: int
    """Training images that are a candidate of any query scored to first order."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Peak memory of a process in bytes, measured: after loading, and once a batch went forward and back."""

    loaded: int
    backward: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One part of the teacher's work; over all processes together, memory for each process."""

    name: str
    forward: int
    """Latents that pass through the network."""
    backward: int
    """Those of them whose gradient is taken."""
    memory: int
    """Peak bytes of a process."""
    disk: int
    """Bytes that stay in the run folder while the teacher runs."""


def teacher_plan(config: TeacherConfig, sizes: Sizes, probe: Probe) -> list[Step]:
    """What each part of the unlearning teacher will cost.

    Args:
        config: the teacher's settings; its method must be 'unlearning'.
        sizes: of corpus, generator and queries.
        probe: memory of a process on this machine.

    Returns:
        The parts in the order in which they run; the peak of the whole is the largest peak.
    """
    views = 2 if config.mirrored else 1
    per_caption = sizes.captions / sizes.images * views * config.loss_draws  # evaluations of a training image
    latents, conditioning = 4 * sizes.images * views * sizes.latent, 4 * sizes.captions * sizes.conditioning
    held = latents + conditioning
    row = 4 * sizes.parameters
    query = config.query_draws * config.unlearning_steps
    # In turn: weights, their gradient, its float64 copies in the eigenbasis, the step, and what the step replaced.
    one_query = 8 * row
    steps = [
        Step(name="encode", forward=0, backward=0, memory=probe.loaded + held, disk=held),
    ]
    if not config.factors:
        passes = (1 if config.curvature == "diagonal" else 2) * config.factor_examples
        fitting = probe.backward + held + sizes.factors + 2 * config.batch_size * row
        steps.append(Step(name="factors", forward=passes, backward=passes, memory=fitting, disk=sizes.factors // 2))
    if sizes.exact:
        base = round(sizes.images * per_caption)
        memory = probe.backward + held
        steps.append(Step(name="base loss", forward=base, backward=0, memory=memory, disk=8 * sizes.images * views))
        sides = 2 if config.symmetric else 1
        steps.append(
            Step(
                name="exact",
                forward=len(sizes.exact) * query + round(sides * sum(sizes.exact) * per_caption),
                backward=len(sizes.exact) * query,
                memory=memory + one_query,
                disk=_table_bytes(sizes.exact),
            )
        )
    if sizes.linearised:
        count = len(sizes.linearised)
        gradients = 2 * config.batch_size * row  # each layer's, and all of them side by side
        if stores_gradients(config, queries=count, parameters=sizes.parameters):
            width = config.gradient_width or sizes.parameters
            store = 2 * sizes.images * width
            sample = min(SCALE_ROWS, sizes.images) + (min(SAMPLE_ROWS, sizes.images) if config.gradient_width else 0)
            passes = round((sizes.images + sample) * per_caption)
            memory = probe.backward + held + gradients + one_query + PART_ROWS * width * 4 + store
            steps.append(Step(name="gradient store", forward=passes, backward=passes, memory=memory, disk=store))
            name, memory, disk = "first order", probe.backward + held + one_query + store, _table_bytes(sizes.linearised)
            passes = 0
        else:
            together = min(count, queries_a_pass(config, sizes.parameters))
            name, rounds = "first order", -(-count // together)
            passes = round(rounds * sizes.union * per_caption)
            scores = 4 * sizes.union * together + 8 * PART_ROWS * views * together
            memory = probe.backward + held + gradients + together * row + scores
            disk = together * row + _table_bytes(sizes.linearised) + 4 * sizes.union * together
        steps.append(Step(name=name, forward=count * query + passes, backward=count * query + passes, memory=memory, disk=disk))
    return steps


def _table_bytes(candidates: tuple[int, ...]) -> int:
    """Bytes of the score table's rows, before compression: id, influence, rank, outsider."""
    return sum(candidates) * (16 + 4 + 4 + 1)


def run_sizes(config: TeacherConfig, run_dir: Path, generator: Generator, layers: Mapping[str, Layer]) -> Sizes:
    """The sizes of a run folder."""
    corpus, queries = Corpus(run_dir / "corpus"), Queries(run_dir / "queries")
    candidates = read_candidates(run_dir / "candidates")
    counts = {query_id: len(ids) for query_id, (ids, _) in candidates.items()}
    by_split: dict[bool, list[str]] = {False: [], True: []}
    for query_id, split in zip(queries.query_ids, queries.splits, strict=True):
        by_split[split in config.linearised].append(query_id)
    union: set[str] = set().union(*(candidates[query_id][0] for query_id in by_split[True]))
    return Sizes(
        images=len(corpus),
        captions=sum(map(len, corpus.captions)) if config.captions == "all" else len(corpus),
        latent=int(np.prod(generator.latent_shape)),
        conditioning=generator.encode_prompt([""]).numbers,
        parameters=sum(layer.weight.numel() for layer in layers.values()),
        factors=factor_bytes(layers),
        exact=tuple(counts[query_id] for query_id in by_split[False]),
        linearised=tuple(counts[query_id] for query_id in by_split[True]),
        union=len(union),
    )


def measure(config: TeacherConfig, run_dir: Path) -> Probe:
    """Memory of this very process while it loads what the teacher loads and puts one batch through it.

    Made for a process of its own (`python -m fastattr.teachers.cost`), since a process's peak never falls.
    """
    import torch

    from fastattr.gradients.encoded import EncodedImages
    from fastattr.gradients.losses import denoising_losses, image_losses
    from fastattr.gradients.recording import record_layers

    Corpus(run_dir / "corpus")
    read_candidates(run_dir / "candidates")
    generator = Generator.from_pretrained(run_dir / "generator")
    layers = generator.modules_to_unlearn(config.pattern)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    loaded = peak_memory()
    count = config.batch_size
    images = EncodedImages(
        [str(row) for row in range(count)],
        torch.zeros(count, 1, *generator.latent_shape),
        generator.encode_prompt([""]).repeated(count),
        np.arange(count + 1),
    )
    image_losses(generator, images, np.arange(count), draws=1, batch_size=count, seed=config.seed)
    with record_layers(layers):
        for _, losses in denoising_losses(generator, images, np.arange(count), draws=1, batch_size=count, seed=config.seed):
            losses.sum().backward()
    return Probe(loaded=loaded, backward=peak_memory())


def run(config: TeacherConfig, run_dir: Path) -> dict[str, Any]:
    """Plan the teacher of a run folder; returns its parts, their totals and the sizes they follow from.

    Raises:
        FastattrError: a stage before the teacher has not run, or the probe failed.
    """
    if config.method != "unlearning":
        raise InputError(f"plan knows what unlearning costs, not {config.method!r}; set teacher.method to 'unlearning'.")
    generator = Generator.from_pretrained(run_dir / "generator")
    sizes = run_sizes(config, run_dir, generator, generator.modules_to_unlearn(config.pattern))
    request = json.dumps({"batch_size": config.batch_size, "pattern": config.pattern, "seed": config.seed})
    command = [sys.executable, "-m", "fastattr.teachers.cost", str(run_dir), request]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FastattrError(f"the memory probe failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    probe = Probe(**json.loads(done.stdout.splitlines()[-1]))
    steps = teacher_plan(config, sizes, probe)
    return {
        "steps": [asdict(step) for step in steps],
        "forward": sum(step.forward for step in steps),
        "backward": sum(step.backward for step in steps),
        "peak_memory": max(step.memory for step in steps),
        "disk": sum(step.disk for step in steps),
        "images": sizes.images,
        "parameters": sizes.parameters,
        "queries_exact": len(sizes.exact),
        "queries_linearised": len(sizes.linearised),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(measure(TeacherConfig(**json.loads(sys.argv[2])), Path(sys.argv[1])))))
