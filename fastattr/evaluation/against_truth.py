"""Against the truth: how well any method foretells what retraining does.

Reads a ground truth folder (truth.py) and any method's scores of the whole corpus; writes metrics.json and figures.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastattr.core.errors import InputError
from fastattr.core.files import atomic_path, read_json, write_json
from fastattr.core.stages import open_stage, require_same
from fastattr.evaluation import lds
from fastattr.evaluation.truth import GroundTruth, group_points
from fastattr.students.ranking import paired_bootstrap, standard_error, teacher_average_precision
from fastattr.teachers.scores import read_scores

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ScoreFunction = Callable[[Image.Image, str], Mapping[str, float]]
"""(query's image, its prompt) -> score of every training image by id, higher = more influential."""


def score_queries(score: ScoreFunction, truth: GroundTruth, query_ids: Sequence[str]) -> tuple[np.ndarray, float]:
    """Ask a method about each query: (Q, N) scores in the order of the truth's images, and the median seconds a query."""
    scores, seconds = [], []
    for query_id in tqdm(query_ids, desc="score", unit="query"):
        image, prompt = truth.image(query_id), truth.prompt(query_id)
        started = time.perf_counter()
        found = score(image, prompt)
        seconds.append(time.perf_counter() - started)
        scores.append(_of_all_images(found, truth, query_id))
    return np.array(scores), float(np.median(seconds))


def _of_all_images(found: Mapping[str, float], truth: GroundTruth, query_id: str) -> list[float]:
    """(N,) scores in the order of the truth's images."""
    missing = [image_id for image_id in truth.image_ids if image_id not in found]
    if missing:
        images = f"{len(missing)} of {len(truth.image_ids)} training images"
        raise InputError(f"{images} have no score for query {query_id}, e.g. {missing[:3]}; all are needed.")
    return [found[image_id] for image_id in truth.image_ids]


def _require_corpus(what: str, fingerprint: str, truth: GroundTruth) -> None:
    fix = f"The ground truth {truth.folder} is of another corpus: evaluate what was built on that one."
    require_same(f"the corpus of {what}", fingerprint, truth.corpus_fingerprint, fix)


def attributor_scores(name_or_path: str, truth: GroundTruth) -> ScoreFunction:
    """The similarities that an attributor gives all of its training images."""
    from fastattr.attributor.attribution import Attribution
    from fastattr.attributor.attributor import FastAttributor
    from fastattr.attributor.load import read_info

    _require_corpus(f"attributor {name_or_path!r}", read_info(name_or_path)["versions"]["corpus"], truth)
    attributor = FastAttributor.from_pretrained(name_or_path)

    def score(image: Image.Image, prompt: str) -> dict[str, float]:
        result = attributor.attribute(image, prompt, k=len(attributor))
        assert isinstance(result, Attribution)
        return {row.image_id: row.similarity for row in result.results}

    return score


def score_function(specification: str) -> ScoreFunction:
    """The function that 'MODULE:FUNCTION' names; InputError if it cannot be imported."""
    module, _, name = specification.partition(":")
    try:
        return cast(ScoreFunction, getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError) as error:
        raise InputError(f"score function {specification!r} cannot be imported ({error}); write MODULE:FUNCTION.") from error


def table_scores(folder: Path, truth: GroundTruth, query_ids: Sequence[str]) -> np.ndarray:
    """(Q, N) scores from a score table folder that covers these queries and the whole corpus.

    Raises:
        ArtifactMismatchError: the table belongs to another corpus.
        InputError: a query or an image is missing.
    """
    _require_corpus(str(folder), open_stage(folder, "scores")["corpus_fingerprint"], truth)
    rows = {query.query_id: query for query in read_scores(folder)}
    missing = [query_id for query_id in query_ids if query_id not in rows]
    if missing:
        raise InputError(f"{folder} has no scores of {len(missing)} queries of the ground truth, e.g. {missing[:3]}.")
    asked = [rows[query_id] for query_id in query_ids]
    found = [dict(zip(row.image_ids, row.influence.tolist(), strict=True)) for row in asked]
    return np.array([_of_all_images(each, truth, row.query_id) for each, row in zip(found, asked, strict=True)])


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
        seconds: by name, a query's, where they were measured.
        teacher: the method whose first 1% of the corpus are the relevant images of mAP(1%).
        pairs: (first, second) methods whose difference in LDS gets an interval.
        resamples: of the bootstrap, over models (by subset) and queries at once.
        seed: of the bootstrap.

    Returns:
        'n_models', 'n_subsets', 'n_queries', 'noise_ceiling' (of residual LDS), 'noise_ceiling_plain', '..._all_timesteps';
        'methods': for each 'lds', 'lds_residual' and 'lds_residual_all_timesteps' with `_low` and `_high`, 'map_1pct',
        `leave_k_out`, 'group_spearman_residual', 'seconds_per_query'; 'gains': each pair's differences in the three LDS.

    Raises:
        InputError: the truth holds no models on random halves.
    """
    halves = truth.retrained("half", query_ids)
    if not len(halves.kept):
        raise InputError(f"{truth.folder} holds no models on random halves; run benchmarks/ground_truth.py first.")
    outputs = lds.outputs_of(halves.losses)
    at_all = lds.residual_outputs(lds.outputs_of(truth.losses_by_timestep(halves.model_ids, query_ids).mean(axis=2)))
    plain = {name: lds.predictions_of(scores, halves.kept) for name, scores in methods.items()}
    residual = {name: lds.predictions_of(lds.residual_scores(scores), halves.kept) for name, scores in methods.items()}
    table: dict[str, dict[str, Any]] = {name: {} for name in methods}
    gains: dict[str, dict[str, Any]] = {f"{first} - {second}": {} for first, second in pairs}
    ceilings = {}
    for metric, ceiling, predicted, target in (
        ("lds", "noise_ceiling_plain", plain, outputs),
        ("lds_residual", "noise_ceiling", residual, lds.residual_outputs(outputs)),
        ("lds_residual_all_timesteps", "noise_ceiling_all_timesteps", residual, at_all),
    ):
        drawn = lds.bootstrap(predicted, target, halves.subsets, resamples=resamples, seed=seed)
        means = {name: float(lds.rank_correlations(values, target).mean()) for name, values in predicted.items()}
        for name in methods:
            low, high = lds.interval(drawn[name])
            table[name] |= {metric: means[name], f"{metric}_low": low, f"{metric}_high": high}
        for first, second in pairs:
            low, high = lds.interval(drawn[first] - drawn[second])
            gains[f"{first} - {second}"][metric] = {"mean": means[first] - means[second], "low": low, "high": high}
        one, other = (target[rows] for rows in halves.seed_pairs())
        ceilings[ceiling] = lds.noise_ceiling(one, other) if len(one) > 1 else None
    for name, scores in methods.items():
        table[name] |= {
            "map_1pct": None if teacher is None else _mean_average_precision(scores, methods[teacher]),
            **leave_k_out(truth, name, query_ids),
            "group_spearman_residual": _group_agreement(truth, scores, query_ids),
            "seconds_per_query": (seconds or {}).get(name),
        }
    counts = {"n_models": len(halves.kept), "n_subsets": len(set(halves.subsets)), "n_queries": len(query_ids)}
    return {**counts, **ceilings, "methods": table, "gains": gains}


def _mean_average_precision(scores: np.ndarray, teacher: np.ndarray) -> float:
    """mAP(L) with L = 1% of the corpus."""
    pairs, positives = zip(scores, teacher, strict=True), max(1, round(scores.shape[1] / 100))
    return float(np.mean([teacher_average_precision(own, theirs, positives=positives) for own, theirs in pairs]))


LEAVE_K_OUT = ("dloss", "dloss_judged", "mse", "similarity")
"""What is measured of a query once images are left out."""


def left_out(truth: GroundTruth, method: str, query_ids: Sequence[str]) -> pd.DataFrame:
    """What became of queries whose most influential images, by this method, were left out of the training.

    One row a query for which that was done, in the order of the ids: 'dloss' (rise of its loss over the full model's, all
    timesteps as in the paper's Table 1), 'dloss_judged' (over the timesteps that are judged by), 'mse' and 'similarity' (of
    the query drawn again); means where several models belong to one method and query.
    """
    table = truth.counterfactuals
    rows = table[(table["method"] == method) & table["query_id"].isin(list(query_ids))]

    def rise(losses: Callable[..., np.ndarray]) -> list[float]:
        return [losses([model], [query]).mean() - losses(["full"], [query]).mean() for model, query in pairs]

    pairs = list(zip(rows["model_id"], rows["query_id"], strict=True))
    rises, judged = rise(truth.losses_by_timestep), rise(truth.losses)
    return rows.assign(dloss=rises, dloss_judged=judged).groupby("query_id")[list(LEAVE_K_OUT)].mean()


def leave_k_out(truth: GroundTruth, method: str, query_ids: Sequence[str]) -> dict[str, float | None]:
    """Means of `left_out` as 'leave_k_out_dloss' and so on, with standard errors (`_se`); None where nothing was left out."""
    by_query = left_out(truth, method, query_ids)
    found: dict[str, float | None] = {}
    for column in LEAVE_K_OUT:
        values, key = by_query[column].to_numpy(), f"leave_k_out_{column}"
        found[key] = float(values.mean()) if len(values) else None
        found[f"{key}_se"] = standard_error(values) if len(values) else None
    return found


def leave_k_out_gains(
    truth: GroundTruth, pairs: Sequence[tuple[str, str]], query_ids: Sequence[str], *, seed: int = 0
) -> dict[str, dict[str, dict[str, float]]]:
    """By pair and measure the methods' difference ('mean', 95% bootstrap 'low', 'high') over the queries that both share."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for first, second in pairs:
        ours, theirs = left_out(truth, first, query_ids), left_out(truth, second, query_ids)
        shared = ours.index.intersection(theirs.index)
        if shared.empty:
            continue
        found[f"{first} - {second}"] = gains = {}
        for column in LEAVE_K_OUT:
            ends = paired_bootstrap(*(part.loc[shared, column].to_numpy() for part in (ours, theirs)), seed=seed)
            gains[column] = dict(zip(("mean", "low", "high"), ends, strict=True))
    return found


def _group_agreement(truth: GroundTruth, scores: np.ndarray, query_ids: Sequence[str]) -> float | None:
    """Mean over queries of the rank correlation of shares and rises over the groups, both residual; None without groups."""
    shares, rises = group_points(truth, scores, query_ids)
    if shares.shape[1] < 3:
        return None
    return float(lds.rank_correlations(lds.residual_scores(shares).T, lds.residual_outputs(rises.T)).mean())


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    return figure, axes


def lds_figure(result: Mapping[str, Any]) -> Figure:
    """Residual LDS, with its interval, against seconds a query, for the methods whose time is known."""
    figure, axes = _axes("seconds a query", "residual LDS (95% interval; dashed: noise ceiling)")
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
    return figure


def leave_k_out_figure(truth: GroundTruth, query_ids: Sequence[str]) -> Figure:
    """For each method: in which part of the queries the loss rose by more than x once its first K images were left out."""
    figure, axes = _axes("rise of the query's loss after retraining without the first K", "part of the queries above")
    table = truth.counterfactuals
    for method, rows in table[table["query_id"].isin(list(query_ids))].groupby("method"):
        base = truth.losses(["full"], rows["query_id"].tolist())[0]
        rises = rows.assign(rise=rows["loss"].to_numpy() - base).groupby("query_id")["rise"].mean().sort_values()
        axes.step(rises, 1 - np.arange(len(rises)) / len(rises), where="pre", label=f"{method} (mean {rises.mean():.4f})")
    return figure


def reliability_figure(truth: GroundTruth, methods: Mapping[str, np.ndarray], query_ids: Sequence[str]) -> Figure:
    """Groups' shares by each method in eight equal parts, against the mean rise of the log loss once the group is left out."""
    figure, axes = _axes("share of the positive scores that a group holds", "rise of the query's log loss without the group")
    for name, scores in methods.items():
        shares, rises = group_points(truth, scores, query_ids)
        shares, rises = shares.ravel(), rises.ravel()
        parts = [part for part in np.array_split(np.argsort(shares, kind="stable"), 8) if len(part)]
        x, y = ([values[part].mean() for part in parts] for values in (shares, rises))
        axes.errorbar(x, y, yerr=[standard_error(rises[part]) for part in parts], marker="o", capsize=2, label=name)
    return figure


def write_truth_report(
    folder: Path, result: Mapping[str, Any], truth: GroundTruth, methods: Mapping[str, np.ndarray], query_ids: Sequence[str]
) -> None:
    """Write metrics.json (its 'ground_truth'; what else it holds is kept) and the figures."""
    path = folder / "metrics.json"
    write_json(path, {**(read_json(path) if path.exists() else {}), "ground_truth": dict(result)})
    figures = {"lds.png": lds_figure(result)}
    if len(truth.counterfactuals):
        figures["leave-k-out.png"] = leave_k_out_figure(truth, query_ids)
    if len(truth.retrained("group", query_ids).kept):
        figures["shares.png"] = reliability_figure(truth, methods, query_ids)
    for name, figure in figures.items():
        if figure.axes[0].get_legend_handles_labels()[0]:
            figure.axes[0].legend(fontsize=7)
        with atomic_path(folder / name) as temporary:
            figure.savefig(temporary, dpi=150)


def run_truth(method: str, truth_dir: Path, out: Path, *, split: str = "test") -> dict[str, Any]:
    """Evaluate one method against a ground truth, with chance beside it; writes `out`, returns what metrics.json gains.

    `method` is an attributor (folder or Hub id), a score table folder, or a score function 'MODULE:FUNCTION'.

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
    compared = compare_with_truth(methods, truth, query_ids, seconds=seconds, pairs=[(method, "random")])
    result = {"truth": truth.manifest["fingerprint"], "split": split, **compared}
    write_truth_report(out, result, truth, {method: scores}, query_ids)
    return result
