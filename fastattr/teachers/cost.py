"""Cost: what the teacher of a config will need, before it starts: network evaluations, memory and disk.

Evaluations and arrays follow from the settings and a few sizes; the memory of libraries, generator and one batch is a probe's
(fastattr/pipeline/networks.py). `fastattr plan` prints the result for a whole line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastattr.gradients.compression import SAMPLE_ROWS, SCALE_ROWS
from fastattr.teachers.config import KERNELS, TeacherConfig, queries_a_pass, stores_gradients
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
    """What each part of the teacher will cost.

    Args:
        config: the teacher's settings.
        sizes: of corpus, generator and queries.
        probe: memory of a process on this machine.

    Returns:
        The parts in the order in which they run; the peak of the whole is the largest peak. 'similarity' has none.
    """
    if config.method == "similarity":
        return []
    held = 4 * (sizes.images * config.views * sizes.latent + sizes.captions * sizes.conditioning)
    steps = [Step(name="encode", forward=0, backward=0, memory=probe.loaded + held, disk=held)]
    known: set[str] = set()
    for member in config.members_of():
        for step in _member_plan(member, sizes, probe, held):
            if step.name not in {"factors", "base loss"} & known:  # members share what only the generator determines
                steps.append(step)
            known.add(step.name)
    models = 1 + len(config.models)
    return [replace(step, forward=models * step.forward, backward=models * step.backward) for step in steps]


def _member_plan(config: TeacherConfig, sizes: Sizes, probe: Probe, held: int) -> list[Step]:
    """The parts of one method on one model, once the corpus is encoded."""
    row = 4 * sizes.parameters
    steps = []
    if not config.factors and (config.method not in KERNELS or KERNELS[config.method][1]):
        passes = (1 if config.curvature == "diagonal" else 2) * config.factor_examples
        fitting = probe.backward + held + sizes.factors + 2 * config.batch_size * row
        steps.append(Step(name="factors", forward=passes, backward=passes, memory=fitting, disk=sizes.factors // 2))
    if config.method in KERNELS:
        return [*steps, *_kernel_plan(config, sizes, probe, held)]
    exact, linearised = sizes.exact, sizes.linearised
    if config.method == "first-order":
        exact, linearised = (), (*exact, *linearised)
    steps += _exact_plan(config, sizes, exact, probe, held) if exact else []
    return steps + (_first_order_plan(config, sizes, linearised, probe, held) if linearised else [])


def _per_image(config: TeacherConfig, sizes: Sizes) -> float:
    """Evaluations that the mean loss of one training image takes."""
    return sizes.captions / sizes.images * config.views * config.loss_draws


def _exact_plan(config: TeacherConfig, sizes: Sizes, exact: tuple[int, ...], probe: Probe, held: int) -> list[Step]:
    base, query = round(sizes.images * _per_image(config, sizes)), config.query_draws * config.unlearning_steps
    memory, sides = probe.backward + held, 2 if config.symmetric else 1
    losses = round(sides * sum(exact) * _per_image(config, sizes))
    before = Step(name="base loss", forward=base, backward=0, memory=memory, disk=8 * sizes.images * config.views)
    steps, memory = len(exact) * query, memory + _one_query(sizes)
    return [before, Step(name="exact", forward=steps + losses, backward=steps, memory=memory, disk=_table_bytes(exact))]


def _one_query(sizes: Sizes) -> int:
    """Bytes of, in turn, weights, their gradient, its float64 copies in the eigenbasis, the step, and what it replaced."""
    return 8 * 4 * sizes.parameters


def _store_plan(config: TeacherConfig, sizes: Sizes, probe: Probe, held: int, *, sampled: bool) -> Step:
    """Computing and keeping every training image's gradient features, and finding their scale and coordinates."""
    width = config.gradient_width or sizes.parameters
    store = 2 * sizes.images * width
    sample = min(SCALE_ROWS, sizes.images) + (min(SAMPLE_ROWS, sizes.images) if sampled else 0)
    passes = round((sizes.images + sample) * _per_image(config, sizes))
    gradients = 2 * 4 * sizes.parameters * max(1, round(config.batch_size / config.loss_draws))  # of the images of a batch
    memory = probe.backward + held + gradients + PART_ROWS * width * 4 + store
    return Step(name="gradient store", forward=passes, backward=passes, memory=memory, disk=store)


def _first_order_plan(config: TeacherConfig, sizes: Sizes, linearised: tuple[int, ...], probe: Probe, held: int) -> list[Step]:
    count, row, query = len(linearised), 4 * sizes.parameters, config.query_draws * config.unlearning_steps
    if stores_gradients(config, queries=count, parameters=sizes.parameters):
        store = _store_plan(config, sizes, probe, held, sampled=bool(config.gradient_width))
        memory = probe.backward + held + _one_query(sizes) + store.disk
        spent = count * query
        return [store, Step(name="first order", forward=spent, backward=spent, memory=memory, disk=_table_bytes(linearised))]
    together = min(count, queries_a_pass(config, sizes.parameters))
    spent = count * query + round(-(-count // together) * sizes.union * _per_image(config, sizes))
    gradients = 2 * config.batch_size * row  # each layer's, and all of them side by side
    scores = 4 * sizes.union * together + 8 * PART_ROWS * config.views * together
    memory = probe.backward + held + gradients + together * row + scores
    disk = together * row + _table_bytes(linearised) + 4 * sizes.union * together
    return [Step(name="first order", forward=spent, backward=spent, memory=memory, disk=disk)]


def _kernel_plan(config: TeacherConfig, sizes: Sizes, probe: Probe, held: int) -> list[Step]:
    candidates = (*sizes.exact, *sizes.linearised)
    width = config.gradient_width or sizes.parameters
    store = _store_plan(config, sizes, probe, held, sampled=KERNELS[config.method][1] and bool(config.gradient_width))
    spent = len(candidates) * config.query_draws
    kernel = 8 * min(width, sizes.images) ** 2 + 12 * sizes.images * width  # float64, and the store once more in float32
    memory = probe.backward + held + kernel + 4 * len(candidates) * (width + sizes.images)
    return [store, Step(name="kernel", forward=spent, backward=spent, memory=memory, disk=_table_bytes(candidates))]


def _table_bytes(candidates: tuple[int, ...]) -> int:
    """Bytes of the score table's rows, before compression: id, influence, rank, outsider."""
    return sum(candidates) * (16 + 4 + 4 + 1)
