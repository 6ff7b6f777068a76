"""Publishing: send what a run made to the Hugging Face Hub, and import what others released.

Reads a run folder or an embedded model; writes repositories on the Hub (one commit a push) and, for imports, attributor
and score-table folders.

- `push_to_hub`: the method of `FastAttributor`, which `fastattr` adds: an attributor answers without knowing how to publish.
- `publish`: `push_attributor`, `push_generator`, `push_scores`, `push_space`, `push_all` (all that a run holds), `PushConfig`.
- `push`: `push_folder`, the one function that changes a repository; `release_tag`.
- `cards`: README.md and LICENSE.md of a repository, from manifests, metrics and catalogue alone.
- `statement`: `make_statement`, `verify_statement`: a pool of money divided by the receipts of a period.
- `fastgda`: `import_attributor`, `import_scores`, from the files that the paper's authors released.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastattr.attributor.attributor import FastAttributor


def push_to_hub(
    attributor: FastAttributor, repo_id: str, *, commit_message: str | None = None, dry_run: bool = False, **target: Any
) -> str:
    """Push the attributor with a card made from its metrics to a model repository, which is created if need be.

    Args:
        attributor: what to push.
        repo_id: 'org/name'.
        commit_message: None says what is pushed.
        dry_run: send nothing; the Hub need not be reachable.
        target: generator and scores, Hub ids for the card; private, token, revision, create_pr, tag, as `push.push_folder`.

    Returns:
        URL of the commit (or pull request), old if nothing has changed. Of a dry run, what would be sent, in words.

    Raises:
        HubError: the Hub refuses, or can't be reached.
        InputError: `repo_id` is none, or the tag names other contents.
        MissingFileError: the attributor was loaded in part only.
    """
    from fastattr.publishing.publish import push_attributor  # slow to import

    attributor.require_whole()
    push = push_attributor(attributor.folder, repo_id, message=commit_message, dry_run=dry_run, **target)
    return push.in_words() if dry_run else push.url
