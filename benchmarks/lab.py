"""emoji-bench's generator with the corpus and the queries, encoded: what the library's teachers and encoders work on."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from ground_truth import AUTOENCODER, CONFIG, OUT, open_run
from PIL import Image

from fastattr.core.files import read_json, sha256_file
from fastattr.core.stages import fingerprint, require_same
from fastattr.corpus.store import Corpus
from fastattr.evaluation.subsets import RetrainConfig
from fastattr.evaluation.truth import GroundTruth
from fastattr.features.diffusion import DiffusionEncoder
from fastattr.features.encoder import Encoder, encode_all
from fastattr.features.kinds import open_encoder
from fastattr.generators.families import CROSS_ATTENTION_KV, Conditioning
from fastattr.generators.generator import Generator
from fastattr.gradients.ekfac import Factors, fit_ekfac
from fastattr.gradients.losses import EncodedImages, encode_corpus, image_losses
from fastattr.teachers.config import TeacherConfig
from fastattr.teachers.fitted import FittedTeacher
from fastattr.teachers.task import factor_batches, layers_to_unlearn
from fastattr.teachers.unlearning import exact_scores, query_step

SETTINGS = "settings.json"
"""In the ground truth folder: what benchmarks/truth_sweep.py chose, and all that it tried."""
EXACT = "exact"
"""In the ground truth folder: the exact teacher's score table of the test queries."""
BATCH = 128
ALL_LAYERS = r"."
FEATURES = ("image", "text", "diffusion")
"""Feature spaces that need no gradient."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the sweep chooses, and from where it starts."""

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
    def methods(self) -> dict[str, dict[str, Any]]:
        """Of every teacher that is fitted once and scores by inner products, what its `TeacherConfig` says."""
        fewer = max(2, self.query_draws // 4 // 2 * 2)
        unlearned = {"pattern": self.pattern, "damping": self.damping, "query_draws": self.query_draws}
        outputs = {"query_draws": fewer, "ridge": self.d_trak_ridge}
        return {
            "abu_plus_linearised": {"method": "first-order", **unlearned},
            "abu_diagonal": {"method": "first-order", **unlearned, "curvature": "diagonal", "damping": self.diagonal_damping},
            "trak": {"method": "trak", **unlearned, "pattern": self.trak_pattern, "ridge": self.trak_ridge},
            "d_trak": {"method": "d-trak", "pattern": self.d_trak_pattern, **outputs},
            "d_trak_ekfac": {"method": "d-trak-ekfac", **unlearned, **outputs},
        }

    def at_most(self, query_draws: int, loss_draws: int) -> Settings:
        """These, with no more draws than that."""
        return replace(self, query_draws=min(self.query_draws, query_draws), loss_draws=min(self.loss_draws, loss_draws))


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


@dataclass(frozen=True)
class Cost:
    """How much is computed, whatever is chosen."""

    factor_examples: int = 2048
    exact_query_draws: int = 512
    """(timestep, noise) pairs of a query's gradient for the exact teacher, whose time goes into other things."""
    exact_draws: int = 16
    """(timestep, noise) pairs of a training image's loss under the exact teacher."""
    gradient_width: int = 0
    """Numbers kept of a gradient; 0 keeps all, which takes some gigabytes."""
    batch_size: int = 64
    seed: int = 0


class Lab:
    """One generator's view of the corpus and of queries, and what the library's teachers make of it."""

    def __init__(self, generator: Generator, corpus: EncodedImages, truth: GroundTruth, settings: Settings, cost: Cost) -> None:
        self.generator, self.corpus, self.truth, self.settings, self.cost = generator, corpus, truth, settings, cost
        self._factors: dict[bool, Factors] = {}

    def queries(self, query_ids: Sequence[str]) -> EncodedImages:
        """Queries, encoded as training images are."""
        parts = [query_ids[start : start + BATCH] for start in range(0, len(query_ids), BATCH)]
        latents = [self.generator.encode_image([self.truth.image(query_id) for query_id in part]) for part in parts]
        texts = [self.generator.encode_prompt([self.truth.prompt(query_id) for query_id in part]) for part in parts]
        conditioning = Conditioning.concatenated(texts)
        return EncodedImages(list(query_ids), torch.cat(latents)[:, None], conditioning, np.arange(len(query_ids) + 1))

    def config(self, **settings: Any) -> TeacherConfig:
        """Of a teacher; what is not named is as everywhere here."""
        common = {"antithetic": True, "loss_draws": self.settings.loss_draws}
        shared = {name: getattr(self.cost, name) for name in ("factor_examples", "gradient_width", "batch_size", "seed")}
        return TeacherConfig(**{**common, **shared, **settings})

    def factors(self, *, diagonal: bool = False) -> Factors:
        """Curvature of all layers, fitted once; each layer's is the same whichever others are unlearned."""
        if diagonal not in self._factors:
            layers = layers_to_unlearn(self.generator, ALL_LAYERS)
            batches = factor_batches(self.generator, self.corpus, self.config())
            self._factors[diagonal] = fit_ekfac(layers, batches, diagonal=diagonal)
        return self._factors[diagonal]

    def fit(self, method: str) -> FittedTeacher:
        """One of `Settings.methods`, fitted; whole gradients of the corpus are gigabytes, so keep none longer than needed."""
        config = self.config(**self.settings.methods[method])
        factors = self.factors(diagonal=config.curvature == "diagonal")
        return FittedTeacher.fit(self.generator, self.corpus, config, factors=factors)

    def scores(self, teacher: FittedTeacher, query_ids: Sequence[str]) -> np.ndarray:
        """(Q, N) scores by a fitted teacher."""
        parts = [query_ids[start : start + BATCH] for start in range(0, len(query_ids), BATCH)]
        return np.concatenate([teacher.scores(self.queries(part)) for part in parts])

    @cached_property
    def base_losses(self) -> np.ndarray:
        """(N, 1) losses of the training images under the generator's own weights."""
        rows, cost = np.arange(len(self.corpus.image_ids)), self.cost
        drawn = {"draws": cost.exact_draws, "batch_size": 2 * cost.batch_size, "seed": cost.seed}
        return image_losses(self.generator, self.corpus, rows, **drawn)

    def exact(self, query_ids: Sequence[str], rise: float | None = None) -> np.ndarray:
        """(Q, N) exact scores: losses after the query's unlearning step less losses before it."""
        chosen, cost = self.settings, self.cost
        config = self.config(
            pattern=chosen.pattern,
            damping=chosen.damping,
            query_loss_rise=chosen.rise if rise is None else rise,
            query_draws=cost.exact_query_draws,
            loss_draws=cost.exact_draws,
        )
        layers, rows = layers_to_unlearn(self.generator, chosen.pattern), np.arange(len(self.corpus.image_ids))
        scores = []
        for query_id in query_ids:
            latent = self.generator.encode_image([self.truth.image(query_id)])
            query = {"latent": latent, "prompt": self.truth.prompt(query_id), "query_id": query_id}
            step, _ = query_step(self.generator, layers, self.factors(), **query, config=config)
            losses, step_of = self.base_losses, replace(config, batch_size=2 * cost.batch_size)
            scores.append(exact_scores(self.generator, layers, self.corpus, losses, step, candidate_rows=rows, config=step_of))
        return np.stack(scores)


@dataclass(frozen=True)
class Bench:
    """Ground truth, corpus and the generator that drew the queries, opened."""

    truth: GroundTruth
    config: RetrainConfig
    run_dir: Path
    corpus: Corpus
    lab: Lab

    def open_lab(self, name: str) -> Lab:
        """Of a generator of the ground truth folder, with the settings of this one."""
        generator = open_generator(self.truth.folder / name, self.truth.manifest["inputs"]["autoencoder"])
        return _lab(generator, self.truth, self.corpus, self.run_dir, self.lab.settings, self.lab.cost)

    @cached_property
    def encoders(self) -> dict[str, Encoder]:
        """Frozen encoders by the name of their space."""
        own: Encoder = DiffusionEncoder(self.lab.generator)
        return {"image": open_encoder("open_clip-image:emoji"), "text": open_encoder("open_clip-text:emoji"), "diffusion": own}

    def images(self, space: str) -> np.ndarray:
        """(N, F) frozen features of the training images."""
        return self._encode(space, self.corpus.image, self.corpus.captions)

    def queries(self, query_ids: Sequence[str], space: str) -> np.ndarray:
        """(Q, F) frozen features of queries."""
        prompts = [[self.truth.prompt(query_id)] for query_id in query_ids]
        return self._encode(space, lambda row: self.truth.image(query_ids[row]), prompts)

    def _encode(self, space: str, images: Callable[[int], Image.Image], captions: Sequence[Sequence[str]]) -> np.ndarray:
        return encode_all(self.encoders[space], images, captions, batch_size=BATCH).astype(np.float32)

    def in_order(self, scores: np.ndarray) -> np.ndarray:
        """(..., N) scores in the corpus' order -> in the order of the ground truth's images."""
        return scores[..., self.corpus.rows(self.truth.image_ids)]


def open_bench(
    truth_dir: Path, run_dir: Path, config: RetrainConfig, source: Path | None, settings: Settings, cost: Cost
) -> Bench:
    """Open everything; the corpus is taken from RUN or built there.

    Raises:
        ArtifactMismatchError: the run is of another corpus, or the kept generator did not draw the queries.
    """
    truth = GroundTruth(truth_dir)
    corpus = open_run(config, run_dir, source).corpus
    require_same(
        f"the corpus of {run_dir}",
        corpus.fingerprint,
        truth.corpus_fingerprint,
        f"The ground truth {truth_dir} belongs to another corpus; give another run folder.",
    )
    generator = open_generator(truth.folder / "generator", truth.manifest["inputs"]["autoencoder"])
    require_same(
        "the generator of the ground truth",
        generator.fingerprint,
        truth.queries["generator"][0].as_py(),
        "It did not draw the queries; make the ground truth again.",
    )
    return Bench(truth, config, run_dir, corpus, _lab(generator, truth, corpus, run_dir, settings, cost))


def _lab(generator: Generator, truth: GroundTruth, corpus: Corpus, run_dir: Path, settings: Settings, cost: Cost) -> Lab:
    folder = run_dir / "encoded" / fingerprint([generator.fingerprint, corpus.fingerprint])
    return Lab(generator, encode_corpus(generator, corpus, batch_size=BATCH, folder=folder), truth, settings, cost)


def read_settings(truth_dir: Path) -> Settings:
    """What the sweep chose.

    Raises:
        ArtifactNotFoundError: it has not run.
    """
    found: Mapping[str, Any] = read_json(truth_dir / SETTINGS)["chosen"]
    return Settings(**found)


def options_of(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options that all scripts on emoji-bench share, and the parser's own."""
    parser.add_argument("--truth", type=Path, default=OUT, help="ground truth folder (%(default)s)")
    parser.add_argument("--run", type=Path, default=Path("runs/bench"), help="run folder with the corpus (%(default)s)")
    parser.add_argument("--config", type=Path, default=CONFIG, help="the benchmark's settings (%(default)s)")
    parser.add_argument("--corpus", type=Path, help="a finished emoji corpus; else it is built in the run folder")
    return parser.parse_args(arguments)
