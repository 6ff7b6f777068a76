"""Figures: what a ground truth says of several methods, drawn, and written beside metrics.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastattr.core.files import atomic_path, read_json, write_json
from fastattr.evaluation.truth import GroundTruth, group_points
from fastattr.students.ranking import standard_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _axes() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    return figure, figure.subplots()


def lds_figure(result: Mapping[str, Any]) -> Figure:
    """Residual LDS, with its interval, against seconds a query, for the methods whose time is known."""
    figure, axes = _axes()
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
    figure, axes = _axes()
    table = truth.counterfactuals
    for method, rows in table[table["query_id"].isin(list(query_ids))].groupby("method"):
        base = truth.losses(["full"], rows["query_id"].tolist())[0]
        rises = rows.assign(rise=rows["loss"].to_numpy() - base).groupby("query_id")["rise"].mean().sort_values()
        axes.step(rises, 1 - np.arange(len(rises)) / len(rises), where="pre", label=f"{method} (mean {rises.mean():.4f})")
    axes.set(xlabel="rise of the query's loss after retraining without the first K", ylabel="part of the queries above")
    return figure


def reliability_figure(truth: GroundTruth, methods: Mapping[str, np.ndarray], query_ids: Sequence[str]) -> Figure:
    """Groups' shares by each method in eight equal parts, against the mean rise of the log loss once the group is left out."""
    figure, axes = _axes()
    for name, scores in methods.items():
        shares, rises = group_points(truth, scores, query_ids)
        shares, rises = shares.ravel(), rises.ravel()
        parts = [part for part in np.array_split(np.argsort(shares, kind="stable"), 8) if len(part)]
        x, y = ([values[part].mean() for part in parts] for values in (shares, rises))
        axes.errorbar(x, y, yerr=[standard_error(rises[part]) for part in parts], marker="o", capsize=2, label=name)
    axes.set(xlabel="share of the positive scores that a group holds", ylabel="rise of the query's log loss without the group")
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
