"""Polynomials in a scaled variable: what they compute, what fits make of it, and that they all learn alike."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
import torch
from numpy.polynomial import chebyshev, hermite_e, legendre
from torch import Tensor, nn

from polytrope.ops import build_activation, functional, moments
from polytrope.ops.interpolate import Fit, fit

FAMILIES = ("hermite", "chebyshev", "legendre")
INTERVALS = [(-0.01, 0.01), (-1.0, 1.0), (-3.0, 9.0), (-100.0, 100.0), (-0.02, 0.3), (20.0, 21.0), (-60.0, 5.0)]
Series = Callable[[np.ndarray, np.ndarray], np.ndarray]
SERIES: dict[str, Series] = {"hermite": hermite_e.hermeval, "chebyshev": chebyshev.chebval, "legendre": legendre.legval}
DERIVED = {"hermite": hermite_e.hermeder, "chebyshev": chebyshev.chebder, "legendre": legendre.legder}


def in_numpy(family: str, coefficients: Tensor, x: Tensor, interval: Any, variable: tuple[float, float]) -> np.ndarray:
    shift, scale = variable
    series = coefficients.double().numpy()
    if family == "hermite":
        series = series / [math.factorial(k) for k in range(len(series))]
    points = x.double().numpy()
    inside = points if interval is None else np.clip(points, *interval)
    place = (inside - shift) / scale
    slope = SERIES[family](place, DERIVED[family](series)) / scale
    return SERIES[family](place, series) + slope * (points - inside)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)]
)
@pytest.mark.parametrize("interval", [None, (-3.0, 9.0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_basis_at_the_mapped_input(family: str, interval: Any, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    coefficients = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    x = (4.0 * torch.randn(400, 24, generator=generator, dtype=torch.float64) + 2.0).to(dtype)
    options: dict[str, Any] = {"interval": interval, "variable": (2.5, 7.0)}
    function = getattr(functional, family)
    expected = in_numpy(family, coefficients[0], x, **options)
    largest = np.abs(expected).max()
    assert np.abs(function(x, coefficients[0], **options).double().numpy() - expected).max() <= tolerance * largest
    gated = function(torch.cat([x, x], dim=-1), coefficients[0], glu=True, **options).double().numpy()
    assert (
        np.abs(gated - expected * x.double().numpy()).max() <= tolerance * np.abs(expected * x.double().numpy()).max()
    )
    for rows in (x, x[:300].view(3, 2400)):  # channel by channel, and each group for itself
        groups = function(rows, coefficients, **options).double().numpy()
        for group, part in enumerate(np.split(groups, 6, axis=-1)):
            own = in_numpy(family, coefficients[group], rows.tensor_split(6, dim=-1)[group], **options)
            assert np.abs(part - own).max() <= tolerance * max(np.abs(own).max(), 1.0)


@pytest.mark.parametrize("name", [*FAMILIES, "favard"])
@pytest.mark.parametrize("interval", [None, [-1.0, 3.0]])
def test_a_start_is_the_same_function_in_any_variable(name: str, interval: Any) -> None:
    config = {"name": "legendre" if name == "favard" else name, "degree": 5, "interval": interval}
    config |= {"learnable_recurrence": name == "favard"}
    x = torch.linspace(-4, 5, 101, dtype=torch.float64)
    for init in ("variance_preserving", "stable", "gelu"):
        usual = build_activation({**config, "init": init, "dtype": torch.float64})
        scaled = build_activation({**config, "init": init, "dtype": torch.float64, "variable": (0.5, 3.0)})
        assert (usual(x) - scaled(x)).abs().max() < 1e-10
        assert astuple(moments(usual)) == pytest.approx(astuple(moments(scaled)), rel=1e-9)
        rebuilt = build_activation(scaled.config()).double()
        rebuilt.load_state_dict(scaled.state_dict())
        assert torch.equal(rebuilt(x), scaled(x))


def test_without_the_option_nothing_is_said_of_it() -> None:
    module = build_activation("hermite3")
    assert module.config() == {"name": "hermite", "degree": 3}
    assert list(module.state_dict()) == ["coefficients"]
    assert "variable" not in module.definition().options
    assert "variable" not in repr(module)


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ((0.0, 0.0), "variable: expected a shift"),
        ((0.0, -1.0), "variable: expected a shift"),
        ((math.nan, 1.0), "variable: expected a shift"),
        ((0.0, 1e-40), "scale from 1e-37"),
        (3.0, r"variable: expected \(shift, scale\)"),
        ((1.0, 2.0, 3.0), r"variable: expected \(shift, scale\)"),
    ],
)
def test_a_wrong_variable_is_refused(variable: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_activation({"name": "chebyshev", "degree": 3, "variable": variable})
    with pytest.raises(ValueError, match=message):
        functional.hermite(torch.zeros(2), torch.ones(3), variable=variable)


def test_other_families_take_no_variable() -> None:
    with pytest.raises(ValueError, match=r"activation 'rational': .*variable"):
        build_activation({"name": "rational", "degree": 3, "variable": [0.0, 2.0]})
    with pytest.raises(ValueError, match="shift and scale > 0 of a polynomial"):
        torch.ops.polytrope.activation(
            torch.zeros(4), torch.ones(1, 4).double(), 9, 3, 0, [], -1, False, 0.0, [0.0, 2.0]
        )


def test_a_state_of_torchortho_is_refused_in_another_variable() -> None:
    module = build_activation({"name": "hermite", "degree": 3, "variable": [0.0, 2.0]})
    with pytest.raises(ValueError, match=r"like this one \(degree=3, variable=\[0.0, 2.0\]\)"):
        module.load_torchortho_state_dict({"coefficients": torch.ones(4)})


def test_the_operator_runs_as_programs_exported_before_call_it() -> None:
    x, parameters = torch.randn(8, requires_grad=True), torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    before = torch.ops.polytrope.activation(x, parameters, 1, 3, 0, [-1.0, 1.0], -1, False, 0.0)
    now = functional.hermite(x, parameters[0], interval=(-1.0, 1.0))
    assert torch.equal(before, now)
    for old, new in zip(*(torch.autograd.grad(y.sum(), (x, parameters)) for y in (before, now)), strict=True):
        torch.testing.assert_close(old, new)


def wave(low: float, high: float) -> Callable[[Tensor], Tensor]:
    """GELU's shape over any interval."""
    middle, half = (low + high) / 2, (high - low) / 2
    return lambda x: half / 4 * nn.functional.gelu((x - middle) / half * 4)


def fitted(family: str, degree: int, ends: tuple[float, float], dtype: torch.dtype = torch.float32) -> Fit:
    return fit(wave(*ends), family, degree, interval=ends, dtype=dtype)


@pytest.mark.parametrize("ends", INTERVALS, ids=str)
def test_coefficients_are_of_the_size_of_the_function(ends: tuple[float, float]) -> None:
    size = (ends[1] - ends[0]) / 2
    for degree in (8, 12):
        for family in FAMILIES:
            found = fitted(family, degree, ends)
            # Of polynomials of about length 1: those of Hermite, He_k / √k!.
            lengths = [1 / math.sqrt(math.factorial(k)) if family == "hermite" else 1.0 for k in range(degree + 1)]
            assert 0.05 * size < np.abs(found.coefficients * lengths).max() < size
        legendre_error = fitted("legendre", degree, ends).certificate.maximum
        assert fitted("hermite", degree, ends).certificate.maximum == pytest.approx(legendre_error, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ends", [(-10.0, 10.0), (-3.0, 9.0), (-0.1, 0.1)], ids=str)
def test_any_stored_type_keeps_the_error(ends: tuple[float, float], dtype: torch.dtype) -> None:
    """16 bits add about their rounding of the largest value; evaluation in float32 adds to none."""
    size = (ends[1] - ends[0]) / 2
    added = 1e-5 * size if dtype == torch.float32 else 1.5 * torch.finfo(dtype).eps * size
    exact = fitted("legendre", 12, ends, torch.float64).certificate.maximum
    for family in FAMILIES:
        stored = fitted(family, 12, ends, dtype)
        module = stored.build().requires_grad_(False)
        assert all(parameter.dtype == dtype for parameter in module.parameters())
        assert stored.certificate.maximum <= exact + added
        x = torch.linspace(*ends, 2001).to(dtype)
        x = x[(x.double() >= ends[0]) & (x.double() <= ends[1])]
        error = (module(x).double() - wave(*ends)(x.double())).abs().max()
        assert float(error) <= stored.certificate.maximum


def test_a_relu_of_small_inputs_is_fitted_at_any_degree() -> None:
    points = np.unique(0.1 * np.random.default_rng(0).standard_normal(4000))
    for family in FAMILIES:
        for degree in (8, 12):
            found = fit("relu", family, degree, interval="best", weight=(points, np.ones(len(points))))
            assert found.config["degree"] == degree
            assert found.certificate.rms < 1e-4
            assert np.abs(found.coefficients).max() < 1.0


def test_all_bases_are_fine_tuned_like_the_original() -> None:
    """Twenty steps of Adam on a net whose hidden layer reaches ±8, in one family as in the others and in GELU."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=generator)
    y = torch.sin(x.sum(dim=1, keepdim=True))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1))
    with torch.no_grad():
        net[0].weight.mul_(4.0)
    with torch.no_grad():
        ends = (float(net[0](x).min()), float(net[0](x).max()))
    assert ends[0] < -8.0
    assert ends[1] > 8.0
    ends = (-9.0, 9.0)

    def train(model: nn.Sequential, steps: int) -> list[float]:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(steps):
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        return [*losses, float((model(x) - y).square().mean())]

    train(net, 100)
    original = train(copy.deepcopy(net), 20)
    for family in FAMILIES:
        converted = copy.deepcopy(net)
        converted[1] = fit("gelu", family, 12, interval=ends).build()
        losses = train(converted, 20)
        assert losses[0] == pytest.approx(original[0], rel=0.03)
        assert max(losses) == losses[0]
        assert losses[-1] == pytest.approx(original[-1], rel=0.03)
