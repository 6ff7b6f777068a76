"""emoji-bench's generator with the corpus and the queries, encoded: what the library's teachers and encoders work on.

`sweep` chooses the teachers' settings: `python benchmarks/truth.py --sweep`.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from ground_truth import AUTOENCODER, CONFIG, OUT, open_run
from PIL import Image

from fastattr.core.errors import NonFiniteError
from fastattr.core.files import atomic_path, read_json, sha256_file
from fastattr.core.stages import fingerprint, require_same
from fastattr.corpus.store import Corpus
from fastattr.evaluation.against_truth import compare_with_truth
from fastattr.evaluation.lds import noise_ceiling, outputs_of, residual_outputs
from fastattr.evaluation.subsets import RetrainConfig
from fastattr.evaluation.truth import GroundTruth
from fastattr.features.by_generator import DiffusionEncoder
from fastattr.features.encoder import Encoder, encode_all
from fastattr.features.kinds import open_encoder
from fastattr.generators.families import CROSS_ATTENTION_KV, Conditioning
from fastattr.generators.generator import Generator
from fastattr.gradients.ekfac import Factors, fit_ekfac
from fastattr.gradients.losses import EncodedImages, encode_corpus, image_losses
from fastattr.students.distill import DistillConfig, distill
from fastattr.students.pairs import labels_of, make_table
from fastattr.students.student import Student
from fastattr.teachers.config import TeacherConfig
from fastattr.teachers.fitted import FittedTeacher
from fastattr.teachers.scores import ScoredQuery
from fastattr.teachers.task import factor_batches, layers_to_unlearn
from fastattr.teachers.unlearning import exact_scores, query_step

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"
"""In the ground truth folder: what the sweep chose, and all that it tried."""
EXACT = "exact"
"""In the ground truth folder: the exact teacher's score table of the test queries."""
BATCH = 128
ALL_LAYERS = r"."
FEATURES = ("image", "text", "diffusion")
"""Feature spaces that need no gradient."""
PATTERNS = (CROSS_ATTENTION_KV, r"attn2\.", r"attentions\.", ALL_LAYERS)
"""Weights to unlearn that the sweep tries: text-side keys and values, cross-attention, attention blocks, the U-Net."""
DAMPINGS, RIDGES = (0.01, 0.1, 1.0, 10.0), (0.001, 0.01, 0.1, 1.0, 10.0)
MOST_DRAWS = {"query_draws": 512, "loss_draws": 128}
"""With which weights, damping and ridges are compared."""
DRAWS = {"query_draws": (64, 128, 512), "loss_draws": (4, 16, 32, 128)}
STEPS: tuple[tuple[str, dict[str, tuple[Any, ...]]], ...] = (
    ("abu_plus_linearised", {"pattern": PATTERNS, "damping": DAMPINGS}),
    ("abu_diagonal", {"diagonal_damping": DAMPINGS}),
    ("abu_plus_linearised", DRAWS),
    ("abu_plus_exact", {"rise": (0.005, 0.02, 0.1, 0.5)}),
    ("trak", {"trak_pattern": PATTERNS, "trak_ridge": RIDGES}),
    ("d_trak", {"d_trak_pattern": PATTERNS, "d_trak_ridge": RIDGES}),
)
"""Teacher, and the values of `Settings` that are tried for it, in every combination."""
SPARED_LDS = 0.005
"""Of draws, the cheapest are chosen whose residual LDS is within this of the best."""
EXACT_QUERIES = 26
"""Queries on which the exact step's size is chosen."""


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
    """A generator of a ground truth folder, with the embedded autoencoder, if it was made with that one."""
    fix = "The ground truth was made with another one; make it again, or use the fastattr that it was made with."
    found = sha256_file(AUTOENCODER / "diffusion_pytorch_model.safetensors")
    require_same("the embedded autoencoder", found, autoencoder_sha256, fix)
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


def _batches(ids: Sequence[str]) -> list[Sequence[str]]:
    return [ids[start : start + BATCH] for start in range(0, len(ids), BATCH)]


class Lab:
    """One generator's view of the corpus and of queries, and what the library's teachers make of it."""

    def __init__(self, generator: Generator, corpus: EncodedImages, truth: GroundTruth, settings: Settings, cost: Cost) -> None:
        self.generator, self.corpus, self.truth, self.settings, self.cost = generator, corpus, truth, settings, cost
        self._factors: dict[bool, Factors] = {}

    def queries(self, query_ids: Sequence[str]) -> EncodedImages:
        """Queries, encoded as training images are."""
        parts = _batches(query_ids)
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
        return np.concatenate([teacher.scores(self.queries(part)) for part in _batches(query_ids)])

    @cached_property
    def base_losses(self) -> np.ndarray:
        """(N, 1) losses of the training images under the generator's own weights."""
        rows, cost = np.arange(len(self.corpus.image_ids)), self.cost
        drawn = {"draws": cost.exact_draws, "batch_size": 2 * cost.batch_size, "seed": cost.seed}
        return image_losses(self.generator, self.corpus, rows, **drawn)

    def exact(self, query_ids: Sequence[str]) -> np.ndarray:
        """(Q, N) exact scores: losses after the query's unlearning step less losses before it."""
        chosen, cost = self.settings, self.cost
        step_of = {"pattern": chosen.pattern, "damping": chosen.damping, "query_loss_rise": chosen.rise}
        config = self.config(**step_of, query_draws=cost.exact_query_draws, loss_draws=cost.exact_draws)
        layers, rows = layers_to_unlearn(self.generator, chosen.pattern), np.arange(len(self.corpus.image_ids))
        scores = []
        for query_id in query_ids:
            latent = self.generator.encode_image([self.truth.image(query_id)])
            query = {"latent": latent, "prompt": self.truth.prompt(query_id), "query_id": query_id}
            step, _ = query_step(self.generator, layers, self.factors(), **query, config=config)
            asked = {"candidate_rows": rows, "config": replace(config, batch_size=2 * cost.batch_size)}
            scores.append(exact_scores(self.generator, layers, self.corpus, self.base_losses, step, **asked))
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
    """Open everything, if it belongs together; the corpus is taken from RUN or built there."""
    truth, corpus = GroundTruth(truth_dir), open_run(config, run_dir, source).corpus
    fix = f"The ground truth {truth_dir} belongs to another corpus; give another run folder."
    require_same(f"the corpus of {run_dir}", corpus.fingerprint, truth.corpus_fingerprint, fix)
    generator = open_generator(truth.folder / "generator", truth.manifest["inputs"]["autoencoder"])
    drew, fix = truth.queries["generator"][0].as_py(), "It did not draw the queries; make the ground truth again."
    require_same("the generator of the ground truth", generator.fingerprint, drew, fix)
    return Bench(truth, config, run_dir, corpus, _lab(generator, truth, corpus, run_dir, settings, cost))


def _lab(generator: Generator, truth: GroundTruth, corpus: Corpus, run_dir: Path, settings: Settings, cost: Cost) -> Lab:
    folder = run_dir / "encoded" / fingerprint([generator.fingerprint, corpus.fingerprint])
    return Lab(generator, encode_corpus(generator, corpus, batch_size=BATCH, folder=folder), truth, settings, cost)


def read_settings(truth_dir: Path) -> Settings:
    """What the sweep chose; ArtifactNotFoundError if it has not run."""
    return Settings(**read_json(truth_dir / SETTINGS)["chosen"])


def sweep(bench: Bench, *, resamples: int = 500) -> dict[str, Any]:
    """Choose the teachers' settings by residual LDS, one step of `STEPS` after the other; returns them and all that was tried.

    To choose among teachers, training queries are as good as validation queries: no teacher has learned from them; test
    queries play no part. Every score is kept in the run folder, so that a killed sweep goes on.
    """
    truth, lab = bench.truth, bench.lab
    every = truth.measured("validation") + truth.measured("train")
    chosen, tried = replace(Settings(), **MOST_DRAWS), []
    for method, values in STEPS:
        query_ids = every[:EXACT_QUERIES] if method == "abu_plus_exact" else every
        found: list[tuple[float, float, Settings]] = []
        for combination in product(*values.values()):
            changes = dict(zip(values, combination, strict=True))
            lab.settings = replace(chosen, **changes)
            try:
                scores = bench.in_order(kept_scores(bench, method, query_ids))
            except NonFiniteError as error:  # so long a step that the network breaks
                logger.warning("%s of %s is no candidate: %s", changes, method, error)
                continue
            row = compare_with_truth({method: scores}, truth, query_ids, resamples=resamples)["methods"][method]
            figures = {key: row[key] for key in ("lds", "lds_residual", "lds_residual_low", "lds_residual_high")}
            tried.append({"method": method, **changes, **figures, "queries": len(query_ids)})
            cost = lab.settings.query_draws * len(query_ids) + lab.settings.loss_draws * len(bench.corpus)
            found.append((row["lds_residual"], cost, lab.settings))
        best = max(residual for residual, _, _ in found) - (SPARED_LDS if values is DRAWS else 0)
        chosen = min((one for one in found if one[0] >= best), key=lambda one: one[1])[2]
    facts = {"models": len(truth.retrained("half", every).model_ids), "splits": ["validation", "train"], "seed": lab.cost.seed}
    return {"chosen": asdict(chosen), "tried": tried, "noise_ceilings": ceilings_by_part(truth, every), **facts}


def kept_scores(bench: Bench, method: str, query_ids: Sequence[str]) -> np.ndarray:
    """(Q, N) scores by the lab's settings, from an earlier sweep if they are there."""
    lab, exact = bench.lab, method == "abu_plus_exact"
    settings = vars(lab.settings) if exact else lab.settings.methods[method] | {"loss_draws": lab.settings.loss_draws}
    made_of = [lab.generator.fingerprint, bench.corpus.fingerprint, list(query_ids), asdict(lab.cost), method, settings]
    path = bench.run_dir / "sweep" / f"{fingerprint(made_of)}.npy"
    if not path.exists():
        scores = lab.exact(query_ids) if exact else lab.scores(lab.fit(method), query_ids)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, scores)
    return np.load(path)


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


def train(
    bench: Bench, query_ids: Sequence[str], queries: np.ndarray, images: np.ndarray, labels: np.ndarray, config: DistillConfig
) -> Student:
    """A student of (Q, N) scores of all training images, on (Q, F) and (N, F) features."""
    corpus, nobody = bench.corpus, np.zeros(len(bench.corpus), dtype=bool)
    scored = [
        ScoredQuery(query_id, bench.truth.prompt(query_id), "train", corpus.image_ids, influence, nobody, 0.0)
        for query_id, influence in zip(query_ids, labels.astype(np.float32), strict=True)
    ]
    known = labels_of(scored, [np.arange(len(corpus))] * len(scored))
    table = make_table(known, corpus_size=len(corpus), kind=config.target_kind)
    with tempfile.TemporaryDirectory() as scratch:
        return distill(table, queries, images, config, checkpoint=Path(scratch) / "checkpoint.safetensors")


def options_of(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options that all scripts on emoji-bench share, and the parser's own."""
    parser.add_argument("--truth", type=Path, default=OUT, help="ground truth folder (%(default)s)")
    parser.add_argument("--run", type=Path, default=Path("runs/bench"), help="run folder with the corpus (%(default)s)")
    parser.add_argument("--config", type=Path, default=CONFIG, help="the benchmark's settings (%(default)s)")
    parser.add_argument("--corpus", type=Path, help="a finished emoji corpus; else it is built in the run folder")
    return parser.parse_args(arguments)
