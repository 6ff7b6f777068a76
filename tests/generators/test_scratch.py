"""generators/scratch: tokenizer, prompts, text encoder; training itself is tested in test_training.py and test_line.py."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DConditionModel

from fastattr.core.captions import split_caption
from fastattr.corpus.store import Corpus
from fastattr.generators.loading import unknown_words
from fastattr.generators.scratch.denoiser import (
    NO_STYLE,
    CaptionLoss,
    DenoiserLoss,
    GeneratorConfig,
    build_denoiser,
    build_scheduler,
    build_text_encoder,
    tokenize,
    train_tokenizer,
)
from fastattr.generators.scratch.stage import TrainingExamples, draw_prompt, mistype, rows_without_style, train
from fastattr.pipeline.config import load_config

CAPTIONS = [
    "red heart, openmoji style",
    "smiling face, noto",
    "flag: côte d'ivoire",
    "keycap: 7",
    "o-button (blood type)",
]

PROGRAM = f"""
import sys
from pathlib import Path
from fastattr.generators.scratch.denoiser import train_tokenizer
train_tokenizer({CAPTIONS!r}, vocabulary=360, max_tokens=12, scratch=Path(sys.argv[1]))
"""


def test_a_learned_tokenizer_is_the_same_in_every_process(tmp_path: Path):
    """The trainer walks hash maps: letters or equally frequent merges in their order would make one seed two generators."""
    folders = [tmp_path / str(number) for number in range(3)]
    for folder in folders:
        folder.mkdir()
        subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], check=True, timeout=300)
    for name in ("vocab.json", "merges.txt"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name


def test_a_learned_tokenizer_gives_back_what_it_read(tmp_path: Path):
    """A last letter taken for a special token would vanish in decoding, and split words that hold it."""
    tokenizer = train_tokenizer(CAPTIONS, vocabulary=360, max_tokens=60, scratch=tmp_path)
    for caption in CAPTIONS:
        ids = tokenizer(caption).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == caption.replace(" ", "")
        assert tokenizer.unk_token_id not in ids[1:-1]


CONFIG = GeneratorConfig(channels=(32, 32), vocabulary=300, max_tokens=12, text_width=32, text_layers=1)
PICTURES = [
    ["red heart, ink style", "love, ink style"],
    ["blue car, ink style"],
    ["red heart, flat style"],
    ["a plain caption"],
]


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> TrainingExamples:
    scratch = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_tokenizer([c for of_image in PICTURES for c in of_image], vocabulary=300, max_tokens=12, scratch=scratch)
    latents = torch.randn(len(PICTURES), 4, 4, 4, generator=torch.Generator().manual_seed(1))
    return TrainingExamples(latents, PICTURES, tokenizer, CONFIG, 1000)


def test_prompts_come_in_the_shares_asked_for():
    """Without empty prompts guidance has nothing to compare with; without plain captions nothing is learned by its name."""
    random = np.random.default_rng(0)
    drawn = Counter(draw_prompt(PICTURES[0], CONFIG, random)[0] for _ in range(20_000))
    share = {prompt: count / 20_000 for prompt, count in drawn.items()}
    assert abs(share[""] - 0.1) < 0.01
    assert abs(share["ink style"] - 0.05) < 0.01
    plain = 0.85 * 0.85
    assert abs(share["red heart, ink style"] - plain * 0.7 * 0.8) < 0.015
    assert abs(share["love"] - plain * 0.3 * 0.2) < 0.01
    assert {"a red heart, ink style", "red hearts"} <= set(drawn)


def test_a_slip_changes_one_or_two_neighbouring_letters():
    random = np.random.default_rng(0)
    for _ in range(200):
        slipped = mistype("red heart", random)
        assert abs(len(slipped) - 9) <= 1
        start = next((at for at, (new, old) in enumerate(zip(slipped, "red heart", strict=False)) if new != old), 8)
        assert slipped[start + 2 :] in "red heart" or slipped[start + 2 :].endswith("red heart"[start + 2 :])
    assert mistype("ab", random) == "ab"


def test_text_encoder_is_told_subject_and_style_of_the_same_image(examples):
    """Latents, subjects and styles of other rows than the prompts' would teach it to confuse them."""
    tokens, latents, subjects, styles = examples.captions_of(np.arange(4).repeat(60), torch.Generator().manual_seed(0))
    told = {}
    for ids, picture, subject, style in zip(tokens, latents, subjects, styles, strict=True):
        row = int((examples.latents - picture).square().sum(dim=(1, 2, 3)).argmin())
        expected_subject, expected_style = split_caption(PICTURES[row][0])
        assert examples.subjects[subject] == expected_subject
        prompt = examples.tokenizer.decode(ids, skip_special_tokens=True).strip()
        told.setdefault(prompt, set()).add(row)
        if prompt and expected_style:
            assert examples.styles[style] == expected_style
        else:
            assert style == NO_STYLE
    assert told["red heart , ink style"] == {0}
    assert told["blue car"] == {1}
    assert told["red heart"] in ({0}, {2})  # one of both, always the same
    assert told[""] == {0, 1, 2, 3}


def test_images_that_share_a_caption_without_style_are_all_learned(examples):
    """A LoRA's corpus may have one caption for all of its images."""
    same = TrainingExamples(examples.latents, [["a photo of my dog"]] * 4, examples.tokenizer, CONFIG, 1000)
    _, rows = same.prompts_of(np.arange(4), torch.Generator().manual_seed(0))
    assert rows.tolist() == [0, 1, 2, 3]


def test_a_keyword_stands_for_the_subject_that_it_tells_most_of():
    captions = [["pick-up truck, x style", "lorry, x style", "car, x style"], ["automobile, x style", "car, x style"]]
    found = rows_without_style([*captions, ["automobile, y style", "car, y style"]])
    assert found["car"] == found["automobile"] in {1, 2}
    assert found["lorry"] == 0


def test_timesteps_are_shifted_towards_noise(examples):
    """By hand: the median of u -> 4u / (1 + 3u) is 0.8."""
    _, _, timesteps, _ = examples.batch_of(np.zeros(2000, dtype=np.int64), torch.Generator().manual_seed(0))
    assert abs(float(timesteps.float().median()) - 800) < 5
    assert timesteps.min() < 20
    assert timesteps.max() > 990


def test_a_frozen_text_encoder_gives_what_an_unfrozen_one_gives(examples):
    """A cache that mixed up its rows would tell the denoiser of other prompts."""
    torch.manual_seed(0)
    unet, text_encoder = build_denoiser(CONFIG, tokenizer=examples.tokenizer, latent_channels=4, latent_side=4)
    loss = DenoiserLoss(unet, text_encoder, build_scheduler())
    tokens = tokenize(examples.tokenizer, ["red heart", "blue car", "red heart", "love"])
    with torch.no_grad():
        expected = loss.encode(tokens)
    text_encoder.requires_grad_(False)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 1]):
        torch.testing.assert_close(loss.encode(tokens[order]).float(), expected[order], atol=0.02, rtol=0.02)


def test_a_text_encoder_learns_what_prompts_look_like(examples):
    """Its loss falls far below what the mean image gives, and subjects and styles are told apart."""
    torch.manual_seed(0)
    text_encoder = build_text_encoder(examples.tokenizer, max_tokens=12, width=32, layers=1, head_width=32)
    loss = CaptionLoss(text_encoder, latent_shape=(4, 4, 4), subjects=3, styles=2, name_weight=0.1)
    tokens = tokenize(examples.tokenizer, [captions[0] for captions in PICTURES])
    batch = tokens, examples.latents, torch.tensor([2, 1, 2, 0]), torch.tensor([1, 1, 0, NO_STYLE])
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss(*batch).backward()
        optimizer.step()
    picture, subjects, styles = loss.foretell(tokens)
    assert (picture - examples.latents.flatten(1)).square().mean() < 0.05
    assert subjects.argmax(dim=1).tolist() == [2, 1, 2, 0]
    assert styles.argmax(dim=1).tolist()[:3] == [1, 1, 0]


def test_words_that_were_never_seen_are_found():
    """Whoever asks for a walrus should hear that the model knows none; plurals, case and articles are no surprise."""
    known = {"dog", "cherry", "box", "face", "7"}
    assert unknown_words("Two dogs, cherries and BOXES with a face of 7", known) == ["two"]
    assert unknown_words("a walrus on the walrus' côte", known) == ["walrus", "côte"]


def test_compiling_the_network_goes_on_from_a_checkpoint_that_was_made_without(
    tiny_run: Path, tiny_config: Path, tmp_path: Path
):
    """Whether to compile may be found out while a training is under way; hours of it must not be refused then."""
    config = load_config(tiny_config).generator
    assert isinstance(config, GeneratorConfig)
    config = replace(config, training=replace(config.training, steps=2, checkpoint_every=1))
    autoencoder, accelerator = AutoencoderKL.from_pretrained(tiny_run / "autoencoder"), Accelerator()
    given = (Corpus(tiny_run / "corpus"), autoencoder, tmp_path)
    plain, _ = train(config, *given, inputs={}, accelerator=accelerator)
    with patch.object(UNet2DConditionModel, "compile", autospec=True) as compiled:
        again, _ = train(replace(config, compiled=True), *given, inputs={}, accelerator=accelerator)
    assert compiled.call_count == 1
    for name, weight in plain.unet.state_dict().items():
        assert torch.equal(weight, again.unet.state_dict()[name])
