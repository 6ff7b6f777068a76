"""Costs: what each stage of a config will need, before anything runs: network evaluations, memory, disk, hours, money.

Everything but the hours on this machine follows from the config alone: sizes and settings give counts (the teacher's from
plan.py), the denoiser's shape gives the operations of one evaluation (networks.py), and one throughput
model turns operations into hours of an accelerator: `UTILISATION` of its dense TF32 peak. The hours on this machine are
those of the same line in miniature (fastattr/pipeline/miniature.py). docs/costs.md shows the arithmetic and how well it fits.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastattr.core.errors import FastattrError, InputError
from fastattr.core.files import MANIFEST, read_json
from fastattr.generators.pretrained import PretrainedConfig
from fastattr.pipeline.networks import SHAPES, Network, network_of
from fastattr.teachers.cost import Probe, Sizes, Step, teacher_plan

if TYPE_CHECKING:
    from fastattr.pipeline.config import BuildConfig
    from fastattr.teachers.config import TeacherConfig

PEAK_FLOPS = {"A100": 156e12, "H100": 494.5e12, "L4": 60e12}
"""Dense TF32 peak of one accelerator, operations a second, half of the sparse figure that NVIDIA's data sheets give where
they give only that one (A100 SXM: 156 TFLOPS; H100 SXM: 989 with sparsity; L4: 120 with sparsity). PyTorch's float32
convolutions run in TF32 on them by default."""
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
class PlanConfig:
    """What a plan can't read from the files that are there yet, and when a build asks before it starts."""

    network: str = ""
    """Name of the denoiser's shape in fastattr/pipeline/networks.py, e.g. 'stable-diffusion-1'; '' reads the generator."""
    images: int = 0
    """Training images; 0 counts those of the corpus, or of its folder."""
    captions_per_image: float = 1.0
    """Mean number of captions of an image."""
    bytes_per_image: int = 60_000
    """Mean size of an image file."""
    accelerator: str = "A100"
    """Whose hours are paid: 'A100', 'H100' or 'L4'."""
    rate: float = 0.0
    """Money for an hour of it, in any currency; 0 leaves the money out."""
    confirm_hours: float = 1.0
    """A build that will take longer than this on this machine asks first."""
    probe_seconds: int = 180
    """Longest that measuring this machine may take."""

    def __post_init__(self) -> None:
        if self.accelerator not in PEAK_FLOPS:
            raise InputError(f"accelerator must be one of {', '.join(PEAK_FLOPS)}, got {self.accelerator!r}")
        if self.network and self.network not in SHAPES:
            raise InputError(f"plan.network must be one of {', '.join(SHAPES)}, got {self.network!r}")
        if min(self.images, self.captions_per_image, self.bytes_per_image, self.rate, self.confirm_hours) < 0:
            raise InputError("the numbers of a plan must not be negative")


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one stage will need, over all processes together; memory is one process', host and accelerator together."""

    name: str
    units: float
    """How much work it is, in `unit`s: what its time is proportional to, but for a start."""
    unit: str
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
        from fastattr.corpus.store import folder_parts

        if Path(config.corpus.path).is_dir():
            return sum(len(part.read.args[1]) for part in folder_parts(Path(config.corpus.path))[1:])
    if config.corpus.kind == "emoji":
        return 15_351
    raise InputError(f"nothing says how many training images {config.name} has; set plan.images, or write the corpus first.")


def denoiser_of(config: BuildConfig, run_dir: Path) -> Network:
    """The denoiser of a config: of the run's generator, of the pretrained one, of `plan.network`, or of the one to train.

    Raises:
        InputError: its shape is not known.
    """
    from fastattr.core.models import ASSETS, embedded_models

    pattern = config.teacher.pattern
    if (run_dir / "generator" / "model_index.json").exists():
        return network_of(str(run_dir / "generator"), pattern)
    if config.plan.network:
        return network_of(config.plan.network, pattern)
    if isinstance(config.generator, PretrainedConfig):
        pretrained = config.generator.pretrained
        network = network_of(str(ASSETS / pretrained / "generator") if pretrained in embedded_models() else pretrained, pattern)
        return _unlearning_lora(network, config.generator) if config.generator.unlearn == "lora" else network
    return _network_to_train(config, pattern)


def _unlearning_lora(network: Network, generator: PretrainedConfig) -> Network:
    """The network with the LoRA's matrices as the weights to unlearn, if the LoRA is a file here; else as it is."""
    from safetensors import safe_open

    from fastattr.generators.generator import locate_lora
    from fastattr.gradients.ekfac import factor_sizes

    if not Path(generator.lora).exists():
        return network
    with safe_open(locate_lora(generator.lora), framework="numpy") as file:
        shapes = [tuple(file.get_slice(name).get_shape()) for name in file.keys() if "lora" in name]  # noqa: SIM118
    sizes = [(shape[0], int(np.prod(shape[1:]))) for shape in shapes if len(shape) > 1]
    return replace(network, unlearned=sum(out * inner for out, inner in sizes), factors=factor_sizes(sizes))


def _network_to_train(config: BuildConfig, pattern: str) -> Network:
    """The denoiser that the config's own generator section describes."""
    import torch

    from fastattr.generators.scratch.autoencoder import build_autoencoder
    from fastattr.generators.scratch.denoiser import GeneratorConfig, build_denoiser
    from fastattr.pipeline.networks import count

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
            settings,
            tokenizer=Tokenizer(),
            latent_channels=config.autoencoder.latent_channels,
            latent_side=side,
        )
    parts = {"denoiser": {**unet.config, "_class_name": "UNet2DConditionModel"}, "tokens": settings.max_tokens}
    return count(config.name, parts | {"vae": {**autoencoder.config, "_class_name": "AutoencoderKL"}}, pattern)


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
    teacher = replace(config.teacher, linearised=(), method="unlearning")
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
    """What each stage will need, in the order in which they run.

    Args:
        config: of the whole line.
        images: N, training images.
        network: its denoiser.
    """
    queries = config.queries.train + config.queries.validation + config.queries.test
    encoders = config.features.encoders
    weights = LIBRARIES + 4 * network.parameters
    side = network.image_side
    stages = [
        StageCost(name="corpus", units=images, unit="images", disk=images * config.plan.bytes_per_image),
        *_training_costs(config, network, weights),
    ]
    steps = config.queries.steps * (2 if network.guided and config.queries.guidance > 1 else 1)
    stages.append(
        StageCost(
            name="queries",
            units=queries * config.queries.steps,
            unit="drawing steps",
            forward=queries * steps,
            flops=queries * (steps * network.flops + 2 * network.encode_flops),
            memory=weights + 2 * config.queries.batch_size * network.activations // 10,  # without gradients
            disk=round(queries * side * side * PNG_BYTES_PER_PIXEL),
        )
    )
    kinds = ["text" if "-text:" in specification else "image" for specification in encoders]
    stages.append(
        StageCost(
            name="features",
            units=(images + queries) * len(encoders),
            unit="encodings",
            flops=(images + queries) * sum(ENCODER_FLOPS[kind] for kind in kinds),
            memory=LIBRARIES + 2 * images * len(encoders) * FEATURE_WIDTH,
            disk=2 * (images + queries) * len(encoders) * FEATURE_WIDTH,
        )
    )
    size = min(config.candidates.per_query, images)
    compared = 4 * queries * images * len(encoders)
    stages.append(
        StageCost(
            name="candidates",
            units=queries,
            unit="queries",
            memory=LIBRARIES + compared + 4 * images * FEATURE_WIDTH,
            disk=17 * queries * size,
        )
    )
    stages.append(_teacher_cost(config, images, network, weights))
    student = config.distill.student
    widths = [FEATURE_WIDTH * len(encoders), *student.hidden, student.embed_dim]
    network_weights = sum(a * b for a, b in itertools.pairwise(widths))
    training = config.distill.training
    passes = training.steps * (training.batch_size + config.distill.images_per_step)  # every query and image of a step once
    stages.append(
        StageCost(
            name="distill",
            units=training.steps,
            unit="steps",
            flops=6.0 * network_weights * passes,
            memory=LIBRARIES + 4 * images * widths[0],
            disk=2 * network_weights,
        )
    )
    if "calibrate" in _stage_names():
        stages.append(StageCost(name="calibrate", units=config.queries.validation, unit="queries"))
    stages.append(StageCost(name="evaluate", units=config.queries.test, unit="queries"))
    vectors = images * student.embed_dim * {"Flat": 4, "SQfp16": 2, "SQ8": 1}.get(config.index.factory, 1)
    stages.append(
        StageCost(
            name="index",
            units=images,
            unit="images",
            flops=2.0 * network_weights * images,
            memory=LIBRARIES + vectors + 4 * images * (widths[0] + student.embed_dim),
            disk=vectors + images * THUMBNAIL_BYTES,
        )
    )
    stages += [StageCost(name=name, units=1, unit="pages") for name in ("card", "report")]
    return stages


def _stage_names() -> list[str]:
    from fastattr.pipeline.build import STAGES

    return list(STAGES)


def _training_costs(config: BuildConfig, network: Network, weights: int) -> list[StageCost]:
    """Of the networks that the line trains itself."""
    stages = []
    if not isinstance(config.generator, PretrainedConfig):
        refinement = config.refinement.steps  # each of its steps evaluates the first phase's generator twice more
        for name, settings, more, flops in (
            ("train-autoencoder", config.autoencoder.training, 0, 3 * network.encode_flops),
            ("train-generator", config.generator.training, refinement, network.flops),
        ):
            examples = (settings.steps + more) * settings.batch_size
            guiding = 2 * more * settings.batch_size
            stages.append(
                StageCost(
                    name=name,
                    units=settings.steps + more,
                    unit="steps",
                    forward=examples + guiding if name == "train-generator" else 0,
                    backward=examples if name == "train-generator" else 0,
                    flops=flops * (3 * examples + guiding),
                    memory=weights + 16 * network.parameters + settings.batch_size * network.activations,
                    disk=2 * network.parameters,
                )
            )
    if any(specification.endswith(":encoder") for specification in config.features.encoders):
        settings, shape = config.encoder.training, config.encoder
        tokens = (shape.image_size // shape.patch_size) ** 2 + 1
        size = 12 * (
            shape.image_layers * shape.image_width**2 * tokens + shape.text_layers * shape.text_width**2 * shape.max_tokens
        )
        flops = 6.0 * size * settings.steps * settings.batch_size
        stages.append(StageCost(name="train-encoder", units=settings.steps, unit="steps", flops=flops))
    return stages


def _teacher_cost(config: BuildConfig, images: int, network: Network, weights: int) -> StageCost:
    if config.teacher.method != "unlearning":
        return StageCost(name="teach", units=config.queries.train, unit="queries")
    probe = Probe(loaded=weights, backward=weights + config.teacher.batch_size * network.activations)
    steps: list[Step] = teacher_plan(config.teacher, teacher_sizes(config, images, network), probe)
    forward, backward = sum(step.forward for step in steps), sum(step.backward for step in steps)
    return StageCost(
        name="teach",
        units=forward + 2 * backward,
        unit="evaluations",
        forward=forward,
        backward=backward,
        flops=network.flops * (forward + 2 * backward) + network.encode_flops * images,
        memory=max(step.memory for step in steps),
        disk=sum(step.disk for step in steps),
    )


def plan(config: BuildConfig, run_dir: Path, *, config_file: Path | None = None) -> dict[str, Any]:
    """Everything that can be said of a config before it runs.

    Args:
        config: of the whole line.
        run_dir: what is there already is read instead of assumed; it need not exist.
        config_file: the config's file, to measure this machine with; None leaves that out.

    Returns:
        'stages' (each with its counts and 'hours' by accelerator), their totals, 'teacher_hours' (of `teacher_ways`, by way
        and accelerator), 'money', and 'here': 'seconds' by stage and in all and 'peak_memory', or 'problem'.

    Raises:
        InputError: the number of images or the network is not known.
    """
    images, network = training_images(config, run_dir), denoiser_of(config, run_dir)
    stages = stage_costs(config, images, network)
    names = list(PEAK_FLOPS)
    hours = {name: sum(stage.hours(name) for stage in stages) for name in names}
    ways = teacher_ways(config, images, network)
    result: dict[str, Any] = {
        "name": config.name,
        "images": images,
        "queries": {split: getattr(config.queries, split) for split in ("train", "validation", "test")},
        "network": asdict(network),
        "stages": [asdict(stage) | {"hours": {name: stage.hours(name) for name in names}} for stage in stages],
        "forward": sum(stage.forward for stage in stages),
        "backward": sum(stage.backward for stage in stages),
        "peak_memory": max(stage.memory for stage in stages),
        "disk": sum(stage.disk for stage in stages),
        "hours": hours,
        "teacher_hours": {
            way: {name: flops / (PEAK_FLOPS[name] * UTILISATION) / 3600 for name in names} for way, flops in ways.items()
        },
        "accelerator": config.plan.accelerator,
        "money": config.plan.rate * hours[config.plan.accelerator] if config.plan.rate else None,
        "here": {"problem": "not measured"},
    }
    if config_file is not None:
        from fastattr.pipeline.miniature import measure_here

        try:
            result["here"] = measure_here(config, stages, config_file)
        except FastattrError as error:
            result["here"] = {"problem": " ".join(str(error).split())}
    return result


def as_table(result: Mapping[str, Any]) -> str:
    """A plan as text for a terminal."""
    here = result["here"].get("seconds", {})
    names = list(result["hours"])
    head = f"{'stage':18s} {'forward':>15s} {'backward':>15s}" + "".join(f"{name + ' h':>11s}" for name in names)
    lines = [head + f" {'memory':>10s} {'disk':>10s} {'here':>10s}"]
    total = {
        "name": "in all",
        "memory": result["peak_memory"],
        **{key: result[key] for key in ("forward", "backward", "disk", "hours")},
    }
    for stage in [*result["stages"], total]:
        hours = "".join(f"{stage['hours'][name]:11,.2f}" for name in names)
        seconds = here.get(stage["name"] if stage is not total else "in all")
        lines.append(
            f"{stage['name']:18s} {stage['forward']:15,d} {stage['backward']:15,d}{hours} {_bytes(stage['memory']):>10s} "
            f"{_bytes(stage['disk']):>10s} {'' if seconds is None else f'{seconds:,.0f} s':>10s}"
        )
    ways = result["teacher_hours"]
    words = {
        "exact_as_published": "exactly, as the paper's code does (losses before and after for each query)",
        "exact": "exactly, the losses before measured once",
        "first_order": "to first order (teacher.linearised)",
    }
    lines.append(f"teacher of the training and validation queries, {names[0]}-hours:")
    lines += [f"  {ways[way][names[0]]:12,.1f}  {text}" for way, text in words.items()]
    if result["money"] is not None:
        lines.append(f"money: {result['money']:,.2f} at the given rate, on {result['accelerator']}")
    if "problem" in result["here"]:
        lines.append(f"this machine: {result['here']['problem']}")
    else:
        lines.append(
            f"this machine: {here['in all']:,.0f} s in all, {_bytes(result['here']['peak_memory'])} at most (from a miniature)"
        )
    lines.append(f"accelerators: {UTILISATION:.0%} of their dense TF32 peak, one each; memory is host and accelerator together")
    return "\n".join(lines)


def _bytes(count: float) -> str:
    unit = next((unit for unit in ("TB", "GB") if count >= {"TB": 1e12, "GB": 1e9}[unit]), "MB")
    return f"{count / {'TB': 1e12, 'GB': 1e9, 'MB': 1e6}[unit]:,.1f} {unit}"
