"""Judge: a small network that tells an emoji's set and CLDR subgroup, trained on the real images and used for nothing else.

    python benchmarks/judge.py --run runs/emoji

Reads RUN/corpus; writes benchmarks/judge/ (model.safetensors in float16, config.json with its accuracies).

It has never seen a generated image, and nothing of the generator is trained or chosen by it. Generated images are a
little softer than real ones, so training shifts (up to 3 pixels, also by parts of one), blurs (down to 28 pixels a side
and up again, three images in four), changes contrast (up to 10%) and brightness (up to 5% of the pixel range) and adds
noise (standard deviation up to 4% of it). Part of the families (a design and its skin tones) is held out and gives the
honest accuracy: unseen drawings, though of subjects mostly known from other sets. Classes are as unequal as they come.
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

from fastattr.core.errors import ArtifactDamagedError, FastattrError
from fastattr.core.files import atomic_path, read_json, sha256_file, write_json
from fastattr.core.training import TrainingConfig, fit
from fastattr.corpus.store import Corpus
from fastattr.generators.scratch.autoencoder import held_out, load_images, pixel_tensor

JUDGE = Path(__file__).parent / "judge"
UNKNOWN = -100
"""Class of an image without a subgroup; cross-entropy leaves it out."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Settings of the judge: 0.55 M parameters, 45 MFLOP an image, about 6 minutes on one core."""

    channels: tuple[int, ...] = (24, 48, 96, 160)
    """Width of each level; each halves the side."""
    resolution: int = 64
    held_out_share: float = 0.15
    """Part of the image families that is not trained on."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=4500,
            batch_size=64,
            learning_rate=3e-3,
            weight_decay=0.05,
            warmup_steps=100,
            ema_decay=0.995,
            checkpoint_every=200,
        )
    )


class Judge(nn.Module):
    """Convolutional network with a head for the set and one for the subgroup."""

    def __init__(self, channels: Sequence[int], styles: Sequence[str], subgroups: Sequence[str]) -> None:
        super().__init__()
        self.styles, self.subgroups = list(styles), list(subgroups)
        layers: list[nn.Module] = []
        for before, width in zip((3, *channels), channels, strict=False):
            layers += [_block(before, width, stride=2)]
            layers += [] if before == 3 else [_block(width, width, stride=1)]
        self.body = nn.Sequential(*layers)
        self.style_head = nn.Linear(channels[-1], len(self.styles))
        self.subgroup_head = nn.Linear(channels[-1], len(self.subgroups))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) in [-1, 1] -> logits (B, sets) and (B, subgroups)."""
        found = self.body(images.contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3))
        return self.style_head(found), self.subgroup_head(found)


def _block(before: int, width: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
    )


class JudgeLoss(nn.Module):
    """Sum of both heads' cross-entropies; forward(images, styles, subgroups) -> scalar."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, images: torch.Tensor, styles: torch.Tensor, subgroups: torch.Tensor) -> torch.Tensor:
        """Args: images (B, 3, H, W) in [-1, 1]; classes (B,), `UNKNOWN` where there is no subgroup."""
        style_logits, subgroup_logits = self.judge(images)
        known = (subgroups != UNKNOWN).sum().clamp_min(1)
        subgroup_loss = F.cross_entropy(subgroup_logits, subgroups, ignore_index=UNKNOWN, reduction="sum") / known
        return F.cross_entropy(style_logits, styles) + subgroup_loss


def disturb(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1] -> the same, shifted, blurred, brightened or darkened, and with noise."""
    count, side = len(images), images.shape[-1]

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * 2 - 1

    moves = torch.eye(2, 3).repeat(count, 1, 1)
    moves[:, :, 2] = uniform(count, 2) * 3 * 2 / side  # grid units: the image is 2 wide
    grid = F.affine_grid(moves, list(images.shape), align_corners=False)
    images = F.grid_sample(images - 1, grid, align_corners=False) + 1  # what comes in at the edge is white
    sizes = torch.randint(28, side, (3,), generator=generator).tolist()
    parts = images.chunk(4)  # one size a quarter keeps it cheap; the batch is in random order
    small = [F.interpolate(part, size, mode="area") for part, size in zip(parts[:3], sizes, strict=False)]
    images = torch.cat([*(F.interpolate(part, side, mode="bilinear") for part in small), *parts[3:]])
    images = images * (1 + 0.1 * uniform(count, 1, 1, 1)) + 0.1 * uniform(count, 1, 1, 1)
    noise = torch.randn(images.shape, generator=generator) * 0.08 * uniform(count, 1, 1, 1)
    return (images + noise).clamp(-1, 1)


def classes_of(names: Sequence[str], known: Sequence[str]) -> np.ndarray:
    """(N,) positions of names in `known`, `UNKNOWN` for ''."""
    position = {name: index for index, name in enumerate(known)} | {"": UNKNOWN}
    return np.array([position[name] for name in names], dtype=np.int64)


def families(corpus: Corpus) -> list[str]:
    """(N,) family of each image; one without a family is its own, as for the autoencoder."""
    return [family or image_id for family, image_id in zip(corpus.column("family"), corpus.image_ids, strict=True)]


def held_out_rows(corpus: Corpus, share: float) -> np.ndarray:
    """(N,) bool: images that the judge is not trained on."""
    return held_out(families(corpus), share)


def train(corpus: Corpus, images: np.ndarray, config: JudgeConfig, *, checkpoint: Path) -> Judge:
    """Train a judge on the images that are not held out; (N, H, W, 3) uint8, in the corpus' row order."""
    styles, subgroups = corpus.column("source"), corpus.column("subgroup")
    torch.manual_seed(config.training.seed)
    judge = Judge(config.channels, sorted(set(styles)), sorted(set(subgroups) - {""}))
    style_classes = torch.from_numpy(classes_of(styles, judge.styles))
    subgroup_classes = torch.from_numpy(classes_of(subgroups, judge.subgroups))
    training_rows = np.flatnonzero(~held_out_rows(corpus, config.held_out_share))

    def batch_of(rows: np.ndarray, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        picked = training_rows[rows]
        return disturb(pixel_tensor(images[picked]), generator), style_classes[picked], subgroup_classes[picked]

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
    """(N,) set names and (N,) subgroup names of (N, H, W, 3) uint8 images."""
    styles, subgroups = [], []
    for start in range(0, len(images), batch_size):
        style_logits, subgroup_logits = judge(pixel_tensor(images[start : start + batch_size]))
        styles += [judge.styles[index] for index in style_logits.argmax(dim=1)]
        subgroups += [judge.subgroups[index] for index in subgroup_logits.argmax(dim=1)]
    return np.array(styles), np.array(subgroups)


def accuracies(
    judge: Judge, images: np.ndarray, styles: Sequence[str], subgroups: Sequence[str], suffix: str
) -> dict[str, float | int]:
    """Shares of images whose set and, where they have one, subgroup the judge names: `style_accuracy_<suffix>`, ..."""
    found_styles, found_subgroups = predict(judge, images)
    known = np.array(subgroups) != ""
    return {
        **machine.share(f"style_accuracy_{suffix}", found_styles == np.array(styles)),
        **machine.share(f"subgroup_accuracy_{suffix}", (found_subgroups == np.array(subgroups))[known]),
    }


def save(judge: Judge, folder: Path, **facts: Any) -> None:
    """Write a judge in float16, and its classes and `facts` as config.json."""
    tensors = {name: value.half() if value.is_floating_point() else value for name, value in judge.state_dict().items()}
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
    classes = {"styles": judge.styles, "subgroups": judge.subgroups}
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
    judge = Judge(facts["config"]["channels"], facts["styles"], facts["subgroups"])
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
    styles, subgroups = np.array(corpus.column("source")), np.array(corpus.column("subgroup"))
    unseen = held_out_rows(corpus, config.held_out_share)
    measured = {}
    for suffix, rows in (("training", ~unseen), ("held_out", unseen)):
        measured |= accuracies(judge, images[rows], styles[rows], subgroups[rows], suffix)
    save(judge, options.out, **facts, **measured)
    checkpoint.unlink(missing_ok=True)
    machine.report(measured, None)


if __name__ == "__main__":
    try:
        main()
    except FastattrError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
