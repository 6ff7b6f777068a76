"""Push: send a folder's files to a Hub repository as one commit; unchanged files are not sent.

By `create_commit` and not `upload_folder`: with hf-xet installed, the latter splits what it sends into several commits.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattr.core.errors import ArtifactNotFoundError, HubError, InputError
from fastattr.core.files import sha256_file
from fastattr.core.models import REFUSED, TRANSIENT, check_repo_id, errors_in_words, fetch, library, with_retries
from fastattr.core.stages import fingerprint
from fastattr.core.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

MAX_FILES = 250
"""Files in one push: above that the Hub's clients split a commit, and a reader could see half of it."""
AUTO = "auto"
"""As a tag: made from fastattr's version and the contents, so the same contents have the same tag."""


@dataclass(frozen=True, kw_only=True)
class Push:
    """What a push sent, or with `dry_run` would send."""

    repo_id: str
    repo_type: str
    url: str
    """Of the commit that now holds the artifacts; of a dry run, of the repository."""
    sent: dict[str, int]
    """New and changed files with their sizes in bytes."""
    unchanged: list[str]
    deleted: list[str]
    """Files of an earlier push that the artifacts no longer have."""
    tag: str | None
    dry_run: bool
    unasked: str = ""
    """Of a dry run: why the Hub could not be asked what it has; then every file counts as new."""

    def in_words(self) -> str:
        """A few lines for the command line."""
        send, delete = ("would send", "would delete") if self.dry_run else ("sent", "deleted")
        lines = [f"  {send}  {path}  ({size:,} bytes)" for path, size in self.sent.items()]
        lines += [f"  {delete}  {path}" for path in self.deleted]
        total = f"{len(self.sent)} files, {sum(self.sent.values()):,} bytes; {len(self.unchanged)} unchanged"
        total += f", tag {self.tag}" if self.tag else ""
        lines += [f"Not compared with what is there: {self.unasked}"] if self.unasked else []
        return "\n".join([f"{self.repo_type} {self.repo_id}: {total}", *lines, self.url])


def release_tag(folder: Path) -> str:
    """A tag that names a folder's contents: 'v0.1.0-1a2b3c4d'."""
    contents = {path.relative_to(folder).as_posix(): sha256_file(path) for path in folder.rglob("*") if path.is_file()}
    return f"v{__version__}-{fingerprint(contents)[:8]}"


def send_with_card(staged: Path, repo_id: str, card: str, licences: str, **target: Any) -> Push:
    """Add card and licences to a staged folder and send it."""
    (staged / "README.md").write_text(card, encoding="utf-8")
    (staged / "LICENSE.md").write_text(licences, encoding="utf-8")
    return push_folder(staged, repo_id, **target)


def already_there(repo_id: str, repo_type: str, patterns: list[str], target: Mapping[str, Any]) -> Path | None:
    """A local copy of the files that a repository holds; None if it is yet to be made, or a dry run cannot ask the Hub."""
    try:
        return fetch(repo_id, repo_type, patterns, **{key: target[key] for key in ("token", "revision") if key in target})
    except ArtifactNotFoundError:
        return None  # the repository, or the branch
    except HubError:
        if target.get("dry_run"):
            return None
        raise


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    repo_type: str = "model",
    what: str = "files",
    message: str | None = None,
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
        what: what the folder holds, for the message.
        message: of the commit; None says what is pushed.
        replaces: patterns of remote files to delete if `folder` has no such file; others there are left alone.
        private: of a repository that is created; None leaves it to the account.
        token: Hub access token; None takes the stored one.
        revision: branch to commit to, created if need be; None is 'main'.
        create_pr: open a pull request instead of committing.
        tag: name for the commit; `AUTO` becomes the folder's `release_tag`.
        variables: of a Space, which reads them as environment variables.
        dry_run: only compare; where the Hub can't be asked, say what would be sent to an empty repository.

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
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token, **library())
    where: dict[str, Any] = {"repo_id": repo_id, "repo_type": repo_type}
    tag = release_tag(folder) if tag == AUTO else tag

    def compared(remote: Mapping[str, RepoFile], unasked: str = "") -> Push:
        changed = [path for path, local in files.items() if not _same(local, remote.get(path))]
        return Push(
            **where,
            url=f"{api.endpoint}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}",
            sent={path: files[path].stat().st_size for path in changed},
            unchanged=[path for path in files if path not in changed],
            deleted=[path for path in remote if path not in files and any(fnmatch.fnmatch(path, each) for each in replaces)],
            tag=tag,
            dry_run=dry_run,
            unasked=unasked,
        )

    def send() -> Push:
        head, remote = _listing(api, where, revision)
        push, tagged = compared(remote), bool(tag and head and _has_tag(api, where, tag, files))
        if dry_run:
            return push
        url = f"{push.url}/commit/{head}"
        if push.sent or push.deleted:
            operations: list[Any] = [CommitOperationAdd(path, files[path]) for path in push.sent]
            operations += [CommitOperationDelete(path) for path in push.deleted]
            options: dict[str, Any] = {"revision": revision, "create_pr": create_pr, "parent_commit": head}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")  # yes, we are
                commit = api.create_commit(**where, operations=operations, commit_message=message or f"Push {what}", **options)
            url, head = commit.pr_url or commit.commit_url, commit.oid
        if tag and not tagged:
            api.create_tag(**where, tag=tag, revision=head)
        return replace(push, url=url)

    try:
        with errors_in_words(repo_id, repo_type, revision, token):
            if dry_run:
                return send()
            sdk = "gradio" if repo_type == "space" else None
            with_retries(lambda: api.create_repo(**where, private=private, exist_ok=True, space_sdk=sdk))
            if revision not in {None, "main"} and not str(revision).startswith("refs/"):
                with_retries(lambda: api.create_branch(**where, branch=str(revision), exist_ok=True))
            if variables:
                with_retries(lambda: _set_variables(api, repo_id, variables))
            # A second try compares anew: if the first did arrive, it finds nothing left to send.
            return with_retries(send, retry_on=REFUSED if create_pr else TRANSIENT)
    except HubError as error:
        if not dry_run:
            raise
        return compared({}, unasked=str(error))


def _listing(api: HfApi, where: Mapping[str, Any], revision: str | None) -> tuple[str | None, dict[str, RepoFile]]:
    """(commit, its files by path) of a revision; (None, {}) if there is none."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError as NoRevision
    from huggingface_hub.hf_api import RepoFile

    try:
        head = api.repo_info(**where, revision=revision).sha
    except (RepositoryNotFoundError, NoRevision) as error:
        if isinstance(error, GatedRepoError):
            raise
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
    """Whether the repository has this tag; InputError if it has, for other contents."""
    if tag not in {ref.name for ref in api.list_repo_refs(**where).tags}:
        return False
    _, tagged = _listing(api, where, tag)
    differing = [path for path, local in files.items() if not _same(local, tagged.get(path))]
    if differing:
        there = f"{where['repo_id']} already has a tag {tag!r}"
        raise InputError(f"{there}, and there {', '.join(differing[:3])} differ; choose another.")
    return True


def _set_variables(api: HfApi, repo_id: str, variables: Mapping[str, str]) -> None:
    """Set a Space's variables; it restarts only if one changes."""
    present = {name: variable.value for name, variable in api.get_space_variables(repo_id).items()}
    for name, value in variables.items():
        if present.get(name) != value:
            api.add_space_variable(repo_id, name, value)
