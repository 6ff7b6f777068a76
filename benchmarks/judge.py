"""Judge: a small network that names an emoji's set and its subject, trained on the real images and used for nothing else.

    python benchmarks/judge.py --run runs/emoji

Reads RUN/corpus; writes benchmarks/judge/ (model.safetensors in float16, config.json with its accuracies).

It has never seen a generated image, and nothing of the generator is trained or chosen by it. It must name a subject whose
pictures in other sets it knows, so training turns (up to 10 degrees), stretches (up to 15%), shifts (up to 5 pixels), blurs
(down to 28 pixels a side and up again, three images in four), changes contrast (up to 15%), brightness (up to 7% of the
pixel range) and each colour (up to 10%), and adds noise (standard deviation up to 4% of the range). Part of the images is
held out and gives the honest accuracy: unseen drawings of subjects that are known from other sets.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from fastattr.core.captions import split_caption
from fastattr.core.errors import ArtifactDamagedError, FastattrError
from fastattr.core.files import atomic_path, read_json, sha256_file, write_json
from fastattr.core.training import TrainingConfig, fit
from fastattr.corpus.store import Corpus
from fastattr.generators.scratch.autoencoder import held_out, load_images, pixel_tensor

JUDGE = Path(__file__).parent / "judge"


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Settings of the judge: about 6 minutes on one core."""

    channels: tuple[int, ...] = (24, 48, 96, 192)
    """Width of each level; each halves the side."""
    resolution: int = 64
    held_out_share: float = 0.15
    """Part of the images that is not trained on, where another image of the subject is."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=2500,
            batch_size=96,
            learning_rate=3e-3,
            weight_decay=0.05,
            warmup_steps=100,
            ema_decay=0.995,
            checkpoint_every=200,
            mixed_precision="bf16",
        )
    )


class Judge(nn.Module):
    """Convolutional network with a head for the set and one for the subject."""

    def __init__(self, channels: Sequence[int], styles: Sequence[str], subjects: Sequence[str]) -> None:
        super().__init__()
        self.styles, self.subjects = list(styles), list(subjects)
        layers: list[nn.Module] = []
        for before, width in zip((3, *channels), channels, strict=False):
            layers += [_block(before, width, stride=2)]
            layers += [] if before == 3 else [_block(width, width, stride=1)]
        self.body = nn.Sequential(*layers)
        self.style_head = nn.Linear(channels[-1], len(self.styles))
        self.subject_head = nn.Linear(4 * channels[-1], len(self.subjects))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) in [-1, 1] -> logits (B, sets) and (B, subjects)."""
        found = self.body(images.contiguous(memory_format=torch.channels_last))
        quarters = F.adaptive_avg_pool2d(found, 2).flatten(1)  # where something is tells subjects apart
        return self.style_head(found.mean(dim=(2, 3))), self.subject_head(quarters)


def _block(before: int, width: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
    )


class JudgeLoss(nn.Module):
    """Sum of both heads' cross-entropies; forward(images, styles, subjects) -> scalar."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, images: torch.Tensor, styles: torch.Tensor, subjects: torch.Tensor) -> torch.Tensor:
        """Args: images (B, 3, H, W) in [-1, 1]; classes (B,)."""
        style_logits, subject_logits = self.judge(images)
        subject_loss = F.cross_entropy(subject_logits.float(), subjects, label_smoothing=0.1)
        return F.cross_entropy(style_logits.float(), styles) + subject_loss


def disturb(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1] -> the same, turned, stretched, shifted, blurred, in other colours, and with noise."""
    count, side = len(images), images.shape[-1]

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * 2 - 1

    turn, stretch = uniform(count) * 0.17, 1 + 0.15 * uniform(count, 2, 1)
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], dim=1).view(count, 2, 2)
    shift = uniform(count, 2, 1) * 5 * 2 / side  # grid units: the image is 2 wide
    moves = torch.cat([rotation * stretch, shift], dim=2)
    grid = F.affine_grid(moves, list(images.shape), align_corners=False)
    images = F.grid_sample(images - 1, grid, align_corners=False) + 1  # what comes in at the edge is white
    sizes = torch.randint(28, side, (3,), generator=generator).tolist()
    parts = images.chunk(4)  # one size a quarter keeps it cheap; the batch is in random order
    small = [F.interpolate(part, size, mode="area") for part, size in zip(parts[:3], sizes, strict=False)]
    images = torch.cat([*(F.interpolate(part, side, mode="bilinear") for part in small), *parts[3:]])
    images = images * (1 + 0.15 * uniform(count, 1, 1, 1)) + 0.15 * uniform(count, 1, 1, 1) + 0.2 * uniform(count, 3, 1, 1)
    noise = torch.randn(images.shape, generator=generator) * 0.08 * uniform(count, 1, 1, 1)
    return (images + noise).clamp(-1, 1)


def subjects_of(corpus: Corpus) -> list[str]:
    """(N,) subject of each image's main caption."""
    return [split_caption(captions[0])[0] for captions in corpus.captions]


def held_out_rows(corpus: Corpus, share: float) -> np.ndarray:
    """(N,) bool: images that the judge is not trained on; another image of each one's subject always is."""
    chosen = held_out(corpus.image_ids, share)
    subjects = np.array(subjects_of(corpus))
    trained_on = set(subjects[~chosen].tolist())
    return chosen & np.array([subject in trained_on for subject in subjects])


def train(corpus: Corpus, images: np.ndarray, config: JudgeConfig, *, checkpoint: Path) -> Judge:
    """Train a judge on the images that are not held out; (N, H, W, 3) uint8, in the corpus' row order."""
    styles, subjects = corpus.column("source"), subjects_of(corpus)
    torch.manual_seed(config.training.seed)
    judge = Judge(config.channels, sorted(set(styles)), sorted(set(subjects)))
    style_classes = torch.tensor([judge.styles.index(style) for style in styles])
    subject_classes = torch.tensor([judge.subjects.index(subject) for subject in subjects])
    training_rows = np.flatnonzero(~held_out_rows(corpus, config.held_out_share))

    def batch_of(rows: np.ndarray, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        picked = training_rows[rows]
        return disturb(pixel_tensor(images[picked]), generator), style_classes[picked], subject_classes[picked]

    average = fit(
        JudgeLoss(judge).to(memory_format=torch.channels_last),
        batch_of,
        config.training,
        examples=len(training_rows),
        checkpoint=checkpoint,
        description="judge",
    )
    trained: Judge = average.judge  # type: ignore[assignment]
    return trained


@torch.inference_mode()
def predict(judge: Judge, images: np.ndarray, *, batch_size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """(N,) set names and (N,) subjects of (N, H, W, 3) uint8 images."""
    styles, subjects = [], []
    for start in range(0, len(images), batch_size):
        style_logits, subject_logits = judge(pixel_tensor(images[start : start + batch_size]))
        styles += [judge.styles[index] for index in style_logits.argmax(dim=1)]
        subjects += [judge.subjects[index] for index in subject_logits.argmax(dim=1)]
    return np.array(styles), np.array(subjects)


def accuracies(
    judge: Judge, images: np.ndarray, styles: Sequence[str], subjects: Sequence[str], suffix: str
) -> dict[str, float | int]:
    """Shares of images whose set, subject or both the judge names; keys end in `suffix`."""
    found_styles, found_subjects = predict(judge, images)
    style_right, subject_right = found_styles == np.array(styles), found_subjects == np.array(subjects)
    return {
        **machine.share(f"style_accuracy_{suffix}", style_right),
        **machine.share(f"subject_right_{suffix}", subject_right),
        **machine.share(f"both_right_{suffix}", style_right & subject_right),
    }


def save(judge: Judge, folder: Path, **facts: Any) -> None:
    """Write a judge in float16, and its classes and `facts` as config.json."""
    tensors = {name: value.half() if value.is_floating_point() else value for name, value in judge.state_dict().items()}
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
    classes = {"styles": judge.styles, "subjects": judge.subjects}
    write_json(folder / "config.json", {**facts, **classes, "sha256": sha256_file(folder / "model.safetensors")})


def load(folder: Path = JUDGE) -> tuple[Judge, dict[str, Any]]:
    """A saved judge, and its config.json.

    Raises:
        ArtifactNotFoundError: there is none.
        ArtifactDamagedError: the weights are not those of config.json.
    """
    facts = read_json(folder / "config.json")
    path = folder / "model.safetensors"
    if not path.exists() or sha256_file(path) != facts["sha256"]:
        raise ArtifactDamagedError(f"{path} is missing or not the file of config.json; train the judge again.")
    judge = Judge(facts["config"]["channels"], facts["styles"], facts["subjects"])
    judge.load_state_dict(load_file(path))  # copied into float32
    return judge.eval(), facts


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the judge, measure it as saved, and keep both."""
    parser = argparse.ArgumentParser(description="Train the judge of benchmarks/emoji.py on the real images.")
    parser.add_argument("--run", type=Path, required=True, help="run folder that holds corpus/")
    parser.add_argument("--out", type=Path, default=JUDGE, help="where to write the judge (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=JudgeConfig().training.steps, help="training steps (%(default)s)")
    options = parser.parse_args(arguments)
    config = JudgeConfig()
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=options.steps))
    corpus = Corpus(options.run / "corpus")
    images = load_images(corpus, config.resolution)
    checkpoint = options.run / "judge-checkpoint.safetensors"
    judge = train(corpus, images, config, checkpoint=checkpoint)
    facts: dict[str, Any] = {
        "config": config,
        "seed": config.training.seed,
        "parameters": sum(parameter.numel() for parameter in judge.parameters()),
        "corpus_fingerprint": corpus.fingerprint,
        **machine.describe(),
    }
    save(judge, options.out, **facts)
    judge, _ = load(options.out)  # as rounded to float16
    styles, subjects = np.array(corpus.column("source")), np.array(subjects_of(corpus))
    unseen = held_out_rows(corpus, config.held_out_share)
    measured = {}
    for suffix, rows in (("training", ~unseen), ("held_out", unseen)):
        measured |= accuracies(judge, images[rows], styles[rows], subjects[rows], suffix)
    save(judge, options.out, **facts, **measured)
    checkpoint.unlink(missing_ok=True)
    machine.report(measured, None)


if __name__ == "__main__":
    try:
        main()
    except FastattrError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
