"""Output: results go to stdout, warnings to stderr, and nothing that a stranger wrote commands the terminal."""

from __future__ import annotations

import json
import logging
import sys
from typing import Annotated, Any

import typer

from fastattr.core.errors import harmless

AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]


def say(text: str) -> None:
    """Print a line of the result to stdout."""
    print(harmless(text))


def warn(text: str) -> None:
    """Print a line beside the result, to stderr."""
    print(harmless(text), file=sys.stderr)


def say_json(value: Any) -> None:
    """Print a result as JSON; the escapes of `harmless` are JSON's own, so a reader of it gets the text unchanged."""
    print(harmless(json.dumps(value, indent=2, ensure_ascii=False, default=str)))


def show(result: Any, as_json: bool, text: str) -> None:
    """Print a result as JSON, if that is asked for, else in words."""
    if as_json:
        say_json(result)
    else:
        say(text)


def on_one_line(text: object) -> str:
    """A caption or name of several lines as one."""
    return " ".join(str(text).split())


class HarmlessFormatter(logging.Formatter):
    """Formats what the library logs; a file's or query's name in it is harmless, too."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's text."""
        return harmless(super().format(record))
