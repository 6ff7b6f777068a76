"""One training loop for the networks that we train ourselves: resumable, with averaged weights, on any number of processes.

A network to train is an `nn.Module` whose forward returns its loss. Batches and random draws are functions of the step number
alone, so a run that was killed and resumed sees exactly what an uninterrupted run sees.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from fastattr.core.errors import ArtifactMismatchError, InputError, NonFiniteError
from fastattr.core.files import atomic_path
from fastattr.core.settings import at_least
from fastattr.core.stages import fingerprint


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of one training run: linear warm-up, then cosine decay to zero unless the stage has another schedule."""

    steps: int  # optimiser steps in all
    batch_size: int  # examples a step, over all processes together
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 200
    ema_decay: float = 0.999  # decay of the exponential moving average whose weights are kept
    max_grad_norm: float = 1.0
    checkpoint_every: int = 500  # steps between checkpoints; a killed run loses at most these
    seed: int = 0
    optimizer: Literal["adamw", "muon"] = "adamw"  # 'muon' is for matrices, with AdamW for the rest
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # bfloat16 pays on GPUs and on CPUs with AVX512-BF16 or AMX

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch_size", "checkpoint_every")
        if not (self.learning_rate > 0 and self.max_grad_norm > 0 and 0 <= self.ema_decay < 1):
            raise InputError("learning_rate and max_grad_norm must be positive, and ema_decay in [0, 1)")


def batch_rows(step: int, *, examples: int, batch_size: int, seed: int) -> np.ndarray:
    """(batch_size,) rows of step `step`: consecutive slices of one random permutation per epoch."""
    start = step * batch_size
    rows: list[int] = []
    while len(rows) < batch_size:
        epoch, offset = divmod(start + len(rows), examples)
        order = np.random.default_rng([seed, epoch]).permutation(examples)
        rows.extend(order[offset : offset + batch_size - len(rows)])
    return np.array(rows, dtype=np.int64)


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Linear warm-up to the peak, then half a cosine to zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def trapezoid(decay_share: float) -> Callable[[int, TrainingConfig], float]:
    """A schedule: linear warm-up, the peak, then linearly to zero over the last `decay_share` of all steps. A run can be made
    longer from any checkpoint before the decay, unlike with a cosine. Source: arXiv:2405.18392.
    """

    def rate(step: int, config: TrainingConfig) -> float:
        left = (config.steps - step) / max(1.0, decay_share * config.steps)
        return config.learning_rate * max(0.0, min(1.0, (step + 1) / max(1, config.warmup_steps), left))

    return rate


@dataclass(frozen=True)
class EarlyStopping:
    """Keep the averaged weights that are best by some judgement, and stop once they have not improved for a while."""

    judge: Callable[[nn.Module], float]  # of the averaged weights, higher = better; the same on every process
    every: int  # steps between judgements
    patience: int  # judgements without improvement after which to stop


@dataclass
class _State:
    """What a checkpoint keeps of a run, with the best averaged weights so far."""

    config: TrainingConfig
    made_from: object
    model: nn.Module
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    best: float = -math.inf
    waited: int = 0  # judgements since the best
    weights: dict[str, torch.Tensor] = field(default_factory=dict)  # the best; empty before the first judgement

    def judge(self, stopping: EarlyStopping) -> None:
        """Note the averaged weights if they are the best so far."""
        average = self.average.module
        training = average.training
        value = stopping.judge(average.eval())
        average.train(training)
        self.waited += 1
        if value > self.best:
            self.best, self.waited = value, 0
            self.weights = {name: tensor.detach().clone() for name, tensor in average.state_dict().items()}

    def identity(self) -> str:
        """What a checkpoint must agree in; the number of steps is looked at apart."""
        return fingerprint([{**vars(self.config), "steps": None, "checkpoint_every": None}, self.made_from])

    def save(self, path: Path, step: int) -> None:
        """Write a checkpoint from which a run goes on at `step`."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
        tensors |= {f"best.{name}": value for name, value in self.weights.items()}
        metadata = {"step": str(step), "config": json.dumps(vars(self.config)), "fingerprint": self.identity()}
        metadata |= {"best": str(self.best), "waited": str(self.waited)}
        with atomic_path(path) as temporary:
            save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, temporary, metadata)

    def load(self, path: Path, schedule: Callable[[int, TrainingConfig], float]) -> int:
        """Restore everything and return the step to go on from; 0 without a checkpoint."""
        if not path.exists():
            return 0
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        step = int(metadata["step"])
        same = metadata["fingerprint"] == self.identity()
        before = TrainingConfig(**json.loads(metadata["config"])) if same else self.config
        if not same or any(schedule(past, before) != schedule(past, self.config) for past in range(step)):
            wanted = json.dumps(vars(self.config))
            raise ArtifactMismatchError(
                f"{path} was written with {metadata['config']}, now {wanted} is wanted, or its inputs differ. "
                "Delete it to start afresh, or run with the old settings."
            )
        parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "average": {}, "optimizer": {}, "best": {}}
        for name, value in load_file(path).items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        self.model.load_state_dict(parts["model"])
        self.average.load_state_dict(parts["average"])
        self.best, self.waited = float(metadata.get("best", "-inf")), int(metadata.get("waited", "0"))
        self.weights = parts["best"]
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in parts["optimizer"].items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        return step


def fit(
    loss_module: nn.Module,
    batch_of: Callable[[np.ndarray, torch.Generator], tuple[torch.Tensor, ...]],
    config: TrainingConfig,
    *,
    examples: int,
    checkpoint: Path,
    made_from: object = None,
    accelerator: Accelerator | None = None,
    schedule: Callable[[int, TrainingConfig], float] = learning_rate_at,
    stopping: EarlyStopping | None = None,
    description: str = "train",
) -> nn.Module:
    """Train `loss_module` in place and return a copy that holds the averaged weights.

    Args:
        loss_module: forward(*batch) -> scalar mean loss over the batch.
        batch_of: (rows, generator) -> the batch's tensors; takes all randomness from the generator.
        examples: number of training examples that `rows` index.
        checkpoint: safetensors file to resume from and write to; removed by the caller once the result is saved.
        made_from: whatever else determines the run (the stage's config and input fingerprints, JSON-able); a checkpoint
            of anything else is refused, except one with another number of steps that had the same learning rates.
        accelerator: device, precision and processes; made from `config` if not given.
        stopping: judge the averaged weights now and then, and return the best of them; None returns the last.

    Raises:
        ArtifactMismatchError, NonFiniteError: the checkpoint belongs to other settings; the loss became NaN or infinite.
    """
    accelerator = accelerator or Accelerator(mixed_precision=config.mixed_precision)
    if config.batch_size % accelerator.num_processes:
        raise InputError(f"batch_size {config.batch_size} does not divide over {accelerator.num_processes} processes")
    optimizer = _optimizer(loss_module, config)
    average = AveragedModel(loss_module, multi_avg_fn=_moving_average(config.ema_decay)).to(accelerator.device)
    state = _State(config, made_from, loss_module, average, optimizer)
    start = state.load(checkpoint, schedule)
    model, optimizer = accelerator.prepare(loss_module, optimizer)
    model.train()
    per_process = config.batch_size // accelerator.num_processes
    steps, quiet = range(start, config.steps), not accelerator.is_main_process
    bar = tqdm(steps, initial=start, total=config.steps, desc=description, disable=quiet)
    running = math.nan
    for step in bar:
        if stopping and state.waited >= stopping.patience:
            break
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, config)
        rows = batch_rows(step, examples=examples, batch_size=config.batch_size, seed=config.seed)
        mine = rows[accelerator.process_index * per_process :][:per_process]
        seed = np.random.SeedSequence([config.seed, step, accelerator.process_index]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        batch = [tensor.to(accelerator.device) for tensor in batch_of(mine, generator)]
        with accelerator.autocast():
            loss = model(*batch)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        value = float(loss.detach())
        # Before the step, so that no weight or checkpoint takes it. fp16's scaler meets infinite gradients and skips them.
        if not math.isfinite(value) or (accelerator.mixed_precision != "fp16" and not math.isfinite(float(norm))):
            bad = f"{description}: loss is {value}, gradient norm {float(norm)} at step {step}"
            raise NonFiniteError(f"{bad}; lower the learning rate and resume.")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update_parameters(accelerator.unwrap_model(model))
        running = value if math.isnan(running) else 0.98 * running + 0.02 * value
        if step % 20 == 0:
            bar.set_postfix(loss=f"{running:.4f}", refresh=False)
        if stopping and ((step + 1) % stopping.every == 0 or step + 1 == config.steps):
            state.judge(stopping)
            bar.set_postfix(loss=f"{running:.4f}", best=f"{state.best:.4f}", refresh=False)
        if (step + 1) % config.checkpoint_every == 0 and accelerator.is_main_process:
            state.save(checkpoint, step + 1)
    accelerator.wait_for_everyone()
    if state.weights:
        average.module.load_state_dict(state.weights)
    return average.module.eval()


def _optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Of the weights that are not frozen."""
    if config.optimizer == "muon":
        return Muon(module, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True)


def _moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """Exponential moving average whose decay rises from 0.1 to `decay`, so that the untrained start is soon forgotten."""

    @torch.no_grad()
    def update(averages: Any, currents: Any, count: Any) -> None:
        now = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(list(averages), list(currents), 1 - now)

    return update


class Muon(torch.optim.Optimizer):
    """Muon for matrices and convolutions of `module`, AdamW for embeddings, biases and norms; frozen weights stay.

    Momentum is made orthogonal before each step. Source: Keller Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the
    step's size follows arXiv:2502.16982, so that learning rates and weight decay are those of AdamW.
    """

    def __init__(self, module: nn.Module, *, learning_rate: float, weight_decay: float) -> None:
        looked_up = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.ndim >= 2 and id(parameter) not in looked_up]
        chosen = {id(parameter) for parameter in matrices}
        others = [parameter for parameter in trained if id(parameter) not in chosen]
        groups = [{"params": matrices, "matrices": True}, {"params": others, "matrices": False}]
        super().__init__([group for group in groups if group["params"]], {"lr": learning_rate, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step along the gradients; `closure` is not used."""
        for group in self.param_groups:
            direction_of = _muon if group["matrices"] else _adam
            for parameter in (each for each in group["params"] if each.grad is not None):
                direction = direction_of(parameter, self.state[parameter])
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])


def _muon(parameter: torch.Tensor, state: dict[str, torch.Tensor], momentum: float = 0.95) -> torch.Tensor:
    """Nesterov momentum made orthogonal, with the root mean square of an AdamW step."""
    if not state:
        state["momentum"] = torch.zeros_like(parameter)
    state["momentum"].lerp_(parameter.grad, 1 - momentum)  # type: ignore[arg-type]
    matrix = parameter.grad.lerp(state["momentum"], momentum).flatten(1)  # type: ignore[union-attr]
    return orthogonal(matrix).mul_(0.2 * max(matrix.shape) ** 0.5).view(parameter.shape)


def _adam(parameter: torch.Tensor, state: dict[str, torch.Tensor], betas: tuple[float, float] = (0.9, 0.99)) -> torch.Tensor:
    """AdamW's direction."""
    if not state:
        state["step"] = torch.zeros(())
        state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    state["step"] += 1
    state["mean"].lerp_(parameter.grad, 1 - betas[0])  # type: ignore[arg-type]
    state["square"].lerp_(parameter.grad.square(), 1 - betas[1])  # type: ignore[union-attr]
    mean_share, square_share = (1 - beta ** float(state["step"]) for beta in betas)
    return state["mean"] / mean_share / ((state["square"] / square_share).sqrt() + 1e-8)


def orthogonal(matrix: torch.Tensor, *, iterations: int = 5) -> torch.Tensor:
    """(R, C) matrix with the same singular vectors and singular values near 1, by Newton-Schulz iterations in bfloat16."""
    wide = matrix.bfloat16() if matrix.shape[0] <= matrix.shape[1] else matrix.T.bfloat16()
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(iterations):
        product = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * product + 2.0315 * product @ product) @ wide
    return (wide if matrix.shape[0] <= matrix.shape[1] else wide.T).to(matrix.dtype).contiguous()
