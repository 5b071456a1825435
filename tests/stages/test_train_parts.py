"""Training of models with parts: statistics of the whole batch, exact resume, penalties, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_support import (
    MODEL,
    PARAMETERS,
    history,
    make_context,
    make_dataset,
    read_events,
    run_training,
    validation_loss,
    weights_hash,
)

from polytrope.models import build_model
from polytrope.models.checkpoint import save_model
from polytrope.pipeline.data.promised import PromisedModel, PromisedText
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, Resources
from polytrope.pipeline.stages.train.parameters import TrainParameters
from polytrope.pipeline.stages.train.train import promise
from polytrope.pipeline.stages.train.training_plan import make_plan

PARTS: dict[str, Any] = {
    **MODEL,
    "n_layer": 3,
    "attention": ["power", "polynomial_mixer", "power"],
    "norm": "batch",
    "feedforward": ["quadratic", "gated", {"name": "mu", "norm": "batch"}],
}
STATISTICS = ("running_mean", "running_variance")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_dataset(tmp_path_factory.mktemp("dataset") / "dataset")


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "output" / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "resumed_on"),
    [
        ({"ema_decay": 0.5}, [2, 1]),
        *(
            pytest.param({"zero_stage": stage, "precision": precision}, [2, 1], marks=pytest.mark.chaos)
            for stage in range(4)
            for precision in ("fp32", "bf16")
        ),
    ],
    ids=str,
)
def test_statistics_are_those_of_the_global_batch_and_come_back_to_the_last_bit(
    tmp_path: Path, dataset: Artifact, changes: dict[str, Any], resumed_on: list[int]
) -> None:
    settings = {
        "model": PARTS,
        "steps": 4,
        "warmup_steps": 0,
        "checkpoint_every": 2,
        "validation_every": 4,
        "log_every": 1,
        "learning_rate": 1e-6,  # biases before a batch norm have no gradient but rounding, and AdamW moves by its sign
        "range_penalty": {"activation": 1.0, "beyond": 0.5, "denominator": 0.1},
        **changes,
    }
    run_training(tmp_path, dataset, workers=2, **settings)
    after, logged, whole = weights(tmp_path), history(tmp_path), weights_hash(tmp_path)
    found = [name for name in after if name.endswith(STATISTICS)]
    assert len(found) == 2 * (3 * 2 + 1 + 2)  # of the blocks, before the head, and inside of mu
    assert all(bool((after[name] != (0.0 if name.endswith("mean") else 1.0)).any()) for name in found)
    # What is validated is what is written, and has no penalties.
    last = json.loads((tmp_path / "output" / "training.json").read_text())
    if "precision" not in changes:
        assert last["val/loss"] == pytest.approx(validation_loss(tmp_path, dataset, 7), rel=1e-5)
    assert last["train/loss"] > last["val/loss"] + 0.1
    rounding = 1e-2 if changes.get("precision") == "bf16" else 1e-4
    for workers in resumed_on:
        shutil.rmtree(tmp_path / "output")
        run_training(tmp_path, dataset, workers=workers, **settings)
        assert any("checkpoint of step 2" in str(event.get("text")) for event in read_events(tmp_path, "message"))
        again = weights(tmp_path)
        for name in found:
            torch.testing.assert_close(again[name], after[name], rtol=rounding, atol=rounding)
        for name in ("train/loss", "gradient_norm"):
            both = [[entry[name] for entry in entries if name in entry] for entries in (history(tmp_path), logged)]
            assert both[0] == pytest.approx(both[1], rel=rounding)
            assert len(both[0]) == 4
        assert workers == 1 or weights_hash(tmp_path) == whole


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"micro_batch_size": 2}, "micro_batch_size: 2 splits the batch of a worker into 2, and norm: batch takes"),
        (
            {"activation_checkpointing": "block"},
            "activation_checkpointing: block would compute the statistics of norm: batch twice",
        ),
        (
            {"global_batch_size": 1, "micro_batch_size": None},
            "global_batch_size: 1 sample has no statistics for norm: batch",
        ),
    ],
)
def test_what_would_split_a_batch_is_refused_in_fine_tuning_too(changes: dict[str, Any], words: str) -> None:
    data = PromisedText(sequence_length=32, tokens=257, tokenizer="bytes")
    resources = Resources(workers=1 if "global_batch_size" in changes else 2)
    initial = PromisedModel("gpt2", {**PARTS, "vocab_size": 320, "sequence_length": 32})
    inside = {**MODEL, "feedforward": {"name": "mu", "norm": "batch"}, "activation": None}
    for model, upstream, of in (
        (PARTS, {"dataset": data}, "norm: batch"),
        (None, {"dataset": data, "initial": initial}, "norm: batch"),
        (inside, {"dataset": data}, r"feedforward: {'name': 'mu', 'norm': 'batch'}"),
    ):
        given = TrainParameters.model_validate({**PARAMETERS, "model": model, **changes})
        with pytest.raises(UserError, match=words.replace("norm: batch", of)) as refused:
            promise(given, upstream, resources, Path())
        if "activation_checkpointing" in changes:  # what it advises is possible
            usable = "leave it out" if model is inside else "use activation_checkpointing: mlp"
            assert refused.value.hint == usable
    usual = TrainParameters.model_validate({**PARAMETERS, "model": MODEL, **changes})
    assert promise(usual, {"dataset": data}, resources, Path()) is not None


@pytest.mark.parametrize(
    ("changes", "words", "heeded"),
    [
        ({"multiplicative_learning_rate": 1e-4}, "multiplicative_learning_rate: only for a model with", "quadratic"),
        ({"trainable": ["multiplicative"]}, "trainable: multiplicative: only a model with", "quadratic"),
        (
            {"range_penalty": {"activation": 0}},
            "range_penalty: activation is 0, and only attention: power and",
            "power",
        ),
        (
            {"range_penalty": {"denominator": 0.1}},
            "range_penalty.denominator: only attention: power and norm: rms have",
            "power",
        ),
    ],
)
def test_what_the_initial_model_would_not_heed_is_refused(
    tmp_path: Path, dataset: Artifact, changes: dict[str, Any], words: str, heeded: str
) -> None:
    known = {"sequence_length": 32, "vocab_size": 320}
    upstream = {"dataset": PromisedText(sequence_length=32, tokens=257, tokenizer="bytes")}
    given = TrainParameters.model_validate({**PARAMETERS, "model": None, **changes})
    with pytest.raises(UserError, match=words):
        promise(given, upstream | {"initial": PromisedModel("gpt2", {**MODEL, **known})}, Resources(), Path())
    # what only its files tell is refused when they are there
    save_model(tmp_path / "model", build_model("gpt2", {**MODEL, **known}), tokenizer=dataset.path)
    with pytest.raises(UserError, match=words):
        make_plan(make_context(tmp_path), dataset, Artifact(tmp_path / "model", "digest", "train"), given)
    parts = {"quadratic": {"feedforward": "quadratic"}, "power": {"attention": "power"}}[heeded]
    initial = PromisedModel("gpt2", {**MODEL, **known, **parts})
    assert promise(given, upstream | {"initial": initial}, Resources(), Path()) is not None
