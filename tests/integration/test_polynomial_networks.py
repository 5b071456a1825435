"""workflows/polynomial-networks.yaml in a small form: an upgrade that changes nothing, and the benchmark's tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import polytrope
from benchmarks import polynomial_networks
from polytrope.models.checkpoint import load_model
from polytrope.pipeline.data.training_file import read_training

SMALL = {
    "params.seeds": "[0]",
    "params.feedforwards": "[{label: mlp, feedforward: mlp, activation: hermite3}]",
    "params.dims": "[4, 8]",
    "params.image_steps": "2",
    "params.tuning_steps": "2",
    "params.rows": "400",
    "params.fewer_rows": "[200]",
    "params.regression_steps": "2",
    "params.warmup_steps": "1",
    "stages.alone.matrix.learns": "[{label: coefficients, trainable: [coefficients], per_channel: false}]",
    "stages.tuned.matrix.learns": "[{label: multiplicative, trainable: [multiplicative]}]",
    "stages.regression.matrix.layers": "[{label: relu, feedforward: dense, activation: relu, widths: [4]}, "
    "{label: pi, feedforward: pi, activation: identity, widths: [4]}]",
    "stages.samples.matrix.layers": "[{label: relu, feedforward: dense, activation: relu, widths: [4]}]",
}
CHANGED = {"gate_weight", "gate_bias", "square_weight"}


@pytest.mark.timeout(300)
def test_the_small_form(tmp_path: Path) -> None:
    overrides = [f"{name}={value}" for name, value in SMALL.items()]
    result = polytrope.run(polynomial_networks.WORKFLOW, overrides=overrides, store=tmp_path, tracking=False)
    linear, quadratic, tuned = (
        load_model(result[name].path)
        for name in ("baseline[seed=0]", "quadratic[seed=0]", "tuned[learns=multiplicative,seed=0]")
    )
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(quadratic(images), linear(images))
        assert not torch.equal(tuned(images), linear(images))
    before, after = quadratic.state_dict(), tuned.state_dict()
    assert {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])} == CHANGED
    names = json.loads((result["quadratic[seed=0]"].path / "conversion.json").read_text())["quadratic"]
    assert names == [f"stages.{stage}.0.pwconv{layer}" for stage in (0, 1) for layer in (1, 2)]
    learned = read_training(result["alone[learns=coefficients,seed=0]"].path)
    assert learned is not None
    assert learned.trainable_parameters == 8  # of two activations of degree 3

    params = {"seeds": [0], "feedforwards": [{"label": "mlp"}], "fewer_rows": [200]}
    record = json.loads(json.dumps(polynomial_networks.gather(result, params)))
    assert record["drift"] == {"kl_divergence": 0.0, "agreement": 1.0}
    assert list(record["numbers"]) == ["relu", "pi"]
    assert len(record["numbers"]["relu"]["r2"]) == 2
    table = polynomial_networks.markdown(record)
    assert "| dense, ReLU |" in table
    assert "| products |" in table
    polynomial_networks.draw(record, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 5000
    assert all(
        page.exists() for page in (result[name].path / "report.html" for name in ("report", "report_regression"))
    )


def test_the_comparisons() -> None:
    rows = {"a": {"loss": [1.0, 2.0, 3.0]}, "b": {"loss": [1.5, 2.6, 3.4]}, "c": {"loss": [1.0, None, 1.0]}}
    found = polynomial_networks.compared(rows, "loss", "a")
    assert found["a"]["difference"] is None
    assert found["c"]["difference"] is None
    assert found["b"]["difference"]["mean"] == pytest.approx(0.5)
    assert found["b"]["difference"]["half_width"] == pytest.approx(0.24841, abs=1e-5)  # 0.1 / √3 · 4.30265
    assert found["b"]["difference"]["holm"] == found["b"]["difference"]["p_value"] == pytest.approx(0.01307, abs=1e-5)
    r2 = {"1000": [0.95, 0.8], "2000": [0.91, 0.92], "4000": [0.99, 0.99]}
    assert polynomial_networks.above(r2, 0.9) == 2000
    assert polynomial_networks.above({"1000": [None, 0.99]}, 0.9) is None
