"""The own-or-foreign check on a run's test queries: how often it is wrong. Part `foreign` of benchmarks/student.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import machine
import numpy as np
from PIL import Image

from fastattr.corpus.store import Corpus
from fastattr.features.kinds import open_encoder
from fastattr.generators.queries import Queries
from fastattr.students.ownness import fit_ownness, measures_of

if TYPE_CHECKING:
    from student import Tables

BOTH = ("open_clip-image:encoder", "open_clip-text:encoder")


def measure_foreign(tables: Tables, run_dir: Path, *, seed: int) -> dict[str, Any]:
    """Error rates of the check that the attributor would hold: own test queries called foreign, foreign kinds passed over."""
    queries, of_image = Queries(run_dir / "queries"), np.repeat([True, False], tables.images["image"].shape[1])
    pictures = [queries.image(row) for split in ("train", "validation") for row in queries.of_split(split)]
    ownness = fit_ownness(
        tables.queries["both", "train"],
        tables.queries["both", "validation"],
        image=of_image,
        text=~of_image,
        measures=np.stack([measures_of(picture) for picture in pictures]),
        captions=(text for texts in tables.corpus.captions for text in texts),
        false_alarms=0.05,
        seed=seed,
    )
    encoders = [open_encoder(name, folder=run_dir) for name in BOTH]

    def doubted(images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        features = np.concatenate([encoder.encode(images, [[text] for text in prompts]) for encoder in encoders], axis=1)
        doubts = ownness.doubts(features, prompts, [measures_of(image) for image in images])
        return np.array([bool(reasons) for reasons in doubts])

    rows = queries.of_split("test")
    own = [queries.image(row) for row in rows], [queries.prompts[row] for row in rows]
    found: dict[str, Any] = machine.share("foreign_false_alarms", doubted(*own))
    for kind, foreign in foreign_images(tables.corpus, queries, rows, seed=seed).items():
        found |= machine.share(f"foreign_missed_{kind}", ~doubted(*foreign))
    return found


def foreign_images(
    corpus: Corpus, queries: Queries, rows: Sequence[int], *, seed: int
) -> dict[str, tuple[list[Any], list[str]]]:
    """Kinds of images with prompts that the generator did not make for them."""
    rng = np.random.default_rng(seed)
    own = [queries.image(row) for row in rows]
    prompts = [queries.prompts[row] for row in rows]
    turned = prompts[len(prompts) // 2 :] + prompts[: len(prompts) // 2]
    noise = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in rows]
    flat = [Image.new("RGB", (64, 64), tuple(rng.integers(0, 256, 3).tolist())) for _ in rows]
    letters = np.array([*"abcdefghijklmnopqrstuvwxyz"])
    unseen = [" ".join("".join(rng.choice(letters, 7)) for _ in range(3)) for _ in rows]
    kinds: dict[str, tuple[list[Any], list[str]]] = {
        "other_prompt": (own, turned),
        "unknown_words": (own, unseen),
        "noise": (noise, prompts),
        "one_colour": (flat, prompts),
    }
    photographs = sample_photographs(len(rows), seed=seed)
    if photographs:
        kinds["photograph"] = (photographs, prompts)
    chosen = rng.choice(len(corpus), len(rows), replace=False)
    kinds["training_image"] = ([corpus.image(int(row)) for row in chosen], [corpus.captions[row][0] for row in chosen])
    return kinds


def sample_photographs(count: int, *, seed: int) -> list[Image.Image]:
    """64 x 64 pieces of the two photographs that scikit-learn brings along; none without scikit-learn."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        return []
    rng = np.random.default_rng(seed)
    pieces = []
    for number in range(count):
        whole = Image.fromarray(load_sample_images().images[number % 2])
        side = int(rng.integers(96, min(whole.size)))
        left, top = (int(rng.integers(0, length - side + 1)) for length in whole.size)
        pieces.append(whole.crop((left, top, left + side, top + side)).resize((64, 64)))
    return pieces
