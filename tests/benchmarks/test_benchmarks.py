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
from PIL import Image
from torch import nn

from fastattr.core.errors import ArtifactDamagedError, InputError
from fastattr.corpus.records import TrainingImage
from fastattr.corpus.stage import CorpusConfig
from fastattr.corpus.store import Corpus, write_corpus
from fastattr.generators.scratch.autoencoder import AutoencoderConfig, build_autoencoder, pixel_tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import drawings
import emoji as benchmark
import judge as judging
import judge_training
import machine

SETS = ("fluent", "noto", "openmoji", "twemoji")
KINDS = ("animal", "heart", "sky")


def colour_of(style: str, subject: int) -> tuple[int, int, int]:
    """A colour that says set (red) and subject (green)."""
    return 40 + 50 * SETS.index(style), 4 * subject, 128


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """60 subjects, each in one to three sets; hearts in two sets alone."""
    images = []
    for subject in range(60):
        kind = KINDS[subject % 3]
        sets = SETS[:2] if kind == "heart" else SETS
        for style in np.random.default_rng(subject).permutation(sets)[: 1 + subject % 3].tolist():
            images.append(
                TrainingImage(
                    image_id=f"{style}-{subject}",
                    image=png(colour_of(style, subject)),
                    captions=[f"subject, {subject}, {style} style"],
                    source=style,
                    group="extras" if subject % 2 else kind,
                    subgroup=kind if subject % 2 else "any",
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
    """Reads set and subject off the colours that `colour_of` gives them."""

    styles, subjects = list(SETS), [f"subject, {number}" for number in range(60)]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        red, green, _ = (images[:, :, 5, 5] + 1).mul(127.5).unbind(dim=1)
        return nn.functional.one_hot(((red - 40) / 50).round().long(), 4), nn.functional.one_hot((green / 4).round().long(), 60)


class ColourGenerator:
    """Draws the colour of the prompt's set and subject, but knows only the sets in which a subject exists."""

    def __init__(self, corpus: Corpus) -> None:
        self.known = {captions[0]: corpus.image(row) for row, captions in enumerate(corpus.captions)}
        config = AutoencoderConfig(channels=(8, 8, 8, 8))
        self.pipeline = SimpleNamespace(vae=build_autoencoder(config))
        self.image_size = 64
        self.manifest = {"config": {"training": {"steps": 30, "batch_size": 20}}}
        self.drawn: list[tuple[str, int]] = []

    def generate(self, prompt: str, *, seed: int) -> Image.Image:
        self.drawn.append((prompt, seed))
        known = [image for caption, image in self.known.items() if caption.startswith(prompt.rpartition(", ")[0] + ", ")]
        return self.known.get(prompt, (known or [Image.new("RGB", (64, 64), colour_of("noto", 7))])[0])

    def encode_image(self, images: list[Image.Image]) -> torch.Tensor:
        return torch.tensor([image.getpixel((5, 5)) for image in images], dtype=torch.float32)[:, :, None, None]

    def generate_batch(self, prompts: list[str], *, seeds: list[int], guidance: float | None, steps: None) -> list[Image.Image]:
        self.guidance = guidance
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
    rows = drawings.choose_seen(captions, 30, seed=3)
    assert len({captions[row] for row in rows}) == 30
    np.testing.assert_array_equal(rows, drawings.choose_seen(captions, 30, seed=3))
    assert rows.tolist() != drawings.choose_seen(captions, 30, seed=4).tolist()
    with pytest.raises(InputError, match="30 distinct captions"):
        drawings.choose_seen(captions, 31, seed=3)


@pytest.mark.parametrize("kind", ["seen", "recombined"])
def test_every_prompt_is_chosen_equally_often(corpus, captions, kind):
    """A choice that favours the first rows, or subjects of few sets, would measure another population."""

    def choose(count: int, seed: int) -> list:
        if kind == "seen":
            return drawings.choose_seen(captions, count, seed=seed).tolist()
        return drawings.choose_recombined(captions, drawings.kinds_of(corpus), count, seed=seed)

    everything = [str(choice) for choice in choose(len(captions) if kind == "seen" else 10_000, 0)]
    assert len(set(everything)) == len(everything)
    draws = [str(choice) for seed in range(600) for choice in choose(20, seed)]
    counts = np.array([draws.count(choice) for choice in everything])
    assert counts.sum() == len(draws)
    expected = len(draws) / len(everything)
    assert np.abs(counts - expected).max() < 5 * expected**0.5


def test_recombined_prompts_are_in_no_caption_and_of_a_kind_that_the_set_draws(captions, corpus):
    """A 'recombination' that exists is a seen prompt; a heart in a set without hearts has no right answer."""
    kinds = drawings.kinds_of(corpus)
    assert kinds == [KINDS[int(caption.split(", ")[1]) % 3] for caption in captions]
    pairs = drawings.choose_recombined(captions, kinds, 10_000, seed=0)
    prompts = {drawings.recombine(captions[row], style) for row, style in pairs}
    drawn = {(int(caption.split(", ")[1]) % 3, caption.split(", ")[2]) for caption in captions}
    every = {
        f"subject, {number}, {style} style" for number in range(60) for style in SETS if (number % 3, f"{style} style") in drawn
    }
    assert prompts == every - set(captions)
    assert len(prompts) == len(pairs) > 40


def test_free_prompts_are_sixty_that_no_caption_equals():
    """A prompt of the training set would be a seen one; an answer that is no subject could never be right."""
    answers = json.loads(drawings.FREE_PROMPTS.read_text(encoding="utf-8"))
    assert len(answers) == 60
    assert all(answers.values())
    assert not any(", " in prompt for prompt in answers)  # as every caption has, before its style


def test_seen_figures_count_the_prompted_image_its_subject_and_its_set():
    captions = ["heart, ink style", "heart, flat style", "car, ink style", "sun, flat style"]
    nearest = np.array([[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]])
    figures = drawings.seen_figures(np.arange(4), nearest, captions)
    assert [figures[key] for key in ("recall1_seen", "recall5_seen", "subject1_seen", "style_accuracy_seen")] == [
        0.25,
        0.75,
        0.5,
        0.5,
    ]


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
    judge = judging.Judge((8, 16, 16), SETS, ("cat", "dog")).half().float()  # as float16 keeps it
    images = torch.rand(6, 3, 64, 64) * 2 - 1
    judge.train()(images)  # moves the batch statistics
    judge.eval().half().float()
    judging.save(judge, tmp_path, config={"channels": (8, 16, 16), "hidden": 768, "embedding": 256}, seed=5)
    loaded, facts = judging.load(tmp_path)
    assert (facts["seed"], loaded.styles, loaded.subjects) == (5, list(SETS), ["cat", "dog"])
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
    images = pixel_tensor(np.random.default_rng(0).integers(0, 256, (40, 3, 3, 3), dtype=np.uint8))
    images = nn.functional.interpolate(images, 48, mode="bilinear")
    never, always = torch.zeros(40, dtype=torch.bool), torch.ones(40, dtype=torch.bool)
    once = judge_training.disturb(images, torch.Generator().manual_seed(1), never)
    torch.testing.assert_close(once, judge_training.disturb(images, torch.Generator().manual_seed(1), never), rtol=0, atol=0)
    assert once.shape == (40, 3, judging.SIDE, judging.SIDE)
    assert once.abs().max() <= 1
    small = nn.functional.interpolate(images, judging.SIDE, mode="area")

    def nearest(disturbed: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
        return (disturbed[:, None] - among[None]).square().mean(dim=(2, 3, 4)).argmin(dim=1)

    assert (nearest(once, small) == torch.arange(40)).float().mean() > 0.9
    mirrored = judge_training.disturb(images, torch.Generator().manual_seed(1), always)
    found = nearest(mirrored, torch.cat([small, small.flip(3)]))
    assert (found % 40 == torch.arange(40)).float().mean() > 0.9
    assert 0.2 < (found >= 40).float().mean() < 0.8


def judge_corpus(corpus: Corpus, folder: Path, numbers: set[int]) -> tuple[Corpus, judge_training.Pictures, dict[str, str]]:
    """The images of some subjects as a corpus and as pictures, and no subject that counts as another."""
    rows = [row for row, caption in enumerate(corpus.captions) if int(caption[0].split(", ")[1]) in numbers]
    write_corpus(corpus.training_images(rows), folder, CorpusConfig())
    few = Corpus(folder)
    images, subjects = np.stack([np.asarray(few.image(row)) for row in range(len(few))]), judging.subjects_of(few)
    pictures = judge_training.Pictures(images, np.array(few.column("source")), np.array(subjects))
    return few, pictures, {subject: subject for subject in subjects}


def test_judge_learns_sets_and_subjects(corpus, tmp_path):
    """Labels that slip against the images would leave it at chance."""
    config = judge_training.JudgeConfig(
        channels=(8, 16),
        hidden=64,
        embedding=32,
        views=2,
        style_steps=60,
        style_batch=16,
        training=judge_training.TrainingConfig(steps=120, batch_size=64, learning_rate=5e-3, warmup_steps=5, ema_decay=0.9),
    )
    few, pictures, same = judge_corpus(corpus, tmp_path / "corpus", {0, 20, 40, 59})
    judge = judge_training.train(few, pictures, config, same=same, folder=tmp_path)
    assert judge.subjects == sorted(f"subject, {number}" for number in (0, 20, 40, 59))
    result = judging.accuracies(judge, pictures.images, few.column("source"), judging.subjects_of(few), same, "all")
    assert result["style_accuracy_all"] > 0.9
    assert result["subject_right_all"] > 0.9
    assert result["both_right_all_n"] == len(few)


def test_means_take_the_place_of_learned_vectors():
    """A learned vector of a subject with one picture loses against all others; one without any has nothing better."""
    torch.manual_seed(0)
    judge = judging.Judge((8, 16), SETS, ("cat", "dog", "none"), hidden=16, embedding=8).eval()
    described = judging.describe(torch.rand(5, 3, 64, 64) * 2 - 1)
    learned = judge.prototypes.weight[2].clone()
    judge_training.take_means(judge, described, torch.tensor([0, 1, 0, 0, 0]))
    assert judge.subject_logits(judge.embedding(described[1:2])).argmax() == 1
    lengths = judge.prototypes.weight.norm(dim=1)
    torch.testing.assert_close(lengths[:2], torch.ones(2))
    torch.testing.assert_close(judge.prototypes.weight[2], learned)


def test_held_out_images_are_of_subjects_that_the_judge_knows(corpus):
    """It could not name what it has never seen; and a subject known once must be known from one image, no more."""
    unseen, once = judging.held_out_rows(corpus, 0.3, 0.2)
    subjects = np.array(judging.subjects_of(corpus))
    trained_on = ~(unseen | once)
    assert 0.05 < unseen.mean() < 0.4
    assert once.any()
    assert not (unseen & once).any()
    assert set(subjects[unseen | once]) <= set(subjects[trained_on])
    assert all((subjects[trained_on] == subject).sum() == 1 for subject in set(subjects[once]))


def test_judge_is_not_shown_what_it_is_asked(tmp_path):
    """A held-out picture's twin in the older set of its maker, or under another name, would give the answer away."""
    drawn = np.random.default_rng(0).integers(0, 256, (2, 80, 8, 8, 3), dtype=np.uint8).repeat(8, axis=2).repeat(8, axis=3)
    sets, subjects = np.array(SETS * 20), np.arange(80).astype(str).repeat(4)[:80]
    labels = list(zip(sets.tolist(), subjects.tolist(), strict=True))
    images = []
    for (style, subject), picture in zip(labels, drawn[0], strict=True):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="PNG")
        caption = f"{subject}, {style} style"
        images.append(TrainingImage(image_id=f"{style}-{subject}", image=buffer.getvalue(), captions=[caption], source=style))
    write_corpus(images, tmp_path / "corpus", CorpusConfig())
    corpus = Corpus(tmp_path / "corpus")
    unseen, once = judging.held_out_rows(corpus, 0.3, 0.2)
    assert unseen.any()
    assert once.any()
    older, twin = np.where(sets == "noto", "noto-v1", "fxemoji"), int(np.flatnonzero(unseen)[0])
    hidden = {labels[row] for row in np.flatnonzero(unseen | once)}
    barred = {("noto-v1", subject) for style, subject in hidden if style == "noto"}
    barred |= {(style, subject) for style in ("noto-v1", "fxemoji") for subject in set(subjects[once])}
    theirs = list(zip(older.tolist(), subjects.tolist(), strict=True))
    free = next(row for row in range(80) if theirs[row] not in barred and subjects[row] != subjects[twin])
    drawn[1, free] = drawn[0, twin]  # under another name
    with (tmp_path / "others.npz").open("wb") as file:
        np.savez(file, images=drawn[1], sets=older, subjects=subjects)
    gathered = judge_training.gather(corpus, drawn[0], tmp_path / "others.npz", 0.3, 0.2)
    assert not set(zip(gathered.sets.tolist(), gathered.subjects.tolist(), strict=True)) & (hidden | barred)
    assert drawn[0, twin].tobytes() not in {image.tobytes() for image in gathered.images}
    assert len(gathered) == 80 - len(hidden) + sum(label not in barred for label in theirs) - 1


def test_subjects_of_one_picture_count_as_one(tmp_path):
    """No drawing of Norway's flag could be told from one of Bouvet Island's; a heart in another colour can."""
    named = {"flag: norway": 80, "flag: bouvet island": 81, "purple heart": 160}
    images = [
        TrainingImage(
            image_id=f"{style}-{number}", image=striped(style, shade), captions=[f"{subject}, {style} style"], source=style
        )
        for style in ("noto", "twemoji")
        for number, (subject, shade) in enumerate(named.items())
    ]
    write_corpus(images, tmp_path, CorpusConfig())
    corpus = Corpus(tmp_path)
    pictures = np.stack([np.asarray(corpus.image(row)) for row in range(len(corpus))])
    same = judging.same_pictures(corpus, pictures)
    assert same == {
        "flag: norway": "flag: bouvet island",
        "flag: bouvet island": "flag: bouvet island",
        "purple heart": "purple heart",
    }


def striped(style: str, shade: int) -> bytes:
    """A PNG with a stripe of this shade; sets differ in where it is."""
    image = Image.new("RGB", (64, 64), "white")
    image.paste((shade, 40, 200 - shade), (0, 10, 64, 30) if style == "noto" else (10, 0, 30, 64))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def test_measured_keys_and_labels(corpus):
    """Labels joined to the wrong images would give chance where each is right, and the reverse."""
    generator, attributor = ColourGenerator(corpus), CaptionAttributor(corpus, wrong=30)
    facts = {"config": {"held_out_share": 0.3, "once_share": 0.2}, "same": {}}
    sizes = benchmark.Sizes(seen=60, recombined=50, planted=len(corpus), timed_prompts=3, timed_images=2)
    results, drawn = benchmark.measure_generator(
        generator, corpus, ColourJudge(), facts, sizes, 0, {"guidance": 3.0, "steps": None}
    )
    assert generator.guidance == 3.0
    results |= benchmark.measure_attributor(generator, attributor, corpus, sizes, seed=0)
    assert set(benchmark.KEYS) <= set(results)
    assert all(isinstance(value, int | float) for value in results.values())
    for name in (
        "recall1_seen",
        "subject1_seen",
        "style_accuracy_seen",
        "subject_right_recombined",
        "both_right_real_held_out",
    ):
        assert results[name] == 1.0
    assert results["style_accuracy_recombined"] == 0.0  # it draws the subject in a set that has it
    assert results["both_right_recombined"] == 0.0
    assert results["subject_right_free"] == 0.0
    assert results["recall1_seen_n"] == len(drawn) == 60
    assert results["generator_examples"] == 600
    assert results["planted_copy_first"] == pytest.approx(1 - 30 / len(corpus))
    assert results["map_1pct_student"] == 0.6
    assert results["map_1pct_gain_low"] == 0.05
    assert results["prompt_to_attributed_seconds_n"] == 3
    seeds = [seed for _, seed in generator.drawn[:110]]
    assert len(set(seeds)) == 110


def test_metrics_at_another_share_of_the_corpus_are_refused():
    """mAP(10%) under the name of mAP(1%) would look like a success."""
    metrics = {"positives": 12, "corpus_images": 120}
    with pytest.raises(InputError, match="1%"):
        benchmark.teacher_agreement(metrics)
    with pytest.raises(InputError, match="1%"):
        benchmark.teacher_agreement({})


def test_contact_sheet_and_its_prompts_keep_order():
    """Samples in another order would not match their prompts."""
    colours = [(index * 20, 0, 255) for index in range(10)]
    sheet = benchmark.contact_sheet([Image.new("RGB", (64, 64), colour) for colour in colours], columns=4)
    assert sheet.size == (4 * 100, 3 * 100)
    assert [sheet.getpixel((100 * (i % 4) + 50, 100 * (i // 4) + 50)) for i in range(10)] == colours
    assert sheet.getpixel((0, 0)) == sheet.getpixel((399, 299)) == (255, 255, 255)
    page = benchmark.sheet_prompts([f"prompt {number}" for number in range(10)], columns=4)
    cells = [cell.strip() for line in page.splitlines() if "prompt " in line for cell in line.strip("| ").split("|")]
    assert cells == [f"prompt {number}" for number in range(10)]


def test_assets_are_counted_in_millions_of_bytes(tmp_path):
    """MiB instead of MB would hide 5% of the size."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(bytes(1_500_000))
    (tmp_path / "b").write_bytes(bytes(500_000))
    assert benchmark.megabytes(tmp_path) == 2.0
