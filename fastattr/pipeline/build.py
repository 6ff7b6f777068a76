"""Build: the whole line from a config, stage by stage, resuming where the run folder stands.

The run folder keeps plan.json, config.yaml and spent.json, what each stage took. Under `accelerate launch` the stages up to the
teacher share all processes; the rest, which is small, is done by one, so that its sums don't depend on their number.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from fastattr.attributor.load import read_info
from fastattr.core.errors import FastattrError, InputError
from fastattr.core.files import atomic_path, read_json, remove, write_json
from fastattr.core.processes import alone
from fastattr.core.settings import did_you_mean
from fastattr.core.stages import MANIFEST, fingerprint, open_stage
from fastattr.pipeline.config import BuildConfig, check, check_queries, save_config
from fastattr.pipeline.plan import plan, training_images
from fastattr.pipeline.stages import FOLDERS, SHARED, STAGES
from fastattr.students.ranking import no_better_than_untuned

logger = logging.getLogger(__name__)


def run_stage(name: str, config: BuildConfig, run_dir: Path) -> dict[str, Any]:
    """Run one stage, in its own precision: Accelerate would keep that of the stage before in the same process."""
    AcceleratorState._reset_state()
    return STAGES[name](config, run_dir)


def planned(config: BuildConfig, run_dir: Path) -> dict[str, Any]:
    """The plan of a run, made once and kept in run_dir/plan.json for as long as the config stays the same."""
    file, identity = run_dir / "plan.json", fingerprint(config)
    if (kept := _json(file)).get("config") == identity:
        return kept
    try:
        training_images(config, run_dir)
    except InputError:  # nothing says how many there are
        STAGES["corpus"](config, run_dir)
    made = plan(config, run_dir, measure=True) | {"config": identity}
    write_json(file, made)
    return made


def _json(file: Path) -> dict[str, Any]:
    """A JSON file of a run; empty if there is none."""
    return read_json(file) if file.exists() else {}


def run(
    config: BuildConfig, run_dir: Path, *, confirm: Callable[[dict[str, Any]], None] | None = None, again_from: str = ""
) -> dict[str, float]:
    """Run every stage that is not finished yet, on all processes; returns the seconds that each stage took now.

    `confirm` is given the plan, and raises if nothing shall be built; None makes no plan. From the stage `again_from` on
    everything is built again, as by another config.
    """
    # The others wait while one does what is left. (PartialState alone would not see ACCELERATE_USE_CPU.)
    Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))])
    state = PartialState()
    check(config, run_dir / "nothing" if again_from in {"corpus", "train-generator"} else run_dir)
    check_queries(config, run_dir)
    seconds: dict[str, float] = {}
    if state.is_main_process:
        save_config(config, run_dir / "config.yaml")
        if confirm is not None:
            confirm(planned(config, run_dir))
        if again_from:
            forget(run_dir, again_from)
    state.wait_for_everyone()
    for name in STAGES:
        if state.num_processes > 1 and name not in SHARED:
            continue
        started, before = time.monotonic(), _manifests(run_dir)
        logger.info("stage %s", name)
        run_stage(name, config, run_dir)
        state.wait_for_everyone()
        seconds[name] = round(time.monotonic() - started, 2)
        if state.is_main_process and _manifests(run_dir) != before:
            write_json(run_dir / "spent.json", _json(run_dir / "spent.json") | {name: seconds[name]})
    if state.num_processes > 1 and state.is_main_process:
        command = [sys.executable, "-m", "fastattr", "build", str(run_dir / "config.yaml"), "--run", str(run_dir), "--no-plan"]
        if subprocess.run(command, env=alone(), check=False).returncode:
            raise FastattrError("the stages after the teacher failed; run the same command again to go on there.")
    state.wait_for_everyone()
    return seconds


def forget(run_dir: Path, stage: str) -> None:
    """Remove what a stage and all later ones wrote into a run folder. Raises InputError if there is no such stage, or the run's
    attributor was changed since it was built (images added, removed or described anew), which another build would undo.
    """
    if stage not in FOLDERS:
        raise InputError(f"there is no stage {stage!r}{did_you_mean(stage, FOLDERS)}; stages are {', '.join(FOLDERS)}.")
    attributor = run_dir / "attributor"
    version = int(read_info(attributor)["versions"]["catalog"]) if (attributor / "config.json").exists() else 1
    if version > 1:  # 1 is the version that is built
        raise InputError(f"{attributor} was changed since it was built, and another build would undo that: move it away first.")
    for name in itertools.dropwhile(lambda name: name != stage, FOLDERS):
        for folder in FOLDERS[name]:
            remove(run_dir / folder)


def warning_of(run_dir: Path) -> str:
    """What to be told of a finished build's student, or ''; see `no_better_than_untuned`."""
    file = run_dir / "attributor" / "metrics.json"
    return no_better_than_untuned(read_json(file)) if file.exists() else ""


def _manifests(run_dir: Path) -> set[tuple[str, int]]:
    """What is finished in a run folder, and since when."""
    return {(str(path), path.stat().st_mtime_ns) for path in run_dir.glob(f"**/{MANIFEST}")}


def embed_assets(config: BuildConfig, run_dir: Path, folder: Path) -> dict[str, Any]:
    """Copy a finished run's generator and attributor to `folder`; returns its manifest, which says how they were made."""
    stages = [folders[0] for name, folders in FOLDERS.items() if name not in {"features", "index", "card", "report"}]
    with atomic_path(folder) as temporary:
        shutil.copytree(run_dir / "generator", temporary / "generator", ignore=shutil.ignore_patterns("checkpoint*"))
        shutil.copytree(run_dir / "attributor", temporary / "attributor")
        manifest = {
            "name": config.name,
            "command": f"fastattr build hub_scripts/configs/{config.name}.yaml --assets fastattr/assets/{config.name}",
            "bytes": sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file()),
            "stages": {stage: open_stage(run_dir / stage, stage) for stage in stages},
        }
        write_json(temporary / "manifest.json", manifest)
    return manifest
