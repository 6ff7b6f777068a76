"""Benchmark of the embedded emoji models: what is drawn, what is attributed, how fast, how large.

    python benchmarks/emoji.py --json FILE [--quick] [--part generator|attributor] [--run runs/emoji] [--contact-sheet FILE.png]
        [--generator runs/emoji/generator] [--guidance 3] [--steps 25]

Models come from the installed package, unless --generator names another one. The part `generator` (drawings.py) says what is
drawn; `attributor` how well the student follows its teacher, how fast an answer comes and whether a training image finds
itself. Real images come from RUN/corpus if it is the corpus of the judge (one picture per subject and set; every generator so
far has seen all) or of the attributor, else from one that is built into a temporary folder (about a minute; needs npm).
Everything random follows --seed. Accuracies carry a standard error (_se) and a sample size (_n). With --part, the other part's
numbers in FILE stay.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import drawings
import judge as judging
import machine
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fastattr import FastattrError, FastAttributor, Generator, InputError
from fastattr.core.captions import recombine
from fastattr.core.files import read_json
from fastattr.core.models import ASSETS
from fastattr.core.stages import MANIFEST, require_same
from fastattr.corpus import stage as corpora
from fastattr.corpus.stage import CorpusConfig
from fastattr.corpus.store import Corpus
from fastattr.generators.scratch.autoencoder import AutoencoderConfig, held_out, pixel_tensor, psnr

MODEL = "emoji"
PART_KEYS = {
    "generator": (
        "recall1_seen",
        "recall5_seen",
        "subject1_seen",
        "style_accuracy_seen",
        "psnr_seen",
        "style_accuracy_recombined",
        "both_right_recombined",
        "both_right_real_held_out",
        "both_right_real_known_once",
        "near_copies_recombined",
        "subject_right_free",
        "autoencoder_psnr",
        "corpus_images",
        "generator_examples",
    ),
    "attributor": (
        "prompt_to_attributed_seconds",
        "attribute_seconds",
        "planted_copy_first",
        "map_1pct_student",
        "map_1pct_untuned",
        "map_1pct_gain_low",
        "assets_mb",
    ),
}
"""What each part promises to report; it adds standard errors, sample sizes and how it was run."""
KEYS = tuple(key for keys in PART_KEYS.values() for key in keys)
BATCH = drawings.BATCH
TOP_K = 20
"""Training images asked for where the time is measured, as on the page."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured."""

    seen: int = 400
    """Prompts that the generator was trained on."""
    recombined: int = 200
    """Prompts whose subject the named set does not have, though it has others of its kind."""
    planted: int = 200
    """Training images given back as queries."""
    timed_prompts: int = 7
    """New prompts drawn and attributed one by one."""
    timed_images: int = 25
    """Given images attributed one by one."""


QUICK = Sizes(seen=100, recombined=50, planted=50, timed_prompts=3, timed_images=10)


def contact_sheet(images: Sequence[Image.Image], *, columns: int = 8, side: int = 88, margin: int = 6) -> Image.Image:
    """The images in rows of `columns`, each `side` pixels wide, on white."""
    rows = -(-len(images) // columns)
    step = side + 2 * margin
    sheet = Image.new("RGB", (columns * step, rows * step), "white")
    for position, image in enumerate(images):
        row, column = divmod(position, columns)
        sized = image.resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(sized, (margin + column * step, margin + row * step))
    return sheet


def sheet_prompts(prompts: Sequence[str], *, columns: int = 8) -> str:
    """A Markdown page with the prompts of a contact sheet, laid out as the images are."""
    rows = [prompts[start : start + columns] for start in range(0, len(prompts), columns)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * columns)
    return "# Prompts of the contact sheet\n\nAs the pictures are laid out, row by row.\n\n" + "\n".join(lines) + "\n"


@torch.inference_mode()
def reconstruction_psnr(generator: Generator, images: np.ndarray) -> np.ndarray:
    """(N,) PSNR in dB of (N, H, W, 3) uint8 images through the generator's autoencoder."""
    vae = generator.pipeline.vae
    values = []
    for start in range(0, len(images), BATCH):
        batch = pixel_tensor(images[start : start + BATCH]).to(vae.device, vae.dtype)
        values.append(psnr(batch, vae(batch).sample).float().cpu().numpy())
    return np.concatenate(values)


def seconds(name: str, calls: Sequence[Callable[[], object]]) -> dict[str, float | int]:
    """Median, slowest and number of the timed calls."""
    times = []
    for call in calls:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return {name: float(np.median(times)), f"{name}_max": max(times), f"{name}_n": len(times)}


def time_models(
    generator: Generator,
    attributor: FastAttributor,
    prompts: Sequence[str],
    given: Sequence[tuple[Image.Image, str]],
    seed: int,
) -> dict[str, float | int]:
    """How long a new prompt takes until all that its page shows is there, and how long a given image; models loaded."""

    def page(prompt: str) -> None:
        result = attributor.attribute(generator.generate(prompt, seed=seed), prompt, k=TOP_K)
        for row in result.results:
            result.thumbnail(row.image_id)

    page(prompts[0])  # not counted: first calls allocate
    return {
        **seconds("prompt_to_attributed_seconds", [partial(page, prompt) for prompt in prompts[1:]]),
        **seconds("attribute_seconds", [partial(attributor.attribute, image, text, k=TOP_K) for image, text in given]),
    }


def planted_copies(attributor: FastAttributor, corpus: Corpus, rows: Sequence[int]) -> dict[str, float | int]:
    """Share of training images which, given back with their own caption, are named first themselves."""
    first = []
    for row in tqdm(rows, desc="planted copies", unit="image"):
        result = attributor.attribute(corpus.image(row), corpus.captions[row][0], k=1)
        first.append(result.results[0].image_id == corpus.image_ids[row])
    return machine.share("planted_copy_first", np.array(first))


def teacher_agreement(metrics: dict[str, Any]) -> dict[str, float | int]:
    """What the attributor's metrics.json says about following the teacher.

    Raises:
        InputError: it was not evaluated, or not at 1% of the corpus.
    """
    if not metrics or metrics["positives"] != max(1, round(metrics["corpus_images"] / 100)):
        raise InputError("the attributor has no metrics at 1% of the corpus; evaluate it and build its artifacts again.")
    found = {"map_1pct_n": metrics["queries"]}
    for method in ("student", "untuned"):
        found[f"map_1pct_{method}"] = metrics["methods"][method]["map"]
        found[f"map_1pct_{method}_se"] = metrics["methods"][method]["map_se"]
    return found | {f"map_1pct_gain_{name}": metrics["map_gain"][name] for name in ("mean", "low", "high")}


def megabytes(folder: Path) -> float:
    """10^6 bytes of all files in `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def measure_generator(
    generator: Generator,
    corpus: Corpus,
    judge: judging.Judge,
    facts: dict[str, Any],
    sizes: Sizes,
    seed: int,
    settings: dict[str, float | None],
) -> tuple[dict[str, float | int], list[Image.Image]]:
    """The numbers of the part `generator`, and the images of the seen prompts in their order; see `drawings.measure`."""
    figures, drawn = drawings.measure(
        generator, corpus, judge, facts, seen=sizes.seen, recombined=sizes.recombined, seed=seed, settings=settings
    )
    families = [family or image_id for family, image_id in zip(corpus.column("family"), corpus.image_ids, strict=True)]
    untrained = np.flatnonzero(held_out(families, AutoencoderConfig().held_out_share))
    real = drawings.stacked([corpus.image(int(row)) for row in untrained], generator.image_size)
    quality = reconstruction_psnr(generator, real)
    training = generator.manifest["config"]["training"]
    return {
        **figures,
        "autoencoder_psnr": float(quality.mean()),
        "autoencoder_psnr_se": float(quality.std() / len(quality) ** 0.5),
        "autoencoder_psnr_n": len(quality),
        "generator_examples": training["steps"] * training["batch_size"],
    }, drawn


def measure_attributor(
    generator: Generator, attributor: FastAttributor, corpus: Corpus, sizes: Sizes, seed: int
) -> dict[str, float | int]:
    """The numbers of the part `attributor`."""
    agreement = teacher_agreement(attributor.info()["metrics"])  # first, as it may refuse
    captions = [of_image[0] for of_image in corpus.captions]
    pairs = drawings.choose_recombined(captions, drawings.kinds_of(corpus), sizes.timed_prompts + 1, seed=seed + 1)
    new = [recombine(captions[row], style) for row, style in pairs]
    rows = drawings.choose_seen(captions, sizes.timed_images, seed=seed)
    given = [(corpus.image(int(row)), captions[row]) for row in rows]
    planted = np.random.default_rng([seed, 2]).choice(len(corpus), sizes.planted, replace=False)
    return {
        **time_models(generator, attributor, new, given, seed),
        **planted_copies(attributor, corpus, planted.tolist()),
        **agreement,
        "assets_mb": megabytes(ASSETS / MODEL),
    }


@contextlib.contextmanager
def open_corpus(run_dir: Path, fingerprint: str) -> Iterator[Corpus]:
    """The corpus with this fingerprint: that of a run folder, or one that is built for the moment.

    Raises:
        ArtifactMismatchError: neither form of the emoji corpus has it.
    """
    if (run_dir / "corpus" / MANIFEST).exists() and (corpus := Corpus(run_dir / "corpus")).fingerprint == fingerprint:
        yield corpus
        return
    print(f"{run_dir} does not hold corpus {fingerprint}; building it in a temporary folder", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        for variants in (False, True):
            corpora.run(CorpusConfig(variants=variants), Path(scratch) / str(variants))
            corpus = Corpus(Path(scratch) / str(variants))
            if corpus.fingerprint == fingerprint:
                yield corpus
                return
    require_same("the corpus of the embedded model", fingerprint, corpus.fingerprint, "Install the pinned resvg and Pillow.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description="Measure the embedded emoji models.")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    parser.add_argument("--quick", action="store_true", help="fewer prompts: under 2 minutes on 2 cores")
    parser.add_argument("--generator", default=MODEL, help="name or folder of the generator (%(default)s, the embedded one)")
    parser.add_argument("--guidance", type=float, help="guidance scale of all drawings (the generator's own)")
    parser.add_argument("--steps", type=int, help="sampling steps of all drawings (the generator's own)")
    parser.add_argument("--part", choices=list(PART_KEYS), help="measure this part alone")
    parser.add_argument("--run", type=Path, default=Path("runs/emoji"), help="run folder with the corpus (%(default)s)")
    parser.add_argument("--contact-sheet", type=Path, help="write the first 64 drawings to this PNG, their prompts beside it")
    parser.add_argument("--judge", type=Path, default=judging.JUDGE, help="folder of the judge (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and drawings (%(default)s)")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    sizes = QUICK if options.quick else Sizes()
    generator = Generator.from_pretrained(options.generator)
    settings = {"guidance": options.guidance, "steps": options.steps}
    before: dict[str, Any] = read_json(options.json) if options.part and options.json and options.json.exists() else {}
    others = tuple(key for part, keys in PART_KEYS.items() if part != options.part for key in keys)
    results = {name: value for name, value in before.items() if name.startswith(others)}
    if options.part != "attributor":
        judge, facts = judging.load(options.judge)
        with open_corpus(options.run, facts["corpus_fingerprint"]) as corpus:
            figures, drawn = measure_generator(generator, corpus, judge, facts, sizes, options.seed, settings)
        results |= figures
        if options.contact_sheet:
            captions = [of_image[0] for of_image in corpus.captions]
            asked = [captions[row] for row in drawings.choose_seen(captions, sizes.seen, seed=options.seed)[:64]]
            contact_sheet(drawn[:64]).save(options.contact_sheet, optimize=True)
            options.contact_sheet.with_suffix(".md").write_text(sheet_prompts(asked), encoding="utf-8")
    if options.part != "generator":
        attributor = FastAttributor.from_pretrained(MODEL)
        with open_corpus(options.run, attributor.config["corpus_fingerprint"]) as corpus:
            results |= measure_attributor(generator, attributor, corpus, sizes, options.seed)
    given = {name: value for name, value in settings.items() if value is not None}
    results |= {"seed": options.seed, "quick": options.quick, **generator.defaults, **given, **machine.describe()}
    machine.report({**results, "benchmark_seconds": round(time.perf_counter() - start, 1)}, options.json)


if __name__ == "__main__":
    try:
        main()
    except FastattrError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
