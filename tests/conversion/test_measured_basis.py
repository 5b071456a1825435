"""Polynomials in the basis that is orthonormal on a layer's measured inputs: `basis: measured`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.polynomial import hermite_e
from pydantic import ValidationError
from torch import nn

from polytrope.models.calibration import Calibration
from polytrope.models.conversion import FitOptions, fit_layer
from polytrope.models.convert import Conversion, convert
from polytrope.models.formats.onnx import save_onnx
from polytrope.models.formats.plain import PlainActivation
from polytrope.models.surgery import Activation
from polytrope.ops import functional
from polytrope.ops.fitting.measured_basis import in_measured_basis, recurrence_of
from polytrope.ops.initialization import to_powers
from polytrope.ops.interpolate import Fit, fit
from polytrope.pipeline.stages.convert.parameters import ConvertParameters


def two_bumps(count: int = 20_000) -> np.ndarray:
    generator = np.random.default_rng(0)
    left, right = generator.normal(-2.0, 0.3, count // 5), generator.normal(1.0, 0.5, count - count // 5)
    return generator.permutation(np.concatenate([left, right]))


def measure(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    counts, edges = np.histogram(inputs, 1024)
    filled = counts > 0
    return ((edges[1:] + edges[:-1]) / 2)[filled], counts[filled] / counts.sum()


def layer(inputs: np.ndarray, module: nn.Module | None = None, **options: Any) -> Fit:
    calibration = Calibration.of(torch.from_numpy(inputs).float())
    return fit_layer(Activation("a", module or nn.GELU()), calibration, FitOptions(**options)).fit


def inside(found: Fit, points: np.ndarray) -> np.ndarray:
    low, high = found.config.get("interval") or (-math.inf, math.inf)
    return (points >= low) & (points <= high)


def test_under_the_normal_distribution_the_basis_is_that_of_hermite() -> None:
    points, weights = hermite_e.hermegauss(60)
    found = recurrence_of(points, weights / weights.sum(), 8)
    assert np.abs(found.gammas).max() <= 1e-14
    assert np.abs(found.betas - np.arange(1, 9)).max() <= 1e-14


@pytest.mark.parametrize("degree", [8, 16])
def test_the_gram_matrix_on_two_bumps_is_the_identity(degree: int) -> None:
    points, weights = measure(two_bumps())
    values = recurrence_of(points, weights, degree).evaluate(points)
    gram = values.T @ (weights[:, None] * values)
    assert np.abs(gram - np.eye(degree + 1)).max() <= 1e-14 * (1 if degree == 8 else 10)
    assert np.linalg.cond(gram) == pytest.approx(1.0, abs=1e-12)
    roots = np.sqrt([math.factorial(k) for k in range(9)])
    hermite = hermite_e.hermevander(points, 8) / roots
    assert np.linalg.cond(hermite.T @ (weights[:, None] * hermite)) > 3000


def test_the_numbers_are_those_of_the_kernel() -> None:
    points, weights = measure(two_bumps())
    found = recurrence_of(points, weights, 8)
    coefficients = np.random.default_rng(1).normal(size=9)
    parts = [torch.from_numpy(part) for part in (points, coefficients, *found.parameters().values())]
    expected = found.evaluate(points) @ coefficients
    assert np.abs(functional.favard(*parts).numpy() - expected).max() <= 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize("family", ["hermite", "chebyshev", "legendre"])
@pytest.mark.parametrize(("interval", "variable"), [(None, None), ((-2.5, 2.0), (-0.25, 2.25))])
def test_the_polynomial_stays_the_same(
    family: str, interval: tuple[float, float] | None, variable: tuple[float, float] | None
) -> None:
    points, weights = measure(two_bumps())
    coefficients = np.random.default_rng(2).normal(size=7)
    found = in_measured_basis(coefficients, family, (points, weights), interval, variable, torch.float64)
    shift, scale = variable or (0.0, 1.0)
    u = (np.linspace(-3.0, 3.0, 101) - shift) / scale
    expected = np.polynomial.polynomial.polyval(u, coefficients @ to_powers(family, 6))
    values = functional.favard(torch.from_numpy(u), *(torch.from_numpy(part) for part in found.values())).numpy()
    assert np.abs(values - expected).max() <= 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", ["measured", "normal"])
def test_a_fitted_layer_computes_the_same_in_either_basis(dtype: torch.dtype, weight: str) -> None:
    inputs = torch.from_numpy(two_bumps()).to(dtype)
    activation, calibration = Activation("a", nn.GELU()), Calibration.of(inputs)
    options: dict[str, Any] = {"degree": 4, "weight": weight}
    plain = fit_layer(activation, calibration, FitOptions(**options)).fit
    found = fit_layer(activation, calibration, FitOptions(**options, basis="measured")).fit
    assert found.config == plain.config | {"learnable_recurrence": True}
    with torch.no_grad():
        off = (found.build()(inputs) - plain.build()(inputs)).double().abs().max()
    assert float(off) <= 16 * torch.finfo(dtype).eps * float(inputs.abs().max())
    if dtype == torch.float32:
        assert found.certificate.rms == pytest.approx(plain.certificate.rms, rel=1e-5)
    else:  # coefficients of three digits are others in another basis
        assert found.certificate.rms <= 2 * plain.certificate.rms


def test_the_mean_square_is_the_sum_of_squares_and_gradients_are_uncorrelated() -> None:
    inputs = two_bumps()
    found = layer(inputs, degree=8, basis="measured")
    points, counts = Calibration.of(torch.from_numpy(inputs).float()).measure()
    chosen = inside(found, points)
    assert 0.9 < counts[chosen].sum() / counts.sum() < 1.0
    weights = torch.from_numpy(counts[chosen] / counts[chosen].sum())
    module = found.build().double()
    x = torch.from_numpy(points[chosen])
    mean_square = float(weights @ module(x).detach() ** 2)
    assert mean_square == pytest.approx(float((found.parameters["coefficients"] ** 2).sum()), rel=1e-6)

    def function(coefficients: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = torch.func.functional_call(module, {"coefficients": coefficients}, (x,))
        return values

    jacobian = torch.autograd.functional.jacobian(function, module.coefficients.detach())
    gram = jacobian.T @ (weights[:, None] * jacobian)
    assert float((gram - torch.eye(9)).abs().max()) <= 1e-4  # the recurrence is of float32


def test_constraints_hold_and_degrees_are_searched_as_before() -> None:
    found = layer(two_bumps(), degree=6, constraints=("origin", "ends"), basis="measured")
    low, high = found.config["interval"]
    ends = torch.tensor([0.0, low, high])
    assert torch.allclose(found.build()(ends), nn.functional.gelu(ends), atol=1e-5)
    plain, same = (
        layer(two_bumps(), family="legendre", degree=16, target_error=0.01, basis=name)
        for name in ("family", "measured")
    )
    assert same.config == plain.config | {"learnable_recurrence": True}
    # Inputs that no higher degree fits better: the terms above are 0, in this basis too.
    straight = layer(two_bumps(), nn.ReLU(), degree=8, basis="measured")
    assert len(straight.parameters["coefficients"]) == straight.config["degree"] + 1 == 9


def test_channels_with_slopes_of_their_own_share_the_basis() -> None:
    module = nn.PReLU(3)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([0.1, 0.5, 0.1]))
    inputs = torch.from_numpy(two_bumps(3000)).float().reshape(-1, 3)
    calibration, activation = Calibration.of(inputs), Activation("a", module)
    plain, found = (
        fit_layer(activation, calibration, FitOptions(degree=5, basis=basis)).fit for basis in ("family", "measured")
    )
    assert found.parameters["scales"].shape == (3, 5)
    assert (found.parameters["scales"] == found.parameters["scales"][0]).all()
    assert torch.allclose(found.build()(inputs), plain.build()(inputs), atol=1e-5)


def test_a_converted_model_survives_saving_and_plain_operations(tmp_path: Path) -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4))

    data = [torch.randn(256, 4, generator=torch.Generator().manual_seed(1))]
    done = convert(network(), data, degree=6, basis="measured")
    as_fitted = convert(network(), data, degree=6)
    with torch.no_grad():
        expected = done.model(data[0])
        assert torch.allclose(expected, as_fitted.model(data[0]), atol=1e-5)
        done.save(tmp_path / "converted")
        loaded = Conversion.load(tmp_path / "converted", network())
        assert torch.equal(loaded.model(data[0]), expected)
        module = done.model.get_submodule("1")
        x = torch.linspace(-9.0, 9.0, 200)
        assert torch.allclose(PlainActivation(module)(x), module(x), rtol=1e-4, atol=1e-5)
        assert save_onnx(tmp_path / "model.onnx", done.model, [data[0]]).deviation <= 1e-4


def test_too_few_different_inputs_are_refused_by_the_layers_name() -> None:
    inputs = np.repeat([-1.0, -0.5, 0.0, 0.5, 1.0], 100)
    with pytest.raises(ValueError, match=r"activation `a`: basis: \d different inputs, and .* take a lower degree"):
        layer(inputs, degree=8, basis="measured")
    near = 1.0 + 1e-15 * np.arange(6)
    with pytest.raises(ValueError, match="basis: the inputs lie at 6 points that rounding hardly tells apart"):
        recurrence_of(near, np.full(6, 1 / 6), 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"family": "rational"}, "basis measured is of polynomials, and family is rational"),
        ({"family": "auto", "target_error": 0.01}, "basis measured is of polynomials, and family is auto"),
        ({"polynomial_only": True}, "basis is for other conversions; leave it out"),
        ({"drop_blocks": {"count": 1}}, "basis is for new activations"),
    ],
)
def test_what_is_no_polynomial_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ConvertParameters(**given, basis="measured")
    with pytest.raises(ValueError, match=message):
        convert(nn.Sequential(nn.Linear(2, 2), nn.GELU()), [torch.ones(4, 2)], **given, basis="measured")
    with pytest.raises(ValueError, match="basis: orthonormal on inputs are polynomials"):
        fit("gelu", "rational", 5, basis=(np.linspace(-1, 1, 50), np.ones(50)))
