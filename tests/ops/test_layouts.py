"""Tensors of any layout are computed as they lie and come back as they came, rows alone as in company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from polytrope.ops import build_activation, cuda, functional, native
from polytrope.ops.families import Family, Formula, parameter_count
from polytrope.ops.packing import PLAIN

CONFIGS: list[dict[str, Any]] = [
    {"name": "hermite", "degree": 3},
    {"name": "hermite", "degree": 4, "interval": [-1.0, 1.5], "num_parameters": 3, "dim": 1},
    {"name": "fourier", "degree": 4, "harmonic": True, "num_parameters": 12, "dim": 1},
    {"name": "rational", "degree": 5, "num_parameters": 2, "dim": 2},
    {"name": "tropical_rational", "degree": 4, "glu": True, "num_parameters": 2},
    {"name": "legendre", "degree": 4, "glu": True},
    {"name": "polynorm", "degree": 3},
    {"name": "piecewise_linear", "degree": 8, "num_parameters": 4, "dim": 1},
    {"name": "rational_spline", "degree": 5, "num_parameters": 4, "dim": 1},
]


def label(config: dict[str, Any]) -> str:
    return "-".join(f"{value}" for value in config.values())


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "sliced": lambda x: torch.cat([x, x], dim=2)[:, :, :6],
    "sliced channels_last": lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, :12],
    "every second": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "expanded": lambda x: x[:1].expand(5, -1, -1, -1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_any_layout(config: dict[str, Any], layout: str, dtype: torch.dtype) -> None:
    module = build_activation(config).double()
    contiguous = numbers(5, 12, 6, 8, dtype=dtype)
    x = LAYOUTS[layout](contiguous)
    ours, theirs = x.detach().requires_grad_(), x.contiguous().requires_grad_()
    found, exact = module(ours), module(theirs)
    assert found.stride() == native.empty_result(x, Formula(0, 1, gated=config.get("glu", False))).stride()
    tolerance = {torch.float64: 1e-10, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)
    seed = numbers(*found.shape, dtype=dtype, seed=6)
    for gradient in (seed, torch.empty_like(found).copy_(seed)):
        mine = torch.autograd.grad(found, [ours, *module.parameters()], gradient, retain_graph=True)
        others = torch.autograd.grad(exact, [theirs, *module.parameters()], seed, retain_graph=True)
        assert mine[0].stride() == torch.empty_like(x).stride()
        for one, other in zip(mine, others, strict=True):
            torch.testing.assert_close(one, other, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_fake_tensors_have_the_strides_of_real_ones(config: dict[str, Any], layout: str) -> None:
    module = build_activation(config)
    x = LAYOUTS[layout](numbers(5, 12, 6, 8, dtype=torch.float32))
    real = module(x.detach().requires_grad_())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        leaf = mode.from_tensor(x).requires_grad_()
        fake = module(leaf)
        (gradient,) = torch.autograd.grad(fake.sum(), leaf)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert gradient.stride() == torch.empty_like(x).stride()


def test_a_dense_tensor_is_neither_copied_nor_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    x = numbers(4, 16, 8, 8, dtype=torch.float32).to(memory_format=torch.channels_last).requires_grad_()
    coefficients = numbers(16, 4, dtype=torch.float32).requires_grad_()
    taken: list[int] = []
    own = native.placed

    def placed(tensor: Tensor, strides: Any) -> Tensor:
        found = own(tensor, strides)
        taken.append(found.data_ptr() - tensor.data_ptr())
        return found

    monkeypatch.setattr(native, "placed", placed)
    y = functional.hermite(x, coefficients, dim=1)
    y.backward(torch.ones_like(y))
    assert taken == [0, 0, 0]  # x forward; gradient and x backward
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_channels_that_lie_side_by_side_are_computed_by_channel() -> None:
    shape, formula = torch.Size((4, 16, 8, 8)), Formula(Family.HERMITE, 3, dim=-3)
    strides = torch.empty(shape).to(memory_format=torch.channels_last).stride()
    problem = native.make_problem(torch.float32, shape, 16, formula, strides)
    assert (problem.outer, problem.groups, problem.inner) == (256, 16, 1)


def test_saved_tensors_that_come_back_with_other_strides() -> None:
    x = numbers(3, 8, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    coefficients = numbers(8, 4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        y = functional.hermite(x, coefficients, dim=1)
    found = torch.autograd.grad(y, [x, coefficients], y.detach())
    y = functional.hermite(x.contiguous(), coefficients, dim=1)
    for ours, theirs in zip(found, torch.autograd.grad(y, [x, coefficients], y.detach()), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("family", [family for family in Family if family != Family.POLYNORM], ids=str)
def test_a_row_has_the_same_bits_whatever_else_is_in_the_batch(family: Family, gated: bool, dtype: torch.dtype) -> None:
    """Groups of several channels: from 256 rows on they are computed by channel."""
    for degree in (4, 8):
        formula = Formula(family, degree, 4 if family == Family.RATIONAL else 0, (), -1, gated)
        parameters = cuda.possible(numbers(6, parameter_count(formula)) * 0.3, formula)
        x = numbers(300, 6 * 20 * (2 if gated else 1), dtype=dtype)
        x[7, ::5] *= 40
        results = []
        for batch in (x, x[:8], x[7:8]):
            call = native.prepare_for(batch, [parameters], PLAIN, formula)
            value = native.forward(call, batch, [parameters])
            results.append([value, native.backward(call, torch.ones_like(value), batch, [parameters])[0]])
            results.append([value, native.backward(call, torch.ones_like(value), batch, [parameters], frozen=True)[0]])
        for of_value, of_gradient in results:
            row = 0 if len(of_value) == 1 else 7
            assert torch.equal(of_value[row], results[0][0][7])
            assert torch.equal(of_gradient[row], results[0][1][7])


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_frozen_coefficients_have_no_sums(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradient for x, in eager and through the operators, and the kernels are asked for nothing else."""
    module = build_activation(config)
    x = numbers(300, 12, 2, 8, dtype=torch.float32).requires_grad_()
    value = module(x)
    seed = numbers(*value.shape, dtype=torch.float32, seed=6)
    (exact,) = torch.autograd.grad(value, x, seed)
    asked: list[bool] = []
    original = native.backward

    def backward(*arguments: Any, frozen: bool = False) -> Any:
        asked.append(frozen)
        return original(*arguments, frozen=frozen)

    monkeypatch.setattr(native, "backward", backward)
    module.requires_grad_(False)
    assert torch.equal(torch.autograd.grad(module(x), x, seed)[0], exact)
    torch._dynamo.reset()  # the limit of recompilations counts the modules of the other cases
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x, seed)[0], exact)
    (differentiable,) = torch.autograd.grad(module(x), x, seed, create_graph=True)
    torch.testing.assert_close(differentiable, exact)
    is_lowered = config["name"] in ("hermite", "chebyshev", "legendre", "polyrelu")  # compiled, it asks no kernel
    assert asked == [True] * (2 if is_lowered else 3)
    formula, packed = Formula(Family.HERMITE, 3), numbers(1, 4)
    call = native.prepare_for(x, [packed], PLAIN, formula)
    assert original(call, x, x, [packed], frozen=True)[1] == []


@pytest.mark.parametrize(("shape", "order"), [((3, 1, 4), (2, 0, 1)), ((2, 5, 1, 3), (0, 3, 1, 2))], ids=str)
def test_rows_of_one_number_are_rows_wherever_their_strides_put_them(
    shape: tuple[int, ...], order: tuple[int, ...]
) -> None:
    """A dimension of size 1 has the stride of its neighbour: where it stands in memory cannot be told from strides."""
    x = numbers(*shape).permute(order)
    assert x.shape[-1] == 1
    assert not x.is_contiguous()
    module = build_activation({"name": "polynorm", "degree": 3}).double()
    torch.testing.assert_close(module(x), module(x.contiguous()), rtol=0, atol=0)
