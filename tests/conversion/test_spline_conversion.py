"""Conversion to rational-quadratic splines: through the function at knots where its inputs and its bends are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversion_support import own_model, tokens
from pydantic import ValidationError
from torch import Tensor, nn

from polytrope.models.calibration import Calibration
from polytrope.models.checkpoint import save_model
from polytrope.models.conversion import FitOptions, LayerConversion, fit_layer
from polytrope.models.convert import Conversion, convert
from polytrope.models.surgery import Activation
from polytrope.ops import RationalSpline
from polytrope.ops.fitting.targets import NAMED, sample
from polytrope.ops.interpolate import FAMILIES, fit, fit_to_error, parameter_count
from polytrope.ops.rational_spline import tied
from polytrope.pipeline.commands.cli import main
from polytrope.pipeline.data.promised import PromisedModel
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Resources
from polytrope.pipeline.stages.convert.convert import promise
from polytrope.pipeline.stages.convert.parameters import ConvertParameters


def drawn(seed: int, count: int = 1 << 15) -> Tensor:
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.2
    x[:50] *= 4  # outliers, as real layers have them
    return x


def converted(target: nn.Module, pieces: int, x: Tensor) -> LayerConversion:
    return fit_layer(Activation("a", target), Calibration.of(x), FitOptions("rational_spline", pieces))


@pytest.mark.parametrize("name", ["gelu", "silu", "tanh", "softplus"])
def test_values_and_slopes_at_the_knots_are_the_functions_own(name: str) -> None:
    found = fit(name, "rational_spline", 9, interval=(-5, 3), dtype=torch.float64)
    module = found.build()
    assert isinstance(module, RationalSpline)
    knots, _, _ = tied(module.widths, module.slopes, module.rises, module.start, (-5.0, 3.0))
    value, slope = sample(module, knots.detach().numpy())
    wanted, wanted_slope = sample(NAMED[name], knots.detach().numpy())
    assert np.abs(value - wanted).max() < 1e-13
    assert np.abs(slope - wanted_slope).max() < 1e-12
    at = np.linspace(-9, 9, 1001)  # the curve that is certified is the module, on the straight lines too
    for mine, its in zip(found.curve(at), sample(module, at), strict=True):
        assert np.abs(mine - its).max() < 1e-12


def test_knots_are_where_the_inputs_are_and_the_function_bends() -> None:
    """Less error than through equidistant knots, and as many as h⁴ allows for more of them."""
    x, fresh = drawn(0), drawn(1)
    exact = nn.functional.gelu(fresh)

    def missed(module: nn.Module) -> float:
        with torch.no_grad():
            return float((module.double()(fresh) - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    errors = {}
    for pieces in (8, 16, 32):
        layer = converted(nn.GELU(), pieces, x)
        errors[pieces] = missed(layer.fit.build())
        assert errors[pieces] < 1.1 * layer.relative_error
        even = RationalSpline(pieces, init="gelu", interval=layer.interval, dtype=torch.float64)
        assert errors[pieces] < 0.5 * missed(even)
    assert errors[8] < 1.1e-3
    assert errors[16] < errors[8] / 8
    assert errors[32] < errors[16] / 8


@pytest.mark.parametrize(("target", "error"), [(nn.ReLU(), 5e-4), (nn.Hardswish(), 3e-4), (nn.Tanh(), 3e-3)])
def test_kinks_and_flat_ends_are_met(target: nn.Module, error: float) -> None:
    assert converted(target, 8, drawn(0)).relative_error < error


def test_a_line_is_there_only_for_what_does_not_rise() -> None:
    straight = converted(nn.Identity(), 3, drawn(0))
    assert straight.fit.parameters["line"] == 0.0
    assert straight.relative_error == 0.0
    steep = fit(lambda x: 2 * x + torch.tanh(x), "rational_spline", 6, interval=(-3, 3), dtype=torch.float64)
    assert steep.parameters["line"] == 0.0 or steep.parameters["line"] > 0.5  # the measured error chose
    fallen = fit(lambda x: -3 * x, "rational_spline", 4, interval=(-3, 3), dtype=torch.float64)
    assert fallen.parameters["line"] > 3.0
    assert fallen.certificate.maximum < 1e-12


def test_an_error_takes_as_few_pieces_as_it_needs_up_to_64() -> None:
    for error, few, enough in ((1e-2, 2, 8), (1e-4, 8, 18), (1e-5, 20, 30)):
        weight = Calibration.of(drawn(0)).measure()
        options: dict[str, Any] = {"weight": weight, "interval": "best", "dtype": torch.float64}
        found = fit_to_error("gelu", "rational_spline", error, degrees=[few, enough, 64], **options)
        assert found.certificate.rms <= error
        assert found.config["degree"] <= enough
    module = RationalSpline(11)
    assert parameter_count("rational_spline", 11) == sum(part.numel() for part in module.parameters())


def test_each_channel_of_a_prelu_gets_its_own() -> None:
    slopes = torch.tensor([0.1, 0.5, -0.3])
    module = nn.PReLU(3)
    with torch.no_grad():
        module.weight.copy_(slopes)
    found = converted(module, 12, drawn(0)).fit.build().float()
    x = drawn(1, 300).float().reshape(100, 3)
    with torch.no_grad():
        assert (found(x) - module(x)).abs().max() < 0.02
        assert found.num_parameters == 3


def test_a_model_is_converted_written_and_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = own_model("gpt2", activation="gelu")
    conversion = convert(model, [tokens()], family="rational_spline", degree=20)
    assert [entry.config["name"] for entry in conversion.activations] == ["rational_spline"] * 2
    assert max(entry.relative_error for entry in conversion.activations) < 1e-3
    assert conversion.difference < 1e-3
    conversion.save(tmp_path / "api")
    loaded = Conversion.load(tmp_path / "api")
    with torch.no_grad():
        expected = conversion.model(tokens())
        assert torch.equal(loaded.model(tokens()), expected)
    assert loaded.activations == conversion.activations

    save_model(tmp_path / "own", model)
    np.save(tmp_path / "tokens.npy", tokens().numpy())
    arguments = ["convert", str(tmp_path / "own"), "--dry-run", "--json", "--data", str(tmp_path / "tokens.npy")]
    assert main([*arguments, "--family", "rational_spline", "--degree", "20"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert [(layer["family"], layer["degree"]) for layer in layers] == [("rational_spline", 20)] * 2


def test_learned_splines_become_polynomials_where_they_are_asked_for() -> None:
    model = nn.Sequential(nn.Linear(8, 8), RationalSpline(6, init="gelu"))
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        ValueError, match=r"its 1 are learned already \(1\), by a training .*types=\['RationalSpline'\]"
    ):
        convert(model, [x], polynomial_only=True)
    again = convert(model, [x], polynomial_only=True, types=["RationalSpline"])
    assert [entry.config["name"] for entry in again.activations] == ["composition"]
    settings = {"n_layer": 1, "activation": {"name": "rational_spline", "degree": 6}}
    promised = PromisedModel("gpt2", {**settings, "vocab_size": 9, "sequence_length": 8, "n_head": 2, "n_embd": 8})

    def plan(**parameters: Any) -> Any:
        upstream = {"model": promised, "dataset": None}
        return promise(ConvertParameters(**parameters), upstream, Resources(), Path())

    for parameters in ({"polynomial_only": True}, {"family": "rational_spline"}, {"family": "hermite"}):
        with pytest.raises(UserError, match=r"types: .* are learned already \(rational_spline\)") as error:
            plan(**parameters)
        assert "or fit these again: types: [rational_spline]" in str(error.value.hint)
        plan(**parameters, types=["rational_spline"])


def test_what_cannot_be_is_refused() -> None:
    for options, message in (
        ({"degree": 65}, "degree: expected an integer from 1 to 64, got 65"),
        ({"tails": False}, "tails: a rational_spline goes on along straight lines"),
        (
            {"constraints": ["ends"]},
            "constraints, nodes and interpolation are for polynomials, not for rational_spline",
        ),
        ({"interval": None, "weight": "gaussian"}, r"interval: None \(the whole line\) is for polynomials"),
    ):
        with pytest.raises(ValueError, match=message):
            fit("gelu", **{"family": "rational_spline", "degree": 8, **options})
    with pytest.raises(ValueError, match="target: not finite at x ="):
        fit(lambda x: 1 / x, "rational_spline", 8)
    assert "rational_spline" in FAMILIES
    assert ConvertParameters(family="rational_spline", degree=64).degree == 64
    for given, message in (
        ({"degree": 17}, r"expected at most 16 \(family rational_spline: 64 pieces\)"),
        ({"family": "rational_spline", "degree": 65}, "less than or equal to 64"),
        ({"family": "rational_spline", "polynomial_only": True}, "family rational_spline divides, so it is no poly"),
        ({"family": "rational_spline", "basis": "measured"}, "basis measured is of polynomials"),
        ({"family": "rational_spline", "weight": "normal"}, "weight normal projects on polynomials"),
    ):
        with pytest.raises(ValidationError, match=message):
            ConvertParameters(**given)
