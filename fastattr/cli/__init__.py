"""The command line: `fastattr --help` reads like a guide."""

from fastattr.cli.main import main

__all__ = ["main"]
