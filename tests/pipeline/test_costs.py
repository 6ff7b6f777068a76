"""Costs: counted from the config alone as the stages then count, and near the paper's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastattr import InputError
from fastattr.cli.main import main
from fastattr.generators.queries import choose_prompts
from fastattr.pipeline.config import load_config
from fastattr.pipeline.costs import PEAK_FLOPS, UTILISATION, denoiser_of, stage_costs, teacher_sizes, training_images
from fastattr.pipeline.miniature import extrapolate, miniature
from fastattr.pipeline.networks import network_of
from fastattr.teachers.cost import Probe, run_sizes, teacher_plan

CONFIGS = Path(__file__).parents[2] / "hub_scripts" / "configs"
PUBLISHED = {"coco": 1250, "sd15-laion": 15_150}
"""A100-hours of the teacher of the training and validation queries (arXiv:2511.10721, appendix)."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_plan_without_a_run_folder_is_near_what_the_paper_spent(name: str, tmp_path: Path, capsys):
    """One throughput model for both: a plan that is off by a caption, a view or a pass is off by a factor of two to ten."""
    run_dir = tmp_path / "nothing"
    assert main(["plan", str(CONFIGS / f"{name}.yaml"), "--no-measure", "--run", str(run_dir), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    hours = {way: by_name["A100"] for way, by_name in result["teacher_hours"].items()}
    assert PUBLISHED[name] / 2 < hours["exact_as_published"] < 2 * PUBLISHED[name]
    assert hours["first_order"] < hours["exact"] < hours["exact_as_published"]
    documented = (CONFIGS.parent.parent / "docs" / "costs.md").read_text(encoding="utf-8")
    assert " | ".join(f"{hours[way]:,.0f} h" for way in ("exact_as_published", "exact", "first_order")) in documented
    assert not run_dir.exists()


def test_known_shapes_are_those_of_the_published_networks():
    """A shape mistyped in the table would put every hour of the plan wrong."""
    assert network_of("stable-diffusion-1").parameters == 859_520_964  # Stable Diffusion 1.x
    assert network_of("coco-ldm").unlearned == 7_077_888  # 24 projections of 1024 to 128 or 256, as the authors' code selects
    assert 11.8e9 < network_of("black-forest-labs/FLUX.1-dev").parameters < 12e9  # '12B'
    with pytest.raises(InputError, match=r"plan\.network"):
        network_of("org/unheard-of")


def test_counting_a_folder_equals_counting_the_config_that_it_was_trained_by(tiny_run: Path, tiny_config: Path, tmp_path: Path):
    """A plan made before the generator is trained must be that of the generator."""
    config = load_config(tiny_config)
    before, after = denoiser_of(config, tmp_path), denoiser_of(config, tiny_run)
    same = ("flops", "parameters", "latent", "conditioning", "unlearned", "factors", "encode_flops")
    words = {name: (getattr(before, name), getattr(after, name)) for name in same}
    # The trained tokenizer decides how many numbers a prompt has only by its length, which both know.
    assert {name: first for name, (first, _) in words.items()} == {name: second for name, (_, second) in words.items()}


def test_evaluations_from_the_config_alone_are_those_of_the_run_folder(tiny_run: Path, tiny_config: Path):
    """What is planned before anything runs must be what the teacher's own plan, tested against what is spent, says."""
    from fastattr.generators.generator import Generator

    config = load_config(tiny_config)
    config = replace(config, teacher=replace(config.teacher, linearised=()))
    generator = Generator.from_pretrained(tiny_run / "generator")
    network = denoiser_of(config, tiny_run)
    nothing = Probe(loaded=0, backward=0)
    expected = teacher_plan(
        config.teacher, run_sizes(config.teacher, tiny_run, generator, generator.modules_to_unlearn()), nothing
    )
    images = training_images(config, tiny_run)
    assert teacher_plan(config.teacher, teacher_sizes(config, images, network), nothing) == expected
    teach = next(stage for stage in stage_costs(config, images, network) if stage.name == "teach")
    assert teach.forward == sum(step.forward for step in expected)
    assert teach.hours("A100") == pytest.approx(teach.flops / PEAK_FLOPS["A100"] / UTILISATION / 3600)


def test_the_number_of_images_is_counted_in_the_folder_or_asked_for(tiny_config: Path, tmp_path: Path):
    """A plan for 0 images would promise a build for nothing."""
    config = load_config(tiny_config)
    assert training_images(config, tmp_path) == 48
    unknown = replace(config, corpus=replace(config.corpus, kind="dataset"))
    with pytest.raises(InputError, match=r"plan\.images"):
        training_images(unknown, tmp_path)
    assert training_images(replace(unknown, plan=replace(config.plan, images=7)), tmp_path) == 7


def test_extrapolation_finds_start_first_use_and_time_a_unit():
    """Start and first use taken for work, times the size of the real line, would turn minutes into hours."""
    start, warm_up, each = 2.0, 3.0, 0.01
    few, many = (100, start + each * 100), (300, start + each * 300)
    expected = start + warm_up + each * 50_000
    assert extrapolate(few[1] + warm_up, few, many, units=50_000) == pytest.approx(expected)
    assert extrapolate(2.0, (100, 2.0), (300, 1.9), units=300) == pytest.approx(1.9)  # noise


@pytest.mark.parametrize("name", ["emoji", "coco", "sd15-laion"])
def test_a_miniature_is_small_whatever_the_config(name: str):
    """A minute's measurement that draws five thousand queries is none."""
    config = load_config(CONFIGS / f"{name}.yaml")
    small = miniature(config, 1)
    prompts = choose_prompts(["a caption"], small.queries)
    assert len(prompts) == small.queries.train + small.queries.validation + small.queries.test <= 12
    assert small.candidates.per_query <= 24
    assert small.teacher.query_draws <= 2 * config.teacher.batch_size
    assert small.distill.training.steps <= 20
