"""Push to hub: the method `FastAttributor.push_to_hub`, which `fastattr` adds to the class.

It stands here because an attributor answers without knowing how it is published.
"""

from __future__ import annotations

from typing import Any

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
        target: generator and scores, Hub ids of its generator and of the score table that it was distilled from, for the card;
            private, of a repository that is created (None leaves it to the account); token (None takes the stored one);
            revision, a branch, created if need be (None is 'main'); create_pr; tag, a name for the commit.

    Returns:
        URL of the commit (or pull request); of the commit that is there, if nothing has changed. Of a dry run, what would be
        sent, in words.

    Raises:
        HubError: the Hub refuses, or can't be reached.
        InputError: `repo_id` is none, or the tag names other contents.
        MissingFileError: the attributor was loaded in part only.
    """
    from fastattr.publishing.publish import push_attributor

    attributor.require_whole()
    push = push_attributor(attributor.folder, repo_id, message=commit_message, dry_run=dry_run, **target)
    return push.in_words() if dry_run else push.url
