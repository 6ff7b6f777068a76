"""Distill: teach the student the teacher's ranking.

Reads scores/, features/, query_features/; writes student/ (model.safetensors, config in manifest.json). A step takes some
training queries and some training images, sends each through the network once and uses every pair of them that the score table
holds (pairs.py). The averaged weights are judged by mAP(1%) on the validation queries, which stops the training. Source:
arXiv:2511.10721, sec. 4 (there: every pair passes its query and its image through the network).

A loss is a short function of `logits` (Q, N), which rise with the cosine, and `targets` (Q, N): 1 for a query's most
influential image, falling with its rank towards 0 (for 'mse_scores' the teacher's scores, standardised for each query).
`weights` (Q, N) are 0 where the teacher has said nothing of a pair. All give a scalar, lower = better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fastattr.core.errors import InputError
from fastattr.core.files import atomic_path
from fastattr.core.settings import at_least
from fastattr.core.stages import make, open_stage
from fastattr.core.training import EarlyStopping, TrainingConfig, fit
from fastattr.corpus.store import Corpus
from fastattr.features.store import features_fingerprint, folders, read_features
from fastattr.students import pairs
from fastattr.students.pairs import FeatureRows, MappedFeatures, PairTable
from fastattr.students.ranking import teacher_average_precision
from fastattr.students.student import Student, StudentConfig, embed
from fastattr.teachers.scores import read_scores

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Targets that the ordinal loss asks to exceed."""
TOP = 0.02
"""Decay of what the list-wise loss gives a rank, in parts of the candidate set: rank r of C counts exp(-r / (TOP C))."""


def bce(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Binary cross-entropy with targets as probabilities. Source: arXiv:2511.10721, sec. 4 (the paper's choice)."""
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (losses * weights).sum() / weights.sum().clamp_min(1e-6)


def ordinal(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Cumulative links: the logit shifted by each threshold's own logit says whether the target exceeds it.

    Source: McCullagh, J. R. Stat. Soc. B 42 (1980), with thresholds fixed at the logits of `THRESHOLDS`.
    """
    total = logits.new_zeros(())
    for threshold in THRESHOLDS:
        shift = torch.logit(torch.tensor(threshold)).item()
        total = total + bce(logits - shift, (targets > threshold).to(logits.dtype), weights)
    return total / len(THRESHOLDS)


def mse(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Squared error of the logits themselves: regression, of ranks or of scores as the targets are."""
    return ((logits - targets).square() * weights).sum() / weights.sum().clamp_min(1e-6)


def listwise(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy between softmax of the logits and the top-weighted targets, for each query over its images.

    Source: Cao et al., ICML 2007 (ListNet), with probabilities exp(-rank / (TOP C)) instead of exp(score).
    """
    known = weights > 0
    scores = logits.masked_fill(~known, -torch.inf)
    wanted = torch.exp((targets - 1) / TOP) * weights
    wanted = wanted / wanted.sum(dim=1, keepdim=True).clamp_min(1e-6)
    found = torch.log_softmax(scores, dim=1).masked_fill(~known, 0.0)
    return -(wanted * found).sum(dim=1).mean()


LOSSES: dict[str, Loss] = {"bce": bce, "ordinal": ordinal, "mse_ranks": mse, "mse_scores": mse, "listwise": listwise}
"""By the name that a config gives."""


START_ROWS = 20_000
"""Training images, spread over the corpus, from which the student's linear path starts."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Settings of the student and its training; `training.batch_size` counts queries."""

    RETIRED: ClassVar[Mapping[str, Any]] = {"targets": "ranks", "outsider_share": 0.1}
    """Settings of earlier versions, by the value that remains."""
    student: StudentConfig = field(default_factory=StudentConfig)
    loss: str = "listwise"
    """'bce' (the paper's), 'ordinal', 'mse_ranks', 'mse_scores' or 'listwise'."""
    images_per_step: int = 1024
    """Training images drawn at each step, of those that the step's queries have as candidates."""
    judge_every: int = 100
    """Steps between judgements on the validation queries."""
    patience: int = 10
    """Judgements without a better one after which training stops."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=600, batch_size=128, learning_rate=1e-3, warmup_steps=20, ema_decay=0.99, checkpoint_every=200
        )
    )

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise InputError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        at_least(self, 1, "images_per_step", "judge_every", "patience")

    @property
    def target_kind(self) -> str:
        """What `pairs.make_table` makes of the scores."""
        return "scores" if self.loss == "mse_scores" else "ranks"


class DistillLoss(nn.Module):
    """A loss of all pairs of some queries and images; forward(queries, images, targets, weights) -> scalar."""

    def __init__(self, student: Student, loss: str) -> None:
        super().__init__()
        self.student = student
        self._loss = LOSSES[loss]

    def forward(self, queries: Tensor, images: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Args: queries (Q, F); images (N, F); targets and weights (Q, N)."""
        cosine = (self.student(queries) @ self.student(images).T).float()
        return self._loss(self.student.logits(cosine), targets, weights)


@dataclass(frozen=True)
class Validation:
    """Queries on which a student is judged while it learns."""

    features: np.ndarray
    """(V, F)."""
    rows: Sequence[np.ndarray]
    """V arrays (C,) of corpus rows."""
    influence: Sequence[np.ndarray]
    """V arrays (C,) of the teacher's scores."""

    def mean_average_precision(self, student: Student, images: FeatureRows, *, percent: float = 1.0) -> float:
        """mAP(L), L in percent of the corpus, within the queries' candidate sets."""
        union, inverse = np.unique(np.concatenate(self.rows), return_inverse=True)
        embedded = np.concatenate([embed(student, images[part]) for part in np.array_split(union, -(-len(union) // 8192))])
        queries = embed(student, self.features)
        positives = max(1, round(len(images) * percent / 100))
        places = np.split(inverse, np.cumsum([len(part) for part in self.rows])[:-1])
        found = [
            teacher_average_precision(embedded[place] @ query, influence, positives=min(positives, len(influence)))
            for place, query, influence in zip(places, queries, self.influence, strict=True)
        ]
        return float(np.mean(found))


def distill(
    table: PairTable,
    queries: FeatureRows,
    images: FeatureRows,
    config: DistillConfig,
    *,
    validation: Validation | None = None,
    on_judgement: Callable[[float], None] | None = None,
    **resumed: Any,
) -> Student:
    """Train a student on a table of Q queries; returns it with averaged weights.

    `queries` (Q, F) are their features, in the same order, `images` (N, F) those of the training images. `validation` stops
    the training and chooses the weights, None trains for all steps; `on_judgement` is told each validation mAP. `resumed`:
    checkpoint, made_from and accelerator, as `training.fit` has them.
    """
    torch.manual_seed(config.training.seed)
    student = Student(images.shape[1], config.student)
    spread = np.unique(np.linspace(0, len(images) - 1, START_ROWS).astype(np.int64))
    student.start_from(images[spread])

    def batch_of(picked: np.ndarray, generator: torch.Generator) -> tuple[Tensor, ...]:
        drawn = table.draw(picked, config.images_per_step, generator)
        targets, known = table.block(picked, drawn)
        arrays = (queries[picked], images[drawn], targets, known.astype(np.float32))
        return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)

    def judge(module: nn.Module) -> float:
        assert validation is not None
        value = validation.mean_average_precision(cast(DistillLoss, module).student, images)
        if on_judgement is not None:
            on_judgement(value)
        return value

    stopping = EarlyStopping(judge, config.judge_every, config.patience) if validation is not None else None
    about: dict[str, Any] = {"examples": len(table), "stopping": stopping, "description": "student"}
    average = fit(DistillLoss(student, config.loss), batch_of, config.training, **resumed, **about)
    return cast(DistillLoss, average).student


def run(config: DistillConfig, run_dir: Path, *, encoders: Sequence[str]) -> dict[str, Any]:
    """Distill run_dir/scores into run_dir/student, on all processes; returns the manifest."""
    corpus = Corpus(run_dir / "corpus")
    scores_manifest = open_stage(run_dir / "scores", "scores")
    corpus_folders, query_folders = folders(run_dir, "features", encoders), folders(run_dir, "query_features", encoders)
    folder = run_dir / "student"
    inputs = {
        "scores": scores_manifest["fingerprint"],
        "features": features_fingerprint(corpus_folders),
        "query_features": features_fingerprint(query_folders),
    }
    accelerator = Accelerator(mixed_precision=config.training.mixed_precision)
    checkpoint, mapped = folder / "checkpoint.safetensors", folder / "table"

    def work() -> dict[str, Any]:
        labels = pairs.stream_labels(run_dir / "scores", corpus.image_ids)
        if accelerator.is_main_process:
            pairs.make_table(labels, corpus_size=len(corpus), kind=config.target_kind, folder=mapped)
        accelerator.wait_for_everyone()
        query_ids = pairs.split_query_ids(run_dir / "scores", "train")
        features = MappedFeatures(corpus_folders, corpus.image_ids)
        scored = read_scores(run_dir / "scores", split="validation")
        validation = Validation(
            read_features(query_folders, [query.query_id for query in scored]),
            *([corpus.rows(query.image_ids) for query in scored], [query.influence for query in scored]),
        )
        resumed = {"checkpoint": checkpoint, "made_from": [config, inputs], "accelerator": accelerator}
        queries, judged = MappedFeatures(query_folders, query_ids), validation if scored else None
        student = distill(pairs.open_table(mapped), queries, features, config, validation=judged, **resumed)
        if accelerator.is_main_process:
            save_student(student, folder / "model.safetensors")
        facts = {name: scores_manifest[name] for name in ("generator_fingerprint", "teacher")}
        facts |= {"corpus_fingerprint": corpus.fingerprint, "training_queries": len(query_ids)}
        return {"encoders": list(encoders), "feature_dim": features.shape[1], **facts}

    temporary = [checkpoint, mapped]
    return make(folder, work, stage="student", config=config, inputs=inputs, accelerator=accelerator, temporary=temporary)


def save_student(student: Student, path: Path) -> None:
    """Write the weights as safetensors in half precision, atomically; later stages embed with what `load_student` reads."""
    with atomic_path(path) as temporary:
        save_file({name: value.detach().half().cpu().contiguous() for name, value in student.state_dict().items()}, temporary)


def load_student(path: Path, *, feature_dim: int, config: StudentConfig) -> Student:
    """Read weights written by `save_student`, strictly, as float32."""
    student = Student(feature_dim, config)
    student.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return student.eval()


def open_student(run_dir: Path) -> Student:
    """The student of a run folder."""
    manifest = open_stage(run_dir / "student", "student")
    shape = StudentConfig.from_json(manifest["config"]["student"])
    return load_student(run_dir / "student" / "model.safetensors", feature_dim=manifest["feature_dim"], config=shape)
