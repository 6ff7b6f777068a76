"""What scoring the queries of a run needs: the opened stages, what all queries share, and the shards of what is done."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from fastattr.core.errors import FastattrError
from fastattr.core.files import atomic_path, read_json, write_json
from fastattr.core.processes import in_parts, split_between
from fastattr.core.stages import fingerprint, make
from fastattr.corpus.store import Corpus
from fastattr.features.store import write_features
from fastattr.generators.families import Layer, Layers
from fastattr.generators.generator import Generator
from fastattr.generators.queries import Queries
from fastattr.generators.schedules import noise_for
from fastattr.gradients.compression import SCALE_ROWS, Compression, GradientConfig, gradient_features, leading_coordinates
from fastattr.gradients.ekfac import MADE_OF, Factors, fit_ekfac
from fastattr.gradients.losses import EncodedImages, encode_corpus, image_losses
from fastattr.teachers.config import TeacherConfig, teacher_name
from fastattr.teachers.scores import ScoredQuery, write_shard
from fastattr.teachers.unlearning import GaussNewton, query_step

logger = logging.getLogger(__name__)

ENCODED_ROWS = 128
"""Training images that are encoded at once, whatever the settings, so that every run finds what another one kept."""
PART_ROWS = 512
"""Images whose features go into one file; a killed run loses at most one part."""
TRIES = 3
"""How often a failing query is tried before it is passed over."""


def layers_to_unlearn(generator: Generator, pattern: str) -> dict[str, Layer]:
    """The layers whose gradients a teacher takes, ready for that."""
    layers = generator.modules_to_unlearn(pattern)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    return layers


def factor_batches(
    generator: Generator, images: EncodedImages, config: TeacherConfig, accelerator: Accelerator | None = None
) -> Callable[[], Iterator[Tensor]]:
    """What `fit_ekfac` asks for: per-example losses on random images of the corpus; each process gets its own batches."""
    rng, count = np.random.default_rng([config.seed, 7]), config.factor_examples
    rows = rng.choice(len(images.image_ids), size=count, replace=count > len(images.image_ids))
    timesteps = rng.integers(0, generator.train_timesteps, size=count)
    views = rng.integers(0, images.views, size=count)
    captions = rng.integers(images.first_caption[rows], images.first_caption[rows + 1])
    index, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)

    def batches() -> Iterator[Tensor]:
        starts = range(0, count, config.batch_size)[index::processes]
        for start in tqdm(starts, desc="EKFAC factors", unit="batch", disable=index > 0):
            part = slice(start, start + config.batch_size)
            ids = [f"factor/{position}" for position in range(count)[part]]
            drawn: dict[str, Any] = {"seed": config.seed, "shape": generator.latent_shape}
            noise, target_noise = (noise_for(ids, [draw] * len(ids), **drawn).to(generator.device) for draw in (0, 1))
            latents, told = images.latents[rows[part], views[part]], images.conditioning[captions[part]]
            times = torch.from_numpy(timesteps[part]).to(generator.device)
            arguments = (latents.to(generator.device), told.to(generator.device), times, noise)
            true = config.fisher == "true"
            yield generator.sampled_loss(*arguments, target_noise) if true else generator.training_loss(*arguments)

    return batches


def write_gradient_features(
    folder: Path,
    generator: Generator,
    layers: Layers,
    images: EncodedImages,
    compression: Compression,
    config: GradientConfig,
    accelerator: Accelerator,
    *,
    inputs: Mapping[str, str],
) -> dict[str, Any]:
    """Write the gradient features of all images, in parts split over the processes and kept if killed.

    `folder` gets features.npy, (N, k) float16, ids.parquet and manifest.json, as every feature folder has them; if it has them
    already, nothing is done. `inputs`: fingerprints of what they are made from besides the generator, 'source' (the corpus)
    and others. In the manifest, which is returned, 'scale' is the factor on the stored numbers, since half precision needs
    them near 1: true features = stored / scale; 'bytes_per_image' is what the store keeps of each.
    """
    parts = folder / f"parts-{fingerprint([config.identity, generator.fingerprint, list(images.image_ids), sorted(layers)])}"

    def features(rows: range) -> np.ndarray:
        return gradient_features(generator, layers, images, np.array(rows), compression, config)

    def work() -> dict[str, Any]:
        sample = features(range(min(SCALE_ROWS, len(images.image_ids))))
        scale = float(1 / np.sqrt(np.mean(sample.astype(np.float64) ** 2)))

        def part(rows: range) -> np.ndarray:
            return (features(rows) * scale).astype(np.float16)

        stored = in_parts(parts, len(images.image_ids), PART_ROWS, part, accelerator, description="gradient features")
        if accelerator.is_main_process:
            write_features(folder, stored, images.image_ids)
        return {"layers": sorted(layers), "scale": scale, "bytes_per_image": stored[0].nbytes}

    made_of = {"generator": generator.fingerprint, **inputs}
    return make(folder, work, stage="features", config=config, inputs=made_of, accelerator=accelerator, temporary=[parts])


@dataclass(frozen=True)
class Task:
    """What scoring any query of a run needs."""

    generator: Generator
    layers: Layers
    corpus: Corpus
    queries: Queries
    candidates: Mapping[str, tuple[list[str], np.ndarray]]
    candidate_rows: Mapping[str, np.ndarray]
    given_factors: Factors | None
    config: TeacherConfig
    accelerator: Accelerator
    run_dir: Path
    shards: Path
    models: tuple[Generator, ...] = ()
    """Other generators over which the mean is taken too."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of the parts of the work, of the run that finished."""

    def members(self) -> list[Task]:
        """The tasks whose scores this one is the mean of: every method on every model; their shards lie beside the mean's."""
        found = []
        for number, generator in enumerate((self.generator, *self.models)):
            layers = layers_to_unlearn(generator, self.config.pattern) if number else self.layers
            generator.evaluations = self.generator.evaluations  # one account of what is spent
            for config in self.config.members_of():
                task = replace(self, generator=generator, layers=layers, config=config, models=())
                own = self.shards / f"{config.method}-{number}"
                found.append(replace(task, shards=own, given_factors=None if number else self.given_factors))
        return found

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the time until its end to `seconds[part]`."""
        started = time.monotonic()
        yield
        self.seconds[part] = round(self.seconds.get(part, 0.0) + time.monotonic() - started, 2)

    def encode_corpus(self) -> EncodedImages:
        """The corpus as the denoiser sees it; kept for the next run."""
        with self.timed("encode"):
            folder = self.run_dir / "encoded" / fingerprint([self.generator.fingerprint, self.corpus.fingerprint])
            seen: dict[str, Any] = {"captions": self.config.captions, "mirrored": self.config.mirrored}
            parts: dict[str, Any] = {"batch_size": ENCODED_ROWS, "folder": folder, "accelerator": self.accelerator}
            return encode_corpus(self.generator, self.corpus, **parts, **seen)

    def rows_of(self, row: int) -> np.ndarray:
        """(C,) rows in the corpus of the candidates of query `row`."""
        return self.candidate_rows[self.queries.query_ids[row]]

    def shard(self, row: int) -> Path:
        """Where the scores of query `row` are kept until all are there."""
        return self.shards / f"{self.queries.query_ids[row]}.parquet"

    def write(self, row: int, influence: np.ndarray, rise: float) -> None:
        """Keep the scores of query `row`."""
        query_id, split = self.queries.query_ids[row], self.queries.splits[row]
        image_ids, is_outsider = self.candidates[query_id]
        scored = ScoredQuery(query_id, self.queries.prompts[row], split, image_ids, influence, is_outsider, rise)
        made_by = {"teacher": teacher_name(self.config, [split]), "config": fingerprint(vars(self.config))}
        write_shard(self.shard(row), [scored], **made_by)

    def failure(self, row: int) -> Path:
        """Where it is recorded that query `row` failed."""
        return self.shard(row).with_suffix(".failed.json")

    def attempt(self, row: int, work: Callable[[int], None]) -> None:
        """Do `work` for query `row`; if it fails `TRIES` times, record the error and pass on."""
        for trial in range(TRIES):
            try:
                work(row)
            except (FastattrError, RuntimeError, OSError) as error:  # RuntimeError: torch, also out of memory
                logger.warning("query %s failed (try %d of %d): %s", self.queries.query_ids[row], trial + 1, TRIES, error)
                write_json(self.failure(row), {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"})
            else:
                self.failure(row).unlink(missing_ok=True)
                return

    def attempt_all(self, rows: Sequence[int], work: Callable[[int], None], *, description: str) -> None:
        """`attempt` these queries, split over the processes; those with a shard are done."""
        todo = [row for row in rows if not self.shard(row).exists()]
        with self.timed(description), split_between(self.accelerator, todo) as mine:
            for row in tqdm(mine, desc=description, unit="query", disable=not self.accelerator.is_main_process):
                self.attempt(row, work)

    def failures(self) -> dict[str, str]:
        """Error by query id, of all queries that have no scores."""
        rows = [row for row in range(len(self.queries.query_ids)) if not self.shard(row).exists()]
        return {self.queries.query_ids[row]: read_json(self.failure(row))["error"] for row in rows}

    def query(self, row: int) -> dict[str, Any]:
        """The query as `query_step` takes it."""
        latent = self.generator.encode_image([self.queries.image(row)])
        return {"latent": latent, "prompt": self.queries.prompts[row], "query_id": self.queries.query_ids[row]}

    def curved(self, images: EncodedImages) -> GaussNewton | None:
        """The Gauss-Newton matrix, where the settings ask for a better inverse than EKFAC's."""
        config = self.config
        sizes = {"examples": config.inverse_examples, "batch_size": config.batch_size, "seed": config.seed}
        return GaussNewton(self.generator, self.layers, images, **sizes) if config.inverse_steps else None

    def step(self, row: int, factors: Factors, matrix: GaussNewton | None) -> tuple[dict[str, Tensor], float]:
        """The change of weights that unlearns query `row`, and the rise of its loss that it gives to first order."""
        return query_step(self.generator, self.layers, factors, **self.query(row), config=self.config, matrix=matrix)

    def factors(self, images: EncodedImages) -> Factors:
        """Curvature: the user's, one fitted earlier, or one fitted now by all processes together."""
        with self.timed("factors"):
            return self.given_factors or self._fitted_factors(images)

    def _fitted_factors(self, images: EncodedImages) -> Factors:
        """Of a folder named by all that determines them, so nothing stale is ever picked up."""
        config, accelerator = self.config, self.accelerator
        made_of = {"generator": self.generator.fingerprint, "corpus": self.corpus.fingerprint}
        settings = ("curvature", "fisher", "factor_examples", "captions", "mirrored", "batch_size", "seed")
        identity = [made_of, sorted(self.layers), [getattr(config, name) for name in settings]]
        folder = self.run_dir / "ekfac" / fingerprint(identity)
        accelerator.wait_for_everyone()
        if not (folder / MADE_OF).exists():
            batches = factor_batches(self.generator, images, config, accelerator)
            factors = fit_ekfac(self.layers, batches, accelerator=accelerator, diagonal=config.curvature == "diagonal")
            if accelerator.is_main_process:
                factors.save(folder, made_of=made_of)
        accelerator.wait_for_everyone()
        return Factors.load(folder, self.layers, made_of=made_of)

    def base_loss(self, images: EncodedImages) -> np.ndarray:
        """(N, V) base losses of the corpus, measured in parts that are split over the processes and kept for the next run."""
        config = self.config
        settings: list[Any] = [config.loss_draws, config.captions, config.mirrored, config.seed]
        settings += [list(config.span)] if config.span != (0.0, 1.0) else []
        folder = self.run_dir / "base_loss" / fingerprint([self.generator.fingerprint, self.corpus.fingerprint, *settings])

        def losses(rows: range) -> np.ndarray:
            return image_losses(self.generator, images, np.array(rows), **config.measured)

        return in_parts(folder, len(images.image_ids), PART_ROWS, losses, self.accelerator, description="base loss")

    def stored_gradients(
        self, images: EncodedImages, settings: GradientConfig, factors: Factors | None
    ) -> tuple[np.ndarray, float, Compression]:
        """(N, k) half-precision gradient features of the corpus, memory-mapped, the factor on them, and their compression."""
        inputs = {"source": self.corpus.fingerprint, "layers": fingerprint(sorted(self.layers))}
        inputs |= {"views": str(images.views), "captions": self.config.captions}
        inputs |= {} if factors is None else {"factors": factors.fingerprint}
        folder = self.run_dir / "gradients" / fingerprint([self.generator.fingerprint, inputs, settings.identity])
        coordinates, kept = None, folder / "coordinates.npy"
        with self.timed("gradient store"):
            if factors is not None and settings.width:
                if self.accelerator.is_main_process and not kept.exists():
                    with atomic_path(kept) as temporary:
                        np.save(temporary, leading_coordinates(self.generator, self.layers, images, factors, settings))
                self.accelerator.wait_for_everyone()
                coordinates = np.load(kept)
            compression = Compression(self.layers, settings, factors, coordinates)
            of_model = (self.generator, self.layers, images, compression, settings)
            manifest = write_gradient_features(folder, *of_model, self.accelerator, inputs=inputs)
        return np.load(folder / "features.npy", mmap_mode="r"), manifest["scale"], compression
