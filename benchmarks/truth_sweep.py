"""The teachers' settings on emoji-bench, chosen on validation and training queries: settings.json in the truth folder.

    python benchmarks/truth_sweep.py

By residual LDS, one step of `STEPS` after the other. To choose among teachers, training queries are as good as validation
queries: no teacher has learned from them; test queries play no part. Every score is kept in the run folder, so that a killed
sweep goes on.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import machine
import numpy as np
from lab import ALL_LAYERS, SETTINGS, Bench, Cost, Settings, open_bench, options_of

from fastattr.core.errors import NonFiniteError
from fastattr.core.files import atomic_path, write_json
from fastattr.core.settings import read_yaml
from fastattr.core.stages import fingerprint
from fastattr.evaluation.against_truth import compare_with_truth
from fastattr.evaluation.lds import noise_ceiling, outputs_of, residual_outputs
from fastattr.evaluation.subsets import RetrainConfig
from fastattr.evaluation.truth import GroundTruth
from fastattr.generators.families import CROSS_ATTENTION_KV

logger = logging.getLogger(__name__)

PATTERNS = (CROSS_ATTENTION_KV, r"attn2\.", r"attentions\.", ALL_LAYERS)
"""Weights to unlearn that are tried: text-side keys and values, cross-attention, attention blocks, the U-Net."""
DAMPINGS = (0.01, 0.1, 1.0, 10.0)
RIDGES = (0.001, 0.01, 0.1, 1.0, 10.0)
MOST_DRAWS = {"query_draws": 512, "loss_draws": 128}
"""With which weights, damping and ridges are compared."""
DRAWS = {"query_draws": (64, 128, 512), "loss_draws": (4, 16, 32, 128)}
STEPS: tuple[tuple[str, dict[str, tuple[Any, ...]]], ...] = (
    ("abu_plus_linearised", {"pattern": PATTERNS, "damping": DAMPINGS}),
    ("abu_diagonal", {"diagonal_damping": DAMPINGS}),
    ("abu_plus_linearised", DRAWS),
    ("abu_plus_exact", {"rise": (0.005, 0.02, 0.1, 0.5)}),
    ("trak", {"trak_pattern": PATTERNS, "trak_ridge": RIDGES}),
    ("d_trak", {"d_trak_pattern": PATTERNS, "d_trak_ridge": RIDGES}),
)
"""Teacher, and the values of `Settings` that are tried for it, in every combination."""
SPARED_LDS = 0.005
"""Of draws, the cheapest are chosen whose residual LDS is within this of the best."""
EXACT_QUERIES = 26
"""Queries on which the exact step's size is chosen."""


def sweep(bench: Bench, *, resamples: int = 500) -> dict[str, Any]:
    """Try settings; returns the chosen ones and all that was tried."""
    truth, lab = bench.truth, bench.lab
    every = truth.measured("validation") + truth.measured("train")
    chosen, tried = replace(Settings(), **MOST_DRAWS), []
    for method, values in STEPS:
        query_ids = every[:EXACT_QUERIES] if method == "abu_plus_exact" else every
        found: list[tuple[float, float, Settings]] = []
        for combination in product(*values.values()):
            changes = dict(zip(values, combination, strict=True))
            lab.settings = replace(chosen, **changes)
            try:
                scores = bench.in_order(kept_scores(bench, method, query_ids))
            except NonFiniteError as error:  # so long a step that the network breaks
                logger.warning("%s of %s is no candidate: %s", changes, method, error)
                continue
            row = compare_with_truth({method: scores}, truth, query_ids, resamples=resamples)["methods"][method]
            figures = {key: row[key] for key in ("lds", "lds_residual", "lds_residual_low", "lds_residual_high")}
            tried.append({"method": method, **changes, **figures, "queries": len(query_ids)})
            cost = lab.settings.query_draws * len(query_ids) + lab.settings.loss_draws * len(bench.corpus)
            found.append((row["lds_residual"], cost, lab.settings))
        best = max(residual for residual, _, _ in found) - (SPARED_LDS if values is DRAWS else 0)
        chosen = min((one for one in found if one[0] >= best), key=lambda one: one[1])[2]
    return {
        "chosen": asdict(chosen),
        "tried": tried,
        "noise_ceilings": ceilings_by_part(truth, every),
        "models": len(truth.retrained("half", every).model_ids),
        "splits": ["validation", "train"],
        "seed": lab.cost.seed,
    }


def kept_scores(bench: Bench, method: str, query_ids: Sequence[str]) -> np.ndarray:
    """(Q, N) scores by the lab's settings, from an earlier sweep if they are there."""
    lab = bench.lab
    exact = method == "abu_plus_exact"
    settings = vars(lab.settings) if exact else lab.settings.methods[method] | {"loss_draws": lab.settings.loss_draws}
    made_of = [lab.generator.fingerprint, bench.corpus.fingerprint, list(query_ids), asdict(lab.cost), method, settings]
    path = bench.run_dir / "sweep" / f"{fingerprint(made_of)}.npy"
    if not path.exists():
        scores = lab.exact(query_ids) if exact else lab.scores(lab.fit(method), query_ids)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, scores)
    return np.load(path)


def ceilings_by_part(truth: GroundTruth, query_ids: Sequence[str], parts: int = 8) -> list[float]:
    """Noise ceiling of residual LDS for losses at equal parts of the noise schedule, from little noise to much."""
    halves = truth.retrained("half", query_ids)
    losses = truth.losses_by_timestep(halves.model_ids, query_ids)
    found = []
    for part in np.array_split(np.arange(losses.shape[2]), min(parts, losses.shape[2])):
        outputs = residual_outputs(outputs_of(losses[:, :, part].mean(axis=2)))
        first, second = halves.seed_pairs()
        found.append(noise_ceiling(outputs[first], outputs[second]))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Sweep and keep what was chosen."""
    options = options_of(argparse.ArgumentParser(description="Choose the teachers' settings."), arguments)
    config = read_yaml(options.config, RetrainConfig)
    bench = open_bench(options.truth, options.run, config, options.corpus, Settings(), Cost())
    write_json(options.truth / SETTINGS, sweep(bench))


if __name__ == "__main__":
    machine.run(main)
