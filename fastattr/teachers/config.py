"""Settings of every teacher, and what follows from them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastattr.core.errors import InputError
from fastattr.core.settings import at_least
from fastattr.generators.queries import SPLITS
from fastattr.gradients.compression import GradientConfig

KERNELS = {"trak": ("loss", False), "d-trak": ("squared_norm", False), "d-trak-ekfac": ("squared_norm", True)}
"""Of each kernel method: what is differentiated, and whether gradients are compared in EKFAC's eigenbasis."""
METHODS = ("unlearning", "first-order", *KERNELS, "similarity", "averaged", "retraining")
MEMBERS = ("unlearning", "first-order", *KERNELS)
"""What 'averaged' can take the mean of, and 'retraining' starts from."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Settings of the teacher: AbU+ unless `method` or `curvature` say otherwise."""

    method: str = "unlearning"
    """'unlearning' (AbU+, exactly, but for the splits in `linearised`), 'first-order' (AbU+, all splits to first order),
    'trak' (arXiv:2303.14186), 'd-trak' (arXiv:2311.00500), 'd-trak-ekfac' (D-TRAK in EKFAC's eigenbasis, ours),
    'similarity', 'averaged', or 'retraining', which corrects the mean by models that were trained without some images. How
    true each is: docs/truth.md."""
    members: tuple[str, ...] = ("first-order", "d-trak-ekfac")
    """Methods whose scores, standardised for each query, 'averaged' takes the mean of; the default is the truest pair."""
    models: tuple[str, ...] = ()
    """Other generators, trained on the same corpus with other seeds, over whose scores, standardised for each query, the
    mean is taken too: a teacher of several models foretells retraining better than a teacher of one."""
    retrained: str = ""
    """For 'retraining': a folder with models.parquet and losses.parquet, as ground truths have them: models trained on random
    halves, and the losses of the run's queries under them."""
    pattern: str = ""
    """Layers of the denoiser to unlearn, as a regular expression on their names; '' is what suits the generator: all that
    EKFAC covers in a small U-Net, the text-side projections of a large one, the matrices of a LoRA."""
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
    inverse_steps: int = 0
    """Steps of conjugate gradients on the Gauss-Newton matrix by which the query's natural gradient goes beyond EKFAC's."""
    inverse_examples: int = 512
    """(image, timestep, noise) triples over which that matrix is taken."""
    span: tuple[float, float] = (0.0, 1.0)
    """The part of the noise schedule, from little noise to much, at which losses and gradients are taken."""
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
    """Of TRAK and D-TRAK, as a fraction of the kernel's mean eigenvalue; emoji-bench's sweep chose 1."""
    similarity_features: tuple[str, ...] = ()
    """Encoders of the features stage whose features, side by side, 'similarity' compares."""
    allow_failures: int = 0
    """Queries that may fail `TRIES` times each before the score table is refused; it then lacks them."""
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.step_size is None and not 0 < self.query_loss_rise < 10:
            raise InputError(f"query_loss_rise must be above 0, e.g. 0.02 for 2%, got {self.query_loss_rise}")
        at_least(self, 1, "factor_examples", "query_draws", "loss_draws", "unlearning_steps", "inverse_examples", "batch_size")
        at_least(self, 0, "inverse_steps")
        if self.antithetic and self.query_draws % 2:
            raise InputError(f"antithetic draws come in pairs: query_draws must be even, got {self.query_draws}")
        choices = {"curvature": ("ekfac", "diagonal"), "fisher": ("empirical", "true"), "captions": ("first", "all")}
        for name, known in {**choices, "gradients": ("auto", "contracted", "stored"), "method": METHODS}.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for method, needed in (("similarity", "similarity_features"), ("retraining", "retrained")):
            if (self.method == method) != bool(getattr(self, needed)):
                raise InputError(f"{method!r} alone needs {needed}, got {self.method!r} with {getattr(self, needed)!r}")
        if not 0 <= self.span[0] < self.span[1] <= 1:
            raise InputError(f"span must be a part of the schedule from 0 to 1, got {self.span}")
        if not self.members or set(self.members) - set(MEMBERS):
            raise InputError(f"members must be some of {', '.join(MEMBERS)}, got {list(self.members)}")
        if min(self.memory_gb, self.ridge, self.damping) <= 0:
            found = f"{self.memory_gb}, {self.ridge} and {self.damping}"
            raise InputError(f"memory_gb, ridge and damping must be positive, got {found}")
        if self.gradients == "stored" and self.mirrored:
            raise InputError("stored gradients serve one view: with mirrored, set gradients to 'contracted'")
        if unknown := set(self.linearised) - set(SPLITS):
            raise InputError(f"linearised names the splits {sorted(unknown)}; there are {', '.join(SPLITS)}")

    @property
    def views(self) -> int:
        """V: the image, and its mirror image where it is scored too."""
        return 2 if self.mirrored else 1

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods whose scores this teacher takes the mean of; its own alone where it is no mean."""
        return self.members if self.method in {"averaged", "retraining"} else (self.method,)

    def members_of(self) -> tuple[TeacherConfig, ...]:
        """The settings of each of `methods`."""
        return tuple(replace(self, method=method, models=(), retrained="") for method in self.methods)

    @property
    def measured(self) -> dict[str, Any]:
        """The settings with which losses of training images are taken."""
        return {"draws": self.loss_draws, "batch_size": self.batch_size, "seed": self.seed, "span": self.span}

    def gradients_of(self, method: str) -> GradientConfig:
        """The gradient features of training images that a first-order or kernel method compares."""
        output, whiten = KERNELS.get(method, ("loss", True))
        return GradientConfig(output=output, whiten=whiten, damping=self.damping, width=self.gradient_width, **self.measured)

    def is_linearised(self, split: str) -> bool:
        """Whether the queries of a split are unlearned to first order."""
        return self.method == "first-order" or split in self.linearised


def teacher_name(config: TeacherConfig, splits: Sequence[str]) -> str:
    """'abu_plus_exact' (EKFAC), 'abu_linearised' (diagonal) and so on; both, with a +, where the splits differ."""
    if config.method not in {"unlearning", "first-order"}:
        return config.method.replace("-", "_")
    method = "abu_plus" if config.curvature == "ekfac" else "abu"
    return "+".join(sorted({f"{method}_{'linearised' if config.is_linearised(split) else 'exact'}" for split in splits}))


def stores_gradients(config: TeacherConfig, *, queries: int, parameters: int) -> bool:
    """Whether first-order scores of `queries` queries on `parameters` unlearned weights are taken from stored gradients."""
    if config.gradients == "auto":
        return not config.mirrored and queries > queries_a_pass(config, parameters)
    return config.gradients == "stored"


def queries_a_pass(config: TeacherConfig, parameters: int) -> int:
    """Queries whose steps, float32, fit into `config.memory_gb` together."""
    return max(1, int(config.memory_gb * 1e9 / (4 * parameters)))
