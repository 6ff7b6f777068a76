"""Ask: draw an image, attribute one or many, describe an attributor, show the page."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fastattr.cli.output import AsJson, on_one_line, say, say_json, show, warn
from fastattr.core.errors import InputError, MissingExtraError
from fastattr.core.models import embedded_models

app = typer.Typer()
Model = Annotated[str, typer.Argument(help="'emoji', an attributor or run folder, or a Hub id.")]
TOP_CREATORS = 5


@app.command()
def demo(
    model: Annotated[str, typer.Argument(help="'emoji', a run folder, an attributor folder or a Hub id.")] = "",
    generator: Annotated[str, typer.Option(help="The generator it belongs to (default: the run's, or the embedded one).")] = "",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 7860,
) -> None:
    """Serve the page on this machine."""
    try:
        from fastattr.space import app as space
    except ImportError as error:
        raise MissingExtraError(f"the page needs gradio ({error}); run: pip install 'fastattr[space]'") from error
    if model and not generator:
        if model not in embedded_models() and not (Path(model) / "generator").is_dir():
            raise InputError(f"{model} holds no generator; name the one that it belongs to with --generator.")
        generator = model
    space.launch(host, port, generator=generator or None, attributor=model or None).block_thread()


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="'emoji', a diffusers or run folder, or a Hub id.")],
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    out: Annotated[Path, typer.Option(help="Where to write it; the suffix says in which format (.png is exact).")],
    seed: Annotated[int, typer.Option(help="Of the starting noise.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps (default: the generator's own).")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale (default: the generator's own).")] = None,
    as_json: AsJson = False,
) -> None:
    """Draw an image from a prompt."""
    from PIL import Image
    from tqdm import tqdm

    from fastattr import Generator
    from fastattr.core.files import atomic_path

    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent} to write {out.name} into.")
    kinds = Image.registered_extensions()
    if kinds.get(out.suffix.lower()) not in Image.SAVE:
        raise InputError(f"{out.name} has no suffix of an image; write .png, .webp or .jpg.")
    loaded = Generator.from_pretrained(model)
    started = time.perf_counter()
    with tqdm(desc="denoise", unit="step", leave=False) as bar:

        def on_step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        image = loaded.generate(prompt, seed=seed, steps=steps, guidance=guidance, on_step=on_step)
    seconds = round(time.perf_counter() - started, 3)
    with atomic_path(out) as temporary:
        image.save(temporary, format=kinds[out.suffix.lower()])
    steps = int(loaded.defaults["steps"] if steps is None else steps)
    guidance = loaded.defaults["guidance"] if guidance is None else guidance
    settings: dict[str, Any] = {"out": str(out), "prompt": prompt, "seed": seed, "steps": steps, "guidance": guidance}
    settings |= {"generator": loaded.fingerprint, "seconds": seconds}
    show(settings, as_json, f"wrote {out} ({steps} steps, guidance {guidance}, seed {seed}, {seconds:.1f} s)")


@app.command()
def attribute(
    model: Model,
    image: Annotated[Path, typer.Option(help="The generated image.")],
    prompt: Annotated[str | None, typer.Option(help="The prompt it was made from (none: by what is seen only).")] = None,
    top_k: Annotated[int, typer.Option(help="How many training images to name.")] = 10,
    figure: Annotated[Path | None, typer.Option(help="Write the results as a picture, too.")] = None,
    where: Annotated[list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="Only such images; repeatable.")] = None,
    since: Annotated[str | None, typer.Option(help="Only images dated so or later, YYYY-MM-DD.")] = None,
    until: Annotated[str | None, typer.Option(help="Only images dated so or earlier.")] = None,
    index_uri: Annotated[str | None, typer.Option(help="Search Milvus at this address, not the own index.")] = None,
    as_json: AsJson = False,
) -> None:
    """Name the training images that influenced an image most."""
    from fastattr import FastAttributor
    from fastattr.attributor.inputs import open_image

    opened = open_image(image)
    started = time.perf_counter()
    attributor = FastAttributor.from_pretrained(model, index_uri=index_uri)
    loaded = time.perf_counter() - started
    result: Any = attributor.attribute(opened, prompt, k=top_k, where=restriction(where or [], since, until))
    result.seconds["load"] = loaded
    if figure:
        result.save(figure)
    for warning in result.warnings:
        warn(f"warning: {on_one_line(warning)}")
    if as_json:
        say_json(json.loads(result.to_json()))
        return
    say(f"{'rank':>4s}  {'score':>6s}  {'image_id':32s}  caption (creator, licence)")
    for row in result.results:
        caption, creator, licence = map(on_one_line, (row.caption, row.creator, row.license))
        say(f"{row.rank + 1:4d}  {row.similarity:6.3f}  {row.image_id:32s}  {caption} ({creator}, {licence})")
    shares = result.shares(by="creator").sort_values("share", ascending=False).head(TOP_CREATORS)
    say(f"{'share':>12s}  creator")
    for creator, share in zip(shares["creator"], shares["share"], strict=True):
        say(f"{share:12.1%}  {on_one_line(creator)}")


def restriction(where: list[str], since: str | None, until: str | None) -> dict[str, str | list[str]] | None:
    """The restriction that the options ask for, as `FastAttributor.attribute` takes it."""
    wanted: dict[str, str | list[str]] = {}
    for text in where:
        column, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"write --where COLUMN=VALUE, not {text!r}.")
        wanted[column] = [*wanted.get(column, []), value]
    wanted |= {name: bound for name, bound in (("since", since), ("until", until)) if bound}
    return wanted or None


@app.command("attribute-many")
def attribute_many(
    model: Model,
    queries: Annotated[Path, typer.Argument(help=".parquet or .jsonl with query_id, prompt, and image or features.")],
    out: Annotated[Path, typer.Argument(help="Folder of the answers.")],
    top_k: Annotated[int, typer.Option(help="Training images named for each query.")] = 100,
    receipts: Annotated[bool, typer.Option("--receipts", help="Write receipts, too, for `fastattr statement`.")] = False,
    as_json: AsJson = False,
) -> None:
    """Attribute a table of queries (`accelerate launch`)."""
    from fastattr.attributor import many

    result = many.run(model, queries, out, k=top_k, receipts=receipts)
    show(result, as_json, f"{result['queries']} queries, in {result['out']}")


@app.command()
def info(model: Model, as_json: AsJson = False) -> None:
    """Describe an attributor: sizes, versions, licences, metrics."""
    from fastattr import read_info
    from fastattr.students.ranking import no_better_than_untuned

    found = read_info(model)
    if warning := no_better_than_untuned(found["metrics"]):
        warn(f"warning: {warning}")
    if as_json:
        say_json(found)
        return
    for key, value in found.items():
        if key != "metrics":
            say(f"{key:10s} {on_one_line(', '.join(map(str, value)) if isinstance(value, list) else value)}")
    for name, values in found["metrics"].get("methods", {}).items():
        figures = (f"{key} {values[key]:.3f} ± {values[key + '_se']:.3f}" for key in ("map", "spearman", "top_k_overlap"))
        say(f"{'metric':10s} {name}: {', '.join(figures)}")
