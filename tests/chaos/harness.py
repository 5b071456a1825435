"""Runs the small DAG in processes that may die, and compares what is left with an undisturbed run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

from polytrope.pipeline.engine import run as engine
from polytrope.pipeline.engine.options import RunOptions
from polytrope.pipeline.engine.run import run_workflow
from polytrope.pipeline.errors import RunElsewhereError, UserError
from polytrope.pipeline.executors.base import Capacity
from polytrope.pipeline.executors.worker import Outcome, StageError, StageTask, dump_task, load_task, run_task
from polytrope.pipeline.runs.journal import fold, read
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.workflow.graph import StageNode, build_graph
from polytrope.pipeline.workflow.spec import Workflow

EXIT = {"succeeded": 0, "failed": 1, "cancelled": 130}
USER_ERROR, ELSEWHERE, BUG = 2, 3, 99
LONGEST = 100  # seconds of one attempt


def small_workflow(root: Path, *, seconds: float = 0.0, executor: str = "local", returned: bool = False) -> Workflow:
    """`returned`: the stages are not in the file, a first stage returns them."""
    calls = {"calls": str(root / "calls")}
    module = "chaos_stages"
    stages: dict[str, Any] = {
        "text": {"uses": f"{module}:write", "with": {"text": "hello", "seconds": seconds, **calls}},
        "count": {
            "uses": f"{module}:count",
            "inputs": {"source": "text"},
            "matrix": {"steps": [2, 3]},
            "with": {"steps": "$" * returned + "${matrix.steps}", "seconds": seconds, **calls},
        },
        "join": {"uses": f"{module}:join", "inputs": {"parts": ["text", "count"]}, "with": calls},
    }
    for stage in stages.values():
        stage["resources"] = {"cpus": 0.5}
    if returned:
        first = {"uses": f"{module}:return_stages", "with": {"stages": stages, **calls}}
        last = {"uses": f"{module}:join", "inputs": {"parts": "first/*"}, "with": calls}
        stages = {"first": first, "last": last}
    return Workflow.from_dict({"name": "chaos", "executor": executor, "stages": stages}, directory=root)


class InlineExecutor:
    """Runs a stage in the driver's own process: a crash test can then try hundreds of points in seconds."""

    name = "local"

    def __init__(self, *_: object) -> None:
        self.tasks: deque[StageTask] = deque()
        self.cancelled: list[int] = []
        self.capacity = Capacity(1, 0)

    def prepare(self, nodes: Iterable[StageNode]) -> None:
        pass

    def has_started(self, identifier: int) -> bool:
        return all(task.identifier != identifier for task in self.tasks)

    def submit(self, task: StageTask) -> None:
        self.tasks.append(load_task(dump_task(task)))

    def wait(self, timeout: float) -> list[tuple[int, Outcome]]:
        if self.cancelled:
            ended, self.cancelled = self.cancelled, []
            return [(identifier, Outcome(error=StageError("cancelled", "cancelled"))) for identifier in ended]
        if not self.tasks:
            time.sleep(min(timeout, 0.01))
            return []
        task = self.tasks.popleft()
        return [(task.identifier, run_task(task))]

    def cancel(self, identifier: int) -> None:
        self.tasks = deque(task for task in self.tasks if task.identifier != identifier)
        self.cancelled.append(identifier)

    def close(self) -> None:
        self.tasks.clear()


def in_a_process(action: Callable[[], int]) -> int:
    """Fork, run `action`, and return its exit status (negative: the signal that killed it)."""
    return os.waitstatus_to_exitcode(os.waitpid(start_process(action), 0)[1])


def start_process(action: Callable[[], int]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = BUG
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(LONGEST)  # a driver that hangs is found, and does not outlive the tests
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        if not os.environ.get("CHAOS_VERBOSE"):
            os.dup2(null, 2)
        status = action()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def drive(
    root: Path,
    *,
    run_id: str = "run",
    faults: str | None = None,
    inline: bool = True,
    ttl: float = 15.0,
    store: str | None = None,
    **fields: Any,
) -> int:
    """One attempt at the small DAG in this process, with its store below `root` or at an address; an exit code."""
    if inline:
        engine.make_executor = InlineExecutor  # type: ignore[assignment]
    workflow = small_workflow(root, **fields)
    try:
        state = run_workflow(
            workflow,
            build_graph(workflow),
            Store(store or root / "store"),
            run_id=run_id,
            options=RunOptions(faults=faults, retry_delay=0.01, lease_ttl=ttl),
        )
    except RunElsewhereError as error:
        (root.parent / f"message-{root.name}-{os.getpid()}").write_text(str(error))
        return ELSEWHERE
    except UserError as error:
        (root.parent / f"message-{root.name}-{os.getpid()}").write_text(str(error))
        return USER_ERROR
    return EXIT[state.status]


def digests(root: Path, run_id: str = "run") -> dict[str, str | None]:
    """Stage → digest of the run, after a full verification of each artifact."""
    store = Store(root / "store")
    state = fold(read(store.run_directory(run_id)))
    for stage in state.stages.values():
        assert stage.key is not None, f"{stage.name} has no key"
        assert store.verify(stage.key) == []
    return {name: stage.digest for name, stage in state.stages.items()}


def committed(root: Path) -> dict[str, float]:
    """Key → time of its commit."""
    store = Store(root / "store")
    found = {key: store.load(key) for key in store.keys()}  # noqa: SIM118
    return {key: artifact.committed for key, artifact in found.items() if artifact is not None}


def calls(root: Path) -> Counter[str]:
    path = root / "calls"
    return Counter(path.read_text().split() if path.exists() else [])


def messages(root: Path) -> list[str]:
    return [path.read_text() for path in root.parent.glob(f"message-{root.name}-*")]


def leftovers(root: Path) -> list[str]:
    """What should not be in a store after a run that succeeded."""
    store = root / "store"
    return [
        path.relative_to(store).as_posix()
        for name in ("staging", "scratch", "leases")
        for path in (store / name).iterdir()
    ]


def end_of(pids: Iterable[int], seconds: float = 20) -> list[int]:
    """Those of `pids` that still run after `seconds`."""
    deadline = time.monotonic() + seconds
    left = list(pids)
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if psutil.pid_exists(pid) and _status(pid) != psutil.STATUS_ZOMBIE]
        time.sleep(0.05)
    return left


def _status(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return str(psutil.STATUS_ZOMBIE)


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
