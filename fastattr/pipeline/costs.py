"""Costs: what each stage of a config will need, before anything runs: network evaluations, memory, disk, hours, money.

Everything but the hours on this machine follows from the config alone: sizes and settings give counts (the teacher's from
teachers/cost.py), the denoiser's shape gives the operations of one evaluation (networks.py), and one throughput
model turns operations into hours of an accelerator: `UTILISATION` of its dense TF32 peak. docs/costs.md shows the arithmetic.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastattr.core.errors import InputError
from fastattr.core.files import read_json
from fastattr.core.models import ASSETS, embedded_models
from fastattr.core.stages import MANIFEST
from fastattr.generators.pretrained import PretrainedConfig
from fastattr.pipeline.config import BuildConfig
from fastattr.pipeline.networks import PEAK_FLOPS, Network, count, shape_of
from fastattr.teachers.config import TeacherConfig
from fastattr.teachers.cost import Probe, Sizes, Step, teacher_plan

UTILISATION = 0.20
"""Part of the peak that float32 diffusers code reaches, the same for every network and accelerator."""
LIBRARIES = 1_000_000_000
"""Bytes of a process that has loaded PyTorch, diffusers and transformers."""
ENCODER_FLOPS = {"image": 35.1e9, "text": 5.9e9}
"""Of one image or caption: ViT-B/16 at 224 pixels (17.6 GMACs, arXiv:2010.11929), CLIP's text tower of 12 layers, 512 wide."""
FEATURE_WIDTH = 768
"""Assumed of an encoder that is not loaded yet."""
THUMBNAIL_BYTES = 1000
PNG_BYTES_PER_PIXEL = 1.5


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one stage will need, over all processes together; memory is one process', host and accelerator together."""

    name: str
    forward: int = 0
    """Latents that pass through the denoiser."""
    backward: int = 0
    """Those of them whose gradient is taken."""
    flops: float = 0.0
    """Operations, a multiply-add is two."""
    memory: int = LIBRARIES
    """Peak bytes."""
    disk: int = 0
    """Bytes it leaves in the run folder."""

    def hours(self, accelerator: str) -> float:
        """Hours of one accelerator; see `UTILISATION`."""
        return self.flops / (PEAK_FLOPS[accelerator] * UTILISATION) / 3600


def training_images(config: BuildConfig, run_dir: Path) -> int:
    """N: of the corpus if it is there, else as the config says, else counted in its folder.

    Raises:
        InputError: nothing says how many there are.
    """
    manifest = run_dir / "corpus" / MANIFEST
    if manifest.exists():
        return int(read_json(manifest)["images"])
    if config.plan.images:
        return config.plan.images
    if config.corpus.kind == "folder":
        from fastattr.corpus.folders import list_folder

        if Path(config.corpus.path).is_dir():
            return len(list_folder(Path(config.corpus.path)).images)
    if config.corpus.kind == "emoji":
        return 15_351
    raise InputError(f"nothing says how many training images {config.name} has; set plan.images, or write the corpus first.")


def denoiser_shape(config: BuildConfig, run_dir: Path) -> dict[str, Any]:
    """The shape of a config's denoiser: the run's generator, `plan.network`, the pretrained one, or the one to train.

    Raises:
        InputError: it is not known.
    """
    if (run_dir / "generator" / "model_index.json").exists():
        return shape_of(run_dir / "generator")
    if config.plan.network:
        return shape_of(config.plan.network)
    if isinstance(config.generator, PretrainedConfig):
        name = config.generator.pretrained
        return shape_of(ASSETS / name / "generator" if name in embedded_models() else name)
    return _shape_to_train(config)


def denoiser_of(config: BuildConfig, run_dir: Path) -> Network:
    """The counted denoiser of a config; see `denoiser_shape`."""
    network = count(config.name, denoiser_shape(config, run_dir), config.teacher.pattern)
    generator = config.generator
    if isinstance(generator, PretrainedConfig) and generator.unlearn == "lora":
        return _unlearning_lora(network, generator)
    return network


def _unlearning_lora(network: Network, generator: PretrainedConfig) -> Network:
    """The network with the LoRA's matrices as the weights to unlearn, if the LoRA is a file here; else as it is."""
    from safetensors import safe_open

    from fastattr.generators.loading import locate_lora
    from fastattr.gradients.ekfac import factor_sizes

    if not Path(generator.lora).exists():
        return network
    with safe_open(locate_lora(generator.lora), framework="numpy") as file:
        shapes = [tuple(file.get_slice(name).get_shape()) for name in file.keys() if "lora" in name]  # noqa: SIM118
    sizes = [(shape[0], int(np.prod(shape[1:]))) for shape in shapes if len(shape) > 1]
    return replace(network, unlearned=sum(out * inner for out, inner in sizes), factors=factor_sizes(sizes))


def _shape_to_train(config: BuildConfig) -> dict[str, Any]:
    """The shape that the config's own generator section describes."""
    import torch

    from fastattr.generators.scratch.autoencoder import build_autoencoder
    from fastattr.generators.scratch.denoiser import GeneratorConfig, build_denoiser

    settings = config.generator
    assert isinstance(settings, GeneratorConfig)
    vocabulary = settings.vocabulary

    class Tokenizer:
        bos_token_id = eos_token_id = pad_token_id = 0

        def __len__(self) -> int:
            return vocabulary

    with torch.device("meta"):
        autoencoder = build_autoencoder(config.autoencoder)
        side = config.autoencoder.resolution // 2 ** (len(config.autoencoder.channels) - 1)
        unet, _ = build_denoiser(
            settings, tokenizer=Tokenizer(), latent_channels=config.autoencoder.latent_channels, latent_side=side
        )
    return {
        "denoiser": {**unet.config, "_class_name": "UNet2DConditionModel"},
        "tokens": settings.max_tokens,
        "vae": {**autoencoder.config, "_class_name": "AutoencoderKL"},
    }


def teacher_sizes(config: BuildConfig, images: int, network: Network) -> Sizes:
    """The sizes that the teacher's costs depend on, from the config alone; candidates are taken to fall evenly."""
    counts = {split: getattr(config.queries, split) for split in ("train", "validation", "test")}
    size = min(config.candidates.per_query, images)
    by_kind = {
        kind: sum(count for split, count in counts.items() if (split in config.teacher.linearised) == kind)
        for kind in (True, False)
    }
    captions = config.plan.captions_per_image if config.teacher.captions == "all" else 1
    return Sizes(
        images=images,
        captions=round(images * captions),
        latent=network.latent,
        conditioning=network.conditioning,
        parameters=network.unlearned,
        factors=network.factors,
        exact=(size,) * by_kind[False],
        linearised=(size,) * by_kind[True],
        union=round(images * (1 - (1 - size / images) ** by_kind[True])),
    )


def teacher_ways(config: BuildConfig, images: int, network: Network) -> dict[str, float]:
    """Operations of scoring the training and validation queries in three ways.

    Returns:
        'exact_as_published': each query's candidates before and after its step, as the authors' released code does; 'exact':
        the losses before measured once for all queries, as ours does; 'first_order': all of them to first order.
    """
    queries = replace(config.queries, test=0)
    alone: dict[str, Any] = {"method": "unlearning", "models": (), "retrained": "", "similarity_features": ()}
    teacher = replace(config.teacher, linearised=(), **alone)
    exact = replace(config, queries=queries, teacher=teacher)
    sizes = teacher_sizes(exact, images, network)
    views = 2 if teacher.mirrored else 1
    losses = 2 * sum(sizes.exact) * views * teacher.loss_draws * sizes.captions / sizes.images
    steps = 3 * len(sizes.exact) * teacher.query_draws * teacher.unlearning_steps
    linear = replace(exact, teacher=replace(teacher, linearised=("train", "validation")))
    return {
        "exact_as_published": network.flops * (steps + losses),
        "exact": _teacher_flops(exact.teacher, sizes, network),
        "first_order": _teacher_flops(linear.teacher, teacher_sizes(linear, images, network), network),
    }


def _teacher_flops(config: TeacherConfig, sizes: Sizes, network: Network) -> float:
    steps = teacher_plan(config, sizes, Probe(loaded=0, backward=0))
    return network.flops * sum(step.forward + 2 * step.backward for step in steps)


def stage_costs(config: BuildConfig, images: int, network: Network) -> list[StageCost]:
    """What each stage will need, in the order in which they run."""
    queries = config.queries.train + config.queries.validation + config.queries.test
    encoders, student, training = config.features.encoders, config.distill.student, config.distill.training
    weights = LIBRARIES + 4 * network.parameters
    steps = queries * config.queries.steps * (2 if network.guided and config.queries.guidance > 1 else 1)
    draw_flops = steps * network.flops + 2 * queries * network.encode_flops
    draw_memory = weights + 2 * config.queries.batch_size * network.activations // 10  # without gradients
    pictures = round(queries * network.image_side**2 * PNG_BYTES_PER_PIXEL)
    encode_flops = (images + queries) * sum(ENCODER_FLOPS["text" if "-text:" in name else "image"] for name in encoders)
    features = 2 * len(encoders) * FEATURE_WIDTH  # bytes of an image's
    encoded = (images + queries) * features
    compared = 4 * queries * images * len(encoders) + 4 * images * FEATURE_WIDTH
    chosen = queries * min(config.candidates.per_query, images)
    widths = [FEATURE_WIDTH * len(encoders), *student.hidden, student.embed_dim]
    student_weights = sum(a * b for a, b in itertools.pairwise(widths))
    passes = training.steps * (training.batch_size + config.distill.images_per_step)  # every query and image of a step once
    held = LIBRARIES + 4 * images * widths[0]
    vectors = images * student.embed_dim * {"Flat": 4, "SQfp16": 2, "SQ8": 1}.get(config.index.factory, 1)
    indexed = held + vectors + 4 * images * student.embed_dim
    catalogue = vectors + images * THUMBNAIL_BYTES
    return [
        StageCost(name="corpus", disk=images * config.plan.bytes_per_image),
        *_training_costs(config, network, weights),
        StageCost(name="queries", forward=steps, flops=draw_flops, memory=draw_memory, disk=pictures),
        StageCost(name="features", flops=encode_flops, memory=LIBRARIES + images * features, disk=encoded),
        StageCost(name="candidates", memory=LIBRARIES + compared, disk=17 * chosen),
        _teacher_cost(config, images, network, weights),
        StageCost(name="distill", flops=6.0 * student_weights * passes, memory=held, disk=2 * student_weights),
        StageCost(name="calibrate"),
        StageCost(name="evaluate"),
        StageCost(name="index", flops=2.0 * student_weights * images, memory=indexed, disk=catalogue),
        StageCost(name="card"),
        StageCost(name="report"),
    ]


def _training_costs(config: BuildConfig, network: Network, weights: int) -> list[StageCost]:
    """Of the networks that the line trains itself."""
    stages = []
    if not isinstance(config.generator, PretrainedConfig):
        for name, training, flops in (
            ("train-autoencoder", config.autoencoder.training, 3 * network.encode_flops),
            ("train-generator", config.generator.training, network.flops),
        ):
            examples = training.steps * training.batch_size
            memory = weights + 16 * network.parameters + training.batch_size * network.activations
            cost = StageCost(name=name, flops=3 * flops * examples, memory=memory, disk=2 * network.parameters)
            stages.append(replace(cost, forward=examples, backward=examples) if flops == network.flops else cost)
    if any(specification.endswith(":encoder") for specification in config.features.encoders):
        shape, training = config.encoder, config.encoder.training
        tokens = (shape.image_size // shape.patch_size) ** 2 + 1
        image, text = shape.image_layers * shape.image_width**2, shape.text_layers * shape.text_width**2
        size = 12 * (image * tokens + text * shape.max_tokens)
        stages.append(StageCost(name="train-encoder", flops=6.0 * size * training.steps * training.batch_size))
    return stages


def _teacher_cost(config: BuildConfig, images: int, network: Network, weights: int) -> StageCost:
    probe = Probe(loaded=weights, backward=weights + config.teacher.batch_size * network.activations)
    steps: list[Step] = teacher_plan(config.teacher, teacher_sizes(config, images, network), probe)
    if not steps:
        return StageCost(name="teach")
    forward, backward = sum(step.forward for step in steps), sum(step.backward for step in steps)
    return StageCost(
        name="teach",
        forward=forward,
        backward=backward,
        flops=network.flops * (forward + 2 * backward) + network.encode_flops * images,
        memory=max(step.memory for step in steps),
        disk=sum(step.disk for step in steps),
    )
