"""Train the text-to-image generator: a small Stable Diffusion on a corpus, from nothing.

Reads corpus/ and autoencoder/; writes generator/, a `StableDiffusionPipeline` folder that plain
`DiffusionPipeline.from_pretrained` loads, with words.txt, the words of its training captions. First the text encoder is
trained, then the U-Net on it (denoiser.py). A visitor writes 'a dog', 'Dogs' or 'dgo', not 'dog face, openmoji style'. So each
training image is shown under all of its captions, with and without their style, with articles, plurals and slips of the
keyboard; and sometimes under nothing, for classifier-free guidance (arXiv:2207.12598). Timesteps are shifted towards noise,
where the subject is decided (arXiv:2403.03206).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTokenizer

from fastattr.core.captions import split_caption
from fastattr.core.files import atomic_path, read_json, sha256_file, temporary_folder, write_json
from fastattr.core.stages import make, open_stage
from fastattr.core.training import fit, trapezoid
from fastattr.corpus.store import Corpus
from fastattr.generators.loading import WORDS, words_of
from fastattr.generators.scratch import denoiser
from fastattr.generators.scratch.autoencoder import encode_latents, load_images
from fastattr.generators.scratch.denoiser import DenoiserLoss, GeneratorConfig, build_scheduler

ARTICLES = ("a", "the", "one", "some", "my")
FRAMES = ("a picture of", "a drawing of a", "an emoji of a", "a photo of the", "a piece of", "a pair of")
ADJECTIVES = ("small", "cute", "a new", "a nice", "funny", "a lovely", "tiny", "great", "a sweet", "strange", "a tired", "wild")
AFTER = ("on a table", "at night", "in the garden", "on the street", "with friends", "in my hand", "for you", "in summer")
"""What visitors write around a subject, and what says nothing that the images show."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def draw_prompt(captions: Sequence[str], config: GeneratorConfig, random: np.random.Generator) -> tuple[str, str]:
    """A prompt for the training image of these captions, the main one first.

    With it what the prompt asks for if its style was left out ('red heart' of 'a rde heart'), else ''.
    """
    lot = random.random(5)
    if lot[0] < config.caption_dropout:
        return "", ""
    if lot[0] < config.caption_dropout + config.subject_dropout:
        return split_caption(captions[0])[1], ""
    caption = captions[0]
    if len(captions) > 1 and lot[1] < config.other_captions:
        weights = 1 / np.arange(1, len(captions))
        caption = captions[1 + random.choice(len(weights), p=weights / weights.sum())]
    subject, style = split_caption(caption)
    written = rewrite(subject, random) if lot[3] < config.rewritten else subject
    if not style:
        return written, ""
    return (written, subject) if lot[2] < config.style_dropout else (f"{written}, {style}", "")


def rows_without_style(captions: Sequence[Sequence[str]]) -> dict[str, int]:
    """The row that answers a prompt which names no style, by what it asks for.

    A subject is drawn as one of its images, chosen by the subject's hash, so that 'a dog' is one dog and not a blend of
    four; a keyword of several subjects stands for the one that it tells most of.
    """
    of_subject: dict[str, list[int]] = {}
    best: dict[str, tuple[int, int, str]] = {}
    for row, of_image in enumerate(captions):
        subject = split_caption(of_image[0])[0]
        of_subject.setdefault(subject, []).append(row)
        for place, caption in enumerate(of_image):
            text = split_caption(caption)[0]
            best[text] = min(best.get(text, (place, len(subject), subject)), (place, len(subject), subject))
    chosen = {name: rows[hashlib.sha256(name.encode()).digest()[0] % len(rows)] for name, rows in of_subject.items()}
    return {text: chosen[subject] for text, (_, _, subject) in best.items()}


def rewrite(subject: str, random: np.random.Generator) -> str:
    """'red heart' -> 'a red heart', 'red hearts', 'rde heart', 'a drawing of a lovely red heart'."""
    kind = random.integers(4)
    if kind == 0:
        return f"{random.choice(ARTICLES)} {subject}"
    if kind == 1:
        return subject + ("es" if subject.endswith(("s", "x", "ch", "sh")) else "s")
    if kind == 2:
        return mistype(subject, random)
    before, after = random.choice(FRAMES + ADJECTIVES), random.choice(AFTER)
    return f"{before} {subject}" if random.random() < 0.6 else f"{random.choice(ARTICLES)} {subject} {after}"


def mistype(text: str, random: np.random.Generator) -> str:
    """Leave out, double, replace or swap one letter of a word with more than three."""
    places = [at for at in range(len(text) - 1) if text[at : at + 2].isalpha()]
    if len(text) < 4 or not places:
        return text
    at = int(random.choice(places))
    here, after = text[at], text[at + 1]
    slips = (after, here * 2 + after, str(random.choice(list(LETTERS))) + after, after + here)
    return text[:at] + slips[random.integers(4)] + text[at + 2 :]


class TrainingExamples:
    """Latents and captions of a corpus, and batches of them as text encoder and denoiser are trained on them."""

    def __init__(
        self,
        latents: Tensor,
        captions: Sequence[Sequence[str]],
        tokenizer: CLIPTokenizer,
        config: GeneratorConfig,
        timesteps: int,
    ) -> None:
        """Number subjects and styles.

        Of N images `latents` are (N, L, h, w), scaled, and `captions` at least one each, the main one first; `timesteps` is
        the length of the noise schedule.
        """
        self.latents, self.captions = latents, [list(of_image) for of_image in captions]
        names, styles = zip(*(split_caption(of_image[0]) for of_image in captions), strict=True)
        self.subjects, self.styles = sorted(set(names)), sorted(set(styles) - {""})
        self._subject = torch.tensor([self.subjects.index(name) for name in names])
        self._style = torch.tensor([self.styles.index(style) if style else denoiser.NO_STYLE for style in styles])
        self.tokenizer, self._config = tokenizer, config
        self._without_style = rows_without_style(self.captions)
        self._shift, self._timesteps = config.timestep_shift, timesteps

    def prompts_of(self, rows: np.ndarray, generator: torch.Generator) -> tuple[list[str], np.ndarray]:
        """(B,) prompts, and the (B,) rows that they ask for: the given ones, but for prompts that name no style."""
        random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        drawn = [draw_prompt(self.captions[row], self._config, random) for row in rows]
        asked = [self._without_style[alone] if alone else row for (_, alone), row in zip(drawn, rows, strict=True)]
        return [prompt for prompt, _ in drawn], np.array(asked)

    def captions_of(self, rows: np.ndarray, generator: torch.Generator) -> tuple[Tensor, ...]:
        """What `CaptionLoss` takes: tokens (B, max_tokens), latents (B, L, h, w), subjects (B,) and styles (B,)."""
        prompts, rows = self.prompts_of(rows, generator)
        styles = torch.where(torch.tensor([bool(prompt) for prompt in prompts]), self._style[rows], denoiser.NO_STYLE)
        return denoiser.tokenize(self.tokenizer, prompts), self.latents[rows], self._subject[rows], styles

    def batch_of(self, rows: np.ndarray, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Latents (B, L, h, w), tokens (B, max_tokens), timesteps (B,) and noise (B, L, h, w) of these (B,) rows."""
        prompts, rows = self.prompts_of(rows, generator)
        picked = self.latents[rows]
        # One timestep from each of B equal parts: the same law with less variance over the batch.
        stratum = torch.randperm(len(rows), generator=generator) + torch.rand(len(rows), generator=generator)
        share = stratum / len(rows)
        share = self._shift * share / (1 + (self._shift - 1) * share)
        timesteps = (share * self._timesteps).long().clamp_max(self._timesteps - 1)
        return picked, denoiser.tokenize(self.tokenizer, prompts), timesteps, torch.randn(picked.shape, generator=generator)


CHECKPOINTS = ("checkpoint-text.safetensors", "checkpoint.safetensors")


def run(config: GeneratorConfig, run_dir: Path) -> dict[str, Any]:
    """Train the generator on run_dir/corpus with run_dir/autoencoder; returns the manifest."""
    corpus, folder = Corpus(run_dir / "corpus"), run_dir / "generator"
    inputs = {"corpus": corpus.fingerprint}
    inputs["autoencoder"] = open_stage(run_dir / "autoencoder", "autoencoder")["fingerprint"]
    accelerator = Accelerator(mixed_precision=config.training.mixed_precision)

    def work() -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        autoencoder = AutoencoderKL.from_pretrained(run_dir / "autoencoder").to(accelerator.device)
        average, tokenizer = train(config, corpus, autoencoder, folder, inputs=inputs, accelerator=accelerator)
        if not accelerator.is_main_process:
            return {}
        save(average, autoencoder, tokenizer, corpus, folder)
        weights = sorted(folder.glob("*/*.safetensors"))
        return {
            "corpus_fingerprint": corpus.fingerprint,
            "sha256": {path.relative_to(folder).as_posix(): sha256_file(path) for path in weights},
            "defaults": {"steps": config.steps, "guidance": config.guidance},
            "unet_parameters": sum(parameter.numel() for parameter in average.unet.parameters()),
            "text_parameters": sum(parameter.numel() for parameter in average.text_encoder.parameters()),
        }

    checkpoints = [folder / name for name in CHECKPOINTS]
    return make(folder, work, stage="generator", config=config, inputs=inputs, accelerator=accelerator, temporary=checkpoints)


def train(
    config: GeneratorConfig,
    corpus: Corpus,
    autoencoder: AutoencoderKL,
    folder: Path,
    *,
    inputs: dict[str, str],
    accelerator: Accelerator,
) -> tuple[DenoiserLoss, CLIPTokenizer]:
    """The averaged networks and their tokenizer; checkpoints lie in `folder`, and are resumed from."""
    images = load_images(corpus, autoencoder.config.sample_size)
    latents = encode_latents(autoencoder, images) * autoencoder.config.scaling_factor
    with temporary_folder(folder) as scratch:
        every = (caption for captions in corpus.captions for caption in captions)
        tokenizer = denoiser.train_tokenizer(every, vocabulary=config.vocabulary, max_tokens=config.max_tokens, scratch=scratch)
    torch.manual_seed(config.training.seed)
    scheduler = build_scheduler()
    examples = TrainingExamples(latents, corpus.captions, tokenizer, config, scheduler.config.num_train_timesteps)
    shape = {"latent_channels": latents.shape[1], "latent_side": latents.shape[2]}
    unet, text_encoder = denoiser.build_denoiser(config, tokenizer=tokenizer, **shape)
    settings = {**vars(config), "training": None, "steps": None, "guidance": None}
    del settings["compiled"]
    made_from = [settings, inputs]
    about: dict[str, Any] = {"examples": len(corpus), "made_from": made_from, "accelerator": accelerator}
    classes = {"subjects": len(examples.subjects), "styles": len(examples.styles)}
    caption_loss = denoiser.CaptionLoss(text_encoder, latent_shape=latents.shape[1:], name_weight=config.name_weight, **classes)
    about |= {"description": "text encoder", "checkpoint": folder / CHECKPOINTS[0]}
    foretelling: Any = fit(caption_loss, examples.captions_of, config.text_training, **about)
    text_encoder = foretelling.text_encoder.requires_grad_(False)
    if config.compiled:
        unet.compile(dynamic=False)
    loss = DenoiserLoss(unet.to(memory_format=torch.channels_last), text_encoder, scheduler)
    about |= {"description": "generator", "checkpoint": folder / CHECKPOINTS[1], "schedule": trapezoid(config.decay_share)}
    average: Any = fit(loss, examples.batch_of, config.training, **about)
    return average, tokenizer


def save(average: DenoiserLoss, autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer, corpus: Corpus, folder: Path) -> None:
    """Write the pipeline in half precision, which ships, so that later stages score and measure it, and its words."""
    save_pipeline(pipeline_of(average, autoencoder, tokenizer), folder)
    words = {word for captions in corpus.captions for caption in captions for word in words_of(caption)}
    with atomic_path(folder / WORDS) as temporary:
        temporary.write_text("\n".join(sorted(words)) + "\n", encoding="utf-8")


def pipeline_of(network: DenoiserLoss, autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """Trained parts as a pipeline."""
    networks = {"vae": autoencoder, "text_encoder": network.text_encoder, "tokenizer": tokenizer, "unet": network.unet}
    unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**networks, scheduler=build_scheduler(), **unused)


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write a pipeline in half precision, for a plain `DiffusionPipeline.from_pretrained`."""
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    tidy_configs(folder)


def tidy_configs(folder: Path) -> None:
    """Take the path that a part was loaded from out of the saved configs, and name float32 as the precision to load in.

    The path names a folder of one machine. transformers obeys the stored precision and diffusers loads float32, so that
    a plain `DiffusionPipeline.from_pretrained` would put together parts that do not fit.
    """
    for path in [folder / "model_index.json", *folder.glob("*/config.json")]:
        saved = read_json(path)
        kept = {key: value for key, value in saved.items() if key != "_name_or_path"}
        write_json(path, kept | {"dtype": "float32"} if "dtype" in kept else kept)
