"""The table of truth: every method and every null against emoji-bench's retrained models.

    python benchmarks/truth.py [--quick]     the table, docs/truth.md and benchmarks/results/truth.json
    python benchmarks/truth.py --sweep       the teachers' settings, chosen without test queries: TRUTH/settings.json
    python benchmarks/truth.py --exact       the exact teacher's scores of the test queries, kept in the ground truth folder
    python benchmarks/truth.py --rankings    whom leave-K-out removes: RUN/rankings.parquet, for benchmarks/ground_truth.py

The order for a new ground truth: ground_truth.py --only lds --only groups, --sweep, --exact, --rankings, ground_truth.py
--only leave-k-out, and the table. Students learn from training queries alone. All teachers are the library's
(fastattr/teachers), and of the generator that drew the queries; the null 'student_other_teacher' alone has another one's.
Seconds a query are those of the query (its features or its own gradient, and the comparison with all images), without what
is done once for all queries.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import lab
import machine
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lab import EXACT, FEATURES, SETTINGS, Bench, Cost, options_of, train
from machine import number, span, with_error

from fastattr.core.files import atomic_path, read_json, write_json
from fastattr.core.settings import read_yaml
from fastattr.core.stages import MANIFEST, fingerprint, open_stage, require_same, write_manifest
from fastattr.evaluation.against_truth import compare_with_truth, leave_k_out_gains, table_scores, write_truth_report
from fastattr.evaluation.lds import popularity
from fastattr.evaluation.retrain import RANKINGS
from fastattr.evaluation.subsets import RetrainConfig, chosen_queries
from fastattr.gradients.compression import Compression, GradientConfig, gradient_features
from fastattr.students.distill import DistillConfig
from fastattr.students.student import embed
from fastattr.teachers.kernels import averaged, similarity_scores
from fastattr.teachers.scores import ScoredQuery, write_shard
from fastattr.teachers.task import layers_to_unlearn

DOCS = Path(__file__).parents[1] / "docs" / "truth.md"
RESULTS = Path(__file__).parent / "results" / "truth.json"
SIMILARITIES = ("similarity_image", "similarity_text", "similarity_both", "diffusion_features")
TEACHERS = ("abu_plus_exact", "abu_plus_linearised")
AVERAGED = ("abu_plus_linearised", "d_trak_ekfac")
STUDENTS = ("student", "student_shuffled_teacher", "student_other_teacher")
LEAVE_K_OUT = ("abu_plus_exact", "abu_plus_linearised", "d_trak", "similarity_both", "student")


def _student(**training: int) -> DistillConfig:
    return DistillConfig(loss="mse_scores", training=replace(DistillConfig().training, **training))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is computed."""

    cost: Cost = field(default_factory=Cost)
    train_queries: int = 320
    """Of which the students learn."""
    test_queries: int = 1000
    """At most; all there are."""
    most_query_draws: int = 1000
    most_loss_draws: int = 1000
    """`Settings.query_draws` and `Settings.loss_draws`, at most."""
    student: DistillConfig = field(default_factory=lambda: _student(steps=300, warmup_steps=20))
    """Its loss did best in cross-validation over the training prompts (docs/truth.md)."""
    resamples: int = 1000
    seed: int = 0


QUICK = Sizes(
    train_queries=24, test_queries=16, most_query_draws=16, most_loss_draws=2, resamples=100, student=_student(steps=60)
)
QUICK = replace(QUICK, cost=Cost(factor_examples=64, exact_query_draws=64, exact_draws=4, gradient_width=4096))


class Timed:
    """Seconds a query, by method."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, queries: int, *methods: str) -> Iterator[None]:
        """Add the time spent inside, divided by the number of queries, to each of these methods."""
        started = time.perf_counter()
        yield
        for name in methods:
            self.seconds[name] += (time.perf_counter() - started) / queries


def all_scores(
    bench: Bench, query_ids: Sequence[str], sizes: Sizes, timed: Timed, *, nulls: bool = True
) -> dict[str, np.ndarray]:
    """(Q, N) scores of all methods but the exact teacher, in the truth's order; `nulls` adds students of wrong teachers."""
    truth, here, count = bench.truth, bench.lab, len(query_ids)
    train_ids = truth.of_split("train")[: sizes.train_queries]
    methods: dict[str, np.ndarray] = {"random": np.random.default_rng(sizes.seed).random((count, len(truth.image_ids)))}
    theirs = {space: bench.images(space) for space in FEATURES}
    own: dict[str, np.ndarray] = {}
    for space in FEATURES:
        name = "diffusion_features" if space == "diffusion" else f"similarity_{space}"
        both = () if space == "diffusion" else ("similarity_both",)
        with timed.measure(count, name, *both, *STUDENTS):
            own[space] = bench.queries(query_ids, space)
        with timed.measure(count, name):
            methods[name] = similarity_scores(own[space], theirs[space])
    with timed.measure(count, "similarity_both"):
        methods["similarity_both"] = similarity_scores(_beside(own, FEATURES[:2]), _beside(theirs, FEATURES[:2]))
    labels = {}
    for name in here.settings.methods:
        teacher = here.fit(name)
        with timed.measure(count, name):
            methods[name] = here.scores(teacher, query_ids)
        if name in AVERAGED:
            labels[name] = here.scores(teacher, train_ids)
        del teacher
    with timed.measure(count, "gradient_no_curvature"):
        methods["gradient_no_curvature"] = without_curvature(bench, query_ids)
    methods["averaged"] = averaged(*(methods[name] for name in AVERAGED))
    timed.seconds["averaged"] = sum(timed.seconds[name] for name in AVERAGED)
    methods["popularity"] = popularity(methods["abu_plus_linearised"])

    taught = {"student": averaged(*labels.values())}
    if nulls:
        taught["student_shuffled_teacher"] = np.roll(taught["student"], 1, axis=0)  # each is taught another one's scores
        other = bench.open_lab("other_generator")
        taught["student_other_teacher"] = averaged(*(other.scores(other.fit(name), train_ids) for name in AVERAGED))
    features = _beside({space: bench.queries(train_ids, space) for space in FEATURES}, FEATURES)
    for name, scores in taught.items():
        student = train(bench, train_ids, features, _beside(theirs, FEATURES), scores, sizes.student)
        index = embed(student, _beside(theirs, FEATURES))
        with timed.measure(count, name):
            methods[name] = embed(student, _beside(own, FEATURES)) @ index.T
    return {name: bench.in_order(scores) for name, scores in methods.items()}


def _beside(features: Mapping[str, np.ndarray], spaces: Sequence[str]) -> np.ndarray:
    """(B, F) features of several spaces, side by side."""
    return np.concatenate([features[space] for space in spaces], axis=1)


def without_curvature(bench: Bench, query_ids: Sequence[str]) -> np.ndarray:
    """(Q, N) inner products of the gradients themselves."""
    here = bench.lab
    layers, settings = layers_to_unlearn(here.generator, here.settings.pattern), here.settings
    sizes = {"width": here.cost.gradient_width, "batch_size": here.cost.batch_size}
    drawn = GradientConfig(whiten=False, draws=settings.loss_draws, **sizes)
    plain = Compression(layers, drawn)

    def gradients(images: Any, config: GradientConfig) -> np.ndarray:
        return gradient_features(here.generator, layers, images, np.arange(len(images.image_ids)), plain, config)

    theirs = gradients(here.corpus, drawn)
    asked = replace(drawn, draws=settings.query_draws, antithetic=True)
    return np.concatenate([gradients(here.queries([query_id]), asked) @ theirs.T for query_id in query_ids])


def score_exactly(bench: Bench) -> None:
    """Write the exact teacher's score table of the test queries into the ground truth folder; several may share the work."""
    truth, folder = bench.truth, bench.truth.folder / EXACT
    config = {name: getattr(bench.lab.settings, name) for name in ("pattern", "damping", "rise")}
    config |= {name: getattr(bench.lab.cost, name) for name in ("exact_query_draws", "exact_draws", "factor_examples", "seed")}
    query_ids, inputs = truth.of_split("test"), {"ground_truth": truth.manifest["fingerprint"]}
    inputs |= {"generator": bench.lab.generator.fingerprint}
    shards = bench.run_dir / f"exact-{fingerprint([config, inputs])}"
    seconds = []
    for query_id in np.random.default_rng(os.getpid()).permutation(query_ids).tolist():
        if (shards / f"{query_id}.parquet").exists():
            continue
        started = time.perf_counter()
        scores = bench.in_order(bench.lab.exact([query_id])[0])
        seconds.append(time.perf_counter() - started)
        nobody = np.zeros(len(scores), dtype=bool)
        row = ScoredQuery(query_id, truth.prompt(query_id), "test", truth.image_ids, scores, nobody, bench.lab.settings.rise)
        write_shard(shards / f"{query_id}.parquet", [row], teacher="abu_plus_exact", config=fingerprint(config))
    table = pa.concat_tables([pq.read_table(shards / f"{query_id}.parquet") for query_id in query_ids])
    with atomic_path(folder / "test-00000.parquet") as temporary:
        pq.write_table(table, temporary, compression="zstd")
    facts = {"teacher": "abu_plus_exact", "corpus_fingerprint": truth.corpus_fingerprint}
    facts |= {"generator_fingerprint": bench.lab.generator.fingerprint}
    spent = round(float(np.median(seconds)), 2) if seconds else read_json(folder / MANIFEST)["seconds_per_query"]
    write_manifest(folder, stage="scores", config=config, inputs=inputs, **facts, seconds_per_query=spent)


def report(bench: Bench, sizes: Sizes) -> tuple[dict[str, Any], dict[str, np.ndarray], list[str]]:
    """Every method and null on the test queries; returns the results, the (Q, N) scores by method and the Q query ids."""
    truth, timed, started = bench.truth, Timed(), time.perf_counter()
    query_ids = truth.of_split("test")[: sizes.test_queries]
    methods = all_scores(bench, query_ids, sizes, timed)
    exact = truth.folder / EXACT
    methods["abu_plus_exact"] = table_scores(exact, truth, query_ids)
    manifest, fingerprint_now = open_stage(exact, "scores"), bench.lab.generator.fingerprint
    require_same(f"the generator of {exact}", manifest["generator_fingerprint"], fingerprint_now, "Run with --exact again.")
    timed.seconds["abu_plus_exact"] = manifest["seconds_per_query"]
    rivals = (*SIMILARITIES, "popularity", "random")
    pairs = [(teacher, rival) for teacher in TEACHERS for rival in rivals] + [("d_trak_ekfac", "d_trak")]
    pairs += [("abu_plus_exact", other) for other in ("abu_plus_linearised", "d_trak", "d_trak_ekfac", "averaged", "student")]
    pairs += [("student", rival) for rival in (*SIMILARITIES, *STUDENTS[1:], "popularity")]
    asked: dict[str, Any] = {"seconds": timed.seconds, "teacher": "abu_plus_exact", "resamples": sizes.resamples}
    result = compare_with_truth(methods, truth, query_ids, pairs=pairs, seed=sizes.seed, **asked)
    removed = [(method, rival) for method in LEAVE_K_OUT for rival in ("random", "similarity_both") if method != rival]
    students = {name for name in methods if name.startswith(("student", "random", "popularity"))}
    teachers = [name for name in methods if name not in students and name not in SIMILARITIES]
    facts = {
        "best_teacher": max(teachers, key=lambda name: result["methods"][name]["lds_residual"]),
        "leave_k_out_gains": leave_k_out_gains(truth, removed, query_ids, seed=sizes.seed),
        "settings": asdict(bench.lab.settings),
        "ground_truth": truth.manifest["fingerprint"],
    }
    made = {"seed": sizes.seed, "quick": sizes == QUICK, "benchmark_seconds": round(time.perf_counter() - started, 1)}
    return {**result, **facts, **made, **machine.describe()}, methods, query_ids


def write_rankings(bench: Bench, sizes: Sizes) -> None:
    """Write RUN/rankings.parquet: each method's first K images for each query that leave-K-out takes."""
    truth, query_ids = bench.truth, chosen_queries(bench.truth.queries, bench.config)
    methods = all_scores(bench, query_ids, sizes, Timed(), nulls=False)
    methods["abu_plus_exact"] = table_scores(truth.folder / EXACT, truth, query_ids)
    count, ids = bench.config.removed_count(len(bench.corpus)), np.array(truth.image_ids)
    rows = [
        {"method": method, "query_id": query_id, "image_ids": ids[np.argsort(-scores, kind="stable")[:count]].tolist()}
        for method in LEAVE_K_OUT
        for query_id, scores in zip(query_ids, methods[method], strict=True)
    ]
    with atomic_path(bench.run_dir / RANKINGS) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)


def parts_of(result: Mapping[str, Any]) -> dict[str, list[str]]:
    """What docs/truth.md shows, by the name of its mark."""
    kinds = ("noise_ceiling", "noise_ceiling_all_timesteps", "noise_ceiling_plain")
    ceilings = [number(result[kind]) or "unknown" for kind in kinds]
    measured = (
        f"`{result['command']}`, seed {result['seed']}: {result['n_models']} models on {result['n_subsets']} random halves, "
        f"{result['n_queries']} test queries; noise ceiling {ceilings[0]} (residual), {ceilings[1]} (residual, all timesteps), "
        f"{ceilings[2]} (plain). {result['cpu']}, {result['cores']} cores, {result['benchmark_seconds'] / 60:.1f} minutes, "
        f"{result['date'][:10]}."
    )
    lds = ("lds_residual", "lds_residual_all_timesteps", "lds")
    removals = {"dloss": ("dL x 1000", 1000, 2), "dloss_judged": ("middle dL x 1000", 1000, 2), "mse": ("MSE x 100", 100, 2)}
    removals["similarity"] = ("similarity", 1, 3)
    titles = [title for title, _, _ in removals.values()]

    def row_of(name: str, row: Mapping[str, Any]) -> list[str]:
        left_out = [with_error(row, f"leave_k_out_{key}", factor=by, digits=to) for key, (_, by, to) in removals.items()]
        ends = [number(row["group_spearman_residual"]), number(row["seconds_per_query"], 4)]
        return [name, *(span(row, key) for key in lds), number(row["map_1pct"]), *left_out, *ends]

    methods = sorted(result["methods"].items(), key=lambda item: -item[1]["lds_residual"])
    header = ["method", "residual LDS", "all timesteps", "plain LDS", "mAP(1%)", *titles, "groups", "s / query"]
    gains = [[pair, *(span(found[key]) for key in lds[:2])] for pair, found in result["gains"].items()]
    removed = [
        [pair, *(span(found[key], factor=scale, digits=2) for key, (_, scale, _) in removals.items())]
        for pair, found in result["leave_k_out_gains"].items()
    ]
    return {
        "measured": [measured],
        "table": machine.table(header, [row_of(*item) for item in methods]),
        "gains": machine.table(["difference in residual LDS", "middle of the schedule", "all timesteps"], gains),
        "removals": machine.table(["difference", *titles], removed),
    }


def sweep_parts(swept: Mapping[str, Any]) -> dict[str, list[str]]:
    """What docs/truth.md shows of the sweep, by the name of its mark."""
    figures, rows = {"method", "queries", "lds", "lds_residual", "lds_residual_low", "lds_residual_high"}, []
    for row in swept["tried"]:
        changed = ", ".join(f"{key} {value}" for key, value in row.items() if key not in figures)
        rows.append([row["method"], changed, span(row, "lds_residual"), number(row["lds"]), str(row["queries"])])
    edges = np.linspace(0, 1, len(swept["noise_ceilings"]) + 1)
    header = ["part of the schedule", *(f"{low:.1%} to {high:.1%}" for low, high in pairwise(edges))]
    ceilings = [[f"noise ceiling ({swept['models']} models)", *map(number, swept["noise_ceilings"])]]
    return {
        "ceilings": machine.table(header, ceilings),
        "sweep": machine.table(["method", "settings", "residual LDS", "plain LDS", "queries"], rows),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Do one of the four things."""
    parser = machine.parser(__doc__, json=RESULTS, quick="fewer queries and draws, no document: less than 2 minutes")
    parser.add_argument("--docs", type=Path, default=DOCS, help="document whose tables are replaced (%(default)s)")
    what = parser.add_mutually_exclusive_group()
    for name in ("sweep", "exact", "rankings"):
        what.add_argument(f"--{name}", action="store_true")
    options = options_of(parser, arguments)
    sizes, config = QUICK if options.quick else Sizes(), read_yaml(options.config, RetrainConfig)
    if options.sweep:
        bench = lab.open_bench(options.truth, options.run, config, options.corpus, lab.Settings(), sizes.cost)
        return write_json(options.truth / SETTINGS, lab.sweep(bench))
    settings = lab.read_settings(options.truth).at_most(sizes.most_query_draws, sizes.most_loss_draws)
    bench = lab.open_bench(options.truth, options.run, config, options.corpus, settings, sizes.cost)
    if options.exact:
        return score_exactly(bench)
    if options.rankings:
        return write_rankings(bench, sizes)
    result, methods, query_ids = report(bench, sizes)
    parts = parts_of(result)
    print("\n\n".join("\n".join(lines) for lines in parts.values()))
    if not options.quick:
        write_json(options.json, result)
        shown = {name: methods[name] for name in (*TEACHERS, "student", "similarity_both")}
        write_truth_report(options.docs.parent / "truth", result, bench.truth, shown, query_ids)
        machine.fill(options.docs, parts | sweep_parts(read_json(options.truth / SETTINGS)))
    return None


if __name__ == "__main__":
    machine.run(main)
