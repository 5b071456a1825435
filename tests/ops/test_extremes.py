"""Values that leave the range of floats, infinities, NaN, and sizes that would leave a tensor's memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernels_support import without_kernels
from torch import Tensor

from polytrope.ops import functional, native

INF = math.inf
HALVES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["kernels", "reference"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "kernels":
        assert native.cpu_library() is not None
        yield request.param
    else:
        with without_kernels():
            yield request.param


def rational_exactly(x: list[float], top: list[float], below: list[float]) -> Any:
    """F, dF/dx, dF/da_k and dF/db_j in rational arithmetic of any size."""
    from fractions import Fraction

    values, slopes, tops, belows = [], [], [], []
    a, b = [Fraction(c) for c in top], [Fraction(0), *(Fraction(c) for c in below)]
    for number in x:
        at = Fraction(number)
        inner, p = sum(c * at**j for j, c in enumerate(b)), sum(c * at**k for k, c in enumerate(a))
        sign, q = (inner > 0) - (inner < 0), 1 + abs(inner)
        p_slope = sum(k * c * at ** (k - 1) for k, c in enumerate(a) if k)
        inner_slope = sum(j * c * at ** (j - 1) for j, c in enumerate(b) if j)
        values.append(p / q)
        slopes.append((p_slope - p / q * sign * inner_slope) / q)
        tops.append([at**k / q for k in range(len(a))])
        belows.append([-p / q / q * sign * at**j for j in range(1, len(b))])
    return values, slopes, tops, belows


@pytest.mark.parametrize(
    ("top", "below"),
    [
        ([0.3, -0.8, 0.5, 0.25, -0.4, 0.7], [0.2, -0.6, 0.1, 0.9]),
        ([0.3, -0.8, 0.5, 0.25], [0.2, -0.6, 0.1, 0.9, -0.5]),
        ([0.3, -0.8, 0.5], [0.2, -0.6]),
        ([0.3, -0.8, 0.5, 0.0], [0.2, -0.6, 0.0]),
        ([0.3, -0.8], [0.0, 0.0]),
        ([0.0, 0.0, 0.5, 0.25], [0.0, -0.5]),
        ([0.5, -0.3] * 8 + [0.7], [-0.25, 0.1] * 8),
    ],
)
def test_rational_far_from_zero(way: str, top: list[float], below: list[float]) -> None:
    points = [17.0, -17.0, 300.0, -3e4, 1e6, -1e6, 1e8, -1e8, 0.5, -2.0]
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-6)):
        exact = rational_exactly(torch.tensor(points, dtype=dtype).tolist(), top, below)
        x = torch.tensor(points, dtype=dtype, requires_grad=True)
        a, b = (torch.tensor([numbers], dtype=torch.float64).expand(len(points), -1) for numbers in (top, below))
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        y = functional.rational(x, a, b, dim=0)
        found = (y.detach(), *torch.autograd.grad(y.sum(), (x, a, b)))
        for ours, theirs in zip(found, exact, strict=True):
            limit = torch.finfo(dtype).max
            theirs = torch.tensor(
                [float(v) if abs(v) < limit else INF * ((v > 0) - (v < 0)) for v in flat(theirs)], dtype=torch.float64
            )
            check = ours.double().flatten()
            # In float32 the nearer points are sums of terms of either sign; the reference has such sums everywhere.
            loose = 1e-5 if dtype == torch.float32 else tolerance if way == "kernels" else 1e-6
            torch.testing.assert_close(check, theirs.to(dtype).double(), rtol=loose, atol=1e-37)
        one = functional.rational(x.detach().view(2, 5), a[0], b[0])
        torch.testing.assert_close(one.flatten(), y.detach(), rtol=tolerance, atol=1e-37)


def flat(numbers: Any) -> list[Any]:
    return [v for row in numbers for v in (row if isinstance(row, list) else [row])]


@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
def test_rational_at_infinity_goes_the_way_of_its_leading_term(way: str, dtype: torch.dtype) -> None:
    x = torch.tensor([INF, -INF, math.nan] * 20, dtype=dtype)

    def at_ends(top: list[float], below: list[float]) -> list[float]:
        leaf = x.clone().requires_grad_()
        y = functional.rational(leaf, torch.tensor(top), torch.tensor(below))
        assert y[2::3].isnan().all()
        assert (y[3:5] == y[:2]).all()
        (slope,) = torch.autograd.grad(y.sum(), leaf)
        if way == "kernels":
            assert slope[2::3].isnan().all()
            assert not slope[:2].isnan().any()
        return [round(number, 6) for number in y[:2].tolist()]

    assert at_ends([1.0, 2.0, 3.0, -0.5], [1.0, 2.0]) == [-INF, INF]
    assert at_ends([1.0, 2.0, 3.0], [1.0, -2.0]) == [1.5, 1.5]
    assert at_ends([1.0, 2.0, 3.0, 0.0], [1.0, -2.0, 0.0]) == [1.5, 1.5]
    assert at_ends([1.0, 3.0], [-2.0]) == [1.5, -1.5]
    assert at_ends([1.0, 3.0], [1.0, -2.0]) == [0.0, 0.0]
    assert at_ends([1.0, 3.0, 0.0], [0.0, 0.0]) == [INF, -INF]


def test_second_derivatives_of_rational_far_from_zero() -> None:
    x = torch.tensor([20.0, -1e4, 1e6, 1e8], requires_grad=True)
    y = functional.rational(x, torch.tensor([0.5, 1.0, -2.0, 3.0]), torch.tensor([1.0, 2.0]))
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.testing.assert_close(slope[2:], torch.tensor([1.5, 1.5]))
    (curved,) = torch.autograd.grad(slope.sum(), x)
    assert curved.isfinite().all()
    wide = x.detach().double().requires_grad_()
    y = functional.rational(wide, torch.tensor([0.5, 1.0, -2.0, 3.0]), torch.tensor([1.0, 2.0]))
    (slope,) = torch.autograd.grad(y.sum(), wide, create_graph=True)
    torch.testing.assert_close(curved.double(), torch.autograd.grad(slope.sum(), wide)[0], rtol=1e-4, atol=1e-30)


def polynorm_exactly(x: Tensor, coefficients: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """In float64, whose powers reach further."""
    value = bias.expand_as(x)
    for k, coefficient in enumerate(coefficients, 1):
        power = x**k
        value = value + coefficient * power / torch.sqrt(power.square().mean(-1, keepdim=True) + epsilon)
    return value


@pytest.mark.parametrize("size", [1e-12, 1e-3, 1.0, 30.0, 200.0, 256.0, 1000.0, 1e5, 1e9])
@pytest.mark.parametrize("degree", [3, 8])
@pytest.mark.usefixtures("way")
def test_polynorm_keeps_its_highest_powers(degree: int, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 1531, generator=generator) * size
    x[1] *= 1e-3  # every row has a range of its own
    x[2], x[3, 700:] = 0.0, 0.0
    seed = torch.randn(5, 1531, generator=generator)
    coefficients, bias = torch.linspace(0.5, -1.0, degree), torch.tensor(0.25)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, coefficients, bias)]
    found = functional.polynorm(*leaves)
    exact = [tensor.double().requires_grad_() for tensor in (x, coefficients, bias)]
    expected = polynorm_exactly(*exact, 1e-6)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    theirs = torch.autograd.grad(expected, exact, seed.double())
    for gradient, other in zip(torch.autograd.grad(found, leaves, seed), theirs, strict=True):
        for mine, right in zip(
            gradient.view(5, -1) if gradient.dim() == 2 else [gradient],
            other.view(5, -1) if other.dim() == 2 else [other],
            strict=True,
        ):
            assert (mine.double() - right).abs().max() <= 1e-4 * right.abs().max()


@pytest.mark.usefixtures("way")
def test_polynorm_with_tiny_rows_and_no_epsilon_and_with_the_largest_floats() -> None:
    for size in (1e-30, 1e-10, 1e10, 1e38, 3e38):
        x = torch.linspace(-1.0, 1.0, 64) * size
        y = functional.polynorm(x, torch.ones(8), torch.tensor(0.0), epsilon=0.0)
        exact = polynorm_exactly(torch.linspace(-1.0, 1.0, 64).double(), torch.ones(8), torch.tensor(0.0), 0.0)
        torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-5)
    x = torch.tensor([[1.0, INF, 2.0], [1.0, math.nan, 2.0], [1.0, 2.0, 3.0]])
    y = functional.polynorm(x, torch.ones(3), torch.tensor(0.5))
    assert y[1].isnan().all()
    assert y[2].isfinite().all()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("place", [0, 2, 5])
@pytest.mark.usefixtures("way")
def test_a_maximum_with_a_nan_among_its_coefficients_is_nan(place: int, groups: int) -> None:
    x = torch.linspace(-3.0, 3.0, 90).view(30, 3).requires_grad_()
    coefficients = torch.linspace(1.0, -1.0, 6).expand(groups, -1).clone()
    coefficients[0, place] = math.nan
    y = functional.tropical(x, coefficients)
    (slope,) = torch.autograd.grad(y.sum(), x)
    for result in (y, slope):
        assert result[:, 0].isnan().all()
        assert groups == 1 or result[:, 1:].isfinite().all()
    for part in range(4):
        parts = [torch.linspace(1.0, -1.0, 6).expand(groups, -1).clone() for _ in range(4)]
        parts[part][0, place] = math.nan
        y = functional.tropical_rational(x, *parts)
        (slope,) = torch.autograd.grad(y.sum(), x)
        for result in (y, slope):
            assert result[:, 0].isnan().all()
            assert groups == 1 or result[:, 1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("way")
def test_the_slope_of_a_maximum_is_that_of_its_steepest_line_at_infinity(dtype: torch.dtype) -> None:
    x = torch.tensor([INF, 3e38, -INF, -3e38, 1e35], dtype=dtype, requires_grad=True)
    coefficients = torch.linspace(1.0, -1.0, 6, dtype=torch.float64, requires_grad=True)
    y = functional.tropical(x, coefficients)
    y.backward(torch.ones_like(y))
    root = math.sqrt(2.0)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([root, root, 0.0, 0.0, root], dtype=dtype))
    torch.testing.assert_close(y[2:4], torch.full((2,), root / 5, dtype=dtype))
    assert y[0] == INF
    assert coefficients.grad is not None
    torch.testing.assert_close(coefficients.grad, torch.tensor([2.0, 0, 0, 0, 0, 3.0]).double() * root / 5)
    off = torch.tensor([0.0, -INF, -INF, 1.0])  # lines that are turned off
    torch.testing.assert_close(functional.tropical(torch.zeros(2), off), torch.full((2,), root / 3))


@pytest.mark.parametrize("name", ["activation", "activation_backward", "activation_slope"])
def test_the_operators_refuse_what_does_not_belong_together(name: str) -> None:
    operator = getattr(torch.ops.polytrope, name)
    plain = (3, 0, [], -1, False, 0.0)
    table = torch.zeros(1, 4, dtype=torch.float64)
    # x, parameters, arguments after the family, and a word of the message
    cases: list[tuple[Tensor, Tensor, tuple[Any, ...], str]] = [
        (torch.zeros(2, 6), torch.zeros(1, 101), (1, 100, *plain[1:]), "degree from 1 to 16, got 100"),
        (torch.zeros(2, 6), torch.zeros(1, 1), (1, 0, *plain[1:]), "degree from 1 to 16, got 0"),
        (torch.zeros(2, 6), torch.zeros(1, 5), (1, -3, *plain[1:]), "got -3"),
        (torch.zeros(2, 6), torch.zeros(1, 194), (10, 65, *plain[1:]), "degree from 1 to 64"),
        (torch.zeros(2, 6), torch.zeros(1, 24), (8, 3, 20, *plain[2:]), "denominator"),
        (torch.zeros(2, 6), table, (8, 3, 0, *plain[2:]), "denominator"),
        (torch.zeros(2, 6), table, (1, 3, 2, *plain[2:]), "denominator"),
        (torch.zeros(2, 6), torch.zeros(1, 3), (1, *plain), "expected 4 in each"),
        (torch.zeros(2, 6), torch.zeros(4, 4), (1, *plain), "4 groups do not divide the 6 channels"),
        (torch.zeros(2, 6), torch.zeros(3, 4), (1, 3, 0, [], -3, False, 0.0), "dim: expected -2 to -1"),
        (torch.zeros(2, 6), torch.zeros(3, 4), (1, 3, 0, [], 1, False, 0.0), "dim: expected -2 to -1"),
        (torch.zeros(()), torch.zeros(3, 4), (1, *plain), "dim: expected"),
        (torch.zeros(2, 5), table, (1, 3, 0, [], -1, True, 0.0), "two halves"),
        (torch.zeros(()), table, (1, 3, 0, [], -1, True, 0.0), "two halves"),
        (torch.zeros(2, 6), table, (1, 3, 0, [1.0], -1, False, 0.0), "interval"),
        (torch.zeros(2, 6), table, (1, 3, 0, [1.0, 0.5], -1, False, 0.0), "interval"),
        (torch.zeros(2, 6), table, (6, 3, 0, [0.0, 0.5], -1, False, 0.0), "interval"),
        (torch.zeros(2, 6), torch.zeros(2, 4), (11, *plain), "polynorm"),
        (torch.zeros(()), table, (11, *plain), "polynorm"),
        (torch.zeros(2, 6), table, (13, *plain), "family"),
        (torch.zeros(2, 6), torch.zeros(0, 4), (1, *plain), "group"),
        (torch.zeros(2, 6), torch.zeros(2, 2, 4), (1, *plain), "expected"),
        (torch.zeros(2, 6), table.long(), (1, *plain), "float"),
        (torch.zeros(2, 6).long(), table, (1, *plain), "float"),
    ]
    for x, parameters, arguments, message in cases:
        tensors = (x, parameters) if name == "activation" else (torch.zeros_like(x), x, parameters)
        with pytest.raises((ValueError, TypeError), match=message):
            operator(*tensors, *arguments)
    if name != "activation":
        for gradient in (torch.zeros(2, 5), torch.zeros(12), torch.zeros(2, 6).double()):
            with pytest.raises(ValueError, match="gradient: expected"):
                operator(gradient, torch.zeros(2, 6), table, 1, *plain)


def test_the_library_itself_refuses_degrees_that_its_tables_have_no_room_for() -> None:
    x, parameters = torch.zeros(8), [torch.zeros(1, 4, dtype=torch.float64)]
    from polytrope.ops.families import Family, Formula
    from polytrope.ops.packing import PLAIN

    for family, degree, second in ((Family.HERMITE, 17, 0), (Family.RATIONAL_SPLINE, 65, 0), (Family.RATIONAL, 3, 17)):
        call = native.prepare_for(x, parameters, PLAIN, Formula(Family.HERMITE, 3))
        problem = native._Call.from_buffer_copy(call.structure)
        problem.task.problem.family, problem.task.problem.degree = family, degree
        problem.task.problem.second_degree = second
        problem.task.parts.sizes[0] = 0
        with pytest.raises(RuntimeError, match="no kernel for this family and degree"):
            native.forward(call._replace(structure=problem), x, parameters)


@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 4), (1,)])
def test_scalars_and_empty_tensors(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.full(shape, 0.5, dtype=dtype, requires_grad=True)
    for function, parts in (
        (functional.hermite, [torch.ones(4)]),
        (functional.rational, [torch.ones(4), torch.ones(3)]),
        (functional.tropical, [torch.ones(4)]),
        (functional.harmonic, [torch.tensor(0.0), torch.tensor(1.0), torch.ones(3), torch.ones(3)]),
    ):
        leaves = [part.requires_grad_() for part in parts]
        y = function(x, *leaves)
        assert y.shape == x.shape
        first = torch.autograd.grad(y.sum(), [x, *leaves], create_graph=True)
        assert [g.shape for g in first] == [x.shape, *(leaf.shape for leaf in leaves)]
        second = torch.autograd.grad(sum(g.double().sum() for g in first), [x, *leaves], allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in second)
        tangents = (torch.ones_like(x), *(torch.ones_like(part) for part in parts))
        values = (x.detach(), *(part.detach() for part in parts))
        assert torch.func.jvp(function, values, tangents)[1].shape == x.shape
