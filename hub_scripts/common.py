"""What every script here does: read `--config`, run stages of the line, push what they made if asked to."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from fastattr import FastattrError, load_config, push_all, run_stage

KINDS = ("generator", "scores", "attributor", "space")
"""What can be pushed, in the order in which they refer to each other."""


def run_stages(stages: Sequence[str], description: str | None, *, makes: Sequence[str]) -> int:
    """Run stages of a config on all processes of `accelerate launch`, then push from the first; returns the exit code.

    Args:
        stages: names as the commands of `fastattr` have them, in order.
        description: the script's docstring, shown by --help.
        makes: which of `KINDS` the stages make; `--push-to-hub` pushes these.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file; see hub_scripts/configs/")
    parser.add_argument("--run", type=Path, dest="run_dir", help="run folder (default: runs/NAME)")
    repositories = ", ".join(f"NAMESPACE/NAME-{kind}" for kind in KINDS if kind in makes)
    parser.add_argument(
        "--push-to-hub",
        metavar="NAMESPACE",
        required=not stages,
        help=f"user or organisation to push to, as {repositories} (NAME as in the config)",
    )
    parser.add_argument("--private", action="store_true", default=None, help="make new repositories private")
    parser.add_argument("--tag", default="auto", help="release tag; 'auto' (default) names version and contents, '' makes none")
    parser.add_argument("--dry-run", action="store_true", help="run the stages, but only say what would be pushed")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        config = load_config(arguments.config)
        run_dir = arguments.run_dir or Path("runs") / config.name
        for stage in stages:
            run_stage(stage, config, run_dir)
        if arguments.push_to_hub and _is_main_process():
            options = {"private": arguments.private, "tag": arguments.tag or None, "dry_run": arguments.dry_run}
            for push in push_all(run_dir, config.name, arguments.push_to_hub, makes, **options):
                print(push.in_words())
    except FastattrError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2
    if stages:
        print(f"{', '.join(stages)}: done, in {run_dir}")
    return 0


def _is_main_process() -> bool:
    from accelerate import PartialState

    return bool(PartialState().is_main_process)
