"""One training worker: sets up its process (threads, device, rendezvous), trains, and says why if it fails."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import StageContext
from polytrope.pipeline.stages.train.rendezvous import join, take_place_under_ray
from polytrope.pipeline.stages.train.training_plan import Diverged, TrainingPlan
from polytrope.pipeline.support.files import replace_json


def train_worker(task: dict[str, Any]) -> None:
    """Entry of every worker, under Ray Train and in a local process. `task` is what `run_workers` made."""
    context: StageContext = task["context"]
    directory: Path = task["directory"]
    if context.starts_with_ray:
        take_place_under_ray()
    rank = _environment_integer("RANK")
    replace_json(directory / f"worker-{rank}.json", {"pid": os.getpid(), "node": _node(context)}, durable=False)
    try:
        _train(task["plan"], context, rank, task.get("rendezvous"))
    except BaseException as caught:
        error = _explained(caught)
        failure = {
            "time": time.time(),
            "rank": rank,
            "kind": _failure_kind(error),
            "type": type(error).__name__,
            "message": error.message if isinstance(error, UserError) else str(error),
            "hint": error.hint if isinstance(error, UserError) else "",
            "traceback": traceback.format_exc(),
            "batch": error.batch if isinstance(error, Diverged) else None,
        }
        replace_json(directory / f"failure-{rank}.json", context.events.hidden(failure), durable=False)
        raise


def _train(plan: TrainingPlan, context: StageContext, rank: int, rendezvous: str | None) -> None:
    on_cpu = plan.gpus == 0
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    elif plan.parameters.deterministic:
        compute_deterministically()
    import torch

    torch.set_num_threads(plan.parameters.threads_per_worker)
    # Inter-operation threads have no say in a result; the default (all cores) only gets in the other workers' way.
    if torch.get_num_interop_threads() != 1:
        torch.set_num_interop_threads(1)
    local_rank = _environment_integer("LOCAL_RANK")
    device = torch.device("cpu") if on_cpu else torch.device("cuda", local_rank % torch.cuda.device_count())
    if not on_cpu:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=plan.parameters.collective_timeout)
    join(rendezvous, rank, plan.workers, "gloo" if on_cpu else "nccl", timeout)
    from polytrope.pipeline.stages.train.loop import train_rank

    train_rank(plan, context, rank, device)


def compute_deterministically() -> None:
    """Of the GPU's algorithms those that give the same bits every time; an operation that has none fails.

    Not with torch's `warn_only`, under which attention keeps the algorithms that add up in any order.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")  # read when Inductor is imported
    import torch

    torch.use_deterministic_algorithms(True)
    # Costs a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def _explained(error: BaseException) -> BaseException:
    """With the way out where an operation has no deterministic implementation."""
    if isinstance(error, RuntimeError) and "does not have a deterministic implementation" in str(error):
        return UserError(
            f"deterministic: {str(error).split(', but you set')[0]} on a GPU",
            "set deterministic: false; an interrupted training then ends in other bytes than an undisturbed one",
        )
    return error


def _failure_kind(error: BaseException) -> str:
    """What the launcher decides by.

    `user`: never retried; `communication`: a peer was lost or is stuck, worth a restart; `diverged`: NaN or a spike,
    by policy; `error`: anything else.
    """
    if isinstance(error, UserError):
        return "user"
    if isinstance(error, Diverged):
        return "diverged"
    text = f"{type(error).__name__}: {error}".lower()
    lost = (
        "gloo",
        "nccl",
        "connection closed",
        "connection reset",
        "timed out",
        "timeout",
        "broken pipe",
        "distbackend",
    )
    return (
        "communication" if isinstance(error, RuntimeError | OSError) and any(word in text for word in lost) else "error"
    )


def _node(context: StageContext) -> str:
    """The machine this worker is on: address and Ray's id, or the host's name."""
    if not context.starts_with_ray:
        return socket.gethostname()
    import ray

    return f"{ray.util.get_node_ip_address()} ({ray.get_runtime_context().get_node_id()[:8]})"


def _environment_integer(name: str) -> int:
    return int(os.environ[name])


def _end_with_parent() -> None:
    """Exit when standard input closes: the parent holds the other end, so even its SIGKILL ends this process."""
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> None:
    """`python -m polytrope.pipeline.stages.train.worker_process`, started by `workers`: the task comes through standard
    input, pickled; the rank is in the environment.
    """
    task = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, name="parent watch", daemon=True).start()
    train_worker(task)
    # No teardown: a peer may already be gone, and everything that counts is on disk.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
