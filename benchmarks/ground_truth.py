"""Ground truth by retraining: emoji-bench, its small generator trained again and again on parts of its corpus.

    python benchmarks/ground_truth.py --run runs/bench [--processes 2] [--only lds|groups|leave-k-out]

Every model has one recipe (benchmarks/emoji-bench.yaml); the training images and the seed are all that differs:

    full          all images; it draws the queries
    half-I-sS     a random half of the images, some halves with a second seed (for the noise ceiling)
    repeat        the first half and its seed once more: how far do two equal trainings agree?
    group-I       all but the images of one creator or set
    random-I      all but a random 1%
    without-DIGEST
                  all but the 1% that some method holds most influential for some query (RUN/rankings.parquet, which
                  benchmarks/truth.py --rankings writes); methods that name the same images share the model

Each model is a process of its own with one thread, --processes of them side by side. A process trains, resuming from its
last checkpoint, keeps the weights, measures every query's denoising loss under noise that is the same for all models,
and writes both atomically; what is there is not done again, so the command may be killed and started again at any
time. A new run folder takes what the ground truth in --out already has, if recipe, images and queries are the same. Two
trainings with one seed on one machine and one thread are the same bit for bit (tests/evaluation/test_ground_truth.py); on other
processors or library versions they are as two seeds are, for rounding errors grow in training.

Reads the emoji corpus (--corpus, or built from npm packages) and the embedded autoencoder; writes RUN/ and, once models
are there, the ground truth (fastattr/evaluation/truth.py) to --out.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import machine
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPTokenizer

from fastattr.core.errors import ArtifactNotFoundError, FastattrError, InputError, NonFiniteError
from fastattr.core.files import (
    MANIFEST,
    atomic_path,
    fingerprint,
    finished,
    open_stage,
    read_json,
    require_same,
    sha256_file,
    temporary_folder,
    write_json,
    write_manifest,
)
from fastattr.core.models import ASSETS
from fastattr.core.settings import read_yaml
from fastattr.core.training import fit, trapezoid
from fastattr.corpus.store import Corpus, CorpusConfig, write_corpus
from fastattr.evaluation.truth import LOSSES, MODELS, GroundTruth, counterfactuals_schema, write_table
from fastattr.features.kinds import open_encoder
from fastattr.generators import queries as queries_stage
from fastattr.generators.generator import Generator, noise_for, spread_timesteps
from fastattr.generators.queries import Queries, QueriesConfig
from fastattr.generators.scratch.autoencoder import encode_latents, load_images
from fastattr.generators.scratch.denoiser import (
    DenoiserLoss,
    GeneratorConfig,
    build_denoiser,
    build_scheduler,
    tokenize,
    train_tokenizer,
)

CONFIG = Path(__file__).parent / "emoji-bench.yaml"
OUT = Path(__file__).parent / "truth" / "emoji-bench"
AUTOENCODER = ASSETS / "emoji" / "generator" / "vae"
IMAGE_ENCODER = "open_clip-image:emoji"
"""Judges how alike a query and its regeneration look."""
WHAT = ("lds", "groups", "leave-k-out")
RANKINGS = "rankings.parquet"
"""In the run, and kept with the ground truth: whom each method names for each query of leave-K-out."""
LOSS_SEED = 1_000_000
"""Added to the seed for the noise of the measured losses: no teacher may unlearn a query at the noise that judges it."""
OTHER = "half-000-s1"
"""The generator whose teacher is a null: other seed, other training images."""


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """Which images of the corpus are in the benchmark. Skin-tone variants never are."""

    main_set: str = "openmoji"
    """All its subjects."""
    second_set: str = "fluent"
    """A second style for part of the same subjects; the rest leaves recombined prompts to ask for."""
    second_share: float = 0.5
    """How large that part is."""
    groups: tuple[str, ...] = ()
    """Subject classes to take; none means all."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """The benchmark: images, recipe, queries, and how many models."""

    part: PartConfig = field(default_factory=PartConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    queries: QueriesConfig = field(default_factory=QueriesConfig)
    halves: int = 48
    """Random halves of the images."""
    second_seeds: int = 12
    """How many of these are trained with a second seed."""
    random_removals: int = 4
    """Models without a random 1%, to compare leave-K-out with."""
    leave_k_out_queries: int = 12
    """Test queries for which each method's top K are removed."""
    removed_percent: float = 1.0
    """K, in percent of the images."""
    removed_creators: int = 9
    """Creators, those of most images in the main set, each of whom is left out once; the second set is another group."""
    loss_timesteps: int = 32
    """Timesteps at which a query's loss is measured, with one noise and its negative each."""
    judged: tuple[float, float] = (0.375, 0.875)
    """The part of the noise schedule whose losses judge methods; chosen by where two seeds agree (docs/truth.md)."""
    batch_size: int = 128
    """Of measuring."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.second_seeds <= self.halves:
            raise InputError(f"second_seeds must be between 1 and {self.halves} (halves), got {self.second_seeds}")
        if not 0 < self.removed_percent < 100:
            raise InputError(f"removed_percent must be between 0 and 100, got {self.removed_percent}")
        if not self.judged_timesteps.any():
            raise InputError(
                f"judged must span a part of (0, 1) with one of {self.loss_timesteps} timesteps, got {self.judged}"
            )

    @property
    def judged_timesteps(self) -> np.ndarray:
        """(T,) bool, which of the measured timesteps are judged by."""
        middles = (np.arange(self.loss_timesteps) + 0.5) / self.loss_timesteps
        judged: np.ndarray = (self.judged[0] < middles) & (middles < self.judged[1])
        return judged

    @property
    def recipe(self) -> dict[str, Any]:
        """What all models of one run must share; queries may be drawn anew, and the numbers of models may grow."""
        return {"part": self.part, "generator": self.generator}


@dataclass(frozen=True)
class Model:
    """One model to train."""

    model_id: str
    kind: str
    """'full', 'half', 'repeat', 'group', 'random' or 'leave_k_out'."""
    seed: int
    removed: frozenset[str]
    """Ids of the images that it is not trained on."""
    subset: str
    """The same for models that are trained on the same images."""
    method: str = ""
    """Whose ranking chose the removed images (several: with commas between them), or the group's name."""
    counterfactuals: tuple[tuple[str, str], ...] = ()
    """(method, query) pairs for which the images were removed."""

    @property
    def regenerate(self) -> list[str]:
        """Queries to draw again from their own starting noise."""
        return sorted({query_id for _, query_id in self.counterfactuals})


def choose_part(corpus: Corpus, config: PartConfig) -> np.ndarray:
    """(N,) rows of the corpus that belong to the benchmark, in its order.

    Raises:
        InputError: there are none.
    """
    sources, groups = corpus.column("source"), corpus.column("group")
    subjects = [captions[0].rpartition(", ")[0] for captions in corpus.captions]
    usable = [
        row
        for row, (captions, group) in enumerate(zip(corpus.captions, groups, strict=True))
        if "skin tone" not in captions[0] and (not config.groups or group in config.groups)
    ]
    main = {subjects[row] for row in usable if sources[row] == config.main_set}
    doubled = {subject for subject in main if _uniform(f"second set {subject}") < config.second_share}
    rows = [
        row
        for row in usable
        if sources[row] == config.main_set or (sources[row] == config.second_set and subjects[row] in doubled)
    ]
    if not rows:
        raise InputError(f"{corpus.folder} holds no image of {config.main_set!r} in the groups {config.groups}.")
    return np.array(rows)


def _uniform(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) / 16**12


def removed_count(images: int, config: BenchConfig) -> int:
    """K, how many images leave-K-out removes."""
    return max(1, round(images * config.removed_percent / 100))


def halves(image_ids: Sequence[str], config: BenchConfig) -> list[Model]:
    """The models on random halves: the first seed of each, second seeds, and one training repeated."""
    ids = np.array(sorted(image_ids))
    models = []
    for index in range(config.halves):
        order = np.random.default_rng([config.seed, 1, index]).permutation(len(ids))
        removed = frozenset(ids[order[len(ids) // 2 :]].tolist())
        name = f"half-{index:03d}"
        models.append(Model(f"{name}-s0", "half", config.seed + 1, removed, name))
        if index < config.second_seeds:
            models.append(Model(f"{name}-s1", "half", config.seed + 2, removed, name))
    return [*models, replace(models[0], model_id="repeat", kind="repeat")]


def groups(corpus: Corpus, config: BenchConfig) -> list[Model]:
    """The models without one creator of the main set, or without the second set."""
    sources, creators = np.array(corpus.column("source")), np.array(corpus.column("creator"))
    in_main = sources == config.part.main_set
    names, counts = np.unique(creators[in_main], return_counts=True)
    largest = names[np.argsort(-counts, kind="stable")[: config.removed_creators]]
    members = {str(name): in_main & (creators == name) for name in largest}
    members |= {f"the set {config.part.second_set}": sources == config.part.second_set}
    ids = np.array(corpus.image_ids)
    return [
        Model(f"group-{index:02d}", "group", config.seed, frozenset(ids[rows].tolist()), f"group-{index:02d}", name)
        for index, (name, rows) in enumerate(members.items())
        if rows.any()
    ]


def chosen_queries(queries: pa.Table, config: BenchConfig) -> list[str]:
    """Test queries for leave-K-out: as many of each kind of prompt as can be, in a random order that is fixed."""
    query_ids, kinds = queries["query_id"].to_pylist(), queries["kind"].to_pylist()
    test = [row for row, split in enumerate(queries["split"].to_pylist()) if split == "test"]
    by_kind: dict[str, list[str]] = {}
    for row in np.random.default_rng([config.seed, 2]).permutation(test):
        by_kind.setdefault(kinds[row], []).append(query_ids[row])
    longest = max(map(len, by_kind.values()))
    turns = [of_kind[turn] for turn in range(longest) for _, of_kind in sorted(by_kind.items()) if turn < len(of_kind)]
    return turns[: config.leave_k_out_queries]


def removals(corpus: Corpus, queries: Queries, rankings: Path, config: BenchConfig) -> list[Model]:
    """The models without a random 1%, and, where `rankings` exists, without each method's top K for each chosen query.

    Raises:
        InputError: a ranking is shorter than K or names an unknown image.
    """
    count, chosen = removed_count(len(corpus), config), tuple(chosen_queries(queries.table, config))
    ids = np.array(sorted(corpus.image_ids))
    models = []
    for index in range(config.random_removals):
        drawn = np.random.default_rng([config.seed, 3, index]).choice(ids, count, replace=False)
        name = f"random-{index:02d}"
        pairs = tuple(("random", query_id) for query_id in chosen)
        models.append(Model(name, "random", config.seed, frozenset(drawn.tolist()), name, "random", pairs))
    wanted: dict[frozenset[str], list[tuple[str, str]]] = {}
    for row in pq.read_table(rankings).to_pylist() if rankings.exists() else []:
        top = row["image_ids"][:count]
        corpus.rows(top)  # refuses unknown ids
        if len(top) < count:
            raise InputError(f"{rankings}: {row['method']} names {len(top)} images for {row['query_id']}, {count} are needed.")
        wanted.setdefault(frozenset(top), []).append((row["method"], row["query_id"]))
    for removed, asked in wanted.items():
        name = f"without-{fingerprint(sorted(removed))[:8]}"
        methods = ", ".join(sorted({method for method, _ in asked}))
        models.append(Model(name, "leave_k_out", config.seed, removed, name, methods, tuple(asked)))
    return models


@dataclass(frozen=True)
class Bench:
    """What all models of a run share, opened."""

    config: BenchConfig
    run_dir: Path

    @cached_property
    def corpus(self) -> Corpus:
        """The benchmark's images."""
        return Corpus(self.run_dir / "corpus")

    @cached_property
    def queries(self) -> Queries:
        """Drawn by the full model."""
        return Queries(self.run_dir / "queries")

    @cached_property
    def latents(self) -> torch.Tensor:
        """(N, L, h, w), scaled."""
        return torch.from_numpy(np.load(self.run_dir / "shared" / "latents.npy"))

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """Learned from the captions of all images."""
        return CLIPTokenizer.from_pretrained(self.run_dir / "shared" / "tokenizer")

    @property
    def rankings(self) -> Path:
        """Whom leave-K-out removes."""
        return self.run_dir / RANKINGS

    def folder(self, model: Model) -> Path:
        """Where a model's weights and measurements are."""
        return self.run_dir / "models" / model.model_id

    def full(self) -> Model:
        """The model on all images."""
        return Model("full", "full", self.config.seed, frozenset(), "full")

    def untrained(self, seed: int) -> DenoiserLoss:
        """The network of every model, with the start that this seed gives."""
        torch.manual_seed(seed)
        _, channels, side, _ = self.latents.shape
        unet, text_encoder = build_denoiser(
            self.config.generator, tokenizer=self.tokenizer, latent_channels=channels, latent_side=side
        )
        return DenoiserLoss(unet, text_encoder, build_scheduler())

    def generator(self, model: Model) -> Generator:
        """A trained model as a generator."""
        network = self.untrained(model.seed)
        weights = load_file(self.folder(model) / "weights.safetensors")
        network.load_state_dict({name: value.float() for name, value in weights.items()})
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL.from_pretrained(AUTOENCODER),
            text_encoder=network.text_encoder,
            tokenizer=self.tokenizer,
            unet=network.unet,
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        return Generator(pipeline, name=model.model_id)


def prepare(config: BenchConfig, run_dir: Path, source: Path | None) -> Bench:
    """Choose the images, encode them and learn the tokenizer, once; later calls check that the recipe is still the same.

    Args:
        config: the benchmark.
        run_dir: where to write.
        source: a finished corpus; None builds the emoji corpus in `run_dir`.
    """
    if not (run_dir / "corpus" / MANIFEST).exists():
        if source is None:
            from fastattr.corpus import store as corpora

            source = run_dir / "source"
            corpora.run(CorpusConfig(), source)
        whole = Corpus(source)
        rows = choose_part(whole, config.part)
        write_corpus(whole.training_images(rows.tolist()), run_dir / "corpus", CorpusConfig(**whole.manifest["config"]))
    bench = Bench(config, run_dir)
    shared = run_dir / "shared"
    inputs = {
        "corpus": bench.corpus.fingerprint,
        "autoencoder": sha256_file(AUTOENCODER / "diffusion_pytorch_model.safetensors"),
    }
    if finished(shared, stage="bench", config=config.recipe, inputs=inputs):
        return bench
    autoencoder = AutoencoderKL.from_pretrained(AUTOENCODER)
    images = load_images(bench.corpus, autoencoder.config.sample_size)
    latents = encode_latents(autoencoder, images) * autoencoder.config.scaling_factor
    with atomic_path(shared / "latents.npy") as temporary:
        np.save(temporary, latents.numpy())
    with temporary_folder(shared) as scratch:
        train_tokenizer(
            (caption for captions in bench.corpus.captions for caption in captions),
            vocabulary=config.generator.vocabulary,
            max_tokens=config.generator.max_tokens,
            scratch=scratch,
        ).save_pretrained(shared / "tokenizer")
    write_manifest(shared, stage="bench", config=config.recipe, inputs=inputs)
    return bench


def training_identity(bench: Bench, model: Model) -> dict[str, Any]:
    """All that determines a model's weights."""
    return {"recipe": bench.config.recipe, "seed": model.seed, "removed": sorted(model.removed)}


def measurement_identity(bench: Bench, model: Model) -> str:
    """All that determines what is measured of a model."""
    config = bench.config
    noise = {"timesteps": config.loss_timesteps, "seed": config.seed + LOSS_SEED}
    return fingerprint([training_identity(bench, model), bench.queries.fingerprint, measured_rows(bench, model), noise])


def measured_rows(bench: Bench, model: Model) -> list[int]:
    """Queries whose loss is measured: those that the model draws again, or, without any, the first drawing of each prompt."""
    queries = bench.queries
    if model.regenerate:
        return [queries.query_ids.index(query_id) for query_id in model.regenerate]
    first = {prompt: row for row, prompt in reversed(list(enumerate(queries.prompts)))}
    return sorted(first.values())


def read_measured(bench: Bench, model: Model) -> dict[str, Any] | None:
    """What `measure` wrote for this very model and these very queries; None if it has not."""
    path = bench.folder(model) / "measured.json"
    found: dict[str, Any] | None = read_json(path) if path.exists() else None
    return found if found and found["identity"] == measurement_identity(bench, model) else None


def train(bench: Bench, model: Model) -> None:
    """Train one model from scratch and keep its weights in half precision; resumes, and does nothing if they are there."""
    path = bench.folder(model) / "weights.safetensors"
    identity = training_identity(bench, model)
    if path.exists():
        found = read_json(path.with_name("training.json"))["identity"]
        require_same(f"the training of {path}", found, fingerprint(identity), "Delete that folder to train it again.")
        return
    started = time.monotonic()
    config = bench.config.generator
    captions = [captions[0] for captions in bench.corpus.captions]
    rows = torch.tensor([row for row, image_id in enumerate(bench.corpus.image_ids) if image_id not in model.removed])
    latents = bench.latents[rows]
    prompts = {
        "whole": captions,
        "subject": [caption.rpartition(", ")[0] or caption for caption in captions],
        "style": [caption.rpartition(", ")[2] for caption in captions],
    }
    tokens = {name: tokenize(bench.tokenizer, texts)[rows] for name, texts in prompts.items()}
    empty = tokenize(bench.tokenizer, [""])
    shares = np.cumsum([config.caption_dropout, config.subject_dropout, config.style_dropout])[::-1]
    network = bench.untrained(model.seed)
    train_timesteps = build_scheduler().config.num_train_timesteps

    def batch_of(picked: np.ndarray, generator: torch.Generator) -> tuple[torch.Tensor, ...]:  # as train_generator's
        stratum = torch.randperm(len(picked), generator=generator) + torch.rand(len(picked), generator=generator)
        timesteps = (stratum / len(picked) * train_timesteps).long().clamp_max(train_timesteps - 1)
        lot = torch.rand(len(picked), 1, generator=generator)
        prompt = tokens["whole"][picked]
        for share, shorter in zip(shares, (tokens["subject"][picked], tokens["style"][picked], empty), strict=True):
            prompt = torch.where(lot < share, shorter, prompt)
        return latents[picked], prompt, timesteps, torch.randn(latents[picked].shape, generator=generator)

    checkpoint = path.with_name("checkpoint.safetensors")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    average = fit(
        network,
        batch_of,
        replace(config.training, seed=model.seed),
        examples=len(rows),
        checkpoint=checkpoint,
        made_from=identity,
        schedule=trapezoid(config.decay_share),
        description=model.model_id,
    )
    facts = {"identity": fingerprint(identity), "seconds": round(time.monotonic() - started, 1)}  # since the last start
    write_json(path.with_name("training.json"), facts)
    with atomic_path(path) as temporary:
        save_file({name: value.half().contiguous() for name, value in average.state_dict().items()}, temporary)
    checkpoint.unlink(missing_ok=True)


@torch.no_grad()
def query_losses(
    generator: Generator, queries: Queries, rows: Sequence[int], *, timesteps: int, batch_size: int, seed: int
) -> np.ndarray:
    """Denoising losses of queries, at noise that depends on the query's id and the seed alone.

    Args:
        generator: the model to measure.
        queries: with their images.
        rows: (Q,) which of them.
        timesteps: T, evenly spaced; at each, one noise and its negative (antithetic draws).
        batch_size: network evaluations at once.
        seed: of the noise.

    Returns:
        (Q, T) float64 mean squared errors per latent element, each the mean of its two draws.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    latents = torch.cat([generator.encode_image([queries.image(row)]) for row in rows])
    conditioning = generator.encode_prompt([queries.prompts[row] for row in rows])
    ids = [queries.query_ids[row] for row in rows]
    spread = spread_timesteps(timesteps, train_timesteps=generator.train_timesteps)
    query, draw = (part.ravel() for part in np.indices((len(rows), 2 * timesteps)))
    losses = np.zeros((len(rows), timesteps))
    for start in range(0, len(query), batch_size):
        own, drawn = query[start : start + batch_size], draw[start : start + batch_size]
        noise = noise_for([ids[index] for index in own], (drawn // 2).tolist(), seed=seed, shape=generator.latent_shape)
        sign = torch.from_numpy(1.0 - 2.0 * (drawn % 2)).float()[:, None, None, None]
        part = generator.training_loss(latents[own], conditioning[own], torch.from_numpy(spread[drawn // 2]), noise * sign)
        np.add.at(losses, (own, drawn // 2), part.double().numpy() / 2)
    if not np.isfinite(losses).all():
        raise NonFiniteError(f"{int((~np.isfinite(losses)).sum())} of {len(rows)} query losses are not finite.")
    return losses


def regenerations(
    generator: Generator, queries: Queries, query_ids: Sequence[str], folder: Path
) -> dict[str, dict[str, float]]:
    """How near a model comes to queries that another model drew, starting from the same noise.

    Args:
        generator: the model.
        queries: drawn by the other one.
        query_ids: which of them.
        folder: where the drawings are written, QUERY.png.

    Returns:
        For each query 'mse' (mean squared difference of pixels in [0, 1]) and 'similarity' (cosine of image features).
    """
    encoder = open_encoder(IMAGE_ENCODER)
    found = {}
    for query_id in query_ids:
        row = queries.query_ids.index(query_id)
        record = queries.table.drop_columns(["image"]).slice(row, 1).to_pylist()[0]
        before = queries.image(row)
        after = generator.generate(
            record["prompt"], seed=record["seed"], steps=record["steps"], guidance=float(record["guidance"])
        )
        with atomic_path(folder / f"{query_id}.png") as temporary:
            after.save(temporary, format="PNG")
        pixels = [np.asarray(image, dtype=np.float64) / 255 for image in (before, after)]
        features = encoder.encode([before, after], [[record["prompt"]]] * 2)
        found[query_id] = {
            "mse": float(np.mean((pixels[0] - pixels[1]) ** 2)),
            "similarity": float(features[0] @ features[1]),
        }
    return found


def measure(bench: Bench, model: Model) -> None:
    """Measure a trained model on its queries (`measured_rows`), and draw again what it shall; does nothing if that is done."""
    if read_measured(bench, model):
        return
    folder, config = bench.folder(model), bench.config
    started = time.monotonic()
    generator = bench.generator(model)
    rows = measured_rows(bench, model)
    losses = query_losses(
        generator,
        bench.queries,
        rows,
        timesteps=config.loss_timesteps,
        batch_size=config.batch_size,
        seed=config.seed + LOSS_SEED,
    )
    write_json(
        folder / "measured.json",
        {
            "identity": measurement_identity(bench, model),
            "losses": {bench.queries.query_ids[row]: loss for row, loss in zip(rows, losses.tolist(), strict=True)},
            "regenerated": regenerations(generator, bench.queries, model.regenerate, folder),
            "seconds": {
                "train": read_json(folder / "training.json")["seconds"],
                "measure": round(time.monotonic() - started, 1),
            },
        },
    )


def restore(bench: Bench, out: Path) -> bool:
    """Take queries and measurements from the ground truth at `out` into the run, so that its models need no second training.

    Returns:
        Whether there is one of this recipe, these images, these queries and this noise; of another one nothing is taken.
    """
    if not (out / MANIFEST).exists():
        return False
    truth = GroundTruth(out)
    config = read_json(out / MANIFEST)["config"]
    made = [config["part"], config["generator"], config["queries"], config["loss_timesteps"], config["seed"]]
    wanted = [bench.config.part, bench.config.generator, bench.config.queries, bench.config.loss_timesteps, bench.config.seed]
    if truth.corpus_fingerprint != bench.corpus.fingerprint or fingerprint(made) != fingerprint(wanted):
        return False
    folder = bench.run_dir / "queries"
    with atomic_path(folder / "data.parquet") as temporary:
        shutil.copyfile(out / "queries.parquet", temporary)
    write_manifest(
        folder,
        stage="queries",
        config=bench.config.queries,
        inputs={"corpus": bench.corpus.fingerprint, "generator": truth.queries["generator"][0].as_py()},
        queries_fingerprint=truth.manifest["queries_fingerprint"],
    )
    if not any((bench.run_dir / "models").glob("*/weights.safetensors")):  # ids must be those of the kept models
        shutil.copytree(out / "generator" / "tokenizer", bench.run_dir / "shared" / "tokenizer", dirs_exist_ok=True)
    if (out / RANKINGS).exists() and not bench.rankings.exists():
        with atomic_path(bench.rankings) as temporary:
            shutil.copyfile(out / RANKINGS, temporary)
    records = {record["model_id"]: record for record in truth.models}
    spent = {name: round(total / len(records), 1) for name, total in truth.manifest["seconds"].items()}
    drawn = {(row["model_id"], row["query_id"]): row for row in truth.counterfactuals.to_dict("records")}
    for model in [bench.full(), *(model for what in WHAT for model in planned(bench, what))]:
        record = records.get(model.model_id)
        if not record or record["seed"] != model.seed or set(record["removed_image_ids"]) != model.removed:
            continue
        query_ids = [bench.queries.query_ids[row] for row in measured_rows(bench, model)]
        again = {query_id: drawn[model.model_id, query_id] for query_id in model.regenerate}
        alike = {query_id: {name: row[name] for name in ("mse", "similarity")} for query_id, row in again.items()}
        for query_id, row in again.items():
            with atomic_path(bench.folder(model) / f"{query_id}.png") as temporary:
                temporary.write_bytes(row["image"]["bytes"])
        losses = truth.losses_by_timestep([model.model_id], query_ids)[0]
        write_json(
            bench.folder(model) / "measured.json",
            {
                "identity": measurement_identity(bench, model),
                "losses": dict(zip(query_ids, losses.tolist(), strict=True)),
                "regenerated": alike,
                "seconds": spent,  # the mean of all: each model's own is not kept
            },
        )
    return True


def save_generator(bench: Bench, model: Model, folder: Path) -> None:
    """Write a trained model as a pipeline folder in half precision, which `Generator.from_pretrained` loads."""
    pipeline = bench.generator(model).pipeline
    with atomic_path(folder) as temporary:
        pipeline.to(dtype=torch.float16).save_pretrained(temporary)
        for path in [temporary / "model_index.json", *temporary.glob("*/config.json")]:
            write_json(path, {name: value for name, value in read_json(path).items() if name != "_name_or_path"})


def planned(bench: Bench, what: str) -> list[Model]:
    """The models that `what` needs, besides 'full'."""
    if what == "lds":
        return halves(bench.corpus.image_ids, bench.config)
    if what == "groups":
        return groups(bench.corpus, bench.config)
    return removals(bench.corpus, bench.queries, bench.rankings, bench.config)


def run_one(bench: Bench, model_id: str) -> None:
    """Train one model and, if the queries are drawn, measure it: what a process of its own does."""
    torch.set_num_threads(1)
    models = [bench.full(), *(model for what in WHAT[:2] for model in planned(bench, what))]
    if (bench.run_dir / "queries" / MANIFEST).exists():
        models += planned(bench, "leave-k-out")
    found = [model for model in models if model.model_id == model_id]
    if not found:
        raise InputError(f"there is no model {model_id!r} in this run.")
    train(bench, found[0])
    if (bench.run_dir / "queries" / MANIFEST).exists():
        measure(bench, found[0])


def run_all(models: Sequence[Model], run_dir: Path, config: Path, *, processes: int, description: str) -> list[str]:
    """Run one process a model, `processes` at a time; returns the ids of those that failed.

    A process that outlives this one finishes its model and ends; starting anew meanwhile does no harm, as both write
    the same files atomically.
    """
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    waiting = list(models)
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed = []
    with tqdm(total=len(models), desc=description, unit="model") as bar:
        while waiting or running:
            while waiting and len(running) < processes:
                model_id = waiting.pop(0).model_id
                command = [sys.executable, __file__, "--run", str(run_dir), "--config", str(config), "--model", model_id]
                with (logs / f"{model_id}.txt").open("wb") as log:
                    running[model_id] = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            time.sleep(0.2)
            for model_id in [name for name, process in running.items() if process.poll() is not None]:
                if running.pop(model_id).returncode != 0:
                    failed.append(model_id)
                bar.update()
    return failed


def compact(bench: Bench, models: Sequence[Model], out: Path) -> dict[str, Any]:
    """Write the measured models of this run as a ground truth folder; returns its manifest.

    Raises:
        ArtifactNotFoundError: the full model or the other generator is not there yet.
    """
    measured = {model.model_id: found for model in models if (found := read_measured(bench, model))}
    for needed in ("full", OTHER):
        if needed not in measured:
            raise ArtifactNotFoundError(f"model {needed!r} is not measured yet; run with --only lds first.")
    present = [model for model in models if model.model_id in measured]

    def judged_loss(losses: Sequence[float]) -> float:
        return float(np.mean(np.array(losses)[bench.config.judged_timesteps]))

    rows = [
        {"model_id": model.model_id, "query_id": query_id, "loss": judged_loss(losses), "by_timestep": losses}
        for model in present
        for query_id, losses in measured[model.model_id]["losses"].items()
    ]
    counterfactuals = [
        {
            "model_id": model.model_id,
            "method": method,
            "query_id": query_id,
            "loss": judged_loss(measured[model.model_id]["losses"][query_id]),
            "image": {"bytes": (bench.folder(model) / f"{query_id}.png").read_bytes(), "path": None},
            **measured[model.model_id]["regenerated"][query_id],
        }
        for model in present
        for method, query_id in model.counterfactuals
    ]
    names = {"model_id", "kind", "seed", "subset", "method"}
    records = [
        {**{name: getattr(model, name) for name in names}, "removed_image_ids": sorted(model.removed)} for model in present
    ]
    write_table(out / "models.parquet", records, MODELS)
    write_table(out / "losses.parquet", rows, LOSSES)
    write_table(out / "counterfactuals.parquet", counterfactuals, counterfactuals_schema())
    with atomic_path(out / "images.parquet") as temporary:
        pq.write_table(bench.corpus.catalog().drop_columns(["url"]), temporary, compression="zstd")
    with atomic_path(out / "queries.parquet") as temporary:
        shutil.copyfile(bench.run_dir / "queries" / "data.parquet", temporary)
    if bench.rankings.exists():
        with atomic_path(out / RANKINGS) as temporary:
            shutil.copyfile(bench.rankings, temporary)
    by_id = {model.model_id: model for model in present}
    for name, model_id in (("generator", "full"), ("other_generator", OTHER)):
        if not (bench.folder(by_id[model_id]) / "weights.safetensors").exists():  # restored from the ground truth
            continue
        save_generator(bench, by_id[model_id], out / name)
        shutil.rmtree(out / name / "vae", ignore_errors=True)  # the embedded emoji model's, named by its checksum
    (out / "README.md").write_text(CARD, encoding="utf-8")
    return write_manifest(
        out,
        stage="ground_truth",
        config=bench.config,
        inputs=open_stage(bench.run_dir / "shared", "bench")["inputs"],
        corpus_fingerprint=bench.corpus.fingerprint,
        queries_fingerprint=bench.queries.fingerprint,
        models={kind: sum(model.kind == kind for model in present) for kind in sorted({model.kind for model in present})},
        repeat_max_log_difference=_repeated(measured),
        seconds={name: round(sum(one["seconds"][name] for one in measured.values()), 1) for name in ("train", "measure")},
        machine=machine.describe(),
    )


def _repeated(measured: Mapping[str, Any]) -> float | None:
    """Largest difference of log losses between two trainings with one seed on the same images; None before both exist."""
    pair = [measured[name]["losses"] for name in ("half-000-s0", "repeat") if name in measured]
    if len(pair) < 2:
        return None
    return float(max(np.abs(np.log(losses) - np.log(pair[1][query_id])).max() for query_id, losses in pair[0].items()))


CARD = """---
license: other
license_name: emoji-artwork
license_link: https://openmoji.org
pretty_name: emoji-bench, ground truth of data attribution by retraining
configs:
- config_name: losses
  data_files: losses.parquet
  default: true
- config_name: models
  data_files: models.parquet
- config_name: queries
  data_files: queries.parquet
- config_name: images
  data_files: images.parquet
- config_name: counterfactuals
  data_files: counterfactuals.parquet
---

# emoji-bench

Denoising losses of generated images (queries) under small text-to-image generators, each trained from scratch on a part
of one corpus of emoji: which training images, once left out, change them? Made by `benchmarks/ground_truth.py` of
fastattr; settings, seeds and fingerprints are in `manifest.json`.

- `losses`: one row a model and query (one drawing of each prompt), mean squared error per latent element, common noise:
  at each timestep, and the mean over those that are judged by (`judged` in the manifest's settings).
- `models`: the images that each model was *not* trained on, its seed; models with one `subset` differ in seed only.
- `queries`: prompts, drawings of the model 'full', seeds and splits.
- `images`: the training images' ids, captions, creators and licences (the pictures are in the emoji packages).
- `counterfactuals`: queries drawn again, from their own noise, by models that lack some images.
- `generator/`, `other_generator/`: the models 'full' and 'half-000-s1', without the autoencoder.

The queries and weights derive from OpenMoji (CC BY-SA 4.0) and Fluent emoji (MIT).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, then write the ground truth."""
    parser = argparse.ArgumentParser(description="Train emoji-bench's models again and again; resumes.")
    parser.add_argument("--run", type=Path, default=Path("runs/bench"), help="run folder (%(default)s)")
    parser.add_argument("--config", type=Path, default=CONFIG, help="the benchmark's settings (%(default)s)")
    parser.add_argument("--corpus", type=Path, help="a finished emoji corpus; else it is built in the run folder")
    parser.add_argument("--processes", type=int, default=2, help="models side by side, one thread each (%(default)s)")
    parser.add_argument("--only", choices=WHAT, action="append", help="train these models alone; may be repeated")
    parser.add_argument("--out", type=Path, default=OUT, help="where the ground truth is written (%(default)s)")
    parser.add_argument("--model", help="train and measure this one model in this process, write no ground truth")
    options = parser.parse_args(arguments)
    bench = prepare(read_yaml(options.config, BenchConfig), options.run, options.corpus)
    if options.model:
        run_one(bench, options.model)
        return 0
    other = next(model for model in halves(bench.corpus.image_ids, bench.config) if model.model_id == OTHER)

    def train_all(models: Sequence[Model], description: str) -> None:
        failed = run_all(models, options.run, options.config, processes=options.processes, description=description)
        if failed:
            raise FastattrError(f"{len(failed)} models failed ({', '.join(failed)}); see {options.run / 'logs'}, run again.")

    drawn = bench.run_dir / "queries"
    if not (drawn / MANIFEST).exists() and not restore(bench, options.out):
        train_all([bench.full(), other], "first two models")  # their measurements come with the others'
        save_generator(bench, bench.full(), bench.run_dir / "generator")
        queries_stage.run(bench.config.queries, bench.run_dir)
    inputs = {"corpus": bench.corpus.fingerprint, "generator": bench.queries.table["generator"][0].as_py()}
    finished(drawn, stage="queries", config=bench.config.queries, inputs=inputs)  # refuses other settings than they have
    wanted = [model for what in options.only or WHAT for model in planned(bench, what)]
    distinct = {model.model_id: model for model in [bench.full(), other, *wanted]}.values()
    train_all([model for model in distinct if not read_measured(bench, model)], "models")
    everything = [bench.full(), *(model for what in WHAT for model in planned(bench, what))]
    manifest = compact(bench, everything, options.out)
    print(f"{options.out}: {manifest['models']}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FastattrError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
