"""Fused learnable activations: modules here, functions in `functional`."""

from polytrope.ops.modules import (
    Affine,
    Chebyshev,
    Composition,
    Fourier,
    Hermite,
    LearnableActivation,
    Legendre,
    OrthogonalPolynomial,
    PiecewiseLinear,
    PolyNorm,
    PolyReLU,
    Rational,
    RationalSpline,
    Tropical,
    TropicalRational,
    build_activation,
    is_learnable_activation,
)
from polytrope.ops.moments import Moments, moments

__all__ = [
    "Affine",
    "Chebyshev",
    "Composition",
    "Fourier",
    "Hermite",
    "LearnableActivation",
    "Legendre",
    "Moments",
    "OrthogonalPolynomial",
    "PiecewiseLinear",
    "PolyNorm",
    "PolyReLU",
    "Rational",
    "RationalSpline",
    "Tropical",
    "TropicalRational",
    "build_activation",
    "is_learnable_activation",
    "moments",
]
