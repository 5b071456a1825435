"""`output_scale` of an `mlp`, from rich to lazy: what it multiplies and divides, and how little weights then move."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from polytrope.models import build_model
from polytrope.models.checkpoint import load_model, save_model
from polytrope.models.parts.ranges import RangePenalty, penalise_ranges
from polytrope.models.tangent import tangent_kernel

SIZES: dict[str, Any] = {"inputs": 3, "outputs": 2, "widths": [16], "activation": "hermite2"}


def pair(loss: str, scale: float) -> tuple[Any, Any]:
    """The same weights without and with a scale."""
    plain, scaled = (build_model("mlp", {**SIZES, "loss": loss, **more}) for more in ({}, {"output_scale": scale}))
    scaled.load_state_dict(plain.state_dict())
    return plain, scaled


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_outputs_are_multiplied_and_the_training_loss_alone_is_divided_by_the_square(loss: str) -> None:
    torch.manual_seed(0)
    plain, scaled = pair(loss, 5.0)
    rows = torch.randn(6, 3)
    targets = torch.randn(6, 2) if loss == "mse" else torch.randint(2, (6,))
    torch.testing.assert_close(scaled(rows), 5.0 * plain(rows))
    measured = scaled.eval()(rows, targets)
    expected = plain.eval()
    expected.head.weight.data *= 5.0
    expected.head.bias.data *= 5.0
    torch.testing.assert_close(measured, expected(rows, targets))
    torch.testing.assert_close(scaled.train()(rows, targets), measured / 25.0)
    penalise_ranges(scaled, RangePenalty(activation=1.0, beyond=0.1, denominator=0.0))
    penalty = (scaled.blocks[0].layer(rows).abs() - 0.1).relu().square().mean()
    torch.testing.assert_close(scaled.train()(rows, targets), measured / 25.0 + penalty)


def test_the_tangent_kernel_drifts_as_little_as_the_scale_is_large() -> None:
    """Weights move by 1/α to change the outputs by 1, and with them the kernel (Chizat, Oyallon, Bach, 2019)."""
    torch.manual_seed(0)
    rows, change = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64)
    drifts = []
    for scale in (1.0, 10.0, 100.0, 1000.0):
        torch.manual_seed(1)
        model: Any = build_model("mlp", {**SIZES, "output_scale": scale}).double()
        before, targets = tangent_kernel(model, rows), model(rows).detach() + change
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(100):
            optimizer.zero_grad()
            model(rows, targets).backward()
            optimizer.step()
        drifts.append(float((tangent_kernel(model, rows) - before).norm() / before.norm()))
    assert drifts[0] > 0.1
    assert drifts[1] < drifts[0] / 3
    assert drifts[2] == pytest.approx(drifts[1] / 10, rel=0.15)
    assert drifts[3] == pytest.approx(drifts[2] / 10, rel=0.02), drifts


def test_it_is_written_where_it_is_not_1(tmp_path: Path) -> None:
    for scale, written in ((1.0, False), (0.5, True)):
        model = build_model("mlp", {**SIZES, "output_scale": scale})
        save_model(tmp_path / str(scale), model)
        described = json.loads((tmp_path / str(scale) / "model.json").read_text())["config"]
        assert ("output_scale" in described) == written
        rows = torch.randn(4, 3)
        assert torch.equal(load_model(tmp_path / str(scale))(rows), model.eval()(rows))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_that_is_none_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=r"^output_scale: expected a number above 0"):
        build_model("mlp", {**SIZES, "output_scale": scale})
