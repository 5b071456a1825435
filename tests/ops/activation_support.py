"""The activations that several tests run over, their inputs, the same in plain torch, and their moments."""

from __future__ import annotations

import math
from typing import Any

import torch
from kernels_support import without_kernels
from numpy.polynomial.legendre import leggauss
from torch import Tensor, nn

from polytrope.ops import PiecewiseLinear, Tropical, TropicalRational, build_activation

CONFIGS: list[dict[str, Any]] = [
    {"name": "hermite", "degree": 3},
    {"name": "hermite", "degree": 12},
    {"name": "hermite", "degree": 8, "interval": [-1.0, 1.5]},
    {"name": "hermite", "degree": 4, "learnable_recurrence": True},
    {"name": "hermite", "degree": 6, "interval": [-1.0, 1.5], "variable": [0.25, 0.4]},
    {"name": "hermite", "degree": 4, "learnable_recurrence": True, "variable": [0.25, 1.5]},
    {"name": "chebyshev", "degree": 5},
    {"name": "chebyshev", "degree": 5, "variable": [0.125, 2.0]},
    {"name": "legendre", "degree": 8},
    {"name": "legendre", "degree": 9, "interval": [-1.0, 1.5], "variable": [0.25, 1.25]},
    {"name": "fourier", "degree": 5},
    {"name": "fourier", "degree": 9},
    {"name": "fourier", "degree": 4, "interval": [-1.0, 1.5]},
    {"name": "fourier", "degree": 6, "harmonic": True},
    {"name": "tropical", "degree": 6},
    {"name": "tropical_rational", "degree": 6},
    {"name": "rational", "degree": 5},
    {"name": "rational", "degree": 3, "denominator_degree": 4, "interval": [-1.0, 1.5]},
    {"name": "polyrelu", "degree": 3},
    {"name": "polynorm", "degree": 3},
    {"name": "piecewise_linear", "degree": 8},
    {"name": "rational_spline", "degree": 6},
]
CONTROL: dict[str, Any] = {"name": "affine", "base": "silu"}  # without a kernel


def label(config: dict[str, Any]) -> str:
    return "-".join(f"{value}" for value in config.values())


def activation(config: dict[str, Any], dtype: torch.dtype = torch.float64) -> nn.Module:
    """With parameters that are a little away from their initial values, so that no symmetry hides a mistake."""
    module = build_activation(config).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.05 * noise).to(dtype))
    return module


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).mul(1.5).to(dtype)


def by_reference(module: nn.Module, x: Tensor) -> Tensor:
    """The same module through plain torch."""
    with without_kernels():
        result: Tensor = module(x)
        return result


FAMILIES = [
    "hermite",
    "chebyshev",
    "legendre",
    "fourier",
    "harmonic",
    "tropical",
    "tropical_rational",
    "rational",
    "polyrelu",
    "piecewise_linear",
]


def kinks(module: nn.Module) -> torch.Tensor:
    """Where the slope may jump: all points where two lines cross."""
    own = {name: parameter.detach() for name, parameter in module.named_parameters()}
    if isinstance(module, PiecewiseLinear):
        return module.knots
    if isinstance(module, Tropical):
        return -own["coefficients"].diff()
    if isinstance(module, TropicalRational):
        sides = [(own[f"{side}_slopes"], own[f"{side}_intercepts"]) for side in ("numerator", "denominator")]
        crossings = [(c[None] - c[:, None]) / (p[:, None] - p[None]) for p, c in sides]
        return torch.cat([at[at.isfinite()] for at in crossings])
    return torch.zeros(1, dtype=torch.float64)


def moments(module: nn.Module) -> tuple[float, float]:
    """E[F²] and E[F'²] under N(0, 1), by Gauss-Legendre quadrature on panels that end at the kinks."""
    edges = torch.cat([torch.linspace(-12.0, 12.0, 97, dtype=torch.float64), kinks(module)]).unique()
    nodes, rule = (torch.from_numpy(numbers) for numbers in leggauss(16))
    half = edges.diff()[:, None] / 2
    x = (edges[:-1, None] + half + half * nodes).flatten().requires_grad_()
    weights = (half * rule).flatten() * torch.exp(-(x.detach() ** 2) / 2) / math.sqrt(2 * math.pi)
    y = module(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return float(weights @ y.detach().square()), float(weights @ slope.square())
