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
import math
import re
import sys
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
from judge_pictures import RESOLUTION, Pictures, gather
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from fastattr.core.captions import split_caption
from fastattr.core.errors import FastattrError
from fastattr.core.files import atomic_path
from fastattr.core.training import TrainingConfig, fit, trapezoid
from fastattr.corpus.store import Corpus
from fastattr.generators.scratch.autoencoder import load_images, pixel_tensor

DESCRIBED_AT_ONCE = 256
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
    both: Any = fit(
        loss.to(memory_format=torch.channels_last),
        batch_of,
        config.training,
        examples=len(pictures),
        checkpoint=folder / "checkpoint.safetensors",
        made_from=made_from,
        schedule=trapezoid(0.5),
        description="judge",
    )
    judge = both.judge
    alone: Any = fit(
        StyleLoss(judge),
        style_batch_of,
        dataclasses.replace(config.training, steps=config.style_steps, batch_size=config.style_batch),
        examples=len(of_sets),
        checkpoint=folder / "checkpoint-styles.safetensors",
        made_from=made_from,
        schedule=trapezoid(0.5),
        description="sets",
    )
    judge.style_body, judge.style_head = alone.judge.style_body, alone.judge.style_head
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
    pictures = gather(corpus, images, folder / "pictures.npz", config.held_out_share, config.once_share)
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
