"""How the embedded generator's guidance scale was chosen: what is right in its drawings at several scales.

    python benchmarks/guidance.py --json benchmarks/results/guidance.json [--quick]
        [--generator FOLDER] [--scales 2 3 4] [--steps 25]

Prompts are none of those that benchmarks/emoji.py draws for the figures that it reports, and the same at every scale; so are
seeds. Keys end in the scale: recall1_seen_at_3.0. Needs a finished emoji corpus, or builds one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import drawings
import emoji
import judge as judging
import machine
import numpy as np

from fastattr import FastattrError, Generator
from fastattr.core.captions import recombine

SCALES = (1.5, 2.0, 3.0, 4.0, 6.0)
REPORTED = emoji.Sizes()
"""Of the prompts that are kept apart."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, judge and report."""
    parser = argparse.ArgumentParser(description="Compare guidance scales of a generator.")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    parser.add_argument("--quick", action="store_true", help="40 prompts at three scales")
    parser.add_argument("--generator", default=emoji.MODEL, help="the generator (%(default)s)")
    parser.add_argument("--scales", type=float, nargs="+", help=f"guidance scales ({' '.join(map(str, SCALES))})")
    parser.add_argument("--steps", type=int, help="sampling steps (the generator's own)")
    parser.add_argument("--run", type=Path, default=Path("runs/emoji"), help="run folder with the corpus (%(default)s)")
    parser.add_argument("--judge", type=Path, default=judging.JUDGE, help="folder of the judge (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of prompts and drawings; 0 is the reported figures' (%(default)s)")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    scales, seen_count, recombined_count = ((2.0, 3.0, 6.0), 20, 20) if options.quick else (SCALES, 200, 100)
    judge, facts = judging.load(options.judge)
    generator = Generator.from_pretrained(options.generator)
    results: dict[str, Any] = {}
    with emoji.open_corpus(options.run, facts["corpus_fingerprint"]) as corpus:
        captions, kinds = [of_image[0] for of_image in corpus.captions], drawings.kinds_of(corpus)
        training = drawings.latents_of(generator, [corpus.image(row) for row in range(len(corpus))])
        kept_apart = set(drawings.choose_seen(captions, REPORTED.seen, seed=0).tolist())
        chosen = drawings.choose_seen(captions, REPORTED.seen + seen_count, seed=options.seed)
        seen = np.array([row for row in chosen.tolist() if row not in kept_apart][:seen_count])
        reported = set(drawings.choose_recombined(captions, kinds, REPORTED.recombined, seed=0))
        every = drawings.choose_recombined(captions, kinds, len(captions), seed=options.seed)
        asked = [recombine(captions[row], style) for row, style in every if (row, style) not in reported][:recombined_count]
        for scale in options.scales or scales:
            first_seed = options.seed * 1_000_000
            settings = {"guidance": scale, "steps": options.steps, "what": f"at {scale}"}
            drawn = drawings.draw(generator, [captions[row] for row in seen], first_seed=first_seed, **settings)
            nearest = drawings.nearest_rows(drawings.latents_of(generator, drawn), training)
            figures = drawings.seen_figures(seen, nearest, captions)
            drawn = drawings.draw(generator, asked, first_seed=first_seed + 500_000, **settings)
            figures |= drawings.recombined_figures(judge, drawn, asked, facts["same"], generator.image_size)
            results |= {f"{name}_at_{scale}": value for name, value in figures.items()}
    results |= {
        "seed": options.seed,
        "quick": options.quick,
        "steps": options.steps or generator.defaults["steps"],
        **machine.describe(),
    }
    machine.report({**results, "benchmark_seconds": round(time.perf_counter() - started, 1)}, options.json)


if __name__ == "__main__":
    try:
        main()
    except FastattrError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
