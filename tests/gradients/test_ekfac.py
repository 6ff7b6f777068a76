"""EKFAC factors against brute force and against kronfluence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fastattr.core.errors import ArtifactMismatchError, NonFiniteError
from fastattr.generators.generator import Generator
from fastattr.gradients.ekfac import FACTOR_FILES, MADE_OF, Factors, fit_ekfac

T, IN, OUT, N = 3, 5, 4, 40


def problem() -> tuple[nn.ModuleDict, torch.Tensor, torch.Tensor]:
    """Two linear layers on sequences of T positions, inputs (N, T, IN) and targets (N, T, OUT)."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Linear(IN, IN, bias=False), "second": nn.Linear(IN, OUT, bias=False)}).double()
    return model, torch.randn(N, T, IN, dtype=torch.float64), torch.randn(N, T, OUT, dtype=torch.float64)


def losses_of(model: nn.ModuleDict, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    hidden = torch.tanh(model["first"](inputs))
    return (model["second"](hidden) - targets).square().sum(dim=(1, 2))


def fit(batch_size: int = 7) -> tuple[Factors, nn.ModuleDict, torch.Tensor, torch.Tensor]:
    model, inputs, targets = problem()

    def batches():
        for start in range(0, N, batch_size):
            yield losses_of(model, inputs[start : start + batch_size], targets[start : start + batch_size])

    return fit_ekfac({name: model[name] for name in model}, batches), model, inputs, targets


def per_example_gradients(model: nn.ModuleDict, inputs: torch.Tensor, targets: torch.Tensor, name: str) -> torch.Tensor:
    """(N, out, in), one backward pass an example."""
    gradients = []
    for example in range(N):
        model.zero_grad()
        losses_of(model, inputs[[example]], targets[[example]]).sum().backward()
        gradients.append(model[name].weight.grad.clone())
    return torch.stack(gradients)


@pytest.mark.parametrize("name", ["first", "second"])
def test_eigenvalues_equal_second_moments_of_brute_force_gradients(name: str):
    """Summing over positions before or after squaring gives another matrix, and no error."""
    factors, model, inputs, targets = fit()
    gradients = per_example_gradients(model, inputs, targets, name)
    left, right = factors.gradient_eigenvectors[name], factors.activation_eigenvectors[name]
    expected = (left.T @ gradients @ right).square().mean(dim=0)
    torch.testing.assert_close(factors.eigenvalues[name], expected, rtol=1e-9, atol=1e-12)


def test_factors_do_not_depend_on_the_batch_size():
    """A mean instead of a sum over the batch would rescale eigenvalues by its square."""
    one, many = fit(1)[0], fit(16)[0]
    for name in one.eigenvalues:
        torch.testing.assert_close(one.eigenvalues[name], many.eigenvalues[name], rtol=1e-8, atol=1e-12)


def test_precondition_inverts_the_damped_curvature():
    """Applying the damped curvature to the natural gradient must give the gradient back."""
    factors, model, *_ = fit()
    torch.manual_seed(1)
    gradients = {name: torch.randn_like(model[name].weight) for name in model}
    natural = factors.precondition(gradients, damping=0.1)
    for name, gradient in gradients.items():
        left, right, eigenvalues = (
            factors.gradient_eigenvectors[name],
            factors.activation_eigenvectors[name],
            factors.eigenvalues[name],
        )
        damped = eigenvalues + 0.1 * eigenvalues.mean()
        torch.testing.assert_close(left @ ((left.T @ natural[name] @ right) * damped) @ right.T, gradient)


def test_a_layer_used_twice_counts_both_uses():
    """Pairing the second call's inputs with the first call's gradients gives wrong eigenvalues without an error."""
    torch.manual_seed(0)
    layer = nn.Linear(IN, IN, bias=False).double()
    inputs = torch.randn(N, T, IN, dtype=torch.float64)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return layer(torch.tanh(layer(rows))).square().sum(dim=(1, 2))

    factors = fit_ekfac({"layer": layer}, lambda: (loss(inputs[start : start + 8]) for start in range(0, N, 8)))
    gradients = torch.stack([torch.autograd.grad(loss(inputs[[i]]).sum(), layer.weight)[0] for i in range(N)])
    left, right = factors.gradient_eigenvectors["layer"], factors.activation_eigenvectors["layer"]
    torch.testing.assert_close(factors.eigenvalues["layer"], (left.T @ gradients @ right).square().mean(dim=0))


@pytest.mark.parametrize("settings", [{}, {"padding": 1, "stride": 2}, {"padding": 2, "dilation": 2}])
def test_a_convolution_is_a_linear_layer_on_its_patches(settings: dict[str, int]):
    """Another order of channels and kernel positions than the weight's gives eigenvalues of another matrix."""
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, (3, 2), bias=False, **settings).double()
    inputs = torch.randn(N, 2, 7, 6, dtype=torch.float64)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return torch.tanh(layer(rows)).square().sum(dim=(1, 2, 3))

    factors = fit_ekfac({"layer": layer}, lambda: (loss(inputs[start : start + 8]) for start in range(0, N, 8)))
    gradients = torch.stack([torch.autograd.grad(loss(inputs[[i]]).sum(), layer.weight)[0].flatten(1) for i in range(N)])
    left, right = factors.gradient_eigenvectors["layer"], factors.activation_eigenvectors["layer"]
    torch.testing.assert_close(factors.eigenvalues["layer"], (left.T @ gradients @ right).square().mean(dim=0))


def test_diagonal_curvature_divides_by_the_mean_squared_gradient():
    """AbU's curvature, through the same code: a rotation left in would not show in the shape."""
    model, inputs, targets = problem()
    layers = {name: model[name] for name in model}
    factors = fit_ekfac(layers, lambda: iter([losses_of(model, inputs, targets)]), diagonal=True)
    for name in model:
        squares = per_example_gradients(model, inputs, targets, name).square().mean(dim=0)
        torch.testing.assert_close(factors.eigenvalues[name], squares)
        natural = factors.precondition({name: squares}, damping=0.5)[name]
        torch.testing.assert_close(natural, squares / (squares + 0.5 * squares.mean()))


class Line(Generator):
    """A generator whose prediction is linear in two weights, so that its Gauss-Newton matrix is known."""

    def __init__(self) -> None:
        self.weight = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)
        self.design = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def predict(self, latents, conditioning, timesteps, noise):
        return (self.design @ self.weight).reshape(1, 6, 1, 1).expand(len(latents), -1, -1, -1)


def test_true_fisher_is_the_gauss_newton_matrix():
    """The scale of the sampled targets is what makes them equal; 1 instead of D/2 would shrink the curvature."""
    line = Line()
    gauss_newton = 2 / 6 * line.design.T @ line.design
    one = torch.zeros(1, 6, 1, 1, dtype=torch.float64)
    noise = torch.randn(20_000, 6, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # The loss is quadratic in the target's noise, so its gradient is linear in it: one Jacobian gives all gradients.
    slopes = torch.stack(
        [
            torch.autograd.grad(line.sampled_loss(one, one, one, one, row[None]).sum(), line.weight)[0]
            for row in torch.eye(6, dtype=torch.float64).reshape(6, 6, 1, 1)
        ]
    )
    gradients = noise.flatten(1) @ slopes
    torch.testing.assert_close(gradients.T @ gradients / len(noise), gauss_newton, rtol=0.05, atol=0.01)


def test_not_finite_factors_name_the_layer():
    """A NaN in one layer would spread to every score."""
    layer = nn.Linear(2, 2, bias=False)
    bad = torch.tensor([[[1.0, float("nan")]]])
    with pytest.raises(NonFiniteError, match="layer middle"):
        fit_ekfac({"middle": layer}, lambda: iter([layer(bad).square().sum(dim=(1, 2))]))


def test_saved_factors_load_again_for_the_same_layers_only(tmp_path: Path):
    """Factors of another generator's layers would precondition with noise."""
    factors, model, *_ = fit()
    factors.save(tmp_path, made_of={"generator": "g", "corpus": "c"})
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.safetensors" for name in FACTOR_FILES} | {MADE_OF}
    again = Factors.load(tmp_path, model)
    for name in model:
        torch.testing.assert_close(again.eigenvalues[name], factors.eigenvalues[name])
    with pytest.raises(ArtifactMismatchError, match="Fit factors"):
        Factors.load(tmp_path, {"first": model["first"]})
    with pytest.raises(ArtifactMismatchError, match="of shape"):
        Factors.load(tmp_path, {**model, "first": nn.Linear(2, 2)})


def test_factors_of_another_corpus_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """They would precondition plausibly and wrongly; kronfluence's own say nothing of their corpus, and that is logged."""
    factors, model, *_ = fit()
    factors.save(tmp_path, made_of={"generator": "g", "corpus": "c"})
    Factors.load(tmp_path, model, made_of={"generator": "g", "corpus": "c"})
    with pytest.raises(ArtifactMismatchError, match=r"the corpus of the factors .* is 'c', expected 'other'"):
        Factors.load(tmp_path, model, made_of={"generator": "g", "corpus": "other"})
    (tmp_path / MADE_OF).unlink()
    Factors.load(tmp_path, model, made_of={"generator": "g", "corpus": "other"})
    assert "does not say which generator and corpus" in caplog.text


def test_removing_one_example_moves_the_weights_by_one_nth_of_its_natural_gradient():
    """Settles 0.01 / N against eigenvalues / N^2 with 0.01: removal is 1 / N of F^-1 g, so the first is 1% of a removal
    and the second N^2 times as long. Least squares, where the Gauss-Newton matrix and retraining are exact.
    """
    examples, width, outputs = 500, 4, 2
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(examples, width, generator=generator, dtype=torch.float64)
    targets = torch.randn(examples, outputs, generator=generator, dtype=torch.float64)
    layer = nn.Linear(width, outputs, bias=False).double()
    fitted = torch.linalg.lstsq(inputs, targets).solution.T
    with torch.no_grad():
        layer.weight.copy_(fitted)
    # All sign patterns have exactly the second moments of a Gaussian, so this Fisher is the Gauss-Newton matrix.
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) * 2**-0.5

    def sampled():
        for sign in signs:
            outputs_now = layer(inputs)
            yield (outputs_now - (outputs_now.detach() + sign)).square().sum(dim=1)

    factors = fit_ekfac({"layer": layer}, sampled)
    for removed in (3, 77, 400):
        kept = torch.arange(examples) != removed
        retrained = torch.linalg.lstsq(inputs[kept], targets[kept]).solution.T
        layer.weight.grad = None
        (layer(inputs[removed]) - targets[removed]).square().sum().backward()
        natural = factors.precondition({"layer": layer.weight.grad}, damping=1e-9)["layer"]
        torch.testing.assert_close(retrained - fitted, natural / examples, rtol=0.05, atol=1e-5)


def test_factors_agree_with_kronfluence(tmp_path: Path):
    """Kronfluence is the independent reference: same covariances up to eigenvector signs, same eigenvalues."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    model, inputs, targets = problem()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = model["first"], model["second"]

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.second(torch.tanh(self.first(rows)))

    class OurTask(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return (model(batch[0]) - batch[1]).square().sum()

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    import copy

    net = Net()
    ours = fit_ekfac(
        {"first": net.first, "second": net.second},
        lambda: ((net(inputs[s : s + 10]) - targets[s : s + 10]).square().sum(dim=(1, 2)) for s in range(0, N, 10)),
    )
    prepared = prepare_model(copy.deepcopy(net), OurTask())
    analyzer = Analyzer("test", prepared, OurTask(), cpu=True, output_dir=str(tmp_path), disable_tqdm=True)
    dataset = torch.utils.data.TensorDataset(inputs, targets)
    double = {
        f"{name}_dtype": torch.float64
        for name in ("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda", "eigendecomposition")
    }
    arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=True, **double)
    analyzer.fit_all_factors("f", dataset, per_device_batch_size=10, factor_args=arguments, overwrite_output_dir=True)
    theirs = Factors.load(tmp_path / "test" / "factors_f", dict(model))
    for name in ("first", "second"):
        torch.testing.assert_close(ours.eigenvalues[name], theirs.eigenvalues[name], rtol=1e-5, atol=0)
        # Eigenvectors are unique up to sign; natural gradients don't know the sign.
        gradient = {name: torch.randn(ours.eigenvalues[name].shape, dtype=torch.float64)}
        torch.testing.assert_close(
            ours.precondition(gradient, damping=0.1)[name],
            theirs.precondition(gradient, damping=0.1)[name],
            rtol=1e-5,
            atol=0,
        )
