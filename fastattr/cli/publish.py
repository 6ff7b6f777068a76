"""Publish: push models, score tables and the page to the Hub; import what others released."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastattr.cli.output import AsJson, say, show
from fastattr.core.errors import InputError

app = typer.Typer()


@app.command()
def push(
    kind: Annotated[Literal["attributor", "generator", "scores", "space"], typer.Argument(help="What to push.")],
    places: Annotated[
        list[str],
        typer.Argument(metavar="[SOURCE] ORG/NAME", help="'emoji', a run folder or the folder (not for a space); where to."),
    ],
    generator: Annotated[str, typer.Option(help="Of attributor and space: Hub id of the generator it belongs to.")] = "",
    attributor: Annotated[str, typer.Option(help="Of a space: Hub id of the attributor.")] = "",
    scores: Annotated[str, typer.Option(help="Of attributor and space: Hub id of the score table.")] = "",
    config_name: Annotated[str, typer.Option(help="Of scores: configuration (default: teacher and generator).")] = "",
    private: Annotated[bool, typer.Option("--private", help="If the repository is new.")] = False,
    revision: Annotated[str, typer.Option(help="Branch (default: main).")] = "",
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "",
    tag: Annotated[str, typer.Option(help="Release tag; 'auto' names version and contents, '' makes none.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent; needs no network.")] = False,
    as_json: AsJson = False,
) -> None:
    """Push models, score tables or the page to the Hub."""
    from fastattr.publishing import publish

    *source, repo_id = places
    if len(source) != (kind != "space"):
        raise InputError(f"write: fastattr push {kind} {'' if kind == 'space' else 'SOURCE '}ORG/NAME.")
    options: dict[str, Any] = {
        "private": private or None,
        "revision": revision or None,
        "create_pr": create_pr,
        "message": message or None,
        "tag": None if create_pr else tag or None,
        "dry_run": dry_run,
    }
    if kind in {"attributor", "space"}:
        options |= {"generator": generator or None, "scores": scores or None}
    if kind == "space":
        if not generator or not attributor:
            raise InputError("a space shows models that are on the Hub: give --generator and --attributor.")
        sent = publish.push_space(repo_id, attributor=attributor, **options)
    else:
        folder = publish.part_of(source[0], kind)
        if kind == "attributor":
            sent = publish.push_attributor(folder, repo_id, **options)
        elif kind == "generator":
            sent = publish.push_generator(folder, repo_id, images=publish.training_images(source[0]), **options)
        else:
            sent = publish.push_scores(folder, repo_id, config_name=config_name or None, **options)
    show(vars(sent), as_json, sent.in_words())


@app.command("import")
def import_(
    kind: Annotated[Literal["fastgda"], typer.Argument(help="The paper's authors' checkpoint, features and rankings.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    ids: Annotated[Path, typer.Option(help="Ids of the training images in order: .txt, .json, .npy, .parquet.")],
    weights: Annotated[Path | None, typer.Option(help="Checkpoint, e.g. dino+clip_text.pth: with --features.")] = None,
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
