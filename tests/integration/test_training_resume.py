"""A training that is interrupted ends with the weights of one that is not: killed workers, killed driver, hung peer,
damaged checkpoint; and it continues on another number of workers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_support import (
    PARAMETERS,
    TRAINS_IN_FP16,
    history,
    make_dataset,
    read_events,
    run_training,
    validation_loss,
    weights_hash,
)

from polytrope.pipeline.data.order import sample_indices
from polytrope.pipeline.engine.run import run_workflow
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import fold, read
from polytrope.pipeline.stage import Artifact
from polytrope.pipeline.stages.train import checkpoint_catalogue as catalogue
from polytrope.pipeline.stages.train.training_state import _convert_to_universal
from polytrope.pipeline.stages.train.workers import TrainingError
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.workflow.graph import build_graph
from polytrope.pipeline.workflow.spec import Workflow

LONG: dict[str, Any] = {"steps": 60, "checkpoint_every": 10, "log_every": 10, "validation_every": 30}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_dataset(tmp_path_factory.mktemp("dataset") / "dataset")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, dataset: Artifact) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted")
    run_training(directory, dataset, **LONG, model={**PARAMETERS["model"], "dropout": 0.1})
    return directory


def dropout_training(directory: Path, dataset: Artifact, **changes: Any) -> None:
    """With dropout, so that the random state counts."""
    run_training(directory, dataset, **{**LONG, "model": {**PARAMETERS["model"], "dropout": 0.1}, **changes})


def wait_for(path: Path, process: Callable[[], bool], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process(), f"the training ended before {path} appeared"
        assert time.monotonic() < deadline, f"{path} did not appear within {seconds} s"
        time.sleep(0.01)


def worker_pid(directory: Path, rank: int, launch: int = 0) -> int:
    return int(json.loads((directory / f"scratch/launch-{launch:03d}/worker-{rank}.json").read_text())["pid"])


def training_with_signal(directory: Path, dataset: Artifact, rank: int, step: int, number: int, **changes: Any) -> None:
    """Run the training and send `number` to the worker `rank` once the checkpoint of `step` exists."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            dropout_training(directory, dataset, **changes)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_for(directory / f"scratch/checkpoints/step-{step:08d}/manifest.json", thread.is_alive)
    os.kill(worker_pid(directory, rank), number)
    thread.join()
    if errors:
        raise errors[0]


def messages(directory: Path) -> str:
    return "\n".join(event["text"] for event in read_events(directory, "message"))


@pytest.mark.parametrize(
    ("rank", "stage", "asynchronous"),
    [
        (1, 1, True),
        pytest.param(0, 1, False, marks=pytest.mark.chaos),
        pytest.param(1, 3, False, marks=pytest.mark.chaos),
        pytest.param(0, 3, True, marks=pytest.mark.chaos),
    ],
)
def test_a_killed_worker_is_replaced_and_the_weights_are_the_same(
    tmp_path: Path, dataset: Artifact, uninterrupted: Path, rank: int, stage: int, asynchronous: bool
) -> None:
    if stage == 3:
        dropout_training(tmp_path / "reference", dataset, zero_stage=3)
    expected = uninterrupted if stage == 1 else tmp_path / "reference"
    changes = {"zero_stage": stage, "asynchronous_checkpoints": asynchronous}
    training_with_signal(tmp_path / "killed", dataset, rank, 20, signal.SIGKILL, **changes)
    assert weights_hash(tmp_path / "killed") == weights_hash(expected)
    assert history(tmp_path / "killed") == history(expected)
    assert "restarting from the newest checkpoint" in messages(tmp_path / "killed")
    assert "continuing from the checkpoint of step" in messages(tmp_path / "killed")
    steps = [event["step"] for event in read_events(tmp_path / "killed", "metrics") if "train/loss" in event["values"]]
    assert steps == [10, 20, 30, 40, 50, 60]  # none twice, none missing


@pytest.mark.skipif(not TRAINS_IN_FP16, reason="DeepSpeed cannot train in fp16 on this CPU")
def test_fp16_skips_overflows_and_its_loss_scale_survives_a_restart(tmp_path: Path, dataset: Artifact) -> None:
    """A loss scale that begins far too high, and is tried higher every 4 steps: steps overflow until the last."""
    scaler = {"initial_scale_power": 24, "loss_scale_window": 4, "hysteresis": 1}
    changes = {"precision": "fp16", "deepspeed": {"fp16": scaler}, "log_every": 1}
    dropout_training(tmp_path / "whole", dataset, **changes)
    norms = {entry["step"]: entry["gradient_norm"] for entry in history(tmp_path / "whole") if "train/loss" in entry}
    overflows = [step for step, norm in norms.items() if norm is None]
    assert overflows[0] == 1
    assert overflows[-1] > 20
    assert len(overflows) < 40
    losses = [entry["train/loss"] for entry in history(tmp_path / "whole") if "train/loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    training_with_signal(tmp_path / "killed", dataset, 1, 20, signal.SIGKILL, **changes)
    assert weights_hash(tmp_path / "killed") == weights_hash(tmp_path / "whole")
    assert history(tmp_path / "killed") == history(tmp_path / "whole")


def test_a_killed_driver_takes_its_workers_along_and_the_next_one_continues(
    tmp_path: Path, dataset: Artifact, uninterrupted: Path
) -> None:
    script = (
        "import sys; from pathlib import Path; from polytrope.pipeline.stage import Artifact\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]\n"
        "from test_training_resume import dropout_training\n"
        f"dropout_training(Path({str(tmp_path)!r}), Artifact(Path({str(dataset.path)!r}), 'digest', 'shard'))\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", script])
    wait_for(tmp_path / "scratch/checkpoints/step-00000020/manifest.json", lambda: driver.poll() is None)
    workers = [worker_pid(tmp_path, rank) for rank in range(2)]
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 20
    while any(_runs(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlived their driver"
        time.sleep(0.05)
    dropout_training(tmp_path, dataset)
    assert weights_hash(tmp_path) == weights_hash(uninterrupted)
    assert history(tmp_path) == history(uninterrupted)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.chaos
def test_a_worker_that_hangs_is_noticed_by_the_collective_timeout(
    tmp_path: Path, dataset: Artifact, uninterrupted: Path
) -> None:
    training_with_signal(tmp_path, dataset, 1, 20, signal.SIGSTOP, collective_timeout=15.0)
    assert weights_hash(tmp_path) == weights_hash(uninterrupted)


def test_worker_restarts_are_limited_and_the_error_says_so(tmp_path: Path, dataset: Artifact) -> None:
    with pytest.raises(TrainingError, match=r"worker 1 on \S+ was killed or lost"):
        training_with_signal(tmp_path, dataset, 1, 10, signal.SIGKILL, worker_restarts=0)


def test_a_damaged_checkpoint_is_set_aside_and_an_older_one_used(
    tmp_path: Path, dataset: Artifact, uninterrupted: Path
) -> None:
    with pytest.raises(TrainingError):
        training_with_signal(tmp_path, dataset, 0, 30, signal.SIGKILL, worker_restarts=0)
    newest = sorted((tmp_path / "scratch/checkpoints").glob("step-*/manifest.json"))[-1].parent
    victim = next((newest / "state").glob("*optim_states.pt"))
    victim.write_bytes(victim.read_bytes()[:-1])
    dropout_training(tmp_path, dataset)
    assert f"checkpoint {newest.name} is damaged" in messages(tmp_path)
    assert (tmp_path / "scratch/checkpoints/quarantine" / newest.name).is_dir()
    assert weights_hash(tmp_path) == weights_hash(uninterrupted)


class RunsCode:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_somebody_else_wrote_runs_no_code(tmp_path: Path, dataset: Artifact) -> None:
    """Neither where DeepSpeed loads it, nor where it is converted for another number of workers."""
    changes: dict[str, Any] = {"workers": 1, "steps": 2, "checkpoint_every": 1}
    run_training(tmp_path, dataset, **changes)
    (directory,) = (tmp_path / "scratch" / "checkpoints").glob("step-*")
    (victim,) = (directory / "state").glob("*optim_states.pt")
    proof = tmp_path / "code ran"
    content = torch.load(victim, weights_only=False)
    torch.save({**content, "more": RunsCode(proof)}, victim)
    torch.load(victim, weights_only=False)
    proof.rmdir()  # it does run code
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"][str(victim.relative_to(directory))] = catalogue.hash_on_disk(victim)
    (directory / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(tmp_path / "output")
    with pytest.raises(UserError, match=r"optim_states\.pt names `\w+\.mkdir`"):
        run_training(tmp_path, dataset, **changes)
    with pytest.raises(UserError, match=r"optim_states\.pt names `\w+\.mkdir`"):
        _convert_to_universal(directory / "state", tmp_path / "universal")
    assert not proof.exists()


def test_a_file_that_was_added_to_a_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    for step in (1, 2):
        directory = catalogue.checkpoint_directory(tmp_path, step)
        (directory / "state").mkdir(parents=True)
        (directory / "state" / "a.pt").write_bytes(b"x")
        catalogue.commit(directory, step, {"state/a.pt": catalogue.hash_on_disk(directory / "state" / "a.pt")}, {})
    (directory / "state" / "b.pt").write_bytes(b"x")
    said: list[str] = []
    found = catalogue.newest_valid(tmp_path, said.append)
    assert found is not None
    assert found.step == 1
    assert "state/b.pt is not in its manifest" in said[0]


@pytest.mark.parametrize(
    ("before", "after", "stage"), [(2, 1, 1), (1, 2, 1), pytest.param(2, 1, 3, marks=pytest.mark.chaos)]
)
def test_continues_on_another_number_of_workers(
    tmp_path: Path, dataset: Artifact, before: int, after: int, stage: int
) -> None:
    changes = {"steps": 20, "checkpoint_every": 10, "zero_stage": stage, "ema_decay": 0.9 if stage == 1 else None}
    changes["asynchronous_checkpoints"] = before == 2
    run_training(tmp_path, dataset, workers=before, **changes)
    expected = history(tmp_path)
    for path in (tmp_path / "output").iterdir():
        path.unlink()
    run_training(tmp_path, dataset, workers=after, **changes)
    assert f"from {before} to {after} workers" in messages(tmp_path)
    assert "continuing from the checkpoint of step 10" in messages(tmp_path)
    for ours, theirs in zip(history(tmp_path), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_the_best_weights_outlast_a_lost_worker(tmp_path: Path) -> None:
    """The validation loss is lowest early, long before the checkpoint that the restart continues from."""
    dataset = make_dataset(tmp_path / "dataset", ["all work and no play " * 30] * 50 + ["9876543210!" * 40] * 10)
    changes = {"result": "best", "validation_every": 2}
    dropout_training(tmp_path / "whole", dataset, **changes)
    summary = json.loads((tmp_path / "whole/output/training.json").read_text())
    assert summary["result_step"] < 20, "the test needs a training that gets worse"
    training_with_signal(tmp_path / "killed", dataset, 0, 20, signal.SIGKILL, **changes)
    assert weights_hash(tmp_path / "killed") == weights_hash(tmp_path / "whole")
    assert json.loads((tmp_path / "killed/output/training.json").read_text()) == summary


def test_a_gradient_spike_is_rolled_back_and_its_batch_skipped(tmp_path: Path) -> None:
    """One strange document among equal ones: the batch that holds it has a gradient far above the rest.

    The result is the best weights of the validation, whose text is another one: those of an early step.
    """
    plain = "the same words again and again and again; " * 20
    noise = "".join(chr(33 + int(i)) for i in np.random.default_rng(0).integers(0, 90, size=800))
    dataset = make_dataset(tmp_path / "dataset", [plain] * 49 + [noise] + ["9876543210!" * 80] * 10)
    samples = json.loads((dataset.path / "dataset.json").read_text())["splits"]["train"]["samples"]
    strange = set(range(samples - 24, samples))
    # a seed whose first 45 batches hold no strange sample, so that there is a median to measure against
    seed = next(seed for seed in range(10_000) if not strange & set(sample_indices(seed, 0, 4 * 45, samples).tolist()))
    run_training(
        tmp_path,
        dataset,
        workers=1,
        seed=seed,
        steps=64,
        global_batch_size=4,
        gradient_spike=1.7,
        on_divergence="rollback",
        checkpoint_every=10,
        maximum_rollbacks=20,
        validation_every=4,
        result="best",
    )
    assert "rolling back to the newest checkpoint and skipping this batch" in messages(tmp_path)
    rollbacks = json.loads((tmp_path / "scratch/rollbacks.json").read_text())
    for entry in rollbacks:
        assert strange & set(sample_indices(seed, entry["batch"] * 4, 4, samples).tolist())
    summary = json.loads((tmp_path / "output/training.json").read_text())
    assert summary["skipped_batches"] == len(rollbacks) > 0
    assert summary["rollbacks"] == [entry["reason"] for entry in rollbacks]
    assert "is more than 1.7 × the recent median" in summary["rollbacks"][0]
    losses = {int(entry["step"]): entry["val/loss"] for entry in history(tmp_path) if "val/loss" in entry}
    best = min(losses, key=lambda step: losses[step])
    assert best < 40, "the test needs a training that gets worse"
    assert (summary["result_step"], summary["val/loss"]) == (best, losses[best])
    assert validation_loss(tmp_path, dataset, 7) == pytest.approx(losses[best], rel=1e-5)


def test_the_reason_of_a_rollback_is_in_the_journal(tmp_path: Path) -> None:
    """Every batch diverges: the first is skipped, the second is one too many."""
    shard = {"source": {"kind": "python", "max_bytes": 100_000}, "tokenizer": {"kind": "bytes"}, "sequence_length": 32}
    broken = {"learning_rate": 1e30, "gradient_clipping": 0.0, "warmup_steps": 0}
    training = {**PARAMETERS, **broken, "on_divergence": "rollback", "maximum_rollbacks": 1}
    stages = {
        "shard": {"uses": "shard", "with": shard},
        "train": {"uses": "train", "inputs": {"dataset": "shard"}, "with": training, "resources": {"workers": 1}},
    }
    workflow = Workflow.from_dict({"name": "diverging", "executor": "local", "stages": stages}, directory=tmp_path)
    store = Store(tmp_path / "store")
    state = run_workflow(workflow, build_graph(workflow), store)
    assert state.status == "failed"
    (note,) = fold(read(store.run_directory(state.run_id))).stages["train"].notes.values()
    assert re.match(r"training diverged: step \d+ \(batch \d+\): gradient norm is (nan|inf)", note)
    assert note.endswith("rolling back to the newest checkpoint and skipping this batch")
