"""The export_circuit stage: ranges, the file, what lies outside, and that the model and its circuit say the same."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from training_support import SEQUENCE_LENGTH, make_context, make_dataset, read_events

from polytrope.models import build_model, circuit
from polytrope.models.checkpoint import load_model, save_model
from polytrope.models.circuit import embed, refuse_other_parts
from polytrope.models.gpt2 import GPT2
from polytrope.models.parts.reciprocal import relative_error, root_error
from polytrope.pipeline.data.circuit_file import read_circuit
from polytrope.pipeline.data.promised import PromisedImages, PromisedModel, PromisedText
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.data.training_file import Training, write_training
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, Resources
from polytrope.pipeline.stages.evaluate.evaluate import evaluate
from polytrope.pipeline.stages.evaluate.parameters import EvaluateParameters
from polytrope.pipeline.stages.export_circuit.circuit_export import _refuse_other_values
from polytrope.pipeline.stages.export_circuit.export_circuit import export_circuit, promise
from polytrope.pipeline.stages.export_circuit.parameters import ExportCircuitParameters

SIZES = {"vocab_size": 320, "sequence_length": SEQUENCE_LENGTH, "n_layer": 2, "n_head": 2, "n_embd": 16}
PARTS: dict[str, Any] = {
    "activation": {"name": "hermite", "degree": 3, "init": "stable"},
    "norm": "batch",
    "attention": "power",
}


SHORT = {"degree": 7, "newton": 1}  # whose error can be seen


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, dataset: Artifact) -> Artifact:
    """Whose norms have seen some of the data."""
    torch.manual_seed(0)
    network = build_model("gpt2", {**SIZES, **PARTS})
    for name, parameter in network.named_parameters():
        if name.endswith(("c_attn.weight", "c_proj.weight")):
            parameter.data *= 2.0  # so that denominators differ, and what attention gives matters
    blocks = torch.from_numpy(open_split(dataset.path, "train").samples(np.arange(40)).astype(np.int64))
    with torch.no_grad():
        for part in blocks.split(8):
            network.train()(part[:, :-1])
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, network, tokenizer=dataset.path)
    return Artifact(directory, "digest of the model", "train")


def run(directory: Path, model: Artifact, dataset: Artifact, **parameters: Any) -> dict[str, float]:
    given = {"calibration_samples": 20, "held_out_samples": 6, **parameters}
    return export_circuit(make_context(directory), model, dataset, ExportCircuitParameters.model_validate(given))


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, model: Artifact, dataset: Artifact
) -> tuple[Path, dict[str, float]]:
    directory = tmp_path_factory.mktemp("exported")
    return directory, run(directory, model, dataset, reciprocal=SHORT)


def test_the_file_computes_what_the_trained_model_does_up_to_the_certified_error(
    exported: tuple[Path, dict[str, float]], model: Artifact, dataset: Artifact
) -> None:
    output = exported[0] / "output"
    blocks = torch.from_numpy(open_split(dataset.path, "validation").samples(np.arange(1)).astype(np.int64))[:, :-1]
    trained, polynomial = load_model(model.path), load_model(output)
    assert isinstance(trained, GPT2)
    with torch.no_grad():
        before, after, embedded = trained(blocks), polynomial(blocks), embed(trained, blocks)
    session = onnxruntime.InferenceSession(str(output / "circuit.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"x": embedded.numpy()})
    scale = float(before.abs().max())
    assert logits == pytest.approx(after.numpy(), abs=2e-6 * scale)
    assert logits == pytest.approx(before.numpy(), abs=10 * exported[1]["reciprocal_error"] * scale)
    assert 1e-5 < exported[1]["reciprocal_error"] < 1e-2
    assert 0.0 < exported[1]["deviation"] < 10 * exported[1]["reciprocal_error"]


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e6])
@pytest.mark.parametrize("offset", [0.0, 40.0])
def test_a_file_is_compared_by_the_spread_of_the_logits(size: float, offset: float) -> None:
    numbers = torch.randn(1, 5, 7, generator=torch.Generator().manual_seed(0))
    logits = (numbers + offset) * size
    spread = float((logits.amax(-1) - logits.amin(-1)).max())
    computed = logits.double().numpy()
    _refuse_other_values(computed + 0.009 * spread, logits)
    with pytest.raises(ValueError, match=re.escape(f"of a position are up to {spread:.3g} apart")):
        _refuse_other_values(computed + 0.011 * spread, logits)


def test_logits_that_are_all_the_same_are_compared_by_their_size() -> None:
    same = torch.full((1, 5, 7), 3.0)
    for logits in (same, 0 * same):
        _refuse_other_values(logits.double().numpy() * (1 + 5e-5), logits)
    for computed, logits in ((same * 1.001, same), (same, 0 * same), (same * float("nan"), same)):
        with pytest.raises(ValueError, match="does not compute what the model does"):
            _refuse_other_values(computed.double().numpy(), logits)


def test_a_file_that_computes_something_else_is_refused(
    tmp_path: Path, model: Artifact, dataset: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold = circuit.fold_into_linear

    def without_bias(norm: Any, linear: Any) -> Any:
        folded = fold(norm, linear)
        torch.nn.init.zeros_(folded.bias)
        return folded

    monkeypatch.setattr(circuit, "fold_into_linear", without_bias)
    with pytest.raises(
        UserError, match=r"export_circuit: circuit\.onnx does not compute what the model does: .* off by"
    ):
        run(tmp_path, model, dataset, reciprocal=SHORT)


def loss_of(network: torch.nn.Module, dataset: Artifact) -> float:
    """On the first 6 validation samples."""
    blocks = torch.from_numpy(open_split(dataset.path, "validation").samples(np.arange(6)).astype(np.int64))
    with torch.no_grad():
        return float(network(blocks[:, :-1], blocks[:, 1:]))


def test_costs_ranges_and_what_lies_outside_are_recorded(
    exported: tuple[Path, dict[str, float]], model: Artifact, dataset: Artifact
) -> None:
    directory, returned = exported
    record = read_circuit(directory / "output")
    assert (record.positions, record.width, record.vocabulary) == (SEQUENCE_LENGTH, 16, 320)
    assert [record.layers[name].depth for name in ("block_0", "block_1", "head")] == [10, 20, 20]
    assert record.cost.products == record.layers["block_0"].products + record.layers["block_1"].products
    assert returned["multiplicative_depth"] == 20
    assert returned["products_per_token"] == record.cost.products / SEQUENCE_LENGTH
    assert len(record.divisions) == len(record.activations) == 2
    for division in record.divisions:
        assert division.domain == pytest.approx((division.measured[0] / 2, division.measured[1] * 2))
        assert division.relative_error == relative_error(7, 1, *division.domain)
        assert division.inputs == 6 * 2 * SEQUENCE_LENGTH  # a row per sample, head and position
        assert division.outside == 0
        assert division.minimum is not None
        assert division.domain[0] < division.minimum
    for activation in record.activations:
        assert activation.minimum < 0 < activation.maximum
    assert returned["rows_outside"] == 0.0
    loss = loss_of(load_model(directory / "output"), dataset)
    assert returned["val_loss"] == record.loss == pytest.approx(loss, rel=1e-5)
    assert returned["val_loss_with_divisions"] == pytest.approx(loss_of(load_model(model.path), dataset), rel=1e-5)
    assert json.loads((directory / "output" / "lineage.json").read_text())["ancestors"][-1]["stage"] == "train"


def test_a_model_with_polynomials_is_exported_as_the_one_it_was_made_of(
    tmp_path: Path, exported: tuple[Path, dict[str, float]], dataset: Artifact
) -> None:
    first = exported[0] / "output"
    run(tmp_path, Artifact(first, "digest", "export_circuit"), dataset, reciprocal=SHORT)
    assert read_circuit(tmp_path / "output") == read_circuit(first)


def test_rows_outside_of_a_narrow_range_are_counted_and_said(
    tmp_path: Path, model: Artifact, dataset: Artifact
) -> None:
    narrow = {"degree": 5, "newton": 0, "margin": 1.0001}
    returned = run(tmp_path, model, dataset, calibration_samples=1, reciprocal=narrow)
    divisions = read_circuit(tmp_path / "output").divisions
    assert returned["rows_outside"] == sum(division.outside for division in divisions) > 0
    (said,) = [event["text"] for event in read_events(tmp_path, "message") if "OUTSIDE" in event["text"]]
    worst = max(divisions, key=lambda division: division.outside)
    assert f"`{worst.name}.polynomial` {worst.outside} of {worst.inputs}" in said
    evaluated = tmp_path / "evaluation"
    artifact = Artifact(tmp_path / "output", "digest", "export_circuit")
    parameters = EvaluateParameters(samples=6, sample_tokens=0, activation_samples=0)
    figures = evaluate(make_context(evaluated), dataset, {"circuit": artifact, "trained": model}, parameters)
    assert figures["circuit/outside_probability"] == max(d.outside / d.inputs for d in divisions)
    assert "trained/outside_probability" not in figures


def test_a_coarse_reciprocal_is_said(tmp_path: Path, model: Artifact, dataset: Artifact) -> None:
    returned = run(tmp_path, model, dataset, reciprocal={"degree": 1, "newton": 0, "margin": 30.0})
    coarse = [event["text"] for event in read_events(tmp_path, "message") if "is off by up to" in event["text"]]
    errors = [division.relative_error for division in read_circuit(tmp_path / "output").divisions]
    assert len(coarse) == sum(error > 0.01 for error in errors) > 0
    assert "raise reciprocal.degree or newton" in coarse[0]
    assert returned["reciprocal_error"] == max(errors)


def test_roots_of_norms_become_polynomials_or_are_refused_with_what_was_measured(
    tmp_path: Path, dataset: Artifact
) -> None:
    torch.manual_seed(0)
    network = build_model("gpt2", {**SIZES, **PARTS, "norm": "rms"})
    save_model(tmp_path / "model", network, tokenizer=dataset.path)
    model = Artifact(tmp_path / "model", "digest of the model", "train")
    returned = run(tmp_path / "run", model, dataset, inverse_root={"degree": 7, "newton": 1})
    output = tmp_path / "run" / "output"
    record = read_circuit(output)
    names = [f"transformer.h.{number}.{part}" for number in range(2) for part in ("ln_1", "ln_2")]
    names = [f"{name}.inverse_root" for name in [*names, "transformer.ln_f"]]
    roots = record.divisions[2:]
    assert [root.name for root in roots] == names
    blocks = torch.from_numpy(open_split(dataset.path, "validation").samples(np.arange(6)).astype(np.int64))
    with torch.no_grad():
        squares = embed(network, blocks[:, :-1]).square().mean(-1) + 1e-5  # type: ignore[arg-type]
    assert (roots[0].minimum, roots[0].maximum) == pytest.approx((float(squares.min()), float(squares.max())), rel=1e-5)
    for root in roots:
        assert root.domain == pytest.approx((root.measured[0] / 1.7, root.measured[1] * 1.7))
        assert root.relative_error == root_error(7, 1, *root.domain) < 0.01
        assert (root.inputs, root.outside) == (6 * SEQUENCE_LENGTH, 0)
    # scores, power, reciprocal of degree 31, product: 8; activation 2; a norm 1 + 3 + 2 + 1
    assert [record.layers[name].depth for name in ("block_0", "block_1", "head")] == [24, 48, 55]
    assert returned["reciprocal_error"] == max(division.relative_error for division in record.divisions)
    assert 0.0 < record.deviation < 20 * returned["reciprocal_error"]
    again = run(tmp_path / "again", Artifact(output, "digest", "export_circuit"), dataset, inverse_root={"newton": 1})
    assert again["reciprocal_error"] < returned["reciprocal_error"]
    with pytest.raises(UserError, match=r"inverse_root\.target_error: 1e-06, but `transformer\.h\.0\.ln_1") as refused:
        run(tmp_path / "refused", model, dataset, inverse_root={"degree": 3, "target_error": 1e-6})
    low, high = roots[0].measured
    assert f"received {low:.3g} … {high:.3g} in the calibration" in refused.value.message
    assert not (tmp_path / "refused" / "output" / "circuit.onnx").exists()


def test_what_has_no_circuit_is_refused_before_anything_starts(tmp_path: Path) -> None:
    parameters, text = ExportCircuitParameters(), PromisedText(sequence_length=32, tokens=257, tokenizer="bytes")

    def asked(settings: dict[str, Any], architecture: str = "gpt2", data: Any = text) -> Any:
        upstream = {"model": PromisedModel(architecture, {**SIZES, **settings}), "dataset": data}
        return promise(parameters, upstream, Resources(), tmp_path)

    found = asked(PARTS)
    assert isinstance(found, PromisedModel)
    assert found.settings["n_embd"] == 16
    exported = {"name": "power", "reciprocal": {"degree": 3, "newton": 0, "domain": [0.5, 2.0]}}
    options = [{"name": "power", "power": 4}, exported]
    assert asked({**PARTS, "attention": options}).settings["attention"] == [options[0], "power"]
    with pytest.raises(UserError, match=r"inputs\.model: the model has attention: softmax") as refused:
        asked({**PARTS, "attention": ["softmax", "power"]})
    assert refused.value.hint == "train it with attention: {name: power, power: 2}"
    with pytest.raises(UserError, match=r"inputs\.model: the model has activation: gelu, which is no polynomial"):
        asked({**PARTS, "activation": [PARTS["activation"], "gelu"]})
    for activation, said in (
        ("fourier", "fourier, which is no polynomial"),
        ({"name": "rational", "degree": 3}, "rational, which is no polynomial"),
        ({"name": "hermite", "interval": [-2.0, 2.0]}, "hermite with an interval, which is no polynomial beyond it"),
        ({"name": "chebyshev", "num_parameters": 64}, "chebyshev with num_parameters, and coefficients per channel"),
    ):
        built = build_model("gpt2", {**SIZES, **PARTS, "activation": activation})
        with pytest.raises(UserError, match=rf"inputs\.model: the model has activation: {said}"):
            asked({**PARTS, "activation": [PARTS["activation"], activation]})
        with pytest.raises(ValueError, match=r"activation: .*(no polynomial|coefficients per channel)"):
            refuse_other_parts(built, divisions=True)
    for usable in ("hermite3", {"name": "rational", "denominator_degree": 0}, {"name": "legendre", "degree": 2}):
        refuse_other_parts(build_model("gpt2", {**SIZES, **PARTS, "activation": usable}), divisions=True)
        assert asked({**PARTS, "activation": usable}) is not None
    root = {"degree": 3, "newton": 0, "domains": [[0.5, 2.0]] * 5}
    assert asked({**PARTS, "norm": {"name": "rms", "root": root}}).settings["norm"] == "rms"
    with pytest.raises(UserError, match=r"inputs\.model: the model has norm: layer_norm"):
        asked({**PARTS, "norm": "layer_norm"})
    with pytest.raises(UserError, match=r"inputs\.model: the model has feedforward: pade, where a quotient is no sum"):
        asked({**PARTS, "feedforward": ["quadratic", {"name": "pade", "numerator_degree": 3}]})
    assert asked({**PARTS, "feedforward": ["mu", {"name": "mu", "norm": "batch"}]}) is not None
    with pytest.raises(UserError, match=r"inputs\.model: the model has feedforward: mu, where layer norm is no sum"):
        asked({**PARTS, "feedforward": {"name": "mu", "norm": "layer_norm"}})
    upstream = {"model": PromisedModel("convnext", {}), "dataset": PromisedImages(32, 3, 10)}
    with pytest.raises(UserError, match=r"inputs\.model: a convnext has no circuit"):
        promise(parameters, upstream, Resources(), tmp_path)


def test_a_data_set_without_held_out_samples_is_refused(tmp_path: Path, model: Artifact, dataset: Artifact) -> None:
    empty = Artifact(tmp_path / "data", "digest", "shard")
    shutil.copytree(dataset.path, empty.path)
    content = json.loads((empty.path / "dataset.json").read_text())
    content["splits"]["validation"]["samples"] = 0
    (empty.path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="the dataset of `shard` has no validation samples"):
        run(tmp_path / "run", model, empty)


def test_models_without_a_circuit_are_refused_by_the_first_part(tmp_path: Path, dataset: Artifact) -> None:
    torch.manual_seed(0)
    save_model(tmp_path / "gelu", build_model("gpt2", {**SIZES, **PARTS, "activation": "gelu"}), tokenizer=dataset.path)
    with pytest.raises(UserError, match=r"export_circuit: transformer\.h\.0\.mlp\.activation: GELU is no polynomial"):
        run(tmp_path / "run", Artifact(tmp_path / "gelu", "digest", "train"), dataset)
    (tmp_path / "failed").mkdir()
    write_training(tmp_path / "failed", Training(architecture="gpt2", parameters=1, steps=2, failure="diverged"), [])
    with pytest.raises(UserError, match=r"inputs\.model: the training of `train` failed: diverged"):
        run(tmp_path / "other", Artifact(tmp_path / "failed", "digest", "train"), dataset)
