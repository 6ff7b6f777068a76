"""What the embedded generator draws: the part `generator` of benchmarks/emoji.py.

- Seen prompts are main captions that the generator was trained on. The drawing is right if the training image nearest to it
  in latent space is the prompted one (recall1), or has its subject (subject1) or its set.
- Recombined prompts ask for a subject in a set that lacks it, of a kind that the set draws. Right in style and subject is
  what the judge (judge.py) names; its accuracy on real images that it was not trained on is reported beside: *_real_held_out
  where it knows the subject from other sets, *_real_known_once where from one other image, as it knows most recombined ones.
- Free prompts are those of free_prompts.json, none of which is a training caption, with the subjects that count as right,
  written down by hand before anything was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import judge as judging
import machine
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fastattr import Generator, InputError
from fastattr.core.captions import recombinations, recombine, split_caption
from fastattr.core.files import read_json
from fastattr.corpus.near_copies import look_of, looks_of, near_copies
from fastattr.corpus.store import Corpus
from fastattr.generators.scratch.autoencoder import pixel_tensor, psnr

FREE_PROMPTS = Path(__file__).parent / "free_prompts.json"
BATCH = 20
"""Images drawn at a time, where speed is not what is measured."""
NEAREST = 5


def choose_seen(captions: Sequence[str], count: int, *, seed: int) -> np.ndarray:
    """(count,) rows with distinct captions, uniformly without replacement.

    Raises:
        InputError: there are fewer distinct captions.
    """
    _, rows = np.unique(np.array(captions), return_index=True)
    if count > len(rows):
        raise InputError(f"the corpus has {len(rows)} distinct captions, {count} were asked for.")
    return np.random.default_rng([seed, 0]).choice(rows, count, replace=False)


def kinds_of(corpus: Corpus) -> list[str]:
    """(N,) kind of each subject: its group.

    Of a set's extras it is the subgroup, which is a group of the others or no kind there; and of flags, as the plain corpus has
    those of countries from one set, while all sets have pirates' and racing ones.
    """
    groups, subgroups = corpus.column("group"), corpus.column("subgroup")
    return [
        subgroup if group.startswith("extras") or group == "flags" else group
        for group, subgroup in zip(groups, subgroups, strict=True)
    ]


def choose_recombined(captions: Sequence[str], kinds: Sequence[str], count: int, *, seed: int) -> list[tuple[int, str]]:
    """(row, style) pairs: the style's set lacks the row's subject, but draws subjects of its kind; uniform.

    Args:
        captions: (N,) 'SUBJECT, STYLE'.
        kinds: (N,) of the subjects.
        count: how many at most; all of them if there are fewer.
        seed: of the choice.

    Returns:
        The row is that of the subject's first caption.
    """
    drawn = {(kind, split_caption(caption)[1]) for kind, caption in zip(kinds, captions, strict=True)}
    absent = [(row, style) for row, style in recombinations(captions) if (kinds[row], style) in drawn]
    order = np.random.default_rng([seed, 1]).permutation(len(absent))[:count]
    return [absent[index] for index in order]


def draw(
    generator: Generator, prompts: Sequence[str], *, first_seed: int, what: str, **settings: float | None
) -> list[Image.Image]:
    """One image a prompt, `BATCH` at a time; seeds count up from `first_seed`.

    `settings` are `guidance` and `steps`, the generator's own where they are None or not given.
    """
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), BATCH), desc=f"draw {what}", unit="batch"):
        batch = prompts[start : start + BATCH]
        seeds = range(first_seed + start, first_seed + start + len(batch))
        images += generator.generate_batch(batch, seeds=list(seeds), **settings)
    return images


def stacked(images: Sequence[Image.Image], side: int) -> np.ndarray:
    """(N, side, side, 3) uint8 of RGB images."""
    sized = [image if image.size == (side, side) else image.resize((side, side)) for image in images]
    return np.stack([np.asarray(image.convert("RGB")) for image in sized])


def latents_of(generator: Generator, images: Sequence[Image.Image]) -> torch.Tensor:
    """(N, L x h x w) scaled latents of images."""
    batches = [generator.encode_image(images[start : start + BATCH]).flatten(1) for start in range(0, len(images), BATCH)]
    return torch.cat(batches).float().cpu()


def nearest_rows(drawn: torch.Tensor, training: torch.Tensor) -> np.ndarray:
    """(M, NEAREST) rows of the training images nearest to M drawings in latent space, nearest first."""
    nearest: np.ndarray = torch.cdist(drawn, training).topk(NEAREST, largest=False).indices.numpy()
    return nearest


def seen_figures(rows: np.ndarray, nearest: np.ndarray, captions: Sequence[str]) -> dict[str, float | int]:
    """Shares of drawings whose nearest training images are right; (M,) prompted rows, (M, NEAREST) nearest ones."""
    subjects, styles = (np.array(part) for part in zip(*(split_caption(caption) for caption in captions), strict=True))
    first = nearest[:, 0]
    return {
        **machine.share("recall1_seen", first == rows),
        **machine.share("recall5_seen", (nearest == rows[:, None]).any(axis=1)),
        **machine.share("subject1_seen", subjects[first] == subjects[rows]),
        **machine.share("style_accuracy_seen", styles[first] == styles[rows]),
    }


def measure(
    generator: Generator,
    corpus: Corpus,
    judge: judging.Judge,
    facts: dict[str, Any],
    *,
    seen: int,
    recombined: int,
    seed: int,
    settings: dict[str, float | None],
) -> tuple[dict[str, float | int], list[Image.Image]]:
    """All figures of the part, and the drawings of the seen prompts in their order.

    Args:
        generator: the one to measure.
        corpus: plain images that it was trained on.
        judge: of subjects and sets.
        facts: the judge's config.json: its split, and which subjects count as one.
        seen: how many seen prompts.
        recombined: how many recombined prompts at most.
        seed: of prompts and drawings.
        settings: guidance and steps, as for `draw`.
    """
    captions, side = [of_image[0] for of_image in corpus.captions], generator.image_size
    real = [corpus.image(row) for row in tqdm(range(len(corpus)), desc="decode images", unit="image")]
    rows = choose_seen(captions, seen, seed=seed)
    drawn = draw(generator, [captions[row] for row in rows], first_seed=seed * 1_000_000, what="seen prompts", **settings)
    figures = seen_figures(rows, nearest_rows(latents_of(generator, drawn), latents_of(generator, real)), captions)
    likeness = psnr(pixel_tensor(stacked([real[row] for row in rows], side)), pixel_tensor(stacked(drawn, side)))
    figures |= {"psnr_seen": float(likeness.median()), "psnr_seen_n": len(rows)}
    pairs = choose_recombined(captions, kinds_of(corpus), recombined, seed=seed)
    prompts = [recombine(captions[row], style) for row, style in pairs]
    invented = draw(generator, prompts, first_seed=seed * 1_000_000 + 500_000, what="recombined prompts", **settings)
    figures |= recombined_figures(judge, invented, prompts, facts["same"], side)
    copies = near_copies(looks_of([look_of(image) for image in invented]), corpus.looks())
    figures |= machine.share("near_copies_recombined", np.array([len(found) > 0 for found in copies]))
    answers: dict[str, list[str]] = read_json(FREE_PROMPTS)
    free = draw(generator, list(answers), first_seed=seed * 1_000_000 + 700_000, what="free prompts", **settings)
    figures |= machine.share(
        "subject_right_free", free_right(judge, stacked(free, side), list(answers.values()), facts["same"])
    )
    figures |= judging.real_figures(judge, corpus, stacked(real, side), facts["config"], facts["same"])
    return {**figures, "corpus_images": len(corpus)}, drawn


def recombined_figures(
    judge: judging.Judge, drawn: Sequence[Image.Image], prompts: Sequence[str], same: dict[str, str], side: int
) -> dict[str, float | int]:
    """Shares of drawings whose set, subject or both the judge names as the prompt 'SUBJECT, SET style' does."""
    subjects, styles = zip(*(split_caption(prompt) for prompt in prompts), strict=True)
    sets = [style.removesuffix(" style") for style in styles]
    return judging.accuracies(judge, stacked(drawn, side), sets, subjects, same, "recombined")


def free_right(judge: judging.Judge, drawn: np.ndarray, answers: Sequence[list[str]], same: dict[str, str]) -> np.ndarray:
    """(M,) bool: whether the judge names one of the right subjects of each of M drawings, (M, side, side, 3) uint8."""
    _, named = judging.predict(judge, drawn)
    return np.array([name in {same.get(one, one) for one in right} for name, right in zip(named, answers, strict=True)])
