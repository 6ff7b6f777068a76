"""The table of truth: every method and every null against emoji-bench's retrained models.

    python benchmarks/truth.py [--quick]     the table, docs/truth.md and benchmarks/results/truth.json
    python benchmarks/truth.py --sweep       choose settings on validation and training queries: SETTINGS in the truth folder
    python benchmarks/truth.py --exact       the exact teacher's scores of the test queries, kept in the ground truth folder
    python benchmarks/truth.py --rankings    whom leave-K-out removes: RUN/rankings.parquet, for benchmarks/ground_truth.py

The order for a new ground truth: ground_truth.py --only lds --only groups, --sweep, --exact, --rankings, ground_truth.py
--only leave-k-out, and the table. Scores of test queries play no part in --sweep; students learn from training queries
alone. Everything is computed with the generator that drew the queries; the null 'student_other_teacher' alone has
another one's. Seconds a query are those of the query (its features or its own gradient, and the comparison with all
images), without what is done once for all queries; for first-order scores, whose pass over the corpus serves all queries,
each query bears its part of the pass.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import ground_truth
import machine
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from ground_truth import AUTOENCODER, open_run
from tqdm import tqdm, trange

from fastattr.core.errors import FastattrError, InputError, NonFiniteError
from fastattr.core.files import atomic_path, read_json, sha256_file, write_json
from fastattr.core.settings import read_yaml
from fastattr.core.stages import MANIFEST, fingerprint, open_stage, require_same, write_manifest
from fastattr.corpus.store import Corpus
from fastattr.evaluation.against_truth import compare_with_truth, leave_k_out_gains, table_scores
from fastattr.evaluation.figures import write_truth_report
from fastattr.evaluation.lds import noise_ceiling, outputs_of, popularity, residual_outputs
from fastattr.evaluation.retrain import RANKINGS
from fastattr.evaluation.subsets import RetrainConfig, chosen_queries, removed_count
from fastattr.evaluation.truth import GroundTruth
from fastattr.features.diffusion import middle_activations
from fastattr.features.encoder import encode_all
from fastattr.features.kinds import open_encoder
from fastattr.generators.conditioning import Conditioning
from fastattr.generators.generator import CROSS_ATTENTION_KV, Generator
from fastattr.generators.layers import Layer, weight_shape
from fastattr.gradients.ekfac import Factors, fit_ekfac
from fastattr.gradients.encoded import EncodedImages
from fastattr.gradients.losses import denoising_losses, image_losses
from fastattr.students.distill import DistillConfig, distill
from fastattr.students.pairs import labels_of, make_table, standardised
from fastattr.students.student import embed
from fastattr.teachers.config import TeacherConfig
from fastattr.teachers.curvature import factor_batches
from fastattr.teachers.first_order import flat_step
from fastattr.teachers.kernels import kernel_scores_of_products
from fastattr.teachers.scores import ScoredQuery, write_shard
from fastattr.teachers.similarity import similarity_scores
from fastattr.teachers.unlearning import influence_scores, query_gradient, unlearned, unlearning_step

logger = logging.getLogger(__name__)

DOCS = Path(__file__).parents[1] / "docs" / "truth.md"
RESULTS = Path(__file__).parent / "results" / "truth.json"
SETTINGS = "settings.json"
"""In the ground truth folder: what --sweep chose, and all that it tried."""
EXACT = "exact"
"""In the ground truth folder: the exact teacher's score table of the test queries."""
ENCODERS = {"image": "open_clip-image:emoji", "text": "open_clip-text:emoji"}
SIMILARITIES = ("similarity_image", "similarity_text", "similarity_both", "diffusion_features")
TEACHERS = ("abu_plus_exact", "abu_plus_linearised")
LEAVE_K_OUT = ("abu_plus_exact", "abu_plus_linearised", "d_trak", "similarity_both", "student")
PATTERNS = {
    "cross-attention k, v": CROSS_ATTENTION_KV,
    "cross-attention": r"attn2\.",
    "attention blocks": r"attentions\.",
    "U-Net": r".",
}
"""Weights to unlearn that --sweep tries."""
SWEPT_DAMPINGS = (0.01, 0.1, 1.0, 10.0)
SWEPT_QUERY_DRAWS = (64, 128, 512)
SWEPT_LOSS_DRAWS = (4, 16, 32, 128)
SPARED_LDS = 0.005
"""Of draws, the cheapest are chosen whose residual LDS is within this of the best."""
SWEPT_RISES = (0.005, 0.02, 0.1, 0.5)
SWEPT_RIDGES = (0.001, 0.01, 0.1, 1.0, 10.0)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What --sweep chooses, and from where it starts."""

    pattern: str = CROSS_ATTENTION_KV
    damping: float = 0.1
    diagonal_damping: float = 0.1
    query_draws: int = 256
    """(timestep, noise) pairs of a query's gradient; D-TRAK takes a quarter."""
    loss_draws: int = 16
    """(timestep, noise) pairs of a training image's gradient or loss."""

    rise: float = 0.02
    """By how much the exact step raises the query's loss, to first order, as a part of it."""
    trak_pattern: str = CROSS_ATTENTION_KV
    trak_ridge: float = 0.1
    d_trak_pattern: str = CROSS_ATTENTION_KV
    d_trak_ridge: float = 0.1

    @property
    def fewer_query_draws(self) -> int:
        """A quarter of `query_draws`, in pairs."""
        return max(2, self.query_draws // 4 // 2 * 2)

    def at_most(self, sizes: Sizes) -> Settings:
        """These, with no more draws than `sizes` allow."""
        query_draws, loss_draws = min(self.query_draws, sizes.most_query_draws), min(self.loss_draws, sizes.most_loss_draws)
        return replace(self, query_draws=query_draws, loss_draws=loss_draws)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is computed."""

    factor_examples: int = 2048
    exact_query_draws: int = 512
    """(timestep, noise) pairs of a query's gradient for the exact teacher, whose time goes into other things."""
    exact_draws: int = 16
    """(timestep, noise) pairs of a training image's loss under the exact teacher."""
    train_queries: int = 320
    """Of which the students learn."""
    test_queries: int = 1000
    """At most; all there are."""
    most_query_draws: int = 1000
    most_loss_draws: int = 1000
    """`Settings.query_draws` and `Settings.loss_draws`, at most."""
    swept_exact_queries: int = 26
    """Queries on which the exact step's size is chosen."""
    student: DistillConfig = field(
        default_factory=lambda: DistillConfig(
            loss="mse_scores", training=replace(DistillConfig().training, steps=300, warmup_steps=20)
        )
    )
    """Its loss did best in cross-validation over the training prompts (docs/truth.md)."""
    resamples: int = 1000
    batch_size: int = 64
    seed: int = 0


QUICK = Sizes(
    factor_examples=128,
    exact_query_draws=64,
    exact_draws=4,
    train_queries=40,
    test_queries=24,
    most_query_draws=64,
    most_loss_draws=4,
    student=DistillConfig(loss="mse_scores", training=replace(DistillConfig().training, steps=100)),
    resamples=200,
)


def open_generator(folder: Path, autoencoder_sha256: str) -> Generator:
    """A generator of a ground truth folder, with the embedded emoji model's autoencoder.

    Raises:
        ArtifactMismatchError: that is another autoencoder than the ground truth was made with.
    """
    require_same(
        "the embedded autoencoder",
        sha256_file(AUTOENCODER / "diffusion_pytorch_model.safetensors"),
        autoencoder_sha256,
        "The ground truth was made with another one; make it again, or use the fastattr that it was made with.",
    )
    autoencoder = AutoencoderKL.from_pretrained(AUTOENCODER)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, vae=autoencoder, dtype=torch.float32, local_files_only=True)
    return Generator(pipeline, name=folder.name)


class Lab:
    """One generator's view of the corpus and of some queries, and what gradient methods make of it."""

    def __init__(self, generator: Generator, corpus: EncodedImages, sizes: Sizes) -> None:
        self.generator, self.corpus, self.sizes = generator, corpus, sizes
        self._factors: dict[bool, Factors] = {}
        self._corpus_gradients: dict[tuple[int, str], np.ndarray] = {}

    @classmethod
    def open(cls, folder: Path, truth: GroundTruth, corpus: Corpus, latents: torch.Tensor, sizes: Sizes) -> Lab:
        """Of the generator in `folder`."""
        generator = open_generator(folder, truth.manifest["inputs"]["autoencoder"])
        conditioning = _encode_prompts(generator, [captions[0] for captions in corpus.captions])
        return cls(generator, EncodedImages(corpus.image_ids, latents[:, None], conditioning, _one_each(len(corpus))), sizes)

    def queries(self, truth: GroundTruth, query_ids: Sequence[str]) -> EncodedImages:
        """Queries, encoded as training images are."""
        latents = _in_batches(self.generator.encode_image, [truth.image(query_id) for query_id in query_ids])
        conditioning = _encode_prompts(self.generator, [truth.prompt(query_id) for query_id in query_ids])
        return EncodedImages(list(query_ids), latents[:, None], conditioning, _one_each(len(query_ids)))

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """All of the U-Net's, ready for gradients: one backward pass gives them all, a pattern picks its own afterwards."""
        found = self.generator.modules_to_unlearn(PATTERNS["U-Net"])
        for layer in found.values():
            layer.weight.requires_grad_(True)
        return found

    def matching(self, pattern: str) -> dict[str, Layer]:
        """Those whose weights a teacher unlearns."""
        return self.generator.modules_to_unlearn(pattern)

    def factors(self, *, diagonal: bool = False) -> Factors:
        """Curvature of all layers, fitted once; each layer's is the same whichever others are unlearned."""
        if diagonal not in self._factors:
            config = TeacherConfig(
                factor_examples=self.sizes.factor_examples, batch_size=self.sizes.batch_size, seed=self.sizes.seed
            )
            batches = factor_batches(self.generator, self.corpus, config)
            self._factors[diagonal] = fit_ekfac(self.layers, batches, diagonal=diagonal)
        return self._factors[diagonal]

    def gradients(self, queries: EncodedImages, draws: int) -> Iterator[tuple[dict[str, torch.Tensor], float]]:
        """Each query's mean gradient by layer, and its loss."""
        for row, query_id in enumerate(tqdm(queries.image_ids, desc="query gradients", unit="query")):
            yield query_gradient(
                self.generator,
                self.layers,
                queries.latents[row],
                queries.conditioning[row : row + 1],
                query_id=query_id,
                draws=draws,
                batch_size=self.sizes.batch_size,
                seed=self.sizes.seed,
                antithetic=True,
            )

    def query_gradients(self, queries: EncodedImages, draws: int) -> np.ndarray:
        """(Q, P) the same, layers one after another."""
        found = self._no_gradients(queries)
        for row, (gradients, _) in enumerate(self.gradients(queries, draws)):
            found[row] = flat_step(gradients, list(self.layers))
        return found

    def image_gradients(self, images: EncodedImages, draws: int, output: str = "loss") -> np.ndarray:
        """(N, P) each image's mean gradient of an output function, at the noise of the teacher's losses.

        All of them fit into memory here: one backward pass an image then gives its mean over the draws, where
        `linearised_scores`, made for a corpus that does not fit, needs every draw's own.
        """
        found = self._no_gradients(images)
        for row in trange(len(found), desc=f"gradients of {output}", unit="image"):
            for _, losses in denoising_losses(
                self.generator,
                images,
                np.array([row]),
                draws=draws,
                batch_size=self.sizes.batch_size,
                seed=self.sizes.seed,
                output=output,
            ):
                parts = torch.autograd.grad(losses.sum(), [layer.weight for layer in self.layers.values()])
                found[row] += torch.cat([part.flatten() for part in parts]).numpy()
        return found

    def corpus_gradients(self, draws: int, output: str = "loss") -> np.ndarray:
        """(N, P) those of the training images, computed once."""
        if (draws, output) not in self._corpus_gradients:
            self._corpus_gradients[draws, output] = self.image_gradients(self.corpus, draws, output)
        return self._corpus_gradients[draws, output]

    def _no_gradients(self, images: EncodedImages) -> np.ndarray:
        return np.zeros((len(images.image_ids), sum(layer.weight.numel() for layer in self.layers.values())), np.float32)

    def products(self, queries: np.ndarray, images: np.ndarray, pattern: str) -> tuple[np.ndarray, np.ndarray]:
        """(Q, N) and (N, N) inner products of gradients of the layers that match, for TRAK and D-TRAK."""
        ours, theirs = (self.first_order(rows, images, pattern, None, 1.0) for rows in (queries, images))
        return ours, theirs

    def first_order(
        self, queries: np.ndarray, images: np.ndarray, pattern: str, factors: Factors | None, damping: float
    ) -> np.ndarray:
        """(Q, N) loss changes to first order from (Q, P) and (N, P) gradients, those of the layers that match counted."""
        by_layer = layer_scores(queries, images, self.layers, factors, [damping])[damping]
        total: np.ndarray = np.sum([by_layer[name] for name in self.matching(pattern)], axis=0)
        return total

    def whitened_d_trak(self, queries: np.ndarray, images: np.ndarray, settings: Settings) -> np.ndarray:
        """(Q, N) D-TRAK's scores with products taken in EKFAC's eigenbasis, as the teacher's are, before the ridge."""
        ours, theirs = (
            self.first_order(rows, images, settings.pattern, self.factors(), settings.damping) for rows in (queries, images)
        )
        return kernel_scores_of_products(ours, theirs, ridge=settings.d_trak_ridge)

    def losses(self) -> np.ndarray:
        """(N, 1) losses of the training images under the weights as they are."""
        return image_losses(
            self.generator,
            self.corpus,
            np.arange(len(self.corpus.image_ids)),
            draws=self.sizes.exact_draws,
            batch_size=2 * self.sizes.batch_size,
            seed=self.sizes.seed,
        )

    @cached_property
    def base_losses(self) -> np.ndarray:
        """The same under the generator's own weights."""
        return self.losses()

    def exact(self, queries: EncodedImages, settings: Settings) -> np.ndarray:
        """(Q, N) exact scores: losses after the query's unlearning step less losses before it."""
        factors, chosen = self.factors(), self.matching(settings.pattern)
        before = self.base_losses
        scores = []
        for gradients, loss in self.gradients(queries, self.sizes.exact_query_draws):
            part = {name: gradients[name] for name in chosen}
            step, _ = unlearning_step(part, factors, damping=settings.damping, loss=loss, rise=settings.rise, step_size=None)
            with unlearned(chosen, step):
                scores.append(influence_scores(before, self.losses()))
        return np.stack(scores)

    def diffusion_features(self, images: EncodedImages) -> np.ndarray:
        """(N, F) activations of the U-Net's middle block at three noise levels, side by side."""
        starts = range(0, len(images.image_ids), self.sizes.batch_size)
        parts = [slice(start, start + self.sizes.batch_size) for start in starts]
        return np.concatenate(
            [middle_activations(self.generator, images.latents[part, 0], images.conditioning[part]) for part in parts]
        )


def _in_batches(encode: Any, items: Sequence[Any]) -> torch.Tensor:
    return torch.cat([encode(items[start : start + 128]) for start in range(0, len(items), 128)])


def _encode_prompts(generator: Generator, prompts: Sequence[str]) -> Conditioning:
    return Conditioning.concatenated(
        [generator.encode_prompt(prompts[start : start + 128]) for start in range(0, len(prompts), 128)]
    )


def _one_each(count: int) -> np.ndarray:
    """`first_caption` of images with one caption each."""
    return np.arange(count + 1)


def layer_scores(
    queries: np.ndarray,
    images: np.ndarray,
    layers: Mapping[str, Layer],
    factors: Factors | None,
    dampings: Sequence[float],
) -> dict[float, dict[str, np.ndarray]]:
    """What each layer adds to the first-order scores, at several dampings.

    A score is the inner product of the query's natural gradient and the image's gradient, which is taken in the factors'
    eigenbasis: there damping is a division, so that all dampings share what is expensive.

    Args:
        queries: (Q, P) gradients, layers one after another.
        images: (N, P) the same of training images.
        layers: in that order.
        factors: of these layers and maybe more; None is no curvature, where dampings mean nothing.
        dampings: as fractions of each layer's mean eigenvalue.

    Returns:
        damping -> layer -> (Q, N) float32.
    """
    found: dict[float, dict[str, np.ndarray]] = {damping: {} for damping in dampings}
    start = 0
    for name, layer in layers.items():
        shape = weight_shape(layer)
        part = slice(start, start + shape[0] * shape[1])
        distinct = [torch.from_numpy(rows[:, part].copy()).reshape(-1, *shape) for rows in _distinct(queries, images)]
        if factors:
            left, right = factors.gradient_eigenvectors[name].float(), factors.activation_eigenvectors[name].float()
            if not torch.equal(left, torch.eye(len(left))):  # a diagonal curvature has no other basis
                distinct = [left.T @ rows @ right for rows in distinct]
        own, theirs = distinct[0], distinct[-1]
        for damping in dampings:
            damped = own
            if factors:
                eigenvalues = factors.eigenvalues[name]
                damped = own / (eigenvalues + damping * eigenvalues.mean()).float()
            found[damping][name] = (damped.flatten(1) @ theirs.flatten(1).T).numpy()
        start = part.stop
    return found


def _distinct(first: np.ndarray, second: np.ndarray) -> list[np.ndarray]:
    return [first] if first is second else [first, second]


class Timed:
    """Seconds a query, by method."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, queries: int, *methods: str) -> Iterator[None]:
        """Add the time spent inside, divided by the number of queries, to each of these methods."""
        started = time.perf_counter()
        yield
        spent = (time.perf_counter() - started) / queries
        for name in methods:
            self.seconds[name] = self.seconds.get(name, 0.0) + spent


@dataclass(frozen=True)
class Data:
    """Ground truth, corpus and the generator that drew the queries, opened."""

    truth: GroundTruth
    config: RetrainConfig
    run_dir: Path
    corpus: Corpus
    latents: torch.Tensor
    lab: Lab

    def images(self) -> dict[str, np.ndarray]:
        """(N, F) frozen features of the training images, by encoder."""
        captions = self.corpus.captions
        return {name: _encode(name, self.corpus.image, captions) for name in ENCODERS}

    def queries(self, query_ids: Sequence[str], name: str) -> np.ndarray:
        """(Q, F) frozen features of queries by one encoder."""
        prompts = [[self.truth.prompt(query_id)] for query_id in query_ids]
        return _encode(name, lambda row: self.truth.image(query_ids[row]), prompts)


def _encode(name: str, images: Any, captions: Sequence[Sequence[str]]) -> np.ndarray:
    encoder = open_encoder(ENCODERS[name])
    return encode_all(encoder, images, captions, batch_size=128).astype(np.float32)


def open_data(truth_dir: Path, run_dir: Path, config: RetrainConfig, sizes: Sizes, source: Path | None) -> Data:
    """Open everything; the corpus is taken from RUN or built there."""
    truth = GroundTruth(truth_dir)
    bench = open_run(config, run_dir, source)
    require_same(
        f"the corpus of {run_dir}",
        bench.corpus.fingerprint,
        truth.corpus_fingerprint,
        f"The ground truth {truth_dir} belongs to another corpus; give another run folder.",
    )
    lab = Lab.open(truth.folder / "generator", truth, bench.corpus, bench.latents, sizes)
    require_same(
        "the generator of the ground truth",
        lab.generator.fingerprint,
        truth.queries["generator"][0].as_py(),
        "It did not draw the queries; make the ground truth again.",
    )
    return Data(truth, config, run_dir, bench.corpus, bench.latents, lab)


def read_settings(truth: GroundTruth) -> Settings:
    """What --sweep chose.

    Raises:
        ArtifactNotFoundError: it has not run.
    """
    return Settings(**read_json(truth.folder / SETTINGS)["chosen"])


def sweep(data: Data, sizes: Sizes) -> dict[str, Any]:
    """Try settings on validation and training queries, by residual LDS; returns the chosen ones and all that was tried.

    To choose among teachers, training queries are as good as validation queries: no teacher has learned from them.
    """
    lab, truth = data.lab, data.truth
    query_ids = truth.measured("validation") + truth.measured("train")
    queries = lab.queries(truth, query_ids)
    tried: list[dict[str, Any]] = []
    chosen: dict[str, Any] = asdict(Settings())

    def judge(
        candidates: Mapping[str, tuple[Mapping[str, Any], np.ndarray]],
        ids: Sequence[str],
        cost: Callable[[Mapping[str, Any]], float] | None = None,
    ) -> dict[str, Any]:
        """Keep all results, by name facts and scores; return the facts of the best, or of the cheapest that is as good."""
        scores = {name: _in_order(data, values) for name, (_, values) in candidates.items()}
        rows = compare_with_truth(scores, truth, ids, resamples=min(sizes.resamples, 500), seed=sizes.seed)["methods"]
        keys = ("lds", "lds_residual", "lds_residual_low", "lds_residual_high")
        tried.extend({**candidates[name][0], **{key: rows[name][key] for key in keys}, "queries": len(ids)} for name in scores)
        residual = {name: rows[name]["lds_residual"] for name in scores}
        good = [name for name in scores if residual[name] >= max(residual.values()) - (SPARED_LDS if cost else 0)]
        return dict(candidates[min(good, key=lambda name: cost(candidates[name][0])) if cost else good[0]][0])

    made_of = [
        lab.generator.fingerprint,
        truth.corpus_fingerprint,
        query_ids,
        sizes.factor_examples,
        sizes.exact_draws,
        sizes.seed,
    ]
    kept = data.run_dir / f"sweep-{fingerprint(made_of)}"
    own = {
        count: _kept(kept / f"queries-{count}.npy", partial(lab.query_gradients, queries, count)) for count in SWEPT_QUERY_DRAWS
    }
    theirs = {
        count: _kept(kept / f"images-{count}.npy", partial(lab.image_gradients, lab.corpus, count))
        for count in SWEPT_LOSS_DRAWS
    }
    ekfac = lab.factors()
    for curvature, factors in (("ekfac", ekfac), ("diagonal", lab.factors(diagonal=True)), ("none", None)):
        dampings = SWEPT_DAMPINGS if factors else (1.0,)
        by_layer = layer_scores(own[SWEPT_QUERY_DRAWS[-1]], theirs[SWEPT_LOSS_DRAWS[-1]], lab.layers, factors, dampings)
        best = judge(
            {
                f"{weights} {damping}": (
                    {"method": "first order", "weights": weights, "curvature": curvature, "damping": damping},
                    np.sum([by_layer[damping][name] for name in lab.matching(pattern)], axis=0),
                )
                for weights, pattern in PATTERNS.items()
                for damping in dampings
                if curvature != "diagonal" or pattern == chosen["pattern"]
            },
            query_ids,
        )
        if curvature == "ekfac":
            chosen |= {"pattern": PATTERNS[best["weights"]], "damping": best["damping"]}
        elif curvature == "diagonal":
            chosen["diagonal_damping"] = best["damping"]

    pattern, damping = chosen["pattern"], chosen["damping"]
    best = judge(
        {
            f"{query_draws}/{loss_draws}": (
                {"method": "first order", "query_draws": query_draws, "loss_draws": loss_draws},
                lab.first_order(queries_part, images_part, pattern, ekfac, damping),
            )
            for query_draws, queries_part in own.items()
            for loss_draws, images_part in theirs.items()
        },
        query_ids,
        cost=lambda facts: facts["query_draws"] * len(query_ids) + facts["loss_draws"] * len(data.corpus),
    )
    chosen |= {"query_draws": best["query_draws"], "loss_draws": best["loss_draws"]}

    few = query_ids[: sizes.swept_exact_queries]
    some = lab.queries(truth, few)
    candidates = {}
    for rise in SWEPT_RISES:
        settings = replace(Settings(**chosen), rise=rise)
        try:
            name = f"exact-{fingerprint([exact_settings(settings, sizes), few])}.npy"
            scores = _kept(kept / name, partial(lab.exact, some, settings))
        except NonFiniteError as error:  # so long a step that the network breaks
            logger.warning("a rise of %.1f%% is no candidate: %s", 100 * rise, error)
            continue
        candidates[f"{rise:.1%}"] = ({"method": "exact", "rise": rise}, scores)
    chosen["rise"] = judge(candidates, few)["rise"]

    gradients = {"trak": (own[chosen["query_draws"]], theirs[chosen["loss_draws"]])}
    del own, theirs  # some gigabytes
    few_draws, draws = Settings(**chosen).fewer_query_draws, chosen["loss_draws"]
    gradients["d_trak"] = (
        _kept(kept / f"norms-{few_draws}.npy", lambda: lab.image_gradients(queries, few_draws, "squared_norm")),
        _kept(kept / f"image-norms-{draws}.npy", lambda: lab.image_gradients(lab.corpus, draws, "squared_norm")),
    )
    for method, pair in gradients.items():
        candidates = {}
        for weights, pattern in PATTERNS.items():
            products = lab.products(*pair, pattern)
            for ridge in SWEPT_RIDGES:
                facts = {"method": method, "weights": weights, "ridge": ridge}
                candidates[f"{weights} {ridge}"] = facts, kernel_scores_of_products(*products, ridge=ridge)
        best = judge(candidates, query_ids)
        chosen |= {f"{method}_pattern": PATTERNS[best["weights"]], f"{method}_ridge": best["ridge"]}
    return {
        "chosen": chosen,
        "tried": tried,
        "noise_ceilings": ceilings_by_part(truth, query_ids),
        "models": len(truth.retrained("half", query_ids).model_ids),
        "splits": ["validation", "train"],
        "seed": sizes.seed,
    }


def _kept(path: Path, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """What an earlier run of the sweep computed, else `compute()`, kept for the next."""
    if not path.exists():
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, compute())
    found: np.ndarray = np.load(path, mmap_mode="r")  # some are gigabytes
    return found


def ceilings_by_part(truth: GroundTruth, query_ids: Sequence[str], parts: int = 8) -> list[float]:
    """Noise ceiling of residual LDS for losses at equal parts of the noise schedule, from little noise to much."""
    halves = truth.retrained("half", query_ids)
    losses = truth.losses_by_timestep(halves.model_ids, query_ids)
    found = []
    for part in np.array_split(np.arange(losses.shape[2]), min(parts, losses.shape[2])):
        outputs = residual_outputs(outputs_of(losses[:, :, part].mean(axis=2)))
        first, second = halves.seed_pairs()
        found.append(noise_ceiling(outputs[first], outputs[second]))
    return found


def exact_settings(settings: Settings, sizes: Sizes) -> dict[str, Any]:
    """All that the exact teacher's scores depend on, besides generator and corpus."""
    names = ("pattern", "damping", "rise")
    of_sizes = ("exact_query_draws", "exact_draws", "factor_examples", "seed")
    return {name: getattr(settings, name) for name in names} | {name: getattr(sizes, name) for name in of_sizes}


def score_exactly(data: Data, sizes: Sizes, settings: Settings) -> None:
    """Write the exact teacher's score table of the test queries into the ground truth folder.

    Resumes query by query; started several times, the processes share the queries.
    """
    truth, lab = data.truth, data.lab
    folder = truth.folder / EXACT
    query_ids = truth.of_split("test")
    config = exact_settings(settings, sizes)
    inputs = {"ground_truth": truth.manifest["fingerprint"], "generator": lab.generator.fingerprint}
    shards = data.run_dir / f"exact-{fingerprint([config, inputs])}"
    seconds = []
    for query_id in np.random.default_rng(os.getpid()).permutation(query_ids).tolist():  # so that several may share the work
        if (shards / f"{query_id}.parquet").exists():
            continue
        started = time.perf_counter()
        scores = lab.exact(lab.queries(truth, [query_id]), settings)[0]
        seconds.append(time.perf_counter() - started)
        nobody = np.zeros(len(scores), dtype=bool)
        row = ScoredQuery(
            query_id, truth.prompt(query_id), "test", truth.image_ids, _in_order(data, scores), nobody, settings.rise
        )
        write_shard(shards / f"{query_id}.parquet", [row], teacher="abu_plus_exact", config=fingerprint(config))
    table = pa.concat_tables([pq.read_table(shards / f"{query_id}.parquet") for query_id in query_ids])
    with atomic_path(folder / "test-00000.parquet") as temporary:
        pq.write_table(table, temporary, compression="zstd")
    write_manifest(
        folder,
        stage="scores",
        config=config,
        inputs=inputs,
        teacher="abu_plus_exact",
        corpus_fingerprint=truth.corpus_fingerprint,
        generator_fingerprint=lab.generator.fingerprint,
        seconds_per_query=round(float(np.median(seconds)), 2) if seconds else read_json(folder / MANIFEST)["seconds_per_query"],
    )


def _in_order(data: Data, scores: np.ndarray) -> np.ndarray:
    """(..., N) scores in the corpus' order -> in the order of the ground truth's images."""
    return scores[..., data.corpus.rows(data.truth.image_ids)]


def all_scores(
    data: Data, query_ids: Sequence[str], sizes: Sizes, settings: Settings, timed: Timed, *, nulls: bool = True
) -> dict[str, np.ndarray]:
    """(Q, N) scores of every method and null but the exact teacher, in the order of the ground truth's images.

    Without `nulls`, there are no students of wrong teachers, which cost much.
    """
    truth, lab = data.truth, data.lab
    count = len(query_ids)
    methods: dict[str, np.ndarray] = {"random": np.random.default_rng(sizes.seed).random((count, len(truth.image_ids)))}

    theirs = data.images()
    own = {}
    for name in ENCODERS:
        with timed.measure(count, f"similarity_{name}", "similarity_both", *STUDENTS):
            own[name] = data.queries(query_ids, name)
        with timed.measure(count, f"similarity_{name}"):
            methods[f"similarity_{name}"] = similarity_scores(own[name], theirs[name])
    both = [np.concatenate([features[name] for name in ENCODERS], axis=1) for features in (own, theirs)]
    with timed.measure(count, "similarity_both"):
        methods["similarity_both"] = similarity_scores(*both)
    queries = lab.queries(truth, query_ids)
    corpus_features = lab.diffusion_features(lab.corpus)
    with timed.measure(count, "diffusion_features", *STUDENTS):
        query_features = lab.diffusion_features(queries)
    with timed.measure(count, "diffusion_features"):
        methods["diffusion_features"] = similarity_scores(query_features, corpus_features)

    with timed.measure(count, *FIRST_ORDER, "trak"):  # the pass over the corpus serves all queries, so each bears its part
        query_gradients = lab.query_gradients(queries, settings.query_draws)
        corpus_gradients = lab.corpus_gradients(settings.loss_draws)
    curvatures: dict[str, tuple[Factors | None, float]] = {
        "abu_plus_linearised": (lab.factors(), settings.damping),
        "abu_diagonal": (lab.factors(diagonal=True), settings.diagonal_damping),
        "gradient_no_curvature": (None, 1.0),
    }
    for method, curvature in curvatures.items():
        with timed.measure(count, method):
            methods[method] = lab.first_order(query_gradients, corpus_gradients, settings.pattern, *curvature)
    with timed.measure(count, "trak"):
        products = lab.products(query_gradients, corpus_gradients, settings.trak_pattern)
        methods["trak"] = kernel_scores_of_products(*products, ridge=settings.trak_ridge)
    corpus_gradients = lab.corpus_gradients(settings.loss_draws, "squared_norm")
    with timed.measure(count, "d_trak", "d_trak_ekfac"):
        query_gradients = lab.image_gradients(queries, settings.fewer_query_draws, "squared_norm")
    with timed.measure(count, "d_trak"):
        products = lab.products(query_gradients, corpus_gradients, settings.d_trak_pattern)
        methods["d_trak"] = kernel_scores_of_products(*products, ridge=settings.d_trak_ridge)
    with timed.measure(count, "d_trak_ekfac"):
        methods["d_trak_ekfac"] = lab.whitened_d_trak(query_gradients, corpus_gradients, settings)
    methods["averaged"] = averaged(methods["abu_plus_linearised"], methods["d_trak_ekfac"])
    timed.seconds["averaged"] = timed.seconds["abu_plus_linearised"] + timed.seconds["d_trak_ekfac"]

    everything = [
        np.concatenate([features, of_unit_length(of_generator)], axis=1)
        for features, of_generator in zip(both, (query_features, corpus_features), strict=True)
    ]
    methods |= _students(data, *everything, sizes, settings, timed, nulls=nulls)
    methods["popularity"] = popularity(methods["abu_plus_linearised"])
    return {name: _in_order(data, scores) for name, scores in methods.items()}


def averaged(*scores: np.ndarray) -> np.ndarray:
    """(Q, N) mean of several methods' scores, each standardised for each query."""
    mean: np.ndarray = np.mean([[standardised(row) for row in rows] for rows in scores], axis=0)
    return mean


def of_unit_length(rows: np.ndarray) -> np.ndarray:
    """(N, F) rows divided by their lengths."""
    unit: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


FIRST_ORDER = ("abu_plus_linearised", "abu_diagonal", "gradient_no_curvature")
STUDENTS = ("student", "student_shuffled_teacher", "student_other_teacher")


def _students(
    data: Data,
    query_features: np.ndarray,
    corpus_features: np.ndarray,
    sizes: Sizes,
    settings: Settings,
    timed: Timed,
    *,
    nulls: bool,
) -> dict[str, np.ndarray]:
    """Similarities by students of the averaged teacher, of it with its queries mixed up, and of another generator's.

    They read image, text and diffusion features.
    """
    truth = data.truth
    train_ids = truth.of_split("train")[: sizes.train_queries]
    features = np.concatenate(
        [data.queries(train_ids, name) for name in ENCODERS]
        + [of_unit_length(data.lab.diffusion_features(data.lab.queries(truth, train_ids)))],
        axis=1,
    )
    labels = averaged_labels(data.lab, truth, train_ids, settings)
    tables = {"student": labels}
    if nulls:
        tables["student_shuffled_teacher"] = np.roll(labels, 1, axis=0)  # each query is taught another one's scores
        other = Lab.open(truth.folder / "other_generator", truth, data.corpus, data.latents, sizes)
        tables["student_other_teacher"] = averaged_labels(other, truth, train_ids, settings)
    found = {}
    for name, table in tables.items():
        nobody = np.zeros(table.shape[1], dtype=bool)
        scored = [
            ScoredQuery(query_id, truth.prompt(query_id), "train", data.corpus.image_ids, influence, nobody, settings.rise)
            for query_id, influence in zip(train_ids, table, strict=True)
        ]
        with tempfile.TemporaryDirectory() as scratch:
            labels = labels_of(scored, [np.arange(len(data.corpus))] * len(scored))
            taught = make_table(labels, corpus_size=len(data.corpus), kind=sizes.student.target_kind)
            checkpoint = Path(scratch) / "checkpoint.safetensors"
            student = distill(taught, features, corpus_features, sizes.student, checkpoint=checkpoint)
        index = embed(student, corpus_features)
        with timed.measure(len(query_features), name):
            found[name] = embed(student, query_features) @ index.T
    return found


def averaged_labels(lab: Lab, truth: GroundTruth, query_ids: Sequence[str], settings: Settings) -> np.ndarray:
    """(Q, N) scores that students learn: the mean of the first-order teacher and of D-TRAK in the eigenbasis of EKFAC.

    On validation and training queries it is truer than the first alone (docs/truth.md).
    """
    queries = lab.queries(truth, query_ids)
    first_order = lab.first_order(
        lab.query_gradients(queries, settings.query_draws),
        lab.corpus_gradients(settings.loss_draws),
        settings.pattern,
        lab.factors(),
        settings.damping,
    )
    outputs = lab.image_gradients(queries, settings.fewer_query_draws, "squared_norm")
    d_trak = lab.whitened_d_trak(outputs, lab.corpus_gradients(settings.loss_draws, "squared_norm"), settings)
    return averaged(first_order, d_trak).astype(np.float32)


def report(data: Data, sizes: Sizes) -> tuple[dict[str, Any], dict[str, np.ndarray], list[str]]:
    """Every method and null on the test queries; returns the results, the (Q, N) scores by method and the Q query ids."""
    truth, settings = data.truth, read_settings(data.truth).at_most(sizes)
    query_ids = truth.of_split("test")[: sizes.test_queries]
    timed = Timed()
    started = time.perf_counter()
    methods = all_scores(data, query_ids, sizes, settings, timed)
    exact = truth.folder / EXACT
    methods["abu_plus_exact"] = table_scores(exact, truth, query_ids)
    manifest = open_stage(exact, "scores")
    require_same(
        f"the generator of {exact}",
        manifest["generator_fingerprint"],
        data.lab.generator.fingerprint,
        "Run with --exact again.",
    )
    timed.seconds["abu_plus_exact"] = manifest["seconds_per_query"]
    rivals = (*SIMILARITIES, "popularity", "random")
    pairs = [(teacher, rival) for teacher in TEACHERS for rival in rivals]
    pairs += [("abu_plus_exact", other) for other in ("abu_plus_linearised", "d_trak", "d_trak_ekfac", "averaged", "student")]
    pairs += [("d_trak_ekfac", "d_trak")]
    pairs += [("student", rival) for rival in (*SIMILARITIES, *STUDENTS[1:], "popularity")]
    result = compare_with_truth(
        methods,
        truth,
        query_ids,
        seconds=timed.seconds,
        teacher="abu_plus_exact",
        pairs=pairs,
        resamples=sizes.resamples,
        seed=sizes.seed,
    )
    removed = [(method, rival) for method in LEAVE_K_OUT for rival in ("random", "similarity_both") if method != rival]
    return (
        {
            **result,
            "leave_k_out_gains": leave_k_out_gains(truth, removed, query_ids, seed=sizes.seed),
            "settings": asdict(settings),
            "ground_truth": truth.manifest["fingerprint"],
            "seed": sizes.seed,
            "quick": sizes == QUICK,
            "benchmark_seconds": round(time.perf_counter() - started, 1),
            **machine.describe(),
        },
        methods,
        query_ids,
    )


def write_rankings(data: Data, sizes: Sizes) -> None:
    """Write RUN/rankings.parquet: each method's first K images for each query that leave-K-out takes."""
    truth, settings = data.truth, read_settings(data.truth)
    query_ids = chosen_queries(truth.queries, data.config)
    methods = all_scores(data, query_ids, sizes, settings, Timed(), nulls=False)
    methods["abu_plus_exact"] = table_scores(truth.folder / EXACT, truth, query_ids)
    count = removed_count(len(data.corpus), data.config)
    ids = np.array(truth.image_ids)
    rows = [
        {"method": method, "query_id": query_id, "image_ids": ids[np.argsort(-scores, kind="stable")[:count]].tolist()}
        for method in LEAVE_K_OUT
        for query_id, scores in zip(query_ids, methods[method], strict=True)
    ]
    with atomic_path(data.run_dir / RANKINGS) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)


def table_lines(result: Mapping[str, Any]) -> list[str]:
    """The table of docs/truth.md."""
    lines = [
        "| method | residual LDS | all timesteps | plain LDS | mAP(1%) | dL x 1000 | middle dL x 1000 | MSE x 100 | similarity "
        "| groups | s / query |",
        f"|{' --- |' * 11}",
    ]
    lds = ("lds_residual", "lds_residual_all_timesteps", "lds")
    removals = (("dloss", 1000, 2), ("dloss_judged", 1000, 2), ("mse", 100, 2), ("similarity", 1, 3))
    rows = sorted(result["methods"].items(), key=lambda item: -item[1]["lds_residual"])
    for name, row in rows:
        scaled = [(f"leave_k_out_{what}", factor, digits) for what, factor, digits in removals]
        cells = [
            name,
            *(f"{row[key]:.3f} [{row[f'{key}_low']:.3f}, {row[f'{key}_high']:.3f}]" for key in lds),
            _cell(row["map_1pct"], 3),
            *(
                "" if row[key] is None else f"{row[key] * factor:.{digits}f} ± {row[f'{key}_se'] * factor:.{digits}f}"
                for key, factor, digits in scaled
            ),
            _cell(row["group_spearman_residual"], 3),
            _cell(row["seconds_per_query"], 4),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def gain_lines(result: Mapping[str, Any]) -> list[str]:
    """The paired differences of docs/truth.md."""
    lines = ["| difference in residual LDS | middle of the schedule | all timesteps |", "| --- | --- | --- |"]
    for pair, of_metric in result["gains"].items():
        gains = [of_metric[metric] for metric in ("lds_residual", "lds_residual_all_timesteps")]
        cells = [f"{gain['mean']:.3f} [{gain['low']:.3f}, {gain['high']:.3f}]" for gain in gains]
        lines.append(f"| {pair} | {' | '.join(cells)} |")
    return lines


def removal_lines(result: Mapping[str, Any]) -> list[str]:
    """Leave-K-out, methods compared on the same queries, of docs/truth.md."""
    scales = {"dloss": ("dL x 1000", 1000), "dloss_judged": ("middle dL x 1000", 1000), "mse": ("MSE x 100", 100)}
    shown = {**scales, "similarity": ("similarity", 1)}
    lines = [f"| difference | {' | '.join(name for name, _ in shown.values())} |", f"|{' --- |' * (len(shown) + 1)}"]
    for pair, of_measure in result["leave_k_out_gains"].items():
        cells = [
            "{:.2f} [{:.2f}, {:.2f}]".format(*(of_measure[measure][end] * factor for end in ("mean", "low", "high")))
            for measure, (_, factor) in shown.items()
        ]
        lines.append(f"| {pair} | {' | '.join(cells)} |")
    return lines


def sweep_lines(swept: Mapping[str, Any]) -> list[str]:
    """The sweep of docs/truth.md."""
    lines = ["| method | settings | residual LDS | plain LDS | queries |", "| --- | --- | --- | --- | --- |"]
    for row in swept["tried"]:
        figures = {"method", "queries", "lds", "lds_residual", "lds_residual_low", "lds_residual_high"}
        settings = ", ".join(f"{key} {value}" for key, value in row.items() if key not in figures)
        residual = f"{row['lds_residual']:.3f} [{row['lds_residual_low']:.3f}, {row['lds_residual_high']:.3f}]"
        lines.append(f"| {row['method']} | {settings} | {residual} | {row['lds']:.3f} | {row['queries']} |")
    return lines


def ceiling_lines(swept: Mapping[str, Any]) -> list[str]:
    """The noise ceilings by part of the schedule, of docs/truth.md."""
    ceilings = swept["noise_ceilings"]
    edges = [position / len(ceilings) for position in range(len(ceilings) + 1)]
    spans = [f"{low:.1%} to {high:.1%}" for low, high in pairwise(edges)]
    return [
        f"| part of the schedule | {' | '.join(spans)} |",
        f"| --- |{' --- |' * len(spans)}",
        f"| noise ceiling ({swept['models']} models) | {' | '.join(f'{value:.3f}' for value in ceilings)} |",
    ]


def head_lines(result: Mapping[str, Any]) -> list[str]:
    """What stands above the table: how much was measured, where, how long."""
    kinds = ("noise_ceiling", "noise_ceiling_all_timesteps", "noise_ceiling_plain")
    ceilings = [_cell(result[kind], 3) or "unknown" for kind in kinds]
    return [
        f"`{result['command']}`, seed {result['seed']}: {result['n_models']} models on {result['n_subsets']} random halves, "
        f"{result['n_queries']} test queries; noise ceiling {ceilings[0]} (residual), "
        f"{ceilings[1]} (residual, all timesteps), {ceilings[2]} (plain). "
        f"{result['cpu']}, {result['cores']} cores, {result['benchmark_seconds'] / 60:.1f} minutes, {result['date'][:10]}."
    ]


def fill(path: Path, parts: Mapping[str, Iterable[str]]) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- end NAME -->` in a document.

    Raises:
        InputError: the document lacks a pair of marks.
    """
    text = path.read_text(encoding="utf-8")
    for name, lines in parts.items():
        opening, closing = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        before, found, rest = text.partition(opening)
        _, ended, after = rest.partition(closing)
        if not found or not ended:
            raise InputError(f"{path} lacks the marks {opening.strip()} and {closing}.")
        text = before + opening + "\n".join(lines) + "\n" + closing + after
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Do one of the four things."""
    parser = argparse.ArgumentParser(description="Compare all methods with what retraining does.")
    parser.add_argument("--truth", type=Path, default=ground_truth.OUT, help="ground truth folder (%(default)s)")
    parser.add_argument("--run", type=Path, default=Path("runs/bench"), help="run folder with the corpus (%(default)s)")
    parser.add_argument("--config", type=Path, default=ground_truth.CONFIG, help="the benchmark's settings (%(default)s)")
    parser.add_argument("--corpus", type=Path, help="a finished emoji corpus; else it is built in the run folder")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the numbers are written (%(default)s)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="document whose tables are replaced (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer queries and draws, no document: about 4 minutes")
    what = parser.add_mutually_exclusive_group()
    for name in ("sweep", "exact", "rankings"):
        what.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else Sizes()
    config = read_yaml(options.config, RetrainConfig)
    data = open_data(options.truth, options.run, config, sizes, options.corpus)
    if options.sweep:
        write_json(data.truth.folder / SETTINGS, sweep(data, sizes))
    elif options.exact:
        score_exactly(data, sizes, read_settings(data.truth))
    elif options.rankings:
        write_rankings(data, sizes)
    else:
        result, methods, query_ids = report(data, sizes)
        print("\n".join([*head_lines(result), "", *table_lines(result), "", *gain_lines(result), "", *removal_lines(result)]))
        if not options.quick:
            write_json(options.json, result)
            shown = {name: methods[name] for name in (*TEACHERS, "student", "similarity_both")}
            write_truth_report(options.docs.parent / "truth", result, data.truth, shown, query_ids)
            swept = read_json(data.truth.folder / SETTINGS)
            fill(
                options.docs,
                {
                    "measured": head_lines(result),
                    "table": table_lines(result),
                    "gains": gain_lines(result),
                    "removals": removal_lines(result),
                    "ceilings": ceiling_lines(swept),
                    "sweep": sweep_lines(swept),
                },
            )


if __name__ == "__main__":
    try:
        main()
    except FastattrError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
