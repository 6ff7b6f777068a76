"""fastattr/core/training.py: a resumed run is the uninterrupted run, and bad numbers stop it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastattr.core.errors import ArtifactMismatchError, InputError, NonFiniteError
from fastattr.core.training import TrainingConfig, batch_rows, fit, learning_rate_at, trapezoid

CONFIG = TrainingConfig(steps=10, batch_size=4, learning_rate=1e-2, warmup_steps=2, ema_decay=0.8, checkpoint_every=3, seed=5)
EXAMPLES = 14


class Regression(nn.Module):
    """A small network whose forward returns its loss, as `fit` wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 1))

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (self.layers(inputs).squeeze(1) - targets).square().mean()


class Batches:
    """Gives batches with noise from the generator, and stops the run at a chosen step, as a killed process would."""

    def __init__(self, *, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.rows: list[list[int]] = []

    def __call__(self, rows: np.ndarray, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        if len(self.rows) == self.stop_at:
            raise KeyboardInterrupt
        self.rows.append(rows.tolist())
        inputs = torch.tensor(np.random.default_rng(0).normal(size=(EXAMPLES, 3))[rows], dtype=torch.float32)
        return inputs + 0.1 * torch.randn(inputs.shape, generator=generator), inputs.sum(dim=1)


def train(checkpoint: Path, batches: Batches | None = None, config: TrainingConfig = CONFIG, module: nn.Module | None = None):
    return fit(module or Regression(), batches or Batches(), config, examples=EXAMPLES, checkpoint=checkpoint)


@pytest.mark.parametrize("stop_at", [4, 6, 8])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, stop_at):
    """A forgotten optimiser state, average or draw would give a slightly worse network and no error."""
    whole_batches, resumed_batches = Batches(), Batches()
    module, again = Regression(), Regression()
    whole = train(tmp_path / "whole.safetensors", whole_batches, module=module)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed.safetensors", Batches(stop_at=stop_at))
    resumed = train(tmp_path / "killed.safetensors", resumed_batches, module=again)
    start = stop_at // CONFIG.checkpoint_every * CONFIG.checkpoint_every
    assert resumed_batches.rows == whole_batches.rows[start:]
    for one, other in ((whole, resumed), (module, again)):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_are_not(tmp_path):
    """A draw outside the seed would make every number in the README irreproducible."""
    first = train(tmp_path / "a")
    again = train(tmp_path / "b")
    other = train(tmp_path / "c", config=replace(CONFIG, seed=6))
    assert torch.equal(first.layers[0].weight, again.layers[0].weight)
    assert not torch.equal(first.layers[0].weight, other.layers[0].weight)


def test_the_result_is_the_average_of_the_weights(tmp_path):
    """Returning the last weights instead would cost quality, and nothing would show it."""
    seen: list[torch.Tensor] = []
    module = Regression()

    class Recording(Batches):
        def __call__(self, rows, generator):
            seen.append(module.layers[0].weight.detach().clone())
            return super().__call__(rows, generator)

    config = replace(CONFIG, ema_decay=0.4)  # reached in mid-run, so that both the rise and the plateau count
    result = train(tmp_path / "a", Recording(), config, module)
    after_each_step = [*seen[1:], module.layers[0].weight.detach()]
    average = after_each_step[0]
    for count, weight in enumerate(after_each_step[1:], start=1):
        decay = min(config.ema_decay, (1 + count) / (10 + count))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(result.layers[0].weight.detach(), average, rtol=1e-5, atol=1e-7)
    assert not torch.equal(result.layers[0].weight, module.layers[0].weight)


def test_training_lowers_the_loss(tmp_path):
    """A step in the wrong direction passes every test of resuming."""
    module = Regression()
    batch = Batches()(np.arange(EXAMPLES), torch.Generator().manual_seed(0))
    before = float(module(*batch).detach())
    train(tmp_path / "a", config=replace(CONFIG, steps=200, ema_decay=0.9, checkpoint_every=1000), module=module)
    assert float(module(*batch).detach()) < before / 4


@pytest.mark.parametrize("change", [{"learning_rate": 2e-2}, {"steps": 20}, {"seed": 6}, {"batch_size": 2}])
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, change):
    """Going on with other settings would save a network that its manifest describes wrongly."""
    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint, Batches(stop_at=7))
    before = checkpoint.read_bytes()
    with pytest.raises(ArtifactMismatchError, match="Delete it to start afresh"):
        train(checkpoint, config=replace(CONFIG, **change))
    assert checkpoint.read_bytes() == before


def test_a_run_made_longer_before_its_decay_equals_a_long_run(tmp_path):
    """With a trapezoid a run can go on where the first plan would have ended; the learning rates must be the long run's."""
    schedule = trapezoid(0.4)
    settings = {"examples": EXAMPLES, "schedule": schedule}
    longer = replace(CONFIG, steps=20)
    whole = fit(Regression(), Batches(), longer, checkpoint=tmp_path / "whole.safetensors", **settings)
    with pytest.raises(KeyboardInterrupt):
        fit(Regression(), Batches(stop_at=7), CONFIG, checkpoint=tmp_path / "short.safetensors", **settings)
    extended = fit(Regression(), Batches(), longer, checkpoint=tmp_path / "short.safetensors", **settings)
    assert all(torch.equal(value, extended.state_dict()[name]) for name, value in whole.state_dict().items())
    with pytest.raises(KeyboardInterrupt):
        fit(Regression(), Batches(stop_at=9), CONFIG, checkpoint=tmp_path / "decayed.safetensors", **settings)
    with pytest.raises(ArtifactMismatchError):
        fit(Regression(), Batches(), longer, checkpoint=tmp_path / "decayed.safetensors", **settings)


class Breaking(Regression):
    """Loses its loss, or only its gradient, at the fourth step."""

    def __init__(self, breaks: str) -> None:
        super().__init__()
        self.breaks = breaks
        self.calls = 0

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        loss = super().forward(inputs, targets)
        if self.calls != 4:
            return loss
        if self.breaks == "loss":
            return loss * float("nan")
        return loss + (self.layers[0].weight * 0).abs().sqrt().sum()  # adds 0, but the root's slope at 0 is infinite


@pytest.mark.parametrize("breaks", ["loss", "gradient"])
def test_nan_raises_and_never_reaches_weights_or_checkpoint(tmp_path, breaks):
    """Weights that are NaN stay NaN: a run that resumes from them is lost, however low its learning rate."""
    module = Breaking(breaks)
    with pytest.raises(NonFiniteError, match="step 3"):
        train(tmp_path / "a.safetensors", config=replace(CONFIG, checkpoint_every=1), module=module)
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
    resumed = train(tmp_path / "a.safetensors", config=replace(CONFIG, checkpoint_every=1))
    assert all(torch.isfinite(value).all() for value in resumed.state_dict().values())


@pytest.mark.parametrize(("examples", "batch_size"), [(12, 4), (14, 4), (7, 7), (5, 8), (3, 10), (1, 2)])
def test_batch_rows_covers_each_epoch_exactly_once(examples, batch_size):
    """Rows skipped at an epoch's end are never trained on, and attribution to them would mean nothing."""
    epochs = 6
    steps = -(-epochs * examples // batch_size)
    rows = np.concatenate([batch_rows(step, examples=examples, batch_size=batch_size, seed=3) for step in range(steps)])
    assert len(rows) == steps * batch_size
    by_epoch = rows[: epochs * examples].reshape(epochs, examples)
    np.testing.assert_array_equal(np.sort(by_epoch, axis=1), np.tile(np.arange(examples), (epochs, 1)))


def test_batch_rows_shuffles_each_epoch_anew_and_by_seed():
    """The same order in every epoch, or one order for all seeds, would make repeated runs no repetition."""
    first, second = (batch_rows(step, examples=50, batch_size=50, seed=0) for step in (0, 1))
    other = batch_rows(0, examples=50, batch_size=50, seed=1)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(first, batch_rows(0, examples=50, batch_size=50, seed=0))


def test_learning_rate_rises_to_the_peak_and_falls_to_zero():
    """A warm-up that starts at zero wastes a step; a decay that misses zero leaves the last steps noisy."""
    config = TrainingConfig(steps=100, batch_size=1, learning_rate=0.5, warmup_steps=10)
    rates = np.array([learning_rate_at(step, config) for step in range(101)])
    assert rates[0] == pytest.approx(0.05)
    assert rates.argmax() in {9, 10}
    assert rates.max() == 0.5
    assert rates[55] == pytest.approx(0.25)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert (np.diff(rates[10:]) < 0).all()


@pytest.mark.parametrize("name", ["steps", "batch_size", "checkpoint_every"])
def test_a_config_without_steps_is_refused(name):
    """Zero steps would save an untrained network as the result."""
    with pytest.raises(InputError, match=name):
        replace(CONFIG, **{name: 0})
