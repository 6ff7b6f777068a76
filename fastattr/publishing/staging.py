"""Staging: add card and licences to a folder laid out for the Hub, name its release, and send it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from fastattr.core.files import sha256_file
from fastattr.core.stages import fingerprint
from fastattr.corpus.store import Corpus
from fastattr.publishing.push import Push, push_folder

AUTO = "auto"
"""As a tag: made from fastattr's version and the contents, so the same contents have the same tag."""


def release_tag(folder: Path) -> str:
    """A tag that names a folder's contents: 'v0.1.0-1a2b3c4d'."""
    from fastattr.core.version import __version__

    contents = {path.relative_to(folder).as_posix(): sha256_file(path) for path in folder.rglob("*") if path.is_file()}
    return f"v{__version__}-{fingerprint(contents)[:8]}"


def send_with_card(staged: Path, repo_id: str, card: str, licences: str, **target: Any) -> Push:
    """Add card and licences to a staged folder and send it."""
    (staged / "README.md").write_text(card, encoding="utf-8")
    (staged / "LICENSE.md").write_text(licences, encoding="utf-8")
    return send(staged, repo_id, **target)


def send(staged: Path, repo_id: str, *, tag: str | None = None, **target: Any) -> Push:
    """Send a staged folder; the tag `AUTO` becomes its `release_tag`."""
    return push_folder(staged, repo_id, tag=release_tag(staged) if tag == AUTO else tag, **target)


def corpus_table(run_dir: Path) -> pa.Table:
    """First caption, source, licence and creator of a run's training images."""
    corpus = Corpus(run_dir / "corpus")
    captions = [captions[0] for captions in corpus.captions]
    return pa.table({"caption": captions, **{name: corpus.column(name) for name in ("source", "license", "creator")}})
