"""Stages: one command for each stage of the line, one for all of them, and one for what they will cost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fastattr.cli.output import AsJson, show, warn
from fastattr.core.errors import InputError

if TYPE_CHECKING:
    from fastattr.pipeline.config import BuildConfig

app = typer.Typer()
ConfigFile = Annotated[Path, typer.Argument(help="YAML file; see hub_scripts/configs/.")]
RunFolder = Annotated[Path | None, typer.Option("--run", help="Run folder (default: runs/NAME).")]
STAGE_HELP = {
    "train-autoencoder": "Train the generator's autoencoder.",
    "train-generator": "Train the generator: tokenizer, text encoder and U-Net.",
    "train-encoder": "Train the small CLIP that encodes features.",
    "queries": "Generate the images to be attributed.",
    "features": "Encode corpus and queries with the frozen encoders.",
    "candidates": "Choose the training images that a teacher scores.",
    "teach": "Score the candidates by unlearning.\n\nThis is the slow stage; `accelerate launch` splits it.",
    "distill": "Train the student on the teacher's rankings.",
    "calibrate": "Fit percentiles and shares on the validation queries.",
    "card": "Write the attributor's model card and licences.",
    "report": "Write the report, a page with the pictures.",
}


def _opened(config: Path, run_dir: Path | None) -> tuple[BuildConfig, Path]:
    from fastattr.pipeline.config import load_config

    loaded = load_config(config)
    return loaded, run_dir or Path("runs") / loaded.name


def _run_stage(name: str, config: Path, run_dir: Path | None, as_json: bool) -> None:
    from fastattr.pipeline.stages import STAGES

    loaded, folder = _opened(config, run_dir)
    result = STAGES[name](loaded, folder)
    show(result, as_json, f"{name}: done, in {folder}")


@app.command()
def build(
    config: ConfigFile,
    run_dir: RunFolder = None,
    again_from: Annotated[str, typer.Option("--from", metavar="STAGE", help="Build this stage and later ones again.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Go on without asking, however long it will take.")] = False,
    no_plan: Annotated[bool, typer.Option("--no-plan", help="Make no plan, measure nothing, ask nothing.")] = False,
    assets: Annotated[Path | None, typer.Option(help="Pack generator and attributor as an embedded model here, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run all stages of a config, resuming."""
    from fastattr.pipeline import build as line
    from fastattr.pipeline.plan import as_table

    loaded, folder = _opened(config, run_dir)

    def confirm(plan: dict[str, Any]) -> None:
        """Show the plan; ask, if it takes longer than the config's limit and nobody said yes beforehand."""
        warn(as_table(plan))
        here, limit = plan["here"], loaded.plan.confirm_hours
        if yes or ("seconds" in here and here["seconds"]["in all"] <= 3600 * limit):
            return
        known = "seconds" in here
        takes = f"{here['seconds']['in all'] / 3600:,.1f} hours" if known else f"an unknown time ({here['problem']})"
        if sys.stdin.isatty() and typer.confirm(f"This takes {takes} on this machine. Go on?", err=True):
            return
        raise InputError(f"nothing was built: it takes {takes}, and plan.confirm_hours is {limit}. Add --yes to build it.")

    seconds = line.run(loaded, folder, confirm=None if no_plan else confirm, again_from=again_from)
    report = folder / "report" / "index.html"
    warning = line.warning_of(folder)
    result: dict[str, Any] = {"run": str(folder), "seconds": seconds, "report": str(report), "warning": warning}
    if assets:
        result["bytes"] = line.embed_assets(loaded, folder, assets)["bytes"]
    if not as_json and warning:
        warn(f"warning: {warning}")
    done = f"done, in {folder}: {folder / 'attributor'} is ready for FastAttributor.from_pretrained"
    show(result, as_json, f"{done}\nreport: {report}")


@app.command()
def plan(
    config: ConfigFile,
    run_dir: RunFolder = None,
    no_measure: Annotated[bool, typer.Option("--no-measure", help="Do not measure this machine.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what each stage of a config will cost."""
    from fastattr.pipeline import plan as planning

    loaded, folder = _opened(config, run_dir)
    result = planning.plan(loaded, folder, measure=not no_measure)
    show(result, as_json, planning.as_table(result))


@app.command()
def corpus(
    kind: Annotated[Literal["emoji", "folder", "dataset", "coco", "webdataset", "urls"], typer.Argument()],
    places: Annotated[list[str], typer.Argument(metavar="[PATH] OUT", help="What to read (not for emoji); where to write.")],
    shards: Annotated[str, typer.Option(help="Of urls: the folder of tar shards with the images.")] = "",
    duplicates: Annotated[Literal["", "skip", "family", "keep"], typer.Option(help="What becomes of copies.")] = "",
    split: Annotated[str, typer.Option(help="Of a dataset.")] = "train",
    image_column: Annotated[str, typer.Option(help="Of a dataset.")] = "image",
    caption_column: Annotated[str, typer.Option(help="Of a dataset.")] = "caption",
    resolution: Annotated[int, typer.Option(help="Side at which emoji are drawn.")] = 64,
    creator_from_folder: Annotated[bool, typer.Option("--creator-from-folder", help="Folders name creators.")] = False,
    reservations: Annotated[
        Literal["exclude", "list", "ignore"], typer.Option(help="Of images whose creators say no.")
    ] = "exclude",
    opt_out: Annotated[str, typer.Option(help="File of ids, creators, URLs and hashes to leave out.")] = "",
    as_json: AsJson = False,
) -> None:
    """Read training images into a corpus folder."""
    from fastattr.corpus import stage

    if len(places) > 2:
        raise InputError(f"corpus takes one source and one folder to write, got {', '.join(places)}.")
    *path, out = places
    options: dict[str, Any] = {"kind": kind, "path": "".join(path), "shards": shards, "duplicates": duplicates, "split": split}
    options |= {"image_column": image_column, "caption_column": caption_column, "resolution": resolution}
    options |= {"reservations": reservations, "opt_out": opt_out}
    config = stage.CorpusConfig(creator_from_folder=creator_from_folder, **options)
    manifest, listed = stage.run(config, Path(out)), "listed in skipped.parquet"
    skipped = sum(manifest["skipped"].values())
    show(manifest, as_json, f"{manifest['images']} images in {out}, {skipped} skipped ({listed})")


def _stage_command(name: str, text: str) -> None:
    @app.command(name, help=text)
    def run(config: ConfigFile, run_dir: RunFolder = None, as_json: AsJson = False) -> None:
        _run_stage(name, config, run_dir, as_json)


for _name, _text in STAGE_HELP.items():
    _stage_command(_name, _text)


@app.command()
def evaluate(
    config: Annotated[str, typer.Argument(help="YAML file; with --truth an attributor, score table or MODULE:FUNCTION.")],
    run_dir: RunFolder = None,
    truth: Annotated[Path | None, typer.Option(help="Ground truth folder, e.g. benchmarks/truth/emoji-bench.")] = None,
    out: Annotated[Path, typer.Option(help="With --truth: where the results go.")] = Path("evaluation"),
    split: Annotated[str, typer.Option(help="With --truth: test or validation queries.")] = "test",
    as_json: AsJson = False,
) -> None:
    """Compare a student with its teacher, or with truth."""
    if truth is None:
        _run_stage("evaluate", Path(config), run_dir, as_json)
        return
    from fastattr.evaluation.against_truth import run_truth

    result = run_truth(config, truth, out, split=split)
    ceiling = "unknown" if result["noise_ceiling"] is None else f"{result['noise_ceiling']:.3f}"
    lines = [f"{result['n_models']} models, {result['n_queries']} queries, noise ceiling of residual LDS {ceiling}"]
    lines += [f"{'residual LDS':>25s}  {'plain LDS':>25s}  {'s/query':>8s}  method"]
    for name, row in result["methods"].items():
        columns = [f"{row[key]:.3f} [{row[f'{key}_low']:.3f}, {row[f'{key}_high']:.3f}]" for key in ("lds_residual", "lds")]
        seconds = "" if row["seconds_per_query"] is None else f"{row['seconds_per_query']:.4f}"
        lines += [f"{columns[0]:>25s}  {columns[1]:>25s}  {seconds:>8s}  {name}"]
    show(result, as_json, "\n".join([*lines, f"wrote {out / 'metrics.json'} and figures"]))


@app.command()
def index(
    config: Annotated[str, typer.Argument(help="YAML file; with --backend milvus an attributor.")],
    run_dir: RunFolder = None,
    backend: Annotated[Literal["faiss", "milvus"], typer.Option(help="Where the index is to be.")] = "faiss",
    uri: Annotated[str, typer.Option(help="With milvus: http://HOST:PORT, or a file ending in .db.")] = "",
    token: Annotated[str, typer.Option(help="With milvus: 'user:password', or a key.")] = "",
    as_json: AsJson = False,
) -> None:
    """Build the index and the attributor, or fill Milvus."""
    if backend == "faiss":
        _run_stage("index", Path(config), run_dir, as_json)
        return
    from fastattr.attributor.milvus import load

    if not uri:
        raise InputError("give --uri: http://HOST:PORT of a Milvus server, or a file ending in .db.")
    result = load(config, uri, token=token)
    show(result, as_json, f"{result['images']} images in {uri}, version {result['catalog_version']}")
