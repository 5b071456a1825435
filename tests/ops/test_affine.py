"""The control: gain · f(input_scale · x + input_shift) + offset."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from activation_support import activation, inputs
from torch import nn

from polytrope.ops import Affine, build_activation, moments
from polytrope.ops.fitting.targets import NAMED


@pytest.mark.parametrize("base", list(NAMED))
def test_it_starts_as_its_function_or_preserving_the_variance(base: str) -> None:
    x = inputs(4, 33, dtype=torch.float32)
    same = build_activation({"name": "affine", "init": base})
    assert torch.equal(same(x), NAMED[base](x))
    assert same.config() == {"name": "affine", "base": base}
    start = moments(Affine(base=base).double())
    assert (start.value, start.derivative) == (pytest.approx(1.0, abs=1e-6), pytest.approx(1.0, abs=1e-6))


def test_each_group_of_channels_has_numbers_of_its_own() -> None:
    for dim, glu in ((1, False), (-2, False), (-1, True)):
        module = activation({"name": "affine", "base": "gelu", "num_parameters": 2, "dim": dim, "glu": glu})
        x = inputs(3, 8, 16)
        argument, factor = x.chunk(2, dim=-1) if glu else (x, torch.ones(()))
        parts = []
        for group, part in enumerate(argument.chunk(2, dim=dim)):
            a, d, b, c = (parameter[group] for parameter in module.parameters())
            parts.append(a * nn.functional.gelu(b * part + c) + d)
        torch.testing.assert_close(module(x), torch.cat(parts, dim=dim) * factor)
    with pytest.raises(ValueError, match="coefficients: 2 groups do not divide the 7 channels of dimension -1"):
        Affine(num_parameters=2)(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="dim: expected -1…0 for x of shape"):
        Affine(num_parameters=2, dim=1)(torch.zeros(4))
    with pytest.raises(ValueError, match="two halves"):
        Affine(glu=True)(torch.zeros(3))


def test_gradients_are_those_of_the_formula_and_narrow_types_are_rounded_once() -> None:
    module = activation({"name": "affine", "base": "silu"})
    x = inputs(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *module.parameters()))
    assert torch.autograd.gradgradcheck(lambda x, *_: module(x), (x, *module.parameters()))
    narrow, exact = inputs(64, 64).bfloat16(), module.bfloat16()
    assert torch.equal(exact(narrow), module.float()(narrow.float()).bfloat16())
    assert Affine()(torch.tensor(0.5)).shape == ()


def test_it_compiles_without_a_break() -> None:
    module = activation({"name": "affine", "base": "gelu_tanh", "num_parameters": 4}, torch.float32)
    x = inputs(3, 8, dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


def test_kinks_move_with_the_argument() -> None:
    module = Affine(base="relu6")
    with torch.no_grad():
        module.input_scale.fill_(2.0)
        module.input_shift.fill_(-1.0)
    assert module.kinks() == pytest.approx([0.5, 3.5])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"name": "affine", "base": "relu", "init": "gelu"},
            "init: expected variance_preserving, relu for affine around",
        ),
        ({"name": "affine", "base": "gleu"}, "base: expected one of gelu,"),
        ({"name": "affine", "degree": 3}, "degree: not for affine; leave it out"),
        ({"name": "affine", "interval": [-1, 1]}, "interval: not for affine"),
        ("affine3", "activation 'affine3': expected one of"),
    ],
)
def test_what_it_does_not_take_is_refused(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_activation(config)
