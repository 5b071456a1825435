"""The executors by name, and what there is to know of each before one is made. To add one, add a row.

It stands this low because the workflow file, the stages, the engine and the command line all speak of executors.
"""

from __future__ import annotations

from typing import NamedTuple

from polytrope.pipeline.errors import UserError


class ExecutorKind(NamedTuple):
    """One row.

    Args:
        factory: `module:class`, called with (address, descriptor that becomes readable when a signal arrives).
        joins_cluster: follows `ray_address:`, so that its stages may run on other hosts.
        starts_with_ray: what a stage does in parallel goes to Ray, to which its process is connected; otherwise to
            child processes of the stage.
        summary: for help texts.
    """

    factory: str
    joins_cluster: bool
    starts_with_ray: bool
    summary: str

    def is_here(self, address: str | None) -> bool:
        """Whether everything runs on this machine, with this `ray_address:`."""
        return not self.joins_cluster or address in (None, "local")


EXECUTORS = {
    "ray": ExecutorKind("polytrope.pipeline.executors.ray:RayExecutor", True, True, "tasks of a Ray cluster"),
    "local": ExecutorKind(
        "polytrope.pipeline.executors.local:LocalExecutor", False, False, "child processes on this machine"
    ),
}
DEFAULT_EXECUTOR = "ray"


def executor_kind(name: str) -> ExecutorKind:
    """The row of an executor.

    Raises:
        UserError: there is none of this name.
    """
    if name not in EXECUTORS:
        raise UserError(f"unknown executor `{name}`", f"executors are {' and '.join(f'`{one}`' for one in EXECUTORS)}")
    return EXECUTORS[name]
