"""Find a model: embedded artifacts by name, a local folder, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from fastattr.errors import ArtifactNotFoundError

ASSETS = Path(__file__).parent / "assets"
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def embedded_models() -> list[str]:
    """Names of the models that ship inside the package."""
    return sorted(path.parent.name for path in ASSETS.glob("*/manifest.json"))


def locate(
    name_or_path: str | Path,
    part: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a model.

    Args:
        name_or_path: an embedded model's name ('emoji'), a local folder, or a Hub repository 'org/name'.
        part: which folder of an embedded model: 'generator' or 'attributor'.
        revision: branch, tag or commit on the Hub.
        cache_dir: where the Hub client keeps downloads.
        token: Hub access token.
        local_files_only: take the cached copy, ask no network.

    Raises:
        ArtifactNotFoundError: there is no such model; the text lists what was tried.
    """
    name = str(name_or_path)
    if name in embedded_models():
        return ASSETS / name / part
    if Path(name).is_dir():
        return Path(name)
    if not REPO_ID.fullmatch(name):
        raise ArtifactNotFoundError(
            f"there is no model {name!r}: it is no embedded model ({', '.join(embedded_models()) or 'none'}), "
            "no local folder and no Hub repository 'org/name'."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    from fastattr import __version__

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                library_name="fastattr",
                library_version=__version__,
            )
        )
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ArtifactNotFoundError(f"model {name!r} could not be fetched from the Hub: {reason}") from error
