"""Against the teacher: how well a student's rankings follow its teacher's.

Reads scores/, features/, query_features/, student/; writes evaluation/metrics.json. Rankings are compared within each query's
candidate set. mAP(L) takes the teacher's first L candidates as relevant. Standard errors are over queries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastattr.core.errors import InputError
from fastattr.core.files import read_json, write_json
from fastattr.core.settings import at_least
from fastattr.core.stages import finished, open_stage, require_same, write_manifest
from fastattr.corpus.store import Corpus
from fastattr.features.encoder import unit_vectors
from fastattr.features.store import features_fingerprint, folders, read_features, slug
from fastattr.students.distill import open_student
from fastattr.students.ranking import ndcg, paired_bootstrap, spearman, standard_error, teacher_average_precision, top_k_overlap
from fastattr.students.student import embed
from fastattr.teachers.scores import ScoredQuery, read_scores


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of the evaluation."""

    split: Literal["test", "validation", "train"] = "test"
    positives_percent: float = 1.0
    """L of mAP(L), in percent of the corpus."""
    overlap_k: int = 20
    """k of the top-k overlap."""
    seed: int = 0
    """Of the random baseline and the bootstrap."""

    def __post_init__(self) -> None:
        at_least(self, 1, "overlap_k")
        if not 0 < self.positives_percent <= 100:
            raise InputError(f"positives_percent must be above 0 and at most 100, got {self.positives_percent}")


def compare(
    scored: Sequence[ScoredQuery], methods: Mapping[str, Sequence[np.ndarray]], *, positives: int, overlap_k: int
) -> dict[str, dict[str, np.ndarray]]:
    """By method and metric (Q,) values, of Q queries and for each method Q arrays of (C,) scores of the same candidates.

    'map' is mAP(L), L = `positives`; for 'ndcg' an image is as relevant as its influence above the query's least.
    """
    table = {}
    for name, scores in methods.items():
        pairs = [(own, query.influence) for own, query in zip(scores, scored, strict=True)]
        table[name] = {
            "map": np.array([teacher_average_precision(own, teacher, positives=positives) for own, teacher in pairs]),
            "spearman": np.array([spearman(own, teacher) for own, teacher in pairs]),
            "top_k_overlap": np.array([top_k_overlap(own, teacher, overlap_k) for own, teacher in pairs]),
            "ndcg": np.array([ndcg(own, teacher - teacher.min()) for own, teacher in pairs]),
        }
    return table


def run(config: EvaluateConfig, run_dir: Path, *, encoders: Sequence[str]) -> dict[str, Any]:
    """Evaluate run_dir/student against run_dir/scores; returns what metrics.json holds."""
    corpus = Corpus(run_dir / "corpus")
    student_manifest = open_stage(run_dir / "student", "student")
    scores_manifest = open_stage(run_dir / "scores", "scores")
    require_same("the corpus of scores/", scores_manifest["corpus_fingerprint"], corpus.fingerprint, "Score this corpus first.")
    corpus_folders, query_folders = (folders(run_dir, name, encoders) for name in ("features", "query_features"))
    folder, inputs = run_dir / "evaluation", {"features": features_fingerprint(corpus_folders)}
    inputs |= {"scores": scores_manifest["fingerprint"], "student": student_manifest["fingerprint"]}
    if finished(folder, stage="evaluation", config=config, inputs=inputs):
        return dict(read_json(folder / "metrics.json"))
    scored = read_scores(run_dir / "scores", split=config.split)
    if not scored:
        raise InputError(f"the score table has no {config.split!r} query to evaluate on.")
    rows, query_ids = [corpus.rows(query.image_ids) for query in scored], [query.query_id for query in scored]

    def cosines(paths: Sequence[tuple[Path, Path]], embedded: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
        """Q arrays of cosines of each query and its candidates, by the features in pairs of query and corpus folders."""
        ours, theirs = zip(*paths, strict=True)
        own, of_corpus = embedded(read_features(ours, query_ids)), embedded(read_features(theirs, corpus.image_ids))
        return [of_corpus[part] @ query for part, query in zip(rows, own, strict=True)]

    both = list(zip(query_folders, corpus_folders, strict=True))
    methods = {"student": cosines(both, partial(embed, open_student(run_dir))), "untuned": cosines(both, unit_vectors)}
    for specification, pair in zip(encoders, both, strict=True):
        methods[f"untuned {slug(specification)}"] = cosines([pair], unit_vectors)
    rng = np.random.default_rng(config.seed)
    methods["random"] = [rng.random(len(part)) for part in rows]
    positives = max(1, round(len(corpus) * config.positives_percent / 100))
    table = compare(scored, methods, positives=positives, overlap_k=config.overlap_k)
    gain, low, high = paired_bootstrap(table["student"]["map"], table["untuned"]["map"], seed=config.seed)
    metrics = {
        "split": config.split,
        "queries": len(scored),
        "candidates_per_query": len(rows[0]),
        "corpus_images": len(corpus),
        "positives": positives,
        "overlap_k": config.overlap_k,
        "teacher": scores_manifest["teacher"],
        "methods": {
            name: {key: float(values.mean()) for key, values in of_method.items()}
            | {f"{key}_se": standard_error(values) for key, values in of_method.items()}
            for name, of_method in table.items()
        },
        "map_gain": {"mean": gain, "low": low, "high": high},
    }
    write_json(folder / "metrics.json", metrics)
    write_manifest(folder, stage="evaluation", config=config, inputs=inputs)
    return metrics
