"""Fits on measured inputs: a higher degree is never worse, and `auto` takes what needs the fewest parameters."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polytrope.ops.fitting import placement, solvers
from polytrope.ops.fitting.placement import compressed
from polytrope.ops.fitting.refinement import Data
from polytrope.ops.fitting.solvers import columns_of
from polytrope.ops.fitting.targets import broken_line, find_kinks, resolve_target, sample
from polytrope.ops.interpolate import FAMILIES_BY_COST, fit, fit_to_error, parameter_count

TARGETS = ("relu", "relu6", "gelu", "silu", "tanh", "hardswish")
SCALES = (0.001, 0.1, 1.0, 2.0, 10.0)
POINTS = np.linspace(-4.5, 4.5, 301)
COUNTS = np.exp(-0.5 * POINTS**2)


def best(target: str, family: str, degree: int, scale: float, **options: object):
    weight = (scale * POINTS, COUNTS)
    return fit(target, family, degree, interval="best", weight=weight, derivative_weight=0.01 * scale**2, **options)


def relative_error(target: str, family: str, degree: int, scale: float) -> float:
    """Of the function itself: float64 has no rounding to speak of, and none is refused."""
    certificate = best(target, family, degree, scale, dtype=torch.float64, rounding_tolerance=None).certificate
    return certificate.rms / np.sqrt(certificate.target_mean_square)


# One row of degrees per target and scale takes a second; together they cover every target, scale and family.
@pytest.mark.parametrize(
    ("target", "scale", "family"),
    [
        (target, scale, ("hermite", "chebyshev", "legendre")[number % 3])
        for number, (target, scale) in enumerate(itertools.product(TARGETS, SCALES))
        if number % 4 == 0 or target == "relu6"
    ],
)
def test_no_degree_is_worse_than_the_one_below_and_none_is_refused(target: str, scale: float, family: str) -> None:
    errors = [relative_error(target, family, degree, scale) for degree in (2, 3, 5, 8, 9, 12, 13, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 5e-3


@pytest.mark.parametrize("family", ["rational", "fourier", "tropical_rational", "polyrelu"])
@pytest.mark.parametrize(("target", "scale"), [("gelu", 1.0), ("relu6", 10.0), ("tanh", 0.1)])
def test_no_degree_of_other_families_is_worse_than_the_one_below(family: str, target: str, scale: float) -> None:
    errors = [best(target, family, degree, scale).certificate.rms for degree in range(1, 7)]
    assert errors == sorted(errors, reverse=True)


def test_a_degree_that_adds_nothing_is_the_function_of_the_degree_below() -> None:
    low, high = best("gelu", "hermite", 4, 1.0), best("gelu", "hermite", 5, 1.0)
    x = np.linspace(-6, 6, 101)
    assert high.certificate.rms <= low.certificate.rms
    assert high.config["degree"] == 5
    assert high.build().coefficients.shape == (6,)
    np.testing.assert_allclose(high.build(torch.float64)(torch.from_numpy(x)).detach(), high.curve(x)[0], atol=1e-5)


@pytest.mark.parametrize("target", ["relu6", "gelu", "hardswish"])
@pytest.mark.parametrize(("scale", "degree"), [(1.0, 6), (10.0, 3), (10.0, 9)])
def test_the_interval_is_the_best_of_all(target: str, scale: float, degree: int) -> None:
    points = np.linspace(-4.5, 4.5, 1500)  # dense enough that no polynomial bends between two of them
    x, weights = scale * points, np.exp(-0.5 * points**2)
    weights /= weights.sum()
    data = Data(x, weights, *sample(resolve_target(target), x), 0.01 * scale**2)

    def columns(low: np.ndarray, high: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return columns_of("legendre", degree, (low, high), tails=True)(points)

    def costs(ends: np.ndarray) -> np.ndarray:
        values, slopes = columns(ends[:, :1], ends[:, 1:], x)
        return np.array([
            np.linalg.lstsq(data.rows(value, slope), data.right, rcond=None)[1][0]
            for value, slope in zip(values, slopes, strict=True)
        ])  # fmt: skip

    found = np.array(
        [placement.best_intervals(data, find_kinks(resolve_target(target), x[0], x[-1]), columns, degree)[degree]]
    )
    every = np.linspace(-4.4, 4.4, 23) * scale
    others = np.array([(low, high) for low in every for high in every if high - low >= 0.2 * scale])
    assert costs(found)[0] <= costs(others).min() * 1.01


def test_auto_takes_the_family_and_degree_of_the_fewest_parameters() -> None:
    options = {"interval": "best", "weight": (POINTS, COUNTS), "derivative_weight": 0.01}
    for error in (3e-2, 3e-3, 3e-4):
        chosen = fit_to_error("silu", "auto", error, degrees=range(1, 9), **options)
        name, degree = chosen.config["name"], chosen.config["degree"]
        assert chosen.certificate.rms <= error
        for family, other in itertools.product(FAMILIES_BY_COST, range(1, 9)):
            if parameter_count(family, other) < parameter_count(name, degree):
                assert fit("silu", family, other, **options).certificate.rms > error


def test_auto_finds_that_a_relu_is_one() -> None:
    options = {"interval": "best", "weight": (POINTS, COUNTS)}
    assert fit_to_error("relu", "auto", 1e-6, **options).config["name"] == "polyrelu"
    exact = fit_to_error("relu6", "auto", 1e-6, interval="best", weight=(4 * POINTS, COUNTS))
    assert exact.config["name"] == "tropical_rational"
    assert exact.config["degree"] == 1


@settings(max_examples=12, deadline=None)
@given(
    target=st.sampled_from(TARGETS),
    exponent=st.floats(-3, 2),
    error=st.sampled_from([0.1, 0.02, 0.005]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_what_auto_takes_has_no_more_error_on_fresh_inputs_than_it_certifies(
    target: str, exponent: float, error: float, dtype: torch.dtype, seed: int
) -> None:
    scale = 10.0**exponent
    drawn = scale * np.random.default_rng(seed).standard_normal((2, 4000))
    seen, fresh = (torch.from_numpy(np.clip(part, -4 * scale, 4 * scale)).to(dtype).double() for part in drawn)
    points, counts = np.unique(seen.numpy(), return_counts=True)
    exact = resolve_target(target)
    size = float(exact(seen).square().mean().sqrt())
    try:
        found = fit_to_error(
            target,
            "auto",
            error * size,
            degrees=range(1, 9),
            interval="best",
            weight=(points, counts),
            derivative_weight=0.01 * scale**2,
            dtype=dtype,
        )
    except ValueError:  # no degree reaches it
        return
    inside = fresh[(fresh >= points[0]) & (fresh <= points[-1])]
    with torch.no_grad():
        missed = (found.build()(inside.to(dtype)).double() - exact(inside)).abs()
    certificate = found.certificate
    assert float(missed.max()) <= max(certificate.maximum, certificate.maximum_outside)
    spread = float(missed.square().std()) / np.sqrt(len(missed) / 8)
    assert float(missed.square().mean()) <= 1.2 * certificate.rms**2 + 2 * spread


def test_what_cannot_be_reached_is_said_with_the_best_and_the_reasons() -> None:
    with pytest.raises(ValueError, match=r"auto reaches no error of 1e-12 up to degree 3: fourier of degree 3 has "):
        fit_to_error("gelu", "auto", 1e-12, degrees=range(1, 4), interval="best", weight=(POINTS, COUNTS))
    with pytest.raises(ValueError, match=r"degree 8 has .*refused: hermite of degree 1, 2, 3 \(constraints: 5 cond"):
        fit_to_error("gelu", "hermite", 1e-12, degrees=range(1, 9), constraints=("ends", "origin"))
    with pytest.raises(ValueError, match="auto chooses by an error: fit_to_error"):
        fit("gelu", "auto", 3)


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        (range(1, 18), "degrees: expected an integer from 1 to 16, got 17"),
        ([0, 1], "degrees: expected an integer from 1 to 16, got 0"),
        ([], "degrees: expected at least one, got none"),
    ],
)
def test_degrees_that_no_family_has_are_refused_before_anything_is_fitted(degrees: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_to_error("gelu", "hermite", 10.0, degrees=degrees, interval="best", weight=(POINTS, COUNTS))


def test_interpolation_keeps_its_conditions_where_a_lower_degree_has_less_error() -> None:
    nodes = np.array([-3.0, -1.0, 0.5, 3.0])
    found = fit("gelu", "hermite", 7, interval=(-4, 4), weight=(POINTS, COUNTS), method="interpolation", nodes=nodes)
    below = fit("gelu", "hermite", 6, interval=(-4, 4), weight=(POINTS, COUNTS), method="interpolation", nodes=nodes)
    assert below.certificate.rms < found.certificate.rms
    value, slope = found.curve(nodes)
    wanted, slope_wanted = sample(resolve_target("gelu"), nodes)
    assert np.abs(value - wanted).max() < 1e-12
    assert np.abs(slope - slope_wanted).max() < 1e-12


@pytest.mark.parametrize("target", ["gelu", "relu"])
@pytest.mark.parametrize("x", [0.0, 1.5])
def test_an_activation_that_receives_one_number_is_fitted_and_one_family_that_fails_takes_no_other_away(
    x: float, target: str
) -> None:
    options: dict[str, Any] = {"interval": "best", "weight": (np.array([x]), np.ones(1))}
    wanted = float(resolve_target(target)(torch.tensor(x)))
    exact = fit(target, "tropical_rational", 6, **options).build()
    assert float(exact(torch.tensor(x))) == pytest.approx(wanted, abs=1e-6)

    def broken(_problem: Any) -> Iterator[Any]:
        yield from ()
        raise ValueError("no such search")

    kept, solvers.NONLINEAR["rational"] = solvers.NONLINEAR["rational"], broken
    try:
        with pytest.raises(ValueError, match=r"rational of degree 1, 2 \(no such search\)"):
            fit_to_error("gelu", "auto", -1.0, degrees=(1, 2), **options)
    finally:
        solvers.NONLINEAR["rational"] = kept


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("family", ["hermite", "polyrelu", "fourier", "rational"])
def test_one_number_has_no_best_ends_and_gets_an_interval_around_it(family: str) -> None:
    for points in (np.array([1.5]), np.array([1.5, 1.5 + 1e-7])):
        options: dict[str, Any] = {"interval": "best", "weight": (points, np.ones(len(points)))}
        found = fit("gelu", family, 3, **options)
        assert found.config["interval"] == pytest.approx([1.0, 2.0], abs=1e-6)
        assert found.certificate.rms < 1e-6


def test_a_function_of_straight_lines_is_known() -> None:
    assert broken_line(resolve_target("relu6"), -3.0, 8.0) == pytest.approx([1.0, -1.0])
    assert broken_line(resolve_target("leaky_relu"), -3.0, 8.0) == pytest.approx([0.99])
    assert broken_line(resolve_target("hardswish"), -5.0, 5.0) is None
    assert broken_line(resolve_target("gelu"), -5.0, 5.0) is None


@pytest.mark.parametrize(
    ("seed", "target", "family", "degree"), [(8, "tanh", "hermite", 16), (11, "silu", "hermite", 11)]
)
def test_an_interval_that_rounding_widens_stays_within_the_inputs(
    seed: int, target: str, family: str, degree: int
) -> None:
    # Inputs of one sign, as behind a ReLU: below them the polynomial would be anything, and so would its certificate.
    points = np.sort(np.exp(2 * np.random.default_rng(seed).normal(size=600))) * 1e-3
    found = fit(
        target,
        family,
        degree,
        interval="best",
        weight=(points, np.ones(600)),
        derivative_weight=0.01 * float(np.var(points)),
        dtype=torch.bfloat16,
    )
    low, high = found.config["interval"]
    assert low > -1e-3 * points[-1]
    assert high < 1.001 * points[-1]
    assert found.certificate.maximum < 0.01


@pytest.mark.parametrize(
    ("target", "bends"),
    [
        ("relu", 1),
        ("leaky_relu", 1),
        ("relu6", 1),
        (torch.nn.Hardtanh(), 1),
        (torch.nn.PReLU(init=1.7), 1),
        (lambda x: x.abs() - (x - 1).abs() + 2 * (x + 2).abs(), 2),
    ],
)
def test_a_tropical_rational_activation_has_straight_lines_exactly(target: Any, bends: int) -> None:
    exact = resolve_target(target)
    for seed in range(10):
        drawn = np.sort(np.random.default_rng(seed).normal(scale=8.0, size=3000))
        points, counts = (drawn, np.ones(3000)) if seed % 2 else (np.append(drawn[::3], [0.0, 6.0]), np.ones(1002))
        for degree in (bends, bends + 2):
            found = fit(target, "tropical_rational", degree, interval="best", weight=(points, counts))
            x = np.linspace(points.min(), points.max(), 999)
            value, slope = found.curve(x)
            wanted, slope_wanted = sample(exact, x)
            np.testing.assert_allclose(value, wanted, atol=1e-10)
            assert np.mean(np.abs(slope - slope_wanted) > 1e-9) < 0.01  # at a kink there is none
            assert found.certificate.rms < 1e-6 * np.abs(wanted).max()


def minilm_inputs() -> tuple[np.ndarray, np.ndarray]:
    """Inputs as all-MiniLM-L6-v2's second GELU receives them, by quantiles: few lie far out, and most below 0."""
    fractions = [0, 1e-5, 1e-4, 1e-3, 0.01, 0.05, *np.arange(0.1, 0.95, 0.1), 0.95, 0.99, 0.999, 0.9999, 0.99999, 1]
    ends = [-13.6, -13.35, -8.3, -6.22, -4.2, -3.12, -2.59, -1.99, -1.56, -1.22, -0.9, -0.62, -0.36, -0.1, 0.22, 0.49]
    edges = np.linspace(-13.6, 20.36, 1501)
    below = np.interp(edges, [*ends, 1.1, 2.07, 3.25, 20.26, 20.36], fractions)
    return (edges[1:] + edges[:-1]) / 2, np.diff(below)


@pytest.mark.parametrize(
    ("family", "degree", "error"),
    [
        ("fourier", 2, 2.5e-5),
        ("fourier", 3, 4.1e-7),
        ("fourier", 4, 4e-9),
        ("rational", 5, 5.2e-7),
        ("rational", 6, 1.8e-7),
        ("tropical_rational", 1, 2.2e-3),
    ],
)
def test_the_search_finds_where_the_target_bends_though_few_inputs_lie_there(
    family: str, degree: int, error: float
) -> None:
    """Bounds: what a search of ten times the steps finds, and a little (fits of 83c38f9); Fourier 2: 1.5e-5."""
    found = fit("gelu", family, degree, interval="best", weight=minilm_inputs(), derivative_weight=0.01)
    assert found.certificate.h1_mean_square < error


@pytest.mark.parametrize("count", [32, 128])
def test_inputs_are_joined_where_that_moves_them_least(count: int) -> None:
    x, weights = minilm_inputs()
    weights = weights / weights.sum()
    data = Data(x, weights, x, np.ones_like(x), 0.0)
    few = compressed(data, count, lambda points: (points, np.ones_like(points)))
    assert len(few.x) <= count
    np.testing.assert_allclose([few.weights.sum(), few.weights @ few.x], [1.0, weights @ x], rtol=1e-12)

    def moved(points: np.ndarray) -> float:
        nearest = points[np.abs(np.subtract.outer(x, points)).argmin(axis=1)]
        return float(weights @ (x - nearest) ** 2)

    even = np.linspace(x[0], x[-1], count)
    equal = np.interp((np.arange(count) + 0.5) / count, np.cumsum(weights), x)
    half = np.concatenate([even[::2], equal[::2]])
    assert moved(few.x) < 0.5 * min(moved(even), moved(equal), moved(half))
