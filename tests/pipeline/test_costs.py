"""Costs: counted from the config alone as the stages then count, and near the paper's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastattr import InputError
from fastattr.cli.main import main
from fastattr.pipeline.config import load_config
from fastattr.pipeline.networks import PEAK_FLOPS, Network, count, shape_of
from fastattr.pipeline.plan import UTILISATION, denoiser_of, stage_costs, teacher_sizes, training_images
from fastattr.teachers.cost import Probe, teacher_plan
from tests.sizes import sizes_of_run

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


def counted(name: str) -> Network:
    return count(name, shape_of(name))


def test_known_shapes_are_those_of_the_published_networks():
    """A shape mistyped in the table would put every hour of the plan wrong."""
    assert counted("stable-diffusion-1").parameters == 859_520_964  # Stable Diffusion 1.x
    assert counted("coco-ldm").unlearned == 7_077_888  # 24 projections of 1024 to 128 or 256, as the authors' code selects
    assert 11.8e9 < counted("black-forest-labs/FLUX.1-dev").parameters < 12e9  # '12B'
    with pytest.raises(InputError, match=r"plan\.network"):
        counted("org/unheard-of")


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
    expected = teacher_plan(config.teacher, sizes_of_run(config.teacher, tiny_run, generator), nothing)
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
