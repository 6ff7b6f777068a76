"""Living: commands that change, check and serve an attributor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastattr.cli.output import AsJson, on_one_line, say, show
from fastattr.core.errors import InputError, ReceiptDiffersError

if TYPE_CHECKING:
    from fastattr import FastAttributor

app = typer.Typer()
Folder = Annotated[Path, typer.Argument(help="Attributor or run folder.")]
AT_ONCE = 256
"""Pictures that are taken in with one change."""


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
    from fastattr.attributor.catalogue import COLUMNS
    from fastattr.corpus.folders import read_folder
    from fastattr.corpus.images import load_rgb
    from fastattr.corpus.records import TrainingImage

    own = _own(attributor)
    found = list(read_folder(pictures))
    images = [each for each in found if isinstance(each, TrainingImage)]
    if not images:
        raise InputError(f"{pictures} holds no captioned image.")
    known = set(own.catalog["image_id"].to_pylist())  # by an earlier run of this command that was stopped, say
    new = [each for each in images if each.image_id not in known]
    for start in range(0, len(new), AT_ONCE):
        batch = new[start : start + AT_ONCE]
        own.add(
            [load_rgb(each.image) for each in batch],
            [each.captions for each in batch],
            [{"image_id": each.image_id, **{name: getattr(each, name) for name in COLUMNS[2:]}} for each in batch],
            readmit=readmit,
        )
    there, skipped = len(images) - len(new), len(found) - len(images)
    say(f"added {len(new)} images, {there} were there, {skipped} skipped; version {own.versions()['catalog_version']}")


@app.command()
def remove(
    attributor: Folder,
    image_ids: Annotated[list[str], typer.Argument(metavar="IMAGE_ID...")],
    reason: Annotated[str, typer.Option(help="Kept in the journal.")] = "",
) -> None:
    """Take images out of an attributor's catalogue (opt-out)."""
    own = _own(attributor)
    own.remove(image_ids, reason=reason)
    say(f"removed; {len(own)} images are left, version {own.versions()['catalog_version']}")


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
    """Fold all changes into the index.

    It erases the data of removed images.
    """
    own = _own(attributor)
    own.compact()
    say(f"compacted; {len(own)} images, version {own.versions()['catalog_version']}")


@app.command()
def verify(
    receipt: Annotated[Path, typer.Argument(help="Of `fastattr attribute --json`, or statement.json.")],
    model: Annotated[
        str, typer.Option(help="Attributor to hold it against (default: the receipt's; a statement replays with one).")
    ] = "",
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
        wanted = revision or (None if model else claimed["model"].get("revision") or None)
        revised = None if "@" in name and not revision else wanted
        attributor = FastAttributor.from_pretrained(name, revision=revised, thumbnails=False)
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
) -> None:
    """Serve an attributor to machines over HTTP.

    POST an image, get the receipt.
    """
    from fastattr.serving import http

    config = http.ServeConfig(token=os.environ.get("FASTATTR_TOKEN", ""), timeout=timeout)
    http.run(model, host=host, port=port, config=config)
