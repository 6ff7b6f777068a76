"""Benchmark of gradients: how many images a second, how many numbers an image must be kept of, how soon a query is scored.

    python benchmarks/gradients.py --json FILE [--quick] [--emoji runs/emoji] [--run runs/bench] [--corpus FOLDER]

Speed and the time of a new query are measured on the embedded generator, all layers, the curve of compression on emoji-bench,
whose whole gradients fit into memory. Speed is images a second of processor time; 'before' is the loop below, which rotates
every draw's gradient on its own, 'after' sums draws first. Agreement is that of first-order scores with those of whole
gradients: Spearman's correlation over the images and the shared part of the first 1%, means over queries with 95% bootstrap
intervals; `coordinates_spearman` is that of the teacher's default.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lab
import machine
import numpy as np
import torch
from emoji import open_corpus
from scipy.stats import spearmanr

from fastattr.core.files import read_json
from fastattr.core.models import ASSETS
from fastattr.core.settings import read_yaml
from fastattr.core.stages import MANIFEST
from fastattr.corpus.store import Corpus
from fastattr.evaluation.lds import interval
from fastattr.evaluation.subsets import RetrainConfig
from fastattr.generators.families import Layer
from fastattr.generators.generator import Generator
from fastattr.gradients.compression import Compression, GradientConfig, gradient_features, leading_coordinates
from fastattr.gradients.ekfac import Factors, example_gradients, fit_ekfac, record_layers
from fastattr.gradients.losses import EncodedImages, denoising_losses
from fastattr.teachers.config import TeacherConfig
from fastattr.teachers.fitted import FittedTeacher, Member, features_of
from fastattr.teachers.task import factor_batches, layers_to_unlearn

BLOCK = 200_000
"""Numbers of each gradient that are in single precision at once."""
KEPT = (1024, 4096, 16_384, 65_536, 262_144)
"""Numbers an image in half precision; int8 keeps twice as many in the same bytes."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured."""

    factor_examples: int = 1024
    draws: int = 16
    """Of an image, where speed is measured."""
    before: int = 2
    after: int = 16
    """Images that each way is timed on."""
    width: int = 4096
    """Numbers kept of an image, where speed and the time of a query are measured."""
    corpus_images: int = 30_702
    """Rows of the store against which a new query is timed: as many as the emoji corpus has images."""
    curve_images: int = 252
    curve_queries: int = 26
    curve_draws: int = 32
    query_draws: int = 64
    timed_queries: int = 7


QUICK = Sizes(factor_examples=128, draws=8, before=1, after=4, width=1024, corpus_images=2000, timed_queries=3)
QUICK = replace(QUICK, curve_images=48, curve_queries=6, curve_draws=4, query_draws=8)


def draw_by_draw(embedded: Embedded, rows: np.ndarray, coordinates: np.ndarray, config: GradientConfig) -> np.ndarray:
    """(C, k) gradient features as they were computed before: every draw's gradient whole, rotated and scaled on its own."""
    features, layers, factors = torch.zeros(len(rows), len(coordinates)), embedded.layers, embedded.factors
    turned = {}
    for name in layers:
        vectors = (factors.gradient_eigenvectors[name], factors.activation_eigenvectors[name])
        turned[name] = [each.float() for each in (*vectors, factors.damped(name, config.damping).rsqrt())]
    with record_layers(layers) as recorded:
        for layer in layers.values():
            layer.weight.requires_grad_(True)  # autograd computed the weights' gradients too
        for positions, losses in denoising_losses(embedded.generator, embedded.images, rows, **config.drawn):
            losses.sum().backward()
            parts = []
            for name, calls in recorded.items():
                left, right, scale = turned[name]
                parts.append(((left.T @ example_gradients(calls) @ right) * scale).flatten(1))
                calls.clear()
            each = torch.cat(parts, dim=1)[:, torch.from_numpy(coordinates)]
            features.index_add_(0, torch.from_numpy(positions.repeat(losses.shape[1])), each)
    for layer in layers.values():
        layer.weight.grad = None
    return features.numpy()


def agreements(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Q,) Spearman's correlations and (Q,) shared parts of the first 1% of two (Q, N) arrays of scores."""
    top = max(1, round(first.shape[1] / 100))
    correlations = np.array([spearmanr(one, other).statistic for one, other in zip(first, second, strict=True)])
    best = [np.argsort(-scores, axis=1)[:, :top] for scores in (first, second)]
    return correlations, np.array([len(np.intersect1d(one, other)) / top for one, other in zip(*best, strict=True)])


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of a call, and what it returns."""
    started = time.process_time()
    found = work()
    return time.process_time() - started, found


@dataclass(frozen=True)
class Embedded:
    """The embedded generator, some images of the emoji corpus, and the curvature."""

    generator: Generator
    corpus: Corpus
    images: EncodedImages
    layers: dict[str, Layer]
    factors: Factors

    @classmethod
    def open(cls, corpus: Corpus, sizes: Sizes, seed: int) -> Embedded:
        """Fit the curvature on random images of the corpus."""
        generator = Generator.from_pretrained("emoji", device="cpu")
        rows = np.random.default_rng([seed, 1]).choice(len(corpus), 256, replace=False)
        latents = generator.encode_image([corpus.image(row) for row in rows])[:, None]
        conditioning = generator.encode_prompt([corpus.captions[row][0] for row in rows])
        images = EncodedImages([corpus.image_ids[row] for row in rows], latents, conditioning, np.arange(len(rows) + 1))
        layers = layers_to_unlearn(generator, "")
        config = TeacherConfig(factor_examples=sizes.factor_examples, batch_size=32, seed=seed)
        return cls(generator, corpus, images, layers, fit_ekfac(layers, factor_batches(generator, images, config)))


def speed(embedded: Embedded, coordinates: np.ndarray, sizes: Sizes) -> dict[str, float]:
    """Images a second before and after, and the largest difference of what they give, as a part of the largest number."""
    config = GradientConfig(width=sizes.width, draws=sizes.draws, batch_size=sizes.draws)
    compression = Compression(embedded.layers, config, embedded.factors, coordinates)
    own = (embedded.generator, embedded.layers, embedded.images)
    few, many = np.arange(sizes.before), np.arange(sizes.after)
    gradient_features(*own, few[:1], compression, config)  # warm
    before, expected = seconds_of(lambda: draw_by_draw(embedded, few, coordinates, config))
    after, found = seconds_of(lambda: gradient_features(*own, many, compression, config))
    rates = {"before": sizes.before / before, "after": sizes.after / after}
    return {
        **{f"gradient_images_per_second_{name}": rate for name, rate in rates.items()},
        "gradient_images_per_second_ratio": rates["after"] / rates["before"],
        "gradient_max_relative_difference": float(np.abs(found[: sizes.before] - expected).max() / np.abs(expected).max()),
    }


def new_query(embedded: Embedded, coordinates: np.ndarray, sizes: Sizes, seed: int) -> dict[str, float]:
    """Seconds of one call that scores a new query over a whole corpus, by the mean of first order and D-TRAK in EKFAC's basis.

    The rows are random numbers, as many and as wide as the corpus' own would be: what they say takes no time.
    """
    rng, members = np.random.default_rng([seed, 2]), []
    config = TeacherConfig(method="averaged", gradient_width=sizes.width, query_draws=16, batch_size=32, seed=seed)
    for member in config.members_of():
        settings = replace(member.gradients_of(member.method), draws=member.query_draws)
        compression = Compression(embedded.layers, settings, embedded.factors, coordinates)
        rows = rng.standard_normal((sizes.corpus_images, len(coordinates)), dtype=np.float32).astype(np.float16)
        members.append(Member(member.method, settings, compression, rows))
    ids = [str(row) for row in range(sizes.corpus_images)]
    with tempfile.TemporaryDirectory() as scratch:  # from disk, as a later process finds it
        FittedTeacher(embedded.generator, config, ids, members).save(Path(scratch), generator="emoji")
        teacher = FittedTeacher.open(Path(scratch), generator=embedded.generator)
        wall, spent = [], []
        for row in range(sizes.timed_queries):
            image, prompt = embedded.corpus.image(row), embedded.corpus.captions[row][0]
            started = time.perf_counter()
            processor, _ = seconds_of(lambda image=image, prompt=prompt: teacher.score(image, prompt))
            wall.append(time.perf_counter() - started)
            spent.append(processor)
    return {
        "new_query_exact_seconds": float(np.median(wall)),
        "new_query_exact_processor_seconds": float(np.median(spent)),
        "new_query_draws": config.query_draws,
        "new_query_images": sizes.corpus_images,
    }


def kept_coordinates(energy: np.ndarray, sizes: Sequence[int], way: str, count: int) -> np.ndarray:
    """(count,) sorted numbers of the coordinates to keep, up to rounding, of (P,) mean squares over layers of these sizes.

    `way` is 'leading', those of all layers, 'per_layer', the leading ones of each in equal parts of its numbers, or 'shares',
    the same in parts of its energy.
    """
    if way == "leading":
        return np.sort(np.argpartition(-energy, count - 1)[:count])
    parts, starts = np.split(energy, np.cumsum(sizes)[:-1]), np.concatenate([[0], np.cumsum(sizes)[:-1]])
    weights = np.array([part.sum() if way == "shares" else len(part) for part in parts], dtype=np.float64)
    counts = np.minimum(np.round(count * weights / weights.sum()).astype(int), sizes)
    chosen = [start + np.argsort(-part)[:own] for start, part, own in zip(starts, parts, counts, strict=True)]
    return np.sort(np.concatenate(chosen))


def curve(queries: np.ndarray, images: np.ndarray, sizes: Sequence[int], kept: Sequence[int], seed: int) -> dict[str, float]:
    """Agreement with whole gradients by way, precision and bytes an image; a column block at a time, for they are gigabytes.

    (Q, P) `queries` and (N, P) `images` are whitened gradients in half precision over layers of these sizes; `kept` are numbers
    an image. Keys are coordinates_spearman_WAY_PRECISION_BYTES with `_low` and `_high`, and coordinates_top1pct_...
    """
    width, rng, found = images.shape[1], np.random.default_rng(11), dict[str, float]()
    energy, whole = np.zeros(width), np.zeros((len(queries), len(images)), np.float32)
    sketches = {count: [torch.zeros(len(part), count) for part in (queries, images)] for count in kept[:-1]}
    for start in range(0, width, BLOCK):
        block = [part[:, start : start + BLOCK].astype(np.float32) for part in (queries, images)]
        energy[start : start + BLOCK] = np.square(block[1], dtype=np.float64).mean(axis=0)
        whole += block[0] @ block[1].T
        for count, sketch in sketches.items():
            buckets = torch.from_numpy(rng.integers(0, count, block[0].shape[1]))
            signs = rng.choice(np.array([-1, 1], np.float32), block[0].shape[1])
            for total, part in zip(sketch, block, strict=True):
                total.index_add_(1, buckets, torch.from_numpy(part * signs))
    draws = np.random.default_rng([seed, 6]).integers(0, len(queries), (2000, len(queries)))

    def judge(own: np.ndarray, theirs: np.ndarray, name: str) -> None:
        correlations, overlaps = agreements(own @ theirs.T, whole)
        ends = interval(correlations[draws].mean(axis=1))
        for ending, value in zip(("", "_low", "_high"), (float(correlations.mean()), *ends), strict=True):
            found[f"coordinates_spearman_{name}{ending}"] = value
        found[f"coordinates_top1pct_{name}"] = float(overlaps.mean())

    for count in (count for count in kept if 2 * count < width):
        for way, precision in itertools.product(("leading", "shares", "per_layer"), ("float16", "int8")):
            chosen = kept_coordinates(energy, sizes, way, count if precision == "float16" else 2 * count)
            own, theirs = (part[:, chosen].astype(np.float32) for part in (queries, images))
            if precision == "int8":
                levels = np.abs(theirs).max(axis=1, keepdims=True) / 127
                theirs = np.round(theirs / levels) * levels
            judge(own, theirs, f"{way}_{precision}_{2 * count}")
        if count in sketches:
            own, theirs = (part.numpy() for part in sketches[count])
            judge(own, theirs, f"sketch_float16_{2 * count}")
    return found


def bench_curve(bench: lab.Bench, sizes: Sizes, seed: int) -> dict[str, float]:
    """`curve` on emoji-bench's training images and validation queries, all layers."""
    generator, factors = bench.lab.generator, bench.lab.factors()
    layers = layers_to_unlearn(generator, lab.ALL_LAYERS)
    config = GradientConfig(width=0, draws=sizes.curve_draws, damping=bench.lab.settings.damping, batch_size=64, seed=seed)
    compression = Compression(layers, config, factors)
    queries = bench.lab.queries(bench.truth.of_split("validation")[: sizes.curve_queries])
    images = bench.lab.corpus.first(sizes.curve_images)
    theirs = features_of(generator, layers, images, compression, config)
    own = features_of(generator, layers, queries, compression, replace(config, draws=sizes.query_draws, antithetic=True))
    halves = [(part / np.sqrt(np.mean(np.square(part[:8])))).astype(np.float16) for part in (own, theirs)]
    return curve(*halves, [layer.weight.numel() for layer in layers.values()], KEPT, seed)


def measure(corpus: Corpus, sizes: Sizes, seed: int) -> dict[str, Any]:
    """Speed and the time of a new query, on the embedded generator and images of a corpus."""
    embedded = Embedded.open(corpus, sizes, seed)
    config = GradientConfig(width=sizes.width, draws=2, batch_size=32)
    coordinates = leading_coordinates(embedded.generator, embedded.layers, embedded.images, embedded.factors, config)
    return {**speed(embedded, coordinates, sizes), **new_query(embedded, coordinates, sizes, seed)}


def measure_curve(
    truth: Path, run_dir: Path, source: Path | None, sizes: Sizes, seed: int, *, config: Path = lab.CONFIG
) -> dict[str, Any]:
    """Agreement with whole gradients by numbers kept, on emoji-bench; `source` is a finished emoji corpus."""
    cost = lab.Cost(factor_examples=sizes.factor_examples)
    bench = lab.open_bench(truth, run_dir, read_yaml(config, RetrainConfig), source, lab.read_settings(truth), cost)
    found = bench_curve(bench, sizes, seed)
    default = f"per_layer_float16_{2 * TeacherConfig().gradient_width}"
    return {"coordinates_spearman": found.get(f"coordinates_spearman_{default}", float("nan")), **found}


def open_emoji(run_dir: Path) -> AbstractContextManager[Corpus]:
    """The corpus of the embedded generator, of a run folder or made for the moment."""
    return open_corpus(run_dir, read_json(ASSETS / "emoji" / "generator" / MANIFEST)["inputs"]["corpus"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    parser = machine.parser(__doc__, quick="fewer images and draws", seed="of images and noise")
    parser.add_argument("--emoji", type=Path, default=Path("runs/emoji"), help="run folder with the corpus (%(default)s)")
    options = lab.options_of(parser, arguments)
    sizes = QUICK if options.quick else Sizes()
    with open_emoji(options.emoji) as corpus:
        results = measure(corpus, sizes, options.seed)
    results |= measure_curve(options.truth, options.run, options.corpus, sizes, options.seed, config=options.config)
    machine.finish({**results, **vars(sizes)}, options)


if __name__ == "__main__":
    machine.run(main)
