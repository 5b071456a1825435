"""Starts the training workers under Ray Train or as local processes, and turns their failures into one error."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import StageContext
from polytrope.pipeline.stages.train.training_plan import TrainingPlan
from polytrope.pipeline.support.files import remove_tree, replace_json
from polytrope.pipeline.support.log_filter import Filter

# Ray Train's controller polls every 2 s by default, which is most of the time of a short training. Its own watchers are
# processes that take seconds of a small machine; this stage notices lost workers itself.
RAY_TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
_LAST_WORDS = 5.0  # seconds that a dead worker's output may take to its log: something it started may hold the pipe
# Two more that Ray Train starts for each training, as processes: one hands out Ray Data sets, which this stage has none
# of; one removes the placement group after a crash of its controller, which Ray's control store does anyhow, and
# on a cluster without a dashboard waits 10 s for it at the end of every training.
_IDLE_HELPERS = ("DatasetsCallback", "PlacementGroupCleanerCallback")


class TrainingError(RuntimeError):
    """A worker failed; the message is the worker's."""


class TrainingDiverged(TrainingError):
    """NaN, infinity or a gradient spike in the global batch number `batch` of the stream."""

    def __init__(self, message: str, batch: int) -> None:
        super().__init__(message)
        self.batch = batch


class WorkerLost(TrainingError):
    """A worker was killed, or its peers lost contact: a restart from the newest checkpoint may help."""


def run_workers(context: StageContext, plan: TrainingPlan) -> None:
    """Train on `plan.workers` workers until done; lost workers are replaced by restarting from the newest checkpoint.

    Raises:
        UserError: raised by a worker.
        TrainingError: anything else a worker raised, with its message and traceback.
    """
    start = _start_ray if context.starts_with_ray else _start_local
    context.progress(0, plan.steps, f"starting {plan.workers} worker{'s' if plan.workers > 1 else ''}")
    restarts, allowed = plan.parameters.worker_restarts, plan.parameters.maximum_rollbacks
    while True:
        directory = _launch_directory(context.scratch)
        rollbacks = _read_rollbacks(context.scratch)
        batches, reasons = [entry["batch"] for entry in rollbacks], [entry["reason"] for entry in rollbacks]
        plan = dataclasses.replace(plan, skipped_batches=batches, skip_reasons=reasons)
        task = {"plan": plan, "context": context, "directory": directory}
        for left in context.output.iterdir():  # by a worker that was killed while it wrote the model
            remove_tree(left) if left.is_dir() else left.unlink()
        try:
            start(task, plan, directory)
            return
        except WorkerLost as error:
            if restarts == 0:
                raise
            restarts -= 1
            context.note(f"{error}; restarting from the newest checkpoint ({restarts} restarts left)")
        except TrainingDiverged as error:
            if plan.parameters.on_divergence == "stop":
                raise
            if len(rollbacks) >= allowed:
                raise TrainingError(f"{error}; {allowed} batches were skipped already (maximum_rollbacks)") from error
            _write_rollbacks(context.scratch, [*rollbacks, {"batch": error.batch, "reason": str(error)}])
            context.note(f"{error}; rolling back to the newest checkpoint and skipping this batch")


def _read_rollbacks(scratch: Path) -> list[dict[str, Any]]:
    path = scratch / "rollbacks.json"
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []


def _write_rollbacks(scratch: Path, rollbacks: list[dict[str, Any]]) -> None:
    replace_json(scratch / "rollbacks.json", rollbacks)


def _launch_directory(scratch: Path) -> Path:
    number = len(list(scratch.glob("launch-*")))
    directory = scratch / f"launch-{number:03d}"
    directory.mkdir(parents=True)
    return directory


def _start_local(task: dict[str, Any], plan: TrainingPlan, directory: Path) -> None:
    """Own child processes on this machine; they end with this one, whatever ends it.

    Each reads its task from standard input, not from a file: its parameters may hold secrets.
    """
    with tempfile.TemporaryDirectory(prefix="polytrope-") as temporary:
        content = pickle.dumps({**task, "rendezvous": f"file://{temporary}/rendezvous"})
        processes: list[subprocess.Popen[bytes]] = []
        writers: list[threading.Thread] = []
        try:
            for rank in range(plan.workers):
                process = subprocess.Popen(
                    [sys.executable, "-m", "polytrope.pipeline.stages.train.worker_process"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=_local_environment(plan, rank),
                    bufsize=0,
                )
                processes.append(process)
                assert process.stdout is not None
                output = (process.stdout, directory / f"worker-{rank}.log", task["context"].events.filter())
                writers.append(threading.Thread(target=_write_log, args=output, name=f"log {rank}", daemon=True))
                writers[-1].start()
            for process in processes:
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # it has ended already: `_wait` says why
                    process.stdin.write(content)
            _wait(processes, directory, writers)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
            for process in processes:
                process.wait()
                if process.stdin:
                    process.stdin.close()
            for writer in writers:
                writer.join(_LAST_WORDS)


def _write_log(output: IO[bytes], path: Path, stream: Filter) -> None:
    """All that a worker prints, without the values of secrets, until nobody holds its end any more."""
    with output, path.open("wb", buffering=0) as log:
        while data := output.read(1 << 16):
            with contextlib.suppress(OSError):  # a full disk ends a training where a checkpoint is written, not here
                log.write(stream.feed(data))
        with contextlib.suppress(OSError):
            log.write(stream.finish())


def _local_environment(plan: TrainingPlan, rank: int) -> dict[str, str]:
    threads = str(plan.parameters.threads_per_worker)
    return {
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",  # the host name need not resolve
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(plan.workers),
        "LOCAL_WORLD_SIZE": str(plan.workers),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONUNBUFFERED": "1",
    }


def _wait(processes: list[subprocess.Popen[bytes]], directory: Path, writers: list[threading.Thread]) -> None:
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            # Peers of a dead worker fail within moments, on their own; the first failure in time is the cause.
            deadline = time.monotonic() + 2.0
            while time.monotonic() < deadline and any(process.poll() is None for process in processes):
                time.sleep(0.05)
            writers[failed[0]].join(_LAST_WORDS)
            log = (directory / f"worker-{failed[0]}.log").read_text(encoding="utf-8", errors="replace")[-2000:]
            raise _describe_failure(directory, len(processes), f"exit code {codes[failed[0]]}", log)
        if all(code == 0 for code in codes):
            return
        time.sleep(0.05)


def _start_ray(task: dict[str, Any], plan: TrainingPlan, directory: Path) -> None:
    """Ray Train places the workers; it may use this stage's scratch directory, under a fresh name per launch."""
    for name, value in RAY_TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from polytrope.pipeline.stages.train.worker_process import train_worker

    if not ray.is_initialized():
        raise TrainingError("executor `ray`, but this process is not connected to a Ray cluster")
    on_cpu = plan.gpus == 0
    resources = task["context"].resources
    per_worker = {"CPU": float(resources.cpus)}
    if not on_cpu:
        per_worker["GPU"] = float(resources.gpus)
    if resources.memory:
        per_worker["memory"] = float(resources.memory)
    # Not TorchTrainer: it imports torch into this process and into Ray Train's controller, seconds each that are waited
    # for one after the other. The workers form the process group themselves.
    trainer = DataParallelTrainer(
        train_worker,
        train_loop_config=task,
        backend_config=_backend_config(),
        scaling_config=ScalingConfig(
            num_workers=plan.workers,
            use_gpu=not on_cpu,
            resources_per_worker=per_worker,
            placement_strategy="PACK",
        ),
        run_config=RunConfig(
            name=directory.name, storage_path=str(directory), failure_config=FailureConfig(max_failures=0)
        ),
    )
    _leave_out_idle_helpers(trainer)
    try:
        trainer.fit()
    except Exception as error:
        raise _describe_failure(directory, plan.workers, str(error).strip().splitlines()[0], str(error)) from error


def _backend_config() -> Any:
    """Nothing to set up, but every worker sees all GPUs of its node, as DeepSpeed expects."""
    from ray.train.backend import Backend, BackendConfig

    class SharedDevices(Backend):  # type: ignore[misc]
        share_cuda_visible_devices = True

    class SharedDevicesConfig(BackendConfig):  # type: ignore[misc]
        @property
        def backend_cls(self) -> type[SharedDevices]:
            return SharedDevices

    return SharedDevicesConfig()


def _leave_out_idle_helpers(trainer: Any) -> None:
    """Ray Train has no setting for this; where its internals are other ones, it just starts more slowly."""
    create = getattr(trainer, "_create_default_callbacks", None)
    if create is not None:
        trainer._create_default_callbacks = lambda: [
            callback for callback in create() if type(callback).__name__ not in _IDLE_HELPERS
        ]


def _describe_failure(directory: Path, workers: int, reason: str, details: str) -> Exception:
    """The error of the worker that failed first; a worker that left no word was killed."""
    failures = []
    for rank in range(workers):
        path = directory / f"failure-{rank}.json"
        if path.exists():
            failures.append(json.loads(path.read_text(encoding="utf-8")))
    causes = [failure for failure in failures if failure["kind"] != "communication"]
    if causes:
        first = min(causes, key=lambda failure: failure["time"])
        if first["kind"] == "user":
            return UserError(first["message"], first["hint"])
        if first["kind"] == "diverged":
            return TrainingDiverged(f"training diverged: {first['message']}", first["batch"])
        return TrainingError(
            f"worker {first['rank']} failed: {first['type']}: {first['message']}\n{first['traceback']}"
        )
    silent = sorted(set(range(workers)) - {failure["rank"] for failure in failures})
    if failures and not silent:
        first = min(failures, key=lambda failure: failure["time"])
        return WorkerLost(f"worker {first['rank']} lost contact: {first['message'].splitlines()[0]}")
    nodes = {rank: _node_of(directory, rank) for rank in range(workers)}
    if any(nodes.values()):
        names = ", ".join(f"{rank} on {nodes[rank]}" if nodes[rank] else str(rank) for rank in silent)
        return WorkerLost(f"worker {names} was killed or lost ({reason})")
    return TrainingError(f"the workers did not start ({reason})\n{details}")


def _node_of(directory: Path, rank: int) -> str | None:
    """Where a worker ran, by its own word; None if it did not start."""
    path = directory / f"worker-{rank}.json"
    return str(json.loads(path.read_text(encoding="utf-8"))["node"]) if path.exists() else None
