"""The command line: `fastattr --help` reads like a guide.

Errors that a user can mend end in one line on stderr and exit code 2; `verify` ends with 1 if something differs.
Results go to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattr.core.errors import FastattrError, InputError, MissingExtraError, ReceiptDiffersError, for_terminal

if TYPE_CHECKING:
    from fastattr.attributor.attributor import FastAttributor

GUIDE = """\
fastattr names the training images that influenced a generated image most, and whose they are.

see it:
  fastattr demo                                       the page, on 127.0.0.1:7860, with the embedded emoji models
  fastattr generate emoji --prompt "red heart, openmoji style" --seed 0 --out heart.png
  fastattr attribute emoji --image heart.png --prompt "red heart, openmoji style" --top-k 10
  fastattr info emoji

keep it alive, check what it said, serve it to machines:
  fastattr remove FOLDER IMAGE_ID
  fastattr verify RECEIPT.json
  fastattr serve emoji

publish it, and import what others released:
  fastattr push attributor emoji org/emoji-attributor --dry-run
  fastattr import fastgda --weights dino+clip_text.pth --features data_feats.npy --ids ids.txt OUT

build your own, all at once (resumes where it stands) or stage by stage:
  fastattr build hub_scripts/configs/emoji.yaml
"""

STAGE_HELP = {
    "train-autoencoder": "train the generator's autoencoder",
    "train-generator": "train the generator: tokenizer, text encoder and U-Net",
    "train-encoder": "train the small CLIP that encodes features",
    "queries": "generate the images to be attributed",
    "features": "encode corpus and queries with the frozen encoders",
    "candidates": "choose the training images that the teacher scores for each query",
    "teach": "score the candidates by unlearning (the slow stage; `accelerate launch` splits it)",
    "distill": "train the student on the teacher's rankings",
    "calibrate": "fit percentiles and shares on the validation queries",
    "evaluate": "compare a student with its teacher, or any method with what retraining does",
    "index": "build the FAISS index and put the attributor together",
    "card": "write the attributor's model card and licences",
    "report": "write the report, a page with the pictures",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "httpx2", "open_clip", "root", "faiss", "faiss.loader"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        result = arguments.run(arguments)
    except ReceiptDiffersError as error:
        print(f"fastattr: {for_terminal(error)}", file=sys.stderr)
        return 1
    except FastattrError as error:
        print(f"fastattr: error: {for_terminal(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastattr: stopped; run the same command again to resume.", file=sys.stderr)
        return 130
    if result is not None:
        print(json.dumps(result, indent=2, ensure_ascii=False, default=str))
    return 0


def _parser() -> argparse.ArgumentParser:
    from fastattr.core.version import __version__

    parser = argparse.ArgumentParser(prog="fastattr", description=GUIDE, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"fastattr {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="serve the page on this machine")
    demo.add_argument("--host", default="127.0.0.1")
    demo.add_argument("--port", type=int, default=7860)
    demo.set_defaults(run=_demo)

    generate = commands.add_parser("generate", help="draw an image from a prompt")
    generate.add_argument("model", help="'emoji', a diffusers folder or a Hub id")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--steps", type=int, help="denoising steps (default: the generator's own)")
    generate.add_argument("--guidance", type=float, help="guidance scale (default: the generator's own)")
    generate.add_argument("--out", type=Path, required=True, help="where to write the PNG")
    generate.add_argument("--json", action="store_true", help="print the settings as JSON")
    generate.set_defaults(run=_generate)

    attribute = commands.add_parser("attribute", help="name the training images that influenced an image most")
    attribute.add_argument("model", help="'emoji', an attributor folder or a Hub id")
    attribute.add_argument("--image", type=Path, required=True)
    attribute.add_argument("--prompt", required=True)
    attribute.add_argument("--top-k", type=int, default=10)
    attribute.add_argument("--figure", type=Path, help="write the results as a picture, too")
    attribute.add_argument("--json", action="store_true", help="print everything as JSON")
    attribute.set_defaults(run=_attribute)

    attribute.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE", help="only such images; repeatable")
    attribute.add_argument("--since", help="only images dated so or later, YYYY-MM-DD")
    attribute.add_argument("--until", help="only images dated so or earlier")
    attribute.add_argument("--index-uri", help="search Milvus at this address instead of the attributor's own index")

    _living_parsers(commands)

    info = commands.add_parser("info", help="sizes, versions, licences and metrics of an attributor")
    info.add_argument("model", help="'emoji', an attributor folder or a Hub id")
    info.add_argument("--json", action="store_true")
    info.set_defaults(run=_info)

    build = commands.add_parser("build", help="run all stages of a config, resuming")
    _config_arguments(build)
    build.add_argument("--yes", action="store_true", help="go on without asking, however long it will take")
    build.add_argument("--no-plan", action="store_true", help="make no plan, measure nothing, ask nothing")
    build.add_argument("--assets", type=Path, help="also pack generator and attributor as an embedded model in this folder")
    build.set_defaults(run=_build)

    corpus = commands.add_parser("corpus", help="read training images: emoji, an image folder, or a dataset")
    corpus.add_argument("kind", choices=["emoji", "folder", "dataset", "coco", "webdataset", "urls"])
    corpus.add_argument("path", nargs="?", default="", help="folder, dataset id or data file (not for emoji)")
    corpus.add_argument("out", type=Path)
    corpus.add_argument("--shards", default="", help="of urls: the folder of tar shards with the images")
    corpus.add_argument("--duplicates", default="", choices=["", "skip", "family", "keep"], help="what becomes of copies")
    corpus.add_argument("--split", default="train")
    corpus.add_argument("--image-column", default="image")
    corpus.add_argument("--caption-column", default="caption")
    corpus.add_argument("--resolution", type=int, default=64, help="side at which emoji are drawn")
    corpus.add_argument("--json", action="store_true")
    corpus.set_defaults(run=_corpus)

    plan = commands.add_parser("plan", help="what each stage of a config will cost: evaluations, memory, disk, hours, money")
    _config_arguments(plan)
    plan.add_argument("--no-measure", action="store_true", help="leave out the half minute that measures this machine")
    plan.set_defaults(run=_plan)

    _push_parsers(commands.add_parser("push", help="push score tables, attributor, generator or Space to the Hub"))

    importing = commands.add_parser("import", help="turn what others released into an attributor or a score table")
    importing.add_argument("kind", choices=["fastgda"], help="fastgda: the paper's authors' checkpoint, features and rankings")
    importing.add_argument("--weights", type=Path, help="checkpoint, e.g. dino+clip_text.pth (with --features: an attributor)")
    importing.add_argument("--features", type=Path, help="features of the training images, e.g. data_feats.npy")
    importing.add_argument("--influence", type=Path, action="append", help="influence_SPLIT.pkl: a score table; once a split")
    importing.add_argument("--prompts", type=Path, action="append", default=[], help="a query's prompt a line, as often")
    importing.add_argument(
        "--ids", type=Path, required=True, help="ids of the training images in order: .txt, .json, .npy, .parquet"
    )
    importing.add_argument("out", type=Path, help="folder to write")
    importing.set_defaults(run=_import)

    for name, text in STAGE_HELP.items():
        stage = commands.add_parser(name, help=text)
        _config_arguments(stage)
        stage.set_defaults(run=_stage, stage=name)
        if name == "index":
            stage.add_argument("--backend", choices=["faiss", "milvus"], default="faiss", help="where the index is to be")
            stage.add_argument("--uri", help="with milvus: http://HOST:PORT, or a file ending in .db; CONFIG is an attributor")
            stage.add_argument("--token", help="with milvus: 'user:password', or a key")
            stage.set_defaults(run=_index)
        if name == "evaluate":
            stage.description = (
                "Compare a run's student with its teacher (CONFIG.yaml), or, with --truth, any method with what retraining "
                "without images does: an attributor (folder or Hub id), a score table folder or MODULE:FUNCTION."
            )
            stage.add_argument("--truth", type=Path, help="ground truth folder, e.g. benchmarks/truth/emoji-bench")
            stage.add_argument("--out", type=Path, default=Path("evaluation"), help="with --truth: where the results go")
            stage.add_argument("--split", default="test", help="with --truth: test or validation queries")
            stage.set_defaults(run=_evaluate)
    return parser


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file; see hub_scripts/configs/")
    parser.add_argument("--run", type=Path, dest="run_dir", help="run folder (default: runs/NAME)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _push_parsers(push: argparse.ArgumentParser) -> None:
    kinds = push.add_subparsers(title="what to push", required=True, metavar="WHAT", dest="kind")
    source = "'emoji', a run folder, or the folder itself"
    for kind, text, what in (
        ("attributor", "student, index and catalogue with a model card", source),
        ("generator", "a diffusers pipeline with a model card", source),
        ("scores", "a score table as one configuration of a dataset", "a run folder, or the folder of the table"),
        ("space", "the page, showing models that are on the Hub", ""),
    ):
        parser = kinds.add_parser(kind, help=text)
        if what:
            parser.add_argument("source", help=what)
        parser.add_argument("repo_id", help="org/name")
        if kind in {"attributor", "space"}:
            parser.add_argument("--generator", required=kind == "space", help="Hub id of the generator it belongs to")
            parser.add_argument("--scores", help="Hub id of the score table")
        if kind == "space":
            parser.add_argument("--attributor", required=True, help="Hub id of the attributor")
        if kind == "scores":
            parser.add_argument("--config-name", help="configuration (default: teacher and generator)")
        parser.add_argument("--private", action="store_true", default=None, help="if the repository is new")
        parser.add_argument("--revision", help="branch (default: main)")
        parser.add_argument("--create-pr", action="store_true", help="open a pull request")
        parser.add_argument("--message", help="of the commit")
        parser.add_argument("--tag", default="auto", help="release tag; 'auto' names version and contents, '' makes none")
        parser.add_argument("--dry-run", action="store_true", help="say what would be sent")
        parser.add_argument("--json", action="store_true")
        parser.set_defaults(run=_push)


def _push(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from fastattr.publishing import publish
    from fastattr.publishing.score_tables import push_scores

    names = ("private", "revision", "create_pr", "message", "dry_run")
    options: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    options["tag"] = None if arguments.create_pr else arguments.tag or None
    for name in ("generator", "scores", "attributor", "config_name"):
        if name in vars(arguments):
            options[name] = getattr(arguments, name)
    if arguments.kind == "space":
        push = publish.push_space(arguments.repo_id, **options)
    else:
        folder = publish.part_of(arguments.source, arguments.kind)
        if arguments.kind == "generator":
            options["images"] = publish.training_images(arguments.source)
        send = {"attributor": publish.push_attributor, "generator": publish.push_generator, "scores": push_scores}
        push = send[arguments.kind](folder, arguments.repo_id, **options)
    if arguments.json:
        return vars(push)
    print(push.in_words())
    return None


def _import(arguments: argparse.Namespace) -> None:
    from fastattr.publishing import fastgda

    if arguments.influence and not (arguments.weights or arguments.features):
        manifest = fastgda.import_scores(arguments.influence, arguments.ids, arguments.out, prompts=arguments.prompts)
        print(f"score table of {manifest['queries']} queries in {arguments.out} (licence of the source: {manifest['license']})")
    elif arguments.weights and arguments.features and not arguments.influence:
        fastgda.import_attributor(arguments.weights, arguments.features, arguments.ids, arguments.out)
        print(f"attributor in {arguments.out} (licence of the source: {fastgda.LICENSE})")
    else:
        raise InputError("give --weights and --features for an attributor, or --influence for a score table.")


def _demo(arguments: argparse.Namespace) -> None:
    try:
        from fastattr.space import app
    except ImportError as error:
        raise MissingExtraError(f"the page needs gradio ({error}); run: pip install 'fastattr[space]'") from error
    app.launch(arguments.host, arguments.port).block_thread()


def _generate(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from tqdm import tqdm

    from fastattr.core.files import atomic_path
    from fastattr.generators.generator import Generator

    if not arguments.out.parent.is_dir():
        raise InputError(f"there is no folder {arguments.out.parent} to write {arguments.out.name} into.")
    generator = Generator.from_pretrained(arguments.model)
    started = time.perf_counter()
    with tqdm(desc="denoise", unit="step", leave=False) as bar:

        def on_step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        image = generator.generate(
            arguments.prompt, seed=arguments.seed, steps=arguments.steps, guidance=arguments.guidance, on_step=on_step
        )
    seconds = time.perf_counter() - started
    with atomic_path(arguments.out) as temporary:
        image.save(temporary, format="PNG")
    steps = generator.defaults["steps"] if arguments.steps is None else arguments.steps
    guidance = generator.defaults["guidance"] if arguments.guidance is None else arguments.guidance
    if arguments.json:
        return {
            "out": str(arguments.out),
            "prompt": arguments.prompt,
            "seed": arguments.seed,
            "steps": int(steps),
            "guidance": guidance,
            "generator": generator.fingerprint,
            "seconds": round(seconds, 3),
        }
    print(f"wrote {arguments.out} ({int(steps)} steps, guidance {guidance}, seed {arguments.seed}, {seconds:.1f} s)")
    return None


def _attribute(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from fastattr.attributor.attribution import Attribution
    from fastattr.attributor.attributor import FastAttributor
    from fastattr.attributor.inputs import open_image

    image = open_image(arguments.image)
    started = time.perf_counter()
    attributor = FastAttributor.from_pretrained(arguments.model, index_uri=arguments.index_uri)
    loaded = time.perf_counter() - started
    result = attributor.attribute(image, arguments.prompt, k=arguments.top_k, where=_where(arguments))
    assert isinstance(result, Attribution)
    result.seconds["load"] = loaded
    if arguments.figure:
        from fastattr.core.files import atomic_path

        with atomic_path(arguments.figure) as temporary:
            result.figure().savefig(temporary)
    if arguments.json:
        return result.to_dict()
    for row in result.results:
        print(f"{row.rank + 1:4d}  {row.similarity:6.3f}  {row.image_id:32s}  {row.caption}  ({row.creator}, {row.license})")
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    shares = result.shares(by="creator").sort_values("share", ascending=False).head(5)
    for creator, share in zip(shares["creator"], shares["share"], strict=True):
        print(f"      {share:6.1%}  {creator}")
    return None


def _where(arguments: argparse.Namespace) -> dict[str, str | list[str]] | None:
    """The restriction that the options ask for."""
    where: dict[str, str | list[str]] = {}
    for text in arguments.where:
        column, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"write --where COLUMN=VALUE, not {text!r}.")
        where[column] = [*where.get(column, []), value]
    for bound in ("since", "until"):
        if getattr(arguments, bound):
            where[bound] = getattr(arguments, bound)
    return where or None


def _living_parsers(commands: Any) -> None:
    """Commands that change, check and serve an attributor."""
    add = commands.add_parser("add", help="take images into an attributor's catalogue; nothing is trained")
    add.add_argument("attributor", type=Path, help="attributor folder")
    add.add_argument("pictures", type=Path, help="captioned image folder, as `fastattr corpus folder` reads it")
    add.add_argument("--readmit", action="store_true", help="take images in again that were removed")
    add.set_defaults(run=_add)

    remove = commands.add_parser("remove", help="take images out of an attributor's catalogue (opt-out)")
    remove.add_argument("attributor", type=Path, help="attributor folder")
    remove.add_argument("image_ids", nargs="+", metavar="IMAGE_ID")
    remove.add_argument("--reason", default="", help="kept in the journal")
    remove.set_defaults(run=_remove)

    update = commands.add_parser("update", help="change what the catalogue says of an image")
    update.add_argument("attributor", type=Path, help="attributor folder")
    update.add_argument("image_id")
    update.add_argument("fields", nargs="+", metavar="COLUMN=VALUE")
    update.set_defaults(run=_update)

    compact = commands.add_parser("compact", help="fold all changes into the index; erases the data of removed images")
    compact.add_argument("attributor", type=Path, help="attributor folder")
    compact.set_defaults(run=_compact)

    verify = commands.add_parser("verify", help="replay a receipt, and say what differs")
    verify.add_argument("receipt", type=Path, help="JSON, as `fastattr attribute --json` prints it")
    verify.add_argument("--model", help="attributor to hold it against (default: the one the receipt names)")
    verify.add_argument("--revision", help="its revision on the Hub (default: the receipt's)")
    verify.add_argument("--image", type=Path, help="the query's image, to replay the encoders, too")
    verify.add_argument("--json", action="store_true")
    verify.set_defaults(run=_verify)

    many = commands.add_parser("attribute-many", help="attribute a table of queries; `accelerate launch` divides it")
    many.add_argument("model", help="'emoji', an attributor folder or a Hub id")
    many.add_argument("queries", type=Path, help=".parquet or .jsonl with query_id, prompt, and image or features")
    many.add_argument("out", type=Path, help="folder of the answers")
    many.add_argument("--top-k", type=int, default=100)
    many.add_argument("--json", action="store_true")
    many.set_defaults(run=_attribute_many)

    serve = commands.add_parser("serve", help="serve an attributor to machines over HTTP (POST an image, get the receipt)")
    serve.add_argument("model", help="'emoji', an attributor folder or a Hub id")
    serve.add_argument("--host", default="127.0.0.1", help="others than this machine need FASTATTR_TOKEN to be set")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--timeout", type=float, default=30.0, help="seconds for one request")
    serve.set_defaults(run=_serve)


def _own(folder: Path) -> FastAttributor:
    """The attributor in a folder, to be changed there."""
    from fastattr.attributor.attributor import FastAttributor

    if not (folder / "config.json").exists():
        raise InputError(f"{folder} is no attributor folder; write one with FastAttributor.save_pretrained.")
    return FastAttributor.from_pretrained(folder)


def _add(arguments: argparse.Namespace) -> None:
    from fastattr.attributor.catalogue import COLUMNS
    from fastattr.corpus.store import TrainingImage, load_rgb, read_folder

    attributor = _own(arguments.attributor)
    found = list(read_folder(arguments.pictures))
    images = [each for each in found if isinstance(each, TrainingImage)]
    if not images:
        raise InputError(f"{arguments.pictures} holds no captioned image.")
    for start in range(0, len(images), 256):
        batch = images[start : start + 256]
        attributor.add(
            [load_rgb(each.image) for each in batch],
            [each.captions for each in batch],
            [{"image_id": each.image_id, **{name: getattr(each, name) for name in COLUMNS[2:]}} for each in batch],
            readmit=arguments.readmit,
        )
    print(f"added {len(images)} images, {len(found) - len(images)} skipped; version {attributor.versions()['catalog_version']}")


def _remove(arguments: argparse.Namespace) -> None:
    attributor = _own(arguments.attributor)
    attributor.remove(arguments.image_ids, reason=arguments.reason)
    print(f"removed; {len(attributor)} images are left, version {attributor.versions()['catalog_version']}")


def _update(arguments: argparse.Namespace) -> None:
    if not all("=" in text for text in arguments.fields):
        raise InputError("write COLUMN=VALUE for each thing that changes.")
    attributor = _own(arguments.attributor)
    attributor.update({arguments.image_id: dict(text.split("=", 1) for text in arguments.fields)})
    print(f"updated; version {attributor.versions()['catalog_version']}")


def _compact(arguments: argparse.Namespace) -> None:
    attributor = _own(arguments.attributor)
    attributor.compact()
    print(f"compacted; {len(attributor)} images, version {attributor.versions()['catalog_version']}")


def _verify(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from fastattr.attributor import receipts
    from fastattr.attributor.attributor import FastAttributor

    receipt = receipts.read_receipt(arguments.receipt)
    model = arguments.model or receipt["model"]["name"]
    revision = arguments.revision or (None if arguments.model else receipt["model"].get("revision") or None)
    attributor = FastAttributor.from_pretrained(
        model, revision=None if "@" in model and not arguments.revision else revision, thumbnails=False
    )
    differences = receipts.verify(receipt, attributor, image=arguments.image)
    if arguments.json:
        print(json.dumps({"same": not differences, "differences": differences, "versions": attributor.versions()}, indent=2))
    else:
        print("\n".join(differences) or f"{arguments.receipt} is what {attributor.name} answers.")
    if differences:
        raise ReceiptDiffersError(f"{len(differences)} differences between {arguments.receipt} and {attributor.name}.")
    return None


def _attribute_many(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from fastattr.attributor import many

    result = many.run(arguments.model, arguments.queries, arguments.out, k=arguments.top_k)
    if arguments.json:
        return result
    print(f"{result['queries']} queries, in {result['out']}")
    return None


def _serve(arguments: argparse.Namespace) -> None:
    from fastattr.serving import http as serve

    config = serve.ServeConfig(token=os.environ.get("FASTATTR_TOKEN", ""), timeout=arguments.timeout)
    serve.run(arguments.model, host=arguments.host, port=arguments.port, config=config)


def _index(arguments: argparse.Namespace) -> dict[str, Any] | None:
    if arguments.backend == "faiss":
        return _stage(arguments)
    from fastattr.attributor.milvus import load

    if not arguments.uri:
        raise InputError("give --uri: http://HOST:PORT of a Milvus server, or a file ending in .db.")
    result = load(str(arguments.config), arguments.uri, token=arguments.token or "")
    if arguments.json:
        return result
    print(f"{result['images']} images in {arguments.uri}, version {result['catalog_version']}")
    return None


def _info(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from fastattr.attributor.attributor import read_info

    info = read_info(arguments.model)
    if arguments.json:
        return info
    for key, value in info.items():
        if key != "metrics":
            print(f"{key:10s} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    for name, values in info["metrics"].get("methods", {}).items():
        figures = ", ".join(
            f"{key} {values[key]:.3f} ± {values[key + '_se']:.3f}" for key in ("map", "spearman", "top_k_overlap")
        )
        print(f"{'metric':10s} {name}: {figures}")
    return None


def _corpus(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from fastattr.corpus import store as corpus

    config = corpus.CorpusConfig(
        kind=arguments.kind,
        path=arguments.path,
        split=arguments.split,
        image_column=arguments.image_column,
        caption_column=arguments.caption_column,
        resolution=arguments.resolution,
        shards=arguments.shards,
        duplicates=arguments.duplicates,
    )
    manifest = corpus.run(config, arguments.out)
    if arguments.json:
        return manifest
    skipped = sum(manifest["skipped"].values())
    print(f"{manifest['images']} images in {arguments.out}, {skipped} skipped (listed in skipped.parquet)")
    return None


def _stage(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from fastattr.pipeline.build import STAGES
    from fastattr.pipeline.config import load_config

    config = load_config(arguments.config)
    run_dir = arguments.run_dir or Path("runs") / config.name
    result = STAGES[arguments.stage](config, run_dir)
    if arguments.json:
        return result
    print(f"{arguments.stage}: done, in {run_dir}")
    return None


def _plan(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from fastattr.pipeline.config import load_config
    from fastattr.pipeline.plan import as_table, plan

    config = load_config(arguments.config)
    run_dir = arguments.run_dir or Path("runs") / config.name
    result = plan(config, run_dir, measure=not arguments.no_measure)
    if arguments.json:
        return result
    print(as_table(result))
    return None


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any] | None:
    if arguments.truth is None:
        return _stage(arguments)
    from fastattr.evaluation.against_truth import run_truth

    result = run_truth(str(arguments.config), arguments.truth, arguments.out, split=arguments.split)
    if arguments.json:
        return result
    ceiling = "unknown" if result["noise_ceiling"] is None else f"{result['noise_ceiling']:.3f}"
    print(f"{result['n_models']} models, {result['n_queries']} queries, noise ceiling of residual LDS {ceiling}")
    print(f"{'residual LDS':>25s}  {'plain LDS':>25s}  {'s/query':>8s}  method")
    for name, row in result["methods"].items():
        columns = [f"{row[key]:.3f} [{row[f'{key}_low']:.3f}, {row[f'{key}_high']:.3f}]" for key in ("lds_residual", "lds")]
        seconds = "" if row["seconds_per_query"] is None else f"{row['seconds_per_query']:.4f}"
        print(f"{columns[0]:>25s}  {columns[1]:>25s}  {seconds:>8s}  {name}")
    print(f"wrote {arguments.out / 'metrics.json'} and figures")
    return None


def _build(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from fastattr.pipeline import build
    from fastattr.pipeline.config import load_config
    from fastattr.pipeline.plan import as_table

    config = load_config(arguments.config)
    run_dir = arguments.run_dir or Path("runs") / config.name

    def confirm(plan: dict[str, Any]) -> None:
        """Show the plan; ask, if it takes longer than the config's limit and nobody said yes beforehand."""
        print(as_table(plan), file=sys.stderr)
        here, limit = plan["here"], config.plan.confirm_hours
        if arguments.yes or ("seconds" in here and here["seconds"]["in all"] <= 3600 * limit):
            return
        takes = (
            f"{here['seconds']['in all'] / 3600:,.1f} hours" if "seconds" in here else f"an unknown time ({here['problem']})"
        )
        if sys.stdin.isatty():
            print(f"This takes {takes} on this machine. Go on? [y/N] ", end="", file=sys.stderr, flush=True)
            if sys.stdin.readline().strip().lower() in {"y", "yes"}:
                return
        raise InputError(f"nothing was built: it takes {takes}, and plan.confirm_hours is {limit}. Add --yes to build it.")

    seconds = build.run(config, run_dir, confirm=None if arguments.no_plan else confirm)
    result: dict[str, Any] = {"run": str(run_dir), "seconds": seconds, "report": str(run_dir / "report" / "index.html")}
    if arguments.assets:
        result["bytes"] = build.embed_assets(config, run_dir, arguments.assets)["bytes"]
    if arguments.json:
        return result
    print(f"done, in {run_dir}: {run_dir / 'attributor'} is ready for FastAttributor.from_pretrained")
    print(f"report: {run_dir / 'report' / 'index.html'}")
    return None


if __name__ == "__main__":
    sys.exit(main())
