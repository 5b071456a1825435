"""What an activation makes of the angle between two inputs: its kernel, in closed form from Hermite coefficients.

With F = sum_k c_k h_k in the orthonormal h_k = He_k / √k!, and u, v standard normal with correlation ρ,
E[F(u) F(v)] = κ(ρ) = sum_k c_k² ρ^k (Daniely, Frostig, Singer, "Toward deeper understanding of neural networks", 2016),
because E[h_j(u) h_k(v)] = ρ^k where j = k, else 0. κ of a polynomial of degree n is one of degree n. The tangent kernel
of a layer of random weights, F and a layer of random weights is κ(ρ) + ρ κ'(ρ) = sum_k (1 + k) c_k² ρ^k (Jacot,
Gabriel, Hongler, 2018). On a circle ρ is the cosine of an angle, and what gradient descent learns of frequency j it
learns at the rate of the kernel's eigenvalue j: exactly 0 above the degree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import nn

from polytrope.ops.fitting.curves import Array
from polytrope.ops.moments import REACH, check_everywhere, curve_of, gaussian_nodes

ORDER = 64  # of the highest coefficient of what is no polynomial
_ANGLES = 4096  # on the circle, for kernels of several layers


def hermite_coefficients(
    activation: nn.Module, mean: float = 0.0, deviation: float = 1.0, order: int = ORDER
) -> tuple[Array, float]:
    """Coefficients c_k of x → F(mean + deviation · x) in h_k, and the share of E[F²] that is not in them.

    Of a polynomial all that there are, `[degree + 1]`, with the share 0; else `[order + 1]` by quadrature.

    Raises:
        ValueError: an activation that is gated, has groups of channels or is not elementwise; one for its domain alone.
    """
    check_everywhere(activation)
    curve, kinks = curve_of(activation, mean - REACH * deviation, mean + REACH * deviation)
    degree = getattr(activation, "polynomial_degree", lambda: None)()
    if degree is not None and getattr(activation, "interval", None) is None:
        x, weights = np.polynomial.hermite_e.hermegauss(degree + 1)
        weights = weights / weights.sum()
        order = degree
    else:
        degree = None
        x, weights = gaussian_nodes([(kink - mean) / deviation for kink in kinks])
    values = curve(mean + deviation * x)[0]
    coefficients = (weights * values) @ _orthonormal(x, order).T
    square = float(weights @ values**2)
    if degree is not None or square == 0.0:
        return coefficients, 0.0
    return coefficients, max(0.0, 1.0 - float(coefficients @ coefficients) / square)


def _orthonormal(x: Array, order: int) -> Array:
    """h_0 … h_order at x `[n]`: `[order + 1, n]`."""
    rows = [np.ones_like(x), x]
    for k in range(1, order):
        rows.append((x * rows[k] - math.sqrt(k) * rows[k - 1]) / math.sqrt(k + 1))
    return np.stack(rows[: order + 1])


def dual_kernel(coefficients: Array, correlation: Array) -> Array:
    """κ(ρ) = sum_k c_k² ρ^k."""
    kernel: Array = np.polynomial.polynomial.polyval(correlation, coefficients**2)
    return kernel


def circle_spectrum(coefficients: Array, frequencies: int) -> Array:
    """Eigenvalues `[frequencies + 1]` of the tangent kernel of one layer on the circle, by frequency, in closed form.

    cos^k θ has the share C(k, (k - j) / 2) / 2^k of e^{ijθ} where k - j is even and not negative, else none.
    """
    series = (1.0 + np.arange(len(coefficients))) * coefficients**2
    shares = np.zeros((frequencies + 1, len(series)))
    for k in range(len(series)):
        for j in range(k % 2, min(k, frequencies) + 1, 2):
            shares[j, k] = math.comb(k, (k - j) // 2) / 2.0**k
    spectrum: Array = shares @ series
    return spectrum


def deep_spectrum(layers: Sequence[Array], frequencies: int) -> Array:
    """The same of several activations one after the other, with random weights between, each on inputs of variance 1.

    ρ → κ(ρ) / κ(1) and Θ → (κ(ρ) + Θ κ'(ρ)) / κ(1) from layer to layer, starting at Θ = ρ.

    Raises:
        ValueError: a layer whose output is always 0.
    """
    correlation = np.cos(2 * math.pi * np.arange(_ANGLES) / _ANGLES)
    tangent = correlation
    for coefficients in layers:
        series = np.polynomial.Polynomial(coefficients**2)
        size = float(series(1.0))
        if size == 0.0:
            raise ValueError("a layer gives 0 for every input: no kernel")
        tangent = (series(correlation) + tangent * series.deriv()(correlation)) / size
        correlation = series(correlation) / size
    spectrum: Array = np.fft.rfft(tangent).real[: frequencies + 1] / _ANGLES
    return spectrum
