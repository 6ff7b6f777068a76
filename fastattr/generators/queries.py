"""Queries: generated images with their prompts, to be attributed; training, validation and test kept apart.

Reads corpus/ and generator/; writes queries/data.parquet with every setting that made each image. Prompts are captions of
training images, recombinations (a subject in another set's style) and free text: listed in the config, or from a file or
dataset of prompts. A subject belongs to one split only, by the hash of its name. Drawings that are near-copies of a training
image name it (`near_copy_of`). Resumes: images already drawn are kept in shards of one batch each.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from fastattr.core.captions import split_caption
from fastattr.core.errors import ArtifactNotFoundError, InputError
from fastattr.core.files import atomic_path
from fastattr.core.processes import split_between
from fastattr.core.settings import at_least
from fastattr.core.stages import fingerprint, make, open_stage
from fastattr.corpus.images import load_rgb
from fastattr.corpus.near_copies import look_of, looks_of, near_copies
from fastattr.corpus.store import Corpus
from fastattr.generators.generator import Generator

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class QueriesConfig:
    """How many queries, and how they are drawn."""

    train: int = 200
    validation: int = 20
    test: int = 40
    train_drawings: int = 1
    """How many training queries share a prompt, each drawn from a noise of its own: for corpora of few subjects."""
    caption_share: float = 0.6
    """Part of each split whose prompts are captions of the corpus."""
    recombined_share: float = 0.3
    """Part whose prompts put a subject into the style of a set that has no such subject, or of another set."""
    free_prompts: tuple[str, ...] = ()
    """Free text for the rest; each prompt is used once, in a split chosen by its hash."""
    prompts: str = ""
    """More free text: a file (.txt with a prompt a line, .jsonl, .json, .csv, .parquet), or a dataset that `datasets` loads,
    such as DiffusionDB; of them as many as are needed are taken, chosen by hash."""
    prompt_column: str = "prompt"
    """Column of the prompts in that file or dataset."""
    steps: int = 25
    guidance: float = 4.0
    batch_size: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, 1, "train_drawings", "steps", "batch_size")
        if min(self.train, self.validation, self.test) < 0 or self.train + self.validation + self.test == 0:
            raise InputError("the numbers of queries must not be negative, and at least one must be positive")
        if not 0 <= self.caption_share + self.recombined_share <= 1:
            raise InputError("caption_share + recombined_share must be between 0 and 1")

    @property
    def prompts_of_split(self) -> dict[str, int]:
        """How many prompts each split has."""
        return {"train": -(-self.train // self.train_drawings), "validation": self.validation, "test": self.test}


@dataclass(frozen=True)
class Prompt:
    """A prompt, its kind ('caption', 'recombined' or 'free') and its split."""

    text: str
    kind: str
    split: str


def split_of(subject: str, config: QueriesConfig) -> str:
    """The split a subject belongs to, in proportion to the splits' sizes; depends on the subject and sizes only."""
    sizes = config.prompts_of_split
    total = sum(sizes.values())
    position = int(hashlib.sha256(f"split {subject}".encode()).hexdigest()[:12], 16) / 16**12 * total
    if position < sizes["train"]:
        return "train"
    return "validation" if position < sizes["train"] + sizes["validation"] else "test"


def read_prompts(source: str, column: str) -> Iterator[str]:
    """The prompts of a file or of a dataset's train split, in its order; empty ones are left out.

    ArtifactNotFoundError if it looks like a file and is none, InputError if it has no such column.
    """
    path = Path(source)
    kinds = {".txt": "text", ".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
    kind = kinds.get(path.suffix)
    if kind and not path.is_file():
        raise ArtifactNotFoundError(f"there is no file of prompts {source}.")
    if kind == "text":
        yield from filter(None, map(str.strip, path.read_text(encoding="utf-8").split("\n")))
        return
    from datasets import load_dataset

    files = {"data_files": source} if kind else {}
    rows = load_dataset(kind or source, split="train", streaming=True, **files)
    if column in (rows.column_names or []):  # a CSV says only with its first row which columns it has
        rows = rows.select_columns([column])
    for row in rows:
        if column not in row:
            raise InputError(f"{source} has no column {column!r}; it has {sorted(row)}. Set queries.prompt_column.")
        if row[column] and row[column].strip():
            yield row[column].strip()


def choose_prompts(captions: Sequence[str], config: QueriesConfig, more: Sequence[str] = ()) -> list[Prompt]:
    """Choose the prompts of all splits: distinct ones, but each of the training split `train_drawings` times; train first.

    `captions` are main captions of the corpus, 'SUBJECT, SET style' where sets are known, else any text; they fill up where a
    split has too few free prompts or recombinations. `more` is free text that comes after `config.free_prompts`, in an order
    that follows from the texts alone. InputError if the corpus has too few distinct subjects; the text proposes numbers that
    fit.
    """
    try:
        return _choose(captions, config, more)
    except InputError as error:
        fitting = _numbers_that_fit(captions, config, more)
        if fitting is None:
            raise
        numbers = ", ".join(f"{split}: {count}" for split, count in fitting.items())
        raise InputError(f"{error} These numbers fit: queries: {{{numbers}}}.") from error


def _numbers_that_fit(captions: Sequence[str], config: QueriesConfig, more: Sequence[str]) -> dict[str, int] | None:
    """The largest numbers of queries, in the proportion of the config's, that a corpus has prompts for; None if it has none."""
    low, high, best = 0, 1000, None
    while low < high:  # a smaller share always fits where a larger one does, but for a few subjects that change splits
        share = (low + high + 1) // 2
        wanted = {split: getattr(config, split) for split in SPLITS}
        numbers: dict[str, Any] = {split: max(1, count * share // 1000) if count else 0 for split, count in wanted.items()}
        try:
            _choose(captions, replace(config, **numbers), more)
        except InputError:
            high = share - 1
        else:
            low, best = share, numbers
    return best


def _choose(captions: Sequence[str], config: QueriesConfig, more: Sequence[str]) -> list[Prompt]:
    rng = np.random.default_rng(config.seed)
    subjects: dict[str, set[str]] = {}
    for caption in captions:
        subject, style = split_caption(caption)
        subjects.setdefault(subject, set()).add(style)
    styles = sorted({style for known in subjects.values() for style in known if style})
    ordered = sorted(dict.fromkeys(more), key=lambda text: hashlib.sha256(f"{config.seed} {text}".encode()).digest())
    prompts = []
    for split, size in config.prompts_of_split.items():
        own = [subject for subject in sorted(subjects) if split_of(subject, config) == split]
        rng.shuffle(own)
        free = [text for text in dict.fromkeys([*config.free_prompts, *ordered]) if split_of(text, config) == split]
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
            found = f"the corpus has {len(subjects)} different captions, {len(own)} of them for the {split} queries"
            raise InputError(f"{found}: {size - n_free} too few.")
        prompts += [Prompt(text, "free", split) for text in free[:n_free]]
    training = [prompt for prompt in prompts if prompt.split == "train"]
    return [*(training * config.train_drawings)[: config.train], *prompts[len(training) :]]


class Queries:
    """A written query folder, opened."""

    def __init__(self, folder: str | Path) -> None:
        """Open `folder`; ArtifactNotFoundError if it is not a finished query folder."""
        self.folder = Path(folder)
        self.manifest = open_stage(self.folder, "queries")
        self.table = pq.read_table(self.folder / "data.parquet")
        if "near_copy_of" not in self.table.column_names:  # written before drawings were compared with the corpus
            self.table = self.table.append_column("near_copy_of", pa.array([""] * len(self.table)))
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

    numbers = {"seed": Value("int64"), "steps": Value("int32"), "guidance": Value("float32")}
    text = {name: Value("string") for name in ("scheduler", "generator", "split", "kind", "near_copy_of")}
    query = {"query_id": Value("string"), "prompt": Value("string"), "image": ImageFeature()}
    return Features(query | numbers | text).arrow_schema


def run(config: QueriesConfig, run_dir: Path) -> dict[str, Any]:
    """Draw the queries of run_dir/corpus with run_dir/generator, on all processes; returns the manifest."""
    accelerator = Accelerator()
    corpus = Corpus(run_dir / "corpus")
    generator = Generator.from_pretrained(run_dir / "generator", device=accelerator.device)
    folder = run_dir / "queries"
    inputs = {"corpus": corpus.fingerprint, "generator": generator.fingerprint}
    # Shards of an unfinished run with other settings lie under another name and are never mixed in.
    shards = folder / f"shards-{fingerprint([inputs, vars(config)])}"

    def work() -> dict[str, Any]:
        more = list(read_prompts(config.prompts, config.prompt_column)) if config.prompts else []
        prompts = choose_prompts([captions[0] for captions in corpus.captions], config, more)
        files = {start: shards / f"{start:06d}.parquet" for start in range(0, len(prompts), config.batch_size)}
        with split_between(accelerator, [start for start, path in files.items() if not path.exists()]) as mine:
            for start in tqdm(mine, desc="queries", unit="batch", disable=not accelerator.is_main_process):
                rows = draw_queries(generator, prompts[start : start + config.batch_size], first=start, config=config)
                with atomic_path(files[start]) as temporary:
                    pq.write_table(pa.Table.from_pylist(rows, schema=query_schema()), temporary)
        return _joined(folder, shards, corpus, generator) if accelerator.is_main_process else {}

    return make(folder, work, stage="queries", config=config, inputs=inputs, accelerator=accelerator, temporary=[shards])


def _joined(folder: Path, shards: Path, corpus: Corpus, generator: Generator) -> dict[str, Any]:
    """Put the shards together as one table, name the near-copies, and say what the table holds."""
    table = pa.concat_tables([pq.read_table(path) for path in sorted(shards.glob("*.parquet"))])
    drawn = [image["bytes"] for image in table["image"].to_pylist()]
    found = near_copies(looks_of([look_of(load_rgb(data)) for data in drawn]), corpus.looks())
    copied = [corpus.image_ids[rows[0]] if len(rows) else "" for rows in found]
    table = table.set_column(table.schema.get_field_index("near_copy_of"), "near_copy_of", pa.array(copied, pa.string()))
    with atomic_path(folder / "data.parquet") as temporary:
        pq.write_table(table, temporary)
    near, splits = sum(map(bool, copied)), table["split"].to_pylist()
    if near:
        logger.warning("%d of %d drawings are near-copies of a training image (column near_copy_of)", near, len(copied))
    images = [hashlib.sha256(data).hexdigest() for data in drawn]
    scheduler = generator.pipeline.scheduler.config
    return {
        "queries_fingerprint": fingerprint([table["query_id"].to_pylist(), table["prompt"].to_pylist(), splits, images]),
        "queries": {split: splits.count(split) for split in SPLITS},
        "near_copies": near,
        "pipeline": type(generator.pipeline).__name__,
        "scheduler": {key: value for key, value in scheduler.items() if not key.startswith("_")},
        "image_size": generator.image_size,
    }


def draw_queries(generator: Generator, prompts: Sequence[Prompt], *, first: int, config: QueriesConfig) -> list[dict[str, Any]]:
    """Rows of the query table for these prompts, the first of which has number `first`."""
    sampled: dict[str, Any] = {"steps": config.steps, "guidance": config.guidance}
    seeds = [config.seed * 1_000_000 + first + offset for offset in range(len(prompts))]
    images = generator.generate_batch([prompt.text for prompt in prompts], seeds=seeds, **sampled)
    made_by = {"scheduler": type(generator.pipeline.scheduler).__name__, "generator": generator.fingerprint}
    rows = []
    for offset, (prompt, seed, image) in enumerate(zip(prompts, seeds, images, strict=True)):
        image.save(buffer := io.BytesIO(), format="PNG")
        drawn = {"image": {"bytes": buffer.getvalue(), "path": None}, "seed": seed, **sampled, **made_by, "near_copy_of": ""}
        asked = {"query_id": f"{prompt.split}-{first + offset:06d}", "prompt": prompt.text}
        rows.append({**asked, "split": prompt.split, "kind": prompt.kind, **drawn})
    return rows
