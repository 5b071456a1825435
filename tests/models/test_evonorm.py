"""EvoNorm-S0: its formula, its start, where it stands in a ConvNeXt, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from polytrope.models import build_model
from polytrope.models.checkpoint import activation_modules, load_model, model_config, save_model
from polytrope.models.convert import convert
from polytrope.models.formats import write_model
from polytrope.models.formats.onnx import save_onnx
from polytrope.models.parts.evonorm import EPSILON, EvoNorm
from polytrope.models.parts.ranges import RangePenalty, penalise_ranges
from polytrope.models.parts.settings import read_part
from polytrope.pipeline.data.promised import PromisedImages, PromisedModel
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Resources
from polytrope.pipeline.stages.analyze.subject import _linears
from polytrope.pipeline.stages.convert.convert import promise as promise_conversion
from polytrope.pipeline.stages.convert.parameters import ConvertParameters
from polytrope.pipeline.stages.export_circuit.export_circuit import promise as promise_circuit
from polytrope.pipeline.stages.export_circuit.parameters import ExportCircuitParameters
from polytrope.pipeline.stages.train.parameters import ModelParameters, TrainParameters

SIZES: dict[str, Any] = {
    "depths": [1, 1],
    "dims": [8, 16],
    "num_classes": 3,
    "in_channels": 1,
    "patch_size": 1,
    "layer_scale": 0.5,
}
IMAGES = torch.linspace(-2, 2, 192).sin().reshape(3, 1, 8, 8)
TARGETS = torch.tensor([0, 2, 1])


def made(**settings: Any) -> Any:
    torch.manual_seed(0)
    return build_model("convnext", {**SIZES, "norm": "evonorm", **settings})


def norm(groups: int = 4, channels: int = 8, *, activated: bool = False) -> EvoNorm:
    return EvoNorm(read_part("norm", {"name": "evonorm", "groups": groups}), channels, activated=activated).double()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moved(module: nn.Module, size: float = 0.3) -> Any:
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.add_(size * random(*parameter.shape, seed=number).to(parameter))
    return module


def deviations(x: np.ndarray[Any, Any], groups: int) -> np.ndarray[Any, Any]:
    """√(variance + ε) of each sample's groups, by loops, of the shape of x."""
    result, size = np.empty_like(x), x.shape[-1] // groups
    for sample in range(len(x)):
        for group in range(groups):
            channels = slice(group * size, (group + 1) * size)
            numbers = x[sample, :, :, channels].ravel()
            result[sample, :, :, channels] = np.sqrt(np.mean((numbers - np.mean(numbers)) ** 2) + EPSILON)
    return result


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_it_is_its_formula_and_its_gradient_is_that_of_the_formula(groups: int) -> None:
    layer, x = moved(norm(groups)), 2 + random(3, 4, 5, 8)
    weight, bias, slope = (parameter.detach().numpy() for parameter in (layer.weight, layer.bias, layer.slope))
    values = x.numpy()
    expected = weight * values / (1 + np.exp(-slope * values)) / deviations(values, groups) + bias
    assert layer(x).detach().numpy() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    own = moved(norm(groups, activated=True))
    assert [name for name, _ in own.named_parameters()] == ["weight", "bias"]
    cubes = own(x, x**3).detach().numpy()
    weight, bias = own.weight.detach().numpy(), own.bias.detach().numpy()
    assert cubes == pytest.approx(weight * values**3 / deviations(values, groups) + bias, rel=1e-12, abs=1e-12)
    inputs = x[:2, :2, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (inputs, layer.weight, layer.bias, layer.slope))


def test_a_slope_of_0_gives_half_of_x_by_its_deviation_and_other_samples_change_nothing() -> None:
    layer, x = norm(), 3 + random(2, 5, 5, 8)
    with torch.no_grad():
        layer.slope.zero_()
        expected = x.numpy() / (2 * deviations(x.numpy(), 4))
        assert layer(x).numpy() == pytest.approx(expected, rel=1e-14, abs=0)
        layer.slope.fill_(1.0)
        other = torch.cat((x[:1], random(4, 5, 5, 8, seed=1)))
        assert torch.equal(layer(x)[:1], layer(other)[:1])
        half = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), norm()(x).detach(), rtol=0.02, atol=0.05)


@pytest.mark.parametrize(
    ("feedforward", "activation", "width"),
    [("mlp", None, 32), ("mlp", "hermite3", 32), ("quadratic", "gelu", 32), ("gated", "hermite3", 24)],
)
def test_in_a_block_it_has_the_place_of_the_activation(feedforward: str, activation: str | None, width: int) -> None:
    given = {"feedforward": feedforward, "norm": {"name": "evonorm", "groups": 4}, "dims": [8, 16]}
    if feedforward == "gated":
        given["dims"] = [9, 18]
    model = moved(made(**given, **({} if activation is None else {"activation": activation})), 0.05).double()
    block, x = model.blocks[0], random(2, given["dims"][0], 4, 4)
    assert (block.act is None) == (activation is None)
    mixed = block.pwconv1(block.dwconv(x).permute(0, 2, 3, 1))
    first, second = mixed.chunk(2, dim=-1) if block.gated else (mixed, torch.ones((), dtype=torch.float64))
    assert first.size(-1) == width
    values = first * torch.sigmoid(block.norm.slope * first) if activation is None else block.act(first)
    sizes = torch.from_numpy(deviations(first.detach().numpy(), 4))
    branch = block.pwconv2((block.norm.weight * values / sizes + block.norm.bias) * second)
    torch.testing.assert_close(block(x), x + (block.gamma * branch).permute(0, 3, 1, 2), rtol=1e-10, atol=1e-12)
    gradients = []
    images = IMAGES.double()
    for mode in ("none", "mlp", "block"):
        model.set_activation_checkpointing(mode)
        model.zero_grad()
        model(images, TARGETS).backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    assert all(bool((gradient != 0).any()) for gradient in gradients[0])
    for other in gradients[1:]:
        assert all(torch.equal(first, second) for first, second in zip(gradients[0], other, strict=True))


def test_its_input_has_variance_1_at_the_start_as_behind_a_layer_norm() -> None:
    torch.manual_seed(0)
    model: Any = build_model("convnext", {**SIZES, "dims": [32, 32], "norm": "evonorm"})
    images = torch.randn(4, 32, 32, 32)
    block = model.blocks[0]
    inside = block.pwconv1(block.dwconv(images).permute(0, 2, 3, 1))[:, 4:-4, 4:-4]
    assert float(inside.var().detach()) == pytest.approx(1.0, rel=0.3)
    assert all(type(module).__name__ != "EvoNorm" for module in model.downsample_layers.modules())


def test_it_is_written_read_and_exported_with_and_without_an_activation(tmp_path: Path) -> None:
    plain, learned = moved(made(), 0.1).eval(), moved(made(activation="hermite3"), 0.1).eval()
    for name, model in (("plain", plain), ("learned", learned)):
        save_model(tmp_path / name, model)
        again = load_model(tmp_path / name)
        assert torch.equal(again(IMAGES), model(IMAGES))
        assert model_config(again)["norm"] == "evonorm"
        assert save_onnx(tmp_path / f"{name}.onnx", model, [IMAGES], fixed=True).deviation <= 1e-4
        with pytest.raises(ValueError, match="has no norm: evonorm"):
            write_model(tmp_path / "huggingface", model, format="huggingface")
    assert model_config(plain)["activation"] == "none"
    assert (list(activation_modules(plain)), list(activation_modules(learned))) == ([], [0, 1])
    assert _linears(learned.blocks[0]) == []
    assert model_config(made(activation="gelu"))["activation"] == "gelu"
    assert model_config(build_model("convnext", SIZES))["activation"] == "gelu"


def test_options_of_activations_are_refused_where_there_is_none_but_the_one_inside() -> None:
    given = {"architecture": "convnext", "norm": "evonorm", "activation_options": {"per_channel": True}}
    with pytest.raises(ValueError, match="activation_options: it has no effect: every block has norm: evonorm alone"):
        ModelParameters.model_validate(given)
    ModelParameters.model_validate({**given, "activation": "hermite"})


def test_activations_are_converted_and_the_sigmoid_is_none(tmp_path: Path) -> None:
    model = moved(made(activation="gelu"), 0.1).eval()
    before = model(IMAGES).detach()
    converted = convert(model, [IMAGES], degree=12)
    assert [entry.name for entry in converted.activations] == ["stages.0.0.act", "stages.1.0.act"]
    torch.testing.assert_close(converted.model(IMAGES), before, rtol=0, atol=0.02 * float(before.abs().max()))
    for given in ({}, {"types": ["sigmoid"]}, {"include": ["*"]}):
        with pytest.raises(ValueError, match="it is a part of EvoNorm, which is described by its own options alone"):
            convert(moved(made(), 0.1).eval(), [IMAGES], degree=12, **given)  # type: ignore[arg-type]
    for types, name in ((["EvoNorm"], "norm"), (["MaxPlusConvolution"], "dwconv")):
        with pytest.raises(ValueError, match=rf"stages\.0\.0\.{name} \({types[0]}\): it is a part of {types[0]}"):
            convert(made(activation="gelu", mixer="max_plus"), [IMAGES], family="hermite", types=types)
    images = PromisedImages(channels=1, size=8, classes=3)
    promised = PromisedModel("convnext", {**SIZES, "norm": "evonorm", "activation": "none"})
    unknown = PromisedModel("convnext", {**SIZES, "norm": "evonorm"})  # as after a conversion of one beside it
    promise_conversion(ConvertParameters(), {"model": unknown, "dataset": images}, Resources(), tmp_path)
    with pytest.raises(UserError, match="norm: evonorm, and no activation to convert but the sigmoid"):
        promise_conversion(ConvertParameters(), {"model": promised, "dataset": images}, Resources(), tmp_path)
    equalized = ConvertParameters.model_validate({"quantize": {"bits": 4, "per": "tensor", "equalize": True}})
    for settings in (promised.settings, {**promised.settings, "activation": "hermite3"}):
        upstream = {"model": PromisedModel("convnext", settings), "dataset": images}
        with pytest.raises(UserError, match="quantize: equalize: norm: evonorm divides what an activation gives by"):
            promise_conversion(equalized, upstream, Resources(), tmp_path)
    with pytest.raises(UserError, match="a convnext has no circuit"):
        promise_circuit(ExportCircuitParameters(), {"model": promised, "dataset": images}, Resources(), tmp_path)


def test_ranges_of_its_activation_are_penalised() -> None:
    model = moved(made(activation="hermite3"), 0.1)
    plain = model(IMAGES, TARGETS)
    penalise_ranges(model, RangePenalty(activation=1.0, beyond=0.1, denominator=0.0))
    assert model(IMAGES, TARGETS) > plain + 1e-3


@pytest.mark.parametrize(
    ("architecture", "settings", "words"),
    [
        ("gpt2", {}, "norm: evonorm is for other models; this one has layer_norm, batch, rms"),
        ("mlp", {}, "norm: evonorm is for other models; this one has none, layer_norm, batch"),
        (
            "convnext",
            {"dims": [9, 18]},
            "norm.groups: 8 groups do not divide the 36 channels that the activation of lay",
        ),
        ("convnext", {"feedforward": ["mlp", "mu"]}, "norm: evonorm takes the place of an activation, and layer 1 has"),
        ("convnext", {"norm": {"name": "evonorm", "groups": 3}}, "norm.evonorm.groups"),
        ("convnext", {"norm": {"name": "layer_norm", "groups": 8}}, "norm.layer_norm.groups"),
    ],
)
def test_what_cannot_be_is_refused_with_its_field(architecture: str, settings: dict[str, Any], words: str) -> None:
    sizes = {"depths": [1, 1], "dims": [8, 16]} if architecture == "convnext" else {}
    model = {"architecture": architecture, **sizes, "norm": "evonorm", **settings}
    with pytest.raises(ValueError, match=words):  # pydantic's is one
        TrainParameters.model_validate({"steps": 1, "model": model})
    if "name" not in str(settings):
        with pytest.raises(ValueError, match=words):
            build_model(architecture, {name: value for name, value in model.items() if name != "architecture"})


def test_a_training_heeds_it() -> None:
    model = {"architecture": "convnext", "depths": [1, 1], "dims": [8, 16], "norm": {"name": "evonorm", "groups": 4}}
    given = {"steps": 1, "activation_checkpointing": "mlp", "trainable": ["norms"]}
    parameters = TrainParameters.model_validate({**given, "model": model})
    assert parameters.model is not None
    assert [entry["name"] for entry in parameters.model.activations()] == ["none", "none"]
    with pytest.raises(ValueError, match="range_penalty: the model has no activations outside of its norms"):
        TrainParameters.model_validate({"steps": 1, "model": model, "range_penalty": {"activation": 1.0}})
    with pytest.raises(ValueError, match="trainable: coefficients: none has none"):
        TrainParameters.model_validate({"steps": 1, "model": model, "trainable": ["coefficients"]})
