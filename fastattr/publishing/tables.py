"""Tables: Markdown of a card, and the metrics of an attributor as tables.

Names, captions and licences come from strangers: `text` and `code` print them as characters, never as Markdown or HTML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fastattr.core.errors import harmless

METRIC_NAMES = {"map": "mAP", "spearman": "Spearman correlation", "top_k_overlap": "top-k overlap", "lds": "LDS"}
LONGEST_NAME = 200
"""Characters of a name or caption that a card prints."""
MARKDOWN = re.compile(r"([\\`*_\[\]|~]|:(?=//)|(?<=www)\.)")
"""Signs that may begin a link, an emphasis, code or a table's column, and those that make a link of an address."""
BAR = re.compile(r"(?<!\\)((?:\\\\)*)\|")
"""A bar that nothing escapes."""


def shortened(value: object) -> str:
    """A stranger's text as one line of harmless characters, of `LONGEST_NAME` at most."""
    line = harmless(" ".join(str(value).split()))
    return line if len(line) <= LONGEST_NAME else f"{line[: LONGEST_NAME - 1]}…"


def text(value: object) -> str:
    """A stranger's text for a card's prose or a table's cell."""
    return MARKDOWN.sub(r"\\\1", escape(shortened(value), quote=False))


def code(value: object) -> str:
    """A value in the font of code; a backtick in it, which would end that, becomes a quote."""
    return f"`{shortened(value).replace('`', chr(39))}`"


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
    if not (found := measured(metrics)):
        return "\n\n".join(["Not evaluated against its teacher.", *benchmark_tables(metrics)])

    def interval(values: Mapping[str, Any] | None, key: str) -> str:
        if values is None:
            return ""
        mean, half = values[key], 1.96 * values[f"{key}_se"]
        return f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]"

    rows = [[code(method), *(interval(each.get(method), key) for key, each in found)] for method in metrics["methods"]]
    gains = [
        f"Paired gain of the student over the untuned features, {metric_name(key.removesuffix('_gain'), metrics)}: "
        f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]."
        for key, value in metrics.items()
        if key.endswith("_gain") and isinstance(value, Mapping) and {"mean", "low", "high"} <= set(value)
    ]
    teacher, queries = code(metrics.get("teacher", "unknown")), metrics.get("queries", "?")
    candidates = f", {metrics['candidates_per_query']:,} training images each" if "candidates_per_query" in metrics else ""
    heading = f"Agreement with the teacher ({teacher}) on {queries} held-out queries{candidates}. Means over queries with 95% "
    heading += "intervals; `random` is chance, `untuned` the features before training."
    means = table(["method", *(metric_name(key, metrics) for key, _ in found)], rows)
    return "\n\n".join([heading, means, *gains, *benchmark_tables(metrics)])


def benchmark_tables(metrics: Mapping[str, Any]) -> list[str]:
    """What benchmarks wrote into metrics.json: a paragraph and a table for each command."""
    found = []
    for run in metrics.get("benchmarks", []):
        rows = [[code(row["key"]), f"{row['value']:.4g}", text(row["meaning"])] for row in run["rows"]]
        found.append(f"{code(run['command'])}, seed {run['seed']}, {text(run['date'][:10])}:")
        found.append(table(["key", "value", "what it is"], rows))
    return found


def settings_table(settings: Mapping[str, Any]) -> str:
    """A table of settings."""
    rows = [[text(key), "not set" if value is None else code(value)] for key, value in settings.items()]
    return table(["setting", "value"], rows) if rows else "Not recorded."


def listed(names: Sequence[str], *, most: int = 1000) -> str:
    """The first `most` names, for a card's prose, and how many more there are."""
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(text, names[:most])) + rest or "creators who are not recorded"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells that `text` and `code` made; a bar in one would start a column."""
    lines = [list(header), ["---"] * len(header), *([BAR.sub(r"\1\\|", cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
