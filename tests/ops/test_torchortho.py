"""Agreement with the published package where it is right, and a test for each place where it is not."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from polytrope.ops import Fourier, Hermite, Rational, Tropical, TropicalRational
from polytrope.ops.interpolate import fit

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torchortho = pytest.importorskip("torchortho", reason="pip install torchortho (GPL; compared with, never shipped)")

PAIRS = [
    (Hermite, "HermiteActivation"),
    (Fourier, "FourierActivation"),
    (Tropical, "TropicalActivation"),
    (TropicalRational, "TropicalRationalActivation"),
]


def pair(ours: Any, theirs: str, degree: int) -> tuple[Any, nn.Module]:
    torch.manual_seed(degree)
    published = getattr(torchortho, theirs)(degree)
    module = ours(degree)
    module.load_torchortho_state_dict(published.state_dict())
    return module, published


@pytest.mark.parametrize("degree", [1, 3, 6])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_values_and_gradients_agree(ours: Any, theirs: str, degree: int) -> None:
    module, published = pair(ours, theirs, degree)
    x = torch.linspace(-2.5, 2.5, 200).view(10, 20)  # 0, where torchortho is wrong, is not among them
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(module(first), published(second), rtol=2e-5, atol=2e-5)
    module(first).sum().backward()
    published(second).sum().backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=2e-4, atol=2e-4)
    keys = module._torchortho_keys()
    for name, parameter in module.named_parameters():
        theirs_gradient = dict(published.named_parameters())[keys[name]].grad
        torch.testing.assert_close(parameter.grad.flatten(), theirs_gradient.flatten(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("ours", [Hermite, Fourier, Tropical])
def test_the_published_initialisation_is_the_same(ours: Any) -> None:
    theirs = dict(PAIRS)[ours]
    module, fresh = pair(ours, theirs, 4)[0], ours(4, init="torchortho")
    for found, expected in zip(fresh.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_its_slope_at_zero_is_zero_and_ours_is_the_derivative() -> None:
    module, published = pair(Hermite, "HermiteActivation", 3)
    x, other = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    module(x).sum().backward()
    published(other).sum().backward()
    assert other.grad is not None
    assert x.grad is not None
    assert other.grad.item() == 0.0
    assert x.grad.item() == pytest.approx(0.5 / math.sqrt(math.e), rel=1e-5)


def test_its_tropical_is_nan_at_infinity_and_ours_has_the_limit() -> None:
    module, published = pair(Tropical, "TropicalActivation", 3)
    x = torch.tensor([-math.inf, math.inf])
    assert published(x).isnan().any()
    assert module(x).tolist() == [pytest.approx(math.sqrt(2) / 3), math.inf]


def test_its_moments_are_not_one_and_ours_are() -> None:
    x = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    with torch.no_grad():
        published = float(density @ torchortho.HermiteActivation(3).double()(x).square())
        own = float(density @ Hermite(3).double()(x).square())
    assert published == pytest.approx(2.5 / math.e, abs=1e-3)
    assert own == pytest.approx(1.0, abs=1e-6)


def test_a_fit_is_far_closer_than_its_published_error() -> None:
    # Measured for torchortho 0.1.2: 81 s and a mean square error of value and slope of 0.017 at degree 8.
    root = math.sqrt(8.0)
    assert fit("gelu", "hermite", 8, interval=(-root, root)).certificate.h1_mean_square < 0.017 / 100


def test_a_state_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="state: expected 'coefficients' with 6 numbers"):
        Hermite(5).load_torchortho_state_dict(torchortho.HermiteActivation(3).state_dict())
    with pytest.raises(ValueError, match="torchortho has no rational activation"):
        Rational(3).load_torchortho_state_dict({})
