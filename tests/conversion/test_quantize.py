"""Weights of few bits on a power grid, rows that an activation lets through scaled, and models that come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversion_support import LLAMA_SIZES, own_model, randomise, read_json, tokens
from pydantic import ValidationError
from torch import Tensor, nn

from polytrope.models import build_model
from polytrope.models.checkpoint import save_model
from polytrope.models.convert import Conversion, convert
from polytrope.models.equalize import scaled_polynomial
from polytrope.models.formats import read_model
from polytrope.models.quantize import EXPONENTS, Quantization, round_weight
from polytrope.ops import Chebyshev, Hermite, Legendre
from polytrope.pipeline.commands.cli import main
from polytrope.pipeline.data.conversion_file import read_conversion
from polytrope.pipeline.data.promised import PromisedModel
from polytrope.pipeline.errors import EXIT_USER_ERROR, UserError
from polytrope.pipeline.stage import Artifact, Resources, stage_context
from polytrope.pipeline.stages.convert.convert import convert as convert_stage
from polytrope.pipeline.stages.convert.convert import promise
from polytrope.pipeline.stages.convert.parameters import ConvertParameters


def gaussian(count: int = 20_000) -> Tensor:
    return torch.randn(1, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def student4(count: int = 20_000) -> Tensor:
    """t with four degrees of freedom: a normal variable over the root of a mean of four squares."""
    squares = torch.randn(4, count, generator=torch.Generator().manual_seed(1), dtype=torch.float64).square()
    return gaussian(count) / squares.mean(dim=0).sqrt()


def quantization(made: Conversion) -> Quantization:
    assert made.quantization is not None
    return made.quantization


def mean_square(weight: Tensor, exponent: float) -> float:
    return float((round_weight(weight, 4, exponent, "tensor") - weight).square().mean())


def test_exponent_one_is_the_uniform_grid() -> None:
    weight = gaussian(60).reshape(6, 10)
    for per, largest in (("tensor", weight.abs().max()), ("row", weight.abs().amax(dim=1, keepdim=True))):
        steps = np.round(weight.numpy() / np.asarray(largest) * 7)  # three bits and a sign: 7 steps on each side
        expected = torch.from_numpy(steps) * largest / 7
        assert round_weight(weight, 4, 1.0, per).sub(expected).abs().max() < 1e-15


@pytest.mark.parametrize("per", ["row", "tensor"])
def test_rounding_in_place_gives_the_bits_of_the_formula(per: str) -> None:
    weight = torch.randn(29, 37, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given = weight.clone()
    for exponent in EXPONENTS:
        powers = weight.abs() ** exponent
        largest = powers.amax(dim=1, keepdim=True) if per == "row" else powers.amax()
        expected = weight.sign() * ((powers / largest * 7).round() * (largest / 7)) ** (1 / exponent)
        assert torch.equal(round_weight(weight, 4, exponent, per), expected)
    assert torch.equal(weight, given)


def test_a_grid_keeps_0_the_largest_weight_and_what_is_on_it() -> None:
    weight = torch.cat([gaussian(59), torch.zeros(1, 1)], dim=1).reshape(6, 10)
    for exponent in EXPONENTS:
        rounded = round_weight(weight, 5, exponent, "row")
        assert rounded[-1, -1] == 0
        assert rounded.abs().amax(dim=1).sub(weight.abs().amax(dim=1)).abs().max() < 1e-13
        assert round_weight(rounded, 5, exponent, "row").sub(rounded).abs().max() < 1e-13
        assert len(torch.unique(rounded[0].abs())) <= 16
    assert torch.equal(round_weight(torch.zeros(2, 3), 4, 0.5, "row"), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("weight", "uniform", "best", "exponent"), [(gaussian(), 3.9e-2, 2.5e-2, 0.6), (student4(), 0.56, 0.099, 0.4)]
)
def test_a_power_is_closer_than_the_uniform_grid(weight: Tensor, uniform: float, best: float, exponent: float) -> None:
    """The figures are of a planning run with other draws, whose largest weight decides much of the uniform grid's."""
    errors = {a: mean_square(weight, a) for a in EXPONENTS}
    assert min(errors, key=errors.__getitem__) == pytest.approx(exponent, abs=0.101)
    assert errors[1.0] == pytest.approx(uniform, rel=1.5)
    assert min(errors.values()) == pytest.approx(best, rel=0.4)
    assert min(errors.values()) < 0.75 * errors[1.0]


def test_a_power_keeps_products() -> None:
    x, y = gaussian(1000).reshape(2, 500)
    for exponent in (0.2, 0.55):
        assert ((x * y).abs() ** exponent - x.abs() ** exponent * y.abs() ** exponent).abs().max() < 1e-14


@pytest.mark.parametrize("basis", [Hermite, Chebyshev, Legendre])
@pytest.mark.parametrize("variable", [None, (0.7, 1.6)])
@pytest.mark.parametrize("groups", [1, 5])
def test_a_polynomial_takes_up_the_scale_of_its_input(basis: Any, variable: Any, groups: int) -> None:
    torch.manual_seed(0)
    function = basis(6, variable=variable, num_parameters=groups).double()
    with torch.no_grad():
        function.coefficients.add_(torch.randn_like(function.coefficients))
    scales = np.array([0.3, 0.9, 1.0, 1.7, 4.0])
    x = torch.randn(200, 5, dtype=torch.float64)
    scaled = scaled_polynomial(function, scales)
    expected = function(x)
    assert (scaled(x * torch.from_numpy(scales)) - expected).norm() / expected.norm() < 1e-13


class Layers(nn.Module):
    """`[…, 8]` to `[…, 3]`; rows of very different sizes."""

    def __init__(self, activation: nn.Module, *, elsewhere: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.activation, self.second = nn.Linear(8, 12), activation, nn.Linear(12, 3)
        self.elsewhere = elsewhere
        self.double()
        with torch.no_grad():
            self.first.weight.mul_(torch.logspace(-0.6, 0.6, 12, dtype=torch.float64)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        result: Tensor = self.second(self.activation(hidden))
        return result + hidden.sum(-1, keepdim=True) if self.elsewhere else result


def rows() -> list[Tensor]:
    return [torch.randn(50, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)]


@pytest.mark.parametrize("activation", [Hermite(4, init="gelu"), nn.ReLU()])
def test_equalised_is_the_same_function_and_closer_with_few_bits(activation: nn.Module) -> None:
    model = Layers(activation)
    many = convert(model, rows(), quantize={"bits": 16, "exponent": 1.0, "per": "tensor", "equalize": True})
    (equal,) = quantization(many).equalized
    assert (equal.name, equal.rows) == ("activation", "first")
    assert equal.columns == ("second" if isinstance(activation, nn.ReLU) else None)
    first = many.model.get_submodule("first")
    sizes = first.weight.abs().amax(dim=1)  # type: ignore[operator, union-attr]
    assert sizes.max() / sizes.min() < (1.001 if equal.columns is None else 40)
    largest = [
        float(of.get_submodule(name).weight.detach().abs().max())  # type: ignore[operator, union-attr]
        for name in ("first", "second")
        for of in (model, many.model)
    ]
    assert [equal.rows_before, equal.rows_after] == pytest.approx(largest[:2])
    assert [equal.columns_before, equal.columns_after] == (
        [None, None] if equal.columns is None else pytest.approx(largest[2:])
    )
    assert f"the largest weight of first was {equal.rows_before:.3g} and is {equal.rows_after:.3g}" in many.report()
    few = {"bits": 4, "exponent": 1.0, "per": "tensor"}
    before = convert(model, rows(), quantize=few).difference
    assert convert(model, rows(), quantize=few | {"equalize": True}).difference < 0.75 * before
    assert many.difference < 2e-4


def test_equalising_alone_changes_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polytrope.models.quantize.round_weight", lambda weight, *_options: weight)
    for activation in (Hermite(4, init="gelu"), nn.ReLU()):
        made = convert(Layers(activation), rows(), quantize={"bits": 4, "per": "tensor", "equalize": True})
        assert made.difference < 1e-15


def test_scales_go_only_where_they_are_taken_up() -> None:
    options = {"bits": 4, "per": "tensor", "equalize": True}
    for activation, said in (
        (nn.GELU(), "a GELU is another function after its input is scaled"),
        (Hermite(4, init="gelu", interval=(-4, 4)), "its interval is one for all channels"),
        (Hermite(3, num_parameters=3), "it has coefficients for groups of channels"),
        (Hermite(3, learnable_recurrence=True), "its recurrence is one for all channels"),
    ):
        with pytest.raises(ValueError, match=said):
            convert(Layers(activation), rows(), quantize=options)
    model = Layers(nn.ReLU(), elsewhere=True)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="the model gives something else afterwards, off by"):
        convert(model, rows(), quantize=options, in_place=True)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("degree", [3, 8, 16])
def test_rounding_of_coefficients_stays_small_in_float32(degree: int) -> None:
    """Rows of sizes from 1 to 1000, whose powers would be beyond what float32 holds apart."""
    model = Layers(Hermite(degree, init="gelu")).float()
    with torch.no_grad():
        model.first.weight.mul_(torch.logspace(-1, 1, 12)[:, None])
        model.first.weight.mul_(1 / model.first.weight.abs().amax())
    few = [rows()[0].float()]
    many = convert(model, few, quantize={"bits": 16, "exponent": 1.0, "per": "tensor", "equalize": True})
    (equal,) = quantization(many).equalized
    assert equal.largest**degree == pytest.approx(1e4) == pytest.approx(equal.smallest**-degree)
    assert many.difference < 2e-3


def test_what_is_equalised_and_what_is_not_is_told(tmp_path: Path) -> None:
    model = own_model("gpt2", n_layer=2, activation=["gelu", "relu"])
    made = convert(model, [tokens()], quantize={"bits": 4, "per": "tensor", "equalize": True})
    assert [entry.name for entry in quantization(made).equalized] == ["transformer.h.1.mlp.activation"]
    (stays,) = quantization(made).unequalized
    assert (stays.name, stays.reason) == (
        "transformer.h.0.mlp.activation",
        "a GELU is another function after its input is scaled",
    )
    assert stays.reason in made.report()
    made.save(tmp_path)
    assert Conversion.load(tmp_path).quantization == made.quantization
    with pytest.raises(ValueError, match="equalize changes the coefficients of activations, and there are new ones"):
        convert(model, [tokens()], quantize={"bits": 4, "per": "tensor", "equalize": True}, family="hermite")


@pytest.mark.parametrize("exponent", [0.2, 0.6, 1.0])
def test_16_bits_change_weights_by_no_more_than_half_a_step(exponent: float) -> None:
    weight = gaussian(1000)
    bound = float(weight.abs().max()) / (2 * exponent * (2**15 - 1))  # where the grid is the widest
    assert 0 < float((round_weight(weight, 16, exponent, "tensor") - weight).abs().max()) <= bound


def test_the_search_goes_by_the_outputs_and_the_size_is_of_packed_weights() -> None:
    model = Layers(nn.GELU())
    made = convert(model, rows(), quantize={"bits": 4})
    found = quantization(made)
    inputs = {"first": rows()[0], "second": nn.functional.gelu(model.first(rows()[0]))}
    for layer in found.layers:
        linear = model.get_submodule(layer.name)
        weight = linear.weight.detach()  # type: ignore[union-attr, operator]
        x = inputs[layer.name].detach()
        errors = {}
        for exponent in EXPONENTS:
            lost = x @ (round_weight(weight, 4, exponent, "row") - weight).T
            errors[exponent] = float(lost.norm() / (x @ weight.T).norm())
        assert layer.relative_error == pytest.approx(min(errors.values()))
        assert layer.uniform_error == pytest.approx(errors[1.0])
        assert layer.exponent == min(errors, key=lambda exponent: (errors[exponent], -exponent))
        rounded = made.model.get_submodule(layer.name).weight
        assert torch.equal(rounded, round_weight(weight, 4, layer.exponent, "row"))  # type: ignore[arg-type]
    numbers = 8 * 12 + 12 + 12 * 3 + 3
    assert found.bytes_before == 8 * numbers
    assert found.bytes_after == (8 * 12 + 12 * 3) // 2 + (12 + 3) * 4 + (12 + 3) * 8


@pytest.mark.parametrize("architecture", ["gpt2", "convnext"])
def test_many_bits_change_little_and_few_more(architecture: str) -> None:
    model = own_model(architecture)
    data = [tokens() if architecture == "gpt2" else torch.randn(4, 3, 32, 32)]
    moved = [convert(model, data, quantize={"bits": bits}).difference for bits in (16, 8, 4)]
    assert moved[0] < 5e-4
    assert moved[0] < moved[1] < moved[2]


def test_factors_are_rounded_too_and_the_head_and_embeddings_stay() -> None:
    model = own_model("gpt2")
    made = convert(model, [tokens()], factorize={"ratio": 1.5}, quantize={"bits": 4}, exclude=["*.0.*"])
    names = {layer.name for layer in quantization(made).layers}
    assert {"transformer.h.1.mlp.c_fc.inner", "transformer.h.1.mlp.c_fc.outer"} <= names
    assert not any(".0." in name for name in names)
    reasons = {entry.name: entry.reason for entry in quantization(made).left}
    assert reasons["lm_head"].startswith("part of a pooler or a head")
    assert "weights of linear layers alone" in reasons["transformer.wte"]
    weight = made.model.get_submodule("transformer.h.1.mlp.c_fc.outer").weight
    for row in weight.detach():  # type: ignore[union-attr, operator]
        assert len(torch.unique(row.abs())) <= 8


class Mixed(nn.Module):
    """Matrices of many kinds; one layer is plain."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(8, 8)
        self.activation = Hermite(3, num_parameters=8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.experts = nn.ParameterDict({"gates": nn.Parameter(torch.eye(8).expand(2, 8, 8).clone())})
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.plain(x))
        x = self.recurrent(self.attention(x, x, x)[0])[0]
        return self.normed(x @ self.experts["gates"][0])  # type: ignore[no-any-return]


def test_every_matrix_that_stays_is_listed_whatever_its_parameter_is_called() -> None:
    torch.manual_seed(0)
    made = convert(Mixed(), [torch.randn(4, 5, 8)], quantize={"bits": 4})
    assert [layer.name for layer in quantization(made).layers] == ["plain"]
    reasons = {entry.name: entry.reason for entry in quantization(made).left}
    assert {"attention", "attention.out_proj", "recurrent", "experts", "normed"} <= set(reasons)
    assert "activation" not in reasons
    assert reasons["attention.out_proj"].startswith("a NonDynamicallyQuantizableLinear")
    assert reasons["recurrent"] == "weights of linear layers alone are rounded, not of LSTM"
    assert reasons["normed"] == "its weight is computed from other parameters"


@pytest.mark.parametrize("options", [{"quantize": {"bits": 4}}, {"factorize": {"rank": 1}}])
def test_weights_that_are_not_finite_are_named_as_the_reason(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 4)))
    with torch.no_grad():
        model[0].weight[2, 0] = float("nan")
    with pytest.raises(ValueError, match=r"\(0: it has weights that are not finite; 1\.0: it receives numbers that"):
        convert(model, [torch.randn(8, 6)], **options)


@pytest.mark.filterwarnings("error")
def test_rows_that_are_all_0_have_no_size_to_bring_them_to() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Hermite(3), nn.Linear(6, 6), Hermite(3), nn.Linear(6, 4))
    with torch.no_grad():
        model[0].weight.zero_()
    made = convert(model, [torch.randn(8, 6)], quantize={"bits": 4, "per": "tensor", "equalize": True})
    assert [entry.rows for entry in quantization(made).equalized] == ["2"]
    (stays,) = quantization(made).unequalized
    assert (stays.name, stays.reason) == ("1", "the layer before it has weights that are all 0, or not finite")


def test_the_bytes_before_are_of_the_model_that_was_given() -> None:
    model = own_model("gpt2")
    size = sum(4 * parameter.numel() for parameter in model.parameters())
    made = convert(model, [tokens()], drop_blocks={"count": 1}, factorize={"ratio": 1.5}, quantize={"bits": 4})
    assert made.parameters is not None
    assert quantization(made).bytes_before == size == 4 * made.parameters[0]
    assert quantization(made).bytes_after < 4 * made.parameters[1]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", own_model("gpt2", activation={"name": "hermite", "degree": 3, "init": "stable"}))
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "calibration.npy", tokens().numpy())
    return tmp_path / "model"


def test_command_stage_and_python_do_the_same(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(model), str(tmp_path / "out"), "--data", str(tmp_path / "data" / "calibration.npy")]
    options = ["--samples", "6", "--batch-size", "6"]
    assert main([*command, "--quantize", "bits=4,per=tensor,equalize=true", *options]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    given: dict[str, Any] = {"bits": 4, "per": "tensor", "equalize": True}
    with_ = {"quantize": given, "page": True, "calibration_samples": 6}
    context = stage_context(tmp_path / "stage", stage="rounded", resources=Resources())
    artifacts = Artifact(model, "digest", "train"), Artifact(tmp_path / "data", "digest", "data")
    metrics = convert_stage(context, *artifacts, ConvertParameters.model_validate(with_))
    made = convert(read_model(model), [tokens()], quantize=given)
    made.save(tmp_path / "python")
    again = Conversion.load(tmp_path / "python")
    assert again.quantization == made.quantization
    expected = made.model.state_dict()
    for output in (tmp_path / "out", context.output, tmp_path / "python"):
        written = read_model(output)
        assert all(torch.equal(tensor, written.state_dict()[name]) for name, tensor in expected.items())
    for output in (tmp_path / "out", context.output):
        record = read_conversion(output).quantization
        assert record is not None
        assert record == quantization(made)
        assert record.equalized[0].rows == "transformer.h.0.mlp.c_fc"
        page = " ".join((output / "conversion.html").read_text().split())
        assert "<h2>Rounded weights</h2>" in page
        assert "takes up no scales" not in page
    assert metrics["bits"] == 4
    assert metrics["bytes"] == quantization(made).bytes_after < metrics["bytes_before"]
    assert "lm_head stays: part of a pooler or a head" in printed
    assert f"{quantization(made).bytes_after:,} with these packed" in printed
    assert "bytes of parameters" in made.report()


def test_a_llama_of_transformers_loads_as_it_is(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = randomise(LlamaForCausalLM(LlamaConfig(**LLAMA_SIZES)), 0.1)  # type: ignore[operator]
    llama.save_pretrained(tmp_path / "llama")  # type: ignore[operator]
    np.save(tmp_path / "calibration.npy", tokens().numpy() % 61)
    command = ["convert", str(tmp_path / "llama"), str(tmp_path / "out"), "--data", str(tmp_path / "calibration.npy")]
    assert main([*command, "--quantize", "bits=3"]) == 0
    assert "auto_map" not in read_json(tmp_path / "out" / "config.json")
    weight = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[0].mlp.up_proj.weight
    assert all(len(torch.unique(row.abs())) <= 4 for row in weight.detach())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--quantize", "bits=1"], "--quantize: bits: expected 2 to 16, got 1"),
        (["--quantize", "4"], "--quantize: expected NAME=VALUE, such as bits=4"),
        (["--quantize", "bits=4,bits=3"], "--quantize: bits is given twice"),
        (["--quantize", "bits=4,exponents=1"], "--quantize: unknown key `exponents` → did you mean `exponent`?"),
        (["--quantize", "per=row"], "--quantize: bits: this field is required"),
        (["--quantize", "bits=4,exponent=2"], "exponent: expected search, or a number from 0.1 to 1, got 2"),
        (["--quantize", "bits=4,equalize=true"], "every row has a scale of its own"),
        (["--quantize", "bits=4", "--degree", "4"], "--quantize: degree is for new activations"),
        (["--quantize", "bits=4", "--linear", "quadratic"], "--quantize: linear changes the same layers"),
        (["--quantize", "bits=4", "--include", "nothing"], "no linear layer of GPT2 is rounded"),
    ],
)
def test_what_cannot_be_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    command = ["convert", str(model), str(tmp_path / "out"), "--data", str(tmp_path / "data" / "calibration.npy")]
    assert main([*command, *options]) == EXIT_USER_ERROR
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_what_will_be_is_known_before_anything_starts() -> None:
    settings = {"vocab_size": 97, "n_layer": 2}

    def promised(quantize: dict[str, Any], activation: Any) -> Any:
        upstream = {"model": PromisedModel("gpt2", {**settings, "activation": activation}), "dataset": None}
        return promise(ConvertParameters.model_validate({"quantize": quantize}), upstream, Resources(), Path())

    equal = {"bits": 4, "per": "tensor", "equalize": True}
    assert promised({"bits": 4}, "gelu").settings == {**settings, "activation": "gelu"}
    for taking in ("hermite3", "relu", ["gelu", {"name": "legendre", "degree": 4}]):
        assert promised(equal, taking).settings == settings
    for other in ("gelu", "fourier5", {"name": "hermite", "degree": 3, "interval": [-4, 4]}):
        with pytest.raises(UserError, match="quantize: equalize: no activation takes up a scale: the model has "):
            promised(equal, other)
    for more in ({"family": "hermite"}, {"polynomial_only": True}):
        with pytest.raises(ValidationError, match="equalize changes the coefficients of activations"):
            ConvertParameters.model_validate({"quantize": equal, **more})
    with pytest.raises(ValidationError) as caught:
        ConvertParameters.model_validate({"quantize": {"bits": "four"}})
    assert caught.value.errors()[0]["loc"] == ("quantize", "bits")


@pytest.mark.parametrize("layer_scale", [0, 1e-6])
def test_a_scale_that_a_norm_behind_would_see_is_refused_however_little_of_it_reaches_the_output(
    layer_scale: float,
) -> None:
    """EvoNorm divides F(x) by the deviation of x itself."""
    settings = {"depths": [1, 1], "dims": [8, 16], "num_classes": 4, "layer_scale": layer_scale}
    model = build_model("convnext", settings | {"norm": {"name": "evonorm", "groups": 4}, "activation": "hermite3"})
    with pytest.raises(ValueError, match=r"equalize: .*gives something else afterwards"):
        convert(model, [torch.randn(8, 3, 32, 32)], quantize={"bits": 8, "per": "tensor", "equalize": True})
