"""Train the text-to-image generator: a small Stable Diffusion on a corpus, from nothing.

Reads corpus/ and autoencoder/; writes generator/, a `StableDiffusionPipeline` folder that plain
`DiffusionPipeline.from_pretrained` loads, with words.txt, the words of its training captions. First the text encoder is
trained alone (text.py), then the U-Net on the frozen text encoder (denoiser.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTokenizer

from fastattr.core.files import atomic_path, read_json, sha256_file, temporary_folder, write_json
from fastattr.core.stages import make, open_stage
from fastattr.core.training import fit, trapezoid
from fastattr.corpus.store import Corpus
from fastattr.generators.prompts import WORDS, words_of
from fastattr.generators.scratch.autoencoder import encode_latents, load_images
from fastattr.generators.scratch.denoiser import DenoiserLoss, GeneratorConfig, build_denoiser, build_scheduler
from fastattr.generators.scratch.examples import TrainingExamples
from fastattr.generators.scratch.text import CaptionLoss, train_tokenizer

CHECKPOINTS = ("checkpoint-text.safetensors", "checkpoint.safetensors")


def run(config: GeneratorConfig, run_dir: Path) -> dict[str, Any]:
    """Train the generator on run_dir/corpus with run_dir/autoencoder; returns the manifest."""
    corpus = Corpus(run_dir / "corpus")
    autoencoder_manifest = open_stage(run_dir / "autoencoder", "autoencoder")
    folder = run_dir / "generator"
    inputs = {"corpus": corpus.fingerprint, "autoencoder": autoencoder_manifest["fingerprint"]}
    accelerator = Accelerator(mixed_precision=config.training.mixed_precision)

    def work() -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        autoencoder = AutoencoderKL.from_pretrained(run_dir / "autoencoder").to(accelerator.device)
        average, tokenizer = train(config, corpus, autoencoder, folder, inputs=inputs, accelerator=accelerator)
        if not accelerator.is_main_process:
            return {}
        save(average, autoencoder, tokenizer, corpus, folder)
        return {
            "corpus_fingerprint": corpus.fingerprint,
            "sha256": {
                path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(folder.glob("*/*.safetensors"))
            },
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
        tokenizer = train_tokenizer(
            (caption for captions in corpus.captions for caption in captions),
            vocabulary=config.vocabulary,
            max_tokens=config.max_tokens,
            scratch=scratch,
        )
    torch.manual_seed(config.training.seed)
    scheduler = build_scheduler()
    examples = TrainingExamples(latents, corpus.captions, tokenizer, config, scheduler.config.num_train_timesteps)
    unet, text_encoder = build_denoiser(
        config, tokenizer=tokenizer, latent_channels=latents.shape[1], latent_side=latents.shape[2]
    )
    made_from = [{**vars(config), "training": None, "steps": None, "guidance": None}, inputs]
    foretelling = fit(
        CaptionLoss(
            text_encoder,
            latent_shape=latents.shape[1:],
            subjects=len(examples.subjects),
            styles=len(examples.styles),
            name_weight=config.name_weight,
        ),
        examples.captions_of,
        config.text_training,
        examples=len(corpus),
        checkpoint=folder / CHECKPOINTS[0],
        made_from=made_from,
        accelerator=accelerator,
        description="text encoder",
    )
    text_encoder = foretelling.text_encoder.requires_grad_(False)
    average = fit(
        DenoiserLoss(unet.to(memory_format=torch.channels_last), text_encoder, scheduler),
        examples.batch_of,
        config.training,
        examples=len(corpus),
        checkpoint=folder / CHECKPOINTS[1],
        made_from=made_from,
        accelerator=accelerator,
        schedule=trapezoid(config.decay_share),
        description="generator",
    )
    assert isinstance(average, DenoiserLoss)
    return average, tokenizer


def save(average: DenoiserLoss, autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer, corpus: Corpus, folder: Path) -> None:
    """Write the pipeline in half precision, which ships, so that later stages score and measure it, and its words."""
    save_pipeline(pipeline_of(average, autoencoder, tokenizer), folder)
    words = {word for captions in corpus.captions for caption in captions for word in words_of(caption)}
    with atomic_path(folder / WORDS) as temporary:
        temporary.write_text("\n".join(sorted(words)) + "\n", encoding="utf-8")


def pipeline_of(network: DenoiserLoss, autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """Trained parts as a pipeline."""
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=network.text_encoder,
        tokenizer=tokenizer,
        unet=network.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


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
