"""Models: find one (embedded, in a folder or on the Hub) and fetch just the files asked for; say the Hub's errors in words.

A call to the Hub is tried again if the failure may pass by itself (a burst of server errors, a rate limit, a commit that
came in between); every other failure becomes one of fastattr's errors.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastattr.core.errors import (
    ArtifactNotFoundError,
    FastattrError,
    HubError,
    IncompleteDownloadError,
    InputError,
    MissingFileError,
    RevisionNotFoundError,
)
from fastattr.core.version import __version__

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

ASSETS = Path(__file__).parents[1] / "assets"
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
PIPELINE_FILES = ("*.json", "*/*.txt", "*/*.model", "*/model[.-][s0]*", "*/diffusion_pytorch_model[.-][s0]*")
"""What a diffusers pipeline is loaded from: no pickle, no second precision, no single-file checkpoint beside the folders."""

TRIES = 5
REFUSED = frozenset({412, 429})  # nothing was done: another commit came first, or too many requests
TRANSIENT = REFUSED | {408, 500, 502, 503, 504}  # may have been done; ask again where a second time does nothing new
LONGEST_WAIT = 60.0  # seconds between two tries, whatever the server asks for


def embedded_models() -> list[str]:
    """Names of the models that ship inside the package."""
    return sorted(path.parent.name for path in ASSETS.glob("*/manifest.json"))


def split_revision(name_or_path: str | Path, revision: str | None) -> tuple[str, str | None]:
    """'org/name@revision' as ('org/name', 'revision'), else unchanged; InputError if `revision` names another one."""
    name, _, pinned = str(name_or_path).partition("@")
    if not pinned or not REPO_ID.fullmatch(name) or Path(str(name_or_path)).exists():
        return str(name_or_path), revision
    if revision not in {None, pinned}:
        raise InputError(f"{str(name_or_path)!r} names one revision and revision={revision!r} another; give one of them.")
    return name, pinned


def check_repo_id(repo_id: str) -> None:
    """Raise InputError unless it is of the form 'org/name'."""
    if not REPO_ID.fullmatch(repo_id):
        raise InputError(f"{repo_id!r} is no repository id; write 'org/name'.")


def locate(name_or_path: str | Path, part: str, *, files: Sequence[str], revision: str | None = None, **hub: Any) -> Path:
    """The folder of a model; of a Hub repository, the cached snapshot with the files asked for.

    Args:
        name_or_path: an embedded model's name ('emoji'), a local folder, or a Hub repository 'org/name[@revision]'.
        part: which folder of an embedded model or a run folder: 'generator' or 'attributor'.
        files: patterns of the files to fetch from the Hub; others are not downloaded.
        hub: cache_dir, token, local_files_only and force_download, as of `huggingface_hub.snapshot_download`.

    Raises:
        ArtifactNotFoundError, RevisionNotFoundError: no such model or revision, or not in the cache and the network is off.
        IncompleteDownloadError: a part of it is in the cache, and the rest can't be fetched.
        HubError: the Hub refuses, or can't be reached.
    """
    name, revision = split_revision(name_or_path, revision)
    own = Path(name) / {"attributor": "config.json"}.get(part, "model_index.json")
    if name in embedded_models() and not own.is_file():  # a folder of that name that holds one is itself
        return ASSETS / name / part
    if Path(name).is_dir():
        of_run = Path(name) / part / own.name
        return of_run.parent if of_run.is_file() and not own.is_file() else Path(name)
    if not REPO_ID.fullmatch(name):
        wrong = f"it is no embedded model ({', '.join(embedded_models()) or 'none'}), no local folder and no Hub repository"
        raise ArtifactNotFoundError(f"there is no model {name!r}: {wrong} 'org/name'.")
    return fetch(name, "model", files, revision=revision, **hub)


def fetch(repo_id: str, repo_type: str, files: Sequence[str], *, revision: str | None = None, **hub: Any) -> Path:
    """The cached snapshot of a repository with the files that match these patterns; arguments and errors as `locate`."""
    from huggingface_hub import snapshot_download

    wanted = {"repo_type": repo_type, "revision": revision, "allow_patterns": list(files), **hub, **library()}
    with errors_in_words(repo_id, repo_type, revision, hub.get("token"), offline=hub.get("local_files_only", False)):
        return Path(with_retries(lambda: snapshot_download(repo_id, **wanted)))


def commit_of(folder: Path) -> str | None:
    """The commit whose cached snapshot `folder` is; None for any other folder."""
    cached = folder.parent.name == "snapshots" and folder.parents[1].name.startswith(("models--", "datasets--", "spaces--"))
    return folder.name if cached else None


def library() -> dict[str, Any]:
    """How the Hub counts our downloads and uploads."""
    return {"library_name": "fastattr", "library_version": __version__}


def with_retries(call: Callable[[], Result], *, retry_on: frozenset[int] = TRANSIENT) -> Result:
    """The call's result; at most `TRIES` tries, waiting as long as the server says, else 1, 2, 4, ... seconds."""
    from httpx2 import TransportError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    for attempt in range(TRIES):
        try:
            return call()
        except (HfHubHTTPError, TransportError, LocalEntryNotFoundError, ValueError) as error:
            # The client says 'not in the cache' or 'force download failed' where the Hub failed; that is the cause.
            reason = error.__cause__ if isinstance(error, LocalEntryNotFoundError | ValueError) else error
            if not isinstance(reason, HfHubHTTPError | TransportError):
                raise
            response = reason.response if isinstance(reason, HfHubHTTPError) else None
            passing = response.status_code in retry_on if response is not None else retry_on == TRANSIENT
            if not passing or attempt == TRIES - 1:
                raise
            asked = response.headers.get("Retry-After", "") if response is not None else ""
            wait = min(float(asked) if asked.isdigit() else 2.0**attempt, LONGEST_WAIT)
            logger.warning("the Hub did not answer (%s); trying again in %g s", _first_line(reason), wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


@contextlib.contextmanager
def errors_in_words(
    repo_id: str, repo_type: str, revision: str | None, token: str | None, *, offline: bool = False
) -> Iterator[None]:
    """Turn the Hub client's errors into fastattr's, with the way out."""
    from httpx2 import TransportError
    from huggingface_hub import errors

    try:
        yield
    except FastattrError:
        raise
    except (errors.HfHubHTTPError, TransportError, OSError, ValueError) as error:
        forced = isinstance(error, ValueError) and str(error).startswith("Force download failed")
        reason = error.__cause__ if forced and error.__cause__ else error
        translated = _in_words(reason, repo_id, repo_type, revision, token, offline)
        if translated is None:
            raise
        raise translated from error


def _in_words(
    error: BaseException, repo_id: str, repo_type: str, revision: str | None, token: str | None, offline: bool
) -> FastattrError | None:
    """What one of the Hub client's errors is in fastattr's words; None for what has nothing to do with the Hub."""
    from httpx2 import TransportError
    from huggingface_hub import constants, errors

    what = f"{repo_type} repository {repo_id!r}"
    login = "log in with `hf auth login`, or pass a token that may"
    if isinstance(error, errors.RevisionNotFoundError):
        return RevisionNotFoundError(f"the {what} has no revision {revision!r}; {_revisions(repo_id, repo_type, token)}")
    if isinstance(error, errors.GatedRepoError):
        return HubError(f"the {what} is gated: accept its conditions at {constants.ENDPOINT}/{repo_id}, then {login} read it.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ArtifactNotFoundError(f"the Hub has no {what}, or it is private: check the name, or {login} read it.")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return MissingFileError(f"the {what} lacks a file: {_first_line(error)}. Take another revision.")
    if isinstance(error, errors.IncompleteSnapshotError):
        where = f"only a part of the {what} is in the cache ({error.snapshot_path}), and the Hub can't be asked for the rest"
        return IncompleteDownloadError(f"{where}. Run once with network access: the download goes on where it stopped.")
    if isinstance(error, errors.LocalEntryNotFoundError):
        if offline or constants.is_offline_mode():
            why = "is not in the cache, and the network is switched off (local_files_only or HF_HUB_OFFLINE)"
            return ArtifactNotFoundError(f"the {what} at revision {revision or 'main'!r} {why}. Run once with network access.")
        return HubError(f"the Hub can't be reached for the {what}, and the cache does not hold it; try again later.")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in {401, 403}:
            return HubError(f"the Hub refuses access to the {what} ({status}): {login} do this.")
        if status == 412:
            return HubError(f"others keep committing to the {what}: {TRIES} tries met a newer commit; push again.")
        return HubError(f"the Hub failed on the {what} ({_first_line(error)}); try again later.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError(f"the {what} can't be reached: HF_HUB_OFFLINE is set; unset it.")
    if isinstance(error, TransportError):
        broke = f"the connection to the Hub broke on the {what} ({_first_line(error)})"
        return HubError(f"{broke}; run again, it goes on where it stopped.")
    if isinstance(error, errors.HFValidationError) or "Invalid metadata in README.md" in str(error):
        return InputError(f"the Hub would refuse the {what}: {' '.join(str(error).split())}")
    if "Consistency check failed" in str(error):
        wrong = f"a file of the {what} came shorter or longer than the Hub says"
        return IncompleteDownloadError(f"{wrong}; fetch it again with force_download=True.")
    return None


def _revisions(repo_id: str, repo_type: str, token: str | None) -> str:
    """The branches and tags of a repository, as words for an error."""
    from huggingface_hub import HfApi

    try:
        refs = HfApi(token=token, **library()).list_repo_refs(repo_id, repo_type=repo_type)
    except Exception:  # only a help for the reader of an error that is raised anyway
        return "take a branch, a tag or a full commit id of it."
    branches, tags = ([ref.name for ref in kind] for kind in (refs.branches, refs.tags))
    return f"it has the branches {', '.join(branches) or 'none'} and the tags {', '.join(tags) or 'none'}."


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
