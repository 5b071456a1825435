"""1/d and 1/√m by sums and products, on a range: a Chebyshev polynomial and Newton steps, whose errors are known."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from polytrope.models.parts.settings import ReciprocalSettings
from polytrope.ops import Composition


@dataclass(frozen=True)
class Form:
    """A function of one positive number that Newton's iteration finds by sums and products.

    Args:
        coefficients: (degree, low, high) → those of Chebyshev polynomials on [low, high], `[degree + 1]` float64.
        step: (d, r) → a better r.
        relative_error: (degree, newton, low, high) → the largest one on [low, high] after so many steps.
    """

    coefficients: Callable[[int, float, float], np.ndarray]
    step: Callable[[Tensor, Tensor], Tensor]
    relative_error: Callable[[int, int, float, float], float]


class NewtonPolynomial(nn.Module):
    """r(d) of a polynomial of degree n, then a step r ← s(d, r) as often as `newton` says.

    Outside of its domain, which `evaluate` counts the inputs of, nothing is promised. The certificate is of the
    coefficients in float32: they never learn, and stay at least as wide whatever the model is cast to.
    """

    def __init__(self, settings: ReciprocalSettings, form: Form) -> None:
        super().__init__()
        self.settings = settings
        self.form = form
        self.polynomial = Composition(settings.degree, domain=settings.domain).requires_grad_(False)
        coefficients = form.coefficients(settings.degree, *settings.domain)
        with torch.no_grad():
            for parameter in self.polynomial.parameters():
                parameter.copy_(torch.from_numpy(coefficients).reshape(parameter.shape))

    def forward(self, d: Tensor) -> Tensor:
        r: Tensor = self.polynomial(d)
        for _ in range(self.settings.newton):
            r = self.form.step(d, r)
        return r

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NewtonPolynomial:
        """What torch casts and moves modules by: half precision would round what the certificate is of."""
        kept = {name: parameter.data for name, parameter in self.named_parameters()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, parameter in self.named_parameters():
            if parameter.dtype.itemsize < kept[name].dtype.itemsize:
                parameter.data = kept[name].to(parameter.device)
        return self


def certified_modules(model: nn.Module) -> set[nn.Module]:
    """Those whose parameters a certificate is of, and which therefore never learn."""
    certified = (module for module in model.modules() if isinstance(module, NewtonPolynomial))
    return {inner for module in certified for inner in module.modules()}


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


def root_coefficients(degree: int, low: float, high: float) -> np.ndarray:
    """Chebyshev coefficients `[degree + 1]` on [low, high] of the p with the least mean (1 - √m p(m))² over as many
    Chebyshev nodes as make it an integral: close to the smallest largest |1 - √m p(m)|."""
    nodes = np.cos(np.pi * (np.arange(8 * (degree + 1)) + 0.5) / (8 * (degree + 1)))
    roots = np.sqrt((high + low) / 2 + (high - low) / 2 * nodes)
    columns = np.polynomial.chebyshev.chebvander(nodes, degree) * roots[:, None]
    coefficients: np.ndarray = np.linalg.lstsq(columns, np.ones_like(nodes), rcond=None)[0]
    return coefficients


@functools.lru_cache(maxsize=1024)
def root_error(degree: int, newton: int, low: float, high: float) -> float:
    """The largest |1 - √m r(m)| on [low, high], in exact arithmetic, among 64 points for each of its zeros: an error
    e = √m r - 1 becomes -1.5 e² - 0.5 e³ by every step of Newton's."""
    angles = np.linspace(0.0, np.pi, 64 * (degree + 1) + 1)
    variable = np.cos(angles)
    values = np.polynomial.chebyshev.chebval(variable, root_coefficients(degree, low, high))
    error = values * np.sqrt((high + low) / 2 + (high - low) / 2 * variable) - 1.0
    for _ in range(newton):
        error = -1.5 * error**2 - 0.5 * error**3
    return float(np.abs(error).max())


def _reciprocal_step(d: Tensor, r: Tensor) -> Tensor:
    return r * (2.0 - d * r)


def _root_step(m: Tensor, r: Tensor) -> Tensor:
    """r (3 - m r²) / 2, of depth 2: m r and r² side by side."""
    return r * 1.5 - (m * r) * (r * (r * 0.5))


RECIPROCAL = Form(residual_coefficients, _reciprocal_step, relative_error)
INVERSE_ROOT = Form(root_coefficients, _root_step, root_error)
