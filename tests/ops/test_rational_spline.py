"""Rational-quadratic splines: rising, smooth, invertible, through values and slopes, and as activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from activation_support import inputs
from kernels_support import without_kernels
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from polytrope.ops import Affine, PiecewiseLinear, RationalSpline, build_activation, kernels, moments, reference
from polytrope.ops.families import Family, Formula
from polytrope.ops.functional import piecewise_linear, rational_spline
from polytrope.ops.rational_spline import FLOOR, invert, tied


def random_spline(pieces: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Knots from -3 to 4, heights and slopes."""
    generator = torch.Generator().manual_seed(seed)
    widths, rises, slopes, start = (
        torch.randn(count, generator=generator, dtype=torch.float64) for count in (pieces, pieces, pieces + 1, 1)
    )
    return tied(widths, slopes, rises, start, (-3.0, 4.0))


def through(target: Any, pieces: int, line: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values and slopes of target(x) + line · x at equidistant knots on [-4, 4], and the line."""
    knots = torch.linspace(-4, 4, pieces + 1, dtype=torch.float64, requires_grad=True)
    values = target(knots) + line * knots
    (slopes,) = torch.autograd.grad(values.sum(), knots)
    return knots.detach(), values.detach(), slopes, torch.tensor([line], dtype=torch.float64)


def test_it_rises_goes_through_its_numbers_and_is_inverted_in_closed_form() -> None:
    for seed in range(5):
        knots, heights, slopes = random_spline(seed=seed)
        none = torch.zeros(1, dtype=torch.float64)
        x = torch.linspace(-6, 7, 5001, dtype=torch.float64)
        y = rational_spline(x, knots, heights, slopes, none)
        assert bool((y.diff() > 0).all())
        assert (rational_spline(knots, knots, heights, slopes, none) - heights).abs().max() < 1e-14
        assert (invert(y, knots, heights, slopes) - x).abs().max() < 4e-14 * float(1 / slopes.min().clamp(max=1.0))


def test_values_and_slopes_are_continuous_at_the_knots() -> None:
    knots, heights, slopes = random_spline()
    none = torch.zeros(1, dtype=torch.float64)
    for side in (-1e-9, 0.0, 1e-9):
        x = (knots + side).requires_grad_()
        value = rational_spline(x, knots, heights, slopes, none)
        (slope,) = torch.autograd.grad(value.sum(), x)
        assert (value - heights).abs().max() < 1e-8
        assert (slope - slopes).abs().max() < 1e-6


@pytest.mark.parametrize(("pieces", "error"), [(6, 1.6e-2), (8, 6.2e-3), (12, 1.3e-3), (16, 4.2e-4)])
def test_gelu_is_met_without_a_fit(pieces: int, error: float) -> None:
    """GELU falls, by .1289 at most, so that it needs a line."""
    x = torch.linspace(-4, 4, 20_001, dtype=torch.float64)
    parts = through(nn.functional.gelu, pieces, 0.25)
    assert float((rational_spline(x, *parts) - nn.functional.gelu(x)).abs().max()) == pytest.approx(error, rel=0.05)
    own = RationalSpline(pieces, init="gelu").double()
    assert float((own(x) - nn.functional.gelu(x)).detach().abs().max()) < 1.2 * error


def test_starts() -> None:
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        exact = RationalSpline(7, init="identity", interval=(-3.3, 2.7), dtype=dtype)
        assert torch.equal(exact(x.to(dtype)), x.to(dtype))
    same = RationalSpline(5, init="identity", dtype=torch.float64)
    assert same.config() == {"name": "rational_spline", "degree": 5, "interval": [-4.0, 4.0], "init": "identity"}
    for degree in (1, 8, 64):
        start = moments(RationalSpline(degree, dtype=torch.float64))
        assert (start.value, start.derivative) == (pytest.approx(1.0, abs=1e-6), pytest.approx(1.0, abs=1e-6))
    for name in ("relu", "silu", "tanh"):
        module = RationalSpline(16, init=name, dtype=torch.float64)
        assert (module(x) - getattr(nn.functional, name)(x))[abs(x) < 4].abs().max() < 0.13


def test_it_is_made_in_any_mode() -> None:
    with FakeTensorMode():
        assert RationalSpline()(torch.zeros(3)).shape == RationalSpline(init="gelu")(torch.zeros(3)).shape == (3,)
    with torch.inference_mode():
        assert torch.equal(RationalSpline().rises, RationalSpline().rises)
        assert Affine(base="silu").gain.shape == (1,)


def moved(module: RationalSpline) -> RationalSpline:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def test_any_numbers_give_a_rising_curve_beyond_its_line() -> None:
    with torch.no_grad():
        module = moved(moved(moved(RationalSpline(12, dtype=torch.float64))))
        knots, _, slopes = tied(module.widths, module.slopes, module.rises, module.start, (-4.0, 4.0))
        x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
        assert bool(((module(x) + module.line * x).diff() > 0).all())
    assert float(knots.diff().min()) > 8 * FLOOR
    assert float(slopes.detach().min()) > FLOOR


def test_gradients_are_those_of_the_formula() -> None:
    module = moved(RationalSpline(4, dtype=torch.float64))
    x = 2.5 * inputs(3, 4)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *module.parameters()))
    assert torch.autograd.gradgradcheck(lambda x, *_: module(x), (x, *module.parameters()))


def test_each_group_of_channels_has_numbers_of_its_own() -> None:
    for dim, glu in ((1, False), (-2, False), (-1, True)):
        module = moved(RationalSpline(6, num_parameters=2, dim=dim, glu=glu, dtype=torch.float64))
        x = 2 * inputs(3, 8, 16)
        argument, factor = x.chunk(2, dim=-1) if glu else (x, torch.ones(()))
        parts = []
        for group, part in enumerate(argument.chunk(2, dim=dim)):
            alone = RationalSpline(6, dtype=torch.float64)
            alone.load_state_dict({name: tensor[group] for name, tensor in module.state_dict().items()})
            parts.append(alone(part))
        torch.testing.assert_close(module(x), torch.cat(parts, dim=dim) * factor, rtol=1e-13, atol=1e-13)


def test_narrow_types_scalars_and_the_ends_of_the_line() -> None:
    module = moved(RationalSpline(8, dtype=torch.float64)).float()
    x = inputs(64, 64).float()
    assert torch.equal(module(x.bfloat16()), module(x.bfloat16().float()).bfloat16())
    assert module(torch.tensor(0.5)).shape == ()
    ends = module(torch.tensor([-torch.inf, torch.inf, torch.nan]))
    assert ends[:2].isinf().all()
    assert ends[2].isnan()
    knots, line = torch.linspace(-1, 1, 3), torch.ones(1)
    level = rational_spline(torch.tensor([-torch.inf, 2.0, torch.inf]), knots, knots, torch.ones(3), line)
    assert torch.equal(level, torch.zeros(3))  # not 0 · ∞
    image = inputs(2, 4, 3, 3).float().contiguous(memory_format=torch.channels_last)
    for groups in (1, 2):
        result = RationalSpline(5, num_parameters=groups, dim=1)(image)
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("pieces", [1, 7, 14, 15, 30, 31, 64])
def test_kernels_agree_with_the_reference_at_knots_and_beyond(pieces: int) -> None:
    """Permutations of 16 entries end at 14 and 30 pieces. float32: derivatives of one part, relative to its largest."""
    knots, heights, slopes = random_spline(pieces, seed=2)
    numbers = torch.cat([knots, heights, slopes, torch.tensor([0.4], dtype=torch.float64)])[None]
    formula = Formula(Family.RATIONAL_SPLINE, pieces)
    between = torch.linspace(-5, 6, 3000, dtype=torch.float64)
    for dtype, digits in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        own = knots.to(dtype)  # a rounded knot is on the other side, where the slope is the same
        x = torch.cat([own, torch.nextafter(own, own + 1), torch.nextafter(own, own - 1), between.to(dtype)])
        seed = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
        leaves = (x.double().requires_grad_(), numbers.clone().requires_grad_())
        expected = reference.evaluate(*leaves, formula)
        ours = (x.requires_grad_(), numbers.clone().requires_grad_())
        parts = ours[1].split([pieces + 1, pieces + 1, pieces + 1, 1], dim=-1)
        found = rational_spline(ours[0], *parts)
        assert (found - expected).abs().max() < digits
        exact_gradients = torch.autograd.grad(expected, leaves, seed.double())
        gradients = torch.autograd.grad(found, ours, seed)
        for mine, its in zip(gradients, exact_gradients, strict=True):
            assert (mine - its).abs().max() < 10 * digits * its.abs().max()
        assert torch.equal(torch.autograd.grad(rational_spline(ours[0], *parts), ours, seed)[1], gradients[1])


@pytest.mark.parametrize("line", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("center", [0.0, 10.0, -1e3, 1e5])
@pytest.mark.parametrize("pieces", [1, 8, 64])
def test_far_from_0_float32_is_as_exact_as_near_it(pieces: int, center: float, line: float) -> None:
    """Knots that no float32 is, and a function that is small where x is large: a few units of rounding of its size."""
    knots, heights, slopes = random_spline(pieces, seed=4)
    knots, heights = knots + center, heights + line * center
    parts = (knots, heights, slopes, torch.tensor([line], dtype=torch.float64))
    x = torch.linspace(center - 9, center + 9, 30_001, dtype=torch.float64).float().double()
    seed = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    exact_leaves = [leaf.clone().requires_grad_() for leaf in (x, *parts)]
    packed = torch.cat(exact_leaves[1:])[None]
    exact = reference.evaluate(exact_leaves[0], packed, Formula(Family.RATIONAL_SPLINE, pieces))
    exact_gradients = torch.autograd.grad(exact, exact_leaves, seed.float().double())
    leaves = [x.float().requires_grad_(), *[part.clone().requires_grad_() for part in parts]]
    found = rational_spline(leaves[0], *leaves[1:])
    gradients = torch.autograd.grad(found, leaves, seed.float())
    unit = torch.finfo(torch.float32).eps
    assert float((found - exact).detach().abs().max()) < 3 * unit * float(exact.detach().abs().max())
    slope_of_x, *of_numbers = ((mine - its).abs() for mine, its in zip(gradients, exact_gradients, strict=True))
    steepest = float((slopes.max() + abs(line)) * seed.abs().max())
    assert float(slope_of_x.max()) < 16 * unit * steepest
    for difference, its in zip(of_numbers, exact_gradients[1:], strict=True):
        assert float(difference.max()) < 200 * unit * float(its.abs().max())


@pytest.mark.parametrize("center", [10.0, 1e3, 1e5])
def test_the_reference_itself_loses_nothing_far_from_0(center: float) -> None:
    """A spline moved to a center is the same function of what is left of x, to the digits of its knots there."""
    knots, heights, slopes = random_spline(8)
    none = torch.zeros(1, dtype=torch.float64)
    exactly = knots.float().double()  # these and the center add without rounding
    x = torch.linspace(-6, 7, 1001).double()
    parts = (heights, slopes, none)
    near, far = (
        reference.evaluate(x + at, torch.cat([exactly + at, *parts])[None], Formula(Family.RATIONAL_SPLINE, 8))
        for at in (0.0, center)
    )
    assert torch.equal(exactly + center - center, exactly)
    assert (near - far).abs().max() < 1e-14


def test_what_the_function_takes_is_checked() -> None:
    knots, line = torch.linspace(-1, 1, 4), torch.zeros(1)
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="slopes: expected 4 per group"):
        rational_spline(x, knots, knots, torch.ones(3), line)
    with pytest.raises(ValueError, match="knots: expected pieces from 1 to 64, got 65"):
        rational_spline(x, *[torch.arange(1.0, 67.0)] * 3, line)
    with pytest.raises(ValueError, match=r"line: expected \[1\] or \[groups, 1\], got \[4\]"):
        rational_spline(x, knots, knots, knots, knots)
    rising, one = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.5, 1.0]]), torch.ones(2, 3)
    for wrong, got in (
        ([0.0, 1.0, 1.0], "1.0 before 1.0"),
        ([0.0, 2.0, 1.0], "2.0 before 1.0"),
        ([0.0, torch.nan, 1.0], "0.0 before nan"),
    ):
        numbers = torch.tensor([[0.0, 1.0, 2.0], wrong])
        with pytest.raises(ValueError, match=f"knots: expected rising numbers, got {got}"):
            rational_spline(torch.zeros(4), numbers, rising, one, torch.zeros(2, 1))
        with pytest.raises(ValueError, match=f"heights: expected rising numbers, got {got}"):
            rational_spline(torch.zeros(4), rising, numbers, one, torch.zeros(2, 1))
        with pytest.raises(ValueError, match=f"knots: expected rising numbers, got {got}"):
            piecewise_linear(torch.zeros(4), numbers[1], rising)
    with pytest.raises(ValueError, match=r"slopes: expected numbers above 0, got 0\.0"):
        rational_spline(x, knots, knots, torch.tensor([1.0, 1.0, 0.0, 1.0]), line)
    compiled = torch.compile(rational_spline, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, knots, knots, torch.ones(4), line), x)
    with pytest.raises(RuntimeError, match="knots: expected rising numbers"):
        compiled(x, knots.flip(0), knots, torch.ones(4), line)
    each = torch.func.vmap(rational_spline, in_dims=(0, None, None, None, None))
    assert torch.equal(each(x[:, None], knots, knots, torch.ones(4), line), x[:, None])
    before = kernels.fallbacks["activation"]
    rational_spline(x, knots, knots, torch.ones(4), line)
    assert kernels.fallbacks["activation"] == before
    with without_kernels():
        assert torch.equal(rational_spline(knots, knots, knots, torch.ones(4), line), knots)
    assert kernels.fallbacks["activation"] == before + 1


def test_it_compiles_and_its_plain_form_is_the_same_function() -> None:
    module = moved(RationalSpline(8, dtype=torch.float64))
    form, x = module.plain(), 3 * inputs(200)
    numbers = {name: torch.from_numpy(value) for name, value in form.numbers.items()}
    assert (form.formula(x, numbers) - module(x)).abs().max() < 1e-13
    far = moved(RationalSpline(8, interval=(996.0, 1004.0), init="relu", dtype=torch.float64))
    form, x = far.plain(), torch.linspace(990, 1010, 4001)
    numbers = {name: torch.from_numpy(value).float() for name, value in form.numbers.items()}
    expected = far(x.double())
    assert (form.formula(x, numbers) - expected).abs().max() < 4e-7 * expected.abs().max()
    compiled = torch.compile(module.float(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.float()), module(x.float()))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="interval: expected"):
        build_activation({"name": "rational_spline", "interval": None})
    with pytest.raises(ValueError, match="degree: expected an integer from 1 to 64, got 65"):
        RationalSpline(65)
    with pytest.raises(ValueError, match="2 groups do not divide the 7 channels"):
        RationalSpline(num_parameters=2)(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="init: expected variance_preserving, identity or a function"):
        RationalSpline(init="step")
    for family in (RationalSpline, PiecewiseLinear):
        with pytest.raises(ValueError, match="interval: expected one where the initial function is not constant"):
            family(interval=(-40, -30))
