"""Every ready workflow runs, in a small form: the file as it is, with other sizes (`--set`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL_GPT2 = "{architecture: gpt2, n_layer: 1, n_head: 2, n_embd: 32, activation: %s}"
SMALL: dict[str, list[str]] = {
    "after-training": [
        "stages.text.with.source={kind: python, max_bytes: 200000}",
        "stages.text.with.tokenizer={kind: bytes}",
        "stages.text.with.sequence_length=16",
        "stages.gpt.with.model={n_layer: 3, n_head: 2, n_embd: 16, activation: hermite4}",
        "stages.gpt.with.warmup_steps=1",
        "stages.gpt.with.validation_every=0",
        "stages.smaller.matrix.way=["
        "{label: 2 blocks dropped, blocks: {count: 2}, factors: null, weights: null}, "
        "{label: both, blocks: null, factors: {ratio: 1.5}, weights: {bits: 4}}]",
        "stages.smaller.with.calibration_samples=8",
        "stages.recovered.matrix.by=[{label: lora, adapters: {name: lora, rank: 2}, rate: 0.001}]",
        "stages.recovered.with.warmup_steps=1",
        "stages.taught.matrix.by=[{label: both, outputs: 1.0, features: 1.0}]",
        "stages.taught.with.warmup_steps=1",
        "stages.evaluate.with.samples=8",
        "stages.speed.with.rounds=1",
        "params.steps=2",
        "params.recovery_steps=2",
    ],
    "convnext-digits": [
        "params.activations=[gelu, tropical_rational]",
        "params.dims=[8, 16]",
        "params.epochs=1",
    ],
    "gpt2-openwebtext": [
        "stages.shard.with.source={kind: python, max_bytes: 300000}",
        "stages.shard.with.tokenizer={kind: bytes}",
        "stages.shard.with.sequence_length=32",
        "stages.shard.with.validation_fraction=0.1",
        "stages.shard.resources.workers=1",
        f"stages.baseline.with.model={SMALL_GPT2 % 'gelu_tanh'}",
        f"stages.hermite.with.model={SMALL_GPT2 % 'hermite3'}",
        *(
            f"stages.{stage}.{setting}"
            for stage in ("baseline", "hermite", "finetune")
            for setting in ("with.warmup_steps=2", "with.validation_samples=8", "with.validation_every=0")
        ),
        *(f"stages.{stage}.with.compile=false" for stage in ("baseline", "hermite")),
        *(
            f"stages.{stage}.resources={{workers: {workers}, cpus: 1, gpus: 0}}"
            for stage, workers in (("baseline", 2), ("hermite", 1), ("finetune", 1), ("evaluate", 1))
        ),
        "stages.evaluate.with.stride=16",
        "params.steps=4",
        "params.finetune_steps=2",
        "params.global_batch_size=8",
        "params.micro_batch_size=2",
        "params.deepspeed=zero-2",
    ],
    "convert-minilm": [
        "stages.convert.matrix.degree=[4]",
        "stages.convert.with.page=false",
        "stages.distill.matrix.degree=[4]",
        "params.distillation_steps=1",
        "params.calibration_samples=8",
        "params.held_out=8",
    ],
    "grokking": [
        "params.seeds=[0]",
        "params.modulus=7",
        "params.train_pairs=33",
        "params.width=8",
        "params.steps=10",
        "stages.bases.matrix.activation=[{label: square, name: hermite, degree: 2}, relu]",
        "stages.bases.with.validation_every=5",
        "stages.scales.matrix.activation=[relu]",
        "stages.scales.matrix.scale=[10.0]",
        "stages.kernels.with.analyses=[{name: width, widths: [8, 16], draws: 10}]",
    ],
    "private-inference": [
        "stages.gpt.matrix.parts=["
        "{label: baseline, activation: gelu_tanh, norm: layer_norm, attention: softmax, penalty: null}, "
        "{label: polynomial, activation: {name: hermite, degree: 3, init: stable}, norm: batch, "
        "attention: {name: power, sinks: 4}, penalty: {activation: 1.0, denominator: 0.1}}]",
        "stages.text.with.tokenizer={kind: bytes}",
        "stages.gpt.with.warmup_steps=2",
        "stages.gpt.with.validation_every=0",
        "stages.evaluate.with.samples=8",
        "stages.circuit_loss.with.samples=8",
        "stages.circuit.with.held_out_samples=8",
        "stages.analysis.with.samples=4",
        "params.seeds=[0]",
        "params.steps=20",
        "params.sequence_length=16",
        "params.corpus_bytes=200000",
        "params.n_layer=1",
        "params.n_head=2",
        "params.n_embd=16",
        "params.calibration_samples=32",
    ],
    "recipe": [
        "params.source.max_bytes=300000",
        "params.seeds=[0]",
        "params.steps=2",
        "stages.shard.with.tokenizer={kind: bytes}",
        "stages.shard.with.sequence_length=32",
        "stages.train.with.validation_samples=8",
        "stages.train.with.warmup_steps=1",
        "stages.convnext.matrix.seed=[0]",
        "stages.convnext.matrix.activation=[gelu]",
        "stages.convnext.with.steps=2",
        "stages.convnext.with.warmup_steps=1",
    ],
    "word-count": [],
}
WITHOUT_REPORT = {"convert-minilm", "word-count"}
ELSEWHERE = {
    "activation-study": "tests/integration/test_activation_study.py",
    "polynomial-networks": "tests/integration/test_polynomial_networks.py",
    "quickstart": "tests/quickstart_support.py",
    "convnext-imagenet": "tests/stages/test_shard_images.py",
}

pytestmark = pytest.mark.timeout(300)


def run(workflow: str, settings: list[str], store: Path) -> str:
    command = [str(Path(sys.executable).with_name("polytrope")), "run", f"workflows/{workflow}.yaml"]
    command += ["--executor", "local", "--no-tracking", "--store", str(store)]
    command += [f"--set={setting}" for setting in settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("workflow", SMALL)
def test_the_small_form_runs(workflow: str, tmp_path: Path) -> None:
    output = run(workflow, SMALL[workflow], tmp_path / "store")
    assert ("compare" if workflow in WITHOUT_REPORT else " report --store ") in output


@pytest.mark.parametrize("workflow", ELSEWHERE)
def test_the_others_are_run_elsewhere(workflow: str) -> None:
    assert f"{workflow}.yaml" in (ROOT / ELSEWHERE[workflow]).read_text(encoding="utf-8")


def test_no_ready_workflow_is_left_out() -> None:
    assert {path.stem for path in (ROOT / "workflows").glob("*.yaml")} == {*SMALL, *ELSEWHERE}


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_learnable_activations_reach_97_percent_on_held_out_digits(tmp_path: Path) -> None:
    """The whole of convnext-digits.yaml; benchmarks.train measures how long it takes."""
    import json

    run("convnext-digits", [], tmp_path / "store")
    (evaluation,) = (tmp_path / "store" / "artifacts").glob("*/files/evaluation.json")
    accuracies = {label: model["top1"] for label, model in json.loads(evaluation.read_text())["models"].items()}
    assert len(accuracies) == 4
    assert all(accuracy >= 0.97 for accuracy in accuracies.values()), accuracies
