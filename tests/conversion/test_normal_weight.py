"""Projection under a normal distribution (AutoReP's fit), and which activations stay as they are (its selection)."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from polytrope.models.calibration import Calibration
from polytrope.models.conversion import FitOptions, fit_layer
from polytrope.models.convert import _dearest, convert
from polytrope.models.surgery import Activation
from polytrope.pipeline.stages.convert.parameters import ConvertParameters


def projected(module: nn.Module, x: torch.Tensor, **options: Any) -> tuple[np.ndarray, float, float]:
    """Coefficients of 1, x, x² of the fit, and mean and deviation of the measured inputs."""
    calibration = Calibration.of(x)
    fit = fit_layer(Activation("a", module), calibration, FitOptions(weight="normal", **options)).fit
    assert "interval" not in fit.config
    built = fit.build(torch.float64)
    points = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    with torch.no_grad():
        below, at, above = built(points).tolist()
    values, counts = calibration.measure()
    mean = float(counts @ values / counts.sum())
    deviation = math.sqrt(float(counts @ (values - mean) ** 2 / counts.sum()))
    return np.array([at, (above - below) / 2, (above + below) / 2 - at]), mean, deviation


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (0.0, math.sqrt(2.0)), (0.4, 1.3)])
def test_a_rectifier_of_degree_2_has_the_coefficients_of_the_closed_form(mean: float, deviation: float) -> None:
    """E[f(μ + s z) h_k(z)]: μ Φ + s φ, s Φ, s φ / √2 with Φ, φ at μ / s."""
    x = mean + deviation * torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    found, measured_mean, measured_deviation = projected(nn.ReLU(), x, degree=2)
    at = measured_mean / measured_deviation
    below = 0.5 * (1 + math.erf(at / math.sqrt(2)))
    density = math.exp(-at * at / 2) / math.sqrt(2 * math.pi)
    c = np.array(
        [
            measured_mean * below + measured_deviation * density,
            measured_deviation * below,
            measured_deviation * density / math.sqrt(2),
        ]
    )
    z = np.polynomial.Polynomial([-measured_mean, 1.0]) / measured_deviation
    expected = (c[0] + c[1] * z + c[2] * (z**2 - 1) / math.sqrt(2)).coef
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    published = {(0.0, 1.0): [0.19947, 0.5, 0.19947], (0.0, math.sqrt(2.0)): [0.28209, 0.5, 0.14105]}
    if (mean, deviation) in published:
        assert found == pytest.approx(published[mean, deviation], abs=5e-3)


def test_options_that_mean_nothing_for_a_projection_are_refused() -> None:
    for options, message in (
        ({"family": "rational"}, "not on family rational"),
        ({"coverage": 0.99}, "coverage is not for weight normal"),
        ({"constraints": ["origin"]}, "constraints is not for weight normal"),
        ({"polynomial_only": True}, "weight is for other conversions"),
    ):
        with pytest.raises(ValidationError, match=message):
            ConvertParameters.model_validate({"weight": "normal", **options})
    with pytest.raises(ValueError, match="weight: expected measured or normal, got 'gaussian'"):
        convert(network(), data(), weight="gaussian")


def network() -> nn.Sequential:
    """Three GELUs, of which the first matters most and the last least; the second is called as a function."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for gain in (3.0, 1.0, 0.2):
        linear = nn.Linear(8, 8)
        with torch.no_grad():
            linear.weight.mul_(gain)
        layers += [linear, nn.GELU() if gain != 1.0 else Functional()]
    return nn.Sequential(*layers)


class Functional(nn.Module):
    """GELU, called as a function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(x)


def data() -> list[torch.Tensor]:
    return [torch.randn(64, 8, generator=torch.Generator().manual_seed(1))]


def test_the_dearest_activations_stay_and_the_more_stay_the_less_the_output_moves() -> None:
    whole = convert(network(), data(), degree=2, weight="normal", rated_samples=64)
    ranked = sorted(whole.activations, key=lambda entry: -(entry.cost or 0.0))
    moved = [whole.difference]
    for keep in (1, 2):
        model = network()
        made = convert(model, data(), degree=2, weight="normal", keep=keep, rated_samples=64)
        stay = {entry.name: entry.reason for entry in made.left if entry.reason.startswith("kept")}
        assert list(stay) == sorted(entry.name for entry in ranked[:keep])
        for entry in ranked[:keep]:
            assert f"{entry.cost:.2e}" in stay[entry.name]
        assert {entry.name for entry in made.activations} == {entry.name for entry in ranked[keep:]}
        moved.append(made.difference)
    assert moved[0] > moved[1] > moved[2] > 0.0


def test_as_few_stay_as_an_output_error_allows() -> None:
    whole = convert(network(), data(), degree=2, rated_samples=64)
    costs = sorted((entry.cost or 0.0 for entry in whole.activations), reverse=True)
    bound = math.hypot(*costs[1:]) * 1.001
    made = convert(network(), data(), degree=2, rated_samples=64, output_error=bound)
    assert len(made.activations) == 2
    everything = convert(network(), data(), degree=2, rated_samples=64, output_error=10.0)
    assert len(everything.activations) == 3
    with pytest.raises(
        ValueError, match=r"output_error: no activation can be converted within 1e-09; `.*` alone moves"
    ):
        convert(network(), data(), degree=2, rated_samples=64, output_error=1e-9)


def test_what_is_kept_may_have_a_name_that_is_no_pattern_of_itself() -> None:
    model = nn.Sequential(OrderedDict({"act[0]": nn.GELU(), "linear": nn.Linear(8, 8), "act[1]": nn.GELU()}))
    made = convert(model, data(), degree=2, keep=1, rated_samples=64)
    names = [entry.name for entry in made.activations], [entry.name for entry in made.left]
    assert names in ((["act[0]"], ["act[1]"]), (["act[1]"], ["act[0]"]))


def test_an_activation_whose_conversion_gives_no_number_is_the_dearest() -> None:
    assert _dearest({"a": 0.2, "b": math.nan, "c": 0.3}, 1, None) == ["b"]
    assert _dearest({"a": 0.2, "b": math.nan, "c": 0.3}, None, 0.25) == ["b", "c"]


def test_what_is_kept_is_as_it_was_functions_too() -> None:
    made = convert(network(), data(), degree=8, keep=2, rated_samples=64)
    (changed,) = made.activations
    assert changed.name == "5"
    assert isinstance(made.model, nn.Sequential)
    assert type(made.model[1]) is nn.GELU
    assert type(made.model[3]) is Functional
    assert not list(made.model[3].children())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 3}, "keep: 3 of 3 activations would stay, so that nothing would be converted"),
        ({"keep": -1}, "keep: expected at least 0"),
        ({"keep": 1, "output_error": 0.1}, "give one of them"),
        ({"keep": 1, "rated_samples": 0}, "rated_samples is 0"),
        ({"output_error": 0.0}, "output_error: expected a number > 0"),
    ],
)
def test_ways_to_keep_activations_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(network(), data(), degree=2, **options)
    if "keep: 3" not in message:
        with pytest.raises(ValidationError):
            ConvertParameters.model_validate(options)
