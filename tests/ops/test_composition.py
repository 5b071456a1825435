"""Compositions of polynomials: their circuits, their values against exact rational arithmetic, their fits."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.polynomial.chebyshev import chebval

from polytrope.ops import Composition, build_activation
from polytrope.ops.circuit import Circuit, best_split, count, make_circuit
from polytrope.ops.fitting.composition import fit_chain, odd_minimax, sign_polynomials
from polytrope.ops.fitting.targets import NAMED, sample
from polytrope.ops.polynomial_only import fit_composition, fit_composition_to_error


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


@pytest.mark.parametrize("degree", [1, 2, 3, 5, 6, 7, 8, 10, 15, 16, 31, 33, 64, 100, 128])
def test_a_circuit_computes_its_polynomial_in_the_smallest_depth(degree: int) -> None:
    numbers, x = drawn(degree + 1), np.linspace(-1, 1, 41)
    circuit = Circuit(1.0, 0.0, (best_split(numbers.tolist()),), False)
    assert np.abs(circuit.run(x) - chebval(x, numbers)).max() < 1e-12 * (degree + 1)
    cost = count(circuit)
    assert cost.depth == math.ceil(math.log2(degree))
    assert cost.products <= 2 * math.sqrt(degree) + math.log2(degree) + 1
    for parity in (0, 1):  # the other terms vanish: fewer products
        half = np.where(np.arange(degree + 1) % 2 == parity, numbers, 0.0)
        if degree > 1 and half[degree] != 0:
            sparse = Circuit(1.0, 0.0, (best_split(half.tolist()),), False)
            assert np.abs(sparse.run(x) - chebval(x, half)).max() < 1e-12 * (degree + 1)
            assert (count(sparse).depth, count(sparse).products <= cost.products) == (cost.depth, True)


def test_products_and_levels_are_counted_one_by_one() -> None:
    # u = x / 2; T_2 = 2 u² - 1; 3 T_3 + u = (6 u) · T_2 - 2 u: two products, and x / 2, 6 u and 2 u by constants
    cost = count(make_circuit([[0.0, 1.0, 0.0, 3.0]], 0.0, 2.0, gated=False))
    assert (cost.depth, cost.products, cost.constant_products, cost.levels) == (2, 2, 3, 3)
    gated = count(make_circuit([[0.0, 1.0, 0.0, 3.0]], 0.0, 2.0, gated=True))
    assert (gated.depth, gated.products) == (3, 3)
    assert count(make_circuit([[0.5]], 0.0, 1.0, gated=False)).products == 0
    # degree 7 with odd terms only, as for a sign: u², T_3, T_4 and one giant step
    assert count(make_circuit([[0.0, 1.0, 0.0, 0.5, 0.0, 0.3, 0.0, 0.1]], 0.0, 1.0, gated=False)).products == 4


CONFIGS: list[dict[str, Any]] = [
    {"degree": 16, "domain": [-7.0, 5.0]},
    {"degree": 100, "domain": [-6.0, 6.0]},
    {"degree": [7, 15, 9], "domain": [-3.0, 8.0], "center": 0.0, "gate": True},
    {"degree": [3, 40], "domain": [-5.0, 5.0], "gate": True},
]


def activation(config: dict[str, Any]) -> Composition:
    """An imitation of GELU, so that all coefficients matter."""
    module = build_activation({"name": "composition", "init": "gelu", **config})
    assert isinstance(module, Composition)
    return module


def exactly(module: Composition, x: Fraction) -> Fraction:
    """By the definition: Chebyshev's recurrence in rational arithmetic."""
    value = (x - Fraction(module.center)) / Fraction(module.half_width)
    for number in range(1, len(module.degrees) + 1):
        coefficients = [Fraction(float(c)) for c in module.get_parameter(f"polynomial_{number}").detach()]
        before, now = Fraction(1), value
        total = coefficients[0] + coefficients[1] * now
        for coefficient in coefficients[2:]:
            before, now = now, 2 * value * now - before
            total += coefficient * now
        value = total
    return value * x if module.gate else value


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config["degree"]))
def test_module_and_circuit_are_the_polynomial_in_rational_arithmetic(config: dict[str, Any]) -> None:
    module = activation(config)
    low, high = module.domain
    points = [Fraction(round(64 * (low + (high - low) * k / 10)), 64) for k in range(11)]
    exact = [exactly(module, x) for x in points]
    values = [float(x) for x in points]
    largest = float(max(map(abs, exact)))
    circuit = module.circuit().converted(Fraction)
    assert max(abs(circuit.run(x) - y) for x, y in zip(points, exact, strict=True)) < Fraction(1, 10**12)
    with torch.no_grad():
        in_float32 = module(torch.tensor(values)).tolist()
        in_float64 = module.double()(torch.tensor(values, dtype=torch.float64)).tolist()
    wanted = [float(y) for y in exact]
    assert in_float64 == pytest.approx(wanted, rel=0, abs=1e-12 * largest)
    assert in_float32 == pytest.approx(wanted, rel=0, abs=2e-5 * largest)


@pytest.mark.parametrize("config", CONFIGS[1:3], ids=lambda config: str(config["degree"]))
def test_derivatives_of_x_and_of_all_coefficients(config: dict[str, Any]) -> None:
    module = activation(config).double()
    parameters = dict(module.named_parameters())
    x = torch.from_numpy(drawn(6)).requires_grad_()

    def function(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))
        return result

    assert torch.autograd.gradcheck(function, (x, *parameters.values()))


def test_groups_gated_use_and_half_precision() -> None:
    groups = build_activation({"name": "composition", "degree": [3, 20], "gate": True, "num_parameters": 2})
    single = build_activation({"name": "composition", "degree": [3, 20], "gate": True})
    with torch.no_grad():
        groups.polynomial_2[1] *= 2
        x = torch.from_numpy(drawn(3, 4)).float()
        assert torch.equal(groups(x)[:, :2], single(x)[:, :2])
        torch.testing.assert_close(groups(x)[:, 2:], 2 * single(x)[:, 2:])
        glu = build_activation({"name": "composition", "degree": [3, 20], "gate": True, "glu": True})
        torch.testing.assert_close(glu(x), single(x[:, :2]) * x[:, 2:])
        imitation = activation(CONFIGS[2])
        coarse = imitation(x.bfloat16())
        both = torch.cat([x[:, :2], x[:, 2:]], dim=1).bfloat16()
        assert torch.equal(glu(both), glu(both.float()).bfloat16())
        for wrong in (torch.zeros(2, 3), torch.zeros(())):
            with pytest.raises(ValueError, match="with glu the last dimension holds two halves"):
                glu(wrong)
        for name in ("composition", "affine"):
            with pytest.raises(TypeError, match="activations take float tensors"):
                build_activation({"name": name})(torch.ones(3, dtype=torch.int64))
    assert coarse.dtype == torch.bfloat16
    assert torch.equal(coarse, imitation(x.bfloat16().float()).bfloat16())  # one rounding, at the end


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config["degree"]))
def test_a_composition_comes_back_from_its_configuration(config: dict[str, Any]) -> None:
    module = activation(config)
    again = build_activation(module.config())
    again.load_state_dict(module.state_dict())
    x = torch.linspace(*module.domain, 33)
    assert torch.equal(again(x), module(x))
    assert again.config() == module.config()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"degree": []}, "degree: expected a number or the degrees"),
        ({"degree": [7, 129]}, "degree: expected an integer from 1 to 128, got 129"),
        ({"degree": 2.5}, "degree: expected an integer from 1 to 128, got 2.5"),
        ({"domain": [3, 1]}, "^domain: expected finite lo < hi"),
        ({"domain": 3}, r"^domain: expected \(lo, hi\)"),
        ({"domain": None}, r"^domain: expected \(lo, hi\), got None"),
        ({"center": "left"}, r"center: expected a number in the domain \[-4.0, 4.0\], got 'left'"),
        ({"center": math.nan}, r"center: expected a number in the domain \[-4.0, 4.0\], got nan"),
        ({"domain": [-1, 1], "center": 2.0}, r"center: expected a number in the domain \[-1.0, 1.0\]"),
        ({"interval": [-1, 1]}, "interval: not for composition"),
    ],
)
def test_what_is_no_composition_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_activation({"name": "composition", **config})


@pytest.mark.parametrize("threshold", [0.01, 0.2, 0.7])
def test_odd_minimax_polynomials_are_those_of_the_theory(threshold: float) -> None:
    numbers, error = odd_minimax(1, threshold)  # c x with the same error at both ends
    assert (numbers[1], error) == pytest.approx((2 / (1 + threshold), (1 - threshold) / (1 + threshold)), rel=1e-6)
    for degree in (3, 7, 15):
        numbers, error = odd_minimax(degree, threshold)
        x = np.linspace(threshold, 1, 20_001)
        off = 1 - chebval(x, numbers)
        assert np.abs(off).max() == pytest.approx(error, rel=1e-3, abs=1e-9)
        if error > 1e-9:  # Chebyshev's alternation: one more extreme than there are terms
            ends = np.flatnonzero(np.abs(off) > 0.999 * error)
            assert 1 + np.count_nonzero(np.diff(np.sign(off[ends]))) == (degree + 1) // 2 + 1


def test_composed_signs_stay_within_one_and_come_close_to_it() -> None:
    polynomials = sign_polynomials((7, 15, 15), 0.004)
    assert polynomials is not None
    x = np.linspace(-1, 1, 20_001)
    for numbers in polynomials:
        x = chebval(x, numbers)
        assert np.abs(x).max() <= 1 + 1e-5
    assert np.abs(x[12_000:] - 1).max() < 0.05
    assert np.abs(x + x[::-1]).max() < 1e-12


@pytest.mark.parametrize(("degree", "constant"), [(8, 0.27751782), (16, 0.27968803)])
def test_the_best_polynomial_for_relu_has_bernsteins_error(degree: int, constant: float) -> None:
    """degree · E_degree(|x|) on [-1, 1] (Varga and Carpenter, 1985); ReLU is (x + |x|) / 2."""
    chain = fit_chain(NAMED["relu"], (-1.0, 1.0), int(math.log2(degree)))
    assert chain.degrees == (degree,)
    x = np.linspace(-1, 1, 100_001)
    error = np.abs(chain.evaluate(x)[0] - sample(NAMED["relu"], x)[0]).max()
    assert error == pytest.approx(constant / degree / 2, rel=0.02)
    assert not chain.polynomials[0][3::2].any()  # a line and an even function


@pytest.mark.parametrize(
    ("name", "domain", "depth", "largest", "products"),
    [
        ("relu", (-8.0, 8.0), 10, 6.5e-3, 18),
        ("gelu", (-32.0, 32.0), 10, 1e-5, 16),
        ("silu", (-30.0, 40.0), 6, 6e-3, 17),
        ("tanh", (-32.0, 32.0), 9, 1e-5, 24),
    ],
)
def test_wide_ranges_take_compositions(
    name: str, domain: tuple[float, float], depth: int, largest: float, products: int
) -> None:
    found = fit_composition(name, domain, depth)
    module = found.build()
    assert isinstance(module, Composition)
    cost = count(module.circuit())
    assert cost.depth <= depth
    assert cost.products <= products
    assert (len(module.degrees) > 1) == (depth > 7)
    fresh = torch.rand(200_000, generator=torch.Generator().manual_seed(1)) * (domain[1] - domain[0]) + domain[0]
    with torch.no_grad():
        error = float((module(fresh).double() - NAMED[name](fresh.double())).abs().max())
    assert error <= found.certificate.maximum
    assert error <= largest
    assert math.isnan(found.certificate.maximum_outside)  # nothing is said of outside


def test_measured_inputs_are_what_is_fitted_and_those_outside_do_not_count() -> None:
    x = np.linspace(-6, 6, 1201)
    measured = (x, np.exp(-(x**2) / 2))
    everywhere = fit_composition("gelu", (-5.0, 5.0), 3)
    here = fit_composition("gelu", (-5.0, 5.0), 3, measured=measured)
    inside = np.abs(x) <= 5
    weights = measured[1] * inside / (measured[1] * inside).sum()

    def error(found: Any) -> float:
        return math.sqrt(float(weights @ (found.curve(x)[0] - sample(NAMED["gelu"], x)[0]) ** 2))

    assert error(here) < 0.6 * error(everywhere)
    assert here.certificate.rms == pytest.approx(error(here), rel=1e-3)
    # x^(-1/2) is asked for nothing outside of (1/4, 4)
    found = fit_composition(lambda t: t.rsqrt(), (0.25, 4.0), 3)
    assert found.certificate.maximum < 0.03
    with pytest.raises(ValueError, match=r"domain: no measured input lies in \(7, 9\); they are -6 … 6"):
        fit_composition("gelu", (7.0, 9.0), 3, measured=measured)


@pytest.mark.parametrize("depth", [1, 6])
def test_inputs_that_a_relu_takes_to_0_are_fitted_by_0(depth: int) -> None:
    x = np.linspace(-7, -2, 101)
    for measured in (None, (x, np.ones(101))):
        found = fit_composition("relu", (-8.0, -1.0), depth, measured=measured)
        assert found.certificate.maximum == 0.0
        assert not found.build()(torch.linspace(-8, -1, 9)).any()


def test_a_target_error_takes_the_smallest_depth_and_then_the_fewest_products() -> None:
    x = np.linspace(-4, 4, 801)
    measured = (x, np.exp(-(x**2) / 2))
    found = fit_composition_to_error("gelu", (-6.0, 6.0), 1e-3, measured=measured)
    cost = count(found.build().circuit())  # type: ignore[operator]
    assert found.certificate.rms <= 1e-3
    with pytest.raises(ValueError, match="depth: expected 1 to 16, got 17"):  # at once, though depth 1 would do
        fit_composition_to_error("relu", (-8.0, -1.0), 1.0, depth=17)
    with pytest.raises(ValueError, match=f"no composition up to depth {cost.depth - 1} reaches 0.001"):
        fit_composition_to_error("gelu", (-6.0, 6.0), 1e-3, depth=cost.depth - 1, measured=measured)
    best = fit_composition("gelu", (-6.0, 6.0), cost.depth, measured=measured)
    assert cost.products <= count(best.build().circuit()).products  # type: ignore[operator]
