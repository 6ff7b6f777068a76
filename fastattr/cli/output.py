"""Output: what every command shares when it prints.

Results go to stdout, warnings and progress to stderr. Names and captions come from strangers: what a terminal would take
for a command of its own is shown as an escape.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters (a line break is none), marks that turn the writing direction, and halves of surrogate pairs."""


def harmless(text: str) -> str:
    """The text with every control character shown as an escape, so that a caption cannot clear a reader's screen."""
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def say(text: str) -> None:
    """Print a line of the result to stdout."""
    print(harmless(text))


def warn(text: str) -> None:
    """Print a line beside the result, to stderr."""
    print(harmless(text), file=sys.stderr)


def say_json(value: Any) -> None:
    """Print a result as JSON; the escapes of `harmless` are JSON's own, so a reader of it gets the text unchanged."""
    print(harmless(json.dumps(value, indent=2, ensure_ascii=False, default=str)))


def on_one_line(text: object) -> str:
    """A caption or name of several lines as one."""
    return " ".join(str(text).split())
