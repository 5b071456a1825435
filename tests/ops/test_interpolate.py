"""Fits of activations: exactness, optimality, certificates, every family, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import legendre
from torch import nn

from polytrope.ops.fitting.quadrature import nodes
from polytrope.ops.fitting.targets import find_kinks, resolve_target, sample
from polytrope.ops.interpolate import Fit, fit, fit_to_error, parameter_count

ROOT8 = math.sqrt(8.0)
BUILDABLE = ("hermite", "chebyshev", "legendre", "fourier", "tropical", "tropical_rational", "rational", "polyrelu")


def polynomial_target(powers: list[float]) -> object:
    def target(x: torch.Tensor) -> torch.Tensor:
        value = torch.zeros_like(x)
        for power in reversed(powers):
            value = value * x + power
        return value

    return target


def evaluate(result: Fit, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return result.build(torch.float64)(torch.from_numpy(x)).numpy()


@settings(max_examples=20, deadline=None)
@given(
    powers=st.lists(st.floats(-2, 2), min_size=2, max_size=6),
    family=st.sampled_from(["hermite", "chebyshev", "legendre"]),
    ends=st.tuples(st.floats(-4, -0.5), st.floats(0.5, 4)),
)
def test_a_polynomial_up_to_the_degree_is_reproduced(
    powers: list[float], family: str, ends: tuple[float, float]
) -> None:
    target = polynomial_target(powers)
    result = fit(target, family, 6, interval=ends, tails=False)
    x = np.linspace(*ends, 101)
    expected = target(torch.from_numpy(x)).numpy()
    scale = max(1.0, np.abs(expected).max())
    assert np.abs(result.curve(x)[0] - expected).max() <= 1e-12 * scale
    assert np.abs(evaluate(result, x) - expected).max() <= 1e-11 * scale


def test_relu_of_degree_2_under_the_normal_density_is_the_known_closed_form() -> None:
    # x² / (2√(2π)) + x / 2 + 1 / (2√(2π)), in He_0 = 1, He_1 = x, He_2 / 2 = (x² - 1) / 2
    result = fit("relu", "hermite", 2, interval=None, weight="gaussian", derivative_weight=0.0)
    unit = 1.0 / math.sqrt(2.0 * math.pi)
    np.testing.assert_allclose(result.coefficients, [unit, 0.5, unit], rtol=0, atol=1e-14)


def test_gelu_of_degree_8_on_root_8_meets_the_published_interval_far_better_than_gradient_descent() -> None:
    assert fit("gelu", "hermite", 8, interval=(-ROOT8, ROOT8)).certificate.h1_mean_square <= 2.7e-5


@pytest.mark.parametrize("degree", range(3, 17))
def test_no_degree_is_worse_than_the_float64_optimum(degree: int) -> None:
    result = fit("gelu", "hermite", degree, interval=(-ROOT8, ROOT8))
    # Independent optimum: normal equations would lose digits, so QR in Legendre polynomials on many more nodes.
    t, rule = legendre.leggauss(1200)
    x = ROOT8 * t
    value, slope = sample(resolve_target("gelu"), x)
    root = np.sqrt(rule / 2.0)
    values = legendre.legvander(t, degree)
    slopes = np.stack([legendre.legval(t, legendre.legder(row)) for row in np.eye(degree + 1)], axis=1) / ROOT8
    matrix = np.concatenate([values * root[:, None], slopes * root[:, None]])
    right = np.concatenate([value * root, slope * root])
    orthogonal, _ = np.linalg.qr(matrix)
    optimum = float(np.sum((right - orthogonal @ (orthogonal.T @ right)) ** 2))
    fitted, fitted_slope = result.curve(x)
    reached = float(rule / 2.0 @ ((fitted - value) ** 2 + (fitted_slope - slope) ** 2))
    assert reached <= optimum * (1.0 + 1e-9) + 1e-28
    assert result.certificate.h1_mean_square == pytest.approx(optimum, rel=1e-6, abs=1e-24)


@pytest.mark.parametrize("family", ["hermite", "chebyshev", "legendre"])
@pytest.mark.parametrize(("target", "sign"), [(torch.tanh, -1.0), (torch.cosh, 1.0)])
def test_a_symmetric_target_has_a_symmetric_fit(family: str, target: object, sign: float) -> None:
    result = fit(target, family, 9, interval=(-3, 3))
    x = np.linspace(0, 5, 41)
    assert np.abs(evaluate(result, x) - sign * evaluate(result, -x)).max() <= 1e-10


@pytest.mark.parametrize("family", BUILDABLE)
@pytest.mark.parametrize("target", ["gelu", "relu", "silu"])
def test_the_certificate_bounds_the_true_error_at_random_points(family: str, target: str) -> None:
    low, high = -3.7, 4.1
    result = fit(target, family, 5, interval=(low, high))
    certificate = result.certificate
    random = np.random.default_rng(0)
    function = resolve_target(target)
    inside = random.uniform(low, high, 5000)
    value, slope = sample(function, inside)
    module = result.build(torch.float64)
    inputs = torch.from_numpy(inside).requires_grad_()
    outputs = module(inputs)
    (slopes,) = torch.autograd.grad(outputs.sum(), inputs)
    assert np.abs(outputs.detach().numpy() - value).max() <= certificate.maximum + 1e-9
    assert np.abs(slopes.numpy() - slope).max() <= certificate.maximum_derivative + 1e-9
    outside = np.concatenate([random.uniform(2 * low - high, low, 2000), random.uniform(high, 2 * high - low, 2000)])
    assert np.abs(evaluate(result, outside) - sample(function, outside)[0]).max() <= certificate.maximum_outside + 1e-9
    assert certificate.rms <= certificate.maximum
    in_float32 = result.build()(torch.from_numpy(inside).float()).detach().double().numpy()
    assert np.abs(in_float32 - outputs.detach().numpy()).max() <= 4 * certificate.rounding_error + 1e-6


def test_moments_are_those_of_target_and_fit() -> None:
    certificate = fit("relu", "hermite", 4, interval=None, weight="gaussian").certificate
    assert certificate.target_mean == pytest.approx(1 / math.sqrt(2 * math.pi), abs=1e-12)
    assert certificate.target_mean_square == pytest.approx(0.5, abs=1e-12)
    assert certificate.target_derivative_mean_square == pytest.approx(0.5, abs=1e-12)
    assert certificate.fit_mean == pytest.approx(certificate.target_mean, abs=0.05)


@pytest.mark.parametrize("degree", [3, 6, 7, 8])
def test_interpolation_matches_value_and_slope_at_its_nodes(degree: int) -> None:
    points = np.linspace(-2.5, 3.0, degree // 2 + 1)
    result = fit("gelu", "hermite", degree, interval=(-3, 4), method="interpolation", nodes=points.tolist())
    value, slope = sample(resolve_target("gelu"), points)
    fitted, fitted_slope = result.curve(points)
    np.testing.assert_allclose(fitted, value, atol=1e-12)
    matched = np.ones(len(points), dtype=bool)
    if degree % 2 == 0:
        matched[len(points) // 2] = False  # one condition too many for an even degree
    np.testing.assert_allclose(fitted_slope[matched], slope[matched], atol=1e-12)


def test_interpolation_takes_chebyshev_nodes_unless_others_are_given() -> None:
    result = fit("gelu", "legendre", 7, interval=(-3, 4), method="interpolation")
    points = 0.5 + 3.5 * np.cos((2 * np.arange(4) + 1) * math.pi / 8)  # the zeros of T_4 on (-3, 4)
    for fitted, exact in zip(result.curve(points), sample(resolve_target("gelu"), points), strict=True):
        np.testing.assert_allclose(fitted, exact, atol=1e-12)


def test_constraints_hold_exactly_and_the_tangents_continue_the_target() -> None:
    result = fit("silu", "hermite", 8, interval=(-6, 5), constraints=("ends", "origin"))
    ends = np.array([-6.0, 0.0, 5.0])
    value, slope = sample(resolve_target("silu"), ends)
    fitted, fitted_slope = result.curve(ends)
    np.testing.assert_allclose(fitted, value, atol=1e-12)
    np.testing.assert_allclose(fitted_slope[[0, 2]], slope[[0, 2]], atol=1e-12)
    far = np.array([-300.0, 400.0])
    expected = value[[0, 2]] + slope[[0, 2]] * (far - ends[[0, 2]])
    np.testing.assert_allclose(evaluate(result, far), expected, rtol=1e-9)


def test_the_weight_decides_where_the_fit_is_good() -> None:
    here = fit("gelu", "hermite", 4, interval=(-6, 6), weight=lambda x: np.exp(-8.0 * (x - 3.0) ** 2) + 1e-6)
    even = fit("gelu", "hermite", 4, interval=(-6, 6))
    x = np.linspace(2.6, 3.4, 50)
    value = sample(resolve_target("gelu"), x)[0]
    assert np.abs(here.curve(x)[0] - value).max() < 0.02 * np.abs(even.curve(x)[0] - value).max()


def test_more_pieces_fit_a_broken_line_better_and_a_broken_line_itself_exactly() -> None:
    errors = [fit("gelu", "tropical_rational", degree, interval=(-4, 4)).certificate.rms for degree in (1, 2, 4, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.004
    exact = fit("relu6", "tropical_rational", 2, interval=(-4, 9), derivative_weight=0.1)
    assert exact.certificate.maximum < 1e-5  # nothing but rounding in float32


def test_the_tropical_fit_is_convex_with_its_fixed_slopes() -> None:
    result = fit("softplus", "tropical", 6, interval=(-4, 4))
    assert set(result.parameters) == {"coefficients"}
    x = np.linspace(-4, 4, 201)
    assert np.diff(evaluate(result, x), 2).min() > -1e-12
    assert result.certificate.rms < 0.25


def test_free_frequencies_fit_a_sum_of_two_cosines() -> None:
    result = fit(lambda x: 0.3 + torch.cos(1.7 * x - 0.4) + 0.2 * torch.sin(3.4 * x), "fourier", 2, interval=(-2, 2))
    assert result.certificate.rms < 1e-6
    np.testing.assert_allclose(np.sort(np.abs(result.parameters["frequencies"])), [1.7, 3.4], atol=1e-4)


def test_kinks_of_a_target_are_found() -> None:
    assert find_kinks(resolve_target("relu6"), -8.0, 7.0) == pytest.approx([0.0, 6.0], abs=1e-9)
    assert find_kinks(resolve_target("hardswish"), -8.0, 7.0) == pytest.approx([-3.0, 3.0], abs=1e-9)
    assert find_kinks(resolve_target("gelu"), -8.0, 7.0) == []


def test_quadrature_is_exact_for_the_normal_moments() -> None:
    x, weights = nodes(-14.0, 14.0, [], "gaussian")
    for order, moment in ((0, 1.0), (2, 1.0), (4, 3.0), (16, 2027025.0)):
        assert weights @ x**order == pytest.approx(moment, rel=1e-12)


def test_modules_are_targets_and_stay_as_they_are() -> None:
    module = nn.ReLU(inplace=True)
    by_module = fit(module, "hermite", 5, interval=(-2, 3))
    by_name = fit("relu", "hermite", 5, interval=(-2, 3))
    np.testing.assert_allclose(by_module.coefficients, by_name.coefficients, atol=1e-12)
    slope = nn.PReLU()
    fit(slope, "hermite", 5)
    assert slope.weight.dtype == torch.float32


def test_a_given_derivative_replaces_autograd() -> None:
    def table(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.sin(x.detach().numpy()))

    with pytest.raises(ValueError, match="give `derivative`"):
        fit(table, "hermite", 5)
    assert fit(table, "hermite", 9, interval=(-2, 2), derivative=torch.cos).certificate.maximum < 1e-6


def test_the_smallest_degree_for_an_error_is_chosen() -> None:
    chosen = fit_to_error("gelu", "hermite", 0.01, interval=(-4, 4))
    degree = chosen.config["degree"]
    assert chosen.certificate.rms <= 0.01
    assert fit("gelu", "hermite", degree - 1, interval=(-4, 4)).certificate.rms > 0.01
    with pytest.raises(ValueError, match="reaches no error of 1e-09 up to degree 4: degree 4 has"):
        fit_to_error("gelu", "hermite", 1e-9, degrees=range(1, 5))


def test_parameter_counts_are_those_of_the_modules() -> None:
    for family in BUILDABLE:
        module = fit("gelu", family, 4).build()
        assert sum(parameter.numel() for parameter in module.parameters()) == parameter_count(family, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "spline"}, "family: expected one of hermite"),
        ({"degree": 0}, "degree: expected an integer"),
        ({"degree": 3.0}, "degree: expected an integer"),
        ({"interval": (2.0, 1.0)}, "interval: expected finite lo < hi"),
        ({"interval": None}, "whole line"),
        ({"derivative_weight": -1.0}, "derivative_weight"),
        ({"target": "gelru"}, "target: expected one of gelu"),
        ({"target": nn.Softmax(dim=0)}, "not elementwise"),
        ({"target": lambda x: x.sum()}, "same shape"),
        ({"target": torch.log}, "not finite at x = -"),
        ({"weight": "normal"}, "weight: expected uniform, gaussian"),
        ({"weight": lambda x: -x}, "non-negative"),
        ({"degree": 3, "constraints": ("ends", "origin")}, "5 conditions for 4 coefficients"),
        ({"constraints": ("middle",)}, "constraints: expected"),
        ({"constraints": ((0.0, "value"), (1e-14, "value"))}, "contradict or repeat"),
        ({"family": "fourier", "constraints": ("origin",)}, "are for polynomials"),
        ({"method": "interpolation", "nodes": [0.0, 1.0]}, "needs 5 different nodes"),
        ({"method": "splines"}, "method"),
        ({"degree": 16, "rounding_tolerance": 1e-7}, "rounding in float32"),
    ],
)
def test_a_wrong_argument_is_refused_with_what_is_accepted(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(**({"target": "gelu", "family": "hermite", "degree": 8} | arguments))  # type: ignore[arg-type]


def outlier_inputs() -> tuple[np.ndarray, np.ndarray]:
    """A layer's inputs as measured in a real BERT: most are in -4…3, a few far outside."""
    points = np.linspace(-17.0, 24.0, 2001)
    return points, np.exp(-0.5 * ((points + 0.6) / 1.2) ** 2) + 1e-5 * np.exp(-np.abs(points) / 4)


@pytest.mark.parametrize("degree", [4, 6, 8])
def test_the_best_interval_is_better_than_intervals_by_quantile_and_its_tails_are_bounded(degree: int) -> None:
    points, counts = outlier_inputs()
    best = fit("gelu", "hermite", degree, interval="best", weight=(points, counts), derivative_weight=0.01)
    assert best.certificate.rms < {4: 0.01, 6: 0.006, 8: 0.0015}[degree]
    for share in (1e-2, 1e-3, 1e-4, 1e-5):
        ends = np.interp([share, 1 - share], np.cumsum(counts) / counts.sum(), points)
        other = fit("gelu", "hermite", degree, interval=tuple(ends), weight=(points, counts), derivative_weight=0.01)
        assert best.certificate.h1_mean_square <= other.certificate.h1_mean_square * 1.01
    # The figure in the certificate is that of the module, tails included.
    error = evaluate(best, points) - sample(resolve_target("gelu"), points)[0]
    assert np.sqrt(np.sum(counts * error**2) / counts.sum()) == pytest.approx(best.certificate.rms, rel=1e-4)
    assert np.abs(error).max() < 3.0  # the polynomial itself is beyond 1e4 there


def test_a_measured_weight_gives_the_optimum_over_polynomials_with_tangents() -> None:
    points, counts = outlier_inputs()
    result = fit("silu", "legendre", 5, interval=(-3, 3), weight=(points, counts), derivative_weight=0.0)
    module = result.build(torch.float64)
    coefficients = module.get_parameter("coefficients")
    target, inputs = sample(resolve_target("silu"), points)[0], torch.from_numpy(points)
    gradient = torch.autograd.grad(
        (torch.from_numpy(counts / counts.sum()) * (module(inputs) - torch.from_numpy(target)) ** 2).sum(), coefficients
    )[0]
    assert float(gradient.abs().max()) < 1e-9  # stationary in every coefficient


@pytest.mark.parametrize(
    ("family", "degree", "error"),
    [("fourier", 3, 0.004), ("rational", 4, 0.002), ("polyrelu", 6, 0.07), ("tropical_rational", 2, 0.03)],
)
def test_measured_inputs_fit_families_without_a_closed_form(family: str, degree: int, error: float) -> None:
    points, counts = outlier_inputs()
    result = fit("gelu", family, degree, interval="best", weight=(points, counts), derivative_weight=0.01)
    assert result.certificate.rms < error
    # The same function as the module, tangent lines included; the certificate reaches as far as the inputs.
    outputs, value = evaluate(result, points), sample(resolve_target("gelu"), points)[0]
    np.testing.assert_allclose(outputs, result.curve(points)[0], rtol=1e-5, atol=1e-6)
    assert np.abs(outputs - value).max() <= max(result.certificate.maximum, result.certificate.maximum_outside) + 1e-6
    if family in ("fourier", "rational"):
        low, high = result.config["interval"]
        assert points[0] <= low < -1.5 < 1.5 < high <= points[-1]


@pytest.mark.parametrize("family", ["fourier", "rational"])
def test_free_ends_are_a_minimum(family: str) -> None:
    points, counts = outlier_inputs()
    options = {"weight": (points, counts), "derivative_weight": 0.01}
    best = fit("gelu", family, 3, interval="best", **options)
    low, high = best.config["interval"]
    for ends in ((low - 0.4, high), (low + 0.4, high), (low, high - 0.4), (low, high + 0.4)):
        other = fit("gelu", family, 3, interval=ends, **options)
        assert best.certificate.h1_mean_square <= other.certificate.h1_mean_square * 1.02


@settings(max_examples=25, deadline=None)
@given(
    target=st.sampled_from(["gelu", "relu", "silu", "tanh", "relu6", "hardswish"]),
    family=st.sampled_from(BUILDABLE),
    degree=st.integers(1, 9),
    ends=st.tuples(st.floats(-6, -0.5), st.floats(0.5, 6)),
    seed=st.integers(0, 1000),
)
def test_certificates_bound_the_error_of_any_fit_at_random_points(
    target: str, family: str, degree: int, ends: tuple[float, float], seed: int
) -> None:
    result = fit(target, family, degree, interval=ends, rounding_tolerance=None)
    x = np.random.default_rng(seed).uniform(*ends, 20_000)
    (value, slope), (fitted, fitted_slope) = sample(resolve_target(target), x), result.curve(x)
    assert np.abs(fitted - value).max() <= result.certificate.maximum + 1e-12
    assert np.abs(fitted_slope - slope).max() <= result.certificate.maximum_derivative + 1e-12


@pytest.mark.parametrize("degree", [4, 8, 12])
def test_around_a_kink_the_best_interval_stays_as_wide_as_float32_needs(degree: int) -> None:
    points, counts = outlier_inputs()
    result = fit("relu", "hermite", degree, interval="best", weight=(points, counts), derivative_weight=0.01)
    assert result.certificate.rounding_error < 2e-3
    assert result.certificate.rms < 0.07


def test_inputs_that_are_all_equal_have_a_fit() -> None:
    result = fit("gelu", "hermite", 3, interval="best", weight=(np.array([0.3]), np.array([5.0])))
    assert result.certificate.rms < 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": "best"}, "needs measured inputs"),
        ({"weight": (np.arange(3.0), np.arange(2.0))}, "two equally long rows"),
        ({"weight": (np.array([0.0, np.nan]), np.ones(2))}, "finite points"),
        ({"weight": (np.arange(3.0), np.array([1.0, -1.0, 1.0]))}, "non-negative counts"),
    ],
)
def test_wrong_measured_inputs_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit("gelu", "hermite", 5, **arguments)  # type: ignore[arg-type]


def test_polyrelu_fits_and_meets_its_constraints() -> None:
    result = fit("relu", "polyrelu", 3, interval=(-4, 4))
    assert result.certificate.maximum < 1e-5  # nothing but rounding in float32
    bound = fit("silu", "polyrelu", 4, interval=(-4, 4), constraints=((4.0, "value"), (2.0, "slope")), tails=False)
    value, slope = sample(resolve_target("silu"), np.array([4.0, 2.0]))
    fitted, fitted_slope = bound.curve(np.array([4.0, 2.0]))
    assert fitted[0] == pytest.approx(value[0], abs=1e-12)
    assert fitted_slope[1] == pytest.approx(slope[1], abs=1e-12)


def test_the_slope_between_two_folds_of_a_denominator_is_bounded() -> None:
    result = fit("tanh", "rational", 7, interval=(-2.0, 3.0), rounding_tolerance=None)
    x = np.linspace(-0.01, 0.01, 4001)  # the denominator's inner polynomial is zero at 0 and at -0.0036
    error = np.abs(result.curve(x)[1] - sample(resolve_target("tanh"), x)[1]).max()
    assert error <= result.certificate.maximum_derivative


def test_rounding_counts_relative_to_the_function_and_is_certified_in_the_format_that_runs() -> None:
    with pytest.raises(ValueError, match=r"loses .* to rounding in float32"):
        fit("relu", "hermite", 16, interval=(-0.01, 0.01), rounding_tolerance=1e-6)  # it loses 2e-7
    points = np.linspace(-3.0, 3.0, 500)
    exact = resolve_target("gelu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        result = fit("gelu", "legendre", 6, interval=(-3, 3), weight=(points, np.ones(500)), dtype=dtype)
        x = torch.linspace(-3, 3, 9001).to(dtype)
        with torch.no_grad():
            error = float((result.build()(x).double() - exact(x.double())).abs().max())
        assert next(result.build().parameters()).dtype == dtype
        assert error <= result.certificate.maximum < error * 1.2 + 1e-3
