"""`polytrope verify-resume`: interruptions that change nothing are proved, those that change something are found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

POLYTROPE = str(Path(sys.executable).with_name("polytrope"))
TRAINING = """\
name: small
executor: local
stages:
  shard:
    uses: shard
    with: {name: topics, source: {kind: python, max_bytes: 300000}, tokenizer: {kind: bytes}, sequence_length: 32}
  train:
    uses: train
    inputs: {dataset: shard}
    with:
      model: {architecture: gpt2, n_layer: 1, n_head: 2, n_embd: 16, dropout: 0.1, activation: hermite}
      steps: 120
      global_batch_size: 4
      validation_every: 0
      validation_samples: 8
      checkpoint_every: 5
    resources: {workers: 2}
"""
CARELESS = '''
"""A stage that writes checkpoints in the layout of `train` and forgets its random state."""
import random, time
from polytrope.pipeline.stage import StageContext

def count(context: StageContext, steps: int = 20) -> None:
    """Count."""
    random.seed(len(list(context.scratch.glob("*"))))
    for step in range(steps):
        directory = context.scratch / "checkpoints" / f"step-{step:08d}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "manifest.json").write_text("{}")
        time.sleep(0.05)
    (context.output / "number").write_text(str(random.random()))
'''


def verify_resume(directory: Path, workflow: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (directory / "w.yaml").write_text(workflow)
    command = [POLYTROPE, "verify-resume", "w.yaml", *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=280, check=False)


def test_a_training_survives_the_end_of_its_driver_and_of_a_worker(tmp_path: Path) -> None:
    done = verify_resume(tmp_path, TRAINING)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train: driver killed after the checkpoint of step" in done.stdout
    assert "train: worker killed after the checkpoint of step" in done.stdout
    assert "2 of 2 results are bit-equal; no finished stage ran again" in done.stdout
    assert not list((tmp_path / ".polytrope" / "verify-resume").iterdir())


def test_a_stage_that_resumes_wrongly_is_found(tmp_path: Path) -> None:
    (tmp_path / "careless.py").write_text(CARELESS)
    stages = "stages: {shaky: {uses: 'careless:count'}}"
    done = verify_resume(tmp_path, f"name: careless\nexecutor: local\n{stages}\n", "--into", "both")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "different" in done.stdout
    assert (tmp_path / "both" / "disturbed" / "runs" / "verify-resume").is_dir()


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("{uses: 'careless:count', with: {steps: 0}}", "nothing was interrupted"),
        ("{uses: 'careless:count', with: {stepz: 0}}", "stepz"),
    ],
)
def test_what_proves_nothing_is_refused(tmp_path: Path, stage: str, words: str) -> None:
    (tmp_path / "careless.py").write_text(CARELESS)
    done = verify_resume(tmp_path, f"name: careless\nexecutor: local\nstages: {{quick: {stage}}}\n")
    assert done.returncode == 2
    assert words in done.stderr


def test_without_a_directory_of_this_machine_it_asks_for_one(tmp_path: Path) -> None:
    done = verify_resume(tmp_path, TRAINING, "--store", "s3://bucket/place")
    assert done.returncode == 2
    assert "--into: the runs need stores on this machine, and the store is s3://bucket/place" in done.stderr
    assert not (tmp_path / ".polytrope").exists()
