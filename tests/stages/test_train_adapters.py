"""Fine-tuning by adapters: only they learn, the result is an ordinary model, a resumed training is the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from training_support import MODEL, PARAMETERS, make_dataset, make_initial, run_training, validation_loss, weights_hash

from polytrope.models import build_model
from polytrope.models.checkpoint import load_model
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact
from polytrope.pipeline.stages.train.optimization import parameter_groups
from polytrope.pipeline.stages.train.parameters import TrainParameters

GPT2: dict[str, Any] = {"vocab_size": 320, "sequence_length": 32, "n_layer": 1, "n_head": 2, "n_embd": 32}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_dataset(tmp_path_factory.mktemp("dataset") / "dataset")


@pytest.fixture(scope="module")
def initial(tmp_path_factory: pytest.TempPathFactory, dataset: Artifact) -> Artifact:
    return make_initial(tmp_path_factory.mktemp("initial") / "model", dataset, {**GPT2, "activation": "hermite3"})


@pytest.mark.parametrize(
    ("changes", "workers"),
    [
        ({"adapters": {"name": "householder", "rank": 4}, "zero_stage": 1, "ema_decay": 0.5}, 2),
        (
            {
                "adapters": {"name": "lora", "rank": 2, "layers": ["transformer.h.*.mlp.*"]},
                "zero_stage": 3,
                "precision": "bf16",
                "trainable": ["adapters", "coefficients"],
                "keep_initial": True,
            },
            1,
        ),
        *(
            pytest.param(
                {"zero_stage": stage, "precision": precision, "adapters": {"name": name, "rank": 2}},
                2,
                marks=pytest.mark.chaos,
            )
            for stage in range(4)
            for precision in ("fp32", "bf16")
            for name in ("householder", "spectral", "lora")
        ),
    ],
    ids=str,
)
def test_a_model_is_fine_tuned_by_adapters_and_written_without_them(
    tmp_path: Path, dataset: Artifact, initial: Artifact, changes: dict[str, Any], workers: int
) -> None:
    usual = {"model": None, "steps": 4, "warmup_steps": 0, "checkpoint_every": 2, "validation_every": 2}
    settings = {**usual, "learning_rate": 1e-2, **changes}
    run_training(tmp_path, dataset, workers=workers, initial=initial, **settings)
    before, after = (load_file(path / "model.safetensors") for path in (initial.path, tmp_path / "output"))
    assert {name: tensor.shape for name, tensor in after.items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    layers = ["mlp.c_fc", "mlp.c_proj"]
    if "layers" not in changes["adapters"]:
        layers += ["attn.c_attn", "attn.c_proj"]
    expected = {f"transformer.h.0.{layer}.weight" for layer in layers}
    if "coefficients" in changes.get("trainable", []):
        expected.add("transformer.h.0.mlp.activation.coefficients")
    assert changed == expected
    if changes["adapters"]["name"] == "householder":
        for name in expected:  # reflections keep the rows' products
            torch.testing.assert_close(after[name] @ after[name].T, before[name] @ before[name].T, rtol=1e-4, atol=1e-5)
    summary = json.loads((tmp_path / "output/training.json").read_text())
    assert summary["parameters"] == sum(tensor.numel() for tensor in before.values())
    if "layers" not in changes["adapters"] and changes["adapters"]["name"] == "householder":
        rank = changes["adapters"]["rank"]
        assert summary["trainable_parameters"] == rank * (3 * 32 + 128)
    rounding = 2e-2 if changes.get("precision") == "bf16" else 1e-4
    assert summary["val/loss"] == pytest.approx(
        validation_loss(tmp_path, dataset, 7), rel=rounding
    )  # of the merged model
    if "keep_initial" in changes:
        kept = load_model(tmp_path / "output" / "initial").state_dict()
        assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())
    whole = weights_hash(tmp_path)
    shutil.rmtree(tmp_path / "output")
    run_training(tmp_path, dataset, workers=workers, initial=initial, **settings)
    assert weights_hash(tmp_path) == whole


def test_adapters_learn_without_decay() -> None:
    from polytrope.models.adapters import AdapterSettings, adapter_parameters, add_adapters
    from polytrope.pipeline.stages.train.trainable import freeze

    model = build_model("gpt2", GPT2)
    add_adapters(model, AdapterSettings("lora", 2))
    freeze(model, "gpt2", ["adapters"])
    parameters = TrainParameters.model_validate(
        {"steps": 1, "learning_rate": 1e-3, "adapters": {"name": "lora", "rank": 2}}
    )
    (group,) = parameter_groups(model, parameters)
    assert (group["name"], group["peak"], group["weight_decay"]) == ("adapters", 1e-3, 0.0)
    assert len(group["params"]) == len(adapter_parameters(model)) == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapters": {"name": "lora", "rank": 2}}, "adapters: they fine-tune an `initial` input"),
        ({"model": None, "adapters": {"name": "householder", "rank": 3}}, "rank: householder vectors come in pairs"),
        ({"model": None, "adapters": {"name": "lora", "rank": 2, "relaxed": True}}, "relaxed: only householder has it"),
        ({"model": None, "adapters": {"name": "lora"}}, "rank"),
        ({"model": None, "adapters": {"name": "dora", "rank": 2}}, "householder"),
        (
            {"model": None, "adapters": {"name": "lora", "rank": 2}, "trainable": ["norms"]},
            "trainable: with adapters name adapters too",
        ),
        ({"model": None, "trainable": ["adapters"]}, "trainable: adapters: there are none"),
        ({"model": None, "adapters": {"name": "lora", "rank": 2}, "peak_flops": 1e12}, "peak_flops: MFU counts"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainParameters.model_validate({**PARAMETERS, "model": MODEL, **changes})


def test_a_rank_beyond_a_layer_is_refused_by_its_name(tmp_path: Path, dataset: Artifact, initial: Artifact) -> None:
    with pytest.raises(UserError, match=r"adapters\.rank: expected at most 32, .*`transformer\.h\.0\.attn\.c_attn`"):
        run_training(
            tmp_path,
            dataset,
            initial=initial,
            model=None,
            steps=1,
            warmup_steps=0,
            adapters={"name": "lora", "rank": 33},
        )
