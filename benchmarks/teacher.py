"""Benchmark of the teacher: is it exact, how far does first order hold, what does it cost, what does it need.

    python benchmarks/teacher.py --json FILE [--quick] [--run runs/emoji] [--work runs/teacher-benchmark] [--processes 2]

Scores queries of its own, drawn by the embedded emoji generator, over random images of the corpus, with the real teacher,
once for each setting. The corpus is RUN's or, without one, made for the moment (needs npm). What is in WORK is not done
again, so a killed benchmark goes on where it stood; without --work everything is temporary.
An evaluation is one latent through the network, forward or backward. Correlations are means over queries with 95%
bootstrap intervals (_low, _high). `fewer draws` are compared with the paper's 50,000 by the first-order scores they give.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradients
import lab
import machine
import numpy as np
import yaml
from emoji import open_corpus
from scipy.stats import spearmanr

from fastattr import FastattrError
from fastattr.core.files import read_json
from fastattr.core.models import ASSETS
from fastattr.core.stages import MANIFEST, fingerprint
from fastattr.corpus.stage import CorpusConfig
from fastattr.corpus.store import Corpus, write_corpus
from fastattr.features.candidates import CandidatesConfig, read_candidates, write_candidates
from fastattr.generators.families import CROSS_ATTENTION_KV
from fastattr.generators.queries import SPLITS, Queries, QueriesConfig, run as draw_queries
from fastattr.pipeline.config import BuildConfig
from fastattr.pipeline.networks import count, shape_of
from fastattr.pipeline.plan import stage_costs
from fastattr.teachers import teach
from fastattr.teachers.config import TeacherConfig
from fastattr.teachers.cost import Probe, Sizes as PlanSizes, teacher_plan
from fastattr.teachers.scores import read_scores

GENERATOR = ASSETS / "emoji" / "generator"
SCRIPT = Path(__file__).resolve().parent.parent / "hub_scripts" / "teacher.py"
LAUNCH = "--multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
"""With ACCELERATE_USE_CPU, launches that many processes on a CPU; `--cpu --num_processes 2` silently runs one."""
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
RISES = {"05pct": 0.005, "2pct": 0.02, "10pct": 0.1}
"""Relative rise of the query's own loss by the step, by its name in the results."""
PAPER_QUERY_DRAWS, PAPER_LOSS_DRAWS = 50_000, 20
"""(timestep, noise) draws for a query's gradient and for a training image's loss, arXiv:2511.10721."""
SHARED = ("encoded", "ekfac", "base_loss", "gradients")
"""Stage folders that follow from corpus, generator and settings alone: all parts of the benchmark share them."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured."""

    images: int = 0
    """Random images of the corpus to take; 0 takes all."""
    queries: int = 20
    """Queries scored exactly and to first order."""
    candidates: int = 5000
    """Training images scored for each of them."""
    loss_draws: int = 2
    query_draws: int = 256
    factor_examples: int = 2048
    pattern: str = CROSS_ATTENTION_KV
    """Weights that are unlearned: those of the figures in docs/teacher.md."""
    reference_draws: int = PAPER_QUERY_DRAWS
    """Draws of the query gradients with which those of fewer draws are compared."""
    reference_queries: int = 3
    fewer_draws: tuple[int, ...] = (64, 256, 1024, 4096)
    together: int = 400
    """Queries whose steps are in memory together, where the first-order pass is timed and its memory measured."""


QUICK = Sizes(
    images=400,
    queries=3,
    candidates=300,
    query_draws=32,
    factor_examples=256,
    reference_draws=256,
    reference_queries=2,
    fewer_draws=(16, 64),
    together=40,
)


@dataclass(frozen=True)
class Taught:
    """What one run of the teacher gave."""

    scores: np.ndarray
    """(Q, C), queries and candidates in the order of their ids."""
    manifest: Mapping[str, Any]


class Bench:
    """A working folder in which the teacher runs over and over with other settings; what is done is kept."""

    def __init__(self, work: Path, corpus: Corpus, sizes: Sizes, *, processes: int, seed: int) -> None:
        self.work, self.sizes, self.processes, self.seed = work, sizes, processes, seed
        if sizes.images:
            rows = np.random.default_rng([seed, 4]).choice(len(corpus), sizes.images, replace=False)
            if not (work / "corpus" / MANIFEST).exists():
                write_corpus(corpus.training_images(rows.tolist()), work / "corpus", CorpusConfig())
            corpus = Corpus(work / "corpus")
        self.corpus = corpus
        for name in SHARED:
            (work / name).mkdir(parents=True, exist_ok=True)

    def config(self, **changed: Any) -> TeacherConfig:
        """The teacher's settings, some of them changed."""
        names = ("factor_examples", "query_draws", "loss_draws", "pattern")
        common = TeacherConfig(seed=self.seed, **{name: getattr(self.sizes, name) for name in names})
        return replace(common, **changed)

    def folder(self, name: str, *, queries: int, candidates: int, steps: int = 25, backwards: bool = False) -> Path:
        """A run folder with that many queries, all with the same random candidates, perhaps in the opposite order."""
        run_dir = self.work / name
        run_dir.mkdir(exist_ok=True)
        targets = {"corpus": self.corpus.folder, "generator": GENERATOR, **{shared: self.work / shared for shared in SHARED}}
        for link, target in targets.items():
            if not (run_dir / link).is_symlink():
                (run_dir / link).symlink_to(target.resolve(), target_is_directory=True)
        draw_queries(
            QueriesConfig(train=0, validation=0, test=queries, steps=steps, guidance=2.5, seed=self.seed + 100), run_dir
        )
        rows = np.random.default_rng([self.seed, 5]).choice(len(self.corpus), candidates, replace=False)
        if not (run_dir / "candidates" / MANIFEST).exists():
            chosen = [(rows[::-1] if backwards else rows, np.ones(candidates, dtype=bool))] * queries
            found, inputs = Queries(run_dir / "queries"), {"rows": fingerprint(rows.tolist())}
            write_candidates(
                run_dir / "candidates", self.corpus, found, lambda: chosen, config={"size": candidates}, inputs=inputs
            )
        return run_dir

    def teach(self, run_dir: Path, config: TeacherConfig, *, processes: int | None = None, alone: bool = False) -> Taught:
        """Run the teacher, unless it has run with these settings.

        Args:
            run_dir: as `folder` gives it.
            config: the settings.
            processes: how many; None takes the benchmark's own number.
            alone: in a process of its own even if it is one, so that its peak memory is known.
        """
        count = self.processes if processes is None else processes
        kept = run_dir / f"scores-{fingerprint([vars(config), count, alone])}"
        if not (kept / MANIFEST).exists():
            if alone or count > 1:
                self._launch(run_dir, config, count)
            else:
                teach.run(config, run_dir)
            shutil.move(run_dir / "scores", kept)
        manifest = read_json(kept / MANIFEST)
        if manifest["processes"] != count:
            raise FastattrError(f"{count} processes were launched, {manifest['processes']} ran.")
        rows = sorted(read_scores(kept), key=lambda row: row.query_id)
        scores = np.stack([row.influence[np.argsort(row.image_ids)] for row in rows])
        return Taught(scores, manifest)

    def _launch(self, run_dir: Path, config: TeacherConfig, count: int) -> None:
        path = run_dir / "config.yaml"
        path.write_text(yaml.safe_dump({"name": run_dir.name, "teacher": json.loads(json.dumps(vars(config)))}))
        launcher = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH.split(), "--num_processes", str(count)]
        command = [*(launcher if count > 1 else [sys.executable]), str(SCRIPT), "--config", str(path), "--run", str(run_dir)]
        done = subprocess.run(command, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise FastattrError(f"the teacher ended with code {done.returncode}: {' '.join(command)}")


def agreement(name: str, first: np.ndarray, second: np.ndarray, *, seed: int) -> dict[str, float | int]:
    """Mean over queries of Spearman's correlation and of the shared part of the top 1%, with 95% bootstrap intervals."""
    top = max(1, round(first.shape[1] / 100))
    correlations = np.array([spearmanr(one, other).statistic for one, other in zip(first, second, strict=True)])
    best = [np.argsort(-scores, axis=1)[:, :top] for scores in (first, second)]
    overlaps = np.array([len(np.intersect1d(one, other)) / top for one, other in zip(*best, strict=True)])
    draws = np.random.default_rng([seed, 6]).integers(0, len(first), (2000, len(first)))
    found: dict[str, float | int] = {f"queries_{name}": len(first)}
    for measure, values in ((f"spearman_{name}", correlations), (f"top1pct_overlap_{name}", overlaps)):
        low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
        found |= {measure: float(values.mean()), f"{measure}_low": float(low), f"{measure}_high": float(high)}
    return found


def exactness(bench: Bench) -> dict[str, float | int]:
    """The largest difference that batch size, order and a second process make to an exact score."""
    run_dir = bench.folder("exactness", queries=2, candidates=min(64, bench.sizes.candidates))
    backwards = bench.folder("exactness-backwards", queries=2, candidates=min(64, bench.sizes.candidates), backwards=True)
    base = bench.teach(run_dir, bench.config(), processes=1)
    others = [bench.teach(run_dir, bench.config(batch_size=size), processes=1) for size in (1, 7, 64)]
    others.append(bench.teach(backwards, bench.config(), processes=1))
    two = bench.teach(run_dir, bench.config(), processes=2)
    return {
        "max_abs_diff_batching": max(float(np.abs(other.scores - base.scores).max()) for other in others),
        "max_abs_diff_two_processes": float(np.abs(two.scores - base.scores).max()),
        "max_abs_score": float(np.abs(base.scores).max()),
        "two_processes_ran": two.manifest["processes"],
    }


def first_order(bench: Bench) -> tuple[dict[str, float | int], Taught, Taught]:
    """How far the first-order scores agree with exact ones, by the step's length; also the exact and the first-order run."""
    sizes, results = bench.sizes, {}
    run_dir = bench.folder("queries", queries=sizes.queries, candidates=sizes.candidates)
    linearised = bench.teach(run_dir, bench.config(linearised=("test",), gradients="contracted"))
    exact = {name: bench.teach(run_dir, bench.config(query_loss_rise=rise)) for name, rise in RISES.items()}
    for name, taught in exact.items():
        results |= agreement(f"at_{name}_step", taught.scores, linearised.scores, seed=bench.seed)
    both_ways = bench.teach(run_dir, bench.config(query_loss_rise=RISES["2pct"], symmetric=True))
    results |= agreement("at_2pct_symmetric_step", both_ways.scores, linearised.scores, seed=bench.seed)
    stored = bench.teach(run_dir, bench.config(linearised=("test",), gradients="stored"))
    results |= agreement("stored", stored.scores, linearised.scores, seed=bench.seed)
    results["bytes_per_image"] = 2 * bench.config().gradient_width
    return results, exact["2pct"], linearised


def enough_draws(bench: Bench) -> dict[str, float | int]:
    """How many draws of a query's gradient give the order that the paper's number gives."""
    sizes, results, enough = bench.sizes, {}, 0
    run_dir = bench.folder("draws", queries=sizes.reference_queries, candidates=sizes.candidates)

    def scores(draws: int, *, antithetic: bool) -> np.ndarray:
        settings = {"linearised": ("test",), "gradients": "contracted", "query_draws": draws, "antithetic": antithetic}
        return bench.teach(run_dir, bench.config(**settings)).scores

    reference = scores(sizes.reference_draws, antithetic=False)
    for draws in sizes.fewer_draws:
        for antithetic in (False, True):
            name = f"draws_{draws}{'_antithetic' if antithetic else ''}"
            results |= agreement(name, scores(draws, antithetic=antithetic), reference, seed=bench.seed)
            if results[f"spearman_{name}"] >= 0.99 and not enough:
                enough = draws
    return {**results, "draws_for_spearman_099": enough, "reference_draws": sizes.reference_draws}


def planned_memory(config: TeacherConfig, corpus: Corpus, run_dir: Path) -> int:
    """Peak bytes of a process of the teacher, as `fastattr plan` says."""
    counts = Counter(Queries(run_dir / "queries").splits)
    candidates = len(next(iter(read_candidates(run_dir / "candidates").values()))[0])
    build = BuildConfig(
        name=run_dir.name,
        queries=QueriesConfig(**{split: counts[split] for split in SPLITS}),
        candidates=CandidatesConfig(per_query=candidates),
        teacher=config,
    )
    network = count("emoji", shape_of(GENERATOR), config.pattern)
    return next(stage.memory for stage in stage_costs(build, len(corpus), network) if stage.name == "teach")


def memory(bench: Bench) -> dict[str, float | int]:
    """Peak memory of a process over what `fastattr plan` says, exact and to first order.

    With a seed of their own, so that the processes fit the curvature and measure the base losses that the plan counts.
    """
    sizes = bench.sizes
    exact_dir = bench.folder("exactness", queries=2, candidates=min(64, sizes.candidates))
    many_dir = bench.folder("together", queries=sizes.together, candidates=sizes.candidates, steps=2)
    exact_config = bench.config(seed=bench.seed + 1)
    many_config = bench.config(seed=bench.seed + 2, linearised=("test",), gradients="contracted", query_draws=4)
    results = {}
    for name, run_dir, config in (("exact", exact_dir, exact_config), ("linearised", many_dir, many_config)):
        peak = bench.teach(run_dir, config, processes=1, alone=True).manifest["peak_memory"]
        results |= {
            f"peak_memory_over_plan_{name}": peak / planned_memory(config, bench.corpus, run_dir),
            f"peak_memory_mb_{name}": peak / 1e6,
        }
    return results


def evaluations(config: TeacherConfig, sizes: PlanSizes) -> int:
    """Latents through the network, forward or backward, for all queries, without fitting the curvature."""
    steps = teacher_plan(config, sizes, Probe(loaded=0, backward=0))
    return sum(step.forward + step.backward for step in steps if step.name != "factors")


def costs(
    bench: Bench, exact: Taught, linearised: Taught, together: Taught, *, images: int, parameters: int, draws: int
) -> dict[str, float | int]:
    """What 1,000 queries over the whole corpus cost each teacher, at the paper's draws a training image.

    Evaluations follow from the settings (tests hold them against what is spent). Wall time is scaled from the runs of
    this benchmark: the time of an exact evaluation and of a query's step from the run with few queries; of the pass over
    the corpus, a part that grows with the queries and one that does not, from two runs.

    Args:
        bench: the benchmark.
        exact, linearised: runs with few queries.
        together: a run with many.
        images: N of the corpus to scale to.
        parameters: P, weights to unlearn.
        draws: of a query's gradient.
    """
    queries, many = 1000, bench.sizes.together
    config = TeacherConfig(query_draws=draws, loss_draws=PAPER_LOSS_DRAWS, gradients="contracted")
    shape = {"images": images, "captions": images, "latent": 0, "conditioning": 0, "parameters": parameters, "factors": 0}
    all_of_it = (images,) * queries
    exactly = PlanSizes(**shape, exact=all_of_it, linearised=(), union=0)
    first = PlanSizes(**shape, exact=(), linearised=all_of_it, union=images)
    by_first_order = replace(config, linearised=("test",), memory_gb=4e-9 * parameters * queries * 1.01)
    few = bench.sizes.queries
    step = linearised.manifest["seconds_by_part"]["query steps"] / few
    spent = exact.manifest["seconds_by_part"]["teacher"] / few
    a_loss = (spent - step) / (bench.sizes.candidates * bench.sizes.loss_draws)
    a_draw = step / bench.sizes.query_draws
    passes = [run.manifest["seconds_by_part"]["linearised pass"] for run in (linearised, together)]
    passes = [seconds / (bench.sizes.candidates * bench.sizes.loss_draws) for seconds in passes]
    a_query = max(0.0, (passes[1] - passes[0]) / (many - few))
    a_gradient = passes[0] - few * a_query
    exact_seconds = queries * (draws * a_draw + images * PAPER_LOSS_DRAWS * a_loss)
    first_seconds = queries * draws * a_draw + images * PAPER_LOSS_DRAWS * (a_gradient + queries * a_query)
    pairs = bench.sizes.candidates * PAPER_LOSS_DRAWS
    # The authors measure every candidate's loss twice a query, and draw 50,000 times for its gradient; we share what is
    # measured before the step among 100 queries.
    authors = 2 * PAPER_QUERY_DRAWS + 2 * pairs
    ours = 2 * draws + pairs + images * PAPER_LOSS_DRAWS / 100
    same = (2 * PAPER_QUERY_DRAWS + pairs + images * PAPER_LOSS_DRAWS / 100) / authors
    return {
        "evaluations_ratio_1000_queries": evaluations(config, exactly) / evaluations(by_first_order, first),
        "wall_ratio_1000_queries": exact_seconds / first_seconds,
        "exact_hours_1000_queries": exact_seconds / 3600,
        "linearised_hours_1000_queries": first_seconds / 3600,
        "seconds_per_exact_loss": a_loss,
        "seconds_per_query_draw": a_draw,
        "seconds_per_corpus_gradient": a_gradient,
        "cost_query_draws": draws,
        "cost_loss_draws": PAPER_LOSS_DRAWS,
        "evaluations_exact_over_authors": ours / authors,
        "evaluations_exact_over_authors_at_their_query_draws": same,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description="Measure the teacher on the embedded emoji generator.")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    parser.add_argument("--quick", action="store_true", help="400 images and few queries: under 2 minutes on 2 cores")
    parser.add_argument("--run", type=Path, default=Path("runs/emoji"), help="run folder with the corpus (%(default)s)")
    parser.add_argument("--work", type=Path, help="keep what is done here, and go on from it")
    parser.add_argument("--processes", type=int, help="of the teacher (default: 1 if --quick, else 2)")
    parser.add_argument("--seed", type=int, default=0, help="of queries, candidates and noise (%(default)s)")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    sizes = QUICK if options.quick else Sizes()
    processes = options.processes or (1 if options.quick else 2)
    with open_corpus(options.run) as corpus, tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(work, corpus, sizes, processes=processes, seed=options.seed)
        results, exact, linearised = first_order(bench)
        results |= exactness(bench)
        results |= memory(bench)
        together_dir = bench.folder("together", queries=sizes.together, candidates=sizes.candidates, steps=2)
        together = bench.teach(together_dir, bench.config(linearised=("test",), gradients="contracted", query_draws=4))
        results |= enough_draws(bench)
        parameters = count("emoji", shape_of(GENERATOR), sizes.pattern).unlearned
        draws = int(results["draws_for_spearman_099"]) or max(sizes.fewer_draws)
        results |= costs(bench, exact, linearised, together, images=len(corpus), parameters=parameters, draws=draws)
        gradient_sizes = gradients.QUICK if options.quick else gradients.Sizes()
        results |= gradients.measure(corpus, gradient_sizes, options.seed)
        results |= gradients.measure_curve(lab.OUT, work / "bench", options.run / "corpus", gradient_sizes, options.seed)
    settings = {**vars(sizes), "fewer_draws": str(sizes.fewer_draws), "corpus_images": len(corpus), "processes": processes}
    settings |= {"seed": options.seed, "quick": options.quick, "parameters": parameters, **machine.describe()}
    machine.report({**results, **settings, "benchmark_seconds": round(time.perf_counter() - start, 1)}, options.json)


if __name__ == "__main__":
    try:
        main()
    except FastattrError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
