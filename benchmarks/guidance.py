"""How the embedded generator's guidance scale was chosen: style and subgroup of drawings at several scales, by the judge.

    python benchmarks/guidance.py --json benchmarks/results/guidance.json [--quick]

Prompts are none of those that benchmarks/emoji.py draws for the figures that it reports, and the same at every scale; so are
seeds. Keys end in the scale: style_accuracy_seen_at_6.0. Needs a finished emoji corpus, or builds one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import emoji
import judge as judging
import machine
import numpy as np

from fastattr import FastattrError, Generator

SCALES = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
REPORTED = emoji.Sizes()
"""Of the prompts that are kept apart."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, judge and report."""
    parser = argparse.ArgumentParser(description="Compare guidance scales of the embedded generator.")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    parser.add_argument("--quick", action="store_true", help="40 prompts at three scales")
    parser.add_argument("--run", type=Path, default=Path("runs/emoji"), help="run folder with the corpus (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of prompts and drawings; 0 is the reported figures' (%(default)s)")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    scales, seen_count, recombined_count = ((2.5, 6.0, 10.0), 20, 20) if options.quick else (SCALES, 300, 200)
    judge, _ = judging.load()
    generator = Generator.from_pretrained(emoji.MODEL)
    with emoji.open_corpus(options.run) as corpus:
        captions = [of_image[0] for of_image in corpus.captions]
        styles, subgroups = np.array(corpus.column("source")), np.array(corpus.column("subgroup"))
        kept_apart = set(emoji.choose_seen(captions, REPORTED.seen, seed=0).tolist())
        seen = [row for row in emoji.choose_seen(captions, REPORTED.seen, seed=options.seed).tolist() if row not in kept_apart]
        reported = set(emoji.choose_recombined(captions, REPORTED.recombined, seed=0))
        pairs = emoji.choose_recombined(captions, 2 * REPORTED.recombined, seed=options.seed)
        seen, pairs = seen[:seen_count], [pair for pair in pairs if pair not in reported][:recombined_count]
        prompts = {
            "seen": ([captions[row] for row in seen], styles[seen], subgroups[seen]),
            "recombined": (
                [emoji.recombine(captions[row], style) for row, style in pairs],
                [style for _, style in pairs],
                [subgroups[row] for row, _ in pairs],
            ),
        }
    results: dict[str, Any] = {}
    for scale in scales:
        for kind, (texts, asked_styles, asked_subgroups) in prompts.items():
            drawn = emoji.draw(generator, texts, first_seed=options.seed * 1_000_000, what=f"{kind}, {scale}", guidance=scale)
            images = emoji.stacked(drawn, generator.image_size)
            results |= judging.accuracies(judge, images, asked_styles, asked_subgroups, f"{kind}_at_{scale}")
    results |= {"seed": options.seed, "quick": options.quick, "steps": generator.defaults["steps"], **machine.describe()}
    machine.report({**results, "benchmark_seconds": round(time.perf_counter() - started, 1)}, options.json)


if __name__ == "__main__":
    try:
        main()
    except FastattrError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
