"""Living: commands that change, check and serve an attributor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastattr.cli.output import AsJson, say, say_json
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
    """Fold all changes into the index.

    It erases the data of removed images.
    """
    own = _own(attributor)
    own.compact()
    say(f"compacted; {len(own)} images, version {own.versions()['catalog_version']}")


@app.command()
def verify(
    receipt: Annotated[Path, typer.Argument(help="JSON, as `fastattr attribute --json` prints it.")],
    model: Annotated[str, typer.Option(help="Attributor to hold it against (default: the one the receipt names).")] = "",
    revision: Annotated[str, typer.Option(help="Its revision on the Hub (default: the receipt's).")] = "",
    image: Annotated[Path | None, typer.Option(help="The query's image, to replay the encoders, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Replay a receipt, and say what differs."""
    from fastattr import FastAttributor
    from fastattr.attributor import receipts

    claimed = receipts.read_receipt(receipt)
    name = model or claimed["model"]["name"]
    wanted = revision or (None if model else claimed["model"].get("revision") or None)
    attributor = FastAttributor.from_pretrained(
        name, revision=None if "@" in name and not revision else wanted, thumbnails=False
    )
    differences = receipts.verify(claimed, attributor, image=image)
    if as_json:
        say_json({"same": not differences, "differences": differences, "versions": attributor.versions()})
    else:
        say("\n".join(differences) or f"{receipt} is what {attributor.name} answers.")
    if differences:
        raise ReceiptDiffersError(f"{len(differences)} differences between {receipt} and {attributor.name}.")


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="'emoji', an attributor or run folder, or a Hub id.")],
    host: Annotated[str, typer.Option(help="Others than this machine need FASTATTR_TOKEN to be set.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 30.0,
    opt_out: Annotated[Path | None, typer.Option(help="Remove what this opt-out list names, first.")] = None,
) -> None:
    """Serve an attributor to machines over HTTP.

    POST an image, get the receipt.
    """
    from fastattr.serving import http

    config = http.ServeConfig(token=os.environ.get("FASTATTR_TOKEN", ""), timeout=timeout)
    http.run(model, host=host, port=port, config=config, opt_out=opt_out)
