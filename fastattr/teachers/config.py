"""Settings of every teacher, and what follows from them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastattr.core.errors import InputError
from fastattr.generators.generator import CROSS_ATTENTION_KV
from fastattr.generators.queries import SPLITS
from fastattr.gradients.compression import GradientConfig

METHODS = ("unlearning", "trak", "d-trak", "similarity")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Settings of the teacher: AbU+ unless `method` or `curvature` say otherwise."""

    method: str = "unlearning"
    """'unlearning', or a baseline: 'trak' (arXiv:2303.14186), 'd-trak' (arXiv:2311.00500), 'similarity'."""
    pattern: str = CROSS_ATTENTION_KV
    """Layers of the denoiser to unlearn, as a regular expression on their names; the default stands for what suits the
    generator: see `Generator.modules_to_unlearn`."""
    query_loss_rise: float = 0.02
    """The step is as long as raises the query's loss by this part of itself, to first order."""
    step_size: float | None = None
    """A fixed factor on the natural gradient instead, as in the paper; None uses `query_loss_rise`."""
    damping: float = 0.1
    """EKFAC damping, as a fraction of each layer's mean eigenvalue (the authors' 0.1)."""
    curvature: str = "ekfac"
    """'ekfac' (AbU+), or 'diagonal', the Fisher matrix' diagonal (AbU, arXiv:2406.09408)."""
    fisher: str = "empirical"
    """'empirical' takes the data's own targets, 'true' targets drawn from the model's Gaussian."""
    factors: str = ""
    """A folder of factor files to use (ours or kronfluence's) instead of fitting; ours are checked to be of this corpus."""
    factor_examples: int = 4096
    """(image, timestep, noise) triples on which the curvature is fitted; an image may come several times."""
    query_draws: int = 256
    """(timestep, noise) pairs averaged into the query's gradient; the paper takes 50,000 for COCO."""
    loss_draws: int = 4
    """(timestep, noise) pairs at which a training image's loss is taken; the paper takes 20 for COCO."""
    captions: str = "first"
    """'first' or 'all': the captions over which a training image's loss is averaged; the paper takes all five for COCO."""
    mirrored: bool = False
    """Also score each training image's mirror image and keep the larger rise, for generators trained with mirroring."""
    antithetic: bool = False
    """Take the query's draws in pairs of opposite noise at one timestep."""
    unlearning_steps: int = 1
    """Steps that share the rise (or are `step_size` long each); the gradient is taken anew before each."""
    symmetric: bool = False
    """Score by half the difference between the losses after the step and after the opposite one: even orders cancel."""
    linearised: tuple[str, ...] = ()
    """Splits of queries that are scored to first order instead of exactly."""
    gradients: str = "auto"
    """How first-order scores are computed: 'contracted' holds all queries' steps in memory while the corpus passes by, in
    as many passes as they need; 'stored' keeps `gradient_width` numbers of each image's gradient, which serve later
    queries too; 'auto' contracts where one pass is enough, and stores otherwise."""
    gradient_width: int = 16_384
    """k, numbers kept of an image's gradient where gradients are stored (half precision): the leading coordinates, or a
    sketch for TRAK and D-TRAK; 0 keeps every coordinate."""
    memory_gb: float = 4.0
    """Memory for the steps of the queries that share one pass."""
    ridge: float = 0.1
    """Of TRAK and D-TRAK, as a fraction of the kernel's mean eigenvalue."""
    similarity_features: tuple[str, ...] = ()
    """Encoders of the features stage whose features, side by side, 'similarity' compares."""
    allow_failures: int = 0
    """Queries that may fail `TRIES` times each before the score table is refused; it then lacks them."""
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.step_size is None and not 0 < self.query_loss_rise < 10:
            raise InputError(f"query_loss_rise must be above 0, e.g. 0.02 for 2%, got {self.query_loss_rise}")
        if self.damping <= 0:
            raise InputError(f"damping must be positive, got {self.damping}")
        sizes = ("factor_examples", "query_draws", "loss_draws", "unlearning_steps", "batch_size")
        if min(getattr(self, name) for name in sizes) < 1:
            raise InputError(f"{', '.join(sizes)} must be at least 1")
        if self.captions not in {"first", "all"}:
            raise InputError(f"captions must be 'first' or 'all', got {self.captions!r}")
        if self.antithetic and self.query_draws % 2:
            raise InputError(f"antithetic draws come in pairs: query_draws must be even, got {self.query_draws}")
        if self.curvature not in {"ekfac", "diagonal"} or self.fisher not in {"empirical", "true"}:
            raise InputError(
                "curvature must be 'ekfac' or 'diagonal' and fisher 'empirical' or 'true', "
                f"got {self.curvature!r} and {self.fisher!r}"
            )
        if self.method not in METHODS or (self.method == "similarity") != bool(self.similarity_features):
            raise InputError(
                f"method must be one of {', '.join(METHODS)}, and 'similarity' alone needs similarity_features; "
                f"got {self.method!r} with {list(self.similarity_features)}"
            )
        if self.gradients not in {"auto", "contracted", "stored"} or self.memory_gb <= 0 or self.ridge <= 0:
            raise InputError("gradients must be 'auto', 'contracted' or 'stored'; memory_gb and ridge must be positive")
        if self.gradients == "stored" and self.mirrored:
            raise InputError("stored gradients serve one view: with mirrored, set gradients to 'contracted'")
        if unknown := set(self.linearised) - set(SPLITS):
            raise InputError(f"linearised names the splits {sorted(unknown)}; there are {', '.join(SPLITS)}")


def teacher_name(config: TeacherConfig, splits: Sequence[str]) -> str:
    """'abu_plus_exact' (EKFAC), 'abu_linearised' (diagonal) and so on; both, with a +, where the splits differ."""
    if config.method != "unlearning":
        return config.method.replace("-", "_")
    method = "abu_plus" if config.curvature == "ekfac" else "abu"
    return "+".join(sorted({f"{method}_{'linearised' if split in config.linearised else 'exact'}" for split in splits}))


def stores_gradients(config: TeacherConfig, *, queries: int, parameters: int) -> bool:
    """Whether first-order scores of `queries` queries on `parameters` unlearned weights are taken from stored gradients."""
    if config.gradients == "auto":
        return not config.mirrored and queries > queries_a_pass(config, parameters)
    return config.gradients == "stored"


def queries_a_pass(config: TeacherConfig, parameters: int) -> int:
    """Queries whose steps, float32, fit into `config.memory_gb` together."""
    return max(1, int(config.memory_gb * 1e9 / (4 * parameters)))


def gradient_config(config: TeacherConfig, *, output: str, whiten: bool) -> GradientConfig:
    """The gradient features that these settings of the teacher ask for."""
    return GradientConfig(
        output=output,
        whiten=whiten,
        damping=config.damping,
        width=config.gradient_width,
        draws=config.loss_draws,
        batch_size=config.batch_size,
        seed=config.seed,
    )
