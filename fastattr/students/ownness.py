"""Ownness: do an image and its prompt look like what this generator makes?

An attribution names the training images that influenced a *generated* image. For a photograph, or a drawing with another
prompt than its own, it would name what merely resembles it. Three checks, fitted on the generator's own queries:

- the picture's brightness, contrast, saturation and roughness lie where those of own pictures lie (noise, one colour);
- half of the prompt's words stand in training captions (a prompt in words that the generator never saw);
- a small network that learned to tell own pictures with their prompts from own pictures with other prompts (`Match`) takes the
  picture for the prompt's. Its threshold is a quantile over validation queries: so many own images are called foreign.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy import ndarray
from PIL import Image

MEASURES = ("brightness", "contrast", "saturation", "roughness")
"""What `measures_of` measures."""
MEASURE_SIDE = 64
"""Pixels; `measures_of` looks at pictures of this size."""
LEAST_QUERIES = 64
"""Training queries without which no network learns which pictures go with which prompts."""
LEAST_HELD_OUT = 20
"""Validation queries without which no threshold keeps false alarms at 5%."""
HIDDEN = 64
"""Width of the hidden layer of `Match`."""
STEPS, EXAMPLES = 800, 256
"""Of the training of `Match`: steps, and pairs of either kind at each."""


@dataclass(frozen=True)
class Match:
    """How badly a picture goes with its prompt, by the features of both; earlier calibrations have a `Density` instead."""

    image: ndarray
    text: ndarray
    """(F,) float32, 1 for features of the picture alone and of the prompt alone."""
    image_axes: ndarray
    text_axes: ndarray
    """(Fi, P) and (Ft, P) float32, directions in which picture and prompt are compared; P = 0: as they are."""
    hidden: ndarray
    bias: ndarray
    out: ndarray
    """(3P, H), (H,) and (H,) float32."""
    threshold: ndarray
    """() distances above it are called foreign."""

    def inputs(self, features: ndarray) -> ndarray:
        """(Q, F) features -> (Q, 3P): picture and prompt, scaled to have values near 1, and their products."""
        parts = []
        for chosen, axes in ((self.image, self.image_axes), (self.text, self.text_axes)):
            part = features[:, chosen > 0]
            parts.append((part @ axes if axes.size else part) * np.float32(part.shape[1] ** 0.5))
        return np.concatenate([parts[0] * parts[1], *parts], axis=1)

    def distance(self, features: ndarray) -> ndarray:
        """(Q,) log odds that (Q, F) features are of a picture with another prompt than its own."""
        return np.maximum(self.inputs(features) @ self.hidden + self.bias, 0) @ self.out


def fit_match(own: ndarray, held_out: ndarray, *, image: ndarray, text: ndarray, false_alarms: float, seed: int = 0) -> Match:
    """Learn to tell own pictures with their prompts from own pictures with other prompts.

    `own` (M, F) are features of generated images and prompts; on `held_out` (V, F) of others the threshold is set. `image`
    (F,) bool are the features of the picture alone, `text` those of the prompt alone. `false_alarms` in (0, 1) is the part of
    own images that may be called foreign; with V held-out ones no less than 1 / V.
    """
    import torch
    from torch.nn import functional as F

    axes = [np.zeros((int(part.sum()), 0), np.float32) for part in (image, text)]
    if image.sum() != text.sum():
        left, _, right = np.linalg.svd(own[:, image].T @ own[:, text], full_matrices=False)
        axes = [left.astype(np.float32), right.T.astype(np.float32)]
    none, never = np.zeros(0, np.float32), np.array(np.inf)
    start = Match(image.astype(np.float32), text.astype(np.float32), axes[0], axes[1], none, none, none, never)
    width = start.inputs(own[:1]).shape[1]
    rng, random = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    hidden = (torch.randn(width, HIDDEN, generator=random) / width**0.5).requires_grad_()
    out = (torch.randn(HIDDEN, generator=random) / HIDDEN**0.5).requires_grad_()
    bias = torch.zeros(HIDDEN, requires_grad=True)
    optimizer = torch.optim.AdamW([hidden, out, bias], lr=2e-3, weight_decay=0.5)
    wrong = torch.cat([torch.zeros(EXAMPLES), torch.ones(EXAMPLES)])
    for _ in range(STEPS):
        picked, others = rng.integers(0, len(own), (2, EXAMPLES))
        exchanged = np.where(text, own[others], own[picked])
        inputs = torch.from_numpy(start.inputs(np.concatenate([own[picked], exchanged])))
        loss = F.binary_cross_entropy_with_logits(torch.relu(inputs @ hidden + bias) @ out, wrong)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    match = replace(start, hidden=hidden.detach().numpy(), bias=bias.detach().numpy(), out=out.detach().numpy())
    distances = np.sort(match.distance(held_out))
    # The quantile that own images exceed with this probability, their number taken into account (split conformal).
    place = min(len(distances) - 1, int(np.ceil((len(distances) + 1) * (1 - false_alarms))) - 1)
    return replace(match, threshold=np.array(distances[max(place, 0)]))


@dataclass(frozen=True)
class Density:
    """A Gaussian over features of own images with their prompts: what calibrations of format 1 have instead of a `Match`."""

    mean: ndarray
    axes: ndarray
    variances: ndarray
    """(F,), (P, F) orthonormal and (P,) float32, along the axes."""
    rest: ndarray
    threshold: ndarray
    """() variance along each of the other directions, and the distance above which a picture is called foreign."""

    def distance(self, features: ndarray) -> ndarray:
        """(Q,) squared distance of (Q, F) features, in standard deviations, divided by F."""
        centred = features - self.mean
        along = centred @ self.axes.T
        within = (along**2 / self.variances).sum(axis=1)
        beyond = np.maximum((centred**2).sum(axis=1) - (along**2).sum(axis=1), 0.0) / self.rest
        return (within + beyond) / features.shape[1]


def measures_of(image: Image.Image) -> ndarray:
    """(4,) float32 `MEASURES` of an RGB picture, each 0 to 1.

    Mean and standard deviation of the brightness, mean difference between the largest and the smallest channel, and mean
    difference between neighbouring pixels.
    """
    pixels = np.asarray(image.resize((MEASURE_SIDE, MEASURE_SIDE), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    grey = pixels.mean(axis=2)
    steps = sum(np.abs(np.diff(grey, axis=axis)).mean() for axis in (0, 1)) / 2
    return np.array([grey.mean(), grey.std(), np.ptp(pixels, axis=2).mean(), steps], dtype=np.float32)


def words_of(texts: Iterable[str]) -> set[str]:
    """The words of three letters or more of some texts, in lower case."""
    return {word for text in texts for word in re.findall(r"[^\W\d_]{3,}", text.lower())}


@dataclass(frozen=True)
class Ownness:
    """The checks."""

    match: Match | Density | None
    """None where features are not of picture and prompt apart, or queries were too few."""
    ranges: ndarray | None
    """(2, 4) float32, lowest and highest `MEASURES` of own pictures; None in format 1."""
    words: frozenset[str] | None
    """Of training captions; None in format 1."""

    def doubts(self, features: ndarray, prompts: Sequence[str], measures: Sequence[ndarray] | None = None) -> list[list[str]]:
        """For each query why it does not look like this generator's output: a sentence for each check that fails.

        Features are (Q, F), measures Q arrays (4,) of the pictures, if there are any; an empty prompt is not looked at.
        """
        distances = self.match.distance(features) if self.match is not None else np.zeros(0)
        found: list[list[str]] = [[] for _ in prompts]
        for row, prompt in enumerate(prompts):
            words = words_of([prompt]) if self.words is not None else set()
            unknown = sorted(words - (self.words or set()))
            if words and 2 * len(unknown) >= len(words):
                found[row].append(f"no training caption has {', '.join(map(repr, unknown[:5]))}")
            if measures is not None and self.ranges is not None:
                outside = (measures[row] < self.ranges[0]) | (measures[row] > self.ranges[1])
                names = [name for name, out in zip(MEASURES, outside.tolist(), strict=True) if out]
                if names:
                    found[row].append(f"the {' and '.join(names)} of the picture are those of none that it makes")
            if prompt and self.match is not None and distances[row] > self.match.threshold:
                by = f"({distances[row]:.2f}; its own stay below {self.match.threshold.item():.2f})"
                found[row].append(f"picture and prompt do not go together as its own do {by}")
        return found

    def tensors(self) -> dict[str, ndarray]:
        """As a calibration file holds it, by name; every name has a dot."""
        kind = type(self.match).__name__.lower()
        parts = {} if self.match is None else vars(self.match)
        held = {f"{kind}.{name}": np.asarray(value, np.float32) for name, value in parts.items()}
        if self.ranges is not None:
            held["own.ranges"] = self.ranges
        if self.words is not None:
            held["own.words"] = np.frombuffer("\n".join(sorted(self.words)).encode(), dtype=np.uint8)
        return held

    @classmethod
    def read(cls, tensors: Mapping[str, ndarray], feature_dim: int) -> Ownness | None:
        """From `tensors`; None from none. ValueError or TypeError if they are something else, or for another width."""
        if not tensors:
            return None
        rest = dict(tensors)
        ranges, words = rest.pop("own.ranges", None), rest.pop("own.words", None)
        match: Match | Density | None = None
        if rest:
            kind = Match if "match.threshold" in rest else Density
            match = kind(**{name.removeprefix(f"{kind.__name__.lower()}."): value for name, value in rest.items()})
            if match.distance(np.zeros((1, feature_dim), np.float32)).shape != (1,):
                raise ValueError("the check of own images is of another shape")
        known = None if words is None else frozenset(words.tobytes().decode().split("\n"))
        return cls(match, None if ranges is None else ranges.reshape(2, len(MEASURES)), known)


def fit_ownness(
    own: ndarray, held_out: ndarray, *, measures: ndarray, captions: Iterable[str], image: ndarray, text: ndarray, **fitted: Any
) -> Ownness:
    """Fit all checks.

    `measures` are (M + V, 4) `measures_of` the queries' pictures, `captions` those of the training images; the others are
    `fit_match`'s.
    """
    low, high = measures.min(axis=0), measures.max(axis=0)
    enough = len(own) >= LEAST_QUERIES and len(held_out) >= LEAST_HELD_OUT and image.any() and text.any()
    match = fit_match(own, held_out, image=image, text=text, **fitted) if enough else None
    ranges = np.stack([low / 2, high + (high - low) / 2]).astype(np.float32)
    return Ownness(match, ranges, frozenset(words_of(captions)))
