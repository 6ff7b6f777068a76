"""Hub: find a model, fetch just the files asked for, push a folder as one commit.

A model is an embedded one by name, a local folder, or a repository on the Hugging Face Hub ('org/name', or
'org/name@revision'). `locate` fetches, `push_folder` sends; both try again what may pass by itself (a burst of server
errors, a rate limit, a commit that came in between) and turn everything else into one of fastattr's errors.
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastattr.core.errors import (
    ArtifactNotFoundError,
    FastattrError,
    HubError,
    IncompleteDownloadError,
    InputError,
    MissingFileError,
    RevisionNotFoundError,
)
from fastattr.core.files import sha256_file

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

ASSETS = Path(__file__).parents[1] / "assets"
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
PIPELINE_FILES = ("*.json", "*/*.txt", "*/*.model", "*/model[.-][s0]*", "*/diffusion_pytorch_model[.-][s0]*")
"""What a diffusers pipeline is loaded from: no pickle, no second precision, no single-file checkpoint beside the folders."""

MAX_FILES = 250
"""Files in one push: above that the Hub's clients split a commit, and a reader could see half of it."""
TRIES = 5
REFUSED = frozenset({412, 429})
"""Nothing was done: another commit came first, or too many requests."""
TRANSIENT = REFUSED | {408, 500, 502, 503, 504}
"""May or may not have been done; safe to ask again where the second time does nothing new."""
LONGEST_WAIT = 60.0
"""Seconds between two tries, whatever the server asks for."""


def embedded_models() -> list[str]:
    """Names of the models that ship inside the package."""
    return sorted(path.parent.name for path in ASSETS.glob("*/manifest.json"))


def split_revision(name_or_path: str | Path, revision: str | None) -> tuple[str, str | None]:
    """'org/name@revision' as ('org/name', 'revision'); anything else unchanged.

    Raises:
        InputError: `revision` names another one.
    """
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


def locate(
    name_or_path: str | Path,
    part: str,
    *,
    files: Sequence[str],
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The folder of a model; of a Hub repository, the cached snapshot with the files asked for.

    Args:
        name_or_path: an embedded model's name ('emoji'), a local folder, or a Hub repository 'org/name[@revision]'.
        part: which folder of an embedded model: 'generator' or 'attributor'.
        files: patterns of the files to fetch from the Hub; others are not downloaded.
        revision: branch, tag or commit on the Hub.
        cache_dir: where the Hub client keeps downloads.
        token: Hub access token.
        local_files_only: take the cached copy, ask no network.
        force_download: fetch again what the cache holds.

    Raises:
        ArtifactNotFoundError: there is no such model, or it is not in the cache and the network is off.
        RevisionNotFoundError: the repository has no such revision.
        IncompleteDownloadError: a part of it is in the cache, and the rest can't be fetched.
        HubError: the Hub refuses, or can't be reached.
    """
    name, revision = split_revision(name_or_path, revision)
    if name in embedded_models():
        return ASSETS / name / part
    if Path(name).is_dir():
        return Path(name)
    if not REPO_ID.fullmatch(name):
        raise ArtifactNotFoundError(
            f"there is no model {name!r}: it is no embedded model ({', '.join(embedded_models()) or 'none'}), "
            "no local folder and no Hub repository 'org/name'."
        )
    return fetch(
        name,
        "model",
        files,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
        force_download=force_download,
    )


def fetch(
    repo_id: str,
    repo_type: str,
    files: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The cached snapshot of a repository with the files that match these patterns; arguments and errors as `locate`."""
    from huggingface_hub import snapshot_download

    with _errors_in_words(repo_id, repo_type, revision, token, offline=local_files_only):
        return Path(
            _with_retries(
                lambda: snapshot_download(
                    repo_id,
                    repo_type=repo_type,
                    revision=revision,
                    cache_dir=cache_dir,
                    token=token,
                    local_files_only=local_files_only,
                    force_download=force_download,
                    allow_patterns=list(files),
                    **_library(),
                )
            )
        )


def commit_of(folder: Path) -> str | None:
    """The commit whose cached snapshot `folder` is; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


@dataclass(frozen=True, kw_only=True)
class Push:
    """What a push sent, or with `dry_run` would send."""

    repo_id: str
    repo_type: str
    """'model', 'dataset' or 'space'."""
    url: str
    """Of the commit that now holds the artifacts; of the repository, if nothing was sent because it was a dry run."""
    sent: dict[str, int]
    """New and changed files with their sizes in bytes."""
    unchanged: list[str]
    deleted: list[str]
    """Files of an earlier push that the artifacts no longer have."""
    tag: str | None
    dry_run: bool

    def in_words(self) -> str:
        """A few lines for the command line."""
        mark = {True: "would send", False: "sent"}[self.dry_run]
        lines = [f"  {mark}  {path}  ({size:,} bytes)" for path, size in self.sent.items()]
        lines += [f"  {'would delete' if self.dry_run else 'deleted'}  {path}" for path in self.deleted]
        total = f"{len(self.sent)} files, {sum(self.sent.values()):,} bytes; {len(self.unchanged)} unchanged"
        tag = f", tag {self.tag}" if self.tag else ""
        return "\n".join([f"{self.repo_type} {self.repo_id}: {total}{tag}", *lines, self.url])


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    repo_type: str = "model",
    message: str,
    replaces: Sequence[str] = (),
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    variables: Mapping[str, str] | None = None,
    dry_run: bool = False,
) -> Push:
    """Send a folder's files to a repository, which is created if need be, as one commit; unchanged files make none.

    Args:
        folder: what to send.
        repo_id: 'org/name'.
        repo_type: 'model', 'dataset' or 'space'.
        message: of the commit.
        replaces: patterns of remote files to delete if `folder` has no such file; others there are left alone.
        private: of a repository that is created; None leaves it to the account.
        token: Hub access token; None takes the stored one.
        revision: branch to commit to, created if need be; None is 'main'.
        create_pr: open a pull request instead of committing.
        tag: name for the commit.
        variables: of a Space, which reads them as environment variables.
        dry_run: only compare.

    Raises:
        InputError: there are too many files, or `tag` already names other contents.
        HubError: the Hub refuses, or can't be reached.
    """
    check_repo_id(repo_id)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if len(files) > MAX_FILES:
        raise InputError(f"{folder} has {len(files)} files, a push takes at most {MAX_FILES}; write fewer, larger shards.")
    if create_pr and (tag or revision not in {None, "main"}):
        raise InputError("a pull request is opened against 'main' and gets no tag; leave revision and tag out, or create_pr.")
    from huggingface_hub import HfApi

    api = HfApi(token=token, **_library())
    where: dict[str, Any] = {"repo_id": repo_id, "repo_type": repo_type}

    def send() -> Push:
        head, remote = _listing(api, where, revision)
        changed = [path for path, local in files.items() if not _same(local, remote.get(path))]
        stale = [path for path in remote if path not in files and any(fnmatch.fnmatch(path, each) for each in replaces)]
        tagged = _has_tag(api, where, tag, files) if tag and head else False
        url = f"{api.endpoint}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}"
        if not dry_run:
            url, head = _commit(api, where, files, changed, stale, message, revision, create_pr, head, url)
            if tag and not tagged:
                api.create_tag(**where, tag=tag, revision=head)
        return Push(
            repo_id=repo_id,
            repo_type=repo_type,
            url=url,
            sent={path: files[path].stat().st_size for path in changed},
            unchanged=[path for path in files if path not in changed],
            deleted=stale,
            tag=tag,
            dry_run=dry_run,
        )

    with _errors_in_words(repo_id, repo_type, revision, token):
        if not dry_run:
            sdk = "gradio" if repo_type == "space" else None
            _with_retries(lambda: api.create_repo(**where, private=private, exist_ok=True, space_sdk=sdk))
            if revision not in {None, "main"} and not str(revision).startswith("refs/"):
                _with_retries(lambda: api.create_branch(**where, branch=str(revision), exist_ok=True))
            if variables:
                _with_retries(lambda: _set_variables(api, repo_id, variables))
        # A second try compares anew: if the first did arrive, it finds nothing left to send.
        return _with_retries(send, retry_on=REFUSED if create_pr else TRANSIENT)


def _commit(
    api: HfApi,
    where: Mapping[str, Any],
    files: Mapping[str, Path],
    changed: Sequence[str],
    stale: Sequence[str],
    message: str,
    revision: str | None,
    create_pr: bool,
    head: str | None,
    url: str,
) -> tuple[str, str | None]:
    """Commit the changes onto `head`, if there are any; (URL of the commit or pull request, its id)."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if not changed and not stale:
        return f"{url}/commit/{head}", head
    operations: list[Any] = [CommitOperationAdd(path, files[path]) for path in changed]
    operations += [CommitOperationDelete(path) for path in stale]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")  # yes: the catalogue
        commit = api.create_commit(
            **where,
            operations=operations,
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,
        )
    return commit.pr_url or commit.commit_url, commit.oid


def _listing(api: HfApi, where: Mapping[str, Any], revision: str | None) -> tuple[str | None, dict[str, RepoFile]]:
    """(commit, its files by path) of a revision; (None, {}) if there is none."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError as NoRevision
    from huggingface_hub.hf_api import RepoFile

    try:
        head = api.repo_info(**where, revision=revision).sha
    except GatedRepoError:
        raise
    except (RepositoryNotFoundError, NoRevision):
        return None, {}
    tree = api.list_repo_tree(**where, revision=head, recursive=True)
    return head, {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _same(local: Path, remote: RepoFile | None) -> bool:
    """Whether a file on the Hub has these contents, by the hash that the Hub keeps of it."""
    from huggingface_hub.utils.sha import git_hash

    if remote is None or remote.size != local.stat().st_size:
        return False
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == sha256_file(local))
    return bool(remote.blob_id == git_hash(local.read_bytes()))


def _has_tag(api: HfApi, where: Mapping[str, Any], tag: str, files: Mapping[str, Path]) -> bool:
    """Whether the repository has this tag.

    Raises:
        InputError: it has, for other contents.
    """
    if tag not in {ref.name for ref in api.list_repo_refs(**where).tags}:
        return False
    _, tagged = _listing(api, where, tag)
    differing = [path for path, local in files.items() if not _same(local, tagged.get(path))]
    if differing:
        raise InputError(
            f"{where['repo_id']} already has a tag {tag!r}, and there {', '.join(differing[:3])} differ; choose another."
        )
    return True


def _set_variables(api: HfApi, repo_id: str, variables: Mapping[str, str]) -> None:
    """Set a Space's variables; it restarts only if one changes."""
    present = {name: variable.value for name, variable in api.get_space_variables(repo_id).items()}
    for name, value in variables.items():
        if present.get(name) != value:
            api.add_space_variable(repo_id, name, value)


def _library() -> dict[str, Any]:
    """How the Hub counts our downloads and uploads."""
    from fastattr.core.version import __version__

    return {"library_name": "fastattr", "library_version": __version__}


def _with_retries(call: Callable[[], Result], *, retry_on: frozenset[int] = TRANSIENT) -> Result:
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
def _errors_in_words(
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
        found = _revisions(repo_id, repo_type, token)
        return RevisionNotFoundError(f"the {what} has no revision {revision!r}; {found}")
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{repo_id}"
        return HubError(f"the {what} is gated: accept its conditions at {page}, then {login} read it.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ArtifactNotFoundError(f"the Hub has no {what}, or it is private: check the name, or {login} read it.")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return MissingFileError(f"the {what} lacks a file: {_first_line(error)}. Take another revision.")
    if isinstance(error, errors.IncompleteSnapshotError):
        return IncompleteDownloadError(
            f"only a part of the {what} is in the cache ({error.snapshot_path}), and the Hub can't be asked for the rest. "
            "Run once with network access: the download goes on where it stopped."
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        if offline or constants.is_offline_mode():
            return ArtifactNotFoundError(
                f"the {what} at revision {revision or 'main'!r} is not in the cache, and the network is switched off "
                "(local_files_only or HF_HUB_OFFLINE). Run once with network access."
            )
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
        return HubError(
            f"the connection to the Hub broke on the {what} ({_first_line(error)}); run again, it goes on where it stopped."
        )
    if isinstance(error, errors.HFValidationError) or "Invalid metadata in README.md" in str(error):
        return InputError(f"the Hub would refuse the {what}: {' '.join(str(error).split())}")
    if "Consistency check failed" in str(error):
        return IncompleteDownloadError(
            f"a file of the {what} came shorter or longer than the Hub says; fetch it again with force_download=True."
        )
    return None


def _revisions(repo_id: str, repo_type: str, token: str | None) -> str:
    """The branches and tags of a repository, as words for an error."""
    from huggingface_hub import HfApi

    try:
        refs = HfApi(token=token, **_library()).list_repo_refs(repo_id, repo_type=repo_type)
    except Exception:  # only a help for the reader of an error that is raised anyway
        return "take a branch, a tag or a full commit id of it."
    branches, tags = ([ref.name for ref in kind] for kind in (refs.branches, refs.tags))
    return f"it has the branches {', '.join(branches) or 'none'} and the tags {', '.join(tags) or 'none'}."


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
