"""fastattr/generators/scratch/refinement.py: targets moved along what a style adds, and prompts that no image answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from fastattr import InputError
from fastattr.core.captions import recombinations, recombine
from fastattr.core.training import TrainingConfig
from fastattr.generators.scratch.denoiser import (
    DenoiserLoss,
    GeneratorConfig,
    TrainingExamples,
    build_denoiser,
    build_scheduler,
    tokenize,
    train_tokenizer,
)
from fastattr.generators.scratch.refinement import (
    RefinementConfig,
    RefinementLoss,
    is_refined_on,
    refine,
)

STYLES = ("flat style", "inked style", "wavy style")
CAPTIONS = [f"thing {number}, {STYLES[number % 3]}" for number in range(24)] + ["thing 0, inked style", "a plain caption"]
CONFIG = GeneratorConfig(
    channels=(32, 32),
    vocabulary=300,
    max_tokens=12,
    text_width=32,
    text_layers=1,
    training=TrainingConfig(steps=2, batch_size=8),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(CAPTIONS, vocabulary=CONFIG.vocabulary, max_tokens=12, scratch=tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def denoiser(tokenizer) -> DenoiserLoss:
    torch.manual_seed(0)
    unet, text_encoder = build_denoiser(CONFIG, tokenizer=tokenizer, latent_channels=4, latent_side=4)
    return DenoiserLoss(unet, text_encoder, build_scheduler()).eval()


@pytest.fixture
def examples(tokenizer) -> TrainingExamples:
    latents = torch.randn(len(CAPTIONS), 4, 4, 4, generator=torch.Generator().manual_seed(1))
    return TrainingExamples(latents, CAPTIONS, tokenizer, CONFIG, 1000)


@pytest.fixture
def batch(examples) -> tuple[torch.Tensor, ...]:
    rows = np.arange(6)
    noise = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    timesteps = torch.tensor([10, 200, 400, 600, 800, 990])
    return examples.latents[rows], examples.tokens[rows], timesteps, noise, examples.subjects[rows]


def flags(*positions: int) -> torch.Tensor:
    return torch.tensor([position in positions for position in range(6)])


def test_about_half_of_the_prompts_are_refined_on():
    """The other half is what a refined generator is judged by."""
    share = np.mean([is_refined_on(f"subject {number}, noto style") for number in range(4000)])
    assert abs(share - 0.5) < 0.04


def test_without_guided_examples_the_loss_is_that_of_the_first_phase(denoiser, batch):
    *inputs, subjects = batch
    with torch.no_grad():
        loss = RefinementLoss(denoiser, 1.0)(*inputs, subjects, flags(), flags())
        torch.testing.assert_close(loss, denoiser(*inputs))


def test_targets_move_along_what_the_style_adds(denoiser, batch):
    """By hand: of an image, its v plus the difference; of an invented prompt, the first phase's prediction plus it."""
    latents, tokens, timesteps, noise, subjects = batch
    with torch.no_grad():
        noisy, target = denoiser.noisy_and_target(latents, timesteps, noise)
        whole, subject = denoiser.predict(noisy, tokens, timesteps), denoiser.predict(noisy, subjects, timesteps)
        assert (whole - subject).abs().max() > 1e-4  # or nothing below could fail
        expected = target.clone()
        expected[1:4] += 0.7 * (whole - subject)[1:4]
        expected[3] = (whole + 0.7 * (whole - subject))[3]
        loss = RefinementLoss(denoiser, 0.7)(*batch, flags(1, 2, 3), flags(3))
        torch.testing.assert_close(loss, ((whole - expected) ** 2).mean())


def test_the_direction_stays_that_of_the_first_phase(denoiser, batch):
    """A direction that followed the training would be guided by what it has itself made: it could run away."""
    loss_module = RefinementLoss(denoiser, 1.0)
    names = [name for name, _ in loss_module.named_parameters()]
    assert names == [f"denoiser.{name}" for name, _ in denoiser.named_parameters()]  # the frozen copy is not trained
    whole = (flags(*range(6)), flags(*range(6)))
    with torch.no_grad():
        before = loss_module._teacher[0].predict(batch[3], batch[1], batch[2]).clone()
    optimizer = torch.optim.SGD(loss_module.parameters(), lr=1e-2)
    loss_module(*batch, *whole).backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(loss_module._teacher[0].predict(batch[3], batch[1], batch[2]), before, rtol=0, atol=0)
        assert (denoiser.predict(batch[3], batch[1], batch[2]) - before).abs().max() > 0


def refined(denoiser, examples, tokenizer, tmp_path: Path, seen: list | None = None, **settings) -> DenoiserLoss:
    if seen is not None:
        forward = RefinementLoss.forward
        settings["patch"].setattr(RefinementLoss, "forward", lambda self, *batch: seen.append(batch) or forward(self, *batch))
    settings.pop("patch", None)
    return refine(
        denoiser,
        examples,
        RefinementConfig(steps=3, **settings),
        replace(CONFIG.training, steps=1, batch_size=20),
        tokens_of=lambda prompts: tokenize(tokenizer, prompts),
        checkpoint=tmp_path / "checkpoint.safetensors",
        made_from="a test",
        accelerator=Accelerator(),
    )


def test_batches_hold_recombined_prompts_of_the_right_half(denoiser, examples, tokenizer, tmp_path, monkeypatch):
    """Prompts of the other half, or captions, among the invented ones would spoil what the generator is judged by."""
    seen: list = []
    refined(denoiser, examples, tokenizer, tmp_path, seen, patch=monkeypatch, recombined_share=0.4)
    pairs = [(row, recombine(CAPTIONS[row], style)) for row, style in recombinations(CAPTIONS)]
    allowed = {tuple(tokenize(tokenizer, [prompt])[0].tolist()): row for row, prompt in pairs if is_refined_on(prompt)}
    assert 0 < len(allowed) < len(pairs)
    assert len(seen) == 3
    for _, tokens, _, _, subjects, guided, invented in seen:
        assert int(invented.sum()) == 8
        assert guided[invented].all()
        for position in torch.nonzero(invented).ravel().tolist():
            row = allowed[tuple(tokens[position].tolist())]
            assert subjects[position].tolist() == examples.subjects[row].tolist()
        for position in torch.nonzero(~invented).ravel().tolist():
            whole = (
                tokens[position].tolist() in examples.tokens.tolist()
                and tokens[position].tolist() != subjects[position].tolist()
            )
            assert bool(guided[position]) == whole  # dropped captions, and one that has no style, keep their targets


def test_refining_moves_the_weights_and_is_the_same_every_time(denoiser, examples, tokenizer, tmp_path):
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    first = refined(denoiser, examples, tokenizer, tmp_path / "a")
    denoiser.load_state_dict(before)
    second = refined(denoiser, examples, tokenizer, tmp_path / "b")
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[name], rtol=0, atol=0)
    assert any(not torch.equal(value, before[name]) for name, value in first.state_dict().items())


def test_captions_without_styles_are_refused(denoiser, tokenizer, tmp_path):
    examples = TrainingExamples(torch.zeros(2, 4, 4, 4), ["red heart", "blue car"], tokenizer, CONFIG, 1000)
    with pytest.raises(InputError, match="none has a comma"):
        refined(denoiser, examples, tokenizer, tmp_path)


@pytest.mark.parametrize("settings", [{"steps": -1}, {"recombined_share": 1.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        RefinementConfig(**settings)
