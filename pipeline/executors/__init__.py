"""Where stages run: `local` (child processes) and `ray`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.executors.base import Executor, machine_capacity, refuse_impossible
from polytrope.pipeline.workflow.graph import StageNode


def make_executor(name: Literal["local", "ray"], address: str | None = None, wake: int | None = None) -> Executor:
    """The executor of that name. Nothing is started, and no Ray is imported, before a stage is submitted."""
    if name == "local":
        from polytrope.pipeline.executors.local import LocalExecutor

        return LocalExecutor(wake)
    if name == "ray":
        from polytrope.pipeline.executors.ray import RayExecutor

        return RayExecutor(address, wake)
    raise UserError(f"unknown executor `{name}`", "executors are `local` and `ray`")


def check_resources(graph: Mapping[str, StageNode], executor: Literal["local", "ray"], address: str | None) -> None:
    """Refuse stages that this machine could never hold; fast, without Ray.

    With an `address` the cluster is asked when it is joined, before the first stage starts.

    Raises:
        UserError: naming the stage's field, what it asks for, and what there is; or an address that does not answer.
    """
    if executor == "ray" and address not in (None, "local"):
        from polytrope.pipeline.executors.ray import check_address

        check_address(address)
        return
    refuse_impossible(graph.values(), machine_capacity(), "this machine")
