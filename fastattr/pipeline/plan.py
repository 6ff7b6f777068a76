"""Plan: what a config will need before anything runs (evaluations, memory, disk, hours, money), and as `fastattr plan` says it.

The config gives counts (the teacher's in teachers/cost.py), the denoiser's shape the operations of one evaluation
(networks.py), and `UTILISATION` of an accelerator's dense TF32 peak its hours. docs/costs.md shows the arithmetic.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from fastattr.core.errors import InputError
from fastattr.core.files import read_json
from fastattr.core.models import ASSETS, embedded_models
from fastattr.core.stages import MANIFEST
from fastattr.corpus.folders import list_folder
from fastattr.generators.loading import locate_lora
from fastattr.generators.pretrained import PretrainedConfig
from fastattr.generators.scratch.autoencoder import build_autoencoder
from fastattr.generators.scratch.denoiser import build_denoiser
from fastattr.gradients.ekfac import factor_sizes
from fastattr.pipeline.config import BuildConfig, check, check_queries
from fastattr.pipeline.networks import PEAK_FLOPS, Network, count, measure_machine, shape_of
from fastattr.teachers.cost import Probe, Sizes, teacher_plan

DENSE = {"train-encoder", "features", "distill", "index"}  # stages of large matrix products, not of the denoiser
UTILISATION = 0.20  # part of the peak that float32 diffusers code reaches, the same for every network and accelerator
LIBRARIES = 1_000_000_000  # bytes of a process that has loaded PyTorch, diffusers and transformers
# Of one image or caption: ViT-B/16 at 224 pixels (17.6 GMACs, arXiv:2010.11929), CLIP's text tower of 12 layers, 512 wide.
ENCODER_FLOPS = {"image": 35.1e9, "text": 5.9e9}
FEATURE_WIDTH = 768  # assumed of an encoder that is not loaded yet
THUMBNAIL_BYTES, PNG_BYTES_PER_PIXEL = 1000, 1.5


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one stage will need, over all processes together; memory is one process', host and accelerator together."""

    name: str
    forward: int = 0  # latents that pass through the denoiser
    backward: int = 0  # those of them whose gradient is taken
    flops: float = 0.0  # operations, a multiply-add is two
    memory: int = LIBRARIES  # peak bytes
    disk: int = 0  # bytes it leaves in the run folder

    def hours(self, accelerator: str) -> float:
        """Hours of one accelerator; see `UTILISATION`."""
        return self.flops / (PEAK_FLOPS[accelerator] * UTILISATION) / 3600


def training_images(config: BuildConfig, run_dir: Path) -> int:
    """N: of the corpus if it is there, else as the config says, else counted in its folder; InputError if nothing says it."""
    manifest = run_dir / "corpus" / MANIFEST
    if manifest.exists():
        return int(read_json(manifest)["images"])
    if config.plan.images:
        return config.plan.images
    if config.corpus.kind == "folder" and Path(config.corpus.path).is_dir():
        return len(list_folder(Path(config.corpus.path)).images)
    if config.corpus.kind == "emoji":
        return 15_351
    raise InputError(f"nothing says how many training images {config.name} has; set plan.images, or write the corpus first.")


def denoiser_shape(config: BuildConfig, run_dir: Path) -> dict[str, Any]:
    """The shape of a config's denoiser: the run's generator, `plan.network`, the pretrained one, or the one to train."""
    if (run_dir / "generator" / "model_index.json").exists():
        return shape_of(run_dir / "generator")
    if config.plan.network:
        return shape_of(config.plan.network)
    settings, vae = config.generator, config.autoencoder
    if isinstance(settings, PretrainedConfig):
        name = settings.pretrained
        return shape_of(ASSETS / name / "generator" if name in embedded_models() else name)
    vocabulary = settings.vocabulary

    class Tokenizer:
        bos_token_id = eos_token_id = pad_token_id = 0

        def __len__(self) -> int:
            return vocabulary

    with torch.device("meta"):
        autoencoder = build_autoencoder(vae)
        latent = {"latent_channels": vae.latent_channels, "latent_side": vae.resolution // 2 ** (len(vae.channels) - 1)}
        unet, _ = build_denoiser(settings, tokenizer=Tokenizer(), **latent)
    denoiser = {**unet.config, "_class_name": "UNet2DConditionModel"}
    return {"denoiser": denoiser, "tokens": settings.max_tokens, "vae": {**autoencoder.config, "_class_name": "AutoencoderKL"}}


def denoiser_of(config: BuildConfig, run_dir: Path) -> Network:
    """The counted denoiser of a config; its LoRA's matrices are the weights to unlearn if `unlearn: lora` and it is here."""
    network, generator = count(config.name, denoiser_shape(config, run_dir), config.teacher.pattern), config.generator
    if not isinstance(generator, PretrainedConfig) or generator.unlearn != "lora" or not Path(generator.lora).exists():
        return network
    with safe_open(locate_lora(generator.lora), framework="numpy") as file:
        shapes = [tuple(file.get_slice(name).get_shape()) for name in file.keys() if "lora" in name]  # noqa: SIM118
    sizes = [(shape[0], int(np.prod(shape[1:]))) for shape in shapes if len(shape) > 1]
    return replace(network, unlearned=sum(out * inner for out, inner in sizes), factors=factor_sizes(sizes))


def teacher_sizes(config: BuildConfig, images: int, network: Network) -> Sizes:
    """The sizes that the teacher's costs depend on, from the config alone; candidates are taken to fall evenly."""
    size = min(config.candidates.per_query, images)
    splits = ("train", "validation", "test")
    linearised = sum(getattr(config.queries, split) for split in splits if split in config.teacher.linearised)
    exact = sum(getattr(config.queries, split) for split in splits) - linearised
    captions = config.plan.captions_per_image if config.teacher.captions == "all" else 1
    return Sizes(
        images=images,
        captions=round(images * captions),
        latent=network.latent,
        conditioning=network.conditioning,
        parameters=network.unlearned,
        factors=network.factors,
        exact=(size,) * exact,
        linearised=(size,) * linearised,
        union=round(images * (1 - (1 - size / images) ** linearised)),
    )


def teacher_ways(config: BuildConfig, images: int, network: Network) -> dict[str, float]:
    """Operations of scoring the training and validation queries in three ways. 'exact_as_published' measures each query's
    candidates before and after its step, as the authors' released code does, 'exact' the losses before once for all queries, as
    ours does, and 'first_order' takes all of them to first order.
    """
    alone: dict[str, Any] = {"method": "unlearning", "models": (), "retrained": "", "similarity_features": ()}
    flops = []
    for linearised in (("train", "validation"), ()):
        teacher = replace(config.teacher, linearised=linearised, **alone)
        sizes = teacher_sizes(replace(config, queries=replace(config.queries, test=0), teacher=teacher), images, network)
        steps = teacher_plan(teacher, sizes, Probe(loaded=0, backward=0))
        flops.append(network.flops * sum(step.forward + 2 * step.backward for step in steps))
    views = 2 if teacher.mirrored else 1
    losses = 2 * sum(sizes.exact) * views * teacher.loss_draws * sizes.captions / sizes.images
    unlearning = 3 * len(sizes.exact) * teacher.query_draws * teacher.unlearning_steps
    return {"exact_as_published": network.flops * (unlearning + losses), "exact": flops[1], "first_order": flops[0]}


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
    steps = teacher_plan(config.teacher, teacher_sizes(config, images, network), probe)
    if not steps:
        return StageCost(name="teach")
    forward, backward = sum(step.forward for step in steps), sum(step.backward for step in steps)
    flops = network.flops * (forward + 2 * backward) + network.encode_flops * images
    memory, disk = max(step.memory for step in steps), sum(step.disk for step in steps)
    return StageCost(name="teach", forward=forward, backward=backward, flops=flops, memory=memory, disk=disk)


def plan(config: BuildConfig, run_dir: Path, *, measure: bool = False) -> dict[str, Any]:
    """Everything that can be said of a config before it runs; what `run_dir` holds already is read instead of assumed.

    Returns 'stages' (each with its counts and 'hours' by accelerator), their totals, 'teacher_hours' (of `teacher_ways`, by
    way and accelerator), 'money', and 'here': 'seconds' by stage and in all, and 'rates', or 'problem'. To `measure` this
    machine takes half a minute. Raises InputError if the number of images or the network is not known, and as `check`.
    """
    check(config, run_dir, planned=True)
    check_queries(config, run_dir)
    images, network = training_images(config, run_dir), denoiser_of(config, run_dir)
    stages = stage_costs(config, images, network)
    ways = [StageCost(name=way, flops=flops) for way, flops in teacher_ways(config, images, network).items()]
    hours = {name: sum(stage.hours(name) for stage in stages) for name in PEAK_FLOPS}
    result: dict[str, Any] = {
        "name": config.name,
        "images": images,
        "queries": {split: getattr(config.queries, split) for split in ("train", "validation", "test")},
        "network": asdict(network),
        "stages": [asdict(stage) | {"hours": {name: stage.hours(name) for name in PEAK_FLOPS}} for stage in stages],
        "forward": sum(stage.forward for stage in stages),
        "backward": sum(stage.backward for stage in stages),
        "peak_memory": max(stage.memory for stage in stages),
        "disk": sum(stage.disk for stage in stages),
        "hours": hours,
        "teacher_hours": {way.name: {name: way.hours(name) for name in PEAK_FLOPS} for way in ways},
        "accelerator": config.plan.accelerator,
        "money": config.plan.rate * hours[config.plan.accelerator] if config.plan.rate else None,
        "here": {"problem": "not measured"},
    }
    if measure:
        shape, teacher = denoiser_shape(config, run_dir), config.teacher
        try:
            rates = measure_machine(shape, network, teacher.pattern, teacher.batch_size, limit=config.plan.probe_seconds)
        except InputError as error:
            return result | {"here": {"problem": str(error)}}
        seconds = {stage.name: stage.flops / rates["dense" if stage.name in DENSE else "denoiser"] for stage in stages}
        result["here"] = {"seconds": {**seconds, "in all": sum(seconds.values())}, "rates": rates}
    return result


def as_table(result: Mapping[str, Any]) -> str:
    """A plan as text for a terminal."""
    here = result["here"].get("seconds", {})
    names = list(result["hours"])
    head = f"{'stage':18s} {'forward':>15s} {'backward':>15s}" + "".join(f"{name + ' h':>11s}" for name in names)
    lines = [head + f" {'memory':>10s} {'disk':>10s} {'here':>10s}"]
    total = {key: result[key] for key in ("forward", "backward", "disk", "hours")}
    total |= {"name": "in all", "memory": result["peak_memory"]}
    for stage in [*result["stages"], total]:
        hours = "".join(f"{stage['hours'][name]:11,.2f}" for name in names)
        seconds = here.get(stage["name"])
        lines.append(
            f"{stage['name']:18s} {stage['forward']:15,d} {stage['backward']:15,d}{hours} {_bytes(stage['memory']):>10s} "
            f"{_bytes(stage['disk']):>10s} {'' if seconds is None else f'{seconds:,.0f} s':>10s}"
        )
    lines.append(f"teacher of the training and validation queries, {names[0]}-hours:")
    for way, text in (
        ("exact_as_published", "exactly, as the paper's code does (losses before and after for each query)"),
        ("exact", "exactly, the losses before measured once"),
        ("first_order", "to first order (teacher.linearised)"),
    ):
        lines.append(f"  {result['teacher_hours'][way][names[0]]:12,.1f}  {text}")
    if result["money"] is not None:
        lines.append(f"money: {result['money']:,.2f} at the given rate, on {result['accelerator']}")
    if "problem" in result["here"]:
        lines.append(f"this machine: {result['here']['problem']}")
    else:
        rate = f"{result['here']['rates']['denoiser'] / 1e9:,.0f} GFLOP/s"
        lines.append(f"this machine: {here['in all']:,.0f} s in all, at {rate}; reading, searching and writing come on top")
    lines.append(f"accelerators: {UTILISATION:.0%} of their dense TF32 peak, one each; memory is host and accelerator together")
    return "\n".join(lines)


def _bytes(count: float) -> str:
    size, unit = next(((size, unit) for size, unit in ((1e12, "TB"), (1e9, "GB")) if count >= size), (1e6, "MB"))
    return f"{count / size:,.1f} {unit}"
