"""EKFAC: the curvature that shapes the unlearning step.

For a linear layer with inputs a (T rows an example) and output gradients g, the Fisher block is approximated by
Kronecker factors A = E[sum_t a a^T], S = E[sum_t g g^T] whose eigenvectors are kept, and whose eigenvalues are
replaced by lambda = E[(Q_S^T G Q_A)^2], with G = sum_t g a^T the gradient of one example: exact second moments
in the Kronecker eigenbasis. Sources: arXiv:1806.03884 (EKFAC), arXiv:2410.13850 (for diffusion losses).

Files are kronfluence's (activation_eigenvectors, gradient_eigenvectors, lambda_matrix, num_lambda_processed,
each a safetensors file with one tensor a layer; lambda is a sum over examples, shaped (out, in)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastattr.artifacts import atomic_path
from fastattr.errors import ArtifactMismatchError, ArtifactNotFoundError, NonFiniteError

FACTOR_FILES = ("activation_eigenvectors", "gradient_eigenvectors", "lambda_matrix", "num_lambda_processed")


@dataclass(frozen=True)
class Factors:
    """EKFAC factors of several layers, by layer name."""

    activation_eigenvectors: Mapping[str, torch.Tensor]
    """(in, in), columns are eigenvectors of A."""
    gradient_eigenvectors: Mapping[str, torch.Tensor]
    """(out, out), columns are eigenvectors of S."""
    eigenvalues: Mapping[str, torch.Tensor]
    """(out, in), mean squared per-example gradient in the eigenbasis."""
    examples: int
    """Examples that the eigenvalues average over."""

    def precondition(self, gradients: Mapping[str, torch.Tensor], *, damping: float) -> dict[str, torch.Tensor]:
        """Apply (F + damping * mean eigenvalue of the layer)^-1 to gradients.

        Args:
            gradients: (out, in) per layer.
            damping: as a fraction of each layer's mean eigenvalue.

        Returns:
            (out, in) natural gradients, by layer.
        """
        natural = {}
        for name, gradient in gradients.items():
            left, right, eigenvalues = (
                self.gradient_eigenvectors[name],
                self.activation_eigenvectors[name],
                self.eigenvalues[name],
            )
            rotated = left.T @ gradient.to(left.dtype) @ right
            damped = eigenvalues + damping * eigenvalues.mean()
            natural[name] = (left @ (rotated / damped) @ right.T).to(gradient.dtype)
        return natural

    def save(self, folder: Path) -> None:
        """Write kronfluence's factor files."""
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

    @classmethod
    def load(cls, folder: Path, layers: Iterable[str]) -> Factors:
        """Read kronfluence's factor files.

        Raises:
            ArtifactNotFoundError: a file is missing.
            ArtifactMismatchError: they belong to other layers than `layers`.
        """
        contents = {}
        for file in FACTOR_FILES:
            path = folder / f"{file}.safetensors"
            if not path.exists():
                raise ArtifactNotFoundError(f"{path} does not exist; fit the factors again.")
            contents[file] = load_file(path)
        wanted = set(layers)
        if set(contents["lambda_matrix"]) != wanted:
            raise ArtifactMismatchError(
                f"{folder} holds factors of {sorted(contents['lambda_matrix'])[:3]}..., "
                f"expected those of {sorted(wanted)[:3]}... Fit factors for this generator and pattern."
            )
        examples = int(next(iter(contents["num_lambda_processed"].values())).flatten()[0])
        eigenvalues = {name: value.double() / examples for name, value in contents["lambda_matrix"].items()}
        return cls(
            {name: value.double() for name, value in contents["activation_eigenvectors"].items()},
            {name: value.double() for name, value in contents["gradient_eigenvectors"].items()},
            eigenvalues,
            examples,
        )


@contextmanager
def record_layers(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, list[tuple[torch.Tensor, torch.Tensor]]]]:
    """While open, collect (inputs (B, T, in), output gradients (B, T, out)) of every backward pass, by layer name."""
    recorded: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in layers}
    handles = []
    for name, layer in layers.items():

        def forward_hook(_layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor, name: str = name) -> None:
            activations = inputs[0].detach()
            # One hook per forward call, so layers used several times in one graph pair up rightly.
            output.register_hook(lambda gradient: recorded[name].append((_rows(activations), _rows(gradient.detach()))))

        handles.append(layer.register_forward_hook(forward_hook))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """(B, ..., W) -> (B, T, W)."""
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


def example_gradients(recorded: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """(B, out, in) weight gradients of each example of a batch, summed over the layer's calls."""
    total = None
    for activations, gradients in recorded:
        part = torch.einsum("bto,bti->boi", gradients, activations)
        total = part if total is None else total + part
    if total is None:
        raise NonFiniteError("a layer to unlearn took no part in the loss; no gradient reached it.")
    return total


def fit_ekfac(
    layers: Mapping[str, nn.Linear],
    batches: Callable[[], Iterable[torch.Tensor]],
) -> Factors:
    """Fit EKFAC factors on per-example losses.

    Args:
        layers: the linear layers, by name, whose weights require gradients; biases are ignored.
        batches: gives, each time it is called, the same sequence of (B,) losses with their graphs. It is called
            twice: for the covariances, then for the eigenvalues. For the true Fisher the losses must be those of
            targets sampled from the model; with the data's own targets the result is the empirical Fisher.

    Returns:
        Factors in float64.

    Raises:
        NonFiniteError: a covariance or an eigenvalue is NaN or infinite; the layer is named.
    """
    activation = {
        name: torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64) for name, layer in layers.items()
    }
    gradient = {
        name: torch.zeros(layer.out_features, layer.out_features, dtype=torch.float64) for name, layer in layers.items()
    }
    examples = 0
    with record_layers(layers) as recorded:
        for losses in batches():
            losses.sum().backward()
            examples += len(losses)
            for name, calls in recorded.items():
                for inputs, output_gradients in calls:
                    flat_inputs, flat_gradients = inputs.flatten(0, 1), output_gradients.flatten(0, 1)
                    activation[name] += (flat_inputs.T @ flat_inputs).double().cpu()
                    gradient[name] += (flat_gradients.T @ flat_gradients).double().cpu()
                calls.clear()
    activation_vectors = {
        name: _eigenvectors(value / examples, f"inputs of layer {name}") for name, value in activation.items()
    }
    gradient_vectors = {
        name: _eigenvectors(value / examples, f"output gradients of layer {name}") for name, value in gradient.items()
    }
    eigenvalues = {
        name: torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64) for name, layer in layers.items()
    }
    device = {name: layer.weight.device for name, layer in layers.items()}
    left = {name: value.to(device[name], layers[name].weight.dtype) for name, value in gradient_vectors.items()}
    right = {name: value.to(device[name], layers[name].weight.dtype) for name, value in activation_vectors.items()}
    with record_layers(layers) as recorded:
        for losses in batches():
            losses.sum().backward()
            for name, calls in recorded.items():
                # Rotating inputs and output gradients is cheaper than rotating each example's gradient.
                rotated = [(inputs @ right[name], output_gradients @ left[name]) for inputs, output_gradients in calls]
                eigenvalues[name] += example_gradients(rotated).square().sum(dim=0).double().cpu()
                calls.clear()
    for name, value in eigenvalues.items():
        if not torch.isfinite(value).all():
            raise NonFiniteError(f"the EKFAC eigenvalues of layer {name} are not finite; check the losses, or use float32.")
    for layer in layers.values():
        layer.weight.grad = None
    mean = {name: value / examples for name, value in eigenvalues.items()}
    return Factors(activation_vectors, gradient_vectors, mean, examples)


def _eigenvectors(covariance: torch.Tensor, what: str) -> torch.Tensor:
    """(W, W) eigenvectors, as columns, of a symmetric matrix."""
    if not torch.isfinite(covariance).all():
        raise NonFiniteError(f"the covariance of the {what} is not finite; check the losses, or use float32.")
    vectors: torch.Tensor = torch.linalg.eigh(covariance).eigenvectors
    return vectors
