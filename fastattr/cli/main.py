"""Main: puts the commands together, and turns errors into one line and an exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from fastattr.cli import ask, living, stages
from fastattr.cli.output import HarmlessFormatter, say, warn
from fastattr.core.errors import FastattrError, ReceiptDiffersError, for_terminal

GUIDE = """\
fastattr names the training images that influenced a generated image most, and whose they are.

\b
See it:
  fastattr demo                    the page, on 127.0.0.1:7860, with the embedded emoji models
  fastattr generate emoji --prompt "red heart, openmoji style" --out heart.png
  fastattr attribute emoji --image heart.png --prompt "red heart, openmoji style"
  fastattr info emoji

\b
Keep it alive, check what it said, serve it to machines:
  fastattr remove FOLDER IMAGE_ID
  fastattr verify RECEIPT.json
  fastattr statement FOLDER RECEIPTS --period 2026-11 --pool 1000 --out OUT
  fastattr serve emoji

\b
Publish it, and import what others released:
  fastattr push attributor emoji org/emoji-attributor --dry-run
  fastattr import fastgda --weights dino+clip_text.pth --features data_feats.npy --ids ids.txt OUT

\b
Build your own, all at once (resumes where it stands) or stage by stage:
  fastattr plan hub_scripts/configs/folder-lora.yaml
  fastattr build hub_scripts/configs/folder-lora.yaml
"""

app = typer.Typer(help=GUIDE, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)
for part in (ask, living, stages):
    app.add_typer(part.app)


def _version(wanted: bool) -> None:
    if wanted:
        from fastattr.core.version import __version__

        say(f"fastattr {__version__}")
        raise typer.Exit


@app.callback(help=GUIDE)
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit.")] = False,
) -> None:
    """Options of fastattr itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(HarmlessFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("httpx", "httpx2", "open_clip", "root", "faiss", "faiss.loader"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        app(args=None if argv is None else list(argv), prog_name="fastattr")
    except ReceiptDiffersError as error:
        warn(f"fastattr: {for_terminal(error)}")
        return 1
    except (FastattrError, OSError) as error:  # OSError: a folder that may not be written, a full disk
        warn(f"fastattr: error: {for_terminal(error)}")
        return 2
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 0
        if code == 130:
            warn("fastattr: stopped; run the same command again to resume.")
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
