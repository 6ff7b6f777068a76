"""Judge: a small network that names an emoji's set and its subject, trained on real images and used for nothing else.

`judge_training.py` trains it and writes benchmarks/judge/ (model.safetensors in float16, config.json with its accuracies).
It has never seen a generated image, and nothing of the generator is trained or chosen by it.

Two subjects count as one if some set draws the same picture for both ('flag: norway' and 'flag: bouvet island'): no one
could tell them apart. `same_pictures` finds them among the real images; no drawing has a say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from fastattr.core.captions import split_caption
from fastattr.core.errors import ArtifactDamagedError, ArtifactNotFoundError
from fastattr.core.files import atomic_path, read_json, sha256_file, write_json
from fastattr.corpus.near_copies import near_copies
from fastattr.corpus.store import Corpus
from fastattr.generators.scratch.autoencoder import held_out, pixel_tensor

JUDGE = Path(__file__).parent / "judge"
SIDE = 64
"""Pixels a side at which images are read."""
ORIENTATIONS = 8
"""Directions of an edge that are told apart; dark-to-light and light-to-dark count as one, as sets differ in it."""
SHADES = 4
"""Soft steps of red, of green and of blue in a colour histogram."""
SHARPNESS = 16.0
"""Factor of the cosines before the softmax over subjects."""
SHIFTS = ((0, 0), (2, 1), (-2, 1), (0, -2))
"""Pixels of 64 by which an image is moved; the verdict is the mean over all."""
SAME_MEAN, SAME_MOST = 2.0, 48
"""Of 255: two pictures of one set are the same if they differ by no more than this, in the mean and in any value."""


def describe(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, 64, 64) in [-1, 1] -> (B, 1324): what an image shows, without what differs most from set to set.

    Histograms of edge directions in 8 x 8 and 4 x 4 overlapping places, how strong edges are there, the colours of a
    thumbnail of 10 x 10, and colour histograms of the whole and of its quarters. Source of the first: Dalal and Triggs,
    "Histograms of Oriented Gradients for Human Detection" (2005).
    """
    across, down = F.pad(images[..., 2:] - images[..., :-2], (1, 1)), images[..., 2:, :] - images[..., :-2, :]
    down = F.pad(down, (0, 0, 1, 1))
    strongest = (across.square() + down.square()).argmax(dim=1, keepdim=True)  # of the three colours
    across, down = across.gather(1, strongest), down.gather(1, strongest)
    size = (across.square() + down.square() + 1e-6).sqrt()
    angles = torch.arange(ORIENTATIONS).view(-1, 1, 1) * (2 * math.pi / ORIENTATIONS)  # of twice the direction
    edges = F.relu((across.square() - down.square()) / size * angles.cos() + 2 * across * down / size * angles.sin())
    fine = F.avg_pool2d(F.pad(F.avg_pool2d(edges, 4), (1, 1, 1, 1), mode="replicate"), 4, 2)  # (B, 8, 8, 8)
    total, coarse = fine.sum(dim=1, keepdim=True), F.avg_pool2d(fine, 2)
    mean = total.mean(dim=(2, 3), keepdim=True)
    red, green, blue = F.adaptive_avg_pool2d(images, 10).unbind(dim=1)
    thumbnail = torch.stack([(red + green + blue) / 3, red - green, blue - (red + green) / 2], dim=1)
    steps = torch.linspace(-1, 1, SHADES).view(-1, 1, 1)
    shades = F.relu(1 - 1.5 * (F.avg_pool2d(images, 2)[:, :, None] - steps).abs())  # (B, 3, SHADES, 32, 32)
    colours = torch.einsum("brxy,bgxy->brgxy", shades[:, 0], shades[:, 1]).flatten(1, 2)
    quarters = torch.cat([F.adaptive_avg_pool2d(colours * blues[:, None], 2) for blues in shades[:, 2].unbind(dim=1)], dim=1)
    parts = (
        (fine / (total + 0.5 * mean + 1e-3)).sqrt(),
        0.3 * (total / (mean + 1e-3)).sqrt(),
        3 * (coarse / (coarse.sum(dim=(1, 2, 3), keepdim=True) + 1e-3)).sqrt(),
        0.5 * thumbnail,
        quarters.sqrt(),
        2 * quarters.mean(dim=(2, 3)).sqrt(),
    )
    return torch.cat([part.flatten(1) for part in parts], dim=1)


class Judge(nn.Module):
    """A small convolutional network for the set; for the subject, a description's embedding beside a vector of each subject."""

    def __init__(
        self,
        channels: Sequence[int],
        styles: Sequence[str],
        subjects: Sequence[str],
        *,
        hidden: int = 768,
        embedding: int = 256,
    ) -> None:
        """Args: widths of the set's network; names of the classes; widths of the subject's network."""
        super().__init__()
        self.styles, self.subjects = list(styles), list(subjects)
        layers: list[nn.Module] = [
            _block(before, width, stride=2) for before, width in zip([3, *channels], channels, strict=False)
        ]
        self.style_body = nn.Sequential(*layers, _block(channels[-1], channels[-1], stride=1))
        self.style_head = nn.Linear(channels[-1], len(self.styles))
        described = describe(torch.zeros(1, 3, SIDE, SIDE)).shape[1]
        self.embedding = nn.Sequential(
            nn.BatchNorm1d(described),
            nn.Dropout(0.2),
            nn.Linear(described, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(hidden, embedding, bias=False),
            nn.BatchNorm1d(embedding),
        )
        self.prototypes = nn.Embedding(len(self.subjects), embedding)

    def subject_logits(self, embedded: torch.Tensor) -> torch.Tensor:
        """(B, D) -> (B, subjects)."""
        return SHARPNESS * F.normalize(embedded.float(), dim=1) @ F.normalize(self.prototypes.weight.float(), dim=1).T

    def style_logits(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, 64, 64) in [-1, 1] -> (B, sets)."""
        found = self.style_body(images.contiguous(memory_format=torch.channels_last))
        logits: torch.Tensor = self.style_head(found.mean(dim=(2, 3)))
        return logits

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, 64, 64) in [-1, 1] -> logits (B, sets) and (B, subjects)."""
        return self.style_logits(images), self.subject_logits(self.embedding(describe(images)))


def _block(before: int, width: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
    )


def subjects_of(corpus: Corpus) -> list[str]:
    """(N,) subject of each image's main caption."""
    return [split_caption(captions[0])[0] for captions in corpus.captions]


def same_pictures(corpus: Corpus, images: np.ndarray) -> dict[str, str]:
    """Subject -> the subject that it counts as, of all that look the same in some set; others count as themselves.

    Args:
        corpus: the real images.
        images: (N, H, W, 3) uint8, its pictures.
    """
    subjects, sets, looks = subjects_of(corpus), corpus.column("source"), corpus.looks()
    named = {subject: subject for subject in subjects}
    for row, others in enumerate(near_copies(looks, looks)):
        for other in others:
            difference = np.abs(images[row].astype(np.int16) - images[other])
            if sets[row] == sets[other] and difference.max() <= SAME_MOST and difference.mean() <= SAME_MEAN:
                kept, renamed = sorted((named[subjects[row]], named[subjects[other]]))
                named = {subject: kept if name == renamed else name for subject, name in named.items()}
    return named


def held_out_rows(corpus: Corpus, share: float, share_once: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Images that the judge is not trained on: (N,) bool, twice.

    The first are of subjects that it knows from other sets, one image in 1 / `share`. The second are of subjects that it
    knows from a single image: `share_once` of the subjects that several sets draw, all images of each but one.
    """
    subjects, image_ids = np.array(subjects_of(corpus)), np.array(corpus.image_ids)
    names, counts = np.unique(subjects, return_counts=True)
    known_once = set(names[held_out([f"once {name}" for name in names], share_once) & (counts > 1)].tolist())
    of_those = np.array([subject in known_once for subject in subjects])
    kept = [np.random.default_rng(row).choice(np.flatnonzero(subjects == name)) for row, name in enumerate(sorted(known_once))]
    chosen = held_out(image_ids.tolist(), share) & ~of_those
    trained_on = set(subjects[~chosen].tolist())
    of_those[kept] = False
    return chosen & np.array([subject in trained_on for subject in subjects]), of_those


@torch.inference_mode()
def predict(judge: Judge, images: np.ndarray, *, batch_size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """(N,) set names and (N,) subjects of (N, H, W, 3) uint8 images, by the mean over `SHIFTS`."""
    styles, subjects = [], []
    for start in range(0, len(images), batch_size):
        batch = pixel_tensor(images[start : start + batch_size])
        verdicts = [judge(batch.roll(shift, dims=(2, 3))) for shift in SHIFTS]
        style_logits, subject_logits = (torch.stack(logits).float().mean(dim=0) for logits in zip(*verdicts, strict=True))
        styles += [judge.styles[index] for index in style_logits.argmax(dim=1)]
        subjects += [judge.subjects[index] for index in subject_logits.argmax(dim=1)]
    return np.array(styles), np.array(subjects)


def accuracies(
    judge: Judge, images: np.ndarray, styles: Sequence[str], subjects: Sequence[str], same: dict[str, str], suffix: str
) -> dict[str, float | int]:
    """Shares of images whose set, subject or both the judge names; keys end in `suffix`.

    Args:
        judge: the judge.
        images: (N, H, W, 3) uint8.
        styles: (N,) right sets.
        subjects: (N,) right subjects.
        same: of `same_pictures`; a subject counts as the one that it maps to.
        suffix: of the keys.
    """
    found_styles, found_subjects = predict(judge, images)
    asked = np.array([same.get(subject, subject) for subject in subjects])
    style_right, subject_right = found_styles == np.array(styles), found_subjects == asked
    return {
        **machine.share(f"style_accuracy_{suffix}", style_right),
        **machine.share(f"subject_right_{suffix}", subject_right),
        **machine.share(f"both_right_{suffix}", style_right & subject_right),
    }


def real_figures(
    judge: Judge, corpus: Corpus, images: np.ndarray, config: dict[str, Any], same: dict[str, str]
) -> dict[str, float | int]:
    """The judge's accuracies on the real images that it was not trained on; (N, H, W, 3) uint8, in the corpus' row order.

    Keys end in real_held_out where other images of the subject are known, and in real_known_once where a single one is.
    """
    styles, subjects = np.array(corpus.column("source")), np.array(subjects_of(corpus))
    figures: dict[str, float | int] = {}
    for suffix, rows in zip(
        ("real_held_out", "real_known_once"), held_out_rows(corpus, config["held_out_share"], config["once_share"]), strict=True
    ):
        figures |= accuracies(judge, images[rows], styles[rows].tolist(), subjects[rows].tolist(), same, suffix)
    return figures


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
    path, train = folder / "model.safetensors", "train the judge: python benchmarks/judge_training.py --run runs/emoji"
    if not (folder / "config.json").exists():
        raise ArtifactNotFoundError(f"{folder} holds no judge; {train}")
    facts = read_json(folder / "config.json")
    if not path.exists() or sha256_file(path) != facts["sha256"]:
        raise ArtifactDamagedError(f"{path} is missing or not the file of config.json; {train}")
    settings = facts["config"]
    judge = Judge(
        settings["channels"], facts["styles"], facts["subjects"], hidden=settings["hidden"], embedding=settings["embedding"]
    )
    judge.load_state_dict(load_file(path))  # copied into float32
    return judge.eval(), facts
