"""The errors that fastattr raises on purpose: each says what was found, what was expected and what to do.

All derive from `FastattrError`, which the command line turns into one line on stderr and exit code 2.
"""

from __future__ import annotations

import re


class FastattrError(Exception):
    """Base of every error that a user can mend; its text is complete on its own."""


class InputError(FastattrError, ValueError):
    """A value, file or image given by the caller can't be used as it is."""


class ArtifactNotFoundError(FastattrError, FileNotFoundError):
    """A folder, file or model name does not exist where it was looked for."""


class MissingFileError(ArtifactNotFoundError):
    """A folder or repository lacks a file that its own list of files names."""


class RevisionNotFoundError(ArtifactNotFoundError):
    """A Hub repository has no such branch, tag or commit; the text lists those it has."""


class IncompleteDownloadError(ArtifactNotFoundError):
    """Only a part of a repository is in the cache, and the rest can't be fetched now."""


class ArtifactDamagedError(FastattrError):
    """A file's checksum or structure is not what its manifest says."""


class ArtifactMismatchError(FastattrError):
    """Two artifacts that must belong together were made from different inputs."""


class FormatVersionError(ArtifactMismatchError):
    """A folder was written in a newer format than this fastattr reads."""


class EncoderMismatchError(ArtifactMismatchError):
    """The feature encoders that were loaded are not those that the student was trained on."""


class HubError(FastattrError, OSError):
    """The Hub refused a request or can't be reached; the text says which, and what to do."""


class NonFiniteError(FastattrError, ArithmeticError):
    """A loss, factor or gradient became NaN or infinite; the text names where."""


class QueriesFailedError(FastattrError):
    """Some queries could not be scored; the text lists them with their errors, and the others are kept."""


class ReceiptDiffersError(FastattrError):
    """An attributor does not answer any more what a receipt says."""


class DoesNotFitError(FastattrError, MemoryError):
    """Memory or disk are too small for what is to be built; the text has the figures and the alternatives."""


class MissingExtraError(FastattrError, ImportError):
    """An optional dependency is not installed; the text says which extra brings it."""


CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters (a line break is none), marks that turn the writing direction, and halves of surrogate pairs."""


def harmless(text: str) -> str:
    """The text with every control character shown as an escape, so that a stranger's name cannot command a terminal."""
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def for_terminal(error: Exception) -> str:
    """The error's text, harmless, as one line, except for a table of failed queries, which keeps its lines."""
    return harmless(str(error) if isinstance(error, QueriesFailedError) else " ".join(str(error).split()))
