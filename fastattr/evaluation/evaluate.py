"""Evaluate: how well a student follows its teacher, and how well any method foretells what retraining does.

Against a teacher: reads scores/ (test split), features/, query_features/, student/; writes evaluation/metrics.json.
Rankings are compared within each query's candidate set, the images that the teacher scored. mAP(L) takes the teacher's
first L candidates as relevant, with L in percent of the whole corpus. Standard errors are over queries.

Against a ground truth (truth.py): reads the ground truth and scores by any method, an attributor among them;
writes metrics.json (under 'ground_truth', beside what is there) and figures. Scores are of the whole corpus.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastattr.core.errors import InputError
from fastattr.core.files import atomic_path, finished, open_stage, read_json, require_same, write_json, write_manifest
from fastattr.corpus.store import Corpus
from fastattr.evaluation.truth import (
    GroundTruth,
    bootstrap,
    group_shares,
    interval,
    noise_ceiling,
    outputs_of,
    predictions_of,
    rank_correlations,
    residual_outputs,
    residual_scores,
)
from fastattr.features.store import features_fingerprint, folders, read_features, slug
from fastattr.students.distill import open_student
from fastattr.students.ranking import ndcg, paired_bootstrap, spearman, standard_error, teacher_average_precision, top_k_overlap
from fastattr.students.student import embed_both
from fastattr.teachers.scores import ScoredQuery, read_scores

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ScoreFunction = Callable[[Image.Image, str], Mapping[str, float]]
"""(query's image, its prompt) -> score of every training image by id, higher = more influential."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of the evaluation."""

    split: str = "test"
    positives_percent: float = 1.0
    """L of mAP(L), in percent of the corpus."""
    overlap_k: int = 20
    """k of the top-k overlap."""
    seed: int = 0
    """Of the random baseline and the bootstrap."""


def compare(
    scored: Sequence[ScoredQuery], methods: Mapping[str, Sequence[np.ndarray]], *, positives: int, overlap_k: int
) -> dict[str, dict[str, np.ndarray]]:
    """Per-query metrics of several methods.

    Args:
        scored: Q queries with their teacher's scores.
        methods: for each method Q arrays of (C,) scores of the same candidates, higher = more influential.
        positives: L of mAP(L).
        overlap_k: k of the top-k overlap.

    Returns:
        method -> metric -> (Q,) values; metrics 'map', 'spearman', 'top_k_overlap', and 'ndcg', where an image is as
        relevant as its influence above the query's least.
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
    corpus_folders, query_folders = folders(run_dir, "features", encoders), folders(run_dir, "query_features", encoders)
    folder = run_dir / "evaluation"
    inputs = {
        "scores": scores_manifest["fingerprint"],
        "student": student_manifest["fingerprint"],
        "features": features_fingerprint(corpus_folders),
    }
    if finished(folder, stage="evaluation", config=config, inputs=inputs):
        metrics: dict[str, Any] = read_json(folder / "metrics.json")
        return metrics
    scored = read_scores(run_dir / "scores", split=config.split)
    if not scored:
        raise InputError(f"the score table has no {config.split!r} query to evaluate on.")
    rows = [corpus.rows(query.image_ids) for query in scored]
    query_ids = [query.query_id for query in scored]
    methods = {"student": _student_scores(run_dir, corpus, query_ids, rows, corpus_folders, query_folders)}
    methods["untuned"] = _cosines(
        read_features(query_folders, query_ids), read_features(corpus_folders, corpus.image_ids), rows
    )
    for specification, ours, theirs in zip(encoders, query_folders, corpus_folders, strict=True):
        features = read_features([ours], query_ids), read_features([theirs], corpus.image_ids)
        methods[f"untuned {slug(specification)}"] = _cosines(*features, rows)
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
            name: {
                key: value
                for metric, values in of_method.items()
                for key, value in ((metric, float(values.mean())), (f"{metric}_se", standard_error(values)))
            }
            for name, of_method in table.items()
        },
        "map_gain": {"mean": gain, "low": low, "high": high},
    }
    write_json(folder / "metrics.json", metrics)
    write_manifest(folder, stage="evaluation", config=config, inputs=inputs)
    return metrics


def _student_scores(
    run_dir: Path,
    corpus: Corpus,
    query_ids: Sequence[str],
    rows: Sequence[np.ndarray],
    corpus_folders: Sequence[Path],
    query_folders: Sequence[Path],
) -> list[np.ndarray]:
    """Q arrays of the student's similarities to each query's candidates."""
    features = read_features(query_folders, query_ids), read_features(corpus_folders, corpus.image_ids)
    ours, theirs = embed_both(open_student(run_dir), *features)
    return [theirs[part] @ query for part, query in zip(rows, ours, strict=True)]


def _cosines(queries: np.ndarray, corpus: np.ndarray, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Q arrays of cosines between each query's features and those of its candidates."""
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    corpus = corpus / np.linalg.norm(corpus, axis=1, keepdims=True)
    return [corpus[part] @ query for part, query in zip(rows, queries, strict=True)]


def score_queries(score: ScoreFunction, truth: GroundTruth, query_ids: Sequence[str]) -> tuple[np.ndarray, float]:
    """Ask a method for the scores of all training images for each query.

    Args:
        score: the method.
        truth: whose queries and images.
        query_ids: Q of them.

    Returns:
        (Q, N) scores in the order of the truth's images, and the median seconds a query.

    Raises:
        InputError: the method gives no score for an image.
    """
    scores = np.empty((len(query_ids), len(truth.image_ids)))
    seconds = []
    for row, query_id in enumerate(tqdm(query_ids, desc="score", unit="query")):
        image, prompt = truth.image(query_id), truth.prompt(query_id)
        started = time.perf_counter()
        found = score(image, prompt)
        seconds.append(time.perf_counter() - started)
        missing = [image_id for image_id in truth.image_ids if image_id not in found]
        if missing:
            raise InputError(f"{len(missing)} training images have no score for query {query_id}, e.g. {missing[:3]}.")
        scores[row] = [found[image_id] for image_id in truth.image_ids]
    return scores, float(np.median(seconds))


def attributor_scores(name_or_path: str, truth: GroundTruth) -> ScoreFunction:
    """The similarities that an attributor gives all of its training images.

    Raises:
        ArtifactMismatchError: it was built from another corpus than the ground truth.
    """
    from fastattr.attributor.attribution import Attribution
    from fastattr.attributor.attributor import FastAttributor, read_info

    require_same(
        f"the corpus of attributor {name_or_path!r}",
        read_info(name_or_path)["versions"]["corpus"],
        truth.corpus_fingerprint,
        f"The ground truth {truth.folder} is of another corpus: evaluate an attributor that was built on that one.",
    )
    attributor = FastAttributor.from_pretrained(name_or_path)

    def score(image: Image.Image, prompt: str) -> dict[str, float]:
        result = attributor.attribute(image, prompt, k=len(attributor))
        assert isinstance(result, Attribution)
        return {row.image_id: row.similarity for row in result.results}

    return score


def score_function(specification: str) -> ScoreFunction:
    """A function 'MODULE:FUNCTION' that can be imported.

    Raises:
        InputError: there is none.
    """
    module, _, name = specification.partition(":")
    try:
        found: ScoreFunction = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"score function {specification!r} cannot be imported ({error}); write MODULE:FUNCTION.") from error
    return found


def table_scores(folder: Path, truth: GroundTruth, query_ids: Sequence[str]) -> np.ndarray:
    """(Q, N) scores from a score table folder that covers these queries and the whole corpus.

    Raises:
        ArtifactMismatchError: the table belongs to another corpus.
        InputError: a query or an image is missing.
    """
    require_same(
        f"the corpus of {folder}",
        open_stage(folder, "scores")["corpus_fingerprint"],
        truth.corpus_fingerprint,
        f"The ground truth {truth.folder} is of another corpus: score the queries of that one.",
    )
    rows = {query.query_id: query for query in read_scores(folder)}
    missing = [query_id for query_id in query_ids if query_id not in rows]
    if missing:
        raise InputError(f"{folder} has no scores of {len(missing)} queries of the ground truth, e.g. {missing[:3]}.")
    scores = np.empty((len(query_ids), len(truth.image_ids)))
    for position, query_id in enumerate(query_ids):
        found = dict(zip(rows[query_id].image_ids, rows[query_id].influence.tolist(), strict=True))
        if len(found) < len(truth.image_ids):
            raise InputError(f"{folder} scores {len(found)} of {len(truth.image_ids)} images for {query_id}; all are needed.")
        scores[position] = [found[image_id] for image_id in truth.image_ids]
    return scores


def compare_with_truth(
    methods: Mapping[str, np.ndarray],
    truth: GroundTruth,
    query_ids: Sequence[str],
    *,
    seconds: Mapping[str, float] | None = None,
    teacher: str | None = None,
    pairs: Sequence[tuple[str, str]] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything that a ground truth says about several methods.

    Args:
        methods: by name (Q, N) scores of all training images, in the order of the truth's images.
        truth: the ground truth.
        query_ids: the Q queries.
        seconds: by name, seconds a query, where they were measured.
        teacher: the method whose first 1% of the corpus are the relevant images of mAP(1%).
        pairs: (first, second) methods whose difference in LDS gets an interval.
        resamples: of the bootstrap, over models (by subset) and queries at once.
        seed: of the bootstrap.

    Returns:
        'n_models', 'n_queries', 'noise_ceiling' (of residual LDS), 'noise_ceiling_plain' and 'noise_ceiling_all_timesteps';
        'methods': for each 'lds', 'lds_residual' and the same of the losses over all timesteps,
        'lds_residual_all_timesteps', each with `_low` and `_high`, 'map_1pct', what `leave_k_out` gives,
        'group_spearman_residual' and 'seconds_per_query'; and 'gains': for each pair the differences in the three LDS, each
        with mean, low and high.

    Raises:
        InputError: the truth holds no models on random halves.
    """
    halves = truth.retrained("half", query_ids)
    if not len(halves.kept):
        raise InputError(f"{truth.folder} holds no models on random halves; run benchmarks/ground_truth.py first.")
    outputs = outputs_of(halves.losses)
    at_all = outputs_of(truth.losses_by_timestep(halves.model_ids, query_ids).mean(axis=2))
    targets = {
        "lds": outputs,
        "lds_residual": residual_outputs(outputs),
        "lds_residual_all_timesteps": residual_outputs(at_all),
    }
    residual = {name: predictions_of(residual_scores(scores), halves.kept) for name, scores in methods.items()}
    predicted = {
        "lds": {name: predictions_of(scores, halves.kept) for name, scores in methods.items()},
        "lds_residual": residual,
        "lds_residual_all_timesteps": residual,
    }
    drawn = {
        metric: bootstrap(predicted[metric], target, halves.subsets, resamples=resamples, seed=seed)
        for metric, target in targets.items()
    }
    means = {
        metric: {name: float(rank_correlations(values, targets[metric]).mean()) for name, values in of_metric.items()}
        for metric, of_metric in predicted.items()
    }
    table: dict[str, dict[str, Any]] = {}
    for name, scores in methods.items():
        row: dict[str, Any] = {}
        for metric in targets:
            low, high = interval(drawn[metric][name])
            row |= {metric: means[metric][name], f"{metric}_low": low, f"{metric}_high": high}
        row["map_1pct"] = None if teacher is None else _mean_average_precision(scores, methods[teacher])
        row |= leave_k_out(truth, name, query_ids) | {"group_spearman_residual": _group_agreement(truth, scores, query_ids)}
        row["seconds_per_query"] = (seconds or {}).get(name)
        table[name] = row
    gains = {}
    for first, second in pairs:
        gains[f"{first} - {second}"] = {
            metric: dict(
                zip(
                    ("mean", "low", "high"),
                    (means[metric][first] - means[metric][second], *interval(drawn[metric][first] - drawn[metric][second])),
                    strict=True,
                )
            )
            for metric in targets
        }
    ceilings = {}
    rows = halves.seed_pairs()
    for metric, key in (("lds_residual", ""), ("lds", "_plain"), ("lds_residual_all_timesteps", "_all_timesteps")):
        first, second = (targets[metric][part] for part in rows)
        ceilings[f"noise_ceiling{key}"] = noise_ceiling(first, second) if len(first) > 1 else None
    return {
        "n_models": len(halves.kept),
        "n_subsets": len(set(halves.subsets)),
        "n_queries": len(query_ids),
        **ceilings,
        "methods": table,
        "gains": gains,
    }


def _mean_average_precision(scores: np.ndarray, teacher: np.ndarray) -> float:
    """mAP(L) with L = 1% of the corpus."""
    positives = max(1, round(scores.shape[1] / 100))
    pairs = zip(scores, teacher, strict=True)
    return float(np.mean([teacher_average_precision(own, theirs, positives=positives) for own, theirs in pairs]))


LEAVE_K_OUT = ("dloss", "dloss_judged", "mse", "similarity")
"""What is measured of a query once images are left out."""


def left_out(truth: GroundTruth, method: str, query_ids: Sequence[str]) -> pd.DataFrame:
    """What became of queries whose most influential images, by this method, were left out of the training.

    Returns:
        One row a query for which that was done, in the order of the ids: 'dloss' (rise of its loss over the full model's, all
        timesteps as in the paper's Table 1), 'dloss_judged' (the same over the timesteps that are judged by), 'mse' and
        'similarity' (of the query drawn again); means where several models belong to one method and query.
    """
    table = truth.counterfactuals
    rows = table[(table["method"] == method) & table["query_id"].isin(list(query_ids))]
    pairs = list(zip(rows["model_id"], rows["query_id"], strict=True))
    rises = [
        truth.losses_by_timestep([model_id], [query_id]).mean() - truth.losses_by_timestep(["full"], [query_id]).mean()
        for model_id, query_id in pairs
    ]
    judged = [float((truth.losses([one], [two]) - truth.losses(["full"], [two]))[0, 0]) for one, two in pairs]
    by_query: pd.DataFrame = rows.assign(dloss=rises, dloss_judged=judged).groupby("query_id")[list(LEAVE_K_OUT)].mean()
    return by_query


def leave_k_out(truth: GroundTruth, method: str, query_ids: Sequence[str]) -> dict[str, float | None]:
    """`left_out` as 'leave_k_out_dloss' and so on, means over the queries with their standard errors (`_se`).

    None for a method whose images were never left out.
    """
    by_query = left_out(truth, method, query_ids)
    found: dict[str, float | None] = {}
    for column in LEAVE_K_OUT:
        values = by_query[column].to_numpy()
        key = f"leave_k_out_{column}"
        found |= {
            key: float(values.mean()) if len(values) else None,
            f"{key}_se": standard_error(values) if len(values) else None,
        }
    return found


def leave_k_out_gains(
    truth: GroundTruth, pairs: Sequence[tuple[str, str]], query_ids: Sequence[str], *, seed: int = 0
) -> dict[str, dict[str, dict[str, float]]]:
    """By pair of methods and measure, their paired difference over the queries that both were measured on.

    Each has 'mean', 'low' and 'high', a 95% bootstrap interval over queries; pairs that share no query are left out.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for first, second in pairs:
        ours, theirs = left_out(truth, first, query_ids), left_out(truth, second, query_ids)
        shared = ours.index.intersection(theirs.index)
        if shared.empty:
            continue
        found[f"{first} - {second}"] = {
            column: dict(
                zip(
                    ("mean", "low", "high"),
                    paired_bootstrap(ours.loc[shared, column].to_numpy(), theirs.loc[shared, column].to_numpy(), seed=seed),
                    strict=True,
                )
            )
            for column in LEAVE_K_OUT
        }
    return found


def group_points(truth: GroundTruth, scores: np.ndarray, query_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(Q, G) shares of the groups in a method's positive scores, and (Q, G) rises of the log loss once each is left out."""
    removed = truth.retrained("group", query_ids)
    full = outputs_of(truth.losses(["full"], query_ids))
    rises = (full - outputs_of(removed.losses)).T if len(removed.kept) else np.zeros((len(query_ids), 0))
    return group_shares(scores, ~removed.kept), rises


def _group_agreement(truth: GroundTruth, scores: np.ndarray, query_ids: Sequence[str]) -> float | None:
    """Mean over queries of the rank correlation of shares and rises over the groups, both residual; None without groups."""
    shares, rises = group_points(truth, scores, query_ids)
    if shares.shape[1] < 3:
        return None
    return float(rank_correlations(residual_scores(shares).T, residual_outputs(rises.T)).mean())


def lds_figure(result: Mapping[str, Any]) -> Figure:
    """Residual LDS, with its interval, against seconds a query, for the methods whose time is known."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, row in result["methods"].items():
        if row["seconds_per_query"] is None:
            continue
        x, y = row["seconds_per_query"], row["lds_residual"]
        axes.errorbar(x, y, yerr=[[y - row["lds_residual_low"]], [row["lds_residual_high"] - y]], fmt="o", capsize=2)
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(5, 4), fontsize=7)
    axes.axhline(0, color="grey", linewidth=0.8)
    if result["noise_ceiling"] is not None:
        axes.axhline(result["noise_ceiling"], color="grey", linestyle="--", linewidth=0.8)
    if axes.has_data():
        axes.set_xscale("log")
    axes.set(xlabel="seconds a query", ylabel="residual LDS (95% interval; dashed: noise ceiling)")
    return figure


def leave_k_out_figure(truth: GroundTruth, query_ids: Sequence[str]) -> Figure:
    """For each method: in which part of the queries the loss rose by more than x once its first K images were left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    table = truth.counterfactuals
    for method, rows in table[table["query_id"].isin(list(query_ids))].groupby("method"):
        base = truth.losses(["full"], rows["query_id"].tolist())[0]
        rises = rows.assign(rise=rows["loss"].to_numpy() - base).groupby("query_id")["rise"].mean().sort_values()
        axes.step(rises, 1 - np.arange(len(rises)) / len(rises), where="pre", label=f"{method} (mean {rises.mean():.4f})")
    axes.set(xlabel="rise of the query's loss after retraining without the first K", ylabel="part of the queries above")
    if axes.has_data():
        axes.legend(fontsize=7)
    return figure


def reliability_figure(truth: GroundTruth, methods: Mapping[str, np.ndarray], query_ids: Sequence[str]) -> Figure:
    """Groups' shares by each method in eight equal parts, against the mean rise of the log loss once the group is left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, scores in methods.items():
        shares, rises = group_points(truth, scores, query_ids)
        order = np.argsort(shares.ravel(), kind="stable")
        parts = [part for part in np.array_split(order, 8) if len(part)]
        x = [shares.ravel()[part].mean() for part in parts]
        y = [rises.ravel()[part].mean() for part in parts]
        axes.errorbar(x, y, yerr=[standard_error(rises.ravel()[part]) for part in parts], marker="o", capsize=2, label=name)
    axes.set(xlabel="share of the positive scores that a group holds", ylabel="rise of the query's log loss without the group")
    if axes.has_data():
        axes.legend(fontsize=7)
    return figure


def write_truth_report(
    folder: Path,
    result: Mapping[str, Any],
    truth: GroundTruth,
    methods: Mapping[str, np.ndarray],
    query_ids: Sequence[str],
) -> None:
    """Write metrics.json (its 'ground_truth'; what else it holds is kept) and the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.json"
    write_json(path, {**(read_json(path) if path.exists() else {}), "ground_truth": dict(result)})
    figures = {"lds.png": lds_figure(result)}
    if len(truth.counterfactuals):
        figures["leave-k-out.png"] = leave_k_out_figure(truth, query_ids)
    if len(truth.retrained("group", query_ids).kept):
        figures["shares.png"] = reliability_figure(truth, methods, query_ids)
    for name, figure in figures.items():
        with atomic_path(folder / name) as temporary:
            figure.savefig(temporary, dpi=150)


def run_truth(method: str, truth_dir: Path, out: Path, *, split: str = "test") -> dict[str, Any]:
    """Evaluate one method against a ground truth, with chance beside it; writes `out`, returns what metrics.json gains.

    Args:
        method: an attributor (folder or Hub id), a score table folder, or a score function 'MODULE:FUNCTION'.
        truth_dir: the ground truth folder.
        out: where metrics.json and the figures go.
        split: 'test' or 'validation'.

    Raises:
        ArtifactMismatchError: the method belongs to another corpus.
    """
    truth = GroundTruth(truth_dir)
    query_ids = truth.of_split(split)
    seconds = {}
    if (Path(method) / "manifest.json").exists() and open_stage(Path(method), "scores"):
        scores = table_scores(Path(method), truth, query_ids)
    else:
        score = score_function(method) if ":" in method else attributor_scores(method, truth)
        scores, seconds[method] = score_queries(score, truth, query_ids)
    methods = {method: scores, "random": np.random.default_rng(0).random(scores.shape)}
    result = {
        "truth": truth.manifest["fingerprint"],
        "split": split,
        **compare_with_truth(methods, truth, query_ids, seconds=seconds, pairs=[(method, "random")]),
    }
    write_truth_report(out, result, truth, {method: scores}, query_ids)
    return result
