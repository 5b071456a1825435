"""Where stages run: the executors of `support.executor_table`, made by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from polytrope.pipeline.executors.base import Executor, machine_capacity, refuse_impossible
from polytrope.pipeline.support.executor_table import executor_kind
from polytrope.pipeline.workflow.graph import StageNode


def make_executor(name: str, address: str | None = None, wake: int | None = None) -> Executor:
    """The executor of that name. Nothing is started, and no Ray is imported, before a stage is submitted.

    Args:
        name: from the table.
        address: of the cluster to join, where it joins one.
        wake: a descriptor that becomes readable when a signal arrived.

    Raises:
        UserError: there is none of this name.
    """
    module, factory = executor_kind(name).factory.split(":")
    executor: Executor = getattr(importlib.import_module(module), factory)(address, wake)
    return executor


def check_resources(graph: Mapping[str, StageNode], executor: str, address: str | None) -> None:
    """Refuse stages that this machine could never hold; fast, without Ray.

    With an `address` the cluster is asked when it is joined, before the first stage starts.

    Raises:
        UserError: naming the stage's field, what it asks for, and what there is; or an address that does not answer.
    """
    if executor_kind(executor).is_here(address):
        refuse_impossible(graph.values(), machine_capacity(), "this machine")
    else:
        from polytrope.pipeline.executors.address import check_address

        check_address(address)
