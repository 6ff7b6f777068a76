"""Benchmarks: which prompts are chosen, how shares are taken, that drawn images meet their own labels, that judges keep."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastattr.generators.scratch.refinement import is_refined_on
from PIL import Image
from torch import nn

from fastattr.core.errors import ArtifactDamagedError, InputError
from fastattr.corpus.records import TrainingImage
from fastattr.corpus.stage import CorpusConfig
from fastattr.corpus.store import Corpus, write_corpus
from fastattr.generators.scratch.autoencoder import AutoencoderConfig, build_autoencoder, pixel_tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import emoji as benchmark
import judge as judging
import machine

SETS = ("fluent", "noto", "openmoji", "twemoji")
SUBGROUPS = ("", "animal", "heart", "sky")


def colour_of(style: str, subgroup: str) -> tuple[int, int, int]:
    """A colour that says set (red) and subgroup (green)."""
    return 40 + 50 * SETS.index(style), 40 + 50 * SUBGROUPS.index(subgroup), 128


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """60 subjects, each in one to three sets; subject 0 has no subgroup."""
    images = []
    for subject in range(60):
        subgroup = SUBGROUPS[0 if subject == 0 else 1 + subject % 3]
        for style in np.random.default_rng(subject).permutation(SETS)[: 1 + subject % 3].tolist():
            images.append(
                TrainingImage(
                    image_id=f"{style}-{subject}",
                    image=png(colour_of(style, subgroup)),
                    captions=[f"subject, {subject}, {style} style"],
                    source=style,
                    subgroup=subgroup,
                    family=f"{style}-{subject}",
                )
            )
    folder = tmp_path_factory.mktemp("run") / "corpus"
    write_corpus(images, folder, CorpusConfig())
    return Corpus(folder)


@pytest.fixture(scope="module")
def captions(corpus) -> list[str]:
    return [of_image[0] for of_image in corpus.captions]


class ColourJudge(nn.Module):
    """Reads set and subgroup off the colours that `colour_of` gives them."""

    styles, subgroups = list(SETS), list(SUBGROUPS[1:])

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        red, green, _ = (images[:, :, 5, 5] + 1).mul(127.5).sub(40).div(50).round().long().unbind(dim=1)
        return nn.functional.one_hot(red, 4), nn.functional.one_hot((green - 1).clamp_min(0), 3)


class ColourGenerator:
    """Draws the colour of the prompt's set and subgroup, but knows only the sets in which a subject exists."""

    def __init__(self, corpus: Corpus) -> None:
        self.known = {captions[0]: corpus.image(row) for row, captions in enumerate(corpus.captions)}
        config = AutoencoderConfig(channels=(8, 8, 8, 8))
        self.pipeline = SimpleNamespace(vae=build_autoencoder(config))
        self.image_size = 64
        self.drawn: list[tuple[str, int]] = []

    def generate(self, prompt: str, *, seed: int) -> Image.Image:
        self.drawn.append((prompt, seed))
        other = next(image for caption, image in self.known.items() if caption.startswith(prompt.rpartition(", ")[0] + ", "))
        return self.known.get(prompt, other)

    def generate_batch(self, prompts: list[str], *, seeds: list[int], guidance: float | None) -> list[Image.Image]:
        assert guidance is None  # what is reported is drawn with the generator's own
        return [self.generate(prompt, seed=seed) for prompt, seed in zip(prompts, seeds, strict=True)]


class CaptionAttributor:
    """Names the training images whose caption is the query's prompt; `wrong` ones it does not know."""

    def __init__(self, corpus: Corpus, wrong: int = 0) -> None:
        self.ids = {captions[0]: image_id for image_id, captions in zip(corpus.image_ids, corpus.captions, strict=True)}
        for caption in list(self.ids)[:wrong]:
            self.ids[caption] = "another"

    def info(self) -> dict[str, object]:
        method = {"map": 0.5, "map_se": 0.01, "spearman": 0.4, "spearman_se": 0.02}
        return {
            "metrics": {
                "positives": 1,
                "corpus_images": 120,
                "queries": 40,
                "methods": {"student": {**method, "map": 0.6}, "untuned": method},
                "map_gain": {"mean": 0.1, "low": 0.05, "high": 0.15},
            }
        }

    def attribute(self, image: Image.Image, prompt: str, *, k: int) -> SimpleNamespace:
        rows = [SimpleNamespace(image_id=self.ids.get(prompt, "none"))] * k
        return SimpleNamespace(results=rows, thumbnail=lambda image_id: image)


def test_seen_prompts_are_distinct_and_seeded():
    """A caption drawn twice would count twice and make the standard error too small."""
    captions = [f"subject {number % 30}, noto style" for number in range(50)]
    rows = benchmark.choose_seen(captions, 30, seed=3)
    assert len({captions[row] for row in rows}) == 30
    np.testing.assert_array_equal(rows, benchmark.choose_seen(captions, 30, seed=3))
    assert rows.tolist() != benchmark.choose_seen(captions, 30, seed=4).tolist()
    with pytest.raises(InputError, match="30 distinct captions"):
        benchmark.choose_seen(captions, 31, seed=3)


@pytest.mark.parametrize("kind", ["seen", "recombined"])
def test_every_prompt_is_chosen_equally_often(captions, kind):
    """A choice that favours the first rows, or subjects of few sets, would measure another population."""
    choose = benchmark.choose_seen if kind == "seen" else benchmark.choose_recombined
    everything = [str(choice) for choice in choose(captions, 120, seed=0)]
    assert len(set(everything)) == len(everything)
    draws = [str(choice) for seed in range(600) for choice in choose(captions, 20, seed=seed)]
    counts = np.array([draws.count(choice) for choice in everything])
    assert counts.sum() == len(draws)
    expected = len(draws) / len(everything)
    assert np.abs(counts - expected).max() < 5 * expected**0.5


def test_recombined_prompts_are_in_no_caption(captions):
    """A 'recombination' that exists, or that the generator was refined on, would be a seen prompt, which is easier."""
    pairs = benchmark.choose_recombined(captions, 10_000, seed=0)
    prompts = {benchmark.recombine(captions[row], style) for row, style in pairs}
    styles = {benchmark.split_caption(caption)[1] for caption in captions}
    every = {f"subject, {number}, {style} style" for number in range(60) for style in styles}
    assert prompts == {prompt for prompt in every - set(captions) if not is_refined_on(prompt)}
    assert len(prompts) == len(pairs) > 40


def test_recombined_prompts_of_known_kinds_name_sets_that_draw_the_kind(corpus, captions):
    """A flag in the style of a set without flags has no right answer that the judge could know."""
    kinds = corpus.column("subgroup")
    drawn = {(kind, style) for kind, style in zip(kinds, corpus.column("source"), strict=True)}
    drawn -= {("heart", "noto")}
    without = [
        ("" if (kind, style) == ("heart", "noto") else kind) for kind, style in zip(kinds, corpus.column("source"), strict=True)
    ]
    pairs = benchmark.choose_recombined(captions, 10_000, seed=0, kinds=without)
    every = benchmark.choose_recombined(captions, 10_000, seed=0)
    assert set(pairs) == {(row, style) for row, style in every if without[row] and (without[row], style) in drawn}
    assert len(pairs) < len(every)


def test_share_agrees_with_a_simulation():
    """An error of the mean that lacks the root, or that is 0 at all right, would claim too much."""
    rng = np.random.default_rng(0)
    means = (rng.random((4000, 100)) < 0.7).mean(axis=1)
    result = machine.share("right", np.arange(100) < 70)
    assert result["right"] == 0.7
    assert result["right_n"] == 100
    assert result["right_se"] == pytest.approx(means.std(), rel=0.05)
    assert machine.share("right", np.ones(200, dtype=bool))["right_se"] > 0
    with pytest.raises(ValueError, match="no cases"):
        machine.share("right", np.array([], dtype=bool))


def test_report_writes_what_it_prints_and_stays_flat(tmp_path, capsys):
    """A nested value would be lost by whoever compares results key by key."""
    machine.report({"a": 1.5, **machine.describe()}, tmp_path / "result.json")
    written = json.loads((tmp_path / "result.json").read_text())
    assert written == json.loads(capsys.readouterr().out)
    assert written["a"] == 1.5
    assert torch.__version__.startswith(written["torch_version"])
    assert written["cores"] >= 1
    with pytest.raises(ValueError, match="flat"):
        machine.report({"a": [1]}, None)


def test_saved_judge_gives_the_same_logits(tmp_path):
    """Lost batch statistics or classes in another order would change verdicts and crash nothing."""
    torch.manual_seed(0)
    judge = judging.Judge((8, 16, 16), SETS, SUBGROUPS[1:]).half().float()  # as float16 keeps it
    images = torch.rand(6, 3, 64, 64) * 2 - 1
    judge.train()(images)  # moves the batch statistics
    judge.eval().half().float()
    judging.save(judge, tmp_path, config={"channels": (8, 16, 16)}, seed=5)
    loaded, facts = judging.load(tmp_path)
    assert (facts["seed"], loaded.styles, loaded.subgroups) == (5, list(SETS), list(SUBGROUPS[1:]))
    with torch.no_grad():
        for before, after in zip(judge(images), loaded(images), strict=True):
            np.testing.assert_array_equal(before.numpy(), after.numpy())
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(ArtifactDamagedError):
        judging.load(tmp_path)


def test_disturbed_images_stay_close_and_follow_the_generator():
    """A shift of half the image, or noise from a global source, would teach other classes or break resuming."""
    images = pixel_tensor(np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8))
    images = nn.functional.interpolate(images, 64, mode="bilinear")
    once = judging.disturb(images, torch.Generator().manual_seed(1))
    torch.testing.assert_close(once, judging.disturb(images, torch.Generator().manual_seed(1)), rtol=0, atol=0)
    assert once.abs().max() <= 1
    distance = (once[:, None] - images[None]).square().mean(dim=(2, 3, 4))  # (8, 8)
    assert distance.argmin(dim=1).tolist() == list(range(8))
    assert not torch.equal(once, images)


def test_judge_learns_sets_and_subgroups_and_leaves_unknown_ones_out(corpus, tmp_path):
    """Labels that slip against the images would leave it at chance; '' is no class to learn."""
    config = judging.JudgeConfig(
        channels=(8, 16),
        training=judging.TrainingConfig(steps=60, batch_size=32, learning_rate=1e-2, warmup_steps=5, ema_decay=0.9),
    )
    images = np.stack([np.asarray(corpus.image(row)) for row in range(len(corpus))])
    judge = judging.train(corpus, images, config, checkpoint=tmp_path / "checkpoint.safetensors")
    assert judge.subgroups == list(SUBGROUPS[1:])
    result = judging.accuracies(judge, images, corpus.column("source"), corpus.column("subgroup"), "all")
    assert result["style_accuracy_all"] > 0.9
    assert result["subgroup_accuracy_all"] > 0.9
    assert result["style_accuracy_all_n"] == len(corpus)
    assert result["subgroup_accuracy_all_n"] == len(corpus) - corpus.column("subgroup").count("")


def test_measured_keys_and_labels(corpus):
    """Labels joined to the wrong images would give chance where each is right, and the reverse."""
    generator, attributor = ColourGenerator(corpus), CaptionAttributor(corpus, wrong=30)
    config = {"config": {"resolution": 64, "held_out_share": 0.3}}
    sizes = benchmark.Sizes(seen=100, recombined=50, planted=len(corpus), timed_prompts=3, timed_images=2)
    results, drawn = benchmark.measure(generator, attributor, corpus, ColourJudge(), config, sizes, seed=0)
    assert set(benchmark.KEYS) - {"assets_mb"} <= set(results)
    assert all(isinstance(value, int | float) for value in results.values())
    for name in ("style_accuracy_seen", "subgroup_accuracy_seen", "style_accuracy_real", "subgroup_accuracy_recombined"):
        assert results[name] == 1.0
    assert results["style_accuracy_recombined"] == 0.0  # it draws the subject in a set that has it
    assert results["planted_copy_first"] == pytest.approx(1 - 30 / len(corpus))
    assert results["subgroup_accuracy_seen_n"] < results["style_accuracy_seen_n"] == len(drawn) == 100
    assert results["map_1pct_student"] == 0.6
    assert results["map_1pct_gain_low"] == 0.05
    assert results["prompt_to_attributed_seconds_n"] == 3
    seeds = [seed for _, seed in generator.drawn[:150]]
    assert len(set(seeds)) == 150


def test_metrics_at_another_share_of_the_corpus_are_refused():
    """mAP(10%) under the name of mAP(1%) would look like a success."""
    metrics = {"positives": 12, "corpus_images": 120}
    with pytest.raises(InputError, match="1%"):
        benchmark.teacher_agreement(metrics)
    with pytest.raises(InputError, match="1%"):
        benchmark.teacher_agreement({})


def test_contact_sheet_keeps_order():
    """Samples in another order would not match their prompts."""
    colours = [(index * 20, 0, 255) for index in range(10)]
    sheet = benchmark.contact_sheet([Image.new("RGB", (64, 64), colour) for colour in colours], columns=4)
    assert sheet.size == (4 * 66 + 2, 3 * 66 + 2)
    assert [sheet.getpixel((2 + 66 * (i % 4) + 5, 2 + 66 * (i // 4) + 5)) for i in range(10)] == colours
    assert sheet.getpixel((0, 0)) == (221, 221, 221)


def test_assets_are_counted_in_millions_of_bytes(tmp_path):
    """MiB instead of MB would hide 5% of the size."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(bytes(1_500_000))
    (tmp_path / "b").write_bytes(bytes(500_000))
    assert benchmark.megabytes(tmp_path) == 2.0
