"""benchmarks.recipe: what is compared with what, and by which seeds a rate is chosen."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import recipe
from polytrope.pipeline.store.manifest import StoredArtifact

LOSSES = {
    "gelu_tanh": {0: 4.2, 1: 4.3, 2: 4.1},
    "affine gelu_tanh × 10": {0: 4.1, 1: 4.2, 2: 4.05, 10: 4.0, 11: 4.3},
    "affine gelu_tanh × 30": {0: 4.1, 10: 4.2},
    "hermite4 gelu [-4, 4] × 10": {0: 4.05, 1: 4.17, 2: 4.05, 10: None},
}


def rows() -> list[dict[str, Any]]:
    setting = {"data": "a", "train_tokens": 1, "layers": 4, "width": 128, "steps": 480, "batch": 8}
    return [
        {**setting, "learning_rate": 3e-3, "name": name, "seed": seed, "loss": loss}
        for name, losses in LOSSES.items()
        for seed, loss in losses.items()
    ]


def test_differences_are_of_the_seeds_that_nothing_is_chosen_by() -> None:
    (setting,) = recipe.compare(rows())
    assert setting["controls"] == ["affine gelu_tanh × 10", "affine gelu_tanh × 30"]
    entries = {entry["name"]: entry for entry in setting["activations"]}
    hermite = entries["hermite4 gelu [-4, 4] × 10"]
    assert hermite["difference"]["values"] == pytest.approx([-0.15, -0.13, -0.05])
    same_rate, faster = hermite["differences_to_controls"].values()
    assert same_rate["values"] == pytest.approx([-0.05, -0.03, 0.0])
    assert (faster["mean"], faster["p_value"]) == (pytest.approx(-0.05), None)
    assert hermite["difference"]["holm_p_value"] >= hermite["difference"]["p_value"]
    assert hermite["failed"] == 1
    assert "differences_to_controls" not in entries["affine gelu_tanh × 30"]
    assert entries["gelu_tanh"]["loss"]["mean"] == pytest.approx(4.2)
    text = recipe.markdown([setting])
    assert "| hermite4 gelu [-4, 4] × 10 | 4.0900 ± 0.1721 | – | -0.1100 ± 0.1314 |" in text
    assert "| affine gelu_tanh × 30 | 4.1000 | 10: 4.2000 | -0.1000 | – | – | – | – | – | 0 |" in text


def artifact(**changes: Any) -> StoredArtifact:
    return StoredArtifact(
        **{"key": "", "digest": "", "stage": "", "run_id": "", "duration": 0, "committed": 0} | changes
    )


def test_a_training_says_its_rate_and_counts_only_with_the_whole_validation_split() -> None:
    files = ({"path": "train/shard-000000.tar", "sha256": "ab" * 32, "size": 1},)
    summary = {"train/tokens": 1000.0, "validation/tokens": 100.0}
    dataset = artifact(components={"parameters": {"sequence_length": 10}}, summary=summary, files=files)
    activation = {"name": "hermite", "degree": 4, "init": "gelu", "interval": [-4, 4]}
    parameters = {
        "model": {"activation": activation, "activation_options": None, "n_layer": 4, "n_embd": 128},
        "steps": 480,
        "global_batch_size": 8,
        "seed": 3,
        "validation_samples": 10,
        "learning_rate": 3e-3,
        "coefficient_learning_rate": None,
    }

    def row(**changes: Any) -> dict[str, Any] | None:
        training = artifact(components={"parameters": parameters | changes}, summary={"val/loss": 4.5})
        return recipe.describe(training, dataset)

    found = row()
    assert found is not None
    assert (found["name"], found["loss"], found["data"]) == ("hermite4 gelu [-4, 4] × 10", 4.5, "abababababab")
    assert (row(coefficient_learning_rate=9e-2) or {})["name"] == "hermite4 gelu [-4, 4] × 30"
    assert (row(model=parameters["model"] | {"activation": "gelu_tanh"}) or {})["name"] == "gelu_tanh"
    assert row(validation_samples=9) is None
