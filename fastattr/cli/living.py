"""Living: commands that change, check, serve and publish an attributor, and import what others released."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fastattr.cli.output import AsJson, on_one_line, say, show
from fastattr.core.errors import InputError, ReceiptDiffersError

if TYPE_CHECKING:
    from fastattr import FastAttributor

app = typer.Typer()
Folder = Annotated[Path, typer.Argument(help="Attributor or run folder.")]
AT_ONCE = 256  # pictures that are taken in with one change


def _own(folder: Path) -> FastAttributor:
    """The attributor in a folder, to be changed there."""
    from fastattr import FastAttributor

    if not folder.is_dir():
        raise InputError(f"{folder} is no attributor folder; write one with FastAttributor.save_pretrained.")
    return FastAttributor.from_pretrained(folder)


@app.command()
def add(
    attributor: Folder,
    pictures: Annotated[Path, typer.Argument(help="Captioned image folder, as `fastattr corpus folder` reads it.")],
    readmit: Annotated[bool, typer.Option("--readmit", help="Take images in again that were removed.")] = False,
) -> None:
    """Take images into an attributor's catalogue.

    Nothing is trained: the student that is there embeds them. Stopped, the same command goes on where it stood.
    """
    from fastattr.attributor.inputs import COLUMNS
    from fastattr.corpus.folders import read_folder
    from fastattr.corpus.images import load_rgb
    from fastattr.corpus.records import TrainingImage
    from fastattr.corpus.reservations import honoured

    own = _own(attributor)
    found = list(honoured(read_folder(pictures), "exclude"))
    images = [each for each in found if isinstance(each, TrainingImage)]
    if not images:
        raise InputError(f"{pictures} holds no captioned image.")
    known = set(own.catalog["image_id"].to_pylist())  # by an earlier run of this command that was stopped, say
    new = [each for each in images if each.image_id not in known]
    for start in range(0, len(new), AT_ONCE):
        batch = new[start : start + AT_ONCE]
        fields = [{name: getattr(each, name) for name in ("image_id", *COLUMNS[2:])} for each in batch]
        own.add([load_rgb(each.image) for each in batch], [each.captions for each in batch], fields, readmit=readmit)
    there, skipped = len(images) - len(new), len(found) - len(images)
    say(f"added {len(new)} images, {there} were there, {skipped} skipped; version {own.versions()['catalog_version']}")


@app.command()
def remove(
    attributor: Folder,
    image_ids: Annotated[list[str] | None, typer.Argument(metavar="[IMAGE_ID...]")] = None,
    opt_out: Annotated[Path | None, typer.Option("--list", help="File of ids, creators, URLs and hashes.")] = None,
    reason: Annotated[str, typer.Option(help="Kept in the journal.")] = "",
) -> None:
    """Take images out of an attributor's catalogue (opt-out)."""
    from fastattr.corpus.reservations import OptOuts

    if not image_ids and not opt_out:
        raise InputError("name the images to remove, or give an opt-out list with --list.")
    own = _own(attributor)
    ids = [*(image_ids or []), *(OptOuts(opt_out).listed_in(own.catalog) if opt_out else [])]
    own.remove(ids, reason=reason or (f"opt-out list {opt_out.name}" if opt_out else ""))
    say(f"removed {len(set(ids))}; {len(own)} images are left, version {own.versions()['catalog_version']}")


@app.command()
def update(
    attributor: Folder,
    image_id: Annotated[str, typer.Argument()],
    fields: Annotated[list[str], typer.Argument(metavar="COLUMN=VALUE...")],
) -> None:
    """Change what the catalogue says of an image."""
    if not all("=" in text for text in fields):
        raise InputError("write COLUMN=VALUE for each thing that changes.")
    own = _own(attributor)
    own.update({image_id: dict(text.split("=", 1) for text in fields)})
    say(f"updated; version {own.versions()['catalog_version']}")


@app.command()
def compact(attributor: Folder) -> None:
    """Fold changes into the index, and erase what left."""
    own = _own(attributor)
    own.compact()
    say(f"compacted; {len(own)} images, version {own.versions()['catalog_version']}")


@app.command()
def sign(
    attributor: Folder,
    key: Annotated[Path, typer.Option(help="Private ed25519 key, PEM (`openssl genpkey -algorithm ed25519`).")],
) -> None:
    """Sign an attributor for those who trust a key."""
    from fastattr.attributor import folder
    from fastattr.core.models import locate

    say(f"signed: {folder.sign(locate(attributor, 'attributor', files=[]), key)}")


@app.command()
def verify(
    receipt: Annotated[Path, typer.Argument(help="Of `fastattr attribute --json`, or statement.json.")],
    model: Annotated[str, typer.Option(help="Attributor that replays it (default: the receipt's; a statement: none).")] = "",
    revision: Annotated[str, typer.Option(help="Its revision on the Hub (default: the receipt's).")] = "",
    image: Annotated[Path | None, typer.Option(help="The query's image, to replay the encoders, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Replay a receipt or a statement, and say what differs."""
    from fastattr import FastAttributor
    from fastattr.attributor import receipts
    from fastattr.core.files import read_json
    from fastattr.publishing import statement as statements

    value = read_json(receipt)
    if isinstance(value, dict) and value.get("format") == statements.FORMAT:
        differences, against = statements.verify_statement(receipt, attributor=model), "its receipts"
        versions = value["attributor"]["versions"]
    else:
        claimed = receipts.read_receipt(receipt)
        name = model or claimed["model"]["name"]
        if not (revision or model or "@" in name):
            revision = claimed["model"].get("revision") or ""
        attributor = FastAttributor.from_pretrained(name, revision=revision or None, thumbnails=False)
        differences, against = receipts.verify(claimed, attributor, image=image), attributor.name
        versions = attributor.versions()
    text = "\n".join(differences) or f"{receipt} is what {against} answers."
    show({"same": not differences, "differences": differences, "versions": versions}, as_json, text)
    if differences:
        raise ReceiptDiffersError(f"{len(differences)} differences between {receipt} and {against}.")


@app.command()
def statement(
    attributor: Annotated[str, typer.Argument(help="'emoji', an attributor or run folder, or a Hub id.")],
    receipts: Annotated[list[Path], typer.Argument(metavar="RECEIPTS...", help=".json, .jsonl, .parquet, or folders.")],
    period: Annotated[str, typer.Option(help="Year, month or day in UTC, as in 2026-11.")],
    pool: Annotated[str, typer.Option(help="Money to divide, as in 1000 or 99.95.")],
    out: Annotated[Path, typer.Option(help="Folder to write: statement.json, .csv, .html and receipts.parquet.")],
    currency: Annotated[str, typer.Option(help="Three letters.")] = "EUR",
    policy: Annotated[Path | None, typer.Option(help="YAML; docs/statements.md names its settings.")] = None,
    as_json: AsJson = False,
) -> None:
    """Divide a pool of money among creators by receipts."""
    from fastattr.core.settings import read_yaml
    from fastattr.publishing.statement import StatementPolicy, make_statement

    rules = read_yaml(policy, StatementPolicy) if policy else None
    made = make_statement(attributor, receipts, out, pool=pool, period=period, currency=currency, policy=rules)
    rows = [f"{line['amount']:>14s}  {on_one_line(line['owner'])}" for line in made["lines"][:20]]
    counts = ", ".join(f"{count} {name}" for name, count in made["receipts"].items())
    show(made, as_json, "\n".join([*rows, f"{made['kept']:>14s}  kept by the payer", f"receipts: {counts}; all in {out}"]))


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="'emoji', an attributor or run folder, or a Hub id.")],
    host: Annotated[str, typer.Option(help="Others than this machine need FASTATTR_TOKEN to be set.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 30.0,
    opt_out: Annotated[Path | None, typer.Option(help="Remove what this opt-out list names, first.")] = None,
) -> None:
    """Serve an attributor to machines over HTTP."""
    from fastattr.serving import http

    config = http.ServeConfig(token=os.environ.get("FASTATTR_TOKEN", ""), timeout=timeout)
    http.run(model, host=host, port=port, config=config, opt_out=opt_out)


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
    options: dict[str, Any] = {"private": private or None, "revision": revision or None, "create_pr": create_pr}
    options |= {"message": message or None, "tag": None if create_pr else tag or None, "dry_run": dry_run}
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
    """Import what others released."""
    from fastattr.publishing import fastgda

    if influence and not (weights or features):
        manifest = fastgda.import_scores(influence, ids, out, prompts=prompts or [])
        say(f"score table of {manifest['queries']} queries in {out} (licence of the source: {manifest['license']})")
    elif weights and features and not influence:
        fastgda.import_attributor(weights, features, ids, out)
        say(f"attributor in {out} (licence of the source: {fastgda.LICENSE})")
    else:
        raise InputError("give --weights and --features for an attributor, or --influence for a score table.")
