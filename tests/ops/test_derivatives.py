"""Derivatives of every order and kind: against plain torch in float64, and against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels_support import without_kernels
from torch import Tensor, nn
from torch.autograd import forward_ad

from polytrope.ops import Hermite, build_activation, functional, native

CONFIGS: list[dict[str, Any]] = [
    {"name": "hermite", "degree": 5},
    {"name": "hermite", "degree": 6, "interval": [-1.0, 1.5]},
    {"name": "hermite", "degree": 4, "learnable_recurrence": True},
    {"name": "hermite", "degree": 4, "glu": True},
    {"name": "hermite", "degree": 5, "num_parameters": 3},
    {"name": "chebyshev", "degree": 5},
    {"name": "legendre", "degree": 6},
    {"name": "fourier", "degree": 4},
    {"name": "fourier", "degree": 3, "interval": [-1.0, 1.5]},
    {"name": "fourier", "degree": 5, "harmonic": True},
    {"name": "fourier", "degree": 4, "harmonic": True, "num_parameters": 2, "interval": [-1.0, 1.5]},
    {"name": "tropical", "degree": 6},
    {"name": "tropical_rational", "degree": 6},
    {"name": "rational", "degree": 5},
    {"name": "rational", "degree": 3, "denominator_degree": 4, "interval": [-1.0, 1.5]},
    {"name": "polyrelu", "degree": 5},
    {"name": "polynorm", "degree": 3},
    {"name": "piecewise_linear", "degree": 8},
    {"name": "rational_spline", "degree": 6},
]


def label(config: dict[str, Any]) -> str:
    return "-".join(f"{value}" for value in config.values())


def activation(config: dict[str, Any]) -> nn.Module:
    """In float64, with parameters a little away from the initial ones."""
    module = build_activation(config).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


@pytest.fixture(scope="module", autouse=True)
def kernels_are_compiled() -> None:
    assert native.cpu_library() is not None, "these tests are about the kernels; a C++ compiler is needed"


def points() -> Tensor:
    return torch.tensor([[0.7, 0.2, -0.45, 1.2, -1.9, 2.1], [0.31, -0.8, 1.7, -0.6, 0.9, -2.4]], dtype=torch.float64)


def derivatives(module: nn.Module, x: Tensor, orders: int = 4) -> list[Tensor]:
    """u, u_x … of u = m(x) sin x, and the gradients of the sum of squares of each for x and for the parameters."""
    x = x.clone().requires_grad_()
    value = module(x)
    u = value * torch.sin(x[..., : value.shape[-1]])
    found = []
    for order in range(orders + 1):
        if order:
            (u,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        leaves = [x, *module.parameters()]
        gradients = torch.autograd.grad(u.square().sum(), leaves, retain_graph=True, allow_unused=True)
        found += [u.detach(), *(g if g is not None else torch.zeros_like(x) for g in gradients)]
    return found


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_gradients_of_a_loss_on_derivatives_up_to_the_fourth(config: dict[str, Any]) -> None:
    module = activation(config)
    found = derivatives(module, points())
    with without_kernels():
        expected = derivatives(module, points())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * (1 + float(theirs.abs().max())))


def test_the_gradient_of_a_loss_on_the_second_derivative_has_these_values() -> None:
    """Worked out with the polynomials He_k / k! and autograd through plain torch."""
    module = Hermite(5, init="variance_preserving").double()
    x = torch.tensor([0.7, 0.2], dtype=torch.float64, requires_grad=True)
    u = module(x) * torch.sin(x)
    for _ in range(2):
        (u,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (u**2).sum().backward()
    expected = torch.tensor([-1.70, 5.58, 5.15, -0.99, -1.85, -0.09], dtype=torch.float64)
    torch.testing.assert_close(module.coefficients.grad, expected, rtol=0, atol=0.005)


def test_a_physics_loss_in_float32_is_that_in_float64() -> None:
    wide, narrow = Hermite(5).double(), Hermite(5)
    for ours, theirs in zip(derivatives(narrow, points().float(), 3), derivatives(wide, points(), 3), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5 * (1 + float(theirs.abs().max())))


@pytest.mark.parametrize("frozen", ["x", "coefficients"])
def test_higher_derivatives_where_one_of_the_two_is_frozen(frozen: str) -> None:
    def third(function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        x, c = (tensor.clone() for tensor in (points(), torch.linspace(0.5, -0.7, 6, dtype=torch.float64)))
        leaf = (c if frozen == "x" else x).requires_grad_()
        value = torch.tanh(function(x, c)).sum()
        for _ in range(3):
            (first,) = torch.autograd.grad(value, leaf, create_graph=True)
            value = first.square().sum()
        return first.detach()

    found = third(functional.hermite)
    with without_kernels():
        expected = third(functional.hermite)
    assert float(expected.abs().max()) > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "config",
    [*CONFIGS, {"name": "affine"}, {"name": "composition", "degree": [3, 4]}],
    ids=label,
)
def test_forward_mode(config: dict[str, Any]) -> None:
    """Along a direction in x and in every parameter, also over reverse mode: a product with the Hessian."""
    module, x = activation(config), points()
    names = [name for name, _ in module.named_parameters()]
    values = (x, *(parameter.detach() for parameter in module.parameters()))
    directions = tuple(torch.cos(torch.arange(v.numel(), dtype=v.dtype)).view(v.shape) for v in values)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))
        return result

    def loss(*arguments: Tensor) -> Tensor:
        return function(*arguments).square().sum()

    with without_kernels():
        expected = torch.autograd.functional.jvp(function, values, directions)[1]
        curved = torch.autograd.functional.hvp(loss, values, directions)[1]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(v, d) for v, d in zip(values, directions, strict=True)]
        found = forward_ad.unpack_dual(function(*duals)).tangent
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.func.jvp(function, values, directions)[1], expected, rtol=1e-10, atol=1e-10)
    gradient = torch.func.grad(loss, argnums=tuple(range(len(values))))
    for ours, theirs in zip(torch.func.jvp(gradient, values, directions)[1], curved, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_tangent_that_comes_in_backward_only() -> None:
    x, direction = points().requires_grad_(), points().flip(0)
    module = activation({"name": "legendre", "degree": 5})
    value = module(x)
    (exact,) = torch.autograd.grad(value, x, direction, retain_graph=True)
    with forward_ad.dual_level():
        seed = forward_ad.make_dual(torch.ones_like(value), direction)
        (gradient,) = torch.autograd.grad(value, x, seed)
        tangent = forward_ad.unpack_dual(gradient).tangent
    torch.testing.assert_close(tangent, exact)


def test_jacobians_and_linearize() -> None:
    module, x = activation({"name": "fourier", "degree": 4}), points()[0]
    slope = torch.autograd.grad(module(y := x.clone().requires_grad_()).sum(), y)[0]
    torch.testing.assert_close(torch.func.jacfwd(module)(x), slope.diag())
    torch.testing.assert_close(torch.func.jacrev(module)(x), slope.diag())
    torch.testing.assert_close(torch.func.linearize(module, x)[1](x), slope * x)
    torch.testing.assert_close(torch.vmap(torch.func.grad(module))(x), slope)
    hessian = torch.autograd.functional.hessian(lambda x: module(x).sum(), x, vectorize=True)
    torch.testing.assert_close(hessian, torch.func.hessian(lambda x: module(x).sum())(x))


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[8], CONFIGS[13]], ids=label)
def test_batched_derivatives_of_derivatives(config: dict[str, Any]) -> None:
    """`is_grads_batched`: vmap over backward, of the first and of the second derivative."""
    module, x = activation(config), points()[0].clone().requires_grad_()
    basis = torch.eye(x.numel(), dtype=x.dtype)
    value = module(x)
    (first,) = torch.autograd.grad(value, x, basis, is_grads_batched=True, create_graph=True)
    (single,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    torch.testing.assert_close(first, single.diag())
    (second,) = torch.autograd.grad(single, x, basis, is_grads_batched=True, create_graph=True)
    (curved,) = torch.autograd.grad(single.sum(), x, create_graph=True)
    torch.testing.assert_close(second, curved.diag())
    (third,) = torch.autograd.grad(curved.sum(), x, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(second.diagonal().sum(), x)[0], third)


def square(x: Tensor) -> Tensor:
    coefficients = torch.tensor([0.3, 0.8, -0.4, 0.6], dtype=torch.float64)
    return functional.hermite(x, coefficients, interval=(-1.0, 1.5)).square().sum()


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "grad": torch.func.grad(square),
    "vmap of grad": torch.vmap(torch.func.grad(square)),
    "hessian": torch.func.hessian(square),
    "jvp": lambda x: torch.func.jvp(square, (x,), (torch.ones_like(x),))[1],
    "vmap": torch.vmap(square),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_compiled_transforms(name: str) -> None:
    torch._dynamo.reset()
    function, x = TRANSFORMS[name], points()[0]
    torch.testing.assert_close(torch.compile(function, backend="aot_eager", fullgraph=True)(x), function(x))


@pytest.mark.parametrize("name", ["activation", "activation_backward", "activation_slope"])
def test_the_operators_keep_what_they_promise_the_compiler(name: str) -> None:
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    parameters = torch.full((3, 4), 0.3, dtype=torch.float64, requires_grad=True)
    tensors = (x, parameters) if name == "activation" else (torch.ones_like(x).contiguous(), x, parameters)
    operator = getattr(torch.ops.polytrope, name).default
    torch.library.opcheck(operator, (*tensors, 1, 3, 0, [], -3, False, 0.0))
