"""Cost: what the teacher of a config will need, before it starts: network evaluations, memory and disk.

Evaluations and arrays follow from the settings and a few sizes; the memory of libraries, generator and one batch is a probe's
(fastattr/pipeline/networks.py). `fastattr plan` prints the result for a whole line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastattr.gradients.compression import SAMPLE_ROWS, SCALE_ROWS
from fastattr.teachers.config import KERNELS, TeacherConfig, queries_a_pass, stores_gradients
from fastattr.teachers.task import PART_ROWS


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the cost of a teacher depends on besides its settings."""

    images: int
    captions: int
    """N, training images of the corpus, and M, captions that are scored, all images' together."""
    latent: int
    conditioning: int
    """Numbers of one latent, and of one caption's conditioning."""
    parameters: int
    factors: int
    """P, weights to unlearn, and bytes of the curvature while it is fitted."""
    exact: tuple[int, ...]
    linearised: tuple[int, ...]
    """C of each query that is scored exactly, and to first order."""
    union: int
    """Training images that are a candidate of any query scored to first order."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Peak memory of a process in bytes, measured: after loading, and once a batch went forward and back."""

    loaded: int
    backward: int


@dataclass(frozen=True)
class Step:
    """One part of the teacher's work; over all processes together, memory for each process."""

    name: str
    forward: int
    backward: int
    """Latents that pass through the network, and those of them whose gradient is taken."""
    memory: int
    """Peak bytes of a process."""
    disk: int
    """Bytes that stay in the run folder while the teacher runs."""


def teacher_plan(config: TeacherConfig, sizes: Sizes, probe: Probe) -> list[Step]:
    """What each part of the teacher will cost, in the order in which the parts run; 'similarity' has none.

    `sizes` are of corpus, generator and queries, `probe` is the memory of a process on this machine. The peak of the whole is
    the largest peak.
    """
    if config.method == "similarity":
        return []
    held = 4 * (sizes.images * config.views * sizes.latent + sizes.captions * sizes.conditioning)
    steps = [Step("encode", 0, 0, probe.loaded + held, held)]
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
        steps.append(Step("factors", passes, passes, fitting, sizes.factors // 2))
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
    before = Step("base loss", base, 0, memory, 8 * sizes.images * config.views)
    steps, memory = len(exact) * query, memory + _one_query(sizes)
    return [before, Step("exact", steps + losses, steps, memory, _table_bytes(exact))]


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
    return Step("gradient store", passes, passes, memory, store)


def _first_order_plan(config: TeacherConfig, sizes: Sizes, linearised: tuple[int, ...], probe: Probe, held: int) -> list[Step]:
    count, row, query = len(linearised), 4 * sizes.parameters, config.query_draws * config.unlearning_steps
    if stores_gradients(config, queries=count, parameters=sizes.parameters):
        store = _store_plan(config, sizes, probe, held, sampled=bool(config.gradient_width))
        memory = probe.backward + held + _one_query(sizes) + store.disk
        spent = count * query
        return [store, Step("first order", spent, spent, memory, _table_bytes(linearised))]
    together = min(count, queries_a_pass(config, sizes.parameters))
    spent = count * query + round(-(-count // together) * sizes.union * _per_image(config, sizes))
    gradients = 2 * config.batch_size * row  # each layer's, and all of them side by side
    scores = 4 * sizes.union * together + 8 * PART_ROWS * config.views * together
    memory = probe.backward + held + gradients + together * row + scores
    disk = together * row + _table_bytes(linearised) + 4 * sizes.union * together
    return [Step("first order", spent, spent, memory, disk)]


def _kernel_plan(config: TeacherConfig, sizes: Sizes, probe: Probe, held: int) -> list[Step]:
    candidates = (*sizes.exact, *sizes.linearised)
    width = config.gradient_width or sizes.parameters
    store = _store_plan(config, sizes, probe, held, sampled=KERNELS[config.method][1] and bool(config.gradient_width))
    spent = len(candidates) * config.query_draws
    kernel = 8 * min(width, sizes.images) ** 2 + 12 * sizes.images * width  # float64, and the store once more in float32
    memory = probe.backward + held + kernel + 4 * len(candidates) * (width + sizes.images)
    return [store, Step("kernel", spent, spent, memory, _table_bytes(candidates))]


def _table_bytes(candidates: tuple[int, ...]) -> int:
    """Bytes of the score table's rows, before compression: id, influence, rank, outsider."""
    return sum(candidates) * (16 + 4 + 4 + 1)
