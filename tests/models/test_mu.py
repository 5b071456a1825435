"""`feedforward: mu`: its formula, its degree, blocks without an activation, and its circuit of one product."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from polytrope.models import build_model
from polytrope.models.checkpoint import activation_modules, load_model, model_config, save_model
from polytrope.models.circuit import CircuitForm, embed, refuse_other_parts, with_reciprocals
from polytrope.models.convert import convert
from polytrope.models.formats import write_model
from polytrope.models.formats.onnx import save_onnx
from polytrope.models.formats.ring_graph import count, evaluate, read_ring_graph
from polytrope.models.gpt2 import GPT2
from polytrope.models.parts.mu import MuLayer, shift_pixels
from polytrope.models.parts.settings import MuSettings
from polytrope.pipeline.data.promised import PromisedModel, PromisedText
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.proof.card import _draw_activations
from polytrope.pipeline.stage import Resources
from polytrope.pipeline.stages.convert.convert import promise as promise_conversion
from polytrope.pipeline.stages.convert.parameters import ConvertParameters
from polytrope.pipeline.stages.evaluate.shapes import named_activations
from polytrope.pipeline.stages.train.activations import apply_activation_options
from polytrope.pipeline.stages.train.parameters import ModelParameters, TrainParameters

SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 16, "sequence_length": 4, "n_layer": 2, "n_head": 2, "n_embd": 8},
    "convnext": {"depths": [1, 1], "dims": [6, 8], "num_classes": 3, "in_channels": 1, "patch_size": 1},
}
EXAMPLES = {
    "gpt2": (torch.arange(8).reshape(2, 4) * 7 + 3) % 16,
    "convnext": torch.linspace(-2, 2, 128).sin().reshape(2, 1, 8, 8),
}
BATCH = {"name": "mu", "norm": "batch"}


def made(architecture: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model(architecture, {**SIZES[architecture], **settings})


def layer(inputs: int = 6, *, bias: bool = True, **settings: Any) -> Any:
    torch.manual_seed(0)
    return MuLayer(inputs, MuSettings(**settings), bias=bias, epsilon=1e-6).double()


@pytest.mark.parametrize(
    ("norm", "shift", "bias"), [("none", False, True), ("layer_norm", True, True), ("none", True, False)]
)
def test_a_layer_is_its_formula_and_has_its_gradients(norm: str, shift: bool, bias: bool) -> None:
    mu = layer(4, bias=bias, norm=norm, shift=shift)
    with torch.no_grad():
        mu.alpha.fill_(-0.7)
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def linear(part: Any, x: Tensor) -> Tensor:
        return x @ part.weight.T + (part.bias if bias else 0.0)

    first, second = linear(mu.linear, x), linear(mu.reduce, x)
    if shift:
        first, second = shift_pixels(first), shift_pixels(second)
    second = linear(mu.expand, second)
    if norm == "layer_norm":
        first, second = (nn.functional.layer_norm(factor, (16,), eps=1e-6) for factor in (first, second))
    torch.testing.assert_close(mu(x), first - 0.7 * first * second, rtol=1e-12, atol=1e-13)
    assert (first.shape[-1], mu.reduce.out_features) == (16, 2)
    weights = {name: weight.detach().requires_grad_() for name, weight in mu.named_parameters()}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(mu, dict(zip(weights, values, strict=True)), (x,))[..., :3].sum(-2)

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *weights.values()))


def test_it_starts_as_published() -> None:
    mu = layer(400)
    for part in (mu.linear, mu.reduce, mu.expand):
        assert (part.bias == 1.0).all()
        assert part.weight.square().mean().item() * part.in_features == pytest.approx(2.0, rel=0.02)
    assert mu.alpha.tolist() == [1.0]
    for architecture, name in (("gpt2", "transformer.h.1.mlp.c_fc"), ("convnext", "stages.1.0.pwconv1")):
        part: Any = made(architecture, feedforward="mu").get_submodule(name)
        assert (part.expand.bias == 1.0).all()
        assert part.linear.weight.square().mean().item() * 8 == pytest.approx(2.0, rel=0.3)  # the model's own is .02


def test_shifted_channels_are_those_of_the_neighbours() -> None:
    x = torch.randn(2, 4, 3, 9, generator=torch.Generator().manual_seed(0))
    found = shift_pixels(x)
    for row in range(4):
        for column in range(3):
            neighbours = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
            for quarter, (above, left) in enumerate(neighbours):
                source = (above, left) if 0 <= above < 4 and 0 <= left < 3 else (row, column)
                channels = slice(2 * quarter, 2 * quarter + 2 if quarter < 3 else 9)
                assert torch.equal(found[:, row, column, channels], x[:, source[0], source[1], channels])
    assert torch.equal(shift_pixels(x[:, :1, :1]), x[:, :1, :1])


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_the_degree_along_a_line_doubles_with_each_layer(norm: str) -> None:
    torch.manual_seed(3)
    stack = nn.Sequential()
    for _ in range(4):
        outer = nn.Linear(32, 8).double()
        stack.append(nn.Sequential(layer(8, norm=norm), outer))
        with torch.no_grad():
            outer.weight.mul_(0.2)
        stack.train()(torch.randn(50, 8, dtype=torch.float64))  # statistics that are not those of the start
    stack.eval()
    angles = (np.arange(24) + 0.5) * np.pi / 24
    start, direction = torch.randn(2, 8, dtype=torch.float64)
    for depth in range(1, 5):
        with torch.no_grad():
            values = stack[:depth](start + torch.from_numpy(np.cos(angles))[:, None] * 3.0 * direction).numpy()
        sizes = np.abs(np.cos(np.outer(np.arange(24), angles)) @ values).max(1)
        assert sizes[2**depth] > 1e-10 * sizes.max()
        assert sizes[2**depth + 1 :].max() < 1e-14 * sizes.max()


@pytest.mark.parametrize("architecture", ["gpt2", "convnext"])
def test_a_block_has_no_activation_and_says_so(tmp_path: Path, architecture: str) -> None:
    model: Any = made(architecture, feedforward=["mu", "mlp"], activation="hermite2")
    assert model.config.activation == ["none", "hermite2"]
    assert list(activation_modules(model)) == [1]
    assert [name for name, _ in named_activations(model)] == ["block 2"]
    example = EXAMPLES[architecture]
    save_model(tmp_path / "model", model)
    written = json.loads((tmp_path / "model" / "model.json").read_text())["config"]
    assert written["activation"][0] == "none"
    assert written["activation"][1]["name"] == "hermite"
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "model")(example), model.eval()(example))
        for mode in ("mlp", "block"):
            model.set_activation_checkpointing(mode)
            assert model(example).isfinite().all()
    every = made(architecture, feedforward="mu", activation="hermite2")
    assert model_config(every)["activation"] == "none"
    assert activation_modules(every) == {}
    assert not any(name.endswith((".act", ".activation")) for name, _ in every.named_modules())
    save_model(tmp_path / "every", every)
    assert _draw_activations(tmp_path / "every") is None  # the card's
    assert (_draw_activations(tmp_path / "model") or b"").startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"has no feedforward: mu"):
        write_model(tmp_path / "huggingface", every, format="huggingface")
    narrow = every.eval().double()(example).detach()
    torch.testing.assert_close(
        every.bfloat16()(example).double(), narrow, rtol=0.1, atol=0.1 * float(narrow.abs().max())
    )
    given = {**SIZES[architecture], "feedforward": ["mu", "mlp"], "activation": "hermite2"}
    options = apply_activation_options(architecture, {**given, "activation_options": {"per_channel": True}})
    assert [entry if entry == "none" else entry["num_parameters"] for entry in options["activation"]] == ["none", 32]


@pytest.mark.parametrize(("name", "value"), [("activation", "gelu"), ("activation_options", {"per_channel": True})])
def test_what_is_said_of_activations_is_refused_where_no_block_has_one(name: str, value: Any) -> None:
    given = {"architecture": "gpt2", **SIZES["gpt2"], name: value}
    with pytest.raises(ValidationError, match=f"{name}: it has no effect: every block has feedforward: mu"):
        ModelParameters.model_validate({**given, "feedforward": BATCH})
    ModelParameters.model_validate({**given, "feedforward": BATCH, name: None})
    ModelParameters.model_validate({**given, "feedforward": ["mu", "mlp"]})


def test_activations_are_converted_where_there_are_some_and_onnx_takes_it(tmp_path: Path) -> None:
    shifted = {"name": "mu", "shift": True, "norm": "batch"}
    model = made("convnext", feedforward=[shifted, "mlp"], activation="gelu", layer_scale=0.5)
    example = EXAMPLES["convnext"]
    model(example)
    model.eval()
    converted = convert(model, [example], degree=6)
    assert [entry.name for entry in converted.activations] == ["stages.1.0.act"]
    write_model(tmp_path / "model", converted.model)
    assert model_config(load_model(tmp_path / "model"))["activation"][0] == "none"
    assert save_onnx(tmp_path / "model.onnx", converted.model, [example], fixed=True).deviation <= 1e-4
    text = PromisedText(sequence_length=4, tokens=16, tokenizer="bytes")
    promised = PromisedModel("gpt2", {**SIZES["gpt2"], "feedforward": "mu"})
    with pytest.raises(UserError, match="feedforward: mu in every block, and no activation to convert"):
        promise_conversion(ConvertParameters(), {"model": promised, "dataset": text}, Resources(), tmp_path)


def test_floating_point_operations_are_those_of_its_four_matrices() -> None:
    usual, mu = (made("convnext", feedforward=name) for name in ("mlp", "mu"))
    more = sum(pixels * (2 * 4 * w * w + w * w // 2 + 4 * w * w // 2 - 8 * w * w) for pixels, w in ((64, 6), (16, 8)))
    assert mu.flops_per_image(8, 8) - usual.flops_per_image(8, 8) == 6.0 * more  # type: ignore[operator]
    assert MuSettings().products(64) / (8 * 64**2) == 1.3125
    small = made("convnext", dims=[3, 3], feedforward="mu")
    part: Any = small.get_submodule("stages.0.0")
    matrices = sum(
        weight.numel() for name, weight in part.named_parameters() if name.startswith("pw") and weight.dim() > 1
    )
    assert MuSettings().products(3) == matrices


# --- as a circuit


@pytest.mark.parametrize(
    "settings", [{"feedforward": "mu"}, {"feedforward": BATCH}, {"feedforward": "mu", "bias": False}]
)
def test_its_circuit_is_one_product_of_two_linear_maps(tmp_path: Path, settings: dict[str, Any]) -> None:
    """A block: 8 of attention, and 1."""
    model = made("gpt2", norm="batch", attention="power", **settings)
    assert isinstance(model, GPT2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.mul_(1.5)
        for _ in range(8):
            model.train()(torch.randint(0, 16, (8, 4)))
    with_reciprocals(model, {0: (0.3, 12.0), 1: (0.4, 12.0)}, 7, 1)
    model.eval()
    refuse_other_parts(model)
    tokens = torch.arange(4)[None] * 3
    form = CircuitForm(model, {}, 4).eval()
    with torch.no_grad():
        embedded, logits = embed(model, tokens), model(tokens)
    save_onnx(tmp_path / "circuit.onnx", form, [embedded], ["x"], fixed=True)
    graph = read_ring_graph(tmp_path / "circuit.onnx")
    operators = {node.op_type for node in onnx.load(str(tmp_path / "circuit.onnx")).graph.node}
    assert operators <= {
        "Add",
        "Sub",
        "Mul",
        "MatMul",
        "Gemm",
        "Constant",
        "Reshape",
        "Transpose",
        "Slice",
        "Identity",
        "Unsqueeze",
    }
    assert evaluate(graph, embedded.double().numpy()) == pytest.approx(
        logits.numpy(), abs=1e-5 * float(logits.abs().max())
    )
    costs = count(graph)
    assert (costs["block_0"].depth, costs["block_1"].depth) == (9, 18)


def test_layer_norms_inside_have_no_circuit() -> None:
    model = made("gpt2", feedforward=["mu", {"name": "mu", "norm": "layer_norm"}], norm="batch", attention="power")
    assert isinstance(model, GPT2)
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp\.c_fc\.norms\.0: LayerNorm divides by a root"):
        refuse_other_parts(model, divisions=True)


@pytest.mark.parametrize(
    ("architecture", "settings", "words"),
    [
        ("gpt2", {"feedforward": {"name": "mu", "shift": True}}, r"feedforward\.shift: moves pixels of images"),
        (
            "gpt2",
            {"feedforward": {"name": "mu", "norm": "group"}},
            r"feedforward\.norm: expected 'none' or 'layer_norm' or",
        ),
        (
            "gpt2",
            {"feedforward": ["mu", "mlp"], "activation": "none"},
            "activation: none, but layer 1 has feedforward: mlp",
        ),
        ("convnext", {"activation": "none"}, "activation: none, but layer 0 has feedforward: mlp, which needs one"),
        ("convnext", {"feedforward": {"name": "mu", "square": True}}, r"feedforward\.square: mu has no such option"),
    ],
)
def test_what_cannot_be_is_refused_by_its_field(architecture: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        made(architecture, **settings)
    with pytest.raises(ValidationError):
        ModelParameters.model_validate({"architecture": architecture, **SIZES[architecture], **settings})
    for feedforward, activation, message in (("mu", "gelu", "this model has no mu"), ("dense", "none", "layer 0 has")):
        with pytest.raises(ValueError, match=message):
            build_model("mlp", {"feedforward": feedforward, "activation": activation})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trainable": ["coefficients"]}, "trainable: coefficients: none has none"),
        ({"trainable": ["multiplicative"]}, "only a model with .*feedforward: pade.* has them"),
        ({"range_penalty": {"activation": 1.0}}, "range_penalty: the model has no activations outside of its norms"),
        ({"activation_checkpointing": "mlp"}, "mlp computes activations again, and the model has none"),
    ],
)
def test_what_nothing_would_heed_is_refused(settings: dict[str, Any], words: str) -> None:
    model = {**SIZES["gpt2"], "feedforward": "mu"}
    with pytest.raises(ValidationError, match=words):
        TrainParameters.model_validate({"model": model, "steps": 1, **settings})
