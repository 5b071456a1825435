"""Modules: initial moments, per-channel coefficients, gated use, states, refusals; and how they behave inside torch."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from activation_support import CONFIGS, CONTROL, FAMILIES, activation, inputs, label, moments
from torch import nn

from polytrope.ops import (
    Hermite,
    PiecewiseLinear,
    PolyNorm,
    Rational,
    Tropical,
    build_activation,
    functional,
    is_learnable_activation,
    kernels,
)


@pytest.mark.parametrize("degree", range(1, 13))
@pytest.mark.parametrize("name", FAMILIES)
def test_the_initialisation_preserves_variance_forwards_and_backwards(name: str, degree: int) -> None:
    harmonic = name == "harmonic"
    config: dict[str, Any] = {"name": "fourier" if harmonic else name, "degree": degree}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        module = build_activation(config | ({"harmonic": True} if harmonic else {}))
    finally:
        torch.set_default_dtype(before)
    assert moments(module) == pytest.approx((1.0, 1.0), abs=1e-6)


@pytest.mark.parametrize("degree", range(1, 13))
def test_every_line_of_a_fresh_tropical_activation_is_somewhere_the_largest(degree: int) -> None:
    module = Tropical(degree)
    x = torch.linspace(-4, 4, 4001)
    module(x).sum().backward()
    assert module.coefficients.grad is not None
    assert (module.coefficients.grad > 0).all()


def test_polynorm_preserves_variance_on_long_rows() -> None:
    x = torch.randn(4, 2**17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for degree in (1, 2, 3):
        assert float(PolyNorm(degree).double()(x).square().mean()) == pytest.approx(1.0, abs=0.02)


def test_the_published_moments_are_those_of_the_published_initialisation() -> None:
    value, slope = moments(Hermite(3, init="torchortho").double())
    assert (round(value, 3), round(slope, 3)) == (0.92, 0.92)


@pytest.mark.parametrize("name", ["hermite", "fourier", "tropical", "rational", "polyrelu", "piecewise_linear"])
def test_an_activation_can_start_as_another_function(name: str) -> None:
    degree = 32 if name == "piecewise_linear" else 8
    for init in ("gelu", nn.GELU(), nn.functional.gelu):
        module = (
            build_activation({"name": name, "degree": degree, "interval": None, "init": init})
            if name not in ("tropical", "piecewise_linear")
            else build_activation({"name": name, "degree": degree, "init": init})
        )
        x = torch.linspace(-3, 3, 301)
        assert float((module(x) - nn.functional.gelu(x)).abs().max()) < 0.2
    with pytest.raises(ValueError, match=r"expected one of gelu"):
        build_activation({"name": name, "degree": 4, "init": "gelru"})


@pytest.mark.parametrize("config", [*(c for c in CONFIGS if c["name"] != "polynorm"), CONTROL], ids=label)
@pytest.mark.parametrize(("shape", "dim"), [((4, 6), -1), ((2, 6, 5), 1), ((6, 3), 0)])
def test_groups_of_channels_have_coefficients_of_their_own(
    config: dict[str, Any], shape: tuple[int, ...], dim: int
) -> None:
    module = activation(config | {"num_parameters": 3, "dim": dim})
    x = inputs(*shape).requires_grad_()
    y = module(x)
    y.sum().backward()
    for group in range(3):
        single = build_activation(config).double()
        with torch.no_grad():
            for own, shared in zip(single.parameters(), module.parameters(), strict=True):
                own.copy_(shared[group])
        part = x.detach().narrow(dim, 2 * group, 2).contiguous().requires_grad_()
        torch.testing.assert_close(y.narrow(dim, 2 * group, 2), single(part))
        single(part).sum().backward()
        for own, shared in zip(single.parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(shared.grad[group], own.grad)  # type: ignore[index]
        torch.testing.assert_close(x.grad.narrow(dim, 2 * group, 2), part.grad)  # type: ignore[union-attr]


@pytest.mark.parametrize("config", [*(c for c in CONFIGS if c["name"] != "polynorm"), CONTROL], ids=label)
def test_gated_use_multiplies_by_the_other_half(config: dict[str, Any]) -> None:
    gated, plain = activation(config | {"glu": True}), activation(config)
    x = inputs(7, 10).requires_grad_()
    other = x.detach().requires_grad_()
    expected = plain(other[:, :5]) * other[:, 5:]
    torch.testing.assert_close(gated(x), expected)
    gated(x).sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    for ours, theirs in zip(gated.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("config", [*CONFIGS, CONTROL], ids=label)
def test_a_module_is_built_again_from_its_configuration_and_state(config: dict[str, Any]) -> None:
    module = activation(config, torch.float32)
    again = build_activation(module.config())  # type: ignore[operator]
    again.load_state_dict(module.state_dict())
    x = inputs(3, 8, dtype=torch.float32)
    assert torch.equal(again(x), module(x))
    assert is_learnable_activation(again)
    assert not is_learnable_activation(nn.GELU())


def test_batched_gradients_and_traces_see_the_operator() -> None:
    module, x = Hermite(3), torch.randn(5, requires_grad=True)
    value = module(x)
    (rows,) = torch.autograd.grad(value, x, torch.eye(5), is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(rows, torch.autograd.grad(value.sum(), x)[0].diag())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "polytrope::activation" in str(torch.jit.trace(module, x.detach()).graph)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[2] | {"glu": True}, CONFIGS[15]], ids=label)
def test_operators_pass_opcheck(config: dict[str, Any]) -> None:
    module, x = activation(config), inputs(3, 4).requires_grad_()
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "polytrope":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Record():
        module(x).sum().backward()
    assert [operator._opname for operator, _ in calls] == ["activation", "activation_backward"]
    for operator, arguments in calls:
        detached = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.library.opcheck(operator, tuple(detached))


@pytest.mark.parametrize("config", [*CONFIGS, CONTROL], ids=label)
def test_vmap_and_per_sample_gradients(config: dict[str, Any]) -> None:
    module, x = activation(config), inputs(4, 3, 6)
    torch.testing.assert_close(torch.vmap(module)(x), torch.stack([module(one) for one in x]))
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Any], one: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.func.functional_call(module, parameters, (one,)).square().sum()
        return result

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    module.zero_grad()
    module(x).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(per_sample[name].sum(0), parameter.grad)


def test_autocast_keeps_coefficients_in_float32_and_the_output_in_the_dtype_of_x() -> None:
    module = nn.Sequential(nn.Linear(8, 16), Hermite(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(torch.randn(4, 8))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert module[1].coefficients.grad.dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize("config", [*CONFIGS, CONTROL], ids=label)
def test_the_meta_device_and_empty_tensors(config: dict[str, Any]) -> None:
    module = activation(config, torch.float32)
    empty = torch.empty(0, 4, requires_grad=True)
    module(empty).sum().backward()
    assert empty.grad is not None
    assert all(torch.count_nonzero(parameter.grad) == 0 for parameter in module.parameters())
    assert module.to("meta")(torch.empty(3, 4, device="meta")).shape == (3, 4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "hermite", "degree": 0}, "degree: expected an integer from 1 to 16, got 0"),
        ({"name": "hermite", "degree": 17}, "degree: expected an integer from 1 to 16, got 17"),
        ({"name": "fourier", "degree": 2.5}, "degree: expected an integer"),
        ({"name": "hermite", "interval": [2.0, 1.0]}, "interval: expected finite lo < hi"),
        ({"name": "hermite", "interval": [1.0]}, "interval: expected"),
        ({"name": "tropical", "interval": [0.0, 1.0]}, "interval: not for"),
        ({"name": "hermite", "num_parameters": 0}, "num_parameters: expected an integer of at least 1"),
        ({"name": "legendre", "init": "torchortho"}, "init: torchortho has no legendre"),
        ({"name": "rational", "denominator_degree": 20}, "denominator_degree: expected an integer from 1 to 16"),
        ({"name": "piecewise_linear", "degree": 65}, "degree: expected an integer from 1 to 64"),
        ({"name": "hermite", "deg": 3}, "activation 'hermite'"),
        ({"name": "hermit"}, "expected one of gelu"),
        ({"name": "gelu", "degree": 3}, "takes no options"),
    ],
)
def test_a_wrong_configuration_is_refused_with_what_is_accepted(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_activation(config)


def test_wrong_tensors_are_refused_with_what_is_accepted() -> None:
    with pytest.raises(TypeError, match=r"activations take float tensors .* got torch\.int64"):
        Hermite(3)(torch.arange(4))
    with pytest.raises(ValueError, match="3 groups do not divide the 4 channels"):
        Hermite(3, num_parameters=3)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="with glu the last dimension holds two halves"):
        Hermite(3, glu=True)(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"coefficients: expected \[count\] or \[groups, count\]"):
        functional.hermite(torch.zeros(2), torch.zeros(1, 1, 4))
    with pytest.raises(ValueError, match="phases: expected 3 per group"):
        functional.fourier(torch.zeros(2), torch.zeros(()), torch.zeros(3), torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="coefficients: expected a degree from 1 to 16, got 0"):
        functional.hermite(torch.zeros(2), torch.zeros(1))


def test_tensors_that_are_not_what_they_look_like() -> None:
    y, coefficients = torch.tensor([0.3, -0.7], dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    expected = functional.hermite(-y, coefficients)
    torch.testing.assert_close(functional.hermite(torch._neg_view(y), coefficients), expected)
    torch.testing.assert_close(functional.hermite(-y, torch._neg_view(-coefficients)), expected)
    zeros = torch._efficientzerotensor(2, dtype=torch.float64)
    torch.testing.assert_close(functional.hermite(zeros, coefficients), functional.hermite(0 * y, coefficients))
    for gradient in (torch._neg_view(y), torch._efficientzerotensor(2, dtype=torch.float64)):
        x = (-y).requires_grad_()
        (found,) = torch.autograd.grad(functional.hermite(x, coefficients), x, gradient)
        (exact,) = torch.autograd.grad(functional.hermite(x, coefficients), x, gradient.clone() + 0.0)
        torch.testing.assert_close(found, exact)


def test_tensors_that_a_transform_has_left_behind() -> None:
    kept = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        kept.append(x * 1.0)
        return x.sum()

    x, module = torch.randn(5), Hermite(3)
    torch.func.grad(loss)(x)
    torch.testing.assert_close(module(kept[0]), module(x))


def test_the_default_device_is_not_asked() -> None:
    x, module = torch.randn(5, 8), Hermite(3)
    expected = module(x)
    with torch.device("meta"):
        assert torch.equal(module(x), expected)


def test_parameters_that_are_not_floats() -> None:
    x = torch.randn(5, dtype=torch.float64)
    found = functional.hermite(x, torch.tensor([0, 1, 0, 2]))
    torch.testing.assert_close(found, functional.hermite(x, torch.tensor([0.0, 1.0, 0.0, 2.0])))
    with pytest.raises(TypeError, match=r"coefficients: expected real numbers, got torch\.complex64"):
        functional.hermite(x, torch.ones(4, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"coefficients: expected as many groups in each, at least one, got \[0\]"):
        functional.hermite(x, torch.zeros(0, 4))


def test_an_epsilon_that_changes_is_heeded() -> None:
    x, epsilon = torch.randn(3, 5), torch.tensor(0.1)
    small = functional.polynorm(x, torch.ones(2), torch.zeros(()), epsilon=epsilon)  # type: ignore[arg-type]
    epsilon.fill_(10.0)
    large = functional.polynorm(x, torch.ones(2), torch.zeros(()), epsilon=epsilon)  # type: ignore[arg-type]
    assert large.abs().max() < small.abs().max()


def test_without_kernels_the_reference_runs_after_one_warning(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from polytrope.ops import native

    monkeypatch.setenv("POLYTROPE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.cpu_library.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="no compiler found .*no-such-compiler; set CXX") as caught:
            y = nn.Sequential(Hermite(3), Hermite(3))(torch.zeros(2))
        assert len(caught) == 1
        assert not kernels.has_kernel("cpu", None, torch.float32)
    finally:
        monkeypatch.undo()
        native.cpu_library.cache_clear()
    torch.testing.assert_close(nn.Sequential(Hermite(3), Hermite(3))(torch.zeros(2)), y)


def test_knots_and_denominators_of_other_sizes() -> None:
    assert Rational(1).denominator is None
    torch.testing.assert_close(
        PiecewiseLinear(4, interval=(-1, 1), init="relu")(torch.tensor([-3.0, 0.5])), torch.tensor([0.0, 0.5])
    )


def test_parameters_on_another_device_are_refused() -> None:
    module = build_activation({"name": "hermite", "degree": 3}).to("meta")
    with pytest.raises(RuntimeError, match="x is on cpu, the parameters of its activation on meta"):
        module(torch.zeros(8))
