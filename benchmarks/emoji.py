"""Benchmark of the embedded emoji models: what is drawn, what is attributed, how fast, how large.

    python benchmarks/emoji.py --json FILE [--quick] [--run runs/emoji] [--contact-sheet FILE.png]

Models come from the installed package alone. Real images come from RUN/corpus, or, if there is none, from a corpus that
is built into a temporary folder (about a minute; needs npm). A drawn image is right in style or subgroup if
benchmarks/judge/ says so: a classifier of the real images, used for nothing else. Seen prompts are captions that the
generator was trained on; recombined ones ask for a subject in the style of a set that has no such subject, drawn evenly
from the half of all there are that refinement (refinement.py) leaves alone; recombined_known_kind takes
those alone whose kind (subgroup) the set draws.
Everything random follows --seed. Accuracies carry a standard error (_se) and a sample size (_n).
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

import judge as judging
import machine
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fastattr import FastattrError, FastAttributor, Generator, InputError
from fastattr.core import captions as captions_of
from fastattr.core.models import ASSETS
from fastattr.core.stages import MANIFEST, require_same
from fastattr.corpus import stage as corpora
from fastattr.corpus.stage import CorpusConfig
from fastattr.corpus.store import Corpus
from fastattr.generators.scratch import refinement as refine_generator
from fastattr.generators.scratch.autoencoder import AutoencoderConfig, held_out, pixel_tensor, psnr

MODEL = "emoji"
KEYS = (
    "style_accuracy_seen",
    "style_accuracy_recombined",
    "subgroup_accuracy_seen",
    "subgroup_accuracy_real",
    "autoencoder_psnr",
    "prompt_to_attributed_seconds",
    "attribute_seconds",
    "planted_copy_first",
    "map_1pct_student",
    "map_1pct_untuned",
    "map_1pct_gain_low",
    "assets_mb",
)
"""What the benchmark promises to report; it adds standard errors, sample sizes and how it was run."""
BATCH = 20
"""Images drawn at a time, where speed is not what is measured."""
TOP_K = 20
"""Training images asked for where the time is measured, as on the page."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured."""

    seen: int = 400
    """Prompts that the generator was trained on."""
    recombined: int = 200
    """Prompts whose subject the named set does not have."""
    planted: int = 200
    """Training images given back as queries."""
    timed_prompts: int = 7
    """New prompts drawn and attributed one by one."""
    timed_images: int = 25
    """Given images attributed one by one."""


QUICK = Sizes(seen=100, recombined=50, planted=50, timed_prompts=3, timed_images=10)


def choose_seen(captions: Sequence[str], count: int, *, seed: int) -> np.ndarray:
    """(count,) rows with distinct captions, uniformly without replacement.

    Raises:
        InputError: there are fewer distinct captions.
    """
    _, rows = np.unique(np.array(captions), return_index=True)
    if count > len(rows):
        raise InputError(f"the corpus has {len(rows)} distinct captions, {count} were asked for.")
    return np.random.default_rng([seed, 0]).choice(rows, count, replace=False)


def choose_recombined(
    captions: Sequence[str], count: int, *, seed: int, kinds: Sequence[str] | None = None
) -> list[tuple[int, str]]:
    """(row, set) pairs: the set has no subject of that row's name, and the generator was not refined on it; uniform.

    Args:
        captions: (N,) 'SUBJECT, SET style'.
        count: how many at most; all of them if there are fewer.
        seed: of the choice.
        kinds: (N,) the subjects' kinds; given, only pairs count where the set has a subject of that kind, '' not being one.

    Returns:
        The row is that of the subject's first caption.
    """
    drawn = {(kind, split_caption(caption)[1]) for kind, caption in zip(kinds or (), captions, strict=False) if kind}
    absent = [(row, style.removesuffix(" style")) for row, style in captions_of.recombinations(captions)]
    absent = [(row, style) for row, style in absent if not refine_generator.is_refined_on(recombine(captions[row], style))]
    if kinds is not None:
        absent = [(row, style) for row, style in absent if (kinds[row], style) in drawn]
    order = np.random.default_rng([seed, 1]).permutation(len(absent))[:count]
    return [absent[index] for index in order]


def recombine(caption: str, style: str) -> str:
    """'red heart, openmoji style', 'noto' -> 'red heart, noto style'."""
    return f"{split_caption(caption)[0]}, {style} style"


def split_caption(caption: str) -> tuple[str, str]:
    """'red heart, openmoji style' -> ('red heart', 'openmoji')."""
    subject, style = captions_of.split_caption(caption)
    return subject, style.removesuffix(" style")


def draw(
    generator: Generator, prompts: Sequence[str], *, first_seed: int, what: str, guidance: float | None = None
) -> list[Image.Image]:
    """One image a prompt, with the generator's own steps and, if None is given, guidance; seeds count up from `first_seed`."""
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), BATCH), desc=f"draw {what}", unit="batch"):
        batch = prompts[start : start + BATCH]
        seeds = range(first_seed + start, first_seed + start + len(batch))
        images += generator.generate_batch(batch, seeds=list(seeds), guidance=guidance)
    return images


def stacked(images: Sequence[Image.Image], side: int) -> np.ndarray:
    """(N, side, side, 3) uint8 of RGB images."""
    sized = [image if image.size == (side, side) else image.resize((side, side)) for image in images]
    return np.stack([np.asarray(image.convert("RGB")) for image in sized])


def contact_sheet(images: Sequence[Image.Image], *, columns: int = 8, side: int = 64, border: int = 2) -> Image.Image:
    """The images in rows of `columns`, each `side` pixels wide, a grey line around each."""
    rows = -(-len(images) // columns)
    step = side + border
    sheet = Image.new("RGB", (columns * step + border, rows * step + border), (221, 221, 221))
    for position, image in enumerate(images):
        row, column = divmod(position, columns)
        sheet.paste(image.resize((side, side)), (border + column * step, border + row * step))
    return sheet


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


def measure(
    generator: Generator,
    attributor: FastAttributor,
    corpus: Corpus,
    judge: judging.Judge,
    judge_config: dict[str, Any],
    sizes: Sizes,
    seed: int,
) -> tuple[dict[str, float | int], list[Image.Image]]:
    """All numbers that need a model, and the images of the seen prompts in their order."""
    agreement = teacher_agreement(attributor.info()["metrics"])  # first, as it may refuse
    side = judge_config["config"]["resolution"]
    captions = [of_image[0] for of_image in corpus.captions]
    styles, subgroups = np.array(corpus.column("source")), np.array(corpus.column("subgroup"))

    def accuracies(images: Sequence[Image.Image], styles: Any, subgroups: Any, suffix: str) -> dict[str, float | int]:
        return judging.accuracies(judge, stacked(images, side), styles, subgroups, suffix)

    def real(rows: Sequence[int] | np.ndarray) -> list[Image.Image]:
        return [corpus.image(int(row)) for row in rows]

    seen = choose_seen(captions, sizes.seen, seed=seed)
    drawn = draw(generator, [captions[row] for row in seen], first_seed=seed * 1_000_000, what="seen prompts")
    recombined = choose_recombined(captions, sizes.recombined, seed=seed)
    if len(recombined) < sizes.recombined:
        print(f"only {len(recombined)} recombined prompts: the corpus has no more", file=sys.stderr)
    of_known_kind = choose_recombined(captions, sizes.recombined, seed=seed, kinds=subgroups.tolist())

    def redraw(pairs: Sequence[tuple[int, str]], what: str) -> list[Image.Image]:
        prompts = [recombine(captions[row], style) for row, style in pairs]
        return draw(generator, prompts, first_seed=seed * 1_000_000 + 500_000, what=what)

    def of_pairs(images: Sequence[Image.Image], pairs: Sequence[tuple[int, str]], suffix: str) -> dict[str, float | int]:
        return accuracies(images, [style for _, style in pairs], [subgroups[row] for row, _ in pairs], suffix)

    unseen = np.flatnonzero(judging.held_out_rows(corpus, judge_config["config"]["held_out_share"]))
    results = {
        **accuracies(drawn, styles[seen], subgroups[seen], "seen"),
        **of_pairs(redraw(recombined, "recombined prompts"), recombined, "recombined"),
        **of_pairs(redraw(of_known_kind, "prompts of known kinds"), of_known_kind, "recombined_known_kind"),
        **accuracies(real(seen), styles[seen], subgroups[seen], "real"),
        **accuracies(real(unseen), styles[unseen], subgroups[unseen], "real_held_out"),
    }
    share = AutoencoderConfig().held_out_share
    untrained = np.flatnonzero(held_out(judging.families(corpus), share))
    quality = reconstruction_psnr(generator, stacked(real(untrained), generator.image_size))
    results |= {
        "autoencoder_psnr": float(quality.mean()),
        "autoencoder_psnr_se": float(quality.std() / len(quality) ** 0.5),
        "autoencoder_psnr_n": len(quality),
    }
    pairs = choose_recombined(captions, sizes.timed_prompts + 1, seed=seed + 1)
    new = [recombine(captions[row], style) for row, style in pairs]
    given = list(zip(drawn, [captions[row] for row in seen], strict=True))[: sizes.timed_images]
    results |= time_models(generator, attributor, new, given, seed)
    planted = np.random.default_rng([seed, 2]).choice(len(corpus), sizes.planted, replace=False)
    return {**results, **planted_copies(attributor, corpus, planted.tolist()), **agreement}, drawn


@contextlib.contextmanager
def open_corpus(run_dir: Path) -> Iterator[Corpus]:
    """The corpus of a run folder, or one that is built for the moment."""
    if (run_dir / "corpus" / MANIFEST).exists():
        yield Corpus(run_dir / "corpus")
        return
    print(f"{run_dir} holds no corpus; building it in a temporary folder", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        corpora.run(CorpusConfig(), Path(scratch) / "corpus")
        yield Corpus(Path(scratch) / "corpus")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description="Measure the embedded emoji models.")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    parser.add_argument("--quick", action="store_true", help="fewer prompts: under 2 minutes on 2 cores")
    parser.add_argument("--run", type=Path, default=Path("runs/emoji"), help="run folder with the corpus (%(default)s)")
    parser.add_argument("--contact-sheet", type=Path, help="write 64 uncurated samples to this PNG")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and drawings (%(default)s)")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    sizes = QUICK if options.quick else Sizes()
    judge, judge_config = judging.load()
    generator, attributor = Generator.from_pretrained(MODEL), FastAttributor.from_pretrained(MODEL)
    with open_corpus(options.run) as corpus:
        for what, config in (("the judge", judge_config), ("the attributor", attributor.config)):
            require_same(
                f"the corpus of {what}", config["corpus_fingerprint"], corpus.fingerprint, "Build both from one corpus."
            )
        results, drawn = measure(generator, attributor, corpus, judge, judge_config, sizes, options.seed)
    if options.contact_sheet:
        contact_sheet(drawn[:64]).save(options.contact_sheet)
    settings = {"seed": options.seed, "quick": options.quick, **generator.defaults}
    results |= {"assets_mb": megabytes(ASSETS / MODEL), **settings, **machine.describe()}
    machine.report({**results, "benchmark_seconds": round(time.perf_counter() - start, 1)}, options.json)


if __name__ == "__main__":
    try:
        main()
    except FastattrError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
