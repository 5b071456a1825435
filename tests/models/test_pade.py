"""`feedforward: pade`: its formula, its start, that it has no poles, and that every room takes it or refuses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from polytrope.models import build_model
from polytrope.models.checkpoint import load_model, read_description, save_model
from polytrope.models.circuit import refuse_other_parts
from polytrope.models.convert import convert
from polytrope.models.formats import write_model
from polytrope.models.formats.onnx import save_onnx
from polytrope.models.gpt2 import GPT2
from polytrope.models.parts.feedforward import multiplicative_parameters
from polytrope.models.parts.pade import PadeLinear
from polytrope.models.parts.settings import PadeSettings, read_part
from polytrope.pipeline.stages.train.optimization import parameter_groups
from polytrope.pipeline.stages.train.parameters import ModelParameters, TrainParameters
from polytrope.pipeline.stages.train.trainable import freeze

SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 32, "sequence_length": 6, "n_layer": 2, "n_head": 2, "n_embd": 12},
    "convnext": {"depths": [1, 1], "dims": [6, 8], "num_classes": 3, "in_channels": 1, "patch_size": 1},
    "mlp": {"inputs": 3, "outputs": 2, "widths": [5, 5]},
}
EXAMPLES = {
    "gpt2": (torch.arange(12).reshape(2, 6) * 7 + 3) % 32,
    "convnext": torch.linspace(-2, 2, 128).sin().reshape(2, 1, 8, 8),
    "mlp": torch.linspace(-2, 2, 21).sin().reshape(7, 3),
}
USUAL = {"gpt2": "mlp", "convnext": "mlp", "mlp": "dense"}
ALL = [{"numerator_degree": k, "denominator_degree": degree} for k in (2, 3, 4) for degree in (1, 2)]


def made(architecture: str, seed: int = 0, **settings: Any) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(architecture, {**SIZES[architecture], **settings})


def moved(model: nn.Module, size: float = 0.3) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


@pytest.mark.parametrize(
    ("options", "bias"), [(options, number % 2 == 0) for number, options in enumerate(ALL)], ids=str
)
def test_a_layer_is_its_formula_and_has_its_gradients(options: dict[str, int], bias: bool) -> None:
    layer: Any = moved(PadeLinear(3, 4, bias=bias, settings=PadeSettings(**options)).double())
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def numerator(degree: int) -> Tensor:
        terms = [x @ layer.weight.T, *(x**j @ layer.numerator[j - 2].T for j in range(2, degree + 1))]
        return torch.stack(terms).sum(0) + (layer.bias if bias else 0.0)

    def denominator(degree: int) -> Tensor:
        terms = [torch.ones(5, 4, dtype=torch.float64)]
        terms += [x**j @ layer.denominator[j - 1].T for j in range(1, degree + 1)]
        return torch.stack(terms).sum(0)

    above, below = options["numerator_degree"], options["denominator_degree"]
    expected = denominator(below) * numerator(above) + denominator(below - 1) * numerator(above - 1)
    expected = expected / (denominator(below) ** 2 + denominator(below - 1) ** 2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-13)
    weights = {name: weight.detach().requires_grad_() for name, weight in layer.named_parameters()}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(weights, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x[:2].requires_grad_(), *weights.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("architecture", list(SIZES))
def test_a_model_starts_as_the_one_with_linear_layers(architecture: str, dtype: torch.dtype) -> None:
    settings = {"layer_scale": 0.5} if architecture == "convnext" else {}
    usual = made(architecture, **settings).to(dtype)
    example = EXAMPLES[architecture]
    for options in ALL:
        pade = made(architecture, feedforward={"name": "pade", **options}, **settings).to(dtype)
        with torch.no_grad():
            assert torch.equal(pade(example), usual(example))
        shared = dict(usual.named_parameters())
        own = dict(pade.named_parameters())
        assert all(torch.equal(own[name], weight) for name, weight in shared.items())
        assert {name.rpartition(".")[2] for name in own.keys() - shared.keys()} == {"numerator", "denominator"}


def test_there_are_no_poles_where_a_bare_quotient_has_them() -> None:
    generator = torch.Generator().manual_seed(0)
    layer: Any = PadeLinear(6, 12, bias=True, settings=PadeSettings()).double()
    with torch.no_grad():
        layer.denominator.copy_(3.0 * torch.randn(1, 12, 6, generator=generator))
        layer.numerator.copy_(torch.randn(1, 12, 6, generator=generator))
        layer.weight.copy_(torch.randn(12, 6, generator=generator))
        x = torch.randn(100_000, 6, dtype=torch.float64, generator=generator)
        below = 1.0 + x @ layer.denominator[0].T
        nearest = below.abs().argmin()
        assert below.flatten()[nearest].abs() < 1e-5  # a bare quotient would be a hundred thousand times its numerator
        values = layer(x)
        low = x @ layer.weight.T + layer.bias
        high = low + x**2 @ layer.numerator[0].T
        # |Q P₂ + P₁| ≤ √(Q² + 1) √(P₂² + P₁²), over a denominator of Q² + 1 ≥ 1
        assert (values.square() <= (high.square() + low.square()) * (1 + 1e-12)).all()
        # where the denominator of one row is exactly zero, the layer is P₁
        layer.denominator.zero_()[0, :, 0] = -1.0
        at = torch.tensor([[1.0, *[0.5] * 5]], dtype=torch.float64)
        torch.testing.assert_close(layer(at), at @ layer.weight.T + layer.bias, rtol=1e-14, atol=0)
        moved(layer, 2.0)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            assert layer.to(dtype)(100.0 * x[:5000].to(dtype)).isfinite().all()


def test_two_below_may_vanish_together() -> None:
    """Why the usual one has L = 1, and what the page says of L = 2: Q₂ = Q₁ = 0 where B₁x = -1 and B₂x² = 0."""
    layer: Any = PadeLinear(2, 1, bias=True, settings=PadeSettings(denominator_degree=2))
    with torch.no_grad():
        layer.denominator[0].copy_(torch.tensor([[-1.0, 0.0]]))
        layer.denominator[1].copy_(torch.tensor([[1.0, -1.0]]))
        assert not layer(torch.tensor([[1.0, 1.0]])).isfinite().any()


def test_narrow_numbers_are_close_to_exact_ones() -> None:
    model = moved(made("mlp", feedforward="pade", activation="hermite2"), 0.1).double()
    rows = EXAMPLES["mlp"].double()
    exact = model(rows).detach()
    narrow = model.bfloat16()(rows)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.double(), exact, rtol=0.1, atol=0.05)


def test_multiplicative_parameters_are_those_beyond_the_linear_layer() -> None:
    model = made("convnext", feedforward=["mlp", "pade"])
    names = {id(weight): name for name, weight in model.named_parameters()}
    expected = [f"stages.1.0.pwconv{layer}.{name}" for layer in (1, 2) for name in ("numerator", "denominator")]
    assert [names[id(weight)] for weight in multiplicative_parameters(model)] == expected
    settings = {"architecture": "convnext", **SIZES["convnext"], "feedforward": ["mlp", "pade"]}
    parameters = TrainParameters.model_validate({"model": settings, "steps": 1, "trainable": ["multiplicative"]})
    (group,) = (entry for entry in parameter_groups(model, parameters) if entry["name"] == "multiplicative")
    assert sorted(names[id(weight)] for weight in group["params"]) == sorted(expected)
    assert (group["peak"], group["weight_decay"]) == (pytest.approx(1e-4), 0.0)
    freeze(model, "convnext", ["multiplicative"])
    assert sorted(name for name, weight in model.named_parameters() if weight.requires_grad) == sorted(expected)


def test_floating_point_operations_count_every_matrix() -> None:
    options = {"name": "pade", "numerator_degree": 3, "denominator_degree": 2}
    usual, pade = (made("convnext", feedforward=part) for part in ("mlp", options))
    blocks = 64 * 8 * 6**2 + 16 * 8 * 8**2  # multiply-adds of the linear layers, at 8×8 and 4×4
    assert pade.flops_per_image(8, 8) - usual.flops_per_image(8, 8) == 6.0 * 4 * blocks  # type: ignore[operator]
    rows: Any = made("mlp", feedforward=["dense", "pade"])
    assert rows.flops_per_row() == 6.0 * (3 * 5 + 3 * 5 * 5 + 5 * 2)
    one, three = (made("gpt2", feedforward=part) for part in ("mlp", "pade"))
    assert three.flops_per_token() - one.flops_per_token() == 6.0 * 2 * 2 * 8 * 12**2  # type: ignore[operator]


@pytest.mark.parametrize("architecture", list(SIZES))
def test_it_is_written_converted_and_exported(tmp_path: Path, architecture: str) -> None:
    part = {"name": "pade", "numerator_degree": 3}
    model = moved(made(architecture, feedforward=part, activation="gelu"), 0.1).eval()
    example = EXAMPLES[architecture]
    save_model(tmp_path / "model", model)
    assert read_description(tmp_path / "model")["config"]["feedforward"] == part
    loaded = load_model(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(example), model(example))
    reason = "has no feedforward: .*'pade'" if architecture != "mlp" else "transformers has no MLP"
    with pytest.raises(ValueError, match=reason):
        write_model(tmp_path / "huggingface", model, format="huggingface")
    converted = convert(model, [example], degree=6)
    assert [entry.target for entry in converted.activations] == ["GELU", "GELU"]
    assert 0 < converted.difference < 1e-2
    write_model(tmp_path / "converted", converted.model)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "converted")(example), converted.model(example))
    if architecture == "convnext":
        assert save_onnx(tmp_path / "model.onnx", converted.model, [example], fixed=True).deviation <= 1e-4


def test_it_has_no_circuit() -> None:
    model = made("gpt2", feedforward=["quadratic", "pade"], norm="batch", attention="power", activation="hermite2")
    assert isinstance(model, GPT2)
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp\.c_fc: PadeLinear divides; train with feedforward"):
        refuse_other_parts(model, divisions=True)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"name": "pade", "numerator_degree": 1}, r"feedforward\.numerator_degree: expected 2 or 3 or 4, got 1"),
        ({"name": "pade", "denominator_degree": 0}, r"feedforward\.denominator_degree: expected 1 or 2, got 0"),
        ({"name": "pade", "square": True}, r"feedforward\.square: pade has no such option; there are: numerator_deg"),
    ],
)
def test_what_cannot_be_is_refused_by_its_field(part: dict[str, Any], words: str) -> None:
    for architecture in SIZES:
        with pytest.raises(ValueError, match=f"^{words}"):
            made(architecture, feedforward=part)
    with pytest.raises(ValidationError):
        ModelParameters.model_validate({"feedforward": part})


def test_its_settings_are_read_and_said_in_the_shortest_way() -> None:
    assert read_part("feedforward", {"name": "pade", "numerator_degree": 2}).config() == "pade"
    assert read_part("feedforward", "pade") == PadeSettings()
    layer = PadeLinear(2, 3, bias=False, settings=PadeSettings(4, 2))
    assert str(layer) == "PadeLinear(in_features=2, out_features=3, numerator_degree=4, denominator_degree=2)"
    assert layer.bias is None
    assert layer.numerator.numel() == 3 * 6
