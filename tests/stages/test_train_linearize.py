"""Training a tangent model: it goes on from the initial model, is read by what knows tangents, refused by the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file
from training_support import MODEL, PARAMETERS, history, make_dataset, make_initial, read_events, run_training

from polytrope.models import build_model
from polytrope.models.checkpoint import load_model, read_description, save_model
from polytrope.models.convert import convert
from polytrope.models.formats import read_model, write_model
from polytrope.models.linearized import LinearizedModel, average_linearized
from polytrope.pipeline.commands.cli import main
from polytrope.pipeline.data.described import read_model_promise
from polytrope.pipeline.data.evaluation_file import read_evaluation
from polytrope.pipeline.data.order import sample_indices
from polytrope.pipeline.data.promised import PromisedModel, PromisedTangent, PromisedText
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, Resources, stage_context
from polytrope.pipeline.stages.evaluate.evaluate import evaluate
from polytrope.pipeline.stages.evaluate.evaluate import promise as promise_evaluation
from polytrope.pipeline.stages.evaluate.parameters import EvaluateParameters
from polytrope.pipeline.stages.train.optimization import parameter_groups
from polytrope.pipeline.stages.train.parameters import TrainParameters
from polytrope.pipeline.stages.train.train import check, fingerprint
from polytrope.pipeline.stages.train.train import promise as promise_training

GPT2: dict[str, Any] = {
    "vocab_size": 320,
    "sequence_length": 32,
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 32,
    "activation": "hermite3",
}
USUAL: dict[str, Any] = {
    "model": None,
    "linearize": True,
    "steps": 4,
    "warmup_steps": 0,
    "checkpoint_every": 2,
    "validation_every": 2,
    "learning_rate": 1e-2,
    "log_every": 1,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_dataset(tmp_path_factory.mktemp("dataset") / "dataset")


@pytest.fixture(scope="module")
def initial(tmp_path_factory: pytest.TempPathFactory, dataset: Artifact) -> Artifact:
    return make_initial(tmp_path_factory.mktemp("initial") / "model", dataset, GPT2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, dataset: Artifact, initial: Artifact) -> Artifact:
    directory = tmp_path_factory.mktemp("trained")
    run_training(directory, dataset, workers=1, initial=initial, **USUAL)
    return Artifact(directory / "output", "digest", "train")


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.*"))}


def check_result(directory: Path, initial: Artifact, names: set[str]) -> dict[str, Any]:
    """That it holds the initial weights and what was learned; returns `training.json`."""
    assert (directory / "model.safetensors").read_bytes() == (initial.path / "model.safetensors").read_bytes()
    learned, frozen = (load_file(directory / name) for name in ("tangent.safetensors", "model.safetensors"))
    assert set(learned) == names
    assert all(bool(tensor.any()) and tensor.dtype == torch.float32 for tensor in learned.values())
    summary: dict[str, Any] = json.loads((directory / "training.json").read_text())
    number = sum(tensor.numel() for tensor in learned.values())
    assert summary["parameters"] == sum(tensor.numel() for tensor in frozen.values()) + number
    assert summary["trainable_parameters"] == number
    return summary


def test_a_tangent_learns_from_the_initial_model_on(dataset: Artifact, initial: Artifact, trained: Artifact) -> None:
    summary = check_result(trained.path, initial, set(load_file(initial.path / "model.safetensors")))
    directory = trained.path.parent
    assert summary["val/loss"] == pytest.approx(loss_of(trained.path, dataset, 7), rel=1e-6)
    losses = [entry["train/loss"] for entry in history(directory) if "train/loss" in entry]
    assert len(losses) == USUAL["steps"]
    reader = open_split(dataset.path, "train")
    first = reader.samples(np.asarray(sample_indices(0, 0, PARAMETERS["global_batch_size"], len(reader))))
    tokens = torch.from_numpy(first.astype(np.int64))
    with torch.no_grad():
        start = float(load_model(initial.path)(tokens[:, :-1], tokens[:, 1:]))
    assert losses[0] == pytest.approx(start, rel=1e-6)
    assert losses[-1] < start - 0.1
    whole = bytes_of(trained.path)
    shutil.rmtree(trained.path)
    run_training(directory, dataset, workers=1, initial=initial, **USUAL)  # from the checkpoint of step 2
    assert any("checkpoint of step 2" in str(event) for event in read_events(directory, "message"))
    assert bytes_of(trained.path) == whole


@pytest.mark.parametrize(
    ("changes", "workers"),
    [
        ({"zero_stage": 2, "precision": "bf16", "ema_decay": 0.5, "result": "best", "trainable": ["coefficients"]}, 1),
        *(
            pytest.param({"zero_stage": stage, "precision": precision}, 2, marks=pytest.mark.chaos)
            for stage in range(3)
            for precision in ("fp32", "bf16")
        ),
    ],
    ids=str,
)
def test_it_learns_in_shards_and_short_numbers(
    tmp_path: Path, dataset: Artifact, initial: Artifact, changes: dict[str, Any], workers: int
) -> None:
    run_training(tmp_path, dataset, workers=workers, initial=initial, **{**USUAL, **changes})
    every = set(load_file(initial.path / "model.safetensors"))
    names = {name for name in every if "coefficients" in name} if "trainable" in changes else every
    summary = check_result(tmp_path / "output", initial, names)
    rounding = 2e-2 if changes["precision"] == "bf16" else 1e-6
    assert summary["val/loss"] == pytest.approx(loss_of(tmp_path / "output", dataset, 7), rel=rounding)


def loss_of(directory: Path, dataset: Artifact, samples: int) -> float:
    blocks = torch.from_numpy(open_split(dataset.path, "validation").samples(np.arange(samples)).astype(np.int64))
    with torch.no_grad():
        return float(load_model(directory)(blocks[:, :-1], blocks[:, 1:]))


def test_it_is_evaluated_as_the_trainer_does(
    tmp_path: Path, dataset: Artifact, initial: Artifact, trained: Artifact
) -> None:
    context = stage_context(tmp_path, stage="evaluate", resources=Resources())
    parameters = EvaluateParameters(samples=7, sample_tokens=40, drift={"tangent": "initial", "initial": "tangent"})
    evaluate(context, dataset, {"tangent": trained, "initial": initial}, parameters)
    found = read_evaluation(tmp_path / "output").models
    summary = json.loads((trained.path / "training.json").read_text())
    assert found["tangent"].failure is None
    assert found["tangent"].loss == pytest.approx(summary["val/loss"], rel=1e-6)
    assert found["tangent"].parameters == summary["parameters"]
    assert found["tangent"].layers is None
    assert found["initial"].layers is not None
    for one in found.values():
        assert one.drift is not None
        assert one.drift.kl_divergence > 0.0
        assert one.drift.cosine is None
    assert found["tangent"].sample


def test_artifacts_are_averaged(tmp_path: Path, dataset: Artifact, trained: Artifact) -> None:
    first: Any = load_model(trained.path)
    assert isinstance(first, LinearizedModel)
    second: Any = load_model(trained.path)
    with torch.no_grad():
        for number, tangent in enumerate(second.tangents):
            tangent.copy_(0.1 * torch.randn(tangent.shape, generator=torch.Generator().manual_seed(number)))
    save_model(tmp_path / "second", second, tokenizer=trained.path)
    models = [load_model(path) for path in (trained.path, tmp_path / "second")]
    save_model(tmp_path / "merged", average_linearized(models), tokenizer=trained.path)  # type: ignore[arg-type]
    merged = load_model(tmp_path / "merged")
    tokens = torch.arange(64).reshape(2, 32) * 5 % 257
    outputs = [model(tokens) for model in models]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2
    torch.testing.assert_close(merged(tokens), (outputs[0] + outputs[1]) / 2, rtol=0, atol=1e-5)
    before = [loss_of(path, dataset, 7) for path in (trained.path, tmp_path / "second")]
    assert loss_of(tmp_path / "merged", dataset, 7) <= sum(before) / 2 * (1 + 1e-6)


def test_what_knows_no_tangents_refuses_them(tmp_path: Path, trained: Artifact) -> None:
    description = json.loads((trained.path / "model.json").read_text())
    assert description["format"] == 2  # which earlier versions refuse: they read 1
    with pytest.raises(ValueError, match=r"model\.json: a tangent model"):
        read_description(trained.path)
    with pytest.raises(ValueError, match=r"model\.json: a tangent model"):
        read_model(trained.path)
    with pytest.raises(ValueError, match=r"model\.json: a tangent model"):
        read_model_promise(trained.path)
    model = load_model(trained.path)
    with pytest.raises(ValueError, match=r"a tangent model, .*: transformers has none"):
        write_model(tmp_path / "exported", model, format="huggingface")
    with pytest.raises(ValueError, match=r"a tangent model, .*: convert the model"):
        convert(model, [torch.zeros(1, 4, dtype=torch.long)], family="hermite")
    states = trained.path.parent / "scratch/checkpoints"
    (folder,) = states.glob("step-*2/state")
    with pytest.raises(ValueError, match="unexpected tangents"):
        read_model(folder, {"n_head": 2, "activation": "hermite3"})


def test_stages_take_its_promise_or_refuse_it(tmp_path: Path) -> None:
    model = PromisedModel("gpt2", {"vocab_size": 320, "sequence_length": 32})
    data = PromisedText(32, 257, "bytes")
    given = TrainParameters.model_validate({**PARAMETERS, **USUAL})
    made = promise_training(given, {"dataset": data, "initial": model}, Resources(), tmp_path)
    assert isinstance(made, PromisedTangent)
    assert made.of.architecture == "gpt2"
    assert made.of.figures
    models = {"dataset": data, "models": {"one": made}}
    assert promise_evaluation(EvaluateParameters(), models, Resources(), tmp_path).labels == ("one",)
    longer = models | {"dataset": PromisedText(64, 257, "bytes")}
    with pytest.raises(UserError, match=r"inputs\.models\.one: the dataset"):
        promise_evaluation(EvaluateParameters(), longer, Resources(), tmp_path)


@pytest.mark.parametrize(
    ("stage", "field"),
    [
        ("train", "inputs.initial"),
        ("convert", "inputs.model"),
        ("analyze", "inputs.models.tangent"),
        ("select", "inputs.models.tangent"),
        ("export_circuit", "inputs.model"),
    ],
)
def test_other_stages_refuse_it_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, field: str
) -> None:
    inputs, options = REFUSED_BY[stage]
    other = {"uses": stage, "inputs": inputs, "with": options}
    workflow = {**WORKFLOW, "stages": WORKFLOW["stages"] | {"other": other}}
    path = tmp_path / "workflow.yaml"
    path.write_text(yaml.safe_dump(workflow))
    assert main(["validate", str(path)]) != 0
    written = " ".join(capsys.readouterr().err.split())
    said = f"stages.other.{field}: `tangent`: this input takes a model, and the stage makes a tangent model"
    assert said in written


WORKFLOW: dict[str, Any] = {
    "name": "tangents",
    "stages": {
        "rows": {"uses": "shard_numbers", "with": {"source": {"kind": "modular", "modulus": 7}}},
        "first": {
            "uses": "train",
            "inputs": {"dataset": "rows"},
            "with": {"model": {"architecture": "mlp", "widths": [8]}, "steps": 1},
        },
        "tangent": {
            "uses": "train",
            "inputs": {"dataset": "rows", "initial": "first"},
            "with": {"linearize": True, "steps": 1},
        },
    },
}
REFUSED_BY: dict[str, Any] = {
    "train": ({"dataset": "rows", "initial": "tangent"}, {"steps": 1}),
    "convert": ({"dataset": "rows", "model": "tangent"}, {"family": "hermite"}),
    "analyze": ({"dataset": "rows", "models": {"tangent": "tangent"}}, {"analyses": ["signal"]}),
    "select": ({"models": {"tangent": "tangent"}}, {"metric": "val/loss", "mode": "min"}),
    "export_circuit": ({"model": "tangent", "dataset": "rows"}, {}),
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": MODEL}, "model: not with `linearize`: a tangent is one of an `initial` input"),
        ({"adapters": {"name": "lora", "rank": 2}}, "adapters: not with `linearize`"),
        ({"trainable": ["adapters"]}, "trainable: adapters: there are none"),
        ({"range_penalty": {"activation": 1.0}}, "range_penalty: not with `linearize`"),
        ({"keep_initial": True}, "keep_initial: not with `linearize`"),
        ({"compile": True}, "compile: not with `linearize`"),
        ({"activation_checkpointing": "block"}, "activation_checkpointing: not with `linearize`"),
        ({"statistics_every": 2}, "statistics_every: not with `linearize`"),
        ({"peak_flops": 1e12}, "peak_flops: not with `linearize`"),
        ({"distillation": {"outputs": 1.0}}, "distillation: not with `linearize`"),
        ({"activation_basis": "measured"}, "activation_basis: not with `linearize`"),
        ({"precision": "fp16"}, "precision: fp16 loses small derivatives"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainParameters.model_validate({**PARAMETERS, **USUAL, **changes})


def test_whole_weights_and_an_initial_model_are_needed(tmp_path: Path) -> None:
    given = TrainParameters.model_validate({**PARAMETERS, **USUAL})
    with pytest.raises(UserError, match="model: missing, and there is no `initial` input"):
        check(given, {"initial": None})
    for changes in ({"zero_stage": 3}, {"deepspeed": "zero-3"}):
        given = TrainParameters.model_validate({**PARAMETERS, **USUAL, **changes})
        with pytest.raises(UserError, match="linearize: needs whole weights on each worker"):
            fingerprint(given, tmp_path)


def test_tangents_learn_at_the_rates_of_their_weights() -> None:
    torch.manual_seed(0)
    model = build_model("gpt2", {**GPT2, "feedforward": "gated"})
    given = TrainParameters.model_validate({**PARAMETERS, **USUAL})
    plain, of_tangents = (
        {group["name"]: group for group in parameter_groups(one, given)} for one in (model, LinearizedModel(model))
    )
    assert {"matrices", "vectors", "multiplicative"} & set(plain) >= {"matrices", "vectors"}
    assert any("coefficients" in name for name in plain)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tangent = LinearizedModel(model)
    groups = {group["name"]: group for group in parameter_groups(tangent, given)}
    whose = {id(v): name for name, _, v in tangent.pairs()}
    assert set(groups) == set(plain) == set(of_tangents)
    for name, group in plain.items():
        for setting in ("peak", "weight_decay"):
            assert groups[name][setting] == group[setting]
        assert {whose[id(v)] for v in groups[name]["params"]} == {names[id(w)] for w in group["params"]}
