"""What the engine asks of an executor, and the check that a machine can hold what the stages ask for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.executors.worker import Outcome, StageTask
from polytrope.pipeline.stage import Resources
from polytrope.pipeline.workflow.graph import StageNode


class Executor(Protocol):
    """Runs stage tasks somewhere. Used by one thread only."""

    name: str

    @property
    def capacity(self) -> Capacity | None:
        """What all running stages may use together; None: the cluster queues by itself."""

    def prepare(self, nodes: Iterable[StageNode]) -> None:
        """Connect, and refuse what can never run; called before the first `submit`, and for stages that come later."""

    def has_started(self, identifier: int) -> bool:
        """Whether the task runs (True) or still queues for resources."""

    def submit(self, task: StageTask) -> None:
        """Start a task; its outcome comes out of `wait`."""

    def wait(self, timeout: float) -> list[tuple[int, Outcome]]:
        """(task identifier, outcome) of tasks that ended; waits up to `timeout` seconds for the first.

        Returns early, with an empty list, when a signal handler ran.
        """

    def cancel(self, identifier: int) -> None:
        """Kill a task with everything it started; its outcome (kind `cancelled`) comes out of `wait`."""

    def close(self) -> None:
        """Kill whatever still runs and free all resources."""


@dataclass(frozen=True)
class Capacity:
    """CPU cores and GPUs of a machine or cluster; memory in bytes, 0 if unknown."""

    cpus: float
    gpus: float
    memory: int = 0


@dataclass
class Usage:
    """What running stages have taken of a `capacity` (None: of one without limit), `concurrency` at a time at most."""

    capacity: Capacity | None = None
    concurrency: int | None = None
    running: int = 0
    cpus: float = 0.0
    gpus: float = 0.0

    @property
    def is_full(self) -> bool:
        """Whether no further stage can be started."""
        if self.concurrency is not None and self.running >= self.concurrency:
            return True
        return self.capacity is not None and self.running > 0 and self.cpus >= self.capacity.cpus

    def fits(self, resources: Resources) -> bool:
        """Whether a stage fits beside those that run; alone, any does: what never can was refused before."""
        if self.is_full:
            return False
        if self.running == 0 or self.capacity is None:
            return True
        cpus, gpus = needs(resources)
        return self.cpus + cpus <= self.capacity.cpus + 1e-9 and self.gpus + gpus <= self.capacity.gpus + 1e-9

    def add(self, resources: Resources) -> None:
        """A stage has started."""
        cpus, gpus = needs(resources)
        self.running += 1
        self.cpus += cpus
        self.gpus += gpus

    def remove(self, resources: Resources) -> None:
        """It has ended."""
        cpus, gpus = needs(resources)
        self.running -= 1
        self.cpus = self.cpus - cpus if self.running else 0.0  # no sum of rounding errors
        self.gpus = self.gpus - gpus if self.running else 0.0


def needs(resources: Resources) -> tuple[float, float]:
    """(CPU cores, GPUs) of a stage with all its workers."""
    return resources.workers * resources.cpus, resources.workers * resources.gpus


def machine_capacity() -> Capacity:
    """This machine's: cores this process may use, visible NVIDIA GPUs (without any library), physical memory."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = 0
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Capacity(float(cpus), float(_visible_gpus()), memory)


def _visible_gpus() -> int:
    try:
        found = len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        found = 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    return min(found, len([item for item in visible.split(",") if item.strip() not in ("", "-1", "NoDevFiles")]))


def refuse_impossible(nodes: Iterable[StageNode], capacity: Capacity, place: str) -> None:
    """Refuse a stage that could never start.

    Raises:
        UserError: naming the stage, what it asks for, and what there is.
    """
    for node in nodes:
        cpus, gpus = needs(node.resources)
        field = f"stages.{node.spec_name}.resources"
        if gpus > capacity.gpus:
            raise UserError(
                f"{field}: stage `{node.name}` asks for {gpus:g} GPUs"
                f" ({node.resources.workers} × {node.resources.gpus:g}), {place} has {capacity.gpus:g}",
                f"lower it (`--set {field}.gpus=0`) or run on a larger cluster (`ray_address:`)",
            )
        if cpus > capacity.cpus:
            raise UserError(
                f"{field}: stage `{node.name}` asks for {cpus:g} CPU cores"
                f" ({node.resources.workers} × {node.resources.cpus:g}), {place} has {capacity.cpus:g}",
                f"lower it (`--set {field}.cpus={max(capacity.cpus / node.resources.workers, 0.1):.3g}`)"
                " or run on a larger cluster (`ray_address:`)",
            )
        if capacity.memory and node.resources.workers * node.resources.memory > capacity.memory:
            raise UserError(
                f"{field}: stage `{node.name}` asks for {node.resources.workers * node.resources.memory / 2**30:.3g}"
                f" GiB of memory, {place} has {capacity.memory / 2**30:.3g} GiB",
                f"lower `{field}.memory` or run on a larger cluster (`ray_address:`)",
            )
