"""Distill: teach the student the teacher's ranking.

Reads scores/, features/, query_features/; writes student/ (model.safetensors, config in manifest.json). Only the
queries of the training split are used. The target of a pair is 1 - rank / C, 0 for outsiders; the loss is binary
cross-entropy on a positively scaled cosine. Source: arXiv:2511.10721, sec. 4 (there: labels rank / K, with the sign
of the scale left to learning).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from fastattr.artifacts import MANIFEST, atomic_path, finished, open_stage, read_json, write_manifest
from fastattr.corpus import Corpus
from fastattr.errors import InputError
from fastattr.features import features_fingerprint, folders, read_features
from fastattr.scores import ScoredQuery, ranks_of, read_scores
from fastattr.student import Student, StudentConfig
from fastattr.training import TrainingConfig, fit


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Settings of the student and its training."""

    student: StudentConfig = field(default_factory=StudentConfig)
    candidates_per_step: int = 256
    """Candidates drawn of each query's set at each step."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=600,
            batch_size=16,
            learning_rate=1e-3,
            weight_decay=0.01,
            warmup_steps=20,
            ema_decay=0.99,
            checkpoint_every=200,
        )
    )


def targets_of(influence: np.ndarray, is_outsider: np.ndarray) -> np.ndarray:
    """Targets of one query's candidates.

    Args:
        influence: (C,) teacher's scores, higher = more influential.
        is_outsider: (C,) bool.

    Returns:
        (C,) float32 in [0, 1]: 1 for the most influential, towards 0 for the least; outsiders 0.
    """
    closeness = 1.0 - ranks_of(influence) / len(influence)
    return np.where(is_outsider, 0.0, closeness).astype(np.float32)


class DistillLoss(nn.Module):
    """Binary cross-entropy of scaled cosines; forward(query features, candidate features, targets) -> scalar."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, queries: torch.Tensor, candidates: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Args: queries (Q, F); candidates (Q, C, F); targets (Q, C) in [0, 1]."""
        cosine = torch.einsum("qd,qcd->qc", self.student(queries), self.student(candidates))
        return F.binary_cross_entropy_with_logits(self.student.logits(cosine), targets)


def train_student(
    scored: Sequence[ScoredQuery],
    query_features: np.ndarray,
    corpus_features: np.ndarray,
    rows: Sequence[np.ndarray],
    config: DistillConfig,
    *,
    checkpoint: Path,
    made_from: object = None,
    accelerator: Accelerator | None = None,
) -> Student:
    """Train a student.

    Args:
        scored: the Q training queries with their candidates' scores.
        query_features: (Q, F) in the same order.
        corpus_features: (N, F).
        rows: for each query the (C,) rows of its candidates in `corpus_features`.
        config: shape and training.
        checkpoint: see `training.fit`.
        made_from: see `training.fit`.
        accelerator: see `training.fit`.

    Returns:
        The student with averaged weights.
    """
    if not scored:
        raise InputError("there is no training query to distill from; score some with `fastattr teach`.")
    targets = [targets_of(query.influence, query.is_outsider) for query in scored]
    torch.manual_seed(config.training.seed)
    student = Student(corpus_features.shape[1], config.student)
    student.start_from(corpus_features)

    def batch_of(picked: np.ndarray, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        candidates, labels = [], []
        for query in picked:
            size = min(config.candidates_per_step, min(len(rows[other]) for other in picked))
            drawn = torch.randperm(len(rows[query]), generator=generator)[:size].numpy()
            candidates.append(corpus_features[rows[query][drawn]])
            labels.append(targets[query][drawn])
        return tuple(torch.from_numpy(part) for part in (query_features[picked], np.stack(candidates), np.stack(labels)))

    average = fit(
        DistillLoss(student),
        batch_of,
        config.training,
        examples=len(scored),
        checkpoint=checkpoint,
        made_from=made_from,
        accelerator=accelerator,
        description="student",
    )
    trained = average.student
    assert isinstance(trained, Student)
    return trained


def run(config: DistillConfig, run_dir: Path, *, encoders: Sequence[str]) -> dict[str, Any]:
    """Distill run_dir/scores into run_dir/student; returns the manifest."""
    corpus = Corpus(run_dir / "corpus")
    scores_manifest = open_stage(run_dir / "scores", "scores")
    corpus_folders, query_folders = folders(run_dir, "features", encoders), folders(run_dir, "query_features", encoders)
    folder = run_dir / "student"
    inputs = {
        "scores": scores_manifest["fingerprint"],
        "features": features_fingerprint(corpus_folders),
        "query_features": features_fingerprint(query_folders),
    }
    if finished(folder, stage="student", config=config, inputs=inputs):
        manifest: dict[str, Any] = read_json(folder / MANIFEST)
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    scored = read_scores(run_dir / "scores", split="train")
    accelerator = Accelerator(mixed_precision=config.training.mixed_precision)
    checkpoint = folder / "checkpoint.safetensors"
    corpus_features = read_features(corpus_folders, corpus.image_ids)
    student = train_student(
        scored,
        read_features(query_folders, [query.query_id for query in scored]),
        corpus_features,
        [corpus.rows(query.image_ids) for query in scored],
        config,
        checkpoint=checkpoint,
        made_from=[config, inputs],
        accelerator=accelerator,
    )
    if accelerator.is_main_process:
        save_student(student, folder / "model.safetensors")
        write_manifest(
            folder,
            stage="student",
            config=config,
            inputs=inputs,
            encoders=list(encoders),
            feature_dim=corpus_features.shape[1],
            corpus_fingerprint=corpus.fingerprint,
            generator_fingerprint=scores_manifest["generator_fingerprint"],
            teacher=scores_manifest["teacher"],
            training_queries=len(scored),
        )
        checkpoint.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    manifest = read_json(folder / MANIFEST)
    return manifest


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
