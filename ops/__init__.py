"""Fused learnable activations: modules here, functions in `functional`."""

from polytrope.ops.modules import (
    Chebyshev,
    Fourier,
    Hermite,
    Legendre,
    OrthogonalPolynomial,
    PiecewiseLinear,
    PolyNorm,
    PolyReLU,
    Rational,
    Tropical,
    TropicalRational,
    build_activation,
    is_learnable_activation,
)

__all__ = [
    "Chebyshev",
    "Fourier",
    "Hermite",
    "Legendre",
    "OrthogonalPolynomial",
    "PiecewiseLinear",
    "PolyNorm",
    "PolyReLU",
    "Rational",
    "Tropical",
    "TropicalRational",
    "build_activation",
    "is_learnable_activation",
]
