"""Kernels of activations in closed form: known eigenvalues, nothing above the degree, and a finite network beside."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from polytrope.ops import build_activation
from polytrope.ops.spectra import circle_spectrum, deep_spectrum, dual_kernel, hermite_coefficients


def test_kernel_of_the_cubic_start_has_the_known_values_and_nothing_above_its_degree() -> None:
    coefficients, truncated = hermite_coefficients(build_activation("hermite3"))
    assert truncated == 0.0
    assert len(coefficients) == 4
    # E[F²] = κ(1) = 1; κ(.9) of 2,000,000 pairs: .9046
    assert dual_kernel(coefficients, np.array([0.9, 1.0])) == pytest.approx([0.9039, 1.0], abs=5e-5)
    spectrum = circle_spectrum(coefficients, 8)
    assert spectrum[:4] == pytest.approx([0.63, 0.50, 0.15, 0.033], abs=6e-3)
    assert spectrum[4:].tolist() == [0.0] * 5
    angles = 2 * np.pi * np.arange(64) / 64
    by_fft = np.fft.rfft(np.polynomial.polynomial.polyval(np.cos(angles), np.arange(1, 5) * coefficients**2)).real / 64
    assert spectrum == pytest.approx(by_fft[:9], abs=1e-15)


def test_kernel_of_a_wide_random_layer_is_that_of_the_coefficients() -> None:
    """Measured: Σ over units of F(w·x) F(w·y) and of its gradient by w, at 16 angles."""
    generator = torch.Generator().manual_seed(0)
    activation = build_activation("hermite3").double()
    width = 20_000
    angles = 2 * np.pi * torch.arange(16, dtype=torch.float64) / 16
    points = torch.stack([angles.cos(), angles.sin()], 1)
    weights = torch.randn(2, width, dtype=torch.float64, generator=generator)
    outer = torch.randn(width, dtype=torch.float64, generator=generator)
    inputs = (points @ weights).requires_grad_()
    values = activation(inputs)
    (slopes,) = torch.autograd.grad(values.sum(), inputs)
    kernel = (values @ values.T + points @ points.T * ((slopes * outer**2) @ slopes.T)).detach() / width
    waves = torch.exp(1j * torch.outer(torch.arange(5, dtype=torch.float64), angles))
    measured = torch.einsum("kx,xy,ky->k", waves, kernel + 0j, waves.conj()).real / 16**2
    expected = circle_spectrum(hermite_coefficients(activation)[0], 4)
    assert measured[:3].numpy() == pytest.approx(expected[:3], rel=0.1)
    assert float(measured[4]) == pytest.approx(0.0, abs=1e-2)


def test_a_rectifier_has_no_odd_frequencies_but_the_first_and_says_what_is_cut_off() -> None:
    coefficients, truncated = hermite_coefficients(nn.ReLU())
    expected = [1 / math.sqrt(2 * math.pi), 0.5, 1 / (2 * math.sqrt(math.pi)), 0.0]
    assert coefficients[:4] == pytest.approx(expected, abs=1e-14)
    assert 1e-5 < truncated < 1e-2
    spectrum = circle_spectrum(coefficients, 9)
    assert spectrum[3::2] == pytest.approx(np.zeros(4), abs=1e-28)
    assert (spectrum[2::2] > 1e-4).all()


def test_waves_fall_off_slower_than_a_polynomial_and_smooth_functions_faster_than_a_rectifier() -> None:
    last = {
        name: circle_spectrum(hermite_coefficients(build_activation(name))[0], 8)[8]
        for name in ("hermite3", "fourier5", "gelu", "relu")
    }
    assert last["hermite3"] == 0.0 < last["gelu"] < last["relu"]
    assert last["fourier5"] > 0.0


@pytest.mark.parametrize("name", ["hermite3", "chebyshev5", "legendre4", {"name": "rational", "denominator_degree": 0}])
def test_coefficients_around_other_inputs_are_the_same_function(name: str) -> None:
    activation = build_activation(name).double()
    mean, deviation = -0.7, 1.6
    coefficients, truncated = hermite_coefficients(activation, mean, deviation)
    assert truncated == 0.0
    x = np.linspace(-4, 4, 33)
    sizes = np.sqrt([float(math.factorial(k)) for k in range(len(coefficients))])
    series = np.polynomial.hermite_e.hermeval((x - mean) / deviation, coefficients / sizes)
    with torch.no_grad():
        values = activation(torch.from_numpy(x)).numpy()
    assert series == pytest.approx(values, rel=1e-9, abs=1e-9 * np.abs(values).max())


def test_spectrum_of_layers_is_the_recursion_and_vanishes_above_the_product_of_degrees() -> None:
    quadratic = hermite_coefficients(build_activation("hermite2"))[0]
    quadratic /= np.linalg.norm(quadratic)  # its numbers are of float32
    assert deep_spectrum([quadratic], 6) == pytest.approx(circle_spectrum(quadratic, 6), abs=1e-14)
    two = deep_spectrum([quadratic, quadratic], 6)
    angles = 2 * np.pi * np.arange(32) / 32
    series = np.polynomial.Polynomial(quadratic**2)
    first = series(np.cos(angles)) + np.cos(angles) * series.deriv()(np.cos(angles))
    correlation = series(np.cos(angles))
    by_hand = series(correlation) + first * series.deriv()(correlation)
    assert two == pytest.approx(np.fft.rfft(by_hand).real[:7] / 32, abs=1e-14)
    assert two[4] > 1e-3
    assert two[5:] == pytest.approx(np.zeros(2), abs=1e-14)


def test_what_has_no_expansion_is_refused_and_says_why() -> None:
    with pytest.raises(ValueError, match="for its domain alone"):
        hermite_coefficients(build_activation({"name": "composition", "degree": 4}))
    with pytest.raises(ValueError, match="one set of coefficients"):
        hermite_coefficients(build_activation({"name": "hermite", "degree": 3, "num_parameters": 4}))
    with pytest.raises(ValueError, match="elementwise"):
        hermite_coefficients(build_activation("polynorm3"))
