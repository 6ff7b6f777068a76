"""All checks, and how one is run: in a process and an empty folder of its own, so that a crash is a wrong answer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.cases import live, pictures
from tests.cases.running import REPOSITORY, Check, environment, script

CASES = Path(os.environ.get("FASTATTR_CASES", REPOSITORY.parent / "shared" / "cases"))
"""Where the cases lie: outside the repository."""
LONGEST = 900
"""Seconds that one case may take."""


def reports(cases: Path) -> dict[str, Check]:
    """Each folder of reports/: all of its try*.py exit with 0."""
    found: dict[str, Check] = {}
    for case in sorted(path for path in cases.glob("reports/*") if path.is_dir()):
        names = sorted(path.name for path in case.glob("try*.py")) + [path.name for path in case.glob("more.py")]

        def check(folder: Path, work: Path, names: Sequence[str] = tuple(names)) -> str:
            for name in names:
                (work / name).mkdir()
                if wrong := script(name)(folder, work / name):
                    return wrong
            return ""

        found[f"reports/{case.name}"] = check
    return found | {"reports/13-lora-keys": lora_keys}


def lora_keys(case: Path, work: Path) -> str:
    """Each spelling of a LoRA is taken whole or refused; the script, which is older, lets none be taken."""
    (work / "try.py").mkdir()
    wrong = script("try.py")(case, work / "try.py")
    told = (work / "try.py" / "told.txt").read_text(encoding="utf-8")
    lines = [line for line in told.splitlines() if "taken;" in line or "refused:" in line]
    whole = re.compile(r"refused:|in force: (\d+) of \1; .*bare model: False")
    return "" if len(lines) == 4 and all(map(whole.search, lines)) else wrong or f"of 4 LoRAs: {told}"


def all_checks(cases: Path) -> dict[str, Check]:
    """By the case's folder."""
    kinds = {**live.CHECKS, "pictures": pictures.CHECKS}
    return {f"{kind}/{name}": check for kind, of_kind in kinds.items() for name, check in of_kind.items()} | reports(cases)


def wrong_with(name: str, cases: Path) -> str:
    """What is wrong with a case, '' where nothing is."""
    with tempfile.TemporaryDirectory(prefix="fastattr-case-") as work:
        command = [sys.executable, "-m", "tests.cases.checks", name, str(cases), work]
        try:
            done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LONGEST, check=False)
        except subprocess.TimeoutExpired:
            return f"no result after {LONGEST} s"
    if done.returncode == 0:
        return ""
    lines = done.stdout.splitlines()
    told = lines[-1] if lines and lines[-1].startswith("WRONG ") else f"exit code {done.returncode}: {done.stderr[-300:]}"
    return " ".join(told.removeprefix("WRONG ").split())


if __name__ == "__main__":
    chosen, folder, work = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    os.chdir(work)
    wrong = all_checks(folder)[chosen](folder / chosen, work)
    sys.stdout.write(f"WRONG {' '.join(wrong.split())[:400]}\n" if wrong else "right\n")
    sys.exit(bool(wrong))
