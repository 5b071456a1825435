"""AdamW's parameter groups: what decays, and what learns at which rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polytrope.models import build_model
from polytrope.models.response import response
from polytrope.ops import LearnableActivation, build_activation
from polytrope.ops.interpolate import fit
from polytrope.pipeline.stages.train.coefficient_rates import STEP, coefficient_multiple
from polytrope.pipeline.stages.train.optimization import coefficient_rates, parameter_groups, set_learning_rate
from polytrope.pipeline.stages.train.parameters import TrainParameters

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 16, "sequence_length": 8}
RECIPE: dict[str, Any] = {"name": "hermite", "degree": 4, "init": "gelu", "interval": [-4, 4]}


def learnable(config: Any) -> LearnableActivation:
    module = build_activation(config)
    assert isinstance(module, LearnableActivation)
    return module


@pytest.mark.parametrize("own_rate", [0.0, 2e-3])
def test_coefficients_learn_at_their_own_rate_and_only_matrices_decay(own_rate: float) -> None:
    model = build_model("gpt2", {**SIZES, "activation": {"name": "hermite", "degree": 3}})
    parameters = TrainParameters(steps=1, learning_rate=3e-3, coefficient_learning_rate=own_rate, weight_decay=0.1)
    groups = {group["name"]: group for group in parameter_groups(model, parameters)}
    coefficients = groups["coefficients"]
    assert [tuple(parameter.shape) for parameter in coefficients["params"]] == [(4,), (4,)]
    assert coefficients["lr"] == pytest.approx(own_rate)
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "matrices": 0.1,
        "vectors": 0.0,
        "coefficients": 0.0,
    }
    assert groups["matrices"]["lr"] == groups["vectors"]["lr"] == 3e-3
    grouped = sum(parameter.numel() for group in groups.values() for parameter in group["params"])
    assert grouped == sum(parameter.numel() for parameter in model.parameters())  # the tied embedding counts once


def test_without_a_rate_of_their_own_each_activation_has_its_multiple_which_the_schedule_scales() -> None:
    settings = {**SIZES, "activation": [RECIPE, {"name": "hermite", "degree": 3}]}
    model = build_model("gpt2", settings)
    fine_tuning = TrainParameters(steps=1, learning_rate=3e-3)
    from_scratch = TrainParameters.model_validate({"model": settings, "steps": 1, "learning_rate": 3e-3})
    assert {group["name"]: group["peak"] for group in parameter_groups(model, fine_tuning)} == pytest.approx(
        {"matrices": 3e-3, "vectors": 3e-3, "coefficients_x1": 3e-3, "coefficients_x0.1": 3e-4}
    )
    groups = parameter_groups(model, from_scratch)
    peaks = {group["name"]: group["peak"] for group in groups}
    assert peaks == pytest.approx(
        {"matrices": 3e-3, "vectors": 3e-3, "coefficients_x10": 3e-2, "coefficients_x0.1": 3e-4}
    )
    set_learning_rate(groups, 0.5)
    assert coefficient_rates(groups) == pytest.approx(
        {"learning_rate/coefficients_x10": 1.5e-2, "learning_rate/coefficients_x0.1": 1.5e-4}
    )


@pytest.mark.parametrize(
    ("config", "multiple"),
    [
        (RECIPE, 10.0),
        (RECIPE | {"num_parameters": 8}, 10.0),
        (RECIPE | {"degree": 12}, 10.0),
        (RECIPE | {"glu": True}, 10.0),
        ({"name": "affine", "init": "gelu_tanh"}, 10.0),
        ({"name": "rational_spline", "init": "gelu"}, 10.0),
        (RECIPE | {"name": "chebyshev"}, 0.1),  # T_4 is 1,921 at 4
        (RECIPE | {"interval": [-8, 8]}, 1.0),  # He_4 is 16 times as large there
        ("hermite4", 0.1),  # nothing holds the formula outside
    ],
)
def test_the_multiples_are_these(config: Any, multiple: float) -> None:
    assert coefficient_multiple(learnable(config)) == multiple


@pytest.mark.parametrize(("degree", "interval"), [(8, (-2.9, 2.9)), (12, (-10.0, 3.0))])
def test_converted_polynomials_are_fine_tuned_alike_and_no_faster_than_the_model(
    degree: int, interval: tuple[float, float]
) -> None:
    """The rates from scratch took a small GPT-2 from 2.278 to 2.286, where GELU came to 2.263 (study.md)."""
    multiples = {"hermite": 0.5, "chebyshev": 1.0, "legendre": 1.0}
    for family, multiple in multiples.items():
        module = fit("gelu", family, degree, interval=interval).build()
        assert isinstance(module, LearnableActivation)
        assert module.variable is not None
        assert coefficient_multiple(module, fine_tuning=True) == multiple
        assert coefficient_multiple(module) == pytest.approx(10 * multiple)
        assert multiple * response(module) < 10.0  # times the base rate: how far a step moves the function


def test_the_same_function_learns_equally_fast_in_every_basis() -> None:
    """The multiple follows from how far a step of the coefficients moves the function."""
    for name in ("hermite", "chebyshev", "legendre"):
        module = learnable(RECIPE | {"name": name}).double()
        grid = torch.linspace(-4, 4, 65, dtype=torch.float64)
        basis = []
        for index in range(5):
            with torch.no_grad():
                module.get_parameter("coefficients").copy_(torch.eye(5, dtype=torch.float64)[index])
                basis.append(module(grid))
        expected = float(torch.stack(basis).square().sum(0).mean().sqrt())
        assert response(module) == pytest.approx(expected)
        assert 0.7 < coefficient_multiple(module) * expected / STEP < 1.5
