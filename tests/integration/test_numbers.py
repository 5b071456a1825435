"""Numbers from end to end: rows, the MLPs that learn them, their figures and the report, on the local executor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from polytrope.models import build_model
from polytrope.models.checkpoint import load_model
from polytrope.pipeline.commands.cli import main
from polytrope.pipeline.data.reader import open_split

WORKFLOW = """
name: numbers
executor: local
stages:
  polynomials:
    uses: shard_numbers
    with: {source: {kind: hierarchical, rows: 600, dimension: 3, inner: {rank: 1, degree: 1}, outer: [0.5, 0, 1]}}
  pairs:
    uses: shard_numbers
    with: {source: {kind: modular, modulus: 7}}
  regression:
    uses: train
    inputs: {dataset: polynomials}
    with:
      model: {architecture: mlp, widths: [16, 16], activation: hermite2, residual: true, feedforward: quadratic}
      steps: 200
      global_batch_size: 64
      learning_rate: 1.0e-2
      peak_flops: 1.0e+12
      range_penalty: {activation: 0.01, beyond: 4.0, denominator: 0}
      activation_checkpointing: block
      statistics_every: 100
  classes:
    uses: train
    inputs: {dataset: pairs}
    with:
      model: {architecture: mlp, widths: [32], activation: {name: hermite2, interval: null}, output_scale: 2.0}
      steps: 20
      global_batch_size: 16
      validation_every: 10
      validation_samples: 1000
      fit_samples: 1000
      keep_initial: true
      loss: {name: poly}
  analysis:
    uses: analyze
    inputs: {dataset: pairs, models: {classes: classes}}
    with: {analyses: [modular, {name: width, widths: [8, 16], draws: 10}]}
  upgraded:
    uses: convert
    inputs: {model: classes, dataset: pairs}
    with: {linear: quadratic, family: null}
  factored:
    uses: convert
    inputs: {model: classes, dataset: pairs}
    with: {factorize: {rank: 3}, page: true}
  recovered:
    uses: train
    inputs: {dataset: pairs, initial: factored}
    with: {steps: 4, global_batch_size: 16, trainable: ["*.outer.weight"]}
  tuned:
    uses: train
    inputs: {dataset: pairs, initial: upgraded}
    with: {steps: 4, global_batch_size: 16, trainable: [multiplicative]}
  tangent:
    uses: train
    inputs: {dataset: polynomials, initial: regression}
    with: {steps: 20, global_batch_size: 64, linearize: true, validation_samples: 1000}
  scores:
    uses: evaluate
    inputs: {dataset: polynomials, models: {regression: regression, tangent: tangent}}
  speed:
    uses: measure_speed
    inputs: {dataset: polynomials, models: {tangent: tangent}}
    with: {rounds: 1, steps: 1}
  page:
    uses: report
    inputs:
      evaluation: scores
      models: {regression: regression, tangent: tangent}
      dataset: polynomials
      speed: speed
"""


def test_numbers_from_rows_to_a_report(tmp_path: Path) -> None:
    (tmp_path / "numbers.yaml").write_text(WORKFLOW)
    store = tmp_path / "store"
    command = [str(Path(sys.executable).with_name("polytrope")), "run", "numbers.yaml", "--executor", "local"]
    command += ["--no-tracking", "--store", str(store)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    files = {}
    for path in store.glob("artifacts/*/files"):
        manifest = json.loads((path.parent / "manifest.json").read_text())
        files[manifest["stage"]] = path
    scores = read(files["scores"], "evaluation.json")
    assert scores["kind"] == "numbers"
    inputs, targets = rows_of(files["polynomials"])
    variance = targets.var()
    assert variance == pytest.approx(1.0, rel=0.6)  # He_2 of a normal number
    result = scores["models"]["regression"]
    with torch.no_grad():
        predicted = load_model(files["regression"])(torch.from_numpy(inputs)).numpy()
    assert result["loss"] == pytest.approx(float(np.square(predicted - targets).mean()), rel=1e-5)
    assert result["r2"] == pytest.approx(1 - result["loss"] / variance, abs=1e-5)
    assert result["r2"] > 0.95  # a polynomial of degree 2, learned by one of degree 16
    assert result["rows"] == len(inputs)
    assert result.get("top1") is None
    tangent = scores["models"]["tangent"]
    assert tangent["loss"] == pytest.approx(read(files["tangent"], "training.json")["val/loss"], rel=1e-6)
    assert 0.0 < tangent["loss"] < 2 * result["loss"]
    assert tangent["loss"] != result["loss"]
    assert read(files["speed"], "speed.json")["models"]["tangent"]["step_milliseconds"] > 0.0
    training = read(files["regression"], "training.json")
    assert "val/accuracy" not in training
    page = (files["page"] / "report.html").read_text()
    assert "its R²" in page
    assert "mean square per row" in page
    assert "nats" not in page
    card = tmp_path / "card.md"
    assert main(["card", "--stage", "tangent", "--store", str(store), "--output", str(card)]) == 0
    assert "a tangent model of mlp" in card.read_text()
    assert main(["card", "--stage", "regression", "--store", str(store), "--output", str(card)]) == 0
    front = yaml.safe_load(card.read_text().split("---")[1])
    assert front["pipeline_tag"] == "tabular-regression"
    (figures,) = front["model-index"]
    assert {entry["task"]["type"] for entry in figures["results"]} == {"tabular-regression"}

    training = read(files["classes"], "training.json")
    rows, classes = rows_of(files["pairs"])
    with torch.no_grad():
        logits = load_model(files["classes"])(torch.from_numpy(rows))
    assert training["val/accuracy"] == pytest.approx(float((logits.argmax(1).numpy() == classes).mean()))
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(classes))
    assert training["val/loss"] == pytest.approx(float(loss), rel=1e-5)
    upgraded, tuned = load_model(files["upgraded"]), load_model(files["tuned"])
    upgrade = read(files["upgraded"], "conversion.json")
    assert (upgrade["layers"], upgrade["left"], upgrade["quadratic"]) == ([], [], ["blocks.0.layer"])
    with torch.no_grad():
        assert torch.equal(upgraded(torch.from_numpy(rows)), logits)
        assert not torch.equal(tuned(torch.from_numpy(rows)), logits)
    factored, made = load_model(files["factored"]), read(files["factored"], "conversion.json")
    (layer,) = made["factorization"]["layers"]
    assert (layer["name"], layer["rank"]) == ("blocks.0.layer", 3)
    assert made["layers"] == []
    assert made["size"]["after"] == sum(parameter.numel() for parameter in factored.parameters())
    whole = load_model(files["classes"]).state_dict()["blocks.0.layer.weight"]
    factors = factored.get_submodule("blocks.0.layer")
    assert torch.linalg.matrix_rank(factors.merged().weight) == 3 < torch.linalg.matrix_rank(whole)  # type: ignore[operator]
    assert read(files["recovered"], "model.json")["config"]["factors"] == {"blocks.0.layer": 3}
    before, after = factored.state_dict(), load_model(files["recovered"]).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"blocks.0.layer.outer.weight"}
    page = (files["factored"] / "conversion.html").read_text()
    assert "Factored layers" in page
    assert "Certificates" not in page
    assert main(["card", "--stage", "factored", "--store", str(store), "--output", str(card)]) == 0
    assert "## Conversion\n\n1 linear layers are in two factors." in card.read_text()

    before, after = upgraded.state_dict(), tuned.state_dict()
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"gate_weight", "gate_bias", "square_weight"}

    rows, sums = rows_of(files["pairs"], "train")
    with torch.no_grad():
        right = float((load_model(files["classes"])(torch.from_numpy(rows)).argmax(1).numpy() == sums).mean())
    assert training["fit/accuracy"] == pytest.approx(right)
    torch.manual_seed(0)
    fresh: Any = build_model("mlp", read(files["classes"], "model.json")["config"])
    fresh.start_for(1.0 / (rows.shape[1] // 2))  # of one-hot vectors
    start = fresh.state_dict()
    kept = load_model(files["classes"] / "initial").state_dict()
    assert all(torch.equal(kept[name], weight) for name, weight in start.items())

    analysis = read(files["analysis"], "analysis.json")["models"]["classes"]
    found = analysis["modular"]
    assert found["missing"] == []
    assert (found["train_accuracy"], found["test_accuracy"]) == pytest.approx((right, training["val/accuracy"]))
    assert found["curve"]["steps"] == [10, 20]
    assert (found["curve"]["train"][-1], found["curve"]["test"][-1]) == pytest.approx((right, training["val/accuracy"]))
    assert found["margin"] < 0.0 < found["kernel_drift"]  # not learned in 20 steps
    assert len(found["concentrations"]) == 32
    assert analysis["width"]["widths"] == [8, 16]
    assert (files["analysis"] / "plots" / "modular.png").stat().st_size > 0


def read(directory: Path, name: str) -> Any:
    return json.loads((directory / name).read_text())


def rows_of(dataset: Path, split: str = "validation") -> tuple[np.ndarray, np.ndarray]:
    reader = open_split(dataset, split)
    return reader.numbers(np.arange(len(reader)))
