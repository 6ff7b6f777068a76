"""Small inputs that once failed: does each give the expected result now?

    python benchmarks/cases.py --cases ../shared/cases --json benchmarks/results/cases.json [--jobs 2]
        [--only pictures/csv ...] [--list]

The cases lie outside the repository, one folder a case; what is expected of each is in tests/cases. Each runs in a process and
an empty folder of its own, so that a crash is a wrong answer. Those under reports/ are scripts that exit 0 where all is right.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import machine
from tqdm import tqdm

from tests.cases.checks import CASES, all_checks, wrong_with


def main() -> None:
    """Run the cases, print what is wrong, and write the counts."""
    parser = argparse.ArgumentParser(description="Run the small inputs that once failed.")
    parser.add_argument("--cases", type=Path, default=CASES, help="folder of the cases")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--only", nargs="+", default=[""], help="cases to run, by folder or by the beginning of it")
    parser.add_argument("--jobs", type=int, default=1, help="cases to run at a time")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    options = parser.parse_args()
    cases = options.cases.resolve()
    names = [name for name in all_checks(cases) if name.startswith(tuple(options.only))]
    if options.list:
        print("\n".join(names))
        return
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as shared, ThreadPoolExecutor(options.jobs) as pool:
        os.environ.setdefault("FASTATTR_CASES_TINY", str(Path(shared) / "tiny"))
        answers = pool.map(partial(wrong_with, cases=cases), names)
        for name, wrong in tqdm(zip(names, answers, strict=True), desc="cases", unit="case", total=len(names)):
            found[name] = wrong
            print(f"{name}: {wrong or 'right'}", flush=True)
    kinds = sorted({name.partition("/")[0] for name in found})
    results: dict[str, object] = {
        "cases": len(found),
        "cases_right": sum(not wrong for wrong in found.values()),
        "kinds": len(kinds),
        "wrong": ", ".join(name for name, wrong in found.items() if wrong),
    }
    for kind in kinds:
        of_kind = [wrong for name, wrong in found.items() if name.startswith(f"{kind}/")]
        results |= {f"{kind}_cases": len(of_kind), f"{kind}_right": sum(not wrong for wrong in of_kind)}
    machine.report({**results, "seed": 0, **machine.describe()}, options.json)


if __name__ == "__main__":
    main()
