"""How activations start: moments under N(0, 1) with tangents, stability with depth, functions to imitate."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from activation_support import FAMILIES, moments
from torch import Tensor, nn

import polytrope.ops
from polytrope.ops import Moments, build_activation
from polytrope.ops.fitting.targets import NAMED
from polytrope.ops.modules import LEARNABLE

POLYNOMIALS = ["hermite", "chebyshev", "legendre"]


def build(name: str, **options: Any) -> nn.Module:
    harmonic = {"name": "fourier", "harmonic": True} if name == "harmonic" else {"name": name}
    return build_activation(harmonic | {"dtype": torch.float64} | options)


def by_trapezoids(module: nn.Module, variance: float) -> float:
    """E[F(√q z)²] from half a million points that know of no kink."""
    z = torch.linspace(-12.0, 12.0, 2**19, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    with torch.no_grad():
        return float(torch.trapezoid(density * module(math.sqrt(variance) * z).square(), z))


@pytest.mark.parametrize("interval", [(-2.0, 2.0), (-4.0, 4.0), (-0.5, 3.0), (0.5, 2.0)], ids=str)
@pytest.mark.parametrize("degree", [1, 2, 3, 5, 8, 12])
@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("tropical")])
def test_the_initialisation_counts_the_tangents(name: str, degree: int, interval: tuple[float, float]) -> None:
    for init in ("variance_preserving", *(["stable"] if name in POLYNOMIALS else [])):
        module = build(name, degree=degree, interval=interval, init=init)
        assert moments_between(module, interval) == pytest.approx((1.0, 1.0), abs=1e-9)


def moments_between(module: nn.Module, interval: tuple[float, float]) -> tuple[float, float]:
    """`activation_support.moments`, with panels that end where the tangents begin."""
    from numpy.polynomial.legendre import leggauss

    edges = np.unique([*np.linspace(-12.0, 12.0, 97), *interval, 0.0, *module.kinks()])  # type: ignore[operator]
    nodes, rule = leggauss(16)
    half = np.diff(edges)[:, None] / 2
    x = torch.from_numpy((edges[:-1, None] + half + half * nodes).ravel()).requires_grad_()
    weights = torch.from_numpy((half * rule).ravel()) * torch.exp(-(x.detach() ** 2) / 2) / math.sqrt(2 * math.pi)
    y = module(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return float(weights @ y.detach().square()), float(weights @ slope.square())


@pytest.mark.parametrize("name", LEARNABLE)
def test_no_start_is_the_default_one(name: str) -> None:
    given, default = build_activation({"name": name, "init": None}), build_activation(name)
    assert given.config() == default.config()  # type: ignore[operator]
    for parameter, expected in zip(given.parameters(), default.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_without_tangents_hermite_8_was_far_from_variance_1_on_a_narrow_interval() -> None:
    """The coefficients that are right on the whole line: the figures of the report that this mends."""
    module = build("hermite", degree=8, interval=(-2.0, 2.0))
    with torch.no_grad():
        everywhere = build("hermite", degree=8, init="variance_preserving")
        module.coefficients.copy_(everywhere.coefficients)  # type: ignore[operator, union-attr, arg-type]
    assert moments_between(module, (-2.0, 2.0)) == pytest.approx((0.84, 0.67), abs=0.005)


def test_an_interval_without_a_slope_is_refused() -> None:
    with pytest.raises(ValueError, match=r"interval: expected one where the initial function is not constant.*-3\.0"):
        build("polyrelu", interval=(-3.0, -1.0))


@pytest.mark.parametrize("degree", range(1, 17))
@pytest.mark.parametrize("name", POLYNOMIALS)
def test_stable_polynomials_keep_both_moments_and_contract_the_map_of_variances(name: str, degree: int) -> None:
    module = build(name, degree=degree, init="stable")
    assert moments(module) == pytest.approx((1.0, 1.0), abs=1e-6)
    found = polytrope.ops.moments(module)
    t = 1 / sum(1 / math.factorial(k) for k in range(degree))
    t *= math.sqrt(1 - 1 / math.factorial(degree)) + sum(1 / math.factorial(k) for k in range(1, degree - 1))
    slope = 1.0 if degree == 1 else 1 - t
    assert (found.value, found.derivative, found.slope) == pytest.approx((1.0, 1.0, slope), abs=1e-9)
    rounded = {2: 0.646, 3: 0.235, 4: 0.070, 8: 0.0}
    assert round(found.slope, 3) == rounded.get(degree, round(found.slope, 3))
    positive = build(name, degree=degree, init="variance_preserving")
    unstable = polytrope.ops.moments(positive)
    assert unstable.slope == pytest.approx(1.0 if degree == 1 else 1 + t, abs=1e-9)
    x = torch.linspace(-2, 2, 101, dtype=torch.float64)
    if name != "hermite":
        torch.testing.assert_close(module(x), build("hermite", degree=degree, init="stable")(x), rtol=1e-6, atol=1e-9)
    assert "init" not in module.config()  # type: ignore[operator]
    assert positive.config()["init"] == "variance_preserving"  # type: ignore[operator]
    torch.testing.assert_close(build(name, degree=degree).coefficients, module.coefficients, rtol=0, atol=0)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_every_quadratic_with_both_moments_1_loses_what_fluctuates_beyond_the_same_point(share: float) -> None:
    """So there is no better start of degree 2 than `stable`, which has a share of 0.5."""
    quadratic = build("hermite", degree=2)
    with torch.no_grad():
        signs = (math.sqrt(share / 2), math.sqrt(1 - share), -math.sqrt(share))
        quadratic.coefficients.copy_(torch.tensor(signs, dtype=torch.float64))  # type: ignore[operator, union-attr]
    found = polytrope.ops.moments(quadratic)
    assert (found.value, found.derivative) == pytest.approx((1.0, 1.0), abs=1e-12)
    assert found.slope == pytest.approx(1 - share / math.sqrt(2), abs=1e-12)
    other = 1 + math.sqrt(8) / 3
    assert by_trapezoids(quadratic, other) == pytest.approx(other, rel=1e-9)
    assert by_trapezoids(quadratic, other + 0.1) > other + 0.1
    assert 1 < by_trapezoids(quadratic, other - 0.1) < other - 0.1
    if share == 0.5:
        stable = build("hermite", degree=2, init="stable").coefficients
        torch.testing.assert_close(quadratic.coefficients, stable)


def test_the_stable_start_tends_to_a_cosine() -> None:
    x = torch.linspace(-3, 3, 101, dtype=torch.float64)
    cosine = math.sqrt(2) * torch.cos(x - math.pi / 4)
    torch.testing.assert_close(build("hermite", degree=16, init="stable")(x), cosine, rtol=1e-5, atol=1e-5)


def deep_nets(module: nn.Module) -> Tensor:
    """`[30 layers, 12 nets, 64 inputs]`: second moments in random nets of width 256 without normalisation."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 64, 256, generator=generator)
    found = []
    with torch.no_grad():
        for _ in range(30):
            x = module(x) @ (torch.randn(12, 256, 256, generator=generator) / 16)
            found.append(x.square().mean(2).nan_to_num(math.inf))
    return torch.stack(found)


@pytest.mark.parametrize("degree", range(1, 9))
def test_deep_nets_without_normalisation_keep_their_variance_from_the_stable_start(degree: int) -> None:
    stable = deep_nets(build("hermite", degree=degree, init="stable", dtype=torch.float32))
    typical = stable.flatten(1).median(1).values
    assert 0.85 < typical.min() <= typical.max() < 1.1
    if degree != 2:  # which loses the inputs that reach 1.94, where its map of variances has another fixed point
        mean = stable.mean((1, 2))
        assert 0.9 < mean.min() <= mean.max() < 1.1
        assert 0.7 < stable.mean(2).min() <= stable.mean(2).max() < 1.4  # each net by itself, of width 256
    else:  # tangents outside a narrow interval move that fixed point away
        mean = deep_nets(build("hermite", degree=2, init="stable", interval=(-2.0, 2.0), dtype=torch.float32)).mean(
            (1, 2)
        )
        assert 0.9 < mean.min() <= mean.max() < 1.1
    if degree >= 2:
        unstable = build("hermite", degree=degree, init="variance_preserving", dtype=torch.float32)
        positive = deep_nets(unstable)[-1]
        assert (positive > 1e6).any(1).all()
        assert positive.median() > 1e6 or positive.median() < 0.3


@pytest.mark.parametrize("interval", [None, (-1.5, 2.0)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_moments_are_those_of_what_runs(name: str, interval: tuple[float, float] | None) -> None:
    options = {} if interval is None or name.startswith("tropical") else {"interval": interval}
    module = build(name, degree=4, **options)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    found = polytrope.ops.moments(module)
    step = 1e-3
    assert found.value == pytest.approx(by_trapezoids(module, 1.0), rel=1e-7)
    slope = (by_trapezoids(module, 1 + step) - by_trapezoids(module, 1 - step)) / (2 * step)
    assert found.slope == pytest.approx(slope, rel=1e-4)
    if name != "piecewise_linear":
        kinks = tuple(module.kinks()) or (0.0,)  # type: ignore[operator]
        ends = options.get("interval", (min(kinks), max(kinks)))
        assert found.derivative == pytest.approx(moments_between(module, ends)[1], rel=1e-6)


def test_moments_of_other_modules_and_of_polynorm() -> None:
    gelu = polytrope.ops.moments(nn.GELU())
    assert (gelu.value, gelu.derivative) == pytest.approx((0.425, 0.456), abs=5e-4)
    assert gelu.slope / gelu.value == pytest.approx(1.144, abs=5e-4)
    relu = polytrope.ops.moments(nn.ReLU())
    assert (relu.value, relu.derivative, relu.slope) == pytest.approx((0.5, 0.5, 0.5), abs=1e-9)
    polynorm = build("polynorm", degree=3)
    assert polytrope.ops.moments(polynorm) == Moments(pytest.approx(1.0), pytest.approx(1.0), 0.0)  # type: ignore[arg-type]
    for options in ({"glu": True}, {"num_parameters": 2}):
        with pytest.raises(ValueError, match="only activations with one set of coefficients"):
            polytrope.ops.moments(build("hermite", **options))
    with pytest.raises(ValueError, match="not elementwise"):
        polytrope.ops.moments(nn.Softmax(-1))


def error(module: nn.Module, target: Any, low: float, high: float) -> float:
    x = torch.linspace(low, high, 501, dtype=torch.float64)
    with torch.no_grad():
        return float((module(x) - target(x)).abs().max())


@pytest.mark.parametrize("target", ["gelu", "silu", "tanh", "softplus"])
def test_harmonics_start_as_a_function(target: str) -> None:
    module = build("harmonic", degree=8, interval=(-4.0, 4.0), init=target)
    assert error(module, NAMED[target], -4, 4) < 0.02
    again = build_activation(module.config() | {"dtype": torch.float64})  # type: ignore[operator]
    again.load_state_dict(module.state_dict())
    x = torch.linspace(-5, 5, 11, dtype=torch.float64)
    assert torch.equal(again(x), module(x))


def test_rationals_of_any_denominator_start_as_a_function() -> None:
    for degree, below, bound in ((5, 4, 0.02), (5, 2, 0.1), (4, 4, 0.05), (6, 0, 0.1)):
        module = build("rational", degree=degree, denominator_degree=below, init="gelu", interval=(-4.0, 4.0))
        assert error(module, NAMED["gelu"], -4, 4) < bound, (degree, below)


def test_polynorm_starts_as_a_function_on_long_normal_rows() -> None:
    x = torch.randn(8, 2**16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    module = build("polynorm", degree=6, init="gelu")
    assert float((module(x) - NAMED["gelu"](x)).square().mean()) < 1e-3


def test_a_learned_recurrence_starts_as_a_function() -> None:
    module = build("legendre", degree=8, learnable_recurrence=True, init="gelu", interval=(-4.0, 4.0))
    assert error(module, NAMED["gelu"], -4, 4) < 0.02


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "rational", "init": "stable"}, "init: stable is for hermite, chebyshev, legendre, not for rational"),
        ({"name": "polynorm", "init": "stable"}, "init: stable is for hermite, chebyshev, legendre, not for polynorm"),
        ({"name": "hermite", "init": "stabel"}, "init: expected stable, variance_preserving, torchortho or a function"),
        ({"name": "polynorm", "num_parameters": 2}, "num_parameters, dim and glu: not for polynorm"),
        ({"name": "polynorm", "interval": [-1.0, 1.0]}, "interval: not for polynorm"),
        ({"name": "hermite", "degree": 16, "interval": [90.0, 100.0], "init": "tanh"}, "rounding in float32"),
    ],
)
def test_a_start_that_a_family_does_not_have_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_activation(config)


@pytest.mark.parametrize("name", ["hermite", "chebyshev", "legendre"])
@pytest.mark.parametrize("interval", [[0.0, 1e-6], [-1e-7, 0.0], [90.0, 90.5]])
def test_an_interval_that_spoils_a_start_is_named_with_ways_out_that_work(name: str, interval: list[float]) -> None:
    """Powers of x cannot tell such inputs apart; the degree is not to blame."""
    config: dict[str, Any] = {"name": name, "degree": 8, "interval": interval, "init": "gelu"}
    with pytest.raises(ValueError, match=rf"interval: {name} of degree 8 on \[") as caught:
        build_activation(config)
    ways = re.search(
        r"give it variable: (\[.*?\]), or (\[.*?\]) is wide enough, or leave interval out$", str(caught.value)
    )
    assert ways is not None, caught.value
    variable, wide = map(json.loads, ways.groups())
    module = build_activation({**config, "variable": variable})
    assert error(module, NAMED["gelu"], *interval) < 1e-6 * max(1.0, interval[1])
    assert wide[0] < interval[0] < interval[1] < wide[1]
    build_activation({**config, "interval": wide})
    build_activation({**config, "interval": None})


def test_an_interval_in_which_a_rational_start_is_no_number_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"interval: rational of degree 3 on \[0, 1e-30\] is no finite number in float32"
    ):
        build_activation({"name": "rational", "degree": 3, "interval": [0.0, 1e-30], "init": "gelu"})


def test_what_a_class_says_is_what_its_modules_do() -> None:
    from polytrope.ops.modules import LEARNABLE

    def takes(name: str, **options: Any) -> bool:
        try:
            module = build_activation({"name": name, **options})
        except ValueError:
            return False
        return isinstance(module(torch.zeros(2, 4)), Tensor)

    for name, family in LEARNABLE.items():
        assert takes(name, interval=[-1.0, 1.0]) == family.accepts_interval
        assert takes(name, num_parameters=2) == takes(name, glu=True) == family.accepts_groups
        assert takes(name, init="torchortho") == family.published
        assert takes(name, init="stable") == ("stable" in family.starts)
        assert takes(name, init="gelu")
