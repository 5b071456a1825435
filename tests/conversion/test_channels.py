"""A PReLU with slopes for its channels becomes one activation with coefficients for each of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from polytrope.models.conversion import FitOptions
from polytrope.models.convert import Conversion, convert
from polytrope.models.surgery import Choice, stays
from polytrope.ops import LearnableActivation
from polytrope.ops.channels import fit_channels_to_error
from polytrope.pipeline.stages.convert.conversion_record import advise, describe

SLOPES = torch.tensor([-0.5, 0.0, 0.25, 1.0, 1.5, 0.25])
X = torch.randn(48, 3, 6, 5, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """Channels that receive different inputs; beside them one slope for all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.activation = nn.Conv2d(3, 6, 3), nn.PReLU(6)
        self.second, self.other = nn.Conv2d(6, 4, 1), nn.PReLU()
        with torch.no_grad():
            self.activation.weight.copy_(SLOPES)
            self.first.weight.mul_(torch.linspace(0.5, 3.0, 6).reshape(6, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.other(self.second(self.activation(self.first(x))))
        return found


def prelu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, SLOPES.to(x).reshape(6, 1, 1) * x)


def test_straight_lines_have_every_slope_exactly(tmp_path: Path) -> None:
    model = Network()
    conversion = convert(model, [X], family="tropical_rational", degree=1)
    module = conversion.model.activation
    assert isinstance(module, LearnableActivation)
    assert (module.num_parameters, module.dim, module.degree) == (6, 1, 1)
    assert [entry.name for entry in conversion.activations] == ["activation", "other"]
    with torch.no_grad():
        torch.testing.assert_close(conversion.model(X), model(X), rtol=1e-6, atol=1e-6)
        far = 100.0 * torch.randn(9, 6, 3, 3)
        torch.testing.assert_close(module(far), prelu(far), rtol=1e-5, atol=1e-5)
    assert conversion.activations[0].relative_error < 1e-6

    conversion.save(tmp_path / "converted")
    loaded = Conversion.load(tmp_path / "converted", Network()).model
    assert torch.equal(loaded(X), conversion.model(X))


@pytest.mark.parametrize("family", ["hermite", "rational", "fourier", "polyrelu", "tropical"])
def test_errors_are_bounds_for_every_channel(family: str) -> None:
    model = Network()
    conversion = convert(model, [X], family=family, degree=5, include=["activation"])
    certificate, module = conversion.certificates["activation"], conversion.model.activation
    assert module.num_parameters == 6
    with torch.no_grad():
        inputs = model.first(X)
        off = module(inputs) - prelu(inputs)
    assert float(off.abs().max()) <= max(certificate["maximum"], certificate["maximum_outside"] or 0.0)
    assert 0.0 < float(off.square().mean().sqrt()) <= 1.05 * certificate["rms"]
    size = float(prelu(inputs).square().mean().sqrt())
    assert float(off.square().mean().sqrt()) / size <= 1.05 * conversion.activations[0].relative_error


def test_a_target_error_holds_over_all_channels() -> None:
    conversion = convert(Network(), [X], target_error=0.01, include=["activation"])
    assert conversion.activations[0].relative_error <= 0.01
    assert conversion.activations[0].config["degree"] == 2  # the smallest that is tried
    exact = convert(Network(), [X], family="auto", target_error=1e-5, degree=2)
    assert [entry.config["name"] for entry in exact.activations] == ["tropical_rational"] * 2
    bound = convert(Network(), [X], family="auto", target_error=0.1, constraints=["origin"], include=["activation"])
    assert bound.activations[0].config["name"] in ("hermite", "polyrelu")  # the others take no constraints
    inputs = (np.linspace(-1, 1, 9), np.ones(9))
    with pytest.raises(ValueError, match="degrees: expected at least one, got none"):
        fit_channels_to_error(SLOPES.numpy(), "auto", 0.1, degrees=[], weight=inputs)
    with pytest.raises(ValueError, match=r"`activation`: target error: polyrelu reaches no error of .* for every chan"):
        convert(Network(), [X], family="polyrelu", degree=3, target_error=1e-5)


def test_records_show_the_channel_that_bends_most_and_advise_straight_lines() -> None:
    conversion = convert(Network(), [X], degree=3, include=["activation"], rated_samples=0)
    (layer,) = conversion.layers
    described = describe(layer)
    assert described.config["num_parameters"] == 6
    assert len(described.coefficients) == 6 * 4
    x = torch.tensor(described.curve.x, dtype=torch.float64)
    wanted = torch.where(x > 0, x, SLOPES[0].double() * x)
    torch.testing.assert_close(torch.tensor(described.curve.target, dtype=torch.float64), wanted)
    with torch.no_grad():
        channel = layer.fit.build(torch.float64)(x.reshape(-1, 1).expand(-1, 6).contiguous())[:, 0]
    torch.testing.assert_close(torch.tensor(described.curve.fit, dtype=torch.float64), channel)
    (advice,) = advise([layer], {"activation": 1.0}, FitOptions(degree=3))
    assert "tropical_rational of degree 1 has it exactly" in (advice.advice or "")


def test_what_cannot_have_coefficients_for_channels_is_said() -> None:
    with pytest.raises(ValueError, match=r"`activation`: polynomial_only: its channels have slopes .*\(--exclude\)"):
        convert(Network(), list(X.split(12)), polynomial_only=True)

    class Softened(nn.PReLU):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x))

    model = nn.Sequential(nn.Linear(8, 8), Softened(8))
    assert stays(model, "1", Choice()) == "a slope for each of 8 channels: no one function can stand for it"


def test_one_slope_is_a_function_like_any_other() -> None:
    conversion = convert(Network(), [X], degree=6, include=["other"])
    assert conversion.model.other.num_parameters == 1
    assert math.isfinite(conversion.activations[0].relative_error)
