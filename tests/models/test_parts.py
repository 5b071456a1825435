"""Parts of models: left out they change nothing, what is written is read, what cannot be is refused by its field."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor, nn

from polytrope.models import build_model
from polytrope.models.checkpoint import load_model, model_config, read_description, save_model
from polytrope.models.configurations import GPT2Config, changed_parts
from polytrope.models.convert import convert
from polytrope.models.formats import write_model
from polytrope.models.parts.attention import (
    ATTENTIONS,
    AttentionSizes,
    PowerAttention,
    RecurrentState,
    build_attention,
    causal_means,
    even_power,
)
from polytrope.models.parts.feedforward import FEEDFORWARDS, LAYERS, QuadraticLinear, multiplicative_parameters
from polytrope.models.parts.mixer import MIXERS
from polytrope.models.parts.norm import NORMS, BatchNorm, NormSizes, build_norm, fold_into_linear
from polytrope.models.parts.ranges import RangePenalty, penalise_ranges
from polytrope.models.parts.settings import PARTS, BatchNormSettings, read_part
from polytrope.pipeline.stages.train.optimization import coefficient_rates, parameter_groups
from polytrope.pipeline.stages.train.parameters import ModelParameters, TrainParameters

GPT2: dict[str, Any] = {"vocab_size": 64, "sequence_length": 12, "n_layer": 2, "n_head": 2, "n_embd": 24}
CONVNEXT: dict[str, Any] = {"depths": [1, 2], "dims": [12, 24], "num_classes": 3, "in_channels": 1, "patch_size": 1}
SIZES = {"gpt2": GPT2, "convnext": CONVNEXT}
TOKENS = (torch.arange(24).reshape(2, 12) * 7 + 3) % 64
IMAGES = torch.linspace(-2, 2, 128).sin().reshape(2, 1, 8, 8)
EXAMPLES = {"gpt2": TOKENS, "convnext": IMAGES}


def made(architecture: str, seed: int = 0, **settings: Any) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(architecture, {**SIZES[architecture], **settings})


def moved(model: nn.Module, size: float = 0.1) -> nn.Module:
    """Away from its start, so that no part is what it replaces."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


# Of the models before there were parts: what model.json says, names and shapes of the weights, and the state of torch's
# generator after building (how many numbers were drawn).
BEFORE = {
    "gpt2": ("1ba1121b1204ef4a", "78e4fddd35945b82", "e66f2f1007f34b0c"),
    "convnext": ("f0f6ae9471c3e4ac", "4817cba3d34986be", "835a6b484ab24000"),
}


@pytest.mark.parametrize("architecture", ["gpt2", "convnext"])
def test_a_model_without_parts_is_what_it_was_before_there_were_any(tmp_path: Path, architecture: str) -> None:
    model = made(architecture)
    state = torch.get_rng_state()
    save_model(tmp_path, model)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
    found = [(tmp_path / "model.json").read_bytes(), json.dumps(shapes).encode(), state.numpy().tobytes()]
    assert tuple(hashlib.sha256(part).hexdigest()[:16] for part in found) == BEFORE[architecture]
    written_out = made(
        architecture, **{field: next(iter(PARTS[field])) for field in PARTS if field in vars(model.config)}
    )
    assert [name for name, _ in written_out.named_modules()] == [name for name, _ in model.named_modules()]


def test_every_part_has_settings_and_a_builder() -> None:
    tables: dict[str, Any] = {
        "attention": ATTENTIONS,
        "norm": NORMS,
        "feedforward": {**FEEDFORWARDS, **LAYERS},
        "mixer": MIXERS,
    }
    assert {field: list(kinds) for field, kinds in PARTS.items()} == {
        field: list(kinds) for field, kinds in tables.items()
    }
    for field, kinds in PARTS.items():
        for name in kinds:
            assert read_part(field, name).config() == name
    assert read_part("attention", {"name": "power", "power": 4}).config() == {"name": "power", "power": 4}
    assert read_part("attention", {"name": "power", "power": 2}).config() == "power"


@pytest.mark.parametrize(
    ("architecture", "settings", "words"),
    [
        ("gpt2", {"attention": "pwoer"}, "attention: expected one of softmax, power, .*'pwoer'"),
        ("gpt2", {"attention": {"name": "power", "power": 3}}, r"attention\.power: expected 2 or 4, got 3"),
        (
            "gpt2",
            {"attention": {"name": "softmax", "power": 2}},
            r"attention\.power: softmax has no such option; it has none",
        ),
        (
            "gpt2",
            {"attention": {"name": "power", "power": 4, "recurrent": True}},
            r"attention\.recurrent: only power: 2 has a state of that form, this is power: 4",
        ),
        (
            "gpt2",
            {"attention": {"name": "power", "reciprocal": {"degree": 0, "newton": 1, "domain": [0.1, 4.0]}}},
            r"attention\.reciprocal\.degree: expected an integer in 1…128, got 0",
        ),
        (
            "gpt2",
            {"attention": {"name": "power", "reciprocal": {"degree": 3, "newton": 1, "domain": [0, 4.0]}}},
            r"attention\.reciprocal\.domain: expected \[low, high\] with 0 < low < high, got \[0, 4.0\]",
        ),
        (
            "gpt2",
            {"attention": {"name": "power", "reciprocal": 3}},
            r"attention\.reciprocal: expected degree, domain, newton",
        ),
        ("gpt2", {"attention": ["power"]}, "attention: a list of length 1 for 2 layers"),
        ("gpt2", {"attention": [{"layers": 0, "name": "power"}]}, "attention: no range of `layers` has layer 1"),
        ("gpt2", {"attention": "power", "dropout": 0.1}, "dropout: 0.1, but attention: power drops no weights"),
        ("gpt2", {"norm": ["batch", "batch"]}, "norm: expected one of layer_norm, batch"),
        ("gpt2", {"norm": {"name": "batch", "layers": 0}}, r"norm\.layers: batch has no such option"),
        ("gpt2", {"feedforward": {"name": "gated", "square": True}}, r"feedforward\.square: gated has no such option"),
        (
            "gpt2",
            {"feedforward": {"name": "quadratic", "square": 1}},
            r"feedforward\.square: expected False or True, got 1",
        ),
        ("gpt2", {"feedforward": 4}, "feedforward: expected a name, its settings, or a list of these, got 4"),
        ("gpt2", {"activation": {"name": "hermite", "glu": True}}, "activation: .* is gated.*`feedforward: gated`"),
        (
            "gpt2",
            {"attention": ["power", {"name": "polynomial_mixer", "reach": 5}]},
            r"attention\.reach: expected 4 or 8 or 16 or 32 or 64, got 5",
        ),
        (
            "gpt2",
            {"attention": "polynomial_mixer", "dropout": 0.1},
            "dropout: 0.1, but attention: polynomial_mixer drops",
        ),
        ("gpt2", {"mixer": "padre"}, "unknown model setting mixer"),
        ("convnext", {"mixer": {"name": "max_plus", "form": "sum"}}, "mixer.form: expected 'max' or 'min' or 'differ"),
        ("convnext", {"mixer": ["padre", "padre"]}, "mixer: a list of length 2 for 3 layers"),
        ("convnext", {"attention": "power"}, "unknown model setting attention"),
        ("convnext", {"feedforward": ["mlp", "gated"]}, "feedforward: a list of length 2 for 3 layers"),
    ],
)
def test_what_cannot_be_is_refused_by_its_field(architecture: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        made(architecture, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"attention": "pwoer"}, r"attention\.one\n.*'softmax', 'power'"),
        ({"attention": {"name": "power", "recurrent": True, "power": 4}}, "recurrent: only power: 2"),
        ({"attention": {"name": "power", "reciprocal": {"degree": 3}}}, r"reciprocal: expected degree, domain, newton"),
        ({"attention": {"name": "power", "layers": 0}}, "`layers` stands in a list"),
        ({"attention": "power", "dropout": 0.1}, "dropout: 0.1, but attention: power drops no weights"),
        ({"feedforward": ["gated", "mlp", "mlp"], "n_layer": 2}, "feedforward: a list of length 3 for 2 layers"),
        ({"attention": ["softmax", "power"], "n_layer": 4}, "attention: a list of length 2 for 4 layers"),
        ({"attention": [{"layers": 0, "name": "power"}], "n_layer": 2}, "attention: no range of `layers` has layer 1"),
        ({"architecture": "convnext", "attention": "power"}, "attention: a convnext has no such setting"),
    ],
)
def test_a_workflow_is_checked_before_torch_is_there(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ModelParameters.model_validate(settings)


def test_a_workflow_says_parts_as_the_configuration_takes_them() -> None:
    given = {
        "attention": [{"layers": "0", "name": "power", "power": 4}, {"layers": "1-", "name": "softmax"}],
        "norm": "batch",
        "feedforward": [{"name": "quadratic", "square": False}, "gated"],
    }
    parameters = ModelParameters.model_validate({**GPT2, **given})
    assert {name: parameters.settings()[name] for name in given} == given
    with pytest.raises(ValidationError, match=r"num_parameters \(5\) does not divide the 64 channels"):
        ModelParameters.model_validate(
            {**GPT2, "feedforward": "gated", "activation": {"name": "hermite", "num_parameters": 5}}
        )
    for settings, words in (
        ({"multiplicative_learning_rate": 1e-4}, "multiplicative_learning_rate: only for a model with"),
        ({"trainable": ["multiplicative"]}, "trainable: multiplicative: only a model with .*feedforward: quadratic"),
        ({"range_penalty": {"activation": 0}}, "range_penalty: activation is 0, and only attention: power"),
        ({"range_penalty": {"activation": 0, "denominator": 0}}, "both 0: leave range_penalty out"),
        ({"range_penalty": {"denominator": 0.1}}, "range_penalty.denominator: only attention: power and"),
        ({"range_penalty": {"activation": 0, "beyond": 2.0}}, "beyond: activation is 0, so that no input costs"),
    ):
        with pytest.raises(ValidationError, match=words):
            TrainParameters.model_validate({"model": GPT2, "steps": 1, **settings})


EVERYTHING: dict[str, dict[str, Any]] = {
    "gpt2": {
        "attention": [{"name": "power", "power": 4}, {"name": "power", "recurrent": True}],
        "norm": "batch",
        "feedforward": ["gated", {"name": "quadratic", "square": False}],
        "activation": ["hermite3", "gelu"],
    },
    "convnext": {
        "norm": "batch",
        "feedforward": ["gated", "quadratic", "mlp"],
        "mixer": [{"name": "max_plus", "form": "difference"}, "padre", "depthwise"],
        "activation": "hermite2",
    },
}


@pytest.mark.parametrize("architecture", ["gpt2", "convnext"])
def test_a_model_of_parts_is_written_and_read(tmp_path: Path, architecture: str) -> None:
    settings, example = EVERYTHING[architecture], EXAMPLES[architecture]
    model = moved(made(architecture, **settings))
    model(example)  # running statistics move
    save_model(tmp_path / "model", model)
    assert {
        name: read_description(tmp_path / "model")["config"][name] for name in settings if name != "activation"
    } == {name: value for name, value in settings.items() if name != "activation"}
    loaded = load_model(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(example), model.eval()(example))
    assert model_config(loaded) == model_config(model)
    with pytest.raises(ValueError, match=r"has no .*norm: batch, feedforward: .*; write the own format instead"):
        write_model(
            tmp_path / "huggingface", made(architecture, **settings | {"activation": "gelu"}), format="huggingface"
        )


def test_a_conversion_keeps_running_statistics_and_finds_the_activation_between_the_halves() -> None:
    model = moved(made("gpt2", norm="batch", feedforward="gated", attention="power", activation="gelu")).eval()
    converted = convert(model, [TOKENS], degree=12)
    for name, buffer in model.named_buffers():
        assert torch.equal(converted.model.get_buffer(name), buffer), name
    assert [entry.target for entry in converted.activations] == ["GELU", "GELU"]
    assert 0 < converted.difference < 1e-3


# --- attention: power


def power(settings: dict[str, Any] | None = None, **sizes: Any) -> PowerAttention:
    torch.manual_seed(0)
    usual = {"width": 8, "heads": 2, "bias": True, "dropout": 0.0, "scale": 0.5}
    part = build_attention(
        read_part("attention", {"name": "power", **(settings or {})}), AttentionSizes(**usual | sizes)
    )
    assert isinstance(part, PowerAttention)
    with torch.no_grad():
        part.alpha.copy_(torch.tensor([2.0, 3.0]))
        part.beta.copy_(torch.tensor([0.5, -1.0]))
    return part.double()


@pytest.mark.parametrize("exponent", [2, 4])
def test_weights_of_power_attention_are_those_of_its_formula(exponent: int) -> None:
    scores = torch.randn(3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def weights(scores: Tensor, epsilon: float = 0.0) -> Tensor:
        means, denominators = causal_means(even_power(scores, exponent), epsilon)
        return means / denominators

    found = weights(scores)
    assert (found.sum(-1) - 1).abs().max() < 1e-15
    assert not found.triu(1).any()
    torch.testing.assert_close(weights(3 * scores), found, rtol=1e-14, atol=0)  # with β = 0: scale and sign say nothing
    assert torch.equal(weights(-scores), found)
    for row in range(7):  # the definition, one row at a time
        powers = scores[:, row, : row + 1] ** exponent
        expected = powers / (row + 1) / (powers.mean(-1, keepdim=True) + 1e-3)
        torch.testing.assert_close(weights(scores, 1e-3)[:, row, : row + 1], expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize(("exponent", "sinks"), [(2, 0), (4, 0), (2, 4)])
def test_power_attention_is_its_formula_and_has_its_gradients(exponent: int, sinks: int) -> None:
    part = power({"power": exponent, "sinks": sinks})
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    query, key, value = (y.view(2, 5, 2, 4).transpose(1, 2) for y in part.c_attn(x).split(8, dim=-1))
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * 0.5
    powers = ((scores * part.alpha.view(2, 1, 1) + part.beta.view(2, 1, 1)) ** exponent).tril()
    visible = torch.arange(1, 6).view(5, 1) + sinks
    mixed = (powers / visible) @ value / ((powers.sum(-1, keepdim=True) + sinks) / visible + 1e-3)
    expected = part.c_proj(mixed.transpose(1, 2).reshape(2, 5, 8))
    torch.testing.assert_close(part(x), expected, rtol=1e-12, atol=1e-14)
    parameters = {name: weight.detach().requires_grad_() for name, weight in part.named_parameters()}

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(part, dict(zip(parameters, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x[:1, :3].requires_grad_(), *parameters.values()))


@pytest.mark.parametrize(
    "settings", [{"power": 4}, {"sinks": 2}, {"recurrent": True}, {"recurrent": True, "sinks": 4}], ids=str
)
def test_power_attention_with_a_cache_is_the_same_and_its_state_does_not_grow(settings: dict[str, Any]) -> None:
    part = power(settings)
    x = torch.randn(2, 11, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole, past, found = part(x), None, []
        for chunk in x.split([4, 1, 1, 3, 2], dim=1):
            mixed, past = part.forward_with_cache(chunk, past)
            found.append(mixed)
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=0, atol=1e-12)
    if settings.get("recurrent"):
        assert isinstance(past, RecurrentState)
        assert (past.positions, tuple(past.sums.shape)) == (11, (2, 2, 15, 5))


def test_power_attention_in_half_precision_is_finite_and_a_later_token_changes_nothing_before_it() -> None:
    part = power({"power": 4})
    x = torch.randn(1, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    later = x.clone()
    later[:, 6:] += 3.0
    assert torch.equal(part(later)[:, :6], part(x)[:, :6])
    for dtype in (torch.bfloat16, torch.float16):
        inputs = (30 * x).to(dtype).requires_grad_()
        output = part.to(dtype)(inputs)
        output.float().sum().backward()
        assert output.dtype == dtype
        assert all(bool(tensor.isfinite().all()) for tensor in (output, inputs.grad, part.alpha.grad))


def test_a_text_is_continued_the_same_with_a_state_as_with_a_cache() -> None:
    cached = moved(made("gpt2", attention="power"), 0.3).eval()
    recurrent = made("gpt2", attention={"name": "power", "recurrent": True})
    recurrent.load_state_dict(cached.state_dict())
    continued = [model.double().generate(TOKENS[:, :3], 14, temperature=0.0) for model in (cached, recurrent)]
    assert torch.equal(*continued)  # past the context as well, where the window slides
    for length in range(3, 12):
        assert torch.equal(cached(continued[0][:, :length])[:, -1].argmax(-1), continued[0][:, length])


# --- norm: batch


@pytest.mark.parametrize("channels_first", [False, True])
def test_batch_norm_is_torchs(channels_first: bool) -> None:
    sizes = NormSizes(6, 1e-5, channels_first=channels_first)
    norm = moved(build_norm(read_part("norm", "batch"), sizes), 0.3).double()
    reference: Any = (nn.BatchNorm2d if channels_first else nn.BatchNorm1d)(6, eps=1e-5).double()
    reference.load_state_dict({"weight": norm.weight, "bias": norm.bias}, strict=False)
    shape = (4, 6, 3, 3) if channels_first else (4, 9, 6)
    for step in range(3):
        x = 2 + torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        pair = [x.clone().requires_grad_() for _ in range(2)]
        expected = reference(pair[1] if channels_first else pair[1].flatten(0, 1)).view(shape)
        found = norm(pair[0])
        torch.testing.assert_close(found, expected)
        (found.square() * x).sum().backward()
        (expected.square() * x).sum().backward()
        torch.testing.assert_close(pair[0].grad, pair[1].grad)
    reference.running_mean, reference.running_var = norm.running_mean.double(), norm.running_variance.double()
    norm.eval()
    reference.eval()
    expected = reference(x if channels_first else x.flatten(0, 1)).view(shape)
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-6)


def test_running_statistics_are_those_of_usual_batches() -> None:
    norm = BatchNorm(BatchNormSettings(), NormSizes(2, 1e-5))
    usual = torch.tensor([[1.0, -2.0], [4.0, -2.0], [7.0, -2.0]])  # variance 9, and a constant channel
    norm(usual)
    assert (norm.running_mean.tolist(), norm.running_variance.tolist()) == ([4.0, -2.0], [9.0, 0.0])
    norm(10.0 + usual / 2)  # variance 9/4: the average of logarithms; of the mean a tenth
    wanted = torch.tensor([9.0 * 0.25**0.1, 0.0])
    torch.testing.assert_close(norm.running_variance, wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(norm.running_mean, torch.tensor([4.8, -0.9]))
    for _ in range(200):
        norm(usual)
    torch.testing.assert_close(norm.running_variance, torch.tensor([9.0, 0.0]), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(norm.running_mean, torch.tensor([4.0, -2.0]))
    # One odd vector: a million times the variance counts as four times.
    norm(torch.cat((usual, torch.tensor([[6000.0, -2.0]]))))
    assert norm.running_variance[0].item() == pytest.approx(9.0 * 4.0**0.1, rel=1e-5)
    # Its mean is 1499 above, half a standard deviation of 2998: a twentieth of twice the running one.
    assert norm.running_mean[0].item() == pytest.approx(4.0 + 0.05 * 2.0 * 3.0, rel=1e-3)


def test_running_statistics_stay_whole_in_half_precision_and_still_where_the_norm_is_frozen() -> None:
    norm = BatchNorm(BatchNormSettings(), NormSizes(6, 1e-5))
    x = 1.2345678 + torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(0))
    norm(x)
    kept = norm.running_mean.clone()
    norm.bfloat16()
    assert (norm.weight.dtype, norm.running_mean.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(norm.running_mean, kept)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert not torch.equal(norm.running_mean, kept)
    kept = norm.running_mean.clone()
    norm.weight.requires_grad_(False)
    assert torch.equal(norm(x), norm.eval()(x))
    assert torch.equal(norm.running_mean, kept)
    norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="at least two vectors"):
        norm.train()(x[:1, :1])


@pytest.mark.parametrize("bias", [False, True])
def test_batch_norm_folds_into_the_next_linear_layer(bias: bool) -> None:
    norm = moved(BatchNorm(BatchNormSettings(), NormSizes(6, 1e-5, bias=bias)), 0.3).double()
    linear = nn.Linear(6, 9, bias=bias).double()
    x = 3 + 2 * torch.randn(4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(20):
        norm(x)
    norm.eval()
    torch.testing.assert_close(fold_into_linear(norm, linear)(x), linear(norm(x)), rtol=0, atol=1e-13)  # type: ignore[arg-type]


# --- feedforward: gated, quadratic


def degree_along_a_line(layer: nn.Module, width: int, highest: int) -> int:
    """The largest degree whose Chebyshev coefficient of t → layer(u + t v) on [-1, 1] is not rounding."""
    points = highest + 8
    angles = (np.arange(points) + 0.5) * np.pi / points
    start, direction = torch.randn(2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    line = start + torch.tensor(np.cos(angles))[:, None] * direction
    with torch.no_grad():
        values = layer(line).numpy()
    sizes = np.abs(np.cos(np.outer(np.arange(points), angles)) @ values).max(1)
    return int(np.flatnonzero(sizes > 1e-9 * sizes.max())[-1])


def test_the_degree_of_quadratic_layers_doubles_with_each() -> None:
    layers = [QuadraticLinear(6, 6, bias=True, square=square).double() for square in (True, False, True)]
    for depth in range(1, 4):
        stack = nn.Sequential(*layers[:depth])
        assert degree_along_a_line(stack, 6, 2**depth) == 1, "a fresh one is linear"
    for layer in layers:
        moved(layer, 0.5)
    for depth in range(1, 4):
        assert degree_along_a_line(nn.Sequential(*layers[:depth]), 6, 2**depth) == 2**depth


@pytest.mark.parametrize("bias", [False, True])
def test_a_quadratic_layer_is_its_formula_and_has_its_gradients(bias: bool) -> None:
    layer = moved(QuadraticLinear(3, 4, bias=bias, square=True), 0.5).double()
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shift, constant = (layer.bias, layer.constant) if bias else (0.0, 0.0)
    expected = (x @ layer.weight.T + shift) * (x @ layer.gate_weight.T + layer.gate_bias)
    torch.testing.assert_close(layer(x), expected + x**2 @ layer.square_weight.T + constant)  # type: ignore[union-attr]
    weights = {name: weight.detach().requires_grad_() for name, weight in layer.named_parameters()}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(weights, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *weights.values()))


@pytest.mark.parametrize("architecture", ["gpt2", "convnext"])
@pytest.mark.parametrize("square", [False, True])
def test_a_model_with_quadratic_layers_starts_as_the_one_with_linear_layers(architecture: str, square: bool) -> None:
    usual = made(architecture, layer_scale=0.5) if architecture == "convnext" else made(architecture)
    settings = {"layer_scale": 0.5} if architecture == "convnext" else {}
    quadratic = made(architecture, feedforward={"name": "quadratic", "square": square}, **settings)
    with torch.no_grad():
        assert torch.equal(quadratic(EXAMPLES[architecture]), usual(EXAMPLES[architecture]))


def test_a_gated_model_has_as_many_parameters_and_multiplies_the_halves() -> None:
    sizes = {
        name: sum(
            weight.numel() for weight in made("gpt2", feedforward=name).blocks[0].mlp.parameters() if weight.dim() == 2
        )
        for name in ("mlp", "gated")
    }
    assert sizes["mlp"] == sizes["gated"]
    model = made("gpt2", feedforward="gated", activation="hermite2")
    mlp = model.blocks[0].mlp
    x = torch.randn(3, 24)
    first, second = mlp.c_fc(x).split(64, dim=-1)
    expected = mlp.c_proj(mlp.activation(first) * second)
    assert torch.equal(mlp(x), expected)
    model.set_activation_checkpointing("mlp")
    assert torch.equal(mlp(x), expected)
    assert model.config.activation_widths() == [64, 64]
    per_channel = made("gpt2", feedforward="gated", activation={"name": "hermite", "num_parameters": 64})
    assert per_channel.blocks[0].mlp.activation.coefficients.shape == (64, 4)
    assert per_channel(TOKENS).isfinite().all()


def test_floating_point_operations_follow_the_parts() -> None:
    usual, gated, quadratic = (made("convnext", feedforward=name) for name in ("mlp", "gated", "quadratic"))
    flops = [model.flops_per_image(8, 8) for model in (usual, gated, quadratic)]
    assert flops[0] == flops[1]
    blocks = 64 * 8 * 12**2 + 16 * 2 * 8 * 24**2  # multiply-adds of the linear layers, at 8×8 and 4×4
    assert flops[2] - flops[0] == 6.0 * 2 * blocks


def test_multiplicative_parameters_learn_at_their_own_rate_and_do_not_decay() -> None:
    model = made("gpt2", feedforward=["mlp", "quadratic"])
    names = {id(weight): name for name, weight in model.named_parameters()}
    expected = [
        f"transformer.h.1.mlp.{layer}.{name}" for layer in ("c_fc", "c_proj") for name in QuadraticLinear.multiplicative
    ]
    assert [names[id(weight)] for weight in multiplicative_parameters(model)] == expected
    for given, rate in ((None, 1e-4), (3e-4, 3e-4), (0.0, 0.0)):
        parameters = TrainParameters.model_validate(
            {
                "model": {**GPT2, "feedforward": "quadratic"},
                "steps": 1,
                "learning_rate": 1e-3,
                "multiplicative_learning_rate": given,
            }
        )
        groups = {group["name"]: group for group in parameter_groups(model, parameters)}
        group = groups["multiplicative"]
        assert [names[id(weight)] for weight in group["params"]] == [
            name for name in names.values() if name in expected
        ]
        assert (group["peak"], group["weight_decay"]) == (pytest.approx(rate), 0.0)
        assert coefficient_rates(groups.values())["learning_rate/multiplicative"] == pytest.approx(rate)
    assert "multiplicative" not in {group["name"] for group in parameter_groups(made("gpt2"), parameters)}


# --- range penalties


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("gpt2", {"attention": ["power", "softmax"], "feedforward": ["mlp", "gated"]}),
        ("convnext", {"feedforward": ["mlp", "gated", "mlp"], "layer_scale": 0.5}),
    ],
)
def test_penalties_of_ranges_are_added_in_training_alone(architecture: str, settings: dict[str, Any]) -> None:
    model: Any = moved(made(architecture, **settings))
    example = EXAMPLES[architecture]
    targets = example if architecture == "gpt2" else torch.tensor([0, 2])
    plain = model(example, targets)
    inputs: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _module, given: inputs.append(given[0]))
        for name, module in model.named_modules()
        if name.endswith((".activation", ".act"))
    ]
    divided: list[Tensor] = []
    hooks += [
        module.reciprocal.register_forward_pre_hook(lambda _module, given: divided.append(given[0]))
        for module in model.modules()
        if isinstance(module, PowerAttention)
    ]
    penalise_ranges(model, RangePenalty(activation=2.0, beyond=0.5, denominator=0.25))
    found = model(example, targets)
    for hook in hooks:
        hook.remove()
    assert (len(inputs), len(divided)) == ((2, 1) if architecture == "gpt2" else (3, 0))
    expected = plain + sum(2.0 * (x.abs() - 0.5).clamp(min=0).square().mean() for x in inputs)
    expected = expected + sum(0.25 * d.log().square().mean() for d in divided)
    torch.testing.assert_close(found, expected)
    assert found > plain + 1e-3
    gradients = []
    for mode in ("none", "block", "mlp"):
        model.set_activation_checkpointing(mode)
        model.zero_grad()
        model(example, targets).backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    assert all(torch.equal(gradient[name], gradients[0][name]) for gradient in gradients for name in gradient)
    with pytest.raises(ValueError, match="reduction: expected mean with range penalties, got sum"):
        model(example, targets, reduction="sum")
    assert torch.equal(model.eval()(example, targets), plain)
    with pytest.raises(ValueError, match="Linear has no ranges"):
        penalise_ranges(nn.Linear(2, 2), RangePenalty(1.0, 1.0, 1.0))


def test_the_configuration_knows_its_parts() -> None:
    config = GPT2Config(**GPT2, attention=["power", "softmax"])
    assert [type(part).__name__ for part in config.attention_settings()] == ["PowerSettings", "SoftmaxSettings"]


@pytest.mark.parametrize(
    ("architecture", "field", "spelled_out"),
    [
        ("gpt2", "attention", {"name": "softmax"}),
        ("gpt2", "attention", [{"layers": "0-", "name": "softmax"}]),
        ("gpt2", "feedforward", ["mlp", {"name": "mlp"}]),
        ("convnext", "norm", {"name": "layer_norm"}),
    ],
)
def test_the_usual_parts_are_the_usual_ones_however_they_are_written(
    architecture: str, field: str, spelled_out: Any
) -> None:
    model = made(architecture, **{field: spelled_out})
    assert changed_parts(model.config) == {}
    assert model_config(model) == model_config(made(architecture))
