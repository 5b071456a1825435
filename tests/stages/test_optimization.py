"""AdamW's parameter groups: what decays, and what learns at which rate."""

from __future__ import annotations

import pytest

from polytrope.models import build_model
from polytrope.pipeline.stages.train.optimization import parameter_groups
from polytrope.pipeline.stages.train.parameters import TrainParameters

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 16, "sequence_length": 8}


@pytest.mark.parametrize(("own_rate", "expected"), [(None, 3e-4), (0.0, 0.0), (2e-3, 2e-3)])
def test_coefficients_learn_at_their_own_rate_and_only_matrices_decay(own_rate: float | None, expected: float) -> None:
    model = build_model("gpt2", {**SIZES, "activation": {"name": "hermite", "degree": 3}})
    parameters = TrainParameters(steps=1, learning_rate=3e-3, coefficient_learning_rate=own_rate, weight_decay=0.1)
    groups = {group["name"]: group for group in parameter_groups(model, parameters)}
    coefficients = groups["coefficients"]
    assert [tuple(parameter.shape) for parameter in coefficients["params"]] == [(4,), (4,)]
    assert coefficients["lr"] == pytest.approx(expected)
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "matrices": 0.1,
        "vectors": 0.0,
        "coefficients": 0.0,
    }
    assert groups["matrices"]["lr"] == groups["vectors"]["lr"] == 3e-3
    grouped = sum(parameter.numel() for group in groups.values() for parameter in group["params"])
    assert grouped == sum(parameter.numel() for parameter in model.parameters())  # the tied embedding counts once
