"""The multilayer perceptron: what its layers compute, what starts equal, what its configuration refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from polytrope.models import build_model, find_architecture
from polytrope.models.checkpoint import load_model, save_model
from polytrope.models.configurations import MLPConfig
from polytrope.models.formats import write_model

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
