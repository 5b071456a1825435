"""Proof by doing: a workflow is run twice, once undisturbed and once killed in every training, and both are compared.

In the disturbed run the driver is killed when a training has its first checkpoint, the run is resumed, and one of the
training's workers is killed at its next checkpoint. Both runs have stores of their own; nothing else is touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import RunState, fold, read
from polytrope.pipeline.store.store import Store

_LOOK = 0.02  # seconds between two looks for a new checkpoint
RUN_ID = "verify-resume"


@dataclass(frozen=True)
class Comparison:
    """One stage of both runs: digests of its result, and how often it was completed in the disturbed one."""

    stage: str
    undisturbed: str | None
    disturbed: str | None
    completions: int

    @property
    def equal(self) -> bool:
        return self.undisturbed == self.disturbed and self.completions <= 1


def verify_resume(
    command: list[str], place: Path, *, kill_workers: bool, say: Callable[[str], None]
) -> list[Comparison]:
    """Run both and compare.

    Args:
        command: arguments of `polytrope run`: the workflow and its options, without store and run id.
        place: a new directory for the two stores.
        kill_workers: workers are processes of this machine: kill one of them, too.
        say: told one line per step.

    Raises:
        UserError: a run failed by itself, or no training wrote a checkpoint while it ran.
    """
    say("undisturbed run")
    undisturbed = place / "undisturbed"
    driver = _start(["run", *command, "--run-id", RUN_ID], undisturbed)
    _expect_success(driver.wait(), undisturbed)
    say("disturbed run")
    disturbed = place / "disturbed"
    arguments, strikes = ["run", *command, "--run-id", RUN_ID], _Strikes()
    while True:
        driver = _start(arguments, disturbed)
        if not _disturb(driver, disturbed, strikes, kill_workers, say):
            break
        arguments = ["resume", RUN_ID, "--quiet"]
    _expect_success(driver.wait(), disturbed)
    if not strikes.driver:
        raise UserError(
            "no training wrote a checkpoint while it ran: nothing was interrupted",
            "set `checkpoint_every` well below `steps` in a `train` stage of this workflow",
        )
    return compare(undisturbed, disturbed)


def compare(undisturbed: Path, disturbed: Path) -> list[Comparison]:
    """The stages of two runs, in the order of the workflow."""
    before, after = _state(undisturbed), _state(disturbed)
    events = read(Store(disturbed).run_directory(RUN_ID))
    completions = Counter(event.stage for event in events if event.type == "stage_succeeded")
    return [
        Comparison(name, stage.digest, after.stages[name].digest if name in after.stages else None, completions[name])
        for name, stage in before.stages.items()
    ]


def _state(store: Path) -> RunState:
    return fold(read(Store(store).run_directory(RUN_ID)))


def _start(arguments: Iterable[str], store: Path) -> subprocess.Popen[bytes]:
    store.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "polytrope.pipeline.commands.cli", *arguments, "--store", str(store)]
    with (store / "driver.log").open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def _expect_success(code: int, store: Path) -> None:
    if code != 0:
        log = (store / "driver.log").read_text(encoding="utf-8", errors="replace").strip()
        raise UserError(f"the {store.name} run failed (exit code {code}):\n{log[-2000:]}")


@dataclass
class _Strikes:
    """What was done to the trainings so far, by stage key: the newest checkpoint at the driver's and a worker's end."""

    driver: dict[str, str] = field(default_factory=dict)
    worker: dict[str, str] = field(default_factory=dict)


def _disturb(
    driver: subprocess.Popen[bytes], store: Path, strikes: _Strikes, kill_workers: bool, say: Callable[[str], None]
) -> bool:
    """Watch a driver until it ends (False), or kill it (True)."""
    try:
        while driver.poll() is None:
            for key in Store(store).names("scratch"):
                scratch = Store(store).scratch(key)
                newest = max(
                    (path.parent.name for path in scratch.glob("checkpoints/step-*/manifest.json")), default=""
                )
                if newest and key not in strikes.driver:
                    strikes.driver[key] = newest
                    driver.send_signal(signal.SIGKILL)
                    driver.wait()
                    say(f"  {_stage_of(store, key)}: driver killed after the checkpoint of {_step(newest)}; resuming")
                    return True
                if kill_workers and key not in strikes.worker and newest > strikes.driver.get(key, "~"):
                    worker = _newest_worker(scratch)
                    if worker is not None:
                        strikes.worker[key] = newest
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(worker, signal.SIGKILL)
                            say(f"  {_stage_of(store, key)}: worker killed after the checkpoint of {_step(newest)}")
            time.sleep(_LOOK)
    except BaseException:
        driver.kill()
        driver.wait()
        raise
    return False


def _step(checkpoint: str) -> str:
    return f"step {int(checkpoint.removeprefix('step-'))}"


def _newest_worker(scratch: Path) -> int | None:
    """The process of the last rank of the newest launch."""
    try:
        launch = sorted(scratch.glob("launch-*"))[-1]
        return int(json.loads(sorted(launch.glob("worker-*.json"))[-1].read_text(encoding="utf-8"))["pid"])
    except (OSError, IndexError, ValueError, KeyError):
        return None


def _stage_of(store: Path, key: str) -> str:
    """The stage with this key, by the journal."""
    state = _state(store)
    return next((name for name, stage in state.stages.items() if stage.key == key), key[:12])
