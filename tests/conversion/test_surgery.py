"""Finding, calibrating, fitting and replacing the activations of a model."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from conversion_support import own_model, tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from polytrope.models.calibration import Calibration, add, calibrate
from polytrope.models.conversion import FitOptions, apply, fit_layers, layer_costs
from polytrope.models.surgery import Activation, find_activations, replace_module, restore_activations
from polytrope.ops import build_activation, is_learnable_activation
from polytrope.pipeline.stages.convert.conversion_record import advise


class Shared(nn.Module):
    """One activation module for two layers, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        activation = nn.SiLU()
        self.first = nn.Sequential(nn.Linear(4, 8), activation)
        self.second = nn.Sequential(nn.Linear(8, 4), activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def run(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(batch)


def test_activations_are_found_by_type_pattern_and_layer() -> None:
    model = nn.ModuleDict(
        {
            "encoder": nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.GELU()) for _ in range(4)]),
            "pooler": nn.Tanh(),
        }
    )
    names = [activation.name for activation in find_activations(model)]
    assert names == ["encoder.0.1", "encoder.1.1", "encoder.2.1", "encoder.3.1"]  # a pooler only if asked for
    assert [a.name for a in find_activations(model, include=["pool*", "encoder.0.*"])] == ["encoder.0.1", "pooler"]
    assert [a.name for a in find_activations(model, types=["Tanh"])] == ["pooler"]
    assert [a.name for a in find_activations(model, exclude=["pooler"], layers=(1, 2))] == names[1:3]
    assert [a.name for a in find_activations(model, include=["encoder.3.*"])] == ["encoder.3.1"]
    with pytest.raises(ValueError, match=r"leaves none of 5 activations: encoder.0.1"):
        find_activations(model, layers=(7, 9))
    with pytest.raises(ValueError, match="Linear has no activation module to replace"):
        find_activations(nn.Linear(2, 2))


def test_classes_of_transformers_are_found() -> None:
    from transformers.activations import ACT2FN

    model = nn.ModuleList(ACT2FN[name] for name in ("gelu", "gelu_new", "silu", "relu", "relu6", "quick_gelu", "relu2"))
    assert len(find_activations(model)) == len(model)


def test_a_shared_activation_is_calibrated_on_all_its_inputs_and_replaced_everywhere() -> None:
    model, x = Shared(), torch.randn(16, 4)
    (found,) = find_activations(model)
    measured = calibrate(model, [found], [x], run)[found.name]
    assert measured.total == 16 * 8 + 16 * 4
    replace_module(model, found.name, build_activation("relu"))
    assert model.first[1] is model.second[1]
    assert isinstance(model.second[1], nn.ReLU)


def test_histograms_are_exact_counts_and_close_quantiles() -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 2 + 1
    measured = Calibration.of(x)
    assert measured.total == 200_000
    assert measured.minimum == float(x.min())
    assert measured.maximum == float(x.max())
    for fraction in (0.001, 0.1, 0.5, 0.99):
        assert measured.quantile(fraction) == pytest.approx(float(np.quantile(x.numpy(), fraction)), abs=0.02)
    points, counts = measured.measure()
    assert counts @ points / counts.sum() == pytest.approx(float(x.mean()), abs=1e-3)
    assert measured.density(np.array([1.0]))[0] == pytest.approx(0.19947, rel=0.05)


def test_histograms_of_parts_in_any_order_add_up_to_that_of_the_whole() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(3)) * 40
    parts = [{"a": Calibration.of(part)} for part in x.split(700)]
    whole = Calibration.of(x)
    for order in (parts, parts[::-1]):
        joined = add(order)["a"]
        assert (joined.counts == whole.counts).all()
        assert (joined.minimum, joined.maximum) == (whole.minimum, whole.maximum)


def test_inputs_that_are_not_finite_or_never_come_are_refused_and_hooks_go() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.GELU())
    found = find_activations(model)
    with pytest.raises(ValueError, match="activation `1` receives NaN or infinity"):
        calibrate(model, found, [torch.full((2, 3), float("nan"))], run)
    with pytest.raises(ValueError, match="never reaches: 1"):
        calibrate(model, found, [], run)
    assert not model[1]._forward_pre_hooks
    assert model.training


@pytest.mark.parametrize("family", ["hermite", "chebyshev", "fourier", "rational", "tropical_rational"])
def test_a_converted_model_answers_almost_as_before(family: str) -> None:
    model, batch = own_model("gpt2"), tokens()
    original = run(model, batch)
    found = find_activations(model)
    fits = fit_layers(found, calibrate(model, found, [batch], run), FitOptions(family, 8))
    assert torch.equal(run(model, batch), original)  # fitting alone changes nothing
    apply(model, fits)
    assert all(is_learnable_activation(model.get_submodule(entry.name)) for entry in fits)
    moved = float((run(model, batch) - original).norm() / original.norm())
    assert 0 < moved < {"tropical_rational": 0.1}.get(family, 0.01)


def test_the_target_error_takes_the_smallest_degree_of_each_layer() -> None:
    model, batch = own_model("gpt2"), tokens()
    found = find_activations(model)
    calibrations = calibrate(model, found, [batch], run)
    for entry in fit_layers(found, calibrations, FitOptions(degree=16, target_error=0.01)):
        assert entry.relative_error <= 0.01
        degree = entry.fit.config["degree"]
        lower = fit_layers([Activation(entry.name, entry.module)], calibrations, FitOptions(degree=degree - 1))[0]
        assert lower.relative_error > 0.01
    with pytest.raises(ValueError, match=r"transformer.h.0.mlp.activation.*reaches no error"):
        fit_layers(found, calibrations, FitOptions(degree=3, target_error=1e-9))


def test_costs_are_those_of_single_layers_and_leave_the_model_as_it_was() -> None:
    model, batch = own_model("gpt2"), tokens()
    original = run(model, batch)
    found = find_activations(model)
    fits = fit_layers(found, calibrate(model, found, [batch], run), FitOptions(degree=3))
    costs = layer_costs(model, fits, [batch], run)
    assert torch.equal(run(model, batch), original)
    alone = copy.deepcopy(model)
    apply(alone, fits[1:])
    expected = float((run(alone, batch) - original).norm() / original.norm())
    assert costs[fits[1].name] == pytest.approx(expected, rel=1e-4)


def test_costs_never_hold_the_output_in_float64() -> None:
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
                self.numbers = max(self.numbers, result.numel())
            return result

    model, batch = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 1 << 15)), torch.randn(96, 2)
    found = find_activations(model)
    fits = fit_layers(found, calibrate(model, found, [batch], run), FitOptions(degree=3))
    with Largest() as largest:
        (cost,) = layer_costs(model, fits, [batch], run).values()
    assert 0 < largest.numbers <= 1 << 20 < run(model, batch).numel()
    before = run(model, batch).double()
    apply(model, fits)
    assert cost == pytest.approx(float((run(model, batch).double() - before).norm() / before.norm()), rel=1e-5)


@pytest.mark.parametrize(("target", "degree"), [(nn.ReLU(), 1), (nn.LeakyReLU(0.2), 1), (nn.GELU(), None)])
def test_the_advice_names_what_is_exact_for_straight_lines(target: nn.Module, degree: int | None) -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(2, 8), target), torch.randn(400, 2)
    found = find_activations(model)
    calibrations, options = calibrate(model, found, [batch], run), FitOptions(degree=3)
    fits = fit_layers(found, calibrations, options)
    (entry,) = advise(fits, layer_costs(model, fits, [batch], run), options)
    assert entry.advice is not None
    assert (f"tropical_rational of degree {degree} has it exactly" in entry.advice) == (degree is not None)
    if degree is not None:
        exact = fit_layers(found, calibrations, FitOptions("tropical_rational", degree))
        assert exact[0].relative_error < 1e-6


def test_a_description_is_enough_to_put_activations_back() -> None:
    model, batch = own_model("gpt2"), tokens()
    found = find_activations(model)
    fits = fit_layers(found, calibrate(model, found, [batch], run), FitOptions(degree=4))
    apply(model, fits)
    fresh = own_model("gpt2")
    restore_activations(fresh, {entry.name: entry.fit.config for entry in fits})
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(run(fresh, batch), run(model, batch))
    with pytest.raises(ValueError, match=r"no module `layer.9`"):
        restore_activations(fresh, {"layer.9": "gelu"})
