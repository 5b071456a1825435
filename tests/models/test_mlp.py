"""The multilayer perceptron: what its layers compute, what starts equal, what its configuration refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from polytrope.models import build_model, find_architecture
from polytrope.models.checkpoint import load_model, model_config, read_description, save_model
from polytrope.models.configurations import MLPConfig
from polytrope.models.formats import write_model
from polytrope.pipeline.stages.train.parameters import ModelParameters

SIZES: dict[str, Any] = {"inputs": 3, "outputs": 2, "widths": [5, 5], "activation": "hermite2"}


def test_quadratic_layers_start_as_the_dense_ones_and_double_the_degree() -> None:
    torch.manual_seed(0)
    dense = build_model("mlp", SIZES).double()
    torch.manual_seed(0)
    quadratic = build_model("mlp", {**SIZES, "feedforward": "quadratic"}).double()
    rows = torch.randn(7, 3, dtype=torch.float64)
    assert torch.equal(dense(rows), quadratic(rows))
    # along a line x + tv: two layers of activation 2 have degree 4, and of quadratic layers 2·2·2·2 = 16
    with torch.no_grad():
        for name, parameter in quadratic.named_parameters():
            if "gate" in name or "square" in name:
                parameter.copy_(torch.randn_like(parameter) / 4)
    start, direction = torch.randn(2, 3, dtype=torch.float64)
    for model, degree in ((dense, 4), (quadratic, 16)):
        points = np.cos(np.pi * (np.arange(33) + 0.5) / 33)
        with torch.no_grad():
            values = model(start + 3.0 * torch.from_numpy(points)[:, None] * direction)[:, 0].numpy()
        coefficients = np.abs(np.polynomial.chebyshev.chebfit(points, values, 32))
        assert coefficients[degree] > 1e-9 * coefficients.max()
        assert coefficients[degree + 1 :].max() < 1e-12 * coefficients.max()


def test_residual_losses_and_flops() -> None:
    torch.manual_seed(1)
    model: Any = build_model("mlp", {**SIZES, "widths": [4, 4, 4], "activation": "relu", "residual": True})
    rows, targets = torch.randn(6, 3), torch.randn(6, 2)
    first, *others = model.blocks
    x = first.layer(rows).relu()
    for block in others:
        x = x + block.layer(x).relu()
    torch.testing.assert_close(model(rows), model.head(x))
    errors = (model(rows) - targets).square().mean(dim=1)
    for reduction, expected in (("none", errors), ("sum", errors.sum()), ("mean", errors.mean())):
        torch.testing.assert_close(model(rows, targets, reduction=reduction), expected)
    assert model.flops_per_row() == 6 * (3 * 4 + 4 * 4 + 4 * 4 + 4 * 2)
    quadratic: Any = build_model("mlp", {**SIZES, "feedforward": ["dense", {"name": "quadratic", "square": False}]})
    assert quadratic.flops_per_row() == 6 * (3 * 5 + 2 * 5 * 5 + 5 * 2)
    classes: Any = build_model("mlp", {**SIZES, "loss": "cross_entropy"})
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    torch.testing.assert_close(classes(rows, labels), nn.functional.cross_entropy(classes(rows), labels))
    with pytest.raises(ValueError, match="an mlp has none or block"):
        model.set_activation_checkpointing("mlp")
    model.set_activation_checkpointing("block")
    torch.testing.assert_close(model(rows), model.head(x))


def test_gradients_and_bfloat16() -> None:
    torch.manual_seed(3)
    model = build_model("mlp", {**SIZES, "feedforward": "quadratic", "residual": True}).double()
    rows = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(3, 2, dtype=torch.float64)
    parameters = dict(model.named_parameters())

    def outputs(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(model, named, (x,)).square().mean()

    assert torch.autograd.gradcheck(outputs, (rows, *parameters.values()))
    exact = model(rows).detach()
    narrow = model.bfloat16()(rows.float())
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.double(), exact, rtol=0.1, atol=0.05)
    assert model(rows, targets.float()).dtype == torch.float32


def test_inputs_of_all_activations_start_with_variance_1() -> None:
    torch.manual_seed(2)
    model: Any = build_model("mlp", {"inputs": 200, "widths": [400, 400], "activation": "hermite3"})
    seen: list[float] = []
    for block in model.blocks:
        block.act.register_forward_pre_hook(lambda _, given: seen.append(float(given[0].detach().square().mean())))
    model(torch.randn(500, 200))
    assert seen == pytest.approx([1.0, 1.0], abs=0.15)


@pytest.mark.parametrize("norm", ["layer_norm", "batch"])
def test_a_norm_stands_between_layer_and_activation(tmp_path: Any, norm: str) -> None:
    torch.manual_seed(4)
    model: Any = build_model("mlp", {**SIZES, "norm": norm, "residual": True})
    rows = torch.randn(9, 3)
    x = rows
    for number, block in enumerate(model.blocks):
        dim = (1,) if norm == "layer_norm" else (0,)
        given = block.layer(x)
        mean, variance = given.mean(dim, keepdim=True), given.var(dim, keepdim=True, correction=0)
        result = block.act((given - mean) / (variance + 1e-5).sqrt())
        x = x + result if number else result
    torch.testing.assert_close(model(rows), model.head(x), rtol=1e-5, atol=1e-5)
    save_model(tmp_path, model)
    assert read_description(tmp_path)["config"]["norm"] == norm
    assert torch.equal(load_model(tmp_path)(rows), model.eval()(rows))
    assert "norm" not in model_config(build_model("mlp", {**SIZES, "norm": {"name": "none"}}))


@pytest.mark.parametrize("architecture", ["gpt2", "convnext"])
def test_the_other_models_have_a_norm(architecture: str) -> None:
    with pytest.raises(ValueError, match="norm: none is for other models; this one has layer_norm, batch"):
        build_model(architecture, {"norm": "none"})


SIREN = {"name": "fourier", "degree": 1, "init": "siren"}


def test_inputs_of_sines_start_with_the_variance_that_their_weights_are_drawn_for() -> None:
    torch.manual_seed(0)
    model: Any = build_model("mlp", {"inputs": 2, "widths": [400] * 6, "activation": SIREN}).double()
    angles = torch.arange(1000, dtype=torch.float64) * (2 * math.pi / 1000)
    seen: list[torch.Tensor] = []
    for block in model.blocks:
        block.act.register_forward_pre_hook(lambda _, given: seen.append(30 * given[0].detach()))
    with torch.no_grad():
        first = model.blocks[0](torch.stack((angles.cos(), angles.sin()), dim=1))
        torch.testing.assert_close(first, seen[0].sin(), rtol=0, atol=1e-6)
        assert first.square().mean().item() == pytest.approx(0.5, abs=0.01)
        seen.clear()
        model(torch.stack((angles.cos(), angles.sin()), dim=1))
    # 30² · in · (6/(in · 30²))/3 · 1/2 = 1; of a normal number of variance v the sine has mean square (1 - exp(-2v))/2
    expected = [1.0]
    for _ in range(4):
        expected.append(1.0 - math.exp(-2.0 * expected[-1]))
    assert [float(x.square().mean()) for x in seen[1:]] == pytest.approx(expected, rel=0.05)
    assert expected[-1] == pytest.approx(0.80, abs=0.01)
    for number, block in enumerate(model.blocks):
        bound = 1 / 2 if number == 0 else math.sqrt(6 / 400) / 30
        assert 0.95 * bound < block.layer.weight.abs().max().item() <= bound
        assert bool(block.layer.bias.any()) == (number == 0)


def test_sines_are_written_and_read(tmp_path: Any) -> None:
    model = build_model("mlp", {**SIZES, "activation": SIREN, "feedforward": "quadratic"})
    save_model(tmp_path, model)
    rows = torch.randn(4, 3)
    loaded: Any = load_model(tmp_path)
    assert torch.equal(loaded(rows), model.eval()(rows))
    assert loaded.blocks[0].act.config() == SIREN
    for options in ({"degree": 2}, {"harmonic": True}, {"interval": [-4.0, 4.0]}):
        with pytest.raises(ValueError, match="init: siren is one sine: degree: 1, without harmonic and interval"):
            build_model("mlp", {"activation": SIREN | options})
        with pytest.raises(ValidationError, match="init: siren is one sine: degree: 1, without harmonic and interval"):
            ModelParameters.model_validate({"architecture": "mlp", "activation": SIREN | options})
    with pytest.raises(ValueError, match="init: expected stable, variance_preserving"):
        build_model("mlp", {"activation": SIREN | {"name": "legendre"}})
    for architecture in ("gpt2", "convnext"):
        with pytest.raises(ValueError, match="activation: init: siren needs weights that start to match; only an mlp"):
            build_model(architecture, {"activation": SIREN})
    with pytest.raises(ValueError, match="activation: init: siren is for dense and quadratic layers, this is kan"):
        build_model("mlp", {"activation": SIREN, "feedforward": ["dense", "kan"]})
    with pytest.raises(ValueError, match="activation: init: siren is for what its layer gives, and norm: batch"):
        build_model("mlp", {"activation": SIREN, "norm": "batch"})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"widths": []}, "widths: "),
        ({"widths": [4, 5], "residual": True}, "residual: "),
        ({"widths": [4], "residual": True}, "residual: "),
        ({"loss": "hinge"}, "loss: "),
        ({"loss": 1}, "loss: expected a name"),
        ({"feedforward": "gated"}, "feedforward: this model has no gated"),
        ({"feedforward": "mlp"}, "feedforward: this model has no mlp"),
        ({"inputs": 0}, "inputs must be"),
    ],
)
def test_what_the_configuration_refuses(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}"):
        build_model("mlp", settings)


def test_the_other_models_have_no_dense_layers() -> None:
    for architecture in ("gpt2", "convnext"):
        with pytest.raises(ValueError, match="feedforward: this model has no dense"):
            build_model(architecture, {"feedforward": "dense"})


def test_it_is_saved_as_it_is_and_transformers_has_none(tmp_path: Any) -> None:
    model = build_model("mlp", {**SIZES, "feedforward": "quadratic"})
    save_model(tmp_path / "own", model)
    rows = torch.randn(4, 3)
    assert torch.equal(load_model(tmp_path / "own")(rows), model.eval()(rows))
    with pytest.raises(ValueError, match="transformers has no MLP"):
        write_model(tmp_path / "other", model, format="huggingface")
    seen: list[int] = []
    modules = [module for name, module in model.named_modules() if name.endswith(".act")]
    for module in modules:
        module.register_forward_pre_hook(lambda _, given: seen.append(given[0].size(-1)))
    record = find_architecture("mlp")
    model(record.example(model.config))
    assert seen == record.activation_widths(model.config) == MLPConfig(**SIZES).widths
