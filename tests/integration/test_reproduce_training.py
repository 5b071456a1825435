"""A real training computed again is equal to the bit; its model card says what the stored files say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from polytrope.pipeline.runs.journal import fold, read
from polytrope.pipeline.store.store import Store

POLYTROPE = str(Path(sys.executable).with_name("polytrope"))
WORKFLOW = """\
name: small
description: a very small GPT-2
executor: local
tracking: {enabled: false}
stages:
  shard:
    uses: shard
    with: {name: topics, source: {kind: python, max_bytes: 300000}, tokenizer: {kind: bytes}, sequence_length: 32}
  train:
    uses: train
    inputs: {dataset: shard}
    with:
      model: {architecture: gpt2, n_layer: 1, n_head: 2, n_embd: 16, activation: {name: hermite, degree: 3}}
      steps: 6
      global_batch_size: 4
      validation_every: 3
      validation_samples: 8
  evaluate: {uses: evaluate, inputs: {dataset: shard, models: {ours: train}}, with: {samples: 16}}
"""

pytestmark = pytest.mark.timeout(240)


def polytrope(directory: Path, *arguments: str) -> str:
    done = subprocess.run(
        [POLYTROPE, *arguments], cwd=directory, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small")
    (directory / "w.yaml").write_text(WORKFLOW)
    polytrope(directory, "run", "w.yaml")
    return directory


def test_a_training_computed_again_is_bit_equal(project: Path) -> None:
    output = polytrope(project, "reproduce")
    assert "3 of 3 results are bit-equal" in output


def test_the_model_card_says_what_the_files_say(project: Path) -> None:
    store = Store(project / ".polytrope")
    (directory,) = store.run_directories()
    stages = fold(read(directory)).stages
    artifacts = {name: store.load(stage.key or "") for name, stage in stages.items()}
    assert artifacts["train"] is not None
    assert artifacts["evaluate"] is not None
    polytrope(project, "card", "--output", "cards/card.md", "--license", "apache-2.0")
    text = (project / "cards" / "card.md").read_text()
    card = ModelCard(text)  # as the hub reads it
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "apache-2.0", "polytrope", "text-generation",
    )  # fmt: skip
    assert card.data.datasets is None, "its data is on no hub"
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    for title in (
        "Data",
        "Model",
        "Activation",
        "Training",
        "Lineage",
        "Use and limits",
        "Results",
        "Environment",
        "How to reproduce",
    ):
        assert f"## {title}" in text
    evaluation = json.loads((store.materialize(artifacts["evaluate"].key) / "evaluation.json").read_text())
    assert measured["loss"] == evaluation["models"]["ours"]["loss"]
    assert f"| ours (this model) | {evaluation['models']['ours']['loss']:.4g} |" in text
    model = json.loads((store.materialize(artifacts["train"].key) / "model.json").read_text())
    assert f"{model['parameters']:,} parameters" in text
    assert "hermite, degree 3" in text
    assert "| steps | 6 |" in text
    assert "$class" not in text
    assert "from kind python" in text
    assert "| torch | " in text
    assert str(stages["shard"].digest) in text
    assert str(stages["train"].digest) in text
    assert f"polytrope reproduce {directory.name} --stage 'train'" in text
    assert (project / "cards" / "card-activation.png").read_bytes().startswith(b"\x89PNG")

    polytrope(project, "card", "--output", "card.html")
    page = (project / "card.html").read_text()
    assert 'src="data:image/png;base64,' in page
    assert ">ours (this model)</td>" in page
    assert "http" not in page.split("</style>")[1]  # self-contained


def test_a_card_that_cannot_be_written_says_why(project: Path) -> None:
    for arguments, words in ((("--output", "card.txt"), ".md or .html"), (("--stage", "shard"), "made no model")):
        done = subprocess.run(
            [POLYTROPE, "card", *arguments], cwd=project, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 2
        assert words in done.stderr
