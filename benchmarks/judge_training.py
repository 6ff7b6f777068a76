"""Training of the judge: real images of the corpus' four sets, and of four older sets that nothing else uses.

    python benchmarks/judge_training.py --run runs/emoji

Reads RUN/corpus; keeps pictures and checkpoint in RUN/judge, so that it can be stopped and goes on; writes benchmarks/judge/.

What tells a subject in a set where the judge has not seen it is learned from how sets differ, so it is shown more of them:
EmojiOne 1 and 2, the first Noto and Firefox OS, and OpenMoji's flags, all named as the corpus names them. Training moves,
turns, stretches, blurs and recolours the images, thickens and removes their outlines, and blots out parts.

Held out are 15% of the corpus' images, of subjects that other sets show, and all images but one of 5% of the subjects: those
say how well the judge does on subjects that one set alone draws. With a held-out image go its subject's picture in the same
maker's older set and whatever is a near-copy of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import re
import sys
import tarfile
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import judge as judging
import machine
import numpy as np
import torch
from judge import Judge
from PIL import Image
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from fastattr.core.captions import split_caption
from fastattr.core.errors import FastattrError
from fastattr.core.files import atomic_path
from fastattr.core.training import TrainingConfig, fit, trapezoid
from fastattr.corpus import emoji
from fastattr.corpus.near_copies import look_of, looks_of, near_copies
from fastattr.corpus.store import Corpus
from fastattr.generators.scratch.autoencoder import load_images, pixel_tensor

RESOLUTION = 64
DESCRIBED_AT_ONCE = 256
OLDER_SETS = (
    emoji.EmojiSet(
        "emojione",
        "@iconify-json/emojione@1.2.3",
        "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "CC-BY-4.0",
        "Emoji One",
        "https://github.com/EmojiTwo/emojitwo",
    ),
    emoji.EmojiSet(
        "emojione-v1",
        "@iconify-json/emojione-v1@1.2.3",
        "sha512-UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww==",
        "CC-BY-SA-4.0",
        "Emoji One",
        "https://github.com/joypixels/emojione-legacy",
    ),
    emoji.EmojiSet(
        "noto-v1",
        "@iconify-json/noto-v1@1.2.5",
        "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Apache-2.0",
        "Google",
        "https://github.com/googlefonts/noto-emoji",
    ),
    emoji.EmojiSet(
        "fxemoji",
        "@iconify-json/fxemoji@1.2.2",
        "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        "Apache-2.0",
        "Mozilla",
        "https://github.com/mozilla/fxemoji",
    ),
)
MAKERS = {"noto-v1": "noto"}
"""Older sets whose pictures may be like those of a set of the corpus; the others are their own makers'."""
MIRRORED = {"animals-nature", "food-drink", "people-body", "travel-places", "objects", "activities", "smileys-emotion"}
"""Groups whose subjects stay what they are in a mirror, unless their name says a side or a time."""
SIDED = re.compile(r"left|right|facing|clock|thirty|east|west|arrow|moon|abc|letter|input|direction")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Settings of the judge: about 3 minutes on one core."""

    channels: tuple[int, ...] = (24, 48, 96)
    """Width of each level of the sets' network; each halves the side."""
    hidden: int = 768
    """Width of the subjects' network."""
    embedding: int = 256
    """Width of what is compared with the subjects' vectors."""
    views: int = 4
    """Descriptions of each image, the first of it as it is, the others of disturbed ones."""
    style_steps: int = 1200
    """Steps of the sets' network alone, after those of both."""
    style_batch: int = 64
    """Images a step then."""
    held_out_share: float = 0.15
    """Part of the images that is not trained on, where another image of the subject is."""
    once_share: float = 0.05
    """Part of the subjects of which one image alone is trained on."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=1000,
            batch_size=256,
            learning_rate=2e-3,
            weight_decay=0.05,
            warmup_steps=30,
            ema_decay=0.99,
            checkpoint_every=100,
            mixed_precision="bf16",
        )
    )


@dataclass(frozen=True)
class Pictures:
    """Real images with their set and subject."""

    images: np.ndarray
    """(N, 64, 64, 3) uint8."""
    sets: np.ndarray
    """(N,) names."""
    subjects: np.ndarray
    """(N,) names, as the corpus names them."""

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: np.ndarray) -> Pictures:
        return Pictures(self.images[rows], self.sets[rows], self.subjects[rows])


def spelling(name: str) -> str:
    """A name without what sets spell differently: 'flag-for-flag-norway' and 'flag: norway' are one."""
    name = re.sub(r"^flag-for-(flag-)?", "flag", name.lower()).replace("&", "and")
    return re.sub(r"[^a-z0-9]", "", unicodedata.normalize("NFKD", name))


def other_pictures(corpus: Corpus) -> Pictures:
    """Pictures of the corpus' subjects that are not in it: of the older sets, and flags of countries in OpenMoji's style."""
    named, by_code, present = {}, {}, set(corpus.image_ids)
    for image_id, captions in zip(corpus.image_ids, corpus.captions, strict=True):
        subject = split_caption(captions[0])[0]
        named[spelling(subject)] = subject
        by_code[emoji.plain_code(image_id.partition("-")[2])] = subject
    drawn: list[tuple[Image.Image, str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for drawing in emoji.openmoji_drawings(emoji.fetch_package(emoji.OPENMOJI, folder)):
            subject = by_code.get(emoji.plain_code(drawing.image.image_id.partition("-")[2]))
            if subject and drawing.image.image_id not in present:
                drawn.append((_drawn(drawing.svg), "openmoji", subject))
        for emoji_set in emoji.ICONIFY:
            with tarfile.open(emoji.fetch_package(emoji_set, folder)) as tar:
                characters = json.loads(tar.extractfile("package/chars.json").read())  # type: ignore[union-attr]
            for code, icon in characters.items():
                if subject := by_code.get(emoji.plain_code(code)):
                    named.setdefault(spelling(icon), subject)
        for emoji_set in OLDER_SETS:
            found = {}
            for icon, svg in emoji.iconify_svgs(emoji.fetch_package(emoji_set, folder)):
                found.setdefault(named.get(spelling(icon), ""), svg)
            drawn += [(_drawn(svg), emoji_set.name, subject) for subject, svg in found.items() if subject]
    images, sets, subjects = zip(*drawn, strict=True)
    return Pictures(np.stack([np.asarray(image) for image in images]), np.array(sets), np.array(subjects))


def _drawn(svg: str) -> Image.Image:
    return Image.open(io.BytesIO(emoji.draw(svg, resolution=RESOLUTION))).convert("RGB")


def gather(corpus: Corpus, images: np.ndarray, kept: Path, config: JudgeConfig) -> Pictures:
    """All that the judge is trained on; the pictures that are not in the corpus are kept in the file `kept`."""
    if not kept.exists():
        others = other_pictures(corpus)
        with atomic_path(kept) as temporary, temporary.open("wb") as file:
            np.savez(file, images=others.images, sets=others.sets, subjects=others.subjects)
    with np.load(kept) as arrays:
        others = Pictures(arrays["images"], arrays["sets"], arrays["subjects"])
    known = Pictures(images, np.array(corpus.column("source")), np.array(judging.subjects_of(corpus)))
    unseen, once = judging.held_out_rows(corpus, config.held_out_share, config.once_share)
    away = unseen | once
    once_subjects = set(known.subjects[once].tolist())
    hidden = set(zip(known.sets[unseen].tolist(), known.subjects[unseen].tolist(), strict=True))
    makers = [MAKERS.get(name, name) for name in others.sets]
    allowed = np.array([
        subject not in once_subjects and (maker, subject) not in hidden
        for maker, subject in zip(makers, others.subjects, strict=True)
    ])  # fmt: skip
    joined = Pictures(*(np.concatenate([getattr(known, name), getattr(others, name)]) for name in vars(known)))
    looks = looks_of([look_of(Image.fromarray(image)) for image in joined.images])
    copies = near_copies(looks[np.flatnonzero(away)], looks) if away.any() else []
    kept_rows = np.concatenate([~away, allowed])
    kept_rows[[row for found in copies for row in found]] = False
    return joined[kept_rows]


def disturb(images: torch.Tensor, generator: torch.Generator, mirror: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, 3, 64, 64): moved, with other outlines and colours, blurred, partly hidden.

    Args:
        images: the images.
        generator: of all that is random.
        mirror: (B,) bool; half of these are mirrored.
    """
    count, side = len(images), judging.SIDE

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * 2 - 1

    turn, stretch = uniform(count) * 0.2, (1 + 0.15 * uniform(count, 1, 1)) * (1 + 0.1 * uniform(count, 2, 1))
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], dim=1).view(count, 2, 2) * stretch
    rotation[:, :, 0] *= torch.where(mirror & (uniform(count) > 0), -1.0, 1.0)[:, None]
    moves = torch.cat([rotation, 0.15 * uniform(count, 2, 1)], dim=2)  # the image is 2 wide
    grid = F.affine_grid(moves, [count, 3, side, side], align_corners=False)
    images = F.grid_sample(images - 1, grid, align_corners=False) + 1  # what comes in at the edge is white
    eighth = count // 8 + 1  # one kind of outline or blur for an eighth keeps it cheap; the batch is in random order
    parts = list(images.split(eighth))
    changes = (_without_outlines, _with_outlines, _blurred, _blurred)
    parts[: len(changes)] = [change(part) for change, part in zip(changes, parts, strict=False)]
    images = torch.cat(parts)
    waves = (math.pi * (images.roll(1, 1) * uniform(count, 3, 1, 1) + uniform(count, 3, 1, 1))).sin()  # by colour, not place
    images = images * (1 + 0.2 * uniform(count, 1, 1, 1)) + 0.15 * uniform(count, 1, 1, 1) + 0.15 * uniform(count, 3, 1, 1)
    images = images + 0.15 * waves * uniform(count, 3, 1, 1)
    images = images + torch.randn(images.shape, generator=generator) * 0.08 * uniform(count, 1, 1, 1)
    place, size = uniform(count, 2, 1), 0.35 * uniform(count, 2, 1)  # negative sizes blot nothing out
    inside = (torch.linspace(-1, 1, side) - place).abs() < size  # (B, 2, side)
    blot = (inside[:, 0, None, :] & inside[:, 1, :, None])[:, None]
    return torch.where(blot, uniform(count, 3, 1, 1), images).clamp(-1, 1)


def _without_outlines(images: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(images, 3, stride=1, padding=1)


def _with_outlines(images: torch.Tensor) -> torch.Tensor:
    """Dark where neighbouring pixels differ."""
    steps = _without_outlines(images) + _without_outlines(-images)
    return images - steps.amax(dim=1, keepdim=True).clamp(max=1.5)


def _blurred(images: torch.Tensor) -> torch.Tensor:
    return F.interpolate(F.interpolate(images, judging.SIDE * 5 // 8, mode="area"), judging.SIDE, mode="bilinear")


def nudge(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1] -> the same, shifted, a little brighter or darker, half of them blurred: the set still shows."""
    shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
    images = images.roll(shift, dims=(2, 3))
    half, size = len(images) // 2, int(torch.randint(36, 64, (), generator=generator))
    blurred = F.interpolate(F.interpolate(images[:half], size, mode="area"), images.shape[-1], mode="bilinear")
    images = torch.cat([blurred, images[half:]]) + 0.05 * (torch.rand((len(images), 3, 1, 1), generator=generator) * 2 - 1)
    return (images + torch.randn(images.shape, generator=generator) * 0.03).clamp(-1, 1)


def words_of(corpus: Corpus, subjects: Sequence[str], same: dict[str, str], fewest: int = 3) -> torch.Tensor:
    """(subjects, words) shares: words of each subject's captions and its subgroup, if at least `fewest` subjects have them."""
    words: dict[str, set[str]] = {subject: set() for subject in subjects}
    for captions, subject, kind in zip(corpus.captions, judging.subjects_of(corpus), corpus.column("subgroup"), strict=True):
        said = {word for caption in captions for word in split_caption(caption)[0].replace(":", "").split()}
        words[same[subject]] |= said | {f"kind {kind}"}
    counts = Counter(word for of_subject in words.values() for word in of_subject)
    columns = {word: column for column, word in enumerate(sorted(word for word, count in counts.items() if count >= fewest))}
    shares = torch.zeros(len(subjects), max(1, len(columns)))
    for row, subject in enumerate(subjects):
        shares[row, [columns[word] for word in words[subject] if word in columns]] = 1.0
    return shares / shares.sum(dim=1, keepdim=True).clamp(min=1)


class StyleLoss(nn.Module):
    """Cross-entropy of the set; forward(images, styles) -> scalar."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, images: torch.Tensor, styles: torch.Tensor) -> torch.Tensor:
        """Args: (S, 3, 64, 64) images in [-1, 1] and their (S,) sets."""
        return F.cross_entropy(self.judge.style_logits(images).float(), styles, label_smoothing=0.05)


class JudgeLoss(nn.Module):
    """Cross-entropies of set, subject and the subject's words, so that subjects that share words help each other."""

    def __init__(self, judge: Judge, words: torch.Tensor) -> None:
        super().__init__()
        self.judge = judge
        self.word_head = nn.Linear(judge.prototypes.embedding_dim, words.shape[1])
        self.words = words

    def forward(
        self, described: torch.Tensor, subjects: torch.Tensor, images: torch.Tensor, styles: torch.Tensor
    ) -> torch.Tensor:
        """Args: (B, F) descriptions and (B,) subjects; (S, 3, 64, 64) images in [-1, 1] and (S,) sets, -1 for none."""
        embedded = self.judge.embedding(described)
        subject_loss = F.cross_entropy(self.judge.subject_logits(embedded), subjects, label_smoothing=0.1)
        word_loss = F.cross_entropy(self.word_head(F.relu(embedded)).float(), self.words[subjects])
        style_loss = F.cross_entropy(self.judge.style_logits(images).float(), styles, ignore_index=-1, label_smoothing=0.05)
        return subject_loss + 0.5 * word_loss + style_loss


@torch.inference_mode()
def describe_views(corpus: Corpus, pictures: Pictures, views: int, kept: Path) -> np.ndarray:
    """(views, N, F) float16 descriptions of the pictures as they are and disturbed; kept in the file `kept`."""
    if not kept.exists():
        groups = dict(zip(judging.subjects_of(corpus), corpus.column("group"), strict=True))
        mirror = torch.tensor([groups[subject] in MIRRORED and not SIDED.search(subject) for subject in pictures.subjects])
        generator = torch.Generator().manual_seed(0)
        found: list[np.ndarray] = []
        for view in range(views):
            for start in tqdm(range(0, len(pictures), DESCRIBED_AT_ONCE), desc=f"view {view}"):
                rows = slice(start, start + DESCRIBED_AT_ONCE)
                images = pixel_tensor(pictures.images[rows])
                images = disturb(images, generator, mirror[rows]) if view else images
                found.append(judging.describe(images).half().numpy())
        with atomic_path(kept) as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate(found).reshape(views, len(pictures), -1))
    return np.load(kept)


def train(corpus: Corpus, pictures: Pictures, config: JudgeConfig, *, same: dict[str, str], folder: Path) -> Judge:
    """Train a judge of the corpus' sets and subjects on `pictures`, which it keeps descriptions of in `folder`.

    `same` is that of `judge.same_pictures`.
    """
    torch.manual_seed(config.training.seed)
    styles, subjects = sorted(set(corpus.column("source"))), sorted(set(same.values()))
    judge = Judge(config.channels, styles, subjects, hidden=config.hidden, embedding=config.embedding)
    row_of = {subject: row for row, subject in enumerate(judge.subjects)}
    subject_classes = torch.tensor([row_of[same[subject]] for subject in pictures.subjects])
    style_classes = torch.tensor([styles.index(name) if name in styles else -1 for name in pictures.sets])
    described = torch.from_numpy(describe_views(corpus, pictures, config.views, folder / "described.npy"))
    of_sets = torch.from_numpy(np.flatnonzero(style_classes >= 0))

    def batch_of(rows: np.ndarray, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        views = torch.randint(config.views, (len(rows),), generator=generator)
        some = of_sets[torch.randint(len(of_sets), (max(2, len(rows) // 8),), generator=generator)]
        images = nudge(pixel_tensor(pictures.images[some]), generator)
        return described[views, rows].float(), subject_classes[rows], images, style_classes[some]

    def style_batch_of(rows: np.ndarray, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        some = of_sets[rows]
        return nudge(pixel_tensor(pictures.images[some]), generator), style_classes[some]

    loss = JudgeLoss(judge, words_of(corpus, judge.subjects, same))
    nn.init.normal_(judge.prototypes.weight, std=0.3)
    first = {name: value for name, value in vars(config).items() if not name.startswith("style_")}
    made_from = [corpus.fingerprint, len(pictures), {**first, "training": None}]
    both = fit(
        loss.to(memory_format=torch.channels_last),
        batch_of,
        config.training,
        examples=len(pictures),
        checkpoint=folder / "checkpoint.safetensors",
        made_from=made_from,
        schedule=trapezoid(0.5),
        description="judge",
    )
    judge = both.judge  # type: ignore[assignment]
    alone = fit(
        StyleLoss(judge),
        style_batch_of,
        dataclasses.replace(config.training, steps=config.style_steps, batch_size=config.style_batch),
        examples=len(of_sets),
        checkpoint=folder / "checkpoint-styles.safetensors",
        made_from=made_from,
        schedule=trapezoid(0.5),
        description="sets",
    )
    judge.style_body, judge.style_head = alone.judge.style_body, alone.judge.style_head  # type: ignore
    judge.eval()
    take_means(judge, described[0], subject_classes)
    return judge


@torch.inference_mode()
def take_means(judge: Judge, described: torch.Tensor, subjects: torch.Tensor) -> None:
    """Put the mean embedding of each subject's pictures in place of its learned vector.

    The learned vectors of subjects with one picture are no match for the others': the judge would hardly ever name them.

    Args:
        judge: the judge, in evaluation mode.
        described: (N, F) descriptions of the pictures as they are.
        subjects: (N,) classes; a subject without any keeps its learned vector.
    """
    sums = torch.zeros_like(judge.prototypes.weight)
    sums.index_add_(0, subjects, F.normalize(judge.embedding(described.float()), dim=1))
    known = torch.bincount(subjects, minlength=len(sums)) > 0
    judge.prototypes.weight[known] = F.normalize(sums[known], dim=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the judge, measure it as saved, and keep both."""
    parser = argparse.ArgumentParser(description="Train the judge of benchmarks/emoji.py on real images.")
    parser.add_argument("--run", type=Path, required=True, help="run folder that holds corpus/")
    parser.add_argument("--out", type=Path, default=judging.JUDGE, help="where to write the judge (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=JudgeConfig().training.steps, help="training steps (%(default)s)")
    options = parser.parse_args(arguments)
    config = JudgeConfig()
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=options.steps))
    corpus = Corpus(options.run / "corpus")
    images = load_images(corpus, RESOLUTION)
    folder = options.run / "judge"
    folder.mkdir(exist_ok=True)
    same = judging.same_pictures(corpus, images)
    pictures = gather(corpus, images, folder / "pictures.npz", config)
    judge = train(corpus, pictures, config, same=same, folder=folder)
    facts: dict[str, Any] = {
        "config": config,
        "seed": config.training.seed,
        "parameters": sum(parameter.numel() for parameter in judge.parameters()),
        "corpus_fingerprint": corpus.fingerprint,
        "training_images": len(pictures),
        "same": {subject: other for subject, other in same.items() if subject != other},
        **machine.describe(),
    }
    judging.save(judge, options.out, **facts)
    judge, _ = judging.load(options.out)  # as rounded to float16
    measured = judging.real_figures(judge, corpus, images, dataclasses.asdict(config), same)
    judging.save(judge, options.out, **facts, **measured)
    machine.report(measured, None)


if __name__ == "__main__":
    try:
        main()
    except FastattrError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
