"""fastattr: which training images a text-to-image model's output owes most to, and whose they are."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastattr.core.errors import (
    ArtifactDamagedError,
    ArtifactMismatchError,
    ArtifactNotFoundError,
    DoesNotFitError,
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
    ReceiptDiffersError,
    RevisionNotFoundError,
)
from fastattr.core.version import __version__ as __version__

if TYPE_CHECKING:
    from fastattr.attributor.attribution import Attribution, to_csv
    from fastattr.attributor.attributor import FastAttributor
    from fastattr.attributor.load import read_info
    from fastattr.evaluation.showcase import read_counterfactuals, read_generated
    from fastattr.generators.generator import Generator
    from fastattr.pipeline.build import run_stage
    from fastattr.pipeline.config import load_config
    from fastattr.publishing.publish import push_all
    from fastattr.publishing.statement import StatementPolicy, make_statement, verify_statement

__all__ = [
    "ArtifactDamagedError",
    "ArtifactMismatchError",
    "ArtifactNotFoundError",
    "Attribution",
    "DoesNotFitError",
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
    "ReceiptDiffersError",
    "RevisionNotFoundError",
    "StatementPolicy",
    "load_config",
    "make_statement",
    "push_all",
    "read_counterfactuals",
    "read_generated",
    "read_info",
    "run_stage",
    "to_csv",
    "verify_statement",
]
LAZY = {
    "Attribution": "fastattr.attributor.attribution",
    "FastAttributor": "fastattr.attributor.attributor",
    "Generator": "fastattr.generators.generator",
    "StatementPolicy": "fastattr.publishing.statement",
    "load_config": "fastattr.pipeline.config",
    "make_statement": "fastattr.publishing.statement",
    "push_all": "fastattr.publishing.publish",
    "read_counterfactuals": "fastattr.evaluation.showcase",
    "read_generated": "fastattr.evaluation.showcase",
    "read_info": "fastattr.attributor.load",
    "run_stage": "fastattr.pipeline.build",
    "to_csv": "fastattr.attributor.attribution",
    "verify_statement": "fastattr.publishing.statement",
}
"""Names whose modules load heavy libraries (torch, diffusers), and the modules."""


def __getattr__(name: str) -> Any:
    """Load a name of `LAZY` when it is first used."""
    if name not in LAZY:
        raise AttributeError(f"module 'fastattr' has no attribute {name!r}")
    found = getattr(importlib.import_module(LAZY[name]), name)
    if name == "FastAttributor":  # an attributor answers without knowing how it is published
        found.push_to_hub = importlib.import_module("fastattr.publishing").push_to_hub
    return found


def __dir__() -> list[str]:
    """The public names, those included that are loaded when they are first used."""
    return sorted([*globals(), *LAZY])
