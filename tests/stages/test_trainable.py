"""`trainable`: what learns is what was named; the rest stays bit for bit, costs nothing, is in the written model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn
from training_support import (
    MODEL,
    PARAMETERS,
    SEQUENCE_LENGTH,
    make_dataset,
    make_initial,
    read_events,
    run_training,
    weights_hash,
)

from polytrope.models import build_model
from polytrope.models.linearized import LinearizedModel
from polytrope.models.parts.norm import ChannelsFirstLayerNorm
from polytrope.ops import is_learnable_activation
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact
from polytrope.pipeline.stages.convert.distillation import distill
from polytrope.pipeline.stages.train.loop import sizes_of
from polytrope.pipeline.stages.train.optimization import parameter_groups
from polytrope.pipeline.stages.train.parameters import TrainParameters
from polytrope.pipeline.stages.train.trainable import GROUPS, freeze, learns_of

GPT2 = {**MODEL, "n_layer": 2, "vocab_size": 320, "sequence_length": SEQUENCE_LENGTH}
CONVNEXT = {"depths": [1, 1, 2], "dims": [4, 8, 8], "num_classes": 3, "in_channels": 1, "patch_size": 2}
SIZES: dict[str, dict[str, Any]] = {"gpt2": GPT2, "convnext": {**CONVNEXT, "activation": "hermite3"}}
COEFFICIENTS = [f"transformer.h.{layer}.mlp.activation.coefficients" for layer in range(2)]
ATTENTION = [f"transformer.h.1.attn.{name}.{kind}" for name in ("c_attn", "c_proj") for kind in ("bias", "weight")]


def learning(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_certified_polynomial_never_learns_whatever_is_named() -> None:
    reciprocal = {"degree": 3, "newton": 0, "domain": [0.5, 2.0]}
    model = build_model("gpt2", {**GPT2, "attention": {"name": "power", "reciprocal": reciprocal}})
    numbers = {name for name, _ in model.named_parameters() if ".reciprocal." in name}
    assert numbers
    assert not numbers & learning(model)
    freeze(model, "gpt2", ["coefficients"])
    assert learning(model) == set(COEFFICIENTS)
    with pytest.raises(UserError, match=r"`\*\.reciprocal\.\*` names no parameter"):
        freeze(model, "gpt2", ["*.reciprocal.*"])
    model.requires_grad_(True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    distill(build_model("gpt2", GPT2), model, [{"tokens": torch.arange(8).view(2, 4)}], steps=1)
    after = dict(model.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(COEFFICIENTS)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_dataset(tmp_path_factory.mktemp("dataset") / "dataset")


@pytest.fixture(scope="module")
def initial(tmp_path_factory: pytest.TempPathFactory, dataset: Artifact) -> Artifact:
    return make_initial(tmp_path_factory.mktemp("initial") / "model", dataset, GPT2)


@pytest.mark.parametrize("architecture", ["gpt2", "convnext"])
def test_a_group_is_all_parameters_of_its_kind_in_every_model(architecture: str) -> None:
    model = build_model(architecture, {**SIZES[architecture], "feedforward": "quadratic"})
    kinds: dict[str, Any] = {
        "coefficients": is_learnable_activation,
        "norms": lambda module: isinstance(module, nn.LayerNorm | ChannelsFirstLayerNorm),
        "head": lambda module: module is getattr(model, "lm_head", getattr(model, "head", None)),
    }
    assert {*kinds, "multiplicative", "adapters"} == set(GROUPS)
    for group, belongs in kinds.items():
        freeze(model, architecture, [group])
        meant = {id(weight) for module in model.modules() if belongs(module) for weight in module.parameters()}
        assert {id(weight) for weight in model.parameters() if weight.requires_grad} == meant, group
        assert meant, group
    freeze(model, architecture, ["multiplicative"])
    assert {name.rpartition(".")[2] for name in learning(model)} == {"gate_weight", "gate_bias", "square_weight"}


def test_patterns_name_parameters_and_a_tied_head_learns_with_the_embedding() -> None:
    model = build_model("gpt2", GPT2)
    freeze(model, "gpt2", ["coefficients", "transformer.h.1.attn.*"])
    assert learning(model) == {*COEFFICIENTS, *ATTENTION}
    freeze(model, "gpt2", ["head"])
    assert learning(model) == {"transformer.wte.weight"}
    number = sum(weight.numel() for weight in model.parameters())
    assert sizes_of(model) == {"parameters": number, "trainable_parameters": 320 * 32}
    freeze(model, "gpt2", ["*"])
    assert learning(model) == {name for name, _ in model.named_parameters()}
    assert sizes_of(model) == {"parameters": number}, "as where `trainable` is left out"


def test_what_does_not_learn_has_no_gradient_and_no_optimizer_state() -> None:
    model = build_model("gpt2", GPT2)
    freeze(model, "gpt2", ["coefficients"])
    groups = parameter_groups(model, TrainParameters(steps=1, learning_rate=1e-3))
    assert [group["name"] for group in groups] == ["coefficients_x0.1"]
    optimizer = torch.optim.AdamW(groups)
    tokens = torch.arange(16).view(2, 8)
    model(tokens, tokens).backward()
    optimizer.step()
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == set(COEFFICIENTS)
    assert {tuple(weight.shape) for weight in optimizer.state} == {(4,)}
    assert len(optimizer.state) == 2


@pytest.mark.parametrize(
    ("changes", "trained", "resumed_on"),
    [
        ({"zero_stage": 1, "trainable": ["coefficients"], "ema_decay": 0.5}, COEFFICIENTS, [2]),
        (
            {
                "zero_stage": 3,
                "precision": "bf16",
                "trainable": ["transformer.h.1.attn.*"],
                "coefficient_learning_rate": 0.5,
            },
            ATTENTION,
            [1],
        ),
        *(
            pytest.param(
                {"zero_stage": stage, "precision": precision, "trainable": [entry]},
                trained,
                [2, 1],
                marks=pytest.mark.chaos,
            )
            for stage in range(4)
            for precision in ("fp32", "bf16")
            for entry, trained in (("coefficients", COEFFICIENTS), ("transformer.h.1.attn.*", ATTENTION))
        ),
    ],
    ids=str,
)
def test_the_rest_stays_bit_for_bit_sharded_rounded_and_resumed(
    tmp_path: Path,
    dataset: Artifact,
    initial: Artifact,
    changes: dict[str, Any],
    trained: list[str],
    resumed_on: list[int],
) -> None:
    settings = {"model": None, "steps": 4, "warmup_steps": 0, "checkpoint_every": 2, "validation_every": 2, **changes}
    run_training(tmp_path, dataset, initial=initial, **settings)
    before, after = (load_file(path / "model.safetensors") for path in (initial.path, tmp_path / "output"))
    assert after.keys() == before.keys()
    assert {name for name in after if not torch.equal(after[name], before[name])} == set(trained)
    summary = json.loads((tmp_path / "output/training.json").read_text())
    assert summary["trainable_parameters"] == sum(before[name].numel() for name in trained)
    assert summary["parameters"] == sum(tensor.numel() for tensor in before.values())
    facts = [event["values"] for event in read_events(tmp_path, "params")]
    assert [entry["trainable_parameters"] for entry in facts if "trainable_parameters" in entry] == [
        str(summary["trainable_parameters"])
    ]
    said = [event["text"] for event in read_events(tmp_path, "message")]
    idle = "coefficient_learning_rate (0.5) has no effect: none of the coefficients parameters learns"
    assert said.count(idle) == ("coefficient_learning_rate" in changes), said
    if "ema_decay" in changes:
        state = torch.load(tmp_path / "scratch/checkpoints/step-00000002/average.pt")
        assert state.keys() == {"updates", *(f"average.{name}" for name in trained)}
    whole = weights_hash(tmp_path)
    for workers in resumed_on:
        shutil.rmtree(tmp_path / "output")
        run_training(tmp_path, dataset, workers=workers, initial=initial, **settings)
        assert any("checkpoint of step 2" in str(event.get("text")) for event in read_events(tmp_path, "message"))
        again = load_file(tmp_path / "output/model.safetensors")
        assert {name for name in again if not torch.equal(again[name], before[name])} == set(trained)
        for name in trained:
            torch.testing.assert_close(again[name], after[name], rtol=1e-2, atol=1e-3)
        assert workers == 1 or weights_hash(tmp_path) == whole


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainable": []}, "at least 1 item"),
        (
            {"trainable": ["coefs"]},
            r"expected a group \(adapters, coefficients, multiplicative, head, norms\) or a pattern.*coefs",
        ),
        ({"trainable": ["coefficients"], "model": {**MODEL, "activation": "gelu"}}, "coefficients: gelu has none"),
        (
            {"trainable": ["coefficients"], "coefficient_learning_rate": 0},
            "nothing learns: coefficient_learning_rate is 0",
        ),
        (
            {
                "trainable": ["head"],
                "range_penalty": {},
                "model": {"architecture": "convnext", "depths": [1], "dims": [4]},
            },
            "range_penalty: trainable is .*, which comes after all activations",
        ),
        ({"trainable": ["norms"], "peak_flops": 1e12}, "peak_flops: MFU counts the gradients of all weights"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainParameters.model_validate({**PARAMETERS, **changes})


@pytest.mark.parametrize(
    ("entry", "hint"),
    [
        ("transformer.h.7.*", "did you mean `transformer.h."),
        ("transformer.wte.weigth", "did you mean `transformer.wte.weight`"),
    ],
)
def test_a_pattern_that_names_nothing_is_refused_with_names_that_are_there(entry: str, hint: str) -> None:
    with pytest.raises(UserError, match=r"trainable: `transformer\..*` names no parameter of this gpt2") as caught:
        freeze(build_model("gpt2", GPT2), "gpt2", ["norms", entry])
    assert hint in caught.value.hint


def test_a_tangent_of_a_coefficient_counts_as_learning() -> None:
    for entry, learns in (("coefficients", True), ("transformer.h.1.attn.*", False)):
        model = build_model("gpt2", GPT2)
        freeze(model, "gpt2", [entry])
        assert [learns_of("coefficients", found, "gpt2") for found in (model, LinearizedModel(model))] == [learns] * 2


def test_a_model_without_coefficients_is_refused() -> None:
    model = build_model("gpt2", {**GPT2, "activation": "gelu"})
    with pytest.raises(UserError, match="trainable: `coefficients` names no parameter of this gpt2"):
        freeze(model, "gpt2", ["coefficients", "norms"])
