"""Layers of an `mlp` that are not linear themselves: what they compute, how they start, what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.interpolate import BSpline
from torch import Tensor, nn

from polytrope.models import build_model
from polytrope.models.checkpoint import load_model, read_description, save_model
from polytrope.models.convert import convert
from polytrope.models.parts.kan import KANLinear, _moments, basis
from polytrope.models.parts.pi import PiLinear
from polytrope.models.parts.settings import KANSettings, PiSettings
from polytrope.ops import functional
from polytrope.ops.moments import gaussian_nodes
from polytrope.pipeline.stages.train.parameters import ModelParameters, TrainParameters

DEGREES = {"hermite": 4, "fourier": 3, "tropical": 5, "spline": 6}
CUTS = {
    "hermite": [],
    "fourier": [],
    "tropical": [-1.2, -0.4, 0.4, 1.2],
    "spline": [1.0 * knot for knot in range(-4, 5)],
}


def settings_of(name: str) -> KANSettings:
    return KANSettings(basis=name, degree=DEGREES[name])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def fresh(model: nn.Module) -> nn.Module:
    """In float64, with biases that are not 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(0.3 * normal(len(parameter), seed=len(name)))
    return model.double()


@pytest.mark.parametrize("name", DEGREES)
def test_functions_of_a_basis_have_mean_0_and_variance_1(name: str) -> None:
    x, density = gaussian_nodes(CUTS[name])
    values = torch.stack(basis(torch.from_numpy(x), settings_of(name))).numpy()
    assert len(values) == settings_of(name).functions
    np.testing.assert_allclose(values @ density, 0.0, atol=1e-12)
    gram = (values * density) @ values.T
    np.testing.assert_allclose(np.diag(gram), 1.0, rtol=1e-12)
    if name == "hermite":
        np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-12)


def test_functions_of_a_basis_are_those_of_the_activations() -> None:
    """One edge of each kind, a weighted sum of its basis, is an activation of `ops` up to a constant."""
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    weights = {name: normal(settings_of(name).functions) for name in DEGREES}
    edges = {name: torch.stack(basis(x, settings_of(name)), dim=-1) @ weight for name, weight in weights.items()}
    order = torch.arange(1, 5, dtype=torch.float64)
    shares = torch.exp(torch.lgamma(order + 1) / 2)
    hermite = functional.hermite(x, torch.cat((torch.zeros(1, dtype=torch.float64), shares * weights["hermite"])))
    torch.testing.assert_close(edges["hermite"], hermite, rtol=1e-9, atol=1e-9)
    k = np.arange(1, 4)
    cosines = weights["fourier"].view(3, 2)[:, 0].numpy() / ((1 - np.exp(-k * k)) / math.sqrt(2))
    sines = weights["fourier"].view(3, 2)[:, 1].numpy() / np.sqrt((1 - np.exp(-2.0 * k * k)) / 2)
    bias = -float(cosines @ np.exp(-k * k / 2))
    factorials = np.array([1.0, 2.0, 6.0])
    one = torch.ones(1, dtype=torch.float64)
    parts = [torch.from_numpy(factorials * part) for part in (cosines, sines)]
    torch.testing.assert_close(edges["fourier"], functional.harmonic(x, bias * one, one, *parts), rtol=0, atol=1e-9)
    knots = torch.tensor([-5.0, -1.2, -0.4, 0.4, 1.2, 5.0], dtype=torch.float64)
    heights = torch.stack(basis(knots, settings_of("tropical")), dim=-1) @ weights["tropical"]
    torch.testing.assert_close(edges["tropical"], functional.piecewise_linear(x, knots, heights), rtol=0, atol=1e-9)


def test_splines_are_those_of_scipy_and_end_in_straight_lines() -> None:
    x = np.linspace(-6, 6, 121)
    first, *splines = basis(torch.from_numpy(x), settings_of("spline"))
    torch.testing.assert_close(first, torch.from_numpy(x), rtol=0, atol=1e-14)
    assert len(splines) == 5
    for number, spline in enumerate(splines):
        knots = np.arange(number, number + 5) - 4.0
        expected = BSpline.basis_element(knots)(x) * ((x >= knots[0]) & (x <= knots[-1]))
        nodes, density = gaussian_nodes(list(knots))
        values = BSpline.basis_element(knots)(nodes) * ((nodes >= knots[0]) & (nodes <= knots[-1]))
        mean = density @ values
        deviation = math.sqrt(density @ (values - mean) ** 2)
        np.testing.assert_allclose(spline.numpy(), (expected - mean) / deviation, atol=1e-12)


def test_a_kan_layer_compiles_whole() -> None:
    layer = KANLinear(3, 2, KANSettings(basis="spline", degree=5))
    _moments.cache_clear()  # as in a process that has not seen one
    x = torch.randn(7, 3)
    compiled: Any = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("name", DEGREES)
def test_a_kan_layer_is_its_formula_starts_with_variance_1_and_has_its_gradients(name: str) -> None:
    torch.manual_seed(0)
    x = normal(20000, 32)
    layer = KANLinear(32, 200, settings_of(name)).double()
    with torch.no_grad():
        assert layer(x).square().mean().item() == pytest.approx(1.0, abs=0.04)
        small: Any = fresh(KANLinear(3, 4, settings_of(name)))
        functions = torch.stack(basis(x[:7, :3], settings_of(name)), dim=-1)
        expected = torch.einsum("bik,oik->bo", functions, small.weight.view(4, 3, -1)) + small.bias
        torch.testing.assert_close(small(x[:7, :3]), expected, rtol=0, atol=1e-14)
        narrow = small.bfloat16()(x[:7, :3].bfloat16())
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.double(), expected, rtol=0.05, atol=0.1)
    check_gradients(small.double(), x[:5, :3])


def check_gradients(layer: nn.Module, x: Tensor) -> None:
    weights = {name: weight.detach().requires_grad_() for name, weight in layer.named_parameters()}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(weights, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x.clone().requires_grad_(), *weights.values()))


def along_a_line(layer: Any, width: int) -> np.ndarray:
    """Sizes of the Chebyshev coefficients of t → layer(u + t v) on [-1, 1], relative to the largest."""
    angles = (np.arange(24) + 0.5) * np.pi / 24
    start, direction = normal(2, width, seed=5)
    with torch.no_grad():
        values = layer(start + torch.from_numpy(np.cos(angles))[:, None] * direction).numpy()
    sizes = np.abs(np.cos(np.outer(np.arange(24), angles)) @ values).max(1)
    return np.asarray(sizes / sizes.max())


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("degree", [1, 2, 4, 6])
def test_a_pi_layer_is_its_formula_of_exactly_its_degree(degree: int, skip: bool) -> None:
    torch.manual_seed(degree)
    layer: Any = fresh(PiLinear(8, 16, PiSettings(degree=degree, skip=skip)))
    x = normal(5, 8)
    factors = [x @ factor.T for factor in layer.factors.detach().split(16)]
    product = factors[0]
    for factor in factors[1:]:
        product = (factor * product + product) / math.sqrt(2) if skip else factor * product
    torch.testing.assert_close(layer(x), product + layer.bias, rtol=0, atol=1e-13)
    sizes = along_a_line(layer, 8)
    assert sizes[degree] > 1e-3
    assert sizes[degree + 1 :].max() < 1e-14
    homogeneous = torch.allclose(layer(3 * x) - layer.bias, 3.0**degree * (layer(x) - layer.bias))
    assert homogeneous == (not skip or degree == 1)
    check_gradients(layer, x[:2])
    two: Any = build_model(
        "mlp",
        {"inputs": 8, "widths": [8, 8], "activation": "identity", "feedforward": {"name": "pi", "degree": degree}},
    ).double()
    if degree <= 4:  # of degree 16
        sizes = along_a_line(two, 8)
        assert sizes[degree**2] > 1e-9
        assert sizes[degree**2 + 1 :].max() < 1e-13


@pytest.mark.parametrize("skip", [True, False])
def test_rectified_products_are_their_formula_and_are_cut_off(skip: bool) -> None:
    torch.manual_seed(1)
    layer: Any = fresh(PiLinear(3, 4, PiSettings(degree=3, skip=skip, activation="leaky_relu")))
    x = normal(6, 3)

    def rectified(y: Tensor) -> Tensor:
        return torch.where(y > 0, y, 0.2 * y)

    factors = rectified(x @ layer.factors.T + layer.shifts).split(4, dim=-1)
    gain = math.sqrt(2 / 1.04)
    divisor = math.sqrt(2 + 2 * 0.8 * gain / math.sqrt(2 * math.pi))
    product = rectified(factors[0] @ layer.mixing[0].T)
    for factor, mixing in zip(factors[1:], layer.mixing[1:], strict=True):
        product = rectified(((factor * product + product) / divisor if skip else factor * product) @ mixing.T)
    torch.testing.assert_close(layer(x), product + layer.bias, rtol=0, atol=1e-13)
    assert (layer(1e6 * x) - layer.bias).abs().max().item() == pytest.approx(256.0)
    check_gradients(layer, x[:2])


@pytest.mark.parametrize("activation", ["none", "leaky_relu"])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("degree", [2, 4])
def test_a_pi_layer_keeps_the_mean_square_at_the_start(degree: int, skip: bool, activation: str) -> None:
    torch.manual_seed(3)
    layer = PiLinear(256, 512, PiSettings(degree=degree, skip=skip, activation=activation))
    x = normal(256, 256, dtype=torch.float32)
    with torch.no_grad():
        exact = layer(x)
        assert exact.square().mean().item() == pytest.approx(1.0, abs=0.12)
        narrow = layer.bfloat16()(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), exact, rtol=0.1, atol=0.2)


@pytest.mark.parametrize("degree", [2, 3, 5])
def test_the_tangent_kernel_of_a_product_on_the_circle_is_0_above_its_degree(degree: int) -> None:
    torch.manual_seed(degree)
    sizes = {"inputs": 2, "widths": [64], "activation": "identity", "feedforward": {"name": "pi", "degree": degree}}
    model = build_model("mlp", sizes).double()
    angles = torch.arange(32, dtype=torch.float64) * (2 * math.pi / 32)
    rows = torch.stack((angles.cos(), angles.sin()), dim=1)
    parameters = {name: weight.detach() for name, weight in model.named_parameters()}
    jacobians = torch.func.jacrev(lambda values: torch.func.functional_call(model, values, (rows,))[:, 0])(parameters)
    flat = torch.cat([jacobian.flatten(1) for jacobian in jacobians.values()], dim=1)
    kernel = flat @ flat.T
    waves = torch.exp(1j * torch.outer(torch.arange(17), angles).to(torch.complex128))
    spectrum = (waves @ kernel.to(torch.complex128) * waves.conj()).sum(1).real / kernel.trace() / 32
    assert spectrum[: degree + 1].min() > 1e-4
    assert spectrum[degree + 1 :].abs().max() < 1e-15


def test_models_of_such_layers_are_counted_written_and_read(tmp_path: Path) -> None:
    layers: list[Any] = [
        {"name": "kan", "basis": "fourier", "degree": 2},
        {"name": "kan", "degree": 5},
        {"name": "pi", "degree": 3},
        {"name": "pi", "degree": 3, "skip": False, "activation": "leaky_relu"},
    ]
    sizes = {"inputs": 3, "outputs": 2, "widths": [5, 6, 6, 6], "activation": "identity", "feedforward": layers}
    model: Any = build_model("mlp", sizes)
    products = 3 * 5 * 4 + 5 * 6 * 5 + 6 * 6 * 3 + (6 * 6 * 3 + 3 * 6 * 6) + 6 * 2
    assert model.flops_per_row() == 6 * products
    assert sum(weight.numel() for weight in model.parameters() if weight.dim() > 1) == products
    save_model(tmp_path, model)
    written = read_description(tmp_path)["config"]
    assert (written["feedforward"], written["activation"]) == (layers, "identity")
    rows = normal(4, 3, dtype=torch.float32)
    assert torch.equal(load_model(tmp_path)(rows), model.eval()(rows))
    usual: Any = build_model("mlp", {"feedforward": ["kan", "pi"], "activation": "hermite3"})
    assert usual.blocks[0].layer.settings == KANSettings("hermite", 3)
    assert usual.blocks[1].layer.settings == PiSettings(2, True, "none")
    assert ModelParameters.model_validate({"architecture": "mlp", **sizes}).settings()["feedforward"] == layers


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"feedforward": {"name": "kan", "degree": 17}}, r"feedforward\.degree: expected an integer in 1…16, got 17"),
        ({"feedforward": {"name": "kan", "degree": True}}, r"feedforward\.degree: expected an integer in 1…16"),
        (
            {"feedforward": {"name": "kan", "basis": "fourier", "degree": 9}},
            r"feedforward\.degree: fourier of degree 9 has 18 functions per input, and 16 times a dense layer is the m",
        ),
        ({"feedforward": {"name": "kan", "basis": "wavelet"}}, r"feedforward\.basis: expected 'hermite' or 'fourier'"),
        ({"feedforward": {"name": "kan", "skip": True}}, r"feedforward\.skip: kan has no such option; there are: basi"),
        ({"feedforward": {"name": "pi", "degree": 0}}, r"feedforward\.degree: expected an integer in 1…16, got 0"),
        (
            {"feedforward": {"name": "pi", "activation": "relu"}},
            r"feedforward\.activation: expected 'none' or 'leaky_r",
        ),
    ],
)
def test_what_such_a_layer_cannot_be_is_refused_by_its_field(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_model("mlp", settings)
    with pytest.raises(ValidationError, match=r"feedforward\.|feedforward"):
        ModelParameters.model_validate({"architecture": "mlp", **settings})


@pytest.mark.parametrize("architecture", ["gpt2", "convnext"])
def test_models_of_blocks_refuse_them_by_name(architecture: str) -> None:
    for name in ("kan", "pi"):
        with pytest.raises(ValueError, match=f"feedforward: this model has no {name}; it has mlp, gated, quadratic"):
            build_model(architecture, {"feedforward": name})
    for activation in ("identity", {"name": "identity"}, [{"layers": "0-", "name": "identity"}]):
        with pytest.raises(ValueError, match="activation: identity is for layers of an mlp"):
            build_model(architecture, {"activation": activation})
    with pytest.raises(ValidationError, match="trainable: coefficients: identity has none"):
        TrainParameters.model_validate(
            {"model": {"architecture": "mlp", "activation": "identity"}, "steps": 1, "trainable": ["coefficients"]}
        )


def test_the_rectifier_inside_of_a_product_is_not_converted() -> None:
    model = build_model("mlp", {"widths": [4, 4], "feedforward": {"name": "pi", "activation": "leaky_relu"}})
    with pytest.raises(ValueError, match="which is described by its own options alone"):
        convert(model, [torch.randn(8, 1)], degree=6, types=["leaky_relu"])
