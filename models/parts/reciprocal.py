"""1/d by sums and products, on a range: a Chebyshev residual and Newton steps, whose errors are known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from polytrope.models.parts.settings import ReciprocalSettings
from polytrope.ops import Composition


class PolynomialReciprocal(nn.Module):
    """r(d) of a polynomial of degree n, then r ← r (2 - d r) as often as `newton` says.

    Outside of its domain, which `evaluate` counts the inputs of, nothing is promised. The certificate is of the
    coefficients in float32: they never learn, and stay at least as wide whatever the model is cast to.
    """

    def __init__(self, settings: ReciprocalSettings) -> None:
        super().__init__()
        self.settings = settings
        self.polynomial = Composition(settings.degree, domain=settings.domain).requires_grad_(False)
        coefficients = residual_coefficients(settings.degree, *settings.domain)
        with torch.no_grad():
            for parameter in self.polynomial.parameters():
                parameter.copy_(torch.from_numpy(coefficients).reshape(parameter.shape))

    def forward(self, d: Tensor) -> Tensor:
        r: Tensor = self.polynomial(d)
        for _ in range(self.settings.newton):
            r = r * (2.0 - d * r)
        return r

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PolynomialReciprocal:
        """What torch casts and moves modules by: half precision would round what the certificate is of."""
        kept = {name: parameter.data for name, parameter in self.named_parameters()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, parameter in self.named_parameters():
            if parameter.dtype.itemsize < kept[name].dtype.itemsize:
                parameter.data = kept[name].to(parameter.device)
        return self


def certified_modules(model: nn.Module) -> set[nn.Module]:
    """Those whose parameters a certificate is of, and which therefore never learn."""
    reciprocals = (module for module in model.modules() if isinstance(module, PolynomialReciprocal))
    return {inner for module in reciprocals for inner in module.modules()}


def residual_coefficients(degree: int, low: float, high: float) -> np.ndarray:
    """Chebyshev coefficients `[degree + 1]` on [low, high] of the p with the smallest largest |1 - d p(d)|.

    1 - d p(d) is a polynomial of one degree more that is 1 at d = 0; the smallest such on [low, high] is T_{n+1} of the
    variable that is in [-1, 1] there, over its value at 0 (Markov).
    """

    def best(d: np.ndarray) -> np.ndarray:
        variable = (high + low - 2.0 * d) / (high - low)
        residual = np.polynomial.chebyshev.chebval(variable, np.eye(degree + 2)[degree + 1])
        values: np.ndarray = (1.0 - residual * relative_error(degree, 0, low, high)) / d
        return values

    series = np.polynomial.Chebyshev.interpolate(best, degree, domain=[low, high])
    coefficients: np.ndarray = series.coef
    return coefficients


def relative_error(degree: int, newton: int, low: float, high: float) -> float:
    """The largest |1 - d r(d)| on [low, high], in exact arithmetic: 1 / T_{n+1}((high + low) / (high - low)), squared
    by every step of Newton's."""
    exponent = (degree + 1) * math.acosh((high + low) / (high - low))
    error = 2.0 / (math.exp(exponent) + math.exp(-exponent)) if exponent < 700.0 else 0.0  # 1 / cosh, which overflows
    return float(error ** (2**newton))
