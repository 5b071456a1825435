"""`convert --polynomial-only`: from a model to sums and products, what they cost, and inputs that leave their range."""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conversion_support import own_model, read_json, tokens, write_bert, write_texts
from onnx import numpy_helper
from pydantic import ValidationError
from torch import nn
from training_support import read_events

from polytrope.models.calibration import Calibration
from polytrope.models.checkpoint import load_model, save_model
from polytrope.models.conversion import FitOptions, PolynomialOnly, fit_layer, fit_options
from polytrope.models.convert import Conversion
from polytrope.models.convert import convert as polytrope_convert
from polytrope.models.convert_options import FIT_OPTIONS
from polytrope.models.domains import DomainInputs, describe_outside, watching
from polytrope.models.formats import read_model
from polytrope.models.formats.onnx import save_onnx
from polytrope.models.formats.onnx_operators import check_polynomial
from polytrope.models.polynomials import Polynomials, hold_out
from polytrope.models.surgery import Activation
from polytrope.ops import Composition, build_activation
from polytrope.ops.circuit import count
from polytrope.ops.polynomial_only import MAX_DEPTH
from polytrope.pipeline.commands.cli import main
from polytrope.pipeline.data.conversion_file import read_conversion
from polytrope.pipeline.stage import Artifact, stage_context
from polytrope.pipeline.stages.convert import parameters as convert_parameters
from polytrope.pipeline.stages.convert.conversion_page import write_page
from polytrope.pipeline.stages.convert.conversion_record import advise, record
from polytrope.pipeline.stages.convert.convert import convert
from polytrope.pipeline.stages.convert.parameters import ConvertParameters
from polytrope.pipeline.stages.convert.polynomials import with_polynomials


@pytest.fixture
def gpt(tmp_path: Path) -> Path:
    save_model(tmp_path / "gpt", own_model("gpt2"))
    np.save(tmp_path / "tokens.npy", tokens().numpy())
    return tmp_path / "gpt"


def compositions(model: nn.Module) -> dict[str, Composition]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Composition)}


def test_a_model_becomes_sums_and_products_and_says_what_they_cost(
    gpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    data = ["--data", str(tmp_path / "tokens.npy")]
    assert main(["convert", str(gpt), str(output), "--polynomial-only", "--depth", "4", "--onnx", *data]) == 0
    printed = capsys.readouterr()
    record = read_conversion(output)
    model = load_model(output)
    found = compositions(model)
    assert list(found) == [layer.name for layer in record.layers]
    assert len(found) == 2
    held_out = 1  # of six samples a quarter, rounded down
    assert record.polynomial is not None
    assert record.polynomial.samples == held_out
    assert record.polynomial.inputs == 2 * 20 * 64  # two layers, twenty tokens, the width of an MLP
    costs = {name: count(module.circuit()) for name, module in found.items()}
    assert record.polynomial.depth == sum(cost.depth for cost in costs.values()) == 8
    assert record.polynomial.products == 20 * 64 * sum(cost.products for cost in costs.values())
    for layer in record.layers:
        assert layer.circuit is not None
        assert layer.circuit.depth == 4
        assert layer.circuit.products == costs[layer.name].products
        low, high = layer.interval
        seen = layer.inputs["maximum"] - layer.inputs["minimum"]
        assert high - low == pytest.approx(1.5 * seen)  # a quarter more on each side
        assert layer.certificate["maximum_outside"] is None
        assert layer.certificate["maximum"] < 0.5
        assert layer.config["domain"] == [low, high]
    assert "depth 8" in printed.out
    assert "products per sample" not in printed.err
    # What the graph has, by itself: nothing but sums and products in the activations.
    operators: Counter[str] = Counter()
    graph = onnx.load(str(output / "model.onnx")).graph
    for node in graph.node:
        if "mlp:activation/" in node.name:
            operators[node.op_type] += 1
    assert set(operators) == {"Add", "Mul", "Constant"}
    assert operators["Mul"] >= sum(cost.products + cost.constant_products for cost in costs.values())
    assert "the rest of the graph has " in printed.out
    assert "LayerNormalization × 5" in printed.out
    assert "Softmax × 2" in printed.out
    # Written and read again, it is the same; converting it once more is said to be senseless.
    again = read_model(output)
    with torch.no_grad():
        assert torch.equal(again(tokens()), model(tokens()))
        moved = (model(tokens()) - load_model(gpt)(tokens())).norm() / load_model(gpt)(tokens()).norm()
    assert 0 < float(moved) < 0.05


def test_inputs_outside_are_counted_in_the_result_and_said_aloud(
    gpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(gpt), str(tmp_path / "out"), "--polynomial-only", "--depth", "3", "--domain=-1,1.5"]
    assert main([*arguments, "--data", str(tmp_path / "tokens.npy")]) == 0
    record = read_conversion(tmp_path / "out")
    inputs: dict[str, list[torch.Tensor]] = {}
    model = load_model(tmp_path / "out")
    for name, module in compositions(model).items():
        assert module.domain == (-1.0, 1.5)
        module.register_forward_pre_hook(lambda _, x, name=name: inputs.setdefault(name, []).append(x[0]))
    with torch.no_grad():
        model(tokens()[-1:])
    for layer in record.layers:
        (x,) = inputs[layer.name]
        assert layer.outside is not None
        assert layer.outside.below == int((x < -1).sum()) > 0
        assert layer.outside.above == int((x > 1.5).sum()) > 0
        assert layer.outside.probability == pytest.approx(float(((x < -1) | (x > 1.5)).float().mean()))
        assert (layer.outside.minimum, layer.outside.maximum) == (float(x.min()), float(x.max()))
    shout = capsys.readouterr().err
    assert "INPUTS OUTSIDE OF THE CERTIFIED RANGE" in shout
    total = sum(layer.outside.below + layer.outside.above for layer in record.layers if layer.outside)
    assert sum(map(int, re.findall(r"` (\d+) of 1280", shout))) == total == record.polynomial.outside  # type: ignore[union-attr]
    assert "--domain-margin" in shout


def test_the_stage_writes_the_same_and_shouts_too(gpt: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "calibration.npy", tokens().numpy())
    parameters = ConvertParameters(polynomial_only=True, depth=3, domain=(-2.0, 2.0))
    context = stage_context(tmp_path / "stage", stage="convert")
    metrics = convert(context, Artifact(gpt, "m", "train"), Artifact(tmp_path / "data", "d", "shard"), parameters)
    record = read_conversion(context.output)
    assert record.polynomial is not None
    assert metrics["multiplicative_depth"] == record.polynomial.depth == 6
    assert metrics["products_per_sample"] == record.polynomial.products
    assert metrics["outside_probability"] == max(layer.outside.probability for layer in record.layers if layer.outside)
    assert metrics["outside_probability"] > 0
    (said,) = [event["text"] for event in read_events(tmp_path / "stage", "message")]
    assert said.startswith("INPUTS OUTSIDE OF THE CERTIFIED RANGE")


def test_a_model_of_transformers_comes_back_as_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModel

    write_bert(tmp_path / "bert")
    texts = ["--data", str(write_texts(tmp_path))]
    output = tmp_path / "out"
    arguments = ["convert", str(tmp_path / "bert"), str(output), "--polynomial-only", "--target-error", "0.01"]
    assert main([*arguments, *texts, "--json"]) == 0
    assert '"maximum_outside": null' in capsys.readouterr().out
    content = read_json(output / "conversion.json")
    assert [layer["relative_error"] <= 0.01 for layer in content["layers"]] == [True, True]
    batch = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(output, trust_remote_code=True).eval()(batch)[0]
        assert torch.equal(theirs, read_model(output)(batch)[0])
    assert "certified range" in (output / "conversion.html").read_text()


def run_exactly(path: Path, x: Fraction) -> Fraction:
    """An ONNX graph in rational arithmetic: the operators it may have, and no others."""
    graph = onnx.load(str(path)).graph
    values: dict[str, Fraction] = {graph.input[0].name: x}

    def number(tensor: onnx.TensorProto) -> Fraction:
        return Fraction(float(numpy_helper.to_array(tensor)))

    values |= {tensor.name: number(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            values[node.output[0]] = number(node.attribute[0].t)
            continue
        first, second = (values[name] for name in node.input)
        values[node.output[0]] = {"Add": first + second, "Mul": first * second}[node.op_type]
    return values[graph.output[0].name]


@pytest.mark.parametrize(
    "config", [{"degree": [7, 20], "gate": True, "domain": [-5, 5]}, {"degree": 16, "domain": [-7, 4]}]
)
def test_the_exported_program_is_the_activation_in_rational_arithmetic(config: dict[str, Any], tmp_path: Path) -> None:
    module = build_activation({"name": "composition", "init": "gelu", **config})
    assert isinstance(module, Composition)
    path = tmp_path / "activation.onnx"
    x = torch.linspace(*module.domain, 24).reshape(2, 12)
    save_onnx(path, module, [x])
    assert check_polynomial(path, module) == {}
    circuit = module.circuit().converted(lambda number: Fraction(float(np.float32(number))))
    for point in (Fraction(-9, 4), Fraction(0), Fraction(1, 3), Fraction(7, 2)):
        exact = run_exactly(path, point)
        assert exact == circuit.run(point)  # to the last digit
        with torch.no_grad():
            computed = float(module.double()(torch.tensor([float(point)], dtype=torch.float64)))
        assert float(exact) == pytest.approx(computed, abs=2e-5)


def test_an_operator_that_is_no_sum_or_product_is_named(tmp_path: Path) -> None:
    inner = nn.Sequential(nn.Linear(3, 3), build_activation({"name": "composition", "degree": 5}))
    model = nn.Sequential(inner, nn.Softmax(-1))
    path = tmp_path / "model.onnx"
    save_onnx(path, model, [torch.randn(2, 3)])
    assert check_polynomial(path, model) == {"Softmax": 1}
    content = onnx.load(str(path))
    node = next(node for node in content.graph.node if node.op_type == "Mul" and "=0:1/" in node.name)
    node.op_type = "Max"
    onnx.save(content, str(path))
    with pytest.raises(
        ValueError, match=rf"activation `0.1` has the operator Max \(node {node.name}\), which is neither"
    ):
        check_polynomial(path, model)
    for node in content.graph.node:
        node.name = node.name.replace("polynomial=", "")
    onnx.save(content, str(path))
    with pytest.raises(ValueError, match=r"no operator of activation `0\.1` is in the graph"):
        check_polynomial(path, model)
    assert check_polynomial(path, nn.Sequential(nn.ReLU())) is None


def test_watching_counts_each_side_nan_included() -> None:
    model = nn.Sequential(build_activation({"name": "composition", "domain": [-2, 3]}))
    with watching(model) as found, torch.no_grad():
        model(torch.tensor([-5.0, -2.0, 0.0, 3.0, 4.0, float("nan"), 3.5]))
        model(torch.tensor([1.0]))
    seen = found["0"]
    assert (seen.inputs, seen.below, seen.above, seen.calls) == (8, 1, 3, 2)
    assert seen.probability == 0.5
    assert "`0` 4 of 8 (probability 0.5)" in str(describe_outside(found))
    model(torch.tensor([9.0]))
    assert seen.inputs == 8  # nobody watches any more
    with watching(model) as found, torch.no_grad():
        model(torch.tensor([1.0]))
    assert describe_outside(found) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"family": "rational"}, "family rational divides, so it is no polynomial"),
        ({"family": "fourier"}, "family fourier is made of cosines, so it is no polynomial"),
        ({"family": "tropical"}, "family tropical compares, so"),
        ({"family": "tropical_rational"}, "family tropical_rational compares, so"),
        ({"family": "polyrelu"}, "family polyrelu compares x with 0, so"),
        ({"family": "hermite"}, "family hermite is one basis of what is fitted anyway; leave family out"),
        ({"degree": 8}, "degree is for other conversions; use depth"),
        ({"coverage": 0.99}, "coverage is for other conversions; use domain"),
        ({"constraints": ["ends"]}, "constraints is for other conversions; leave it out"),
        ({"polynomial_only": False, "depth": 4}, "depth is for polynomial_only"),
        ({"polynomial_only": False, "domain": "-1,1"}, "domain is for polynomial_only"),
        ({"domain": "1,-1"}, "expected LOW,HIGH with LOW < HIGH"),
        ({"domain": "wide"}, "expected LOW,HIGH: --domain=-8,8"),
        ({"depth": 17}, "less than or equal to 16"),
    ],
)
def test_what_does_not_go_with_polynomials_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ConvertParameters.model_validate({"polynomial_only": True, **given})
    if isinstance(given.get("domain"), str):
        return  # as text, for the command
    same = message.replace("less than or equal to 16", "depth: expected 1 to 16, got 17")
    with pytest.raises(ValueError, match=same):
        polytrope_convert(nn.Sequential(nn.GELU()), [torch.randn(8, 2)], **{"polynomial_only": True, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"depth": 0}, "depth: expected 1 to 16, got 0"),
        ({"domain": (1.0, -1.0)}, r"domain: expected \(lo, hi\) with lo < hi"),
        ({"domain_margin": -0.1}, "^domain_margin: expected a share of at least 0"),
        ({"polynomial_only": False, "domain_margin": 0.5}, "domain_margin is for polynomial_only"),
    ],
)
def test_options_of_polynomials_that_cannot_be_are_refused_in_python(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        polytrope_convert(nn.Sequential(nn.GELU()), [torch.randn(8, 2)], **{"polynomial_only": True, **given})


def test_a_module_becomes_polynomials_in_python_and_its_report_says_what_they_cost(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh())
    x = torch.randn(64, 8)
    x[48:] *= 8  # of these samples no domain is made
    labels = torch.zeros(64)
    conversion = polytrope_convert(model, [(x, labels)], polynomial_only=True, depth=3)
    assert conversion.samples == 48
    only = conversion.polynomials
    assert only is not None
    assert (only.samples, only.depth) == (16, 6)
    gelu = conversion.model[1]  # type: ignore[index]
    low, high = gelu.domain
    received = model[0](x[48:])
    assert only.seen["1"].outside == int(((received < low) | (received > high)).sum()) > 0
    assert only.products == 8 * sum(cost.products for cost in only.costs.values())
    report = conversion.report()
    assert f"{only.seen['1'].outside} of 128" in report
    assert "all, one after the other: depth 6" in report
    assert "INPUTS OUTSIDE OF THE CERTIFIED RANGE" in report
    conversion.save(tmp_path / "out")
    loaded = Conversion.load(tmp_path / "out", copy.deepcopy(model))
    assert loaded == conversion
    assert loaded.report() == report
    given = polytrope_convert(model, [x], polynomial_only=True, depth=2, domain=(-90.0, 90.0))
    assert [entry.interval for entry in given.activations] == [(-90.0, 90.0)] * 2
    assert given.polynomials is not None
    assert not any(seen.outside for seen in given.polynomials.seen.values())


def test_a_function_that_runs_the_model_has_no_samples_to_keep_aside() -> None:
    with pytest.raises(ValueError, match="a function that runs the model has none; give batches"):
        polytrope_convert(nn.Sequential(nn.GELU()), lambda model: model(torch.randn(8, 2)), polynomial_only=True)


def test_parameters_mean_the_same_when_they_are_read_again() -> None:
    given = ConvertParameters.model_validate({"polynomial_only": True, "domain": "-3,4"})
    assert ConvertParameters.model_validate(given.model_dump(mode="json")) == given
    assert given.replacement() == "composition"
    for parameters, depth in ((given, 6), (ConvertParameters(polynomial_only=True, target_error=0.1), MAX_DEPTH)):
        options = fit_options(**parameters.model_dump(include=set(FIT_OPTIONS)))
        assert options.family == "composition"
        assert options.polynomial_only is not None
        assert options.polynomial_only.depth == depth
    assert convert_parameters.MAX_DEPTH == MAX_DEPTH
    assert ConvertParameters().replacement() == "hermite"


def test_the_largest_depth_and_degree_are_advised_without_a_larger_one() -> None:
    seen = Calibration.of(torch.linspace(-3, 3, 1000))
    deepest = FitOptions("composition", polynomial_only=PolynomialOnly(MAX_DEPTH))
    for target, options in ((nn.ReLU(), deepest), (nn.GELU(), FitOptions(degree=16))):
        fitted = fit_layer(Activation("a", target), seen, options)
        (advice,) = advise([fitted], {"a": 1.0}, options)
        assert advice.advice == "100% of what the conversion costs; leave this layer as it is if that is too much"


def test_a_polynomial_that_received_nothing_has_no_extremes_in_json() -> None:
    found = Polynomials(
        {}, {"a": DomainInputs((-1.0, 1.0)), "b": DomainInputs((-1.0, 1.0), 2, 0, 1, 0.5, 2.0, 1)}, 1, 1
    )
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (content["seen"]["a"]["minimum"], content["seen"]["a"]["maximum"]) == (None, None)
    assert (content["seen"]["b"]["minimum"], content["seen"]["b"]["maximum"]) == (0.5, 2.0)
    assert Polynomials.from_dict(content) == found


def test_a_polynomial_that_received_nothing_has_no_extremes_in_the_record_and_on_the_page(tmp_path: Path) -> None:
    options = FitOptions("composition", polynomial_only=PolynomialOnly(2))
    fitted = fit_layer(Activation("a", nn.GELU()), Calibration.of(torch.linspace(-3, 3, 1000)), options)
    module = fitted.fit.build()
    assert isinstance(module, Composition)
    idle = Polynomials({"a": count(module.circuit())}, {"a": DomainInputs(module.domain)}, 1, 1)
    made = with_polynomials(record([fitted], options, {}, []), idle)
    (layer,) = made.layers
    assert layer.outside is not None
    assert (layer.outside.inputs, layer.outside.minimum, layer.outside.maximum) == (0, None, None)
    page = write_page(tmp_path, made, "idle").read_text(encoding="utf-8")
    assert "<td>0</td><td>0</td><td>0</td>\n<td>–</td></tr>" in page


def test_the_range_is_what_was_measured_and_a_margin() -> None:
    def fitted(x: torch.Tensor, **options: Any) -> tuple[float, float]:
        given = FitOptions("composition", polynomial_only=PolynomialOnly(depth=2, **options))
        return fit_layer(Activation("a", nn.GELU()), Calibration.of(x), given).interval

    x = torch.linspace(-2, 6, 1000)
    assert fitted(x) == (-4.0, 8.0)
    assert fitted(x, margin=0.0) == (-2.0, 6.0)
    assert fitted(x, domain=(-3.0, 9.0)) == (-3.0, 9.0)
    assert fitted(torch.full((100,), 0.25)) == (-0.25, 0.75)


def test_a_quarter_of_the_samples_is_kept_aside() -> None:
    def sizes(*counts: int) -> tuple[list[int], list[int]]:
        kept, aside = hold_out([{"x": torch.zeros(number, 2)} for number in counts])
        return [len(part["x"]) for part in kept], [len(part["x"]) for part in aside]

    assert sizes(8, 5, 2) == ([6, 4, 2], [2, 1])
    assert sizes(1, 1, 1, 1, 1) == ([1, 1, 1, 1], [1])
    with pytest.raises(ValueError, match=r"at least 4 calibration samples, as some are kept aside .* got 3"):
        sizes(3)


def test_extremes_of_what_lay_outside_are_those_of_numbers() -> None:
    seen = DomainInputs((-1.0, 1.0))
    seen.add(torch.tensor([math.nan, math.nan]))
    assert describe_outside({"a": seen}).endswith("`a` 2 of 2 (probability 1), none of them a number for -1 … 1")  # type: ignore[union-attr]
    seen.add(torch.tensor([math.nan, 3.0, -0.5]))
    assert (seen.minimum, seen.maximum, seen.outside, seen.inputs) == (-0.5, 3.0, 4, 5)
