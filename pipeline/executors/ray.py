"""The Ray executor: every stage is a Ray task, on a private cluster of this machine or on the one that is named.

Ray is imported and started with the first stage that must run, so that a run of cache hits costs nothing. Ray's own
retries are off: the engine decides. A cluster is joined only where the workflow names it (`ray_address:`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable
from typing import Any

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.executors.address import check_address
from polytrope.pipeline.executors.base import Capacity, machine_capacity, needs, refuse_impossible
from polytrope.pipeline.executors.guard import GOODBYE
from polytrope.pipeline.executors.nursery import GRACE
from polytrope.pipeline.executors.ray_signals import handlers_kept
from polytrope.pipeline.executors.ray_task import NAMESPACE, PATIENCE, execute
from polytrope.pipeline.executors.worker import Outcome, StageError, StageTask, dump_task
from polytrope.pipeline.workflow.graph import StageNode

_WORKER_PATIENCE = 30.0  # seconds that a cluster may have no CPU at all
_SLICE = 0.2  # seconds between two looks for a signal while waiting


def _cluster_resources(ray: Any) -> dict[str, float]:
    """What the cluster has. One without any CPU is still starting its workers, or this driver has not heard of them."""
    deadline = time.monotonic() + _WORKER_PATIENCE
    while "CPU" not in (total := ray.cluster_resources()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return dict(total)


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
        self._cancelled: dict[int, float] = {}  # identifier → when (monotonic clock)
        self._name = uuid.uuid4().hex

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
        submitted = time.time() if self._address is None else 0.0  # other hosts have other clocks
        function = self._functions[task.parallel].options(**options)
        reference = function.remote(dump_task(task), self._mark(task.identifier), submitted)
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
            if dropped := self._drop_waiting():
                return dropped
            references = list(self._references)
            ready, _ = self._ray.wait(references, num_returns=1, timeout=min(_SLICE, rest))
            if ready:
                ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
                return [self._collect(reference) for reference in ready]
            signalled = self._wake is not None and bool(select.select([self._wake], [], [], 0)[0])
            if signalled or time.monotonic() >= deadline:
                return []

    def cancel(self, identifier: int) -> None:
        if identifier in self._tasks and identifier not in self._cancelled:
            from ray.experimental import internal_kv

            self._cancelled[identifier] = time.monotonic()
            internal_kv._internal_kv_put(self._mark(identifier), b"", namespace=NAMESPACE)

    def _mark(self, identifier: int) -> bytes:
        return f"cancel/{self._name}/{identifier}".encode()

    def _drop_waiting(self) -> list[tuple[int, Outcome]]:
        """Cancelled tasks that still queue for resources: whenever they start, they find their mark and end."""
        latest = time.monotonic() - PATIENCE
        found = [item for item, when in self._cancelled.items() if when < latest and not self.has_started(item)]
        for identifier in found:
            del self._cancelled[identifier], self._tasks[identifier]
        self._references = {key: item for key, item in self._references.items() if item not in found}
        return [(identifier, Outcome(error=StageError("cancelled", "cancelled"))) for identifier in found]

    def close(self) -> None:
        if self._ray is None:
            return
        for identifier in list(self._references.values()):
            self.cancel(identifier)
        deadline = time.monotonic() + GRACE + 2 * PATIENCE
        while self._references and time.monotonic() < deadline:
            self.wait(_SLICE)
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
        del self._tasks[identifier]
        try:
            outcome: Outcome = self._ray.get(reference)
        except Exception as error:
            outcome = Outcome(error=self._lost(error))
        if self._cancelled.pop(identifier, None) is not None:
            from ray.experimental import internal_kv

            internal_kv._internal_kv_del(self._mark(identifier), namespace=NAMESPACE)
            outcome = Outcome(error=StageError("cancelled", "cancelled"))
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
    with handlers_kept():
        if address is None or address == "local":
            capacity = machine_capacity()
            ray.init(address="local", include_dashboard=False, num_cpus=int(capacity.cpus), **common)
        else:
            ray.init(address=address, **common)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
