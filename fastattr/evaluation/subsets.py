"""Subsets: which models are retrained for a ground truth, and which images each lacks; only images and seeds differ.

full            all images; it draws the queries
half-I-sS       a random half of the images, some halves with a second seed (for the noise ceiling)
repeat          the first half and its seed once more: how far do two equal trainings agree?
group-I         all but the images of one creator or set
random-I        all but a random 1%
without-DIGEST  all but the 1% that some method, or several, hold most influential for some query
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastattr.core.errors import InputError
from fastattr.core.stages import fingerprint
from fastattr.corpus.store import Corpus
from fastattr.generators.queries import Queries, QueriesConfig
from fastattr.generators.scratch.denoiser import GeneratorConfig

WHAT = ("lds", "groups", "leave-k-out")
"""The three parts of a ground truth, in the order in which they can be made."""


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """Which images of an emoji corpus the models are trained on; skin-tone variants never are."""

    main_set: str = "openmoji"
    """All its subjects."""
    second_set: str = "fluent"
    """A second style for part of the same subjects; the rest leaves recombined prompts to ask for."""
    second_share: float = 0.5
    """How large that part is."""
    groups: tuple[str, ...] = ()
    """Subject classes to take; none means all."""


@dataclass(frozen=True, kw_only=True)
class RetrainConfig:
    """Settings of a ground truth: images, recipe, queries, and how many models."""

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
            found = f"one of {self.loss_timesteps} timesteps, got {self.judged}"
            raise InputError(f"judged must span a part of (0, 1) with {found}")

    @property
    def judged_timesteps(self) -> np.ndarray:
        """(T,) bool, which of the measured timesteps are judged by."""
        middles = (np.arange(self.loss_timesteps) + 0.5) / self.loss_timesteps
        return (self.judged[0] < middles) & (middles < self.judged[1])

    def removed_count(self, images: int) -> int:
        """K, how many of these images leave-K-out removes."""
        return max(1, round(images * self.removed_percent / 100))

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
    """(N,) rows of the corpus that belong to the benchmark, in its order; InputError if there are none."""
    columns = (corpus.captions, corpus.column("source"), corpus.column("group"))
    usable = [
        (row, captions[0].rpartition(", ")[0], source)
        for row, (captions, source, group) in enumerate(zip(*columns, strict=True))
        if "skin tone" not in captions[0] and (not config.groups or group in config.groups)
    ]
    main = {subject for _, subject, source in usable if source == config.main_set}
    doubled = {(config.second_set, subject) for subject in main if _uniform(f"second set {subject}") < config.second_share}
    rows = [row for row, subject, source in usable if source == config.main_set or (source, subject) in doubled]
    if not rows:
        raise InputError(f"{corpus.folder} holds no image of {config.main_set!r} in the groups {config.groups}.")
    return np.array(rows)


def _uniform(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) / 16**12


def halves(image_ids: Sequence[str], config: RetrainConfig) -> list[Model]:
    """The models on random halves: the first seed of each, second seeds, and one training repeated."""
    ids, models = np.array(sorted(image_ids)), []
    for index in range(config.halves):
        order, name = np.random.default_rng([config.seed, 1, index]).permutation(len(ids)), f"half-{index:03d}"
        removed = frozenset(ids[order[len(ids) // 2 :]].tolist())
        for seed in range(2 if index < config.second_seeds else 1):
            models.append(Model(f"{name}-s{seed}", "half", config.seed + 1 + seed, removed, name))
    return [*models, replace(models[0], model_id="repeat", kind="repeat")]


def groups(corpus: Corpus, config: RetrainConfig) -> list[Model]:
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


def chosen_queries(queries: pa.Table, config: RetrainConfig) -> list[str]:
    """Test queries for leave-K-out: as many of each kind of prompt as can be, in a random order that is fixed."""
    query_ids, kinds = queries["query_id"].to_pylist(), queries["kind"].to_pylist()
    test = [row for row, split in enumerate(queries["split"].to_pylist()) if split == "test"]
    by_kind: dict[str, list[str]] = {}
    for row in np.random.default_rng([config.seed, 2]).permutation(test):
        by_kind.setdefault(kinds[row], []).append(query_ids[row])
    turns = zip_longest(*(of_kind for _, of_kind in sorted(by_kind.items())))
    return [query_id for turn in turns for query_id in turn if query_id is not None][: config.leave_k_out_queries]


def removals(corpus: Corpus, queries: Queries, rankings: Path, config: RetrainConfig) -> list[Model]:
    """The models without a random 1%, and, where `rankings` exists, without each method's top K for each chosen query.

    Raises:
        InputError: a ranking is shorter than K or names an unknown image.
    """
    count, ids, models = config.removed_count(len(corpus)), np.array(sorted(corpus.image_ids)), []
    pairs = tuple(("random", query_id) for query_id in chosen_queries(queries.table, config))
    for index in range(config.random_removals):
        drawn = np.random.default_rng([config.seed, 3, index]).choice(ids, count, replace=False)
        name = f"random-{index:02d}"
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
