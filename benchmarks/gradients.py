"""Benchmark of gradients: how many images a second, how many numbers an image must be kept of, how soon a query is scored.

    python benchmarks/gradients.py --json FILE [--quick] [--emoji runs/emoji] [--run runs/bench] [--corpus FOLDER]

Speed and the time of a new query are measured on the embedded generator, all layers, the curve of compression on emoji-bench,
whose whole gradients fit into memory. Speed is images a second of processor time, before and after draws were summed
before they are rotated, in one process; 'before' is the loop below, which rotates every draw's gradient on its own.
Agreement is that of first-order scores with those of whole gradients: Spearman's correlation over the images and the
shared part of the first 1%, means over queries with 95% bootstrap intervals.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lab
import machine
import numpy as np
import torch
from emoji import open_corpus
from scipy.stats import spearmanr

from fastattr import FastattrError
from fastattr.core.settings import read_yaml
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


QUICK = Sizes(
    factor_examples=128,
    draws=8,
    before=1,
    after=4,
    width=1024,
    corpus_images=2000,
    curve_images=48,
    curve_queries=6,
    curve_draws=4,
    query_draws=8,
    timed_queries=3,
)


def draw_by_draw(
    generator: Generator,
    layers: Mapping[str, Layer],
    images: EncodedImages,
    rows: np.ndarray,
    factors: Factors,
    coordinates: np.ndarray,
    config: GradientConfig,
) -> np.ndarray:
    """(C, k) gradient features as they were computed before: every draw's gradient whole, rotated and scaled on its own."""
    features = torch.zeros(len(rows), len(coordinates))
    turned = {
        name: (
            factors.gradient_eigenvectors[name].float(),
            factors.activation_eigenvectors[name].float(),
            factors.damped(name, config.damping).rsqrt().float(),
        )
        for name in layers
    }
    with record_layers(layers) as recorded:
        for layer in layers.values():
            layer.weight.requires_grad_(True)  # autograd computed the weights' gradients too
        for positions, losses in denoising_losses(generator, images, rows, **config.drawn):
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
    before, expected = seconds_of(lambda: draw_by_draw(*own, few, embedded.factors, coordinates, config))
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
    """(count,) sorted numbers of the coordinates to keep.

    Args:
        energy: (P,) mean square of each coordinate over the training images.
        sizes: numbers of each layer.
        way: 'leading' ones of all layers; 'per_layer', the leading ones of each, in equal parts of its numbers; 'shares', the
            same in parts of its energy.
        count: numbers to keep, up to rounding.
    """
    if way == "leading":
        return np.sort(np.argpartition(-energy, count - 1)[:count])
    parts, starts = np.split(energy, np.cumsum(sizes)[:-1]), np.concatenate([[0], np.cumsum(sizes)[:-1]])
    weights = np.array([part.sum() if way == "shares" else len(part) for part in parts], dtype=np.float64)
    counts = np.minimum(np.round(count * weights / weights.sum()).astype(int), sizes)
    chosen = [start + np.argsort(-part)[:own] for start, part, own in zip(starts, parts, counts, strict=True)]
    return np.sort(np.concatenate(chosen))


def curve(
    queries: np.ndarray, images: np.ndarray, sizes: Sequence[int], kept: Sequence[int], seed: int
) -> list[dict[str, Any]]:
    """Agreement with whole gradients by numbers kept, way and precision; a column block at a time, for they are gigabytes.

    Args:
        queries: (Q, P) whitened gradients in half precision.
        images: (N, P) those of the training images.
        sizes: numbers of each layer.
        kept: numbers an image in half precision.
        seed: of the bootstrap.
    """
    width, rng, rows = images.shape[1], np.random.default_rng(11), []
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
    top = max(1, round(len(images) / 100))
    first = np.argsort(-whole, axis=1)[:, :top]

    def judge(own: np.ndarray, theirs: np.ndarray, **facts: Any) -> None:
        scores = own @ theirs.T
        correlations = np.array([spearmanr(one, other).statistic for one, other in zip(scores, whole, strict=True)])
        best = np.argsort(-scores, axis=1)[:, :top]
        overlap = np.mean([len(np.intersect1d(one, other)) / top for one, other in zip(best, first, strict=True)])
        low, high = interval(correlations[draws].mean(axis=1))
        agreement = {"spearman": float(correlations.mean()), "spearman_low": low, "spearman_high": high}
        rows.append({**facts, **agreement, "top1pct": float(overlap)})

    for count in (count for count in kept if 2 * count < width):
        for way, precision in itertools.product(("leading", "shares", "per_layer"), ("float16", "int8")):
            chosen = kept_coordinates(energy, sizes, way, count if precision == "float16" else 2 * count)
            own, theirs = (part[:, chosen].astype(np.float32) for part in (queries, images))
            if precision == "int8":
                levels = np.abs(theirs).max(axis=1, keepdims=True) / 127
                theirs = np.round(theirs / levels) * levels
            judge(own, theirs, bytes=2 * count, numbers=len(chosen), way=way, precision=precision)
        if count in sketches:
            own, theirs = (part.numpy() for part in sketches[count])
            judge(own, theirs, bytes=2 * count, numbers=count, way="sketch", precision="float16")
    return rows


def bench_curve(bench: lab.Bench, sizes: Sizes, seed: int) -> list[dict[str, Any]]:
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
    return {"coordinates_spearman": bench_curve(bench, sizes, seed)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description="Measure gradients: speed, compression, the time of a new query.")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    parser.add_argument("--quick", action="store_true", help="fewer images and draws")
    parser.add_argument("--emoji", type=Path, default=Path("runs/emoji"), help="run folder with the corpus (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of images and noise (%(default)s)")
    options = lab.options_of(parser, arguments)
    sizes, start = QUICK if options.quick else Sizes(), time.perf_counter()
    with open_corpus(options.emoji) as corpus:
        results = measure(corpus, sizes, options.seed)
    results |= measure_curve(options.truth, options.run, options.corpus, sizes, options.seed, config=options.config)
    settings = {**vars(sizes), "seed": options.seed, "quick": options.quick, **machine.describe()}
    machine.report({**results, **settings, "benchmark_seconds": round(time.perf_counter() - start, 1)}, options.json)


if __name__ == "__main__":
    try:
        main()
    except FastattrError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
