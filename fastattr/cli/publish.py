"""Publish: push models, score tables and the page to the Hub; import what others released."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fastattr.cli.output import AsJson, say, say_json
from fastattr.core.errors import InputError

if TYPE_CHECKING:
    from fastattr.publishing.push import Push

app = typer.Typer()
push = typer.Typer(help="Push models, score tables or the page to the Hub.", no_args_is_help=True)
app.add_typer(push, name="push")

Source = Annotated[str, typer.Argument(help="'emoji', a run folder, or the folder itself.")]
RepoId = Annotated[str, typer.Argument(help="org/name")]
Scores = Annotated[str | None, typer.Option(help="Hub id of the score table.")]
Private = Annotated[bool | None, typer.Option("--private", help="If the repository is new.")]
Revision = Annotated[str | None, typer.Option(help="Branch (default: main).")]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")]
Message = Annotated[str | None, typer.Option(help="Of the commit.")]
Tag = Annotated[str, typer.Option(help="Release tag; 'auto' names version and contents, '' makes none.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be sent.")]


def _target(
    private: bool | None, revision: str | None, create_pr: bool, message: str | None, tag: str, dry_run: bool
) -> dict[str, Any]:
    return {
        "private": private or None,
        "revision": revision,
        "create_pr": create_pr,
        "message": message,
        "tag": None if create_pr else tag or None,
        "dry_run": dry_run,
    }


def _tell(sent: Push, as_json: bool) -> None:
    if as_json:
        say_json(vars(sent))
        return
    say(sent.in_words())


@push.command("attributor")
def push_attributor(
    source: Source,
    repo_id: RepoId,
    generator: Annotated[str | None, typer.Option(help="Hub id of the generator it belongs to.")] = None,
    scores: Scores = None,
    private: Private = None,
    revision: Revision = None,
    create_pr: CreatePr = False,
    message: Message = None,
    tag: Tag = "auto",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Student, index and catalogue with a model card."""
    from fastattr.publishing import publish

    target = _target(private, revision, create_pr, message, tag, dry_run)
    folder = publish.part_of(source, "attributor")
    _tell(publish.push_attributor(folder, repo_id, generator=generator, scores=scores, **target), as_json)


@push.command("generator")
def push_generator(
    source: Source,
    repo_id: RepoId,
    private: Private = None,
    revision: Revision = None,
    create_pr: CreatePr = False,
    message: Message = None,
    tag: Tag = "auto",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """A diffusers pipeline with a model card."""
    from fastattr.publishing import publish

    target = _target(private, revision, create_pr, message, tag, dry_run)
    folder, images = publish.part_of(source, "generator"), publish.training_images(source)
    _tell(publish.push_generator(folder, repo_id, images=images, **target), as_json)


@push.command("scores")
def push_scores(
    source: Annotated[str, typer.Argument(help="A run folder, or the folder of the table.")],
    repo_id: RepoId,
    config_name: Annotated[str | None, typer.Option(help="Configuration (default: teacher and generator).")] = None,
    private: Private = None,
    revision: Revision = None,
    create_pr: CreatePr = False,
    message: Message = None,
    tag: Tag = "auto",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """A score table as one configuration of a dataset."""
    from fastattr.publishing import publish, score_tables

    target = _target(private, revision, create_pr, message, tag, dry_run)
    folder = publish.part_of(source, "scores")
    _tell(score_tables.push_scores(folder, repo_id, config_name=config_name, **target), as_json)


@push.command("space")
def push_space(
    repo_id: RepoId,
    generator: Annotated[str, typer.Option(help="Hub id of the generator.")],
    attributor: Annotated[str, typer.Option(help="Hub id of the attributor.")],
    scores: Scores = None,
    private: Private = None,
    revision: Revision = None,
    create_pr: CreatePr = False,
    message: Message = None,
    tag: Tag = "auto",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """The page, showing models that are on the Hub."""
    from fastattr.publishing import publish

    target = _target(private, revision, create_pr, message, tag, dry_run)
    _tell(publish.push_space(repo_id, generator=generator, attributor=attributor, scores=scores, **target), as_json)


@app.command("import")
def import_(
    kind: Annotated[
        Literal["fastgda"], typer.Argument(help="fastgda: the paper's authors' checkpoint, features and rankings.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    ids: Annotated[Path, typer.Option(help="Ids of the training images in order: .txt, .json, .npy, .parquet.")],
    weights: Annotated[
        Path | None, typer.Option(help="Checkpoint, e.g. dino+clip_text.pth (with --features: an attributor).")
    ] = None,
    features: Annotated[Path | None, typer.Option(help="Features of the training images, e.g. data_feats.npy.")] = None,
    influence: Annotated[list[Path] | None, typer.Option(help="influence_SPLIT.pkl: a score table; once a split.")] = None,
    prompts: Annotated[list[Path] | None, typer.Option(help="A query's prompt a line; as often as --influence.")] = None,
) -> None:
    """Import what others released.

    It becomes an attributor or a score table.
    """
    from fastattr.publishing import fastgda

    if influence and not (weights or features):
        manifest = fastgda.import_scores(influence, ids, out, prompts=prompts or [])
        say(f"score table of {manifest['queries']} queries in {out} (licence of the source: {manifest['license']})")
    elif weights and features and not influence:
        fastgda.import_attributor(weights, features, ids, out)
        say(f"attributor in {out} (licence of the source: {fastgda.LICENSE})")
    else:
        raise InputError("give --weights and --features for an attributor, or --influence for a score table.")
