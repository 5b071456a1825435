"""The Ray executor: every stage is a Ray task, on a private cluster of this machine or on the one that is named.

Ray is imported and started with the first stage that must run, so that a run of cache hits costs nothing. Ray's own
retries are off: the engine decides. A cluster is joined only where the workflow names it (`ray_address:`).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.executors.base import Capacity, machine_capacity, needs, refuse_impossible
from polytrope.pipeline.executors.guard import GOODBYE
from polytrope.pipeline.graph import StageNode
from polytrope.pipeline.worker import (
    Outcome,
    StageError,
    StageTask,
    dump_task,
    hide_secrets_in_file,
    load_task,
    output_to,
    run_task,
)

_WORKER_PATIENCE = 30.0  # seconds that a cluster may have no CPU at all
_SLICE = 0.2  # seconds between two looks for a signal while waiting
_PATIENCE = 3.0  # seconds that a cancelled task gets to end before it is ended by force


def _cluster_resources(ray: Any) -> dict[str, float]:
    """What the cluster has. One without any CPU is still starting its workers, or this driver has not heard of them."""
    deadline = time.monotonic() + _WORKER_PATIENCE
    while "CPU" not in (total := ray.cluster_resources()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return dict(total)


def execute(data: bytes) -> Outcome:
    """The body of the Ray task."""
    task = load_task(data)
    with output_to(task.log):
        outcome = run_task(task)
    if not task.parallel and outcome.error is not None and outcome.error.type == "KeyboardInterrupt":
        raise SystemExit(0)  # cancelled: Ray ends this worker, and with it what the stage has started
    return outcome


class RayExecutor:
    """`address`: of an existing cluster, or None for a private one. `wake`: readable when a signal arrived."""

    name = "ray"

    def __init__(self, address: str | None = None, wake: int | None = None) -> None:
        self._address = address
        self._wake = wake
        self._capacity = machine_capacity() if address is None else None
        self._ray: Any = None
        self._functions: dict[bool, Any] = {}
        self._owned = False
        self._guard: subprocess.Popen[bytes] | None = None
        self._tasks: dict[int, StageTask] = {}
        self._references: dict[Any, int] = {}
        self._cancelled: dict[int, float] = {}  # identifier → when it is ended by force (monotonic clock)

    @property
    def capacity(self) -> Capacity | None:
        return self._capacity

    def prepare(self, nodes: Iterable[StageNode]) -> None:
        """Start or join the cluster.

        Raises:
            UserError: no cluster at the address, or one too small for a stage.
        """
        if self._ray is None:
            self._connect()
        total = _cluster_resources(self._ray)
        capacity = Capacity(total.get("CPU", 0.0), total.get("GPU", 0.0), int(total.get("memory", 0)))
        refuse_impossible(nodes, capacity, f"the Ray cluster {self._address}" if self._address else "this machine")

    def _connect(self) -> None:
        check_address(self._address)
        ray = _import_ray()
        if not ray.is_initialized():
            self._start_guard()
            try:
                _initialize(ray, self._address)
            except Exception as error:
                self._end_guard()
                place = self._address or "a private cluster on this machine"
                raise UserError(
                    f"Ray cannot be started or reached ({place}): {type(error).__name__}: {_first_line(error)}",
                    "check `ray_address:` and the cluster (`ray status`); if it asks for a token: RAY_AUTH_MODE=token;"
                    " `--executor local` needs no Ray",
                ) from error
            self._owned = True
        self._ray = ray
        # one of each for all tasks: Ray sends a function once, and keeps the workers that have it. A parallel stage has
        # a process of its own, since it may start process groups.
        self._functions = {False: ray.remote(execute), True: ray.remote(max_calls=1)(execute)}

    def submit(self, task: StageTask) -> None:
        cpus, gpus = needs(task.resources)
        options: dict[str, Any] = {"max_retries": 0, "name": f"polytrope:{task.stage}"}
        if task.parallel:  # its workers reserve what it asked for
            options.update(num_cpus=0, num_gpus=0)
        else:
            options.update(num_cpus=cpus, num_gpus=gpus)
            if task.resources.memory:
                options["memory"] = task.resources.workers * task.resources.memory
        reference = self._functions[task.parallel].options(**options).remote(dump_task(task))
        self._references[reference] = task.identifier
        self._tasks[task.identifier] = task

    def has_started(self, identifier: int) -> bool:
        return identifier in self._tasks and self._tasks[identifier].log.exists()

    def wait(self, timeout: float) -> list[tuple[int, Outcome]]:
        deadline = time.monotonic() + timeout
        while True:
            rest = max(0.0, deadline - time.monotonic())
            if not self._references:
                select.select([] if self._wake is None else [self._wake], [], [], rest)
                return []
            self._end_by_force()
            references = list(self._references)
            ready, _ = self._ray.wait(references, num_returns=1, timeout=min(_SLICE, rest))
            if ready:
                ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
                return [self._collect(reference) for reference in ready]
            signalled = self._wake is not None and bool(select.select([self._wake], [], [], 0)[0])
            if signalled or time.monotonic() >= deadline:
                return []

    def cancel(self, identifier: int) -> None:
        for reference, found in self._references.items():
            if found == identifier and identifier not in self._cancelled:
                self._cancelled[identifier] = time.monotonic() + _PATIENCE
                self._ray.cancel(reference)

    def _end_by_force(self) -> None:
        """What did not end when it was cancelled: code that is deep in a library, or ignores it.

        Not at once: Ray 2.60 ends this very process if a task is completed at the moment it is cancelled by force.
        """
        now = time.monotonic()
        for reference, identifier in self._references.items():
            if now >= self._cancelled.get(identifier, math.inf):
                self._cancelled[identifier] = math.inf
                if not self._ray.wait([reference], timeout=0)[0]:
                    self._ray.cancel(reference, force=True)

    def close(self) -> None:
        if self._ray is None:
            return
        for identifier in list(self._references.values()):
            self.cancel(identifier)
        if self._references:
            self._ray.wait(list(self._references), num_returns=len(self._references), timeout=_PATIENCE)
            self._cancelled = {identifier: min(due, 0.0) for identifier, due in self._cancelled.items()}
            self._end_by_force()
            self._ray.wait(list(self._references), num_returns=len(self._references), timeout=_PATIENCE)
        self._references.clear()
        if self._owned:
            self._ray.shutdown()
        self._end_guard()
        self._ray = None

    def _start_guard(self) -> None:
        """Before the private cluster: whatever becomes of this process or of Ray, no process of it stays."""
        if self._address in (None, "local") and os.path.isdir("/proc/self"):
            self._guard = subprocess.Popen(
                [sys.executable, "-m", "polytrope.pipeline.executors.guard", str(os.getpid())],
                stdin=subprocess.PIPE,
                start_new_session=True,
            )

    def _end_guard(self) -> None:
        if self._guard is not None:
            with contextlib.suppress(BrokenPipeError):
                self._guard.communicate(GOODBYE)
            self._guard = None

    def _collect(self, reference: Any) -> tuple[int, Outcome]:
        identifier = self._references.pop(reference)
        task = self._tasks.pop(identifier)
        try:
            outcome: Outcome = self._ray.get(reference)
        except Exception as error:
            outcome = Outcome(error=self._lost(error))
        if identifier in self._cancelled:
            del self._cancelled[identifier]
            outcome = Outcome(error=StageError("cancelled", "cancelled"))
        hide_secrets_in_file(task.log, task.secrets)
        return identifier, outcome

    def _lost(self, error: Exception) -> StageError:
        """What an exception of Ray itself says; those of the stage come as an `Outcome`."""
        exceptions = self._ray.exceptions
        kind = type(error).__name__
        if isinstance(error, exceptions.OutOfMemoryError):
            return StageError(
                "worker lost",
                "Ray ended the stage's process because the node was short of memory",
                "give the stage `resources.memory`, or run fewer stages at a time (`concurrency:`)",
                kind,
            )
        if isinstance(error, exceptions.TaskCancelledError):
            return StageError("worker lost", "the Ray task was cancelled from outside", "", kind)
        if isinstance(error, exceptions.RayTaskError):
            return StageError(
                "error",
                f"the stage could not be started on the Ray worker: {_first_line(error.cause)}",
                "is the same version of polytrope, and the stage's module, installed on every node?",
                kind,
                str(error),
            )
        return StageError("worker lost", f"the stage's Ray worker or node died: {_first_line(error)}", "", kind)


def check_address(address: str | None) -> None:
    """Refuse an address where nothing listens, in two seconds at most and without Ray.

    Raises:
        UserError: Ray Client addresses, malformed ones, and those that do not answer.
    """
    if address is None or address in ("auto", "local"):
        return
    if address.startswith(("ray://", "http://", "https://")):
        raise UserError(
            f"ray_address: `{address}` is not the address of a cluster's head (host:port)",
            f"run the driver on the cluster instead: `polytrope submit WORKFLOW --address {address}`",
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"ray_address: `{address}` is not `host:port`", "for example `ray_address: 10.0.0.1:6379`")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1.5).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"ray_address: no Ray cluster answers at {address}: {error}",
            "start one with `ray start --head`, mend the address, or leave it out for a private cluster",
        ) from error


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    import ray.exceptions

    return ray


def _initialize(ray: Any, address: str | None) -> None:
    common: dict[str, Any] = {
        "log_to_driver": False,  # stages write to their own logs
        "logging_level": logging.ERROR,
        "namespace": f"polytrope-{os.getpid()}",
    }
    if address is None or address == "local":
        capacity = machine_capacity()
        ray.init(address="local", include_dashboard=False, num_cpus=int(capacity.cpus), **common)
    else:
        ray.init(address=address, **common)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
