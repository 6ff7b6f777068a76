"""fastattr: which training images a text-to-image model's output owes most to, and whose they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastattr.core.errors import (
    ArtifactDamagedError,
    ArtifactMismatchError,
    ArtifactNotFoundError,
    EncoderMismatchError,
    FastattrError,
    FormatVersionError,
    HubError,
    IncompleteDownloadError,
    InputError,
    MissingExtraError,
    MissingFileError,
    NonFiniteError,
    QueriesFailedError,
    RevisionNotFoundError,
)
from fastattr.core.version import __version__ as __version__

if TYPE_CHECKING:
    from fastattr.attributor.attribution import Attribution
    from fastattr.attributor.attributor import FastAttributor
    from fastattr.generators.generator import Generator


__all__ = [
    "ArtifactDamagedError",
    "ArtifactMismatchError",
    "ArtifactNotFoundError",
    "Attribution",
    "EncoderMismatchError",
    "FastAttributor",
    "FastattrError",
    "FormatVersionError",
    "Generator",
    "HubError",
    "IncompleteDownloadError",
    "InputError",
    "MissingExtraError",
    "MissingFileError",
    "NonFiniteError",
    "QueriesFailedError",
    "RevisionNotFoundError",
]


def __getattr__(name: str) -> Any:
    """Load the heavy names (torch, diffusers) only when they are first used."""
    if name == "Attribution":
        from fastattr.attributor.attribution import Attribution

        return Attribution
    if name == "FastAttributor":
        from fastattr.attributor.attributor import FastAttributor
        from fastattr.publishing.push_to_hub import push_to_hub

        FastAttributor.push_to_hub = push_to_hub
        return FastAttributor
    if name == "Generator":
        from fastattr.generators.generator import Generator

        return Generator
    raise AttributeError(f"module 'fastattr' has no attribute {name!r}")
