"""Fits that go by how much an error at an input moves the model's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from polytrope.models.calibration import Calibration, calibrate
from polytrope.models.conversion import FitOptions, fit_layer, fit_layers
from polytrope.models.convert import convert
from polytrope.models.inputs import forward
from polytrope.models.sensitivity import Sensitivity, sensitivities
from polytrope.models.surgery import Activation, find_activations
from polytrope.ops.interpolate import fit
from polytrope.pipeline.stages.convert.conversion_record import advise


class Units(nn.Module):
    """One unit of 128 is always far below 0, where a GELU gives nothing, so that its weight may be anything."""

    def __init__(self, activation: nn.Module, weight: float = 100.0) -> None:
        super().__init__()
        self.activation = activation
        self.last = nn.Linear(128, 4)
        with torch.no_grad():
            self.last.weight[:, 0] = weight

    def forward(self, x: Tensor) -> Tensor:
        shift = torch.zeros(128)
        shift[0] = -7.0
        found: Tensor = self.last(self.activation(x + shift))
        return found


class Masked(Units):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        assert attention_mask is None or attention_mask.shape == x.shape[:2]
        return super().forward(x)


def data(samples: int = 256) -> Tensor:
    return torch.randn(samples, 128, generator=torch.Generator().manual_seed(0))


def units(activation: nn.Module | None = None, kind: Callable[..., Units] = Units, weight: float = 100.0) -> Units:
    torch.manual_seed(0)
    return kind(activation or nn.GELU(), weight)


def effect_of(model: nn.Module, batch: Any, x: Tensor) -> Sensitivity:
    found = find_activations(model)
    measured = calibrate(model, found, [x], forward)
    (effect,) = sensitivities(model, found, measured, [batch], forward).values()
    return effect


def test_an_input_counts_by_the_squared_weights_behind_it() -> None:
    model = units(weight=0.3)
    effect = effect_of(model, data(4096), data(4096))
    with torch.no_grad():
        squares = model.last.weight.square().sum(0)
    wanted = float(squares[0] / squares.mean())
    assert 20 < wanted < 40
    assert float(effect(np.array([-7.0]))[0]) == pytest.approx(wanted, rel=0.25)  # in steps of 2^(1/4)
    assert (effect(np.linspace(-2.0, 2.0, 9)) == 1.0).all()  # none counts less than an average one
    assert (effect(np.array([-1e9, 1e9])) >= 1.0).all()


def test_a_conversion_moves_the_output_less_where_few_inputs_decide_it() -> None:
    for family, degree in (("fourier", 2), ("hermite", 6)):
        alike = convert(units(), [data()], family=family, degree=degree, rated_samples=0)
        by_effect = convert(units(), [data()], family=family, degree=degree, rated_samples=256)
        assert by_effect.difference < 0.3 * alike.difference
        (layer,), (other,) = by_effect.layers, alike.layers
        # The certificate is of the inputs as they were seen, among which those of one unit are few.
        x, counts = layer.calibration.measure()
        with torch.no_grad():
            missed = (layer.fit.build()(torch.from_numpy(x).float()).double() - nn.GELU()(torch.from_numpy(x))).numpy()
        assert layer.fit.certificate.rms >= 0.999 * float(np.sqrt(counts @ missed**2 / counts.sum()))
        assert layer.fit.certificate.rms < 2 * layer.fit.certificate.target_mean_square**0.5
        assert layer.fit.certificate.target_mean_square == pytest.approx(other.fit.certificate.target_mean_square)


@pytest.mark.parametrize(
    "options",
    [
        {"target_error": 0.01},
        {"degree": 3, "weight": "normal"},
        {"polynomial_only": True, "depth": 3},
    ],
)
def test_what_is_made_for_the_inputs_as_they_are_does_not_go_by_effect(options: dict[str, Any]) -> None:
    (alike,) = convert(units(), [data()], rated_samples=0, **options).layers
    (rated,) = convert(units(), [data()], **options).layers
    assert rated.sensitivity is None
    np.testing.assert_array_equal(rated.fit.coefficients, alike.fit.coefficients)


def test_padding_has_no_effect() -> None:
    model = units(kind=Masked)
    x = data(64).reshape(4, 16, 128)
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[:, 8:] = 0
    padded = x.clone()
    padded[:, 8:] = -3.0  # what padding may be: far from all others, and the same for all units
    effect = effect_of(model, {"x": padded, "attention_mask": mask}, padded)
    everywhere = effect_of(model, {"x": padded}, padded)
    assert float(effect(np.array([-10.0]))[0]) == 1.0
    assert float(everywhere(np.array([-10.0]))[0]) > 10
    assert float(effect(np.array([-7.0]))[0]) > 10


@pytest.mark.parametrize("kind", ["frozen", "in place", "shared"])
def test_the_model_is_as_it_was(kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=kind == "in place"), nn.Linear(4, 4))
    if kind == "shared":
        model = nn.Sequential(*model, model[1], nn.Linear(4, 2))
    model.train()
    flags = [index % 2 == 0 and kind != "frozen" for index, _ in enumerate(model.parameters())]
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    x = torch.randn(64, 4)
    wanted = model(x).detach().clone()
    found = find_activations(model)
    effects = sensitivities(model, found, calibrate(model, found, [x], forward), [x], forward)
    assert [effect.factors.max() > 1.0 for effect in effects.values()] == [True] * len(found)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training and "forward" not in vars(module) for module in model.modules())
    assert not x.requires_grad
    assert torch.equal(model(x), wanted)


def test_where_no_gradient_reaches_all_inputs_count_alike() -> None:
    class Detached(Units):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    assert (effect_of(units(kind=Detached), data(), data()).factors == 1.0).all()


class Stepped(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, x: Tensor) -> Tensor:
        return x.round()


def test_an_operation_without_gradient_is_said_with_the_way_out() -> None:
    class Rounded(Units):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = Stepped.apply(super().forward(x))
            return found

    with pytest.raises(ValueError, match=r"cannot be measured: .*backward.*rated_samples=0"):
        convert(units(kind=Rounded), [data()], degree=3)
    assert convert(units(kind=Rounded), [data()], degree=3, rated_samples=0).activations


def test_no_degree_misses_more_of_what_is_minimised() -> None:
    calibration = Calibration.of(data())
    effect = Sensitivity(np.array([-2.0]), np.array([50.0, 1.0]))
    x, counts = calibration.measure()
    weights = counts * effect(x)
    exact = nn.GELU()(torch.from_numpy(x))
    for family in ("hermite", "rational"):
        missed = []
        for degree in range(2, 7):
            (layer,) = fit_layers(
                [Activation("a", nn.GELU())], {"a": calibration}, FitOptions(family, degree), {"a": effect}
            )
            with torch.no_grad():
                off = (layer.fit.build(torch.float64)(torch.from_numpy(x)) - exact).numpy()
            missed.append(float(weights @ off**2))
        assert missed == sorted(missed, reverse=True)


def test_held_out_inputs_count_by_their_importance_too() -> None:
    generator = np.random.default_rng(4)
    points = np.sort(generator.standard_normal(500))
    held_out = 1.3 * generator.standard_normal(200)
    given: dict[str, Any] = {"weight": (points, np.ones(500)), "interval": "best", "held_out": held_out}
    errors = []
    for degree in (4, 5):
        alike = fit("gelu", "rational", degree, importance=np.ones_like, **given).certificate.rms
        assert alike == pytest.approx(fit("gelu", "rational", degree, **given).certificate.rms, rel=1e-4)
        errors.append(alike)
    assert errors[1] <= errors[0] * (1 + 1e-6)


def test_an_importance_is_of_measured_inputs_and_a_number() -> None:
    points = np.linspace(-3, 3, 50)
    with pytest.raises(ValueError, match="importance: is of measured inputs"):
        fit("gelu", importance=np.ones_like)
    for wrong in (np.zeros_like, lambda x: -np.ones_like(x), lambda x: x * np.nan, lambda x: x[:3] ** 2):
        with pytest.raises(ValueError, match="importance: expected finite, non-negative values"):
            fit("gelu", weight=(points, np.ones(50)), interval="best", importance=wrong)


def test_a_higher_degree_is_advised_by_the_error_that_fits_go_by() -> None:
    """Degree 4 is three times as far off as degree 2 at the inputs as they are, and nearer where they matter."""
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    sensitivity = Sensitivity(np.array([-1.0]), np.array([1e4, 1.0]))
    weights = torch.where(x < -1.0, 1e4, 1.0)
    layers, errors = [], []
    for degree in (2, 4):
        layer = fit_layer(Activation("a", nn.GELU()), Calibration.of(x), FitOptions(degree=degree), sensitivity)
        off = layer.fit.build(torch.float64)(x.double()).detach() - nn.functional.gelu(x.double())
        square = (weights * off.square()).sum() / (weights * nn.functional.gelu(x.double()).square()).sum()
        layers.append(layer)
        errors.append(float(square.sqrt()))
        assert layer.weighted_error == pytest.approx(errors[-1], rel=0.02)  # by bins, and other samples held out
    assert layers[1].relative_error > 3 * layers[0].relative_error
    assert layers[1].weighted_error < 0.1 * layers[0].weighted_error
    (entry,) = advise(layers[:1], {"a": 1.0}, FitOptions(degree=2))
    before, after = (f"{layer.weighted_error:.2g}" for layer in layers)
    assert entry.advice is not None
    assert entry.advice.endswith(f"degree 4 would lower its error weighted by effect from {before} to {after}")
    plain = fit_layer(Activation("a", nn.GELU()), Calibration.of(x), FitOptions(degree=2))
    assert plain.weighted_error == plain.relative_error
