"""Queries: generated images with their prompts, to be attributed; training, validation and test kept apart.

Reads corpus/ and generator/; writes queries/data.parquet with every setting that made each image. Prompts are
captions of training images, recombinations (a subject in another set's style) and free text. A subject belongs
to one split only, by the hash of its name, so no test prompt shares its subject with a training prompt.
Resumes: images already drawn are kept in shards of one batch each.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from fastattr.artifacts import MANIFEST, atomic_path, fingerprint, finished, open_stage, read_json, remove, write_manifest
from fastattr.corpus import Corpus, load_rgb
from fastattr.errors import InputError
from fastattr.generator import Generator
from fastattr.processes import split_between

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class QueriesConfig:
    """How many queries, and how they are drawn."""

    train: int = 200
    validation: int = 20
    test: int = 40
    caption_share: float = 0.6
    """Part of each split whose prompts are captions of the corpus."""
    recombined_share: float = 0.3
    """Part whose prompts put a subject into the style of a set that has no such subject, or of another set."""
    free_prompts: tuple[str, ...] = ()
    """Free text for the rest; each prompt is used once, in a split chosen by its hash."""
    steps: int = 25
    guidance: float = 4.0
    batch_size: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.train, self.validation, self.test) < 0 or self.train + self.validation + self.test == 0:
            raise InputError("the numbers of queries must not be negative, and at least one must be positive")
        if not 0 <= self.caption_share + self.recombined_share <= 1:
            raise InputError("caption_share + recombined_share must be between 0 and 1")


@dataclass(frozen=True)
class Prompt:
    """A prompt and where it comes from."""

    text: str
    kind: str
    """'caption', 'recombined' or 'free'."""
    split: str


def split_of(subject: str, config: QueriesConfig) -> str:
    """The split a subject belongs to, in proportion to the splits' sizes; depends on the subject and sizes only."""
    total = config.train + config.validation + config.test
    position = int(hashlib.sha256(f"split {subject}".encode()).hexdigest()[:12], 16) / 16**12 * total
    if position < config.train:
        return "train"
    return "validation" if position < config.train + config.validation else "test"


def choose_prompts(captions: Sequence[str], config: QueriesConfig) -> list[Prompt]:
    """Choose the prompts of all splits.

    Args:
        captions: main captions of the corpus, 'SUBJECT, SET style' where sets are known, else any text.
        config: sizes and shares.

    Returns:
        Distinct prompts, train first; captions fill up where a split has too few free prompts or recombinations.

    Raises:
        InputError: the corpus has too few distinct subjects.
    """
    rng = np.random.default_rng(config.seed)
    subjects: dict[str, set[str]] = {}
    for caption in captions:
        subject, _, style = caption.rpartition(", ")
        subjects.setdefault(subject or caption, set()).add(style if subject else "")
    styles = sorted({style for known in subjects.values() for style in known if style})
    prompts = []
    for split, size in zip(SPLITS, (config.train, config.validation, config.test), strict=True):
        own = [subject for subject in sorted(subjects) if split_of(subject, config) == split]
        rng.shuffle(own)
        free = [text for text in config.free_prompts if split_of(text, config) == split]
        n_recombinable = sum(len(subjects[subject]) < len(styles) for subject in own)
        n_recombined = min(n_recombinable, round(size * config.recombined_share))
        n_free = min(len(free), size - n_recombined - round(size * config.caption_share))
        for subject in own:
            absent = [style for style in styles if style not in subjects[subject]]
            if n_recombined and absent:
                prompts.append(Prompt(f"{subject}, {absent[rng.integers(len(absent))]}", "recombined", split))
                n_recombined -= 1
                size -= 1
            elif size > n_free + n_recombined:
                style = sorted(subjects[subject])[rng.integers(len(subjects[subject]))]
                prompts.append(Prompt(f"{subject}, {style}" if style else subject, "caption", split))
                size -= 1
        if size > n_free:
            raise InputError(
                f"the corpus has {len(own)} subjects for the {split} queries, {size - n_free} too few; ask for fewer."
            )
        prompts += [Prompt(text, "free", split) for text in free[:n_free]]
    return prompts


class Queries:
    """A written query folder, opened."""

    def __init__(self, folder: str | Path) -> None:
        """Open `folder`.

        Raises:
            ArtifactNotFoundError: it is not a finished query folder.
        """
        self.folder = Path(folder)
        self.manifest = open_stage(self.folder, "queries")
        self.table = pq.read_table(self.folder / "data.parquet")
        self.query_ids: list[str] = self.table["query_id"].to_pylist()
        self.prompts: list[str] = self.table["prompt"].to_pylist()
        self.splits: list[str] = self.table["split"].to_pylist()

    @property
    def fingerprint(self) -> str:
        """Identifies prompts, settings and images."""
        return str(self.manifest["queries_fingerprint"])

    def image(self, row: int) -> Image.Image:
        """The generated RGB image of one row."""
        return load_rgb(self.table["image"][row].as_py()["bytes"])

    def of_split(self, split: str) -> list[int]:
        """Row numbers of one split."""
        return [row for row, name in enumerate(self.splits) if name == split]


def query_schema() -> pa.Schema:
    """Arrow schema of queries, viewable by `datasets`."""
    from datasets import Features, Image as ImageFeature, Value

    text = {name: Value("string") for name in ("scheduler", "generator", "split", "kind")}
    numbers = {"seed": Value("int64"), "steps": Value("int32"), "guidance": Value("float32")}
    schema: pa.Schema = Features(
        {"query_id": Value("string"), "prompt": Value("string"), "image": ImageFeature(), **numbers, **text}
    ).arrow_schema
    return schema


def run(config: QueriesConfig, run_dir: Path) -> dict[str, Any]:
    """Draw the queries of run_dir/corpus with run_dir/generator, on all processes; returns the manifest."""
    accelerator = Accelerator()
    corpus = Corpus(run_dir / "corpus")
    generator = Generator.from_pretrained(run_dir / "generator", device=accelerator.device)
    folder = run_dir / "queries"
    inputs = {"corpus": corpus.fingerprint, "generator": generator.fingerprint}
    if finished(folder, stage="queries", config=config, inputs=inputs):
        manifest: dict[str, Any] = read_json(folder / MANIFEST)
        return manifest
    prompts = choose_prompts([captions[0] for captions in corpus.captions], config)
    # Shards of an unfinished run with other settings lie under another name and are never mixed in.
    shards = folder / f"shards-{fingerprint([inputs, vars(config)])}"
    files = {start: shards / f"{start:06d}.parquet" for start in range(0, len(prompts), config.batch_size)}
    with split_between(accelerator, [start for start, path in files.items() if not path.exists()]) as mine:
        for start in tqdm(mine, desc="queries", unit="batch", disable=not accelerator.is_main_process):
            rows = draw_queries(generator, prompts[start : start + config.batch_size], first=start, config=config)
            with atomic_path(files[start]) as temporary:
                pq.write_table(pa.Table.from_pylist(rows, schema=query_schema()), temporary)
    if accelerator.is_main_process:
        _finish(folder, shards, config, inputs)
    accelerator.wait_for_everyone()
    manifest = read_json(folder / MANIFEST)
    return manifest


def _finish(folder: Path, shards: Path, config: QueriesConfig, inputs: dict[str, str]) -> None:
    """Put the shards together as one table and record what made it."""
    table = pa.concat_tables([pq.read_table(path) for path in sorted(shards.glob("*.parquet"))])
    with atomic_path(folder / "data.parquet") as temporary:
        pq.write_table(table, temporary)
    remove(shards)
    images = [hashlib.sha256(image["bytes"]).hexdigest() for image in table["image"].to_pylist()]
    identity = [table["query_id"].to_pylist(), table["prompt"].to_pylist(), table["split"].to_pylist(), images]
    counts = {split: table["split"].to_pylist().count(split) for split in SPLITS}
    write_manifest(
        folder, stage="queries", config=config, inputs=inputs, queries_fingerprint=fingerprint(identity), queries=counts
    )


def draw_queries(generator: Generator, prompts: Sequence[Prompt], *, first: int, config: QueriesConfig) -> list[dict[str, Any]]:
    """Rows of the query table for these prompts, the first of which has number `first`."""
    seeds = [config.seed * 1_000_000 + first + offset for offset in range(len(prompts))]
    images = generator.generate_batch(
        [prompt.text for prompt in prompts], seeds=seeds, steps=config.steps, guidance=config.guidance
    )
    rows = []
    for offset, (prompt, seed, image) in enumerate(zip(prompts, seeds, images, strict=True)):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        rows.append(
            {
                "query_id": f"{prompt.split}-{first + offset:06d}",
                "prompt": prompt.text,
                "image": {"bytes": buffer.getvalue(), "path": None},
                "seed": seed,
                "steps": config.steps,
                "guidance": config.guidance,
                "scheduler": type(generator.pipeline.scheduler).__name__,
                "generator": generator.fingerprint,
                "split": prompt.split,
                "kind": prompt.kind,
            }
        )
    return rows
