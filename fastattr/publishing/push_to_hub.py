"""Push to hub: the method `FastAttributor.push_to_hub`, which `fastattr` adds to the class.

It stands here because an attributor answers without knowing how it is published.
"""

from __future__ import annotations

from fastattr.attributor.attributor import FastAttributor


def push_to_hub(
    attributor: FastAttributor,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    tag: str | None = None,
    generator: str | None = None,
    scores: str | None = None,
    dry_run: bool = False,
) -> str:
    """Push the attributor with a card made from its metrics to a model repository, which is created if need be.

    Args:
        attributor: what to push.
        repo_id: 'org/name'.
        private: of a repository that is created; None leaves it to the account.
        token: Hub access token; None takes the stored one.
        revision: branch, created if need be; None is 'main'.
        create_pr: open a pull request instead of committing.
        commit_message: None says what is pushed.
        tag: name for the commit.
        generator: Hub id of the generator that it belongs to, for the card.
        scores: Hub id of the score table that it was distilled from, for the card.
        dry_run: send nothing; the Hub need not be reachable.

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
    push = push_attributor(
        attributor.folder,
        repo_id,
        generator=generator,
        scores=scores,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        message=commit_message,
        tag=tag,
        dry_run=dry_run,
    )
    return push.in_words() if dry_run else push.url
