"""EKFAC: the curvature that shapes the unlearning step, and what a backward pass gives each layer.

For a linear layer (or a convolution, as a linear layer on patches) with inputs a (T rows an example) and output gradients g,
the Fisher block is approximated by Kronecker factors A = E[sum_t a a^T], S = E[sum_t g g^T] whose eigenvectors are kept, and
whose eigenvalues are replaced by lambda = E[(Q_S^T G Q_A)^2], with G = sum_t g a^T the gradient of one example: exact second
moments in the Kronecker eigenbasis. From recorded a and g the gradient of each example, or of groups, is had without a
backward pass for each. Sources: arXiv:1806.03884 (EKFAC), arXiv:2410.13850 (for diffusion losses).

Files are kronfluence's (activation_eigenvectors, gradient_eigenvectors, lambda_matrix, num_lambda_processed, each a
safetensors file with one tensor a layer; lambda is a sum over examples, shaped (out, in)).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fastattr.core.errors import ArtifactMismatchError, ArtifactNotFoundError, InputError, NonFiniteError
from fastattr.core.files import atomic_path, read_json, write_json
from fastattr.core.stages import require_same
from fastattr.generators.families import Layer, Layers, weight_shape

logger = logging.getLogger(__name__)


Calls = Sequence[tuple[Tensor, Tensor]]
"""(B, T, in) inputs and (B, T, out) output gradients of one layer, a pair for each call."""


@contextmanager
def record_layers(layers: Layers) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """While open, collect inputs and output gradients (`Calls`) of every backward pass, by layer name.

    The layers' weights are frozen while it is open: a backward pass then goes no further than the layers' outputs, which saves
    a third of the work.
    """
    recorded: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    wanted = {name: layer.weight.requires_grad for name, layer in layers.items()}
    handles = []
    for name, layer in layers.items():

        def forward_hook(layer: Layer, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            if not torch.is_grad_enabled():
                return
            activations = inputs[0].detach()

            def keep(gradient: Tensor) -> None:
                dtype = layer.weight.dtype  # also where the network around the layer has half precision
                recorded[name].append((_input_rows(layer, activations), _output_rows(layer, gradient.detach().to(dtype))))

            output.requires_grad_().register_hook(keep)  # one a call, so layers used several times in a graph pair up rightly

        handles.append(layer.register_forward_hook(forward_hook))
        layer.weight.requires_grad_(False)
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            layer.weight.requires_grad_(wanted[name])


def _input_rows(layer: Layer, inputs: Tensor) -> Tensor:
    """(B, ..., in) -> (B, T, in); for a convolution (B, C, H, W) -> its patches, (B, T, C x kernel)."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise InputError(f"convolutions padded with {layer.padding!r} {layer.padding_mode} are not supported by EKFAC.")
    form = {"dilation": layer.dilation, "padding": layer.padding, "stride": layer.stride}
    return F.unfold(inputs, layer.kernel_size, **form).transpose(1, 2)


def _output_rows(layer: Layer, gradients: Tensor) -> Tensor:
    """(B, ..., out) -> (B, T, out); for a convolution from (B, out, H, W)."""
    of_linear = isinstance(layer, nn.Linear)
    return gradients.reshape(len(gradients), -1, gradients.shape[-1]) if of_linear else gradients.flatten(2).transpose(1, 2)


def joined(calls: Calls, groups: int) -> tuple[Tensor, Tensor]:
    """Inputs (groups, R, in) and output gradients (groups, R, out) of a layer: all rows of all calls of each group.

    Consecutive examples fall into groups of equal size; as many groups as examples keep them apart. NonFiniteError if
    the layer took no part in the loss.
    """
    if not calls:
        raise NonFiniteError("a layer to unlearn took no part in the loss; no gradient reached it.")
    sides = zip(*((part.reshape(groups, -1, part.shape[-1]) for part in call) for call in calls), strict=True)
    inputs, gradients = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in sides)
    return inputs, gradients


def example_gradients(calls: Calls, groups: int | None = None) -> Tensor:
    """(B, out, in) weight gradients of each example, or (groups, out, in) sums over consecutive examples; see `joined`."""
    inputs, gradients = joined(calls, groups or (len(calls[0][0]) if calls else 0))
    return torch.bmm(gradients.transpose(1, 2), inputs)


def rotated_gradients(calls: Calls, groups: int, left: Tensor, right: Tensor) -> Tensor:
    """(groups, o, i) left^T G right, G the weight gradient of a group, for (out, o) and (in, i) directions.

    Rotation is linear: it is done once a group, not once an example, and in the order that multiplies least: of the
    inputs and output gradients where few rows or few directions are wanted, of their product where there are many rows.
    """
    inputs, gradients = joined(calls, groups)
    rows, (inner, few_in), (outer, few_out) = inputs.shape[1], right.shape, left.shape
    costs = {}
    for turn_inputs in (False, True):
        for turn_outputs in (False, True):
            wide_in, wide_out = few_in if turn_inputs else inner, few_out if turn_outputs else outer
            before = rows * (inner * few_in * turn_inputs + outer * few_out * turn_outputs)
            after = few_out * outer * wide_in * (not turn_outputs) + few_out * inner * few_in * (not turn_inputs)
            costs[turn_inputs, turn_outputs] = before + rows * wide_in * wide_out + after
    turn_inputs, turn_outputs = min(costs, key=costs.__getitem__)
    gradients = gradients @ left if turn_outputs else gradients
    total = torch.bmm(gradients.transpose(1, 2), inputs @ right if turn_inputs else inputs)
    total = total if turn_outputs else left.T @ total
    return total if turn_inputs else total @ right


FACTOR_FILES = ("activation_eigenvectors", "gradient_eigenvectors", "lambda_matrix", "num_lambda_processed")
ROUNDING = 1e-12
"""Mean squared gradient, as a part of the largest layer's, below which a layer's gradients are rounding errors of float32."""
MADE_OF = "made_of.json"
"""Fingerprints of the generator and the corpus that factors belong to; beside kronfluence's own files there is none."""


@dataclass(frozen=True)
class Factors:
    """EKFAC factors of several layers, by layer name."""

    activation_eigenvectors: Mapping[str, Tensor]
    """(in, in), columns are eigenvectors of A."""
    gradient_eigenvectors: Mapping[str, Tensor]
    """(out, out), columns are eigenvectors of S."""
    eigenvalues: Mapping[str, Tensor]
    """(out, in), mean squared per-example gradient in the eigenbasis."""
    examples: int
    """Examples that the eigenvalues average over."""

    def precondition(self, gradients: Mapping[str, Tensor], *, damping: float) -> dict[str, Tensor]:
        """(out, in) natural gradients by layer: (F + damping * mean eigenvalue of the layer)^-1 applied to gradients."""
        natural = {}
        for name, gradient in gradients.items():
            sides = (self.gradient_eigenvectors, self.activation_eigenvectors)
            left, right = (vectors[name].to(gradient.device) for vectors in sides)
            rotated = left.T @ gradient.to(left.dtype) @ right
            damped = self.damped(name, damping).to(gradient.device)
            natural[name] = (left @ (rotated / damped) @ right.T).to(gradient.dtype)
        return natural

    def damped(self, name: str, damping: float) -> Tensor:
        """(out, in) eigenvalues of a layer plus `damping` times their mean; infinite for a layer that the loss ignores.

        A layer ahead of a normalisation that takes its whole effect away has rounding errors for gradients. Dividing by their
        curvature would make them as large as any other layer's gradient.
        """
        eigenvalues = self.eigenvalues[name]
        if eigenvalues.mean() <= ROUNDING * max(float(values.mean()) for values in self.eigenvalues.values()):
            return torch.full_like(eigenvalues, torch.inf)
        return eigenvalues + damping * eigenvalues.mean()

    @property
    def fingerprint(self) -> str:
        """Identifies the factors' numbers."""
        digest = hashlib.sha256()
        for tensors in (self.activation_eigenvectors, self.gradient_eigenvectors, self.eigenvalues):
            for name in sorted(tensors):
                digest.update(tensors[name].contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: Path, *, made_of: Mapping[str, str] | None = None) -> None:
        """Write kronfluence's factor files, and `made_of`, fingerprints by name, beside them; that one comes last."""
        folder.mkdir(parents=True, exist_ok=True)
        contents = {
            "activation_eigenvectors": dict(self.activation_eigenvectors),
            "gradient_eigenvectors": dict(self.gradient_eigenvectors),
            "lambda_matrix": {name: value * self.examples for name, value in self.eigenvalues.items()},
            "num_lambda_processed": {name: torch.tensor([self.examples]) for name in self.eigenvalues},
        }
        for file, tensors in contents.items():
            with atomic_path(folder / f"{file}.safetensors") as temporary:
                save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
        write_json(folder / MADE_OF, dict(made_of or {}))

    @classmethod
    def load(cls, folder: Path, layers: Layers, *, made_of: Mapping[str, str] | None = None) -> Factors:
        """Read kronfluence's factor files of these layers.

        `made_of` are fingerprints that those saved beside them must agree with; kronfluence's own have none, which is logged.
        ArtifactNotFoundError if a file is missing, ArtifactMismatchError if they belong to other layers, generator or corpus.
        """
        if (folder / MADE_OF).exists():
            found = read_json(folder / MADE_OF)
            for what, expected in (made_of or {}).items():
                fix = "Fit factors for this one, or point teacher.factors at those of it."
                require_same(f"the {what} of the factors in {folder}", found.get(what), expected, fix)
        elif made_of and folder.exists():
            logger.warning("%s does not say which generator and corpus its factors are of; they are taken as they are", folder)
        paths = {file: folder / f"{file}.safetensors" for file in FACTOR_FILES}
        if missing := [path for path in paths.values() if not path.exists()]:
            raise ArtifactNotFoundError(f"{missing[0]} does not exist; fit the factors again.")
        contents = {file: load_file(path) for file, path in paths.items()}
        found = {name: tuple(value.shape) for name, value in contents["lambda_matrix"].items()}
        wanted = {name: weight_shape(layer) for name, layer in layers.items()}
        if found != wanted:
            different = sorted(set(found.items()) ^ set(wanted.items()))[:4]
            what = f"{folder} holds factors of other layers, or of shapes other than those to unlearn, e.g. {different}"
            raise ArtifactMismatchError(f"{what}. Fit factors for this generator and pattern.")
        examples = int(next(iter(contents["num_lambda_processed"].values())).flatten()[0])
        right, left, sums = ({name: value.double() for name, value in contents[file].items()} for file in FACTOR_FILES[:3])
        return cls(right, left, {name: value / examples for name, value in sums.items()}, examples)


def factor_bytes(layers: Layers) -> int:
    """Memory that fitting takes for sums and factors, all in float64: covariances, eigenvectors and eigenvalues."""
    return factor_sizes([weight_shape(layer) for layer in layers.values()])


def factor_sizes(shapes: Iterable[tuple[int, int]]) -> int:
    """The same for layers of these (out, in) shapes."""
    return sum(8 * (2 * out * out + 2 * inner * inner + out * inner) for out, inner in shapes)


Batches = Callable[[], Iterable[Tensor]]
"""Gives, each time it is called, the same sequence of (B,) losses with their graphs; on several processes each its own part."""


def fit_ekfac(layers: Layers, batches: Batches, *, accelerator: Accelerator | None = None, diagonal: bool = False) -> Factors:
    """Fit EKFAC factors, in float64, on per-example losses.

    `layers` are linear layers and convolutions, by name, whose weights require gradients; biases are ignored. `batches` is
    called twice: for the covariances, then for the eigenvalues. For the true Fisher the losses must be those of targets
    sampled from the model; with the data's own targets the result is the empirical Fisher. `accelerator`: the processes to sum
    over, None is this one alone; all get the same factors. `diagonal` keeps the weights' own basis instead of the Kronecker
    factors' eigenvectors, which makes the curvature the diagonal of the Fisher matrix (AbU, arXiv:2406.09408). NonFiniteError
    names the layer.
    """
    shapes = {name: weight_shape(layer) for name, layer in layers.items()}
    logger.info("EKFAC factors of %d layers take %.1f MB of memory", len(layers), factor_bytes(layers) / 1e6)
    if diagonal:
        left, right = ({name: torch.eye(shape[side]).double() for name, shape in shapes.items()} for side in (0, 1))
    else:
        left, right = _eigenbasis(layers, batches, accelerator)
    eigenvalues = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    examples = 0
    rotations = {name: (left[name].to(layer.weight), right[name].to(layer.weight)) for name, layer in layers.items()}
    with record_layers(layers) as recorded:
        for losses in batches():
            losses.sum().backward()
            examples += len(losses)
            for name, calls in recorded.items():
                gradients = example_gradients(calls) if diagonal else rotated_gradients(calls, len(losses), *rotations[name])
                eigenvalues[name] += gradients.square().sum(dim=0).double().cpu()
                calls.clear()
    total = int(_summed(torch.tensor(float(examples), dtype=torch.float64), accelerator))
    for name in layers:
        eigenvalues[name] = _summed(eigenvalues[name], accelerator) / total
        if not torch.isfinite(eigenvalues[name]).all():
            raise NonFiniteError(f"the EKFAC eigenvalues of layer {name} are not finite; check the losses, or use float32.")
    return Factors(right, left, eigenvalues, total)


def _eigenbasis(
    layers: Layers, batches: Batches, accelerator: Accelerator | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Eigenvectors of the output gradients' and of the inputs' covariances, by layer, the same on all processes."""
    sizes = {name: weight_shape(layer) for name, layer in layers.items()}
    sums = [{name: torch.zeros(size[side], size[side]).double() for name, size in sizes.items()} for side in (0, 1)]
    with record_layers(layers) as recorded:
        for losses in batches():
            losses.sum().backward()
            for name, calls in recorded.items():
                for inputs, output_gradients in calls:
                    for total, rows in zip(sums, (output_gradients.flatten(0, 1), inputs.flatten(0, 1)), strict=True):
                        total[name] += (rows.T @ rows).double().cpu()
                calls.clear()
    left, right = (
        {name: _eigenvectors(_summed(total[name], accelerator), f"{what} of layer {name}", accelerator) for name in layers}
        for total, what in zip(sums, ("output gradients", "inputs"), strict=True)
    )
    return left, right


def _summed(tensor: Tensor, accelerator: Accelerator | None) -> Tensor:
    """The sum over all processes."""
    if accelerator is None or accelerator.num_processes == 1:
        return tensor
    return accelerator.reduce(tensor.to(accelerator.device), reduction="sum").cpu()


def _eigenvectors(covariance: Tensor, what: str, accelerator: Accelerator | None) -> Tensor:
    """(W, W) eigenvectors, as columns, of a symmetric matrix; those of the first process, for signs and order may differ."""
    if not torch.isfinite(covariance).all():
        raise NonFiniteError(f"the covariance of the {what} is not finite; check the losses, or use float32.")
    vectors: Tensor = torch.linalg.eigh(covariance).eigenvectors
    if accelerator is None or accelerator.num_processes == 1:
        return vectors
    return broadcast(vectors.contiguous().to(accelerator.device), from_process=0).cpu()
