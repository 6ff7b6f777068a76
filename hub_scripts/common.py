"""What every script here does: read `--config`, run stages of the line, say where the result is."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from fastattr.build import STAGES
from fastattr.config import load_config
from fastattr.errors import FastattrError, for_terminal


def run_stages(stages: Sequence[str], description: str | None) -> int:
    """Run stages of a config on all processes of `accelerate launch`; returns the exit code.

    Args:
        stages: names in `fastattr.build.STAGES`, in order.
        description: the script's docstring, shown by --help.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file; see hub_scripts/configs/")
    parser.add_argument("--run", type=Path, dest="run_dir", help="run folder (default: runs/NAME)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        config = load_config(arguments.config)
        run_dir = arguments.run_dir or Path("runs") / config.name
        for stage in stages:
            STAGES[stage](config, run_dir)
    except FastattrError as error:
        print(f"{Path(sys.argv[0]).name}: error: {for_terminal(error)}", file=sys.stderr)
        return 2
    print(f"{', '.join(stages)}: done, in {run_dir}")
    return 0
