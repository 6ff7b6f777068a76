"""Write the student's main figures into an attributor's metrics.json, from where its card shows them.

    python benchmarks/card.py fastattr/assets/emoji/attributor

Reads the committed benchmarks/results/student.json; what else metrics.json holds is kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastattr.attributor.folder import read_config, seal
from fastattr.core.errors import FastattrError, InputError
from fastattr.core.files import read_json, sha256_file, write_json

RESULTS = Path(__file__).parent / "results" / "student.json"
COMMAND = "python benchmarks/student.py"
MEANINGS = {
    "map_half_pct": "mAP(0.5% of the corpus), best student on the tables of docs/student.md against the exact teacher",
    "map_1pct": "the same, mAP(1%)",
    "map_4pct": "the same, mAP(4%)",
    "share_calibration_error": "expected calibration error of creators' shares, same student and tables",
    "gap_closed_lds": "emoji-bench: part of the gap in residual LDS from untuned features to the best teacher that the best "
    "student closes",
    "gap_closed_lds_fast": "the same by the best student that needs no gradient at query time",
    "gap_closed_lds_paper_recipe": "the same by the paper's recipe",
    "gain_over_paper_recipe_low": "best student over the paper's recipe in residual LDS, lower end of the paired 95% interval",
    "pairs_per_second_ratio": "pairs a second in training, over the authors' way",
    "time_to_equal_map_ratio": "the authors' training time to the same validation mAP, over ours",
}
"""Keys of student.json that a card shows, with what they are."""


def card_rows(results: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of 'benchmarks' in metrics.json.

    Raises:
        InputError: a part of the benchmark was not run.
    """
    missing = sorted(set(MEANINGS) - set(results))
    if missing:
        raise InputError(f"{RESULTS.name} lacks {', '.join(missing)}; run all parts of `{COMMAND}` first.")
    rows = [{"key": key, "value": results[key], "meaning": meaning} for key, meaning in MEANINGS.items()]
    return {"command": COMMAND, "seed": results["seed"], "date": results["date"], "rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the figures."""
    parser = argparse.ArgumentParser(description="Show the student's main figures on an attributor's card.")
    parser.add_argument("attributor", type=Path, help="attributor folder")
    parser.add_argument("--results", type=Path, default=RESULTS, help="of benchmarks/student.py (%(default)s)")
    options = parser.parse_args(arguments)
    config, file = read_config(options.attributor), options.attributor / "metrics.json"
    metrics = read_json(file)
    others = [run for run in metrics.get("benchmarks", []) if run["command"] != COMMAND]
    write_json(file, metrics | {"benchmarks": [*others, card_rows(read_json(options.results))]})
    config["sha256"][file.name] = sha256_file(file)
    write_json(options.attributor / "config.json", seal(config))


if __name__ == "__main__":
    try:
        main()
    except FastattrError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
