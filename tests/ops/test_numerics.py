"""Every kernel against the float64 reference: values in ULPs, gradients, special values, reproducibility, strides."""

from __future__ import annotations

import contextlib
import math
import platform
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from activation_support import CONFIGS, activation, by_reference, inputs, label
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_support import without_kernels
from torch import Tensor, nn
from torch.func import functional_call

from polytrope.ops import PiecewiseLinear, build_activation, cuda, functional, native, reference
from polytrope.ops.build import best_level
from polytrope.ops.families import Family, Formula, parameter_count


@pytest.fixture(scope="module", autouse=True)
def kernels_are_compiled() -> None:
    assert native.cpu_library() is not None, "these tests are about the kernels; a C++ compiler is needed"


def gradients(module: nn.Module, x: Tensor, seed: Tensor, function: Any = None) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    y = function(module, leaf) if function else module(leaf)
    return list(torch.autograd.grad(y, [leaf, *module.parameters()], seed))


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_float64_kernels_equal_the_reference(config: dict[str, Any]) -> None:
    module, x = activation(config), inputs(37, 24)
    seed = inputs(37, 24).flip(0)
    torch.testing.assert_close(module(x), by_reference(module, x), rtol=1e-12, atol=1e-12)
    for found, expected in zip(gradients(module, x, seed), gradients(module, x, seed, by_reference), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_gradients_are_those_of_finite_differences(config: dict[str, Any]) -> None:
    module, x = activation(config), inputs(5, 4).requires_grad_()
    names = [name for name, _ in module.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Any:
        return functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *module.parameters()))


@pytest.mark.parametrize("config", [c for c in CONFIGS if c["degree"] < 9], ids=label)
def test_second_derivatives(config: dict[str, Any]) -> None:
    module, x = activation(config), inputs(3, 2).requires_grad_()
    names = [name for name, _ in module.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Any:
        return functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradgradcheck(function, (x, *module.parameters()), atol=1e-4)


# Largest error in ULPs of values at least an eighth of the largest |F| on the input: the table of docs/ops.md.
HALF_ULPS = {torch.bfloat16: 0.51, torch.float16: 0.52}
FLOAT_ULPS = {
    "hermite": 6.0,
    "chebyshev": 6.0,
    "legendre": 9.0,
    "fourier": 16.0,
    "tropical": 2.0,
    "tropical_rational": 3.0,
    "rational": 8.0,
    "polyrelu": 2.0,
    "polynorm": 5.0,
    "piecewise_linear": 2.0,
    "rational_spline": 4.0,
}
# x86 before AVX2 rounds a product before it is added to something: docs/ops.md.
WITHOUT_FUSED = 1.25 if platform.machine() == "x86_64" and best_level() == "DEFAULT" else 1.0


def error_in_ulps(found: Tensor, exact: Tensor) -> float:
    exact = exact.detach()
    scale = exact.abs().clamp(min=float(exact.abs().max()) * 2.0**-3)
    ulp = torch.finfo(found.dtype).eps * 2.0 ** torch.floor(torch.log2(scale))
    return float(((found.detach().double() - exact).abs() / ulp).max())


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_ULPS], ids=str)
@pytest.mark.parametrize("config", [c for c in CONFIGS if c["degree"] < 9], ids=label)
def test_the_error_in_units_of_the_last_place(config: dict[str, Any], dtype: torch.dtype) -> None:
    config = {**config, "init": "variance_preserving"}  # of polynomials all terms are positive: nothing cancels
    module = activation(config, torch.float32)
    x = torch.linspace(-3.0, 3.0, 20_000).view(100, 200).to(dtype)
    exact = by_reference(activation(config, torch.float32).double(), x.double())
    found = module(x)
    assert found.dtype == dtype
    assert error_in_ulps(found, exact) <= HALF_ULPS.get(dtype, WITHOUT_FUSED * FLOAT_ULPS[config["name"]])


@pytest.mark.parametrize("degree", [1, 3, 8, 12, 16])
@pytest.mark.parametrize("name", ["hermite", "chebyshev", "legendre"])
def test_the_error_as_a_part_of_terms_that_cancel(name: str, degree: int) -> None:
    function, x = getattr(functional, name), torch.linspace(-3.0, 3.0, 5_001)
    wide, units = x.double(), torch.eye(degree + 1, dtype=torch.float64)
    for seed in range(4):
        coefficients = torch.randn(degree + 1, generator=torch.Generator().manual_seed(seed))
        error = (function(x, coefficients).double() - function(wide, coefficients.double())).abs()
        terms = torch.stack([function(wide, unit) for unit in units]).abs().T @ coefficients.double().abs()
        assert float((error / terms.clamp(min=1e-3 * float(terms.max()))).max()) <= WITHOUT_FUSED * 10 * 2**-24


@pytest.mark.parametrize("frequency", [1.0, 7.5, 300.0])
def test_the_sine_of_large_arguments_is_as_exact_as_that_of_small_ones(frequency: float) -> None:
    x = torch.linspace(-1000.0, 1000.0, 100_001)
    one = torch.tensor([1.0])
    found = functional.fourier(x, torch.tensor(0.0), one, frequency * one, 0.3 * one)
    exact = torch.cos(x.double() * float(torch.tensor(frequency)) - float(torch.tensor(0.3)))
    assert float((found.double() - exact).abs().max()) < 4e-7
    found = functional.harmonic(x, torch.tensor(0.0), torch.tensor(frequency), 0.6 * one, 0.8 * one)
    angle = x.double() * float(torch.tensor(frequency))
    exact = float(0.6 * one) * torch.cos(angle) + float(0.8 * one) * torch.sin(angle)
    assert float((found.double() - exact).abs().max()) < 4e-7


@pytest.mark.parametrize("degree", [1, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_harmonics_stay_bounded_and_nan_stays_nan(degree: int, dtype: torch.dtype) -> None:
    ones = torch.full((degree,), 1.0)
    x = torch.tensor([math.nan, math.inf, -math.inf, 1e6, -1e12, 3e38] * 32).to(dtype).requires_grad_()
    y = functional.harmonic(x, torch.tensor(0.5), torch.tensor(3.0), ones, ones)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    for result in (y.detach(), x.grad):
        special, finite = result.view(32, 6)[:, :3], result.view(32, 6)[:, 3:]
        assert special.isnan().all()
        assert finite.abs().max() <= 0.5 + 3.0 * 2.0 * math.e


@pytest.mark.parametrize("interval", [None, (-1.0, 1.5)])
@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_harmonics_of_equal_weight_stay_exact(degree: int, interval: tuple[float, float] | None) -> None:
    """float32 takes powers of cos 2θ up to degree 8, the float64 kernel a recurrence."""
    generator = torch.Generator().manual_seed(degree)
    factorials = torch.tensor([math.factorial(k) for k in range(1, degree + 1)])
    weights = [torch.randn(degree, generator=generator) * factorials for _ in range(2)]
    x, seed = torch.randn(2, 20_000, generator=generator)
    found = []
    for dtype in (torch.float32, torch.float64):
        tensors = [x, torch.tensor(0.3), torch.tensor(1.7), *weights]
        tensors = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        value = functional.harmonic(*tensors, interval=interval)
        found.append([value.detach(), *torch.autograd.grad(value, tensors, seed.to(dtype))])
    value_error, *gradient_errors = (
        float((single.double() - exact).abs().max() / exact.abs().max()) for single, exact in zip(*found, strict=True)
    )
    assert value_error < WITHOUT_FUSED * (12 if degree <= 8 else 24) * 2**-24
    assert max(gradient_errors) < 2e-5  # of sums that nearly cancel; shorter vectors add up more in each lane


def test_the_tropical_maximum_takes_the_lowest_line_of_a_tie() -> None:
    coefficients = torch.zeros(4, requires_grad=True)
    x = torch.zeros(3, requires_grad=True)
    functional.tropical(x, coefficients).sum().backward()
    assert coefficients.grad is not None
    assert coefficients.grad.nonzero().flatten().tolist() == [0]
    assert torch.equal(x.grad, torch.zeros(3))  # the slope of line 0


@pytest.mark.parametrize("name", ["hermite", "chebyshev", "legendre"])
def test_polynomials_at_infinity_go_the_way_of_their_leading_term(name: str) -> None:
    function = getattr(functional, name)
    x = torch.tensor([-math.inf, math.inf, math.nan, -1e30, 1e30])
    odd = function(x, torch.tensor([1.0, -2.0, 0.5, 1.0]))
    even = function(x, torch.tensor([1.0, -2.0, 0.5, 1.0, -1.0]))
    assert odd[[0, 1, 3, 4]].tolist() == [-math.inf, math.inf, -math.inf, math.inf]
    assert even[[0, 1, 3, 4]].tolist() == [-math.inf] * 4
    assert odd[2].isnan()
    assert even[2].isnan()


def test_special_values_of_the_other_families() -> None:
    x = torch.tensor([-math.inf, math.inf, math.nan])
    tropical = functional.tropical(x, torch.ones(4))
    assert tropical[0].item() == pytest.approx(math.sqrt(2.0) / 3.0)
    assert tropical[1].item() == math.inf
    assert tropical[2].isnan()
    slopes = torch.tensor([0.0, 1.0])
    level = functional.tropical_rational(x, slopes, torch.zeros(2), slopes, torch.ones(2))
    assert level[0].item() == -1.0  # max(0, x) - max(1, x + 1)
    assert level[1].isfinite()
    assert level[2].isnan()
    assert functional.fourier(x, torch.tensor(0.0), torch.ones(2), torch.ones(2), torch.zeros(2)).isnan().all()
    assert functional.polyrelu(x, torch.tensor([0.5, 1.0]))[0].item() == 0.5
    knots = torch.tensor([-1.0, 0.0, 1.0])
    lines = functional.piecewise_linear(x, knots, torch.tensor([0.0, 0.0, 1.0]))
    assert lines[:2].tolist() == [0.0, math.inf]


def test_the_slope_at_zero_is_not_zero() -> None:
    x = torch.zeros(1, requires_grad=True)
    module = build_activation({"name": "hermite", "degree": 3, "init": "torchortho"})
    module(x).sum().backward()
    # F' = sum_k a_k He_{k-1}(0) / (k-1)! = (1 - 1/2) / sqrt(e)
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(0.5 / math.sqrt(math.e), rel=1e-6)


def test_outside_the_interval_the_function_is_its_tangent() -> None:
    module = activation({"name": "hermite", "degree": 6, "interval": [-1.0, 2.0]})
    at = torch.tensor([-1.0, 2.0], dtype=torch.float64, requires_grad=True)
    value = module(at)
    (slope,) = torch.autograd.grad(value.sum(), at)
    far = torch.tensor([-50.0, 50.0], dtype=torch.float64)
    torch.testing.assert_close(module(far), value + slope * (far - at))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_gradients_are_bitwise_the_same_every_time_and_for_every_number_of_threads(config: dict[str, Any]) -> None:
    module = activation(config, torch.float32)
    x, seed = inputs(1031, 257, dtype=torch.float32), inputs(257, 1031, dtype=torch.float32).t()
    first = gradients(module, x, seed)
    for threads in (2, 2, 1, 3):
        torch.set_num_threads(threads)
        for found, expected in zip(gradients(module, x, seed), first, strict=True):
            assert torch.equal(found, expected)


# In rows of 205 channels, each with coefficients of its own or each 5 together; kernels see 205 channels either way.
GROUPED: list[dict[str, Any]] = [
    *(config for config in CONFIGS if config["name"] != "polynorm"),
    {"name": "fourier", "degree": 12, "harmonic": True},
    {"name": "hermite", "degree": 4, "glu": True},
    {"name": "fourier", "degree": 3, "glu": True, "interval": [-1.0, 1.5]},
]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("config", GROUPED, ids=label)
def test_coefficients_of_channels(config: dict[str, Any], channels: int) -> None:
    grouped = config | {"num_parameters": 205 // channels}
    width = 410 if config.get("glu") else 205
    module, x, seed = activation(grouped), inputs(517, width), inputs(517, 205).flip(0)
    torch.testing.assert_close(module(x), by_reference(module, x), rtol=1e-12, atol=1e-12)
    expected = gradients(module, x, seed, by_reference)
    for found, exact in zip(gradients(module, x, seed), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(module(x[:1]), by_reference(module, x[:1]), rtol=1e-12, atol=1e-12)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 1e-2)):
        narrow = activation(grouped, torch.float32)
        first = gradients(narrow, x.to(dtype), seed.to(dtype))
        expected = gradients(module, x.to(dtype).double(), seed.to(dtype).double(), by_reference)
        for found, exact in zip(first, expected, strict=True):
            assert (found.double() - exact).norm() <= tolerance * exact.norm()
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for found, again in zip(gradients(narrow, x.to(dtype), seed.to(dtype)), first, strict=True):
                assert torch.equal(found, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["hermite", "fourier", "tropical_rational", "polynorm"])
def test_parameters_of_any_float_dtype(name: str, dtype: torch.dtype) -> None:
    module = activation({"name": name, "degree": 4}, dtype)
    exact, x, seed = activation({"name": name, "degree": 4}), inputs(64, 48), inputs(64, 48).flip(0)
    exact.load_state_dict(module.state_dict())
    for found, expected in zip(gradients(module, x, seed), gradients(exact, x, seed, by_reference), strict=True):
        rounded = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-10}[found.dtype]
        torch.testing.assert_close(found.double(), expected, rtol=rounded, atol=rounded * float(expected.abs().max()))


@pytest.fixture
def without_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every tensor is larger than the cache."""

    def forget() -> None:
        native.prepare.cache_clear()
        functional._prepare.cache_clear()

    monkeypatch.setattr(native, "last_level_cache", lambda: 0)
    forget()
    yield
    forget()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_tensors_larger_than_the_cache_give_the_same_bits(
    config: dict[str, Any], dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    module = activation(config, torch.float32)
    x, seed = inputs(5, 3090, dtype=dtype), inputs(3090, 5, dtype=dtype).t()
    expected = gradients(module, x, seed)
    request.getfixturevalue("without_cache")
    for found, exact in zip(gradients(module, x, seed), expected, strict=True):
        assert torch.equal(found, exact)


@pytest.mark.parametrize("center", [0.0, 10.0, -1e3, 1e5])
@pytest.mark.parametrize("pieces", [2, 8, 64])
def test_broken_lines_are_as_exact_far_from_0_as_near_it(pieces: int, center: float) -> None:
    """Against lines from knot to knot in float64. All begin at one point, so that the steepest says how exactly."""
    generator = torch.Generator().manual_seed(0)
    interval = [center - 4, center + 4]
    config = {"name": "piecewise_linear", "degree": pieces, "interval": interval, "init": "relu"}
    module = activation(config, torch.float32)
    assert isinstance(module, PiecewiseLinear)
    with torch.no_grad():
        module.values.copy_(torch.randn(pieces + 1, generator=generator))
    knots, values = module.knots, module.values.detach().double()
    x = torch.linspace(center - 6, center + 6, 20_001, dtype=torch.float64).float()
    seed = torch.randn(x.shape, generator=generator)
    piece = torch.searchsorted(knots[1:-1].contiguous(), x.double())
    share = (x.double() - knots[piece]) / knots.diff()[piece]
    exact = values[piece] + values.diff()[piece] * share
    size = exact.abs().max() + 8 * (values.diff() / knots.diff()).abs().max()
    expected = torch.zeros_like(values)
    expected.index_add_(0, piece, seed.double() * (1 - share)).index_add_(0, piece + 1, seed.double() * share)
    terms = torch.zeros_like(values)  # what is added up, without its signs
    terms.index_add_(0, piece, seed.double().abs() * (1 - share)).index_add_(0, piece + 1, seed.double().abs() * share)
    for kernel in (True, False):
        with contextlib.nullcontext() if kernel else without_kernels():
            found = module(x)
            (gradient,) = torch.autograd.grad(found, module.values, seed)
        assert (found.double() - exact).abs().max() < 2.0**-23 * size
        assert (gradient.double() - expected).abs().max() < 2.0**-21 * terms.max()
    form = module.plain()
    numbers = {name: torch.from_numpy(value).float() for name, value in form.numbers.items()}
    assert (form.formula(x, numbers).double() - exact).abs().max() < 2.0**-21 * size * math.sqrt(pieces)


def parts_of(formula: Formula, packed: Tensor) -> tuple[Tensor, ...]:
    """The parameters as `functional` takes them."""
    n, m = formula.degree, formula.second_degree
    factorials = torch.tensor([float(math.factorial(k)) for k in range(1, n + 1)], dtype=torch.float64)
    if formula.family == Family.FOURIER:
        bias, amplitudes, frequencies, phases = packed.split([1, n, n, n], dim=-1)
        return bias.squeeze(-1), amplitudes * factorials, frequencies, phases
    if formula.family == Family.HARMONIC:
        bias, frequency, cosines, sines = packed.split([1, 1, n, n], dim=-1)
        return bias.squeeze(-1), frequency.squeeze(-1), cosines * factorials, sines * factorials
    if formula.family == Family.TROPICAL_RATIONAL:
        return packed.split(n + 1, dim=-1)
    if formula.family == Family.RATIONAL:
        return packed.split([n + 1, m], dim=-1)
    if formula.family == Family.RATIONAL_SPLINE:
        return packed.split([n + 1, n + 1, n + 1, 1], dim=-1)
    if formula.family == Family.POLYNORM:
        bias, coefficients = packed.split([1, n], dim=-1)
        return bias.squeeze(-1), coefficients
    return (packed,)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_stride_dtype_degree_and_grouping(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(list(Family)))
    degree = data.draw(st.integers(1, 16))
    second = data.draw(st.integers(1, 6)) if family == Family.RATIONAL else 0
    shape = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
    by_rows = family == Family.POLYNORM
    gated = not by_rows and data.draw(st.booleans())
    groups = 1 if by_rows else data.draw(st.sampled_from([1, 2, 3]))
    dim = -1 if gated else -data.draw(st.integers(1, len(shape)))
    if groups > 1:
        shape[dim] = groups * shape[dim]
    if gated:
        shape[-1] *= 2
    interval = (-0.7, 1.1) if family not in native.WITHOUT_INTERVAL and data.draw(st.booleans()) else ()
    where, epsilon = dim if groups > 1 else -1, 0.01 if by_rows else 0.0
    formula = Formula(family, degree, second, interval, where, gated, epsilon)
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    order = data.draw(st.permutations(range(len(shape))))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    x = torch.rand([shape[k] for k in order], generator=generator, dtype=torch.float64).mul(2).sub(1).to(dtype)
    x = x.permute([order.index(k) for k in range(len(shape))])
    parameters = torch.rand(groups, parameter_count(formula), generator=generator, dtype=torch.float64) - 0.4
    parameters = cuda.possible(parameters, formula)
    leaves = (x.detach().requires_grad_(), parameters.requires_grad_())
    exact = (x.detach().double().requires_grad_(), parameters)
    parts = parts_of(formula, parameters)
    found = functional._apply(family, leaves[0], parts, dim, interval or None, gated, epsilon)
    expected = reference.evaluate(*exact, formula)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * (1 + degree))
    if family in (Family.TROPICAL, Family.TROPICAL_RATIONAL, Family.PIECEWISE_LINEAR) or dtype != torch.float64:
        return  # slopes jump at kinks, which rounding may cross
    seed = torch.rand(found.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, seed), torch.autograd.grad(expected, exact, seed), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("factor", [1.0, 1.1, 2.0**-30, -3e38])
def test_every_bfloat16_is_rounded_to_nearest_even(factor: float) -> None:
    """All 65,536 of them, subnormal numbers, infinities and NaN too, times a number that makes more of these."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).requires_grad_()
    y = functional.polynomial(x, torch.tensor([0.0, factor]))
    y.backward(x.detach())
    expected = (x.detach().float() * torch.tensor(factor)).bfloat16()
    for found in (y.detach(), x.grad):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_more_elements_than_31_bits_count() -> None:
    count = 2**31 + 2**13
    x = torch.from_numpy(np.zeros(count, dtype=np.uint16)).view(torch.bfloat16)  # pages nobody writes take no memory
    x[-(2**12) :] = 1.25  # in the gating half of the last row
    x[-(2**13) : -(2**12)] = 2.0
    rows = x.view(count // 2**13, 2**13)
    y = functional.hermite(rows, torch.tensor([0.5, 1.0]), glu=True)
    assert y[0].unique().tolist() == [0.0]
    assert y[-1].unique().tolist() == [2.5 * 1.25]


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_only_x_is_saved_for_backward(config: dict[str, Any]) -> None:
    module, x = activation(config, torch.float32), inputs(64, 512, dtype=torch.float32).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        module(x)
    large = [tensor for tensor in saved if tensor.numel() > 1000]
    assert [tensor.data_ptr() for tensor in large] == [x.data_ptr()]
