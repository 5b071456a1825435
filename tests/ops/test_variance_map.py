"""Maps of variances and largest slopes, against numbers known in closed form and a search."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from polytrope.ops import build_activation
from polytrope.ops.lipschitz import largest_slope
from polytrope.ops.variance_map import variance_map


@pytest.mark.parametrize(
    ("config", "slope"),
    [
        ({"name": "hermite", "degree": 2, "init": "variance_preserving"}, 1.354),
        ({"name": "hermite", "degree": 3, "init": "variance_preserving"}, 1.765),
        ({"name": "hermite", "degree": 2, "init": "stable"}, 0.646),
        ({"name": "chebyshev", "degree": 3, "init": "stable"}, 0.235),
        ("fourier5", -0.309),
        ("polyrelu3", 1.668),
    ],
)
def test_variance_one_is_a_fixed_point_with_the_known_slope(config: Any, slope: float) -> None:
    found = variance_map(build_activation(config))
    assert not found.keeps_all
    (point,) = [entry for entry in found.fixed_points if abs(entry.variance - 1.0) < 1e-6]
    assert point.slope == pytest.approx(slope, abs=5e-4)
    if slope > 1:
        assert point.basin is None
    else:
        assert point.basin is not None
        assert point.basin[0] < 0.8 < 1.2 < point.basin[1]


def test_from_its_basin_the_map_comes_to_the_fixed_point_and_from_outside_it_does_not() -> None:
    coefficients = build_activation({"name": "hermite", "degree": 3, "init": "stable"}).double().coefficients
    a = coefficients.detach().numpy()
    found = variance_map(build_activation({"name": "hermite", "degree": 3, "init": "stable"}))
    (point,) = [entry for entry in found.fixed_points if entry.basin is not None]
    assert point.basin is not None

    def image(q: float) -> float:
        """E[F(√q z)²] from the moments of z."""
        powers = np.polynomial.hermite_e.herme2poly(a / [1, 1, 2, 6]) * q ** (np.arange(4) / 2)
        gaussian = [1, 0, 1, 0, 3, 0, 15]
        return float(sum(powers[i] * powers[j] * gaussian[i + j] for i in range(4) for j in range(4)))

    assert found.images[30] == pytest.approx(image(float(found.variances[30])), rel=1e-9)
    for start, comes in ((point.basin[0], True), (point.basin[1], True), (point.basin[1] * 1.4, False)):
        q = start
        for _ in range(400):
            q = image(q) if q < 1e6 else q
        assert (abs(q - point.variance) < 1e-3) == comes, start


class ScaledRectifier(nn.Module):
    """√2 max(x, 0)."""

    def forward(self, x: Tensor) -> Tensor:
        return math.sqrt(2) * torch.relu(x)


def test_a_scaled_rectifier_keeps_every_variance() -> None:
    found = variance_map(ScaledRectifier())
    assert found.keeps_all
    assert found.fixed_points == []
    assert found.images == pytest.approx(found.variances, rel=1e-12)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ("hermite8", "roots"),
        ("hermite3", "roots"),
        ("hermite2", "roots"),
        ({"name": "chebyshev", "degree": 6, "interval": [-1.5, 2.0]}, "roots"),
        ({"name": "composition", "degree": [3, 5], "domain": [-5.0, 5.0], "gate": True, "init": "gelu"}, "roots"),
        ("gelu", "search"),
        ("piecewise_linear8", "search"),
        ("tropical_rational6", "search"),
    ],
)
def test_the_largest_slope_is_that_of_a_fine_search(config: Any, method: str) -> None:
    activation = build_activation(config).double()
    found = largest_slope(activation, -4.0, 3.0)
    x = torch.linspace(-4, 3, 200_001, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(activation(x).sum(), x)
    largest = float(slopes.abs().max())
    assert found.method == method
    assert found.value == pytest.approx(largest, rel=1e-7)
    assert found.value >= largest * (1 - 1e-12) or method == "search"
    at = torch.tensor([found.at], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(activation(at).sum(), at)
    assert abs(float(slope)) == found.value


def test_the_slope_of_a_polynomial_of_a_high_degree_is_searched() -> None:
    """The time of its 3,373 roots would grow with their cube: 463 take 0.4 s."""
    activation = build_activation({"name": "composition", "degree": [15, 15, 15], "domain": [-5.0, 5.0]}).double()
    with torch.no_grad():
        for number in (1, 2):  # T_3, so that it turns often
            activation.get_parameter(f"polynomial_{number}").copy_(torch.eye(16, dtype=torch.float64)[3])
    found = largest_slope(activation, -4.0, 4.0)
    x = torch.linspace(-4, 4, 100_001, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(activation(x).sum(), x)
    assert found.method == "search"
    assert found.value == pytest.approx(float(slopes.abs().max()), rel=1e-4)


def test_the_largest_slope_of_the_start_of_degree_8_is_known() -> None:
    positive = build_activation({"name": "hermite", "degree": 8, "init": "variance_preserving"})
    assert largest_slope(positive, -4.0, 4.0).value == pytest.approx(20.153, abs=5e-4)


def test_beyond_an_interval_the_largest_slope_is_that_of_its_end() -> None:
    activation = build_activation({"name": "hermite", "degree": 3, "interval": [-1.0, 1.0]}).double()
    end = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(activation(end).sum(), end)
    assert largest_slope(activation, 5.0, 9.0).value == pytest.approx(float(slope), rel=1e-12)
    with pytest.raises(ValueError, match="low < high"):
        largest_slope(activation, 2.0, 2.0)
