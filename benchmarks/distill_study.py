"""The paper's studies of distillation, on the emoji score tables, as one command.

    python benchmarks/distill_study.py [--studies losses queries ...] [--quick]

features        mAP(1%) before and after tuning, by feature space
losses          by loss, with image and text features
queries         by number of training queries
outsiders       by share of the pairs that are outsiders
candidates      by candidates per query
budget          at a fixed number of pairs: more queries against more candidates
Each with three seeds of network and draws (and of what is left out). mAP(L) is on the test queries, within their candidates, by
exact scores; nothing is chosen here. Results are kept one by one, so that a killed run goes on; docs/distill-study.png and
benchmarks/results/distill_study.json are made from all that are there. A student that several studies show is trained once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import machine
import numpy as np
import student as benchmark
from student import DOCS, PERCENTS, Sizes, Tables, open_tables, recipe
from tqdm import tqdm

from fastattr.core.errors import FastattrError
from fastattr.core.files import atomic_path, read_json, write_json
from fastattr.students.distill import DistillConfig
from fastattr.students.losses import LOSSES
from fastattr.students.pairs import labels_of, make_table
from fastattr.students.ranking import standard_error
from fastattr.teachers.scores import ScoredQuery

RESULTS = Path(__file__).parent / "results" / "distill_study.json"
STUDIES = ("features", "losses", "queries", "outsiders", "candidates", "budget")
SEEDS = 3
STEPS = 400
QUERIES = (125, 250, 500, 1000, 2000)
OUTSIDERS = (0.0, 0.1, 0.2, 0.4)
CANDIDATES = (125, 250, 500, 1000, 2000)
BUDGET = 250_000
"""Pairs of the study `budget`."""


@dataclass(frozen=True)
class Case:
    """One bar or point of a study: all that determines a student but the seed."""

    study: str
    label: str
    space: str
    config: DistillConfig
    queries: int
    candidates: int
    keep_outsiders: bool = True

    @property
    def settings(self) -> Case:
        """The case without its name: cases of several studies that share these share their student."""
        return replace(self, study="", label="")


def cases(tables: Tables, sizes: Sizes) -> list[Case]:
    """All cases of all studies."""
    every, most = len(tables.scored["train"]), len(tables.rows["train"][0])
    base = recipe(sizes, loss="listwise", judge_every=50, patience=4)

    def case(study: str, label: object, **options: Any) -> Case:
        settings = {"space": "both", "config": base, "queries": every, "candidates": most}
        return Case(study, str(label), **{**settings, **options})

    found = [case("features", space, space=space) for space in tables.images]
    found += [case("losses", loss, config=replace(base, loss=loss)) for loss in LOSSES]
    found += [case("queries", count, queries=count) for count in QUERIES if count <= every]
    found += [
        case("outsiders", share, config=replace(base, outsider_share=share), keep_outsiders=share > 0) for share in OUTSIDERS
    ]
    found += [case("candidates", count, candidates=count) for count in CANDIDATES if count <= most]
    pairs = [(BUDGET // count, count) for count in CANDIDATES if count <= most and BUDGET // count <= every]
    found += [case("budget", f"{queries} x {count}", queries=queries, candidates=count) for queries, count in pairs]
    return found


def cut(query: ScoredQuery, rows: np.ndarray, case: Case, rng: np.random.Generator) -> tuple[ScoredQuery, np.ndarray]:
    """A random part of a query's candidates, in the shares of neighbours and outsiders that they had."""
    allowed = np.arange(len(rows)) if case.keep_outsiders else np.flatnonzero(~query.is_outsider)
    kept = np.sort(rng.permutation(allowed)[: case.candidates])
    ids = [query.image_ids[place] for place in kept]
    part = replace(query, image_ids=ids, influence=query.influence[kept], is_outsider=query.is_outsider[kept])
    return part, rows[kept]


def run_case(tables: Tables, case: Case, seed: int) -> dict[str, float]:
    """mAP(L) of one student on the test queries."""
    rng = np.random.default_rng([seed, case.queries, case.candidates])
    picked = np.sort(rng.permutation(len(tables.scored["train"]))[: case.queries])
    parts = [cut(tables.scored["train"][row], tables.rows["train"][row], case, rng) for row in picked]
    labels = labels_of([query for query, _ in parts], [rows for _, rows in parts])
    training = replace(case.config.training, seed=seed, batch_size=min(case.config.training.batch_size, case.queries))
    config = replace(case.config, training=training)
    table = make_table(labels, corpus_size=len(tables.corpus), kind=config.target_kind)
    started = time.perf_counter()
    trained = tables.train(case.space, config, table=table, picked=picked)
    similarities = tables.similarities(case.space, "test", trained)
    found = {key: float(tables.precision(similarities, "test", percent).mean()) for key, percent in PERCENTS.items()}
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def summary(tables: Tables, results: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Means over seeds and their standard errors, flat, and untuned features beside them."""
    found: dict[str, Any] = {}
    for space in tables.images:
        similarities = tables.similarities(space, "test")
        for key, percent in PERCENTS.items():
            found[f"features_{space}_untuned_map_{key}"] = float(tables.precision(similarities, "test", percent).mean())
    names = sorted({name.rpartition("/")[0] for name in results})
    for name in names:
        of_seeds = [values for key, values in results.items() if key.rpartition("/")[0] == name]
        flat = name.replace("/", "_").replace(" ", "")
        for key in PERCENTS:
            values = np.array([of_seed[key] for of_seed in of_seeds])
            found |= {f"{flat}_map_{key}": float(values.mean()), f"{flat}_map_{key}_se": standard_error(values)}
        found |= {f"{flat}_seeds": len(of_seeds), f"{flat}_seconds": float(np.mean([one["seconds"] for one in of_seeds]))}
    return found


def figure(found: Mapping[str, Any], all_cases: Sequence[Case], path: Path) -> None:
    """mAP(1%) of every study, with standard errors over seeds."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 6.5), layout="constrained")
    for axes, study in zip(drawn.subplots(2, 3).flat, STUDIES, strict=True):
        labels = [case.label for case in all_cases if case.study == study]
        labels = [label for label in labels if f"{study}_{label.replace(' ', '')}_map_1pct" in found]
        flat = [f"{study}_{label.replace(' ', '')}" for label in labels]
        means, errors = ([found[f"{name}_map_1pct{ending}"] for name in flat] for ending in ("", "_se"))
        axes.errorbar(range(len(labels)), means, yerr=errors, fmt="o" if study in {"features", "losses"} else "o-", capsize=3)
        if study == "features":
            untuned = [found[f"features_{label}_untuned_map_1pct"] for label in labels]
            axes.plot(range(len(labels)), untuned, "x", color="grey", label="untuned")
            axes.legend(fontsize=8)
        axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=8)
        axes.set(title=study, ylabel="mAP(1%)")
    with atomic_path(path) as temporary:
        drawn.savefig(temporary, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing of the studies asked for, and write table and figure of all that is there."""
    parser = argparse.ArgumentParser(description="Study what a student's quality depends on.")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the numbers are written (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, no figure")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--run", type=Path, default=Path("runs/emoji"), help="finished emoji run folder (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/student"), help="results one by one (%(default)s)")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    sizes = replace(Sizes(), steps=20 if options.quick else STEPS, precision=benchmark.fast_precision())
    tables = open_tables(options.run, options.work)
    all_cases = cases(tables, sizes)
    kept = options.work / ("study-quick.json" if options.quick else "study.json")
    results: dict[str, dict[str, float]] = read_json(kept) if kept.exists() else {}
    seeds = range(1 if options.quick else SEEDS)
    every = {f"{case.study}/{case.label}/{seed}": (case, seed) for seed in seeds for case in all_cases}
    trained = {(case.settings, seed): results[name] for name, (case, seed) in every.items() if name in results}
    wanted = {name: found for name, found in every.items() if found[0].study in options.studies}
    for name, (case, seed) in tqdm(wanted.items(), desc="students", unit="student"):
        if (case.settings, seed) not in trained:
            trained[case.settings, seed] = run_case(tables, case, seed)
        results[name] = trained[case.settings, seed]
        write_json(kept, results)
    found = summary(tables, results)
    if not options.quick:
        figure(found, all_cases, DOCS / "distill-study.png")
    facts = {"seeds": SEEDS, "steps": sizes.steps, "quick": options.quick, "test_queries": len(tables.scored["test"])}
    seconds = {"benchmark_seconds": round(time.perf_counter() - started, 1)}
    machine.report({**found, **facts, **machine.describe(), **seconds}, options.json)


if __name__ == "__main__":
    try:
        main()
    except FastattrError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
