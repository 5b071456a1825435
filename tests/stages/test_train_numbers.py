"""Training on rows of numbers: how the first layer starts, and that it goes on to the last bit on sharded weights."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from training_support import read_events, run_training, weights_hash

from polytrope.models import build_model
from polytrope.models.checkpoint import load_model
from polytrope.pipeline.data.promised import PromisedNumbers
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, Resources, stage_context
from polytrope.pipeline.stages.shard.parameters import ShardNumbersParameters
from polytrope.pipeline.stages.shard.shard_numbers import shard_numbers
from polytrope.pipeline.stages.train.numbers_start import start_for_rows
from polytrope.pipeline.stages.train.parameters import TrainParameters
from polytrope.pipeline.stages.train.train import promise
from polytrope.pipeline.stages.train.trainable import freeze

SOURCES: dict[str, dict[str, Any]] = {
    "modular": {"kind": "modular", "modulus": 31},
    "circle": {"kind": "circle", "rows": 300, "amplitudes": [1.0, 0.0, 0.5]},
    "hierarchical": {"kind": "hierarchical", "rows": 600, "dimension": 12, "inner": {"rank": 2}, "outer": [0, 1]},
}
MEAN_SQUARES = {"modular": 1 / 31, "circle": 0.5, "hierarchical": 1.0}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, source in SOURCES.items():
        context = stage_context(tmp_path_factory.mktemp(name), stage="numbers")
        shard_numbers(context, ShardNumbersParameters.model_validate({"source": source}))
        found[name] = context.output
    return found


def rows_of(dataset: Path) -> torch.Tensor:
    reader = open_split(dataset, "train")
    return torch.from_numpy(reader.numbers(np.arange(len(reader)))[0])


@pytest.mark.parametrize("feedforward", ["dense", "quadratic", "pi"])
@pytest.mark.parametrize("name", SOURCES)
def test_the_first_activation_sees_variance_1_whatever_the_rows_are(
    datasets: dict[str, Path], name: str, feedforward: Any
) -> None:
    rows = rows_of(datasets[name])
    sizes = {"inputs": rows.shape[1], "widths": [2000], "activation": "hermite3", "feedforward": feedforward}
    torch.manual_seed(0)
    model: Any = build_model("mlp", sizes)
    before = model.blocks[0].layer(rows).square().mean().item()
    start_for_rows(model, datasets[name])
    after = model.blocks[0].layer(rows).square().mean().item()
    assert after == pytest.approx(1.0, abs=0.12)
    if feedforward != "pi":  # which is of degree 2
        assert before == pytest.approx(MEAN_SQUARES[name], rel=0.15)
        assert after == pytest.approx(before / MEAN_SQUARES[name], rel=0.03)


def test_functions_and_sines_are_made_for_one_size(datasets: dict[str, Path]) -> None:
    siren = {"name": "fourier", "degree": 1, "init": "siren"}
    for settings in ({"feedforward": "kan"}, {"activation": siren}):
        model: Any = build_model("mlp", {"inputs": 2, "widths": [8], **settings})
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        start_for_rows(model, datasets["circle"])
        assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_stage": 3},
        *(
            pytest.param({"zero_stage": stage, "precision": precision}, marks=pytest.mark.chaos)
            for stage in range(4)
            for precision in ("fp32", "bf16")
        ),
    ],
    ids=str,
)
def test_it_comes_back_to_the_last_bit_on_two_workers(
    tmp_path: Path, datasets: dict[str, Path], changes: dict[str, Any]
) -> None:
    layers: list[Any] = [
        "quadratic",
        {"name": "kan", "basis": "spline"},
        {"name": "pi", "skip": False, "activation": "leaky_relu"},
        "pi",
    ]
    settings: dict[str, Any] = {
        "model": {"architecture": "mlp", "widths": [48] * 4, "feedforward": layers, "norm": "batch"},
        "steps": 6,
        "global_batch_size": 64,
        "validation_every": 6,
        "checkpoint_every": 4,
        **changes,
    }
    dataset = Artifact(datasets["modular"], "digest", "numbers")
    run_training(tmp_path, dataset, **settings)
    whole = weights_hash(tmp_path)
    weights = load_file(tmp_path / "output" / "model.safetensors")
    # one-hot pairs: the first layer starts with variance 1/2, not 1/62
    assert weights["blocks.0.layer.weight"].std().item() == pytest.approx(math.sqrt(0.5), rel=0.1)
    assert load_model(tmp_path / "output")(rows_of(datasets["modular"])).isfinite().all()
    shutil.rmtree(tmp_path / "output")
    run_training(tmp_path, dataset, **settings)
    assert any("checkpoint of step 4" in str(event.get("text")) for event in read_events(tmp_path, "message"))
    assert weights_hash(tmp_path) == whole


def test_a_norm_of_batches_sees_whole_batches_and_no_norm_has_no_parameters() -> None:
    usual = {"model": {"architecture": "mlp", "norm": "batch"}, "steps": 1, "global_batch_size": 8}
    data = PromisedNumbers(inputs=2, targets=1, classes=None)
    for changes, words in (
        ({"micro_batch_size": 2}, "micro_batch_size: 2 splits the batch of a worker into 2, and norm: batch"),
        ({"activation_checkpointing": "block"}, "activation_checkpointing: block would compute the statistics"),
    ):
        given = TrainParameters.model_validate(usual | changes)
        with pytest.raises(UserError, match=words) as caught:
            promise(given, {"dataset": data}, Resources(workers=2), Path())
        assert "mlp" not in str(caught.value.hint)
    assert TrainParameters.model_validate(usual | {"trainable": ["norms"]}).trainable == ["norms"]
    with pytest.raises(ValidationError, match=r"trainable: norms: the model has none \(norm: none\)"):
        TrainParameters.model_validate(usual | {"model": {"architecture": "mlp"}, "trainable": ["norms"]})
    model = build_model("mlp", {"norm": "layer_norm", "widths": [3]})
    freeze(model, "mlp", ["norms"])
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert learning == {"blocks.0.norm.weight", "blocks.0.norm.bias"}
