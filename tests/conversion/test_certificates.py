"""What is certified is what the built module does, whatever the scale of the inputs and the format they come in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from polytrope.models.calibration import Calibration, calibrate
from polytrope.models.conversion import FitOptions, LayerConversion, PolynomialOnly, apply, fit_layer, fit_layers
from polytrope.models.surgery import Activation, find_activations
from polytrope.ops.fitting.targets import resolve_target
from polytrope.ops.interpolate import RoundingError, fit

TARGETS = {
    "gelu": nn.GELU(),
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
    "tanh": nn.Tanh(),
    "relu6": nn.ReLU6(),
    "hardswish": nn.Hardswish(),
}
POLYNOMIALS = ("hermite", "chebyshev", "legendre")
FAMILIES = (*POLYNOMIALS, "fourier", "rational", "tropical", "tropical_rational", "polyrelu", "rational_spline")


def drawn(seed: int, scale: float, shift: float, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * (torch.randn(20_000, generator=generator) + shift)).to(dtype)


def converted(target: nn.Module, inputs: Tensor, family: str, degree: int) -> LayerConversion:
    return fit_layer(Activation("a", target), Calibration.of(inputs), FitOptions(family, degree))


def errors(layer: LayerConversion, target: nn.Module, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of the module as it is built, against the target in float64; and the target's values."""
    with torch.no_grad():
        values = resolve_target(target)(x.double())
        return (layer.fit.build()(x).double() - values).numpy(), values.numpy()


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(TARGETS)),
    family=st.sampled_from(FAMILIES),
    degree=st.integers(1, 12),
    exponent=st.floats(-4, 3),
    shift=st.floats(-1, 1),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_the_true_error_on_fresh_inputs_is_never_more_than_the_certified_one(
    name: str, family: str, degree: int, exponent: float, shift: float, dtype: torch.dtype, seed: int
) -> None:
    target, scale = TARGETS[name], 10.0**exponent
    try:
        layer = converted(target, drawn(seed, scale, shift, dtype), family, degree)
    except RoundingError:  # refused: nothing is certified
        return
    fresh = drawn(seed + 5000, scale, shift, dtype)
    error, _ = errors(layer, target, fresh)
    certificate = layer.fit.certificate
    low, high = layer.interval
    inside = ((fresh.double() >= low) & (fresh.double() <= high)).numpy()
    assert np.abs(error[inside]).max(initial=0.0) <= certificate.maximum
    inputs = fresh.double()
    seen = ((inputs >= layer.calibration.minimum) & (inputs <= layer.calibration.maximum)).numpy()
    assert np.abs(error[seen]).max(initial=0.0) <= max(certificate.maximum, certificate.maximum_outside)
    # A mean over other inputs is another one: as far as samples of this size differ.
    spread = np.sqrt(np.std(error**2) / np.sqrt(len(error) / 8)) if len(error) else 0.0
    assert np.sqrt(np.mean(error**2)) <= 1.1 * certificate.rms + 2 * spread + 1e-300


@pytest.mark.parametrize(("family", "degree"), [("hermite", 3), ("chebyshev", 8), ("fourier", 3)])
def test_the_bound_holds_on_both_sides_of_a_jump(family: str, degree: int) -> None:
    """No polynomial is anywhere near both 1 and -1 at 0, so the largest error is next to 0, between two grid points."""
    found = fit(torch.sign, family, degree, interval=(-2.0, 2.0))
    beside = torch.logspace(-30, 0, 500)
    inputs = torch.cat([torch.linspace(-2, 2, 100_001), beside, -beside])
    with torch.no_grad():
        largest = float((found.build()(inputs).double() - inputs.double().sign()).abs().max())
    assert 1.0 - 1e-6 <= largest <= found.certificate.maximum <= 1.001


@pytest.mark.parametrize(("scale", "bound"), [(0.03, 1e-4), (0.001, 1e-4), (1e-4, 1e-4), (1.0, 3e-3), (100.0, 3e-2)])
@pytest.mark.parametrize("family", ["hermite", "chebyshev", "legendre"])
def test_small_and_large_inputs_are_fitted_as_well_as_it_says(scale: float, bound: float, family: str) -> None:
    target = nn.GELU()
    layer = converted(target, drawn(0, scale, 0.0, torch.float32), family, 8)
    error, values = errors(layer, target, drawn(1, scale, 0.0, torch.float32))
    measured = float(np.sqrt(np.mean(error**2) / np.mean(values**2)))
    assert layer.relative_error < bound
    assert measured <= 1.2 * layer.relative_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["hermite", "chebyshev", "legendre"])
@pytest.mark.parametrize("degree", [8, 12])
def test_a_model_of_16_bits_gets_what_its_certificate_says(dtype: torch.dtype, family: str, degree: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 4))
    nn.init.normal_(model[0].weight, std=0.25)
    model = model.to(dtype).eval()
    x = torch.randn(256, 64).to(dtype)

    def run(network: nn.Module, batch: Tensor) -> Tensor:
        with torch.no_grad():
            return network(batch)

    found = find_activations(model)
    (layer,) = fit_layers(found, calibrate(model, found, [x], run), FitOptions(family, degree))
    apply(model, [layer])
    assert model[1].coefficients.dtype == dtype
    every = torch.linspace(layer.calibration.minimum, layer.calibration.maximum, 4001).to(dtype)
    wanted = torch.nn.functional.gelu(every.double())
    largest = float((run(model[1], every).double() - wanted).abs().max())
    certificate = layer.fit.certificate
    assert largest <= max(certificate.maximum, certificate.maximum_outside)
    assert layer.relative_error < {torch.bfloat16: 0.03, torch.float16: 0.01}[dtype]


@pytest.mark.parametrize("family", [*FAMILIES, "auto", "composition"])
@pytest.mark.parametrize("target", [nn.GELU(), nn.ReLU()])
def test_an_activation_that_receives_only_0_is_converted(target: nn.Module, family: str) -> None:
    seen = Calibration.of(torch.zeros(4, 64))
    only = PolynomialOnly(3) if family == "composition" else None
    for error in (None, 0.01):
        if family == "auto" and error is None:
            continue
        layer = fit_layer(Activation("a", target), seen, FitOptions(family, 8, error, polynomial_only=only))
        assert layer.relative_error < 0.01  # there is nothing that it could be relative to
        assert layer.fit.certificate.rms < 0.01
        low, high = layer.interval
        assert low <= 0.0 <= high
        with torch.no_grad():
            assert abs(float(layer.fit.build()(torch.zeros(1)))) <= max(layer.fit.certificate.maximum, 1e-7)


@pytest.mark.parametrize("target", [nn.ReLU(), nn.GELU(), nn.LeakyReLU()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_polyrelu_is_a_constant_of_negative_inputs(target: nn.Module, dtype: torch.dtype) -> None:
    inputs = -(drawn(0, 1.0, 0.0, torch.float32).abs() + 0.1).to(dtype)
    layer = converted(target, inputs, "polyrelu", 8)
    error, values = errors(layer, target, inputs)
    assert np.sqrt(np.mean(error**2)) <= 1.02 * np.std(values) + 1e-6
    assert np.sqrt(np.mean(error**2)) <= 1.02 * layer.fit.certificate.rms + 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_part_of_the_error_of_a_composition(dtype: torch.dtype) -> None:
    target = nn.GELU()
    seen = Calibration.of(drawn(0, 2.0, 0.0, dtype))
    found = [
        fit_layer(Activation("a", target), seen, FitOptions("composition", polynomial_only=PolynomialOnly(depth)))
        for depth in (9, 13)
    ]
    for layer in found:
        error, values = errors(layer, target, drawn(1, 2.0, 0.0, dtype).clamp(*layer.interval))
        assert np.abs(error).max() <= layer.fit.certificate.maximum
        assert np.sqrt(np.mean(error**2)) <= 1.1 * layer.fit.certificate.rms + 1e-3 * np.abs(values).max()
    # Deeper is never much worse: what rounding takes from the deep one counts.
    assert found[1].relative_error <= 1.25 * found[0].relative_error
