"""How long fastattr takes to import, and to its first answer with the emoji attributor from a warm Hub cache.

    python benchmarks/startup.py --json benchmarks/results/startup.json

The emoji attributor is pushed to a loopback Hub (tests/loopback_hub.py) and pulled once, which warms the cache; then the
Hub is gone, and fresh processes are timed: from before `from_pretrained` to after the first `attribute`, imports included
(`first_answer_seconds`, and its processor time), and once more in the same process (`imported_answer_seconds`). Medians over
--runs processes; `heavy_imports` counts heavy libraries that `import fastattr` brings along.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import machine

from tests.loopback_hub import WRITE_TOKEN, Server

REPO_ID = "org/emoji-attributor"
HEAVY = ("torch", "diffusers", "gradio", "transformers", "datasets", "faiss", "open_clip", "pandas", "matplotlib")
PUSH = f"""
from fastattr import FastAttributor
FastAttributor.from_pretrained("emoji").push_to_hub("{REPO_ID}")
FastAttributor.from_pretrained("{REPO_ID}")
"""
IMPORT = f"""
import json, sys, time
started = time.perf_counter()
import fastattr
seconds = time.perf_counter() - started
print(json.dumps({{"import_seconds": seconds, "heavy": [name for name in {HEAVY} if name in sys.modules]}}))
"""
ANSWER = f"""
import json, time
import numpy as np
import fastattr

def answer():
    started, cpu = time.perf_counter(), time.process_time()
    attributor = fastattr.FastAttributor.from_pretrained("{REPO_ID}")
    attributor.attribute(np.full((64, 64, 3), 200, dtype=np.uint8), "red heart, openmoji style", k=20)
    return time.perf_counter() - started, time.process_time() - cpu

seconds, cpu_seconds = answer()
again, _ = answer()
names = ("first_answer_seconds", "first_answer_cpu_seconds", "imported_answer_seconds")
print(json.dumps(dict(zip(names, (seconds, cpu_seconds, again)))))
"""


def fresh_process(code: str, **settings: str) -> str:
    """Run code in a new Python; its standard output."""
    switched_off = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_XET")
    environment = {**os.environ, **dict.fromkeys(switched_off, "1"), **settings}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def measure(runs: int) -> dict[str, float | int]:
    """The figures; see the module's text."""
    imports = [json.loads(fresh_process(IMPORT)) for _ in range(runs)]
    with tempfile.TemporaryDirectory() as home:
        with Server() as hub:
            fresh_process(PUSH, HF_ENDPOINT=hub.url, HF_HOME=home, HF_TOKEN=WRITE_TOKEN, HF_HUB_OFFLINE="0")
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_HUB_OFFLINE": "1"}
        fresh_process(ANSWER, **settings)  # brings the libraries into the system's file cache
        answers = [json.loads(fresh_process(ANSWER, **settings)) for _ in range(runs)]
    medians = {key: float(np.median([answer[key] for answer in answers])) for key in answers[0]}
    return {
        "import_seconds": float(np.median([each["import_seconds"] for each in imports])),
        "heavy_imports": len({name for each in imports for name in each["heavy"]}),
        **medians,
        "first_answer_seconds_max": max(answer["first_answer_seconds"] for answer in answers),
        "runs": runs,
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    """Measure, print and write."""
    parser = machine.parser(__doc__)
    parser.add_argument("--runs", type=int, default=5, help="processes to time")
    options = parser.parse_args()
    machine.finish(measure(options.runs), options)


if __name__ == "__main__":
    machine.run(main)
