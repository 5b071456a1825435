"""A layer of an `mlp` whose edges are functions: a learned function of one variable for every input and output."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytrope.models.parts.settings import KANSettings
from polytrope.ops.moments import gaussian_nodes

REACH = 4.0  # where splines end, and the straight line of each edge goes on alone
_TOUCH = 2.0  # between which tropical lines change


class KANLinear(nn.Module):
    """y_o = b_o + Σ_i Σ_k c_oik B_k(x_i): a basis expansion and a linear layer of it, `[…, inputs]` to `[…, outputs]`.

    Every B_k has mean 0 and variance 1 for x ~ N(0, 1), and c starts with variance 1/(inputs · functions): normal
    inputs of variance 1 give outputs of variance 1. The functions are computed in float32 at least. (Liu et al., KAN:
    Kolmogorov-Arnold Networks, 2024, with splines and a fixed function beside them.)

    Args:
        inputs, outputs: numbers of channels.
        settings: which functions, and how many.
    """

    def __init__(self, inputs: int, outputs: int, settings: KANSettings) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.settings = settings
        self.moments = basis_moments(settings)  # here, since numpy inside of `forward` cannot be compiled
        self.weight = nn.Parameter(torch.empty(outputs, inputs * settings.functions))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.normal_(self.weight, std=(inputs * settings.functions) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        expanded = torch.stack(_standardised(wide, self.settings, self.moments), dim=-1).flatten(-2)
        return F.linear(expanded.to(x.dtype), self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, basis={self.settings.basis}, "
            f"degree={self.settings.degree}"
        )


def kan_layer(settings: KANSettings, inputs: int, outputs: int) -> nn.Module:
    """A fresh one, from torch's global random state."""
    return KANLinear(inputs, outputs, settings)


def basis(x: Tensor, settings: KANSettings) -> list[Tensor]:
    """B_1(x), B_2(x), …, each of the shape and dtype of x (float32 or float64), of mean 0 and variance 1 under N(0, 1).

    - `hermite`: He_k / √k!, k = 1…degree: orthonormal.
    - `fourier`: cos kx and sin kx, k = 1…degree.
    - `tropical`: x, and max(x, t) at degree - 1 places t that divide [-2, 2] into equal parts.
    - `spline`: x, and degree - 1 cubic B-splines with equally spaced knots in [-4, 4].
    """
    return _standardised(x, settings, basis_moments(settings))


def _standardised(x: Tensor, settings: KANSettings, moments: list[tuple[float, float]]) -> list[Tensor]:
    found: list[Tensor] = FUNCTIONS[settings.basis](x, settings.degree)
    return [(value - mean) / deviation for value, (mean, deviation) in zip(found, moments, strict=True)]


def basis_moments(settings: KANSettings) -> list[tuple[float, float]]:
    """Mean and deviation under N(0, 1) of each function before it is standardised; of `hermite` 0 and 1, exactly."""
    if settings.basis == "hermite":
        return [(0.0, 1.0)] * settings.degree
    return _moments(settings.basis, settings.degree)


@functools.cache
def _moments(name: str, degree: int) -> list[tuple[float, float]]:
    """By quadrature in numpy."""
    x, density = gaussian_nodes([*_places(degree), *_knots(degree)])
    found = []
    for value in FUNCTIONS[name](x, degree):
        mean = float(density @ value)
        found.append((mean, math.sqrt(float(density @ (value - mean) ** 2))))
    return found


# What follows takes tensors and arrays.


def _hermite(x: Any, degree: int) -> list[Any]:
    """(x h_k - √k h_{k-1}) / √(k+1) is the next one."""
    found = [x]
    for k in range(1, degree):
        before = found[k - 2] if k > 1 else 1.0
        found.append((x * found[k - 1] - math.sqrt(k) * before) / math.sqrt(k + 1))
    return found


def _fourier(x: Any, degree: int) -> list[Any]:
    waves = np if isinstance(x, np.ndarray) else torch
    return [wave(k * x) for k in range(1, degree + 1) for wave in (waves.cos, waves.sin)]


def _tropical(x: Any, degree: int) -> list[Any]:
    return [x, *(place + _positive(x - place) for place in _places(degree))]


def _spline(x: Any, degree: int) -> list[Any]:
    """Of the cubic B-spline (max(2 - |u|, 0)³ - 4 max(1 - |u|, 0)³) / 6 with knots at -2, -1, 0, 1, 2."""
    knots = _knots(degree)
    found = [x]
    for center in knots[2:-2]:
        far = abs((x - center) / (knots[1] - knots[0]))
        found.append((_positive(2.0 - far) ** 3 - 4.0 * _positive(1.0 - far) ** 3) / 6.0)
    return found


def _positive(x: Any) -> Any:
    return x.clip(min=0.0)


def _places(degree: int) -> list[float]:
    return [_TOUCH * (2.0 * part / degree - 1.0) for part in range(1, degree)]


def _knots(degree: int) -> list[float]:
    pieces = degree + 2
    return [REACH * (2.0 * knot / pieces - 1.0) for knot in range(pieces + 1)]


FUNCTIONS: dict[str, Callable[[Any, int], list[Any]]] = {
    "hermite": _hermite,
    "fourier": _fourier,
    "tropical": _tropical,
    "spline": _spline,
}
