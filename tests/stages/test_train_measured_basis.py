"""`activation_basis: measured`: an initial model's polynomials in the basis of their inputs; the same functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from training_support import MODEL, PARAMETERS, make_context, make_dataset, make_initial

from polytrope.models import build_model
from polytrope.models.checkpoint import activation_modules, load_model
from polytrope.models.measured_basis import write_in_measured_basis
from polytrope.pipeline.data.promised import PromisedModel
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Resources
from polytrope.pipeline.stages.train.loop import _create_model
from polytrope.pipeline.stages.train.parameters import TrainParameters
from polytrope.pipeline.stages.train.train import promise
from polytrope.pipeline.stages.train.training_plan import make_plan

SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 320, "sequence_length": 32}
ACTIVATION = [
    {"name": "hermite", "degree": 4, "init": "gelu", "interval": [-4, 4]},
    {"name": "chebyshev", "degree": 3, "init": "gelu", "interval": [-4, 4], "variable": [0.0, 4.0]},
]
GPT2 = {**SIZES, "activation": ACTIVATION}


def test_the_model_stays_the_same_and_coefficients_are_those_of_an_orthonormal_basis() -> None:
    torch.manual_seed(0)
    model = build_model("gpt2", {**SIZES, "activation": [ACTIVATION[0], "gelu"]}).double()
    tokens = torch.randint(0, 320, (16, 32))
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0)  # so that the inputs fill the interval
        before = model.eval()(tokens)
        model.blocks[0].mlp.activation.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        model(tokens)
        model.blocks[0].mlp.activation._forward_pre_hooks.clear()
        assert write_in_measured_basis(model, tokens.split(5)) == ["transformer.h.0.mlp.activation"]
        torch.testing.assert_close(model(tokens), before, rtol=1e-10, atol=1e-12)
        module = activation_modules(model)[0]
        x = seen[0][seen[0].abs() <= 4]
        assert len(x) < seen[0].numel(), "what lies outside does not count"
        mean_square = float(module(x).square().mean())
        coefficients = module.coefficients.numpy()
    assert module.config()["learnable_recurrence"] is True
    assert mean_square == pytest.approx(float(np.square(coefficients).sum()), rel=1e-2)  # bins of a histogram
    with pytest.raises(ValueError, match="no activation is a polynomial"):
        write_in_measured_basis(model, [tokens])


def test_fine_tuning_begins_in_the_basis_of_the_first_training_samples(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    initial = make_initial(tmp_path / "initial", dataset, GPT2)
    parameters = TrainParameters(steps=1, activation_basis="measured", trainable=["*.coefficients"])
    model, _ = _create_model(make_plan(make_context(tmp_path), dataset, initial, parameters))
    expected = load_model(initial.path)
    reader = open_split(dataset.path, "train")
    blocks = torch.from_numpy(reader.samples(np.arange(min(256, len(reader)))).astype(np.int64))[:, :-1]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(blocks[:4]), expected(blocks[:4]))
    write_in_measured_basis(expected, blocks.split(8))
    learns = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert learns == {f"transformer.h.{block}.mlp.activation.coefficients" for block in range(2)}
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


def promised(settings: dict[str, Any]) -> Any:
    parameters = TrainParameters(steps=1, activation_basis="measured")
    upstream = {"dataset": None, "initial": PromisedModel("gpt2", settings)}
    return promise(parameters, upstream, Resources(), Path())


def test_what_has_no_such_basis_is_refused_before_anything_starts() -> None:
    assert [entry["learnable_recurrence"] for entry in promised(GPT2).settings["activation"]] == [True, True]
    assert "activation" not in promised(SIZES).settings  # of a conversion it is not known
    for activation, name in (
        ("gelu", "gelu"),
        ("rational5", "rational"),
        ({**ACTIVATION[0], "num_parameters": 2}, "her"),
    ):
        with pytest.raises(UserError, match=f"activation_basis: measured is for hermite, .* `initial` has {name}"):
            promised({**SIZES, "activation": activation})
    with pytest.raises(ValidationError, match="activation_basis: measured is for an `initial` input"):
        TrainParameters.model_validate({**PARAMETERS, "model": MODEL, "activation_basis": "measured"})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"adapters": {"name": "lora", "rank": 2}}, "adapters alone learn, and no coefficient: name coefficients"),
        ({"trainable": ["norms", "head"]}, r"trainable is \['norms', 'head'\], and no coefficient: name coefficients"),
        ({"coefficient_learning_rate": 0}, "coefficient_learning_rate is 0: give a rate above 0"),
    ],
    ids=str,
)
def test_a_basis_in_which_nothing_learns_is_refused_before_anything_starts(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=f"activation_basis: measured: {words}.*; otherwise leave it out"):
        TrainParameters.model_validate({"steps": 1, "activation_basis": "measured", **given})
    TrainParameters.model_validate({"steps": 1, **given})
    learning = {"adapters": {"name": "lora", "rank": 2}, "trainable": ["adapters", "coefficients"]}
    TrainParameters.model_validate({"steps": 1, "activation_basis": "measured", **learning})


def test_patterns_that_mean_no_coefficient_are_refused_before_the_first_step(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    initial = make_initial(tmp_path / "initial", dataset, GPT2)
    parameters = TrainParameters(steps=1, activation_basis="measured", trainable=["*.attn.*"])
    plan = make_plan(make_context(tmp_path), dataset, initial, parameters)
    with pytest.raises(
        UserError, match=r"activation_basis: measured: trainable is \['\*.attn.\*'\], and nothing"
    ) as caught:
        _create_model(plan)
    assert "name coefficients under `trainable` too" in caught.value.hint
