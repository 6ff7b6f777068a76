"""Tables: Markdown tables of a card, and the metrics of an attributor as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

METRIC_NAMES = {"map": "mAP", "spearman": "Spearman correlation", "top_k_overlap": "top-k overlap", "lds": "LDS"}


def measured(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(metric, methods) for every metric that methods have with a standard error."""
    methods = metrics.get("methods", {})
    keys = dict.fromkeys(key for values in methods.values() for key in values if f"{key}_se" in values)
    return [(key, {name: values for name, values in methods.items() if key in values}) for key in keys]


def metric_name(key: str, metrics: Mapping[str, Any]) -> str:
    """A metric's name for readers, with the number of positives or neighbours that it was taken at."""
    name = METRIC_NAMES.get(key, key)
    if key == "map" and "positives" in metrics:
        return f"{name}({metrics['positives']})"
    return f"{name}, k = {metrics['overlap_k']}" if key == "top_k_overlap" and "overlap_k" in metrics else name


def results_table(metrics: Mapping[str, Any]) -> str:
    """The metrics as a table: each method's mean with its 95% interval, the untuned features and chance beside the student."""
    found = measured(metrics)
    if not found:
        return "\n\n".join(["Not evaluated against its teacher.", *benchmark_tables(metrics)])
    rows = []
    for method in metrics["methods"]:
        cells = [f"`{method}`"]
        for key, methods in found:
            values = methods.get(method)
            if values is None:
                cells.append("")
                continue
            mean, half = values[key], 1.96 * values[f"{key}_se"]
            cells.append(f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]")
        rows.append(cells)
    gains = [
        f"Paired gain of the student over the untuned features, {metric_name(key.removesuffix('_gain'), metrics)}: "
        f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]."
        for key, value in metrics.items()
        if key.endswith("_gain") and isinstance(value, Mapping) and {"mean", "low", "high"} <= set(value)
    ]
    teacher, queries = metrics.get("teacher", "unknown"), metrics.get("queries", "?")
    candidates = f", {metrics['candidates_per_query']:,} training images each" if "candidates_per_query" in metrics else ""
    return "\n\n".join(
        [
            f"Agreement with the teacher (`{teacher}`) on {queries} held-out queries{candidates}. Means over queries with 95% "
            "intervals; `random` is chance, `untuned` the features before training.",
            table(["method", *(metric_name(key, metrics) for key, _ in found)], rows),
            *gains,
            *benchmark_tables(metrics),
        ]
    )


def benchmark_tables(metrics: Mapping[str, Any]) -> list[str]:
    """What benchmarks wrote into metrics.json: a paragraph and a table for each command."""
    found = []
    for run in metrics.get("benchmarks", []):
        rows = [[f"`{row['key']}`", f"{row['value']:.4g}", row["meaning"]] for row in run["rows"]]
        found += [f"`{run['command']}`, seed {run['seed']}, {run['date'][:10]}:", table(["key", "value", "what it is"], rows)]
    return found


def settings_table(settings: Mapping[str, Any]) -> str:
    """A table of settings."""
    rows = [[key, "not set" if value is None else f"`{value}`"] for key, value in settings.items()]
    return table(["setting", "value"], rows) if rows else "Not recorded."


def listed(names: Sequence[str], *, most: int = 1000) -> str:
    """The first `most` names, and how many more there are."""
    if not names:
        return "creators who are not recorded"
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar in a cell would start a column."""
    lines = [list(header), ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
