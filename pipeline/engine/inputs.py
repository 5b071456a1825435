"""What a node reads once the nodes before it have ended, and whether it is skipped for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from polytrope.pipeline.workflow.graph import StageNode, condition_holds

Item = TypeVar("Item")


def input_values(node: StageNode, ended: Mapping[str, Item]) -> dict[str, Item | dict[str, Item] | None]:
    """Input name → what `ended` holds for the node behind it.

    An optional input that is absent or was skipped is None; a skipped branch of a fan-in is left out.
    """
    result: dict[str, Item | dict[str, Item] | None] = {}
    for label, value in node.inputs.items():
        if isinstance(value, dict):
            result[label] = {branch: ended[name] for branch, name in value.items() if name in ended}
        else:
            result[label] = ended.get(value) if value else None
    return result


def input_sources(node: StageNode, label: str) -> list[str]:
    """Names of the nodes behind one input."""
    value = node.inputs[label]
    return [value] if isinstance(value, str) else list((value or {}).values())


class HasSummary(Protocol):
    """A result, as far as `when:` reads it."""

    @property
    def summary(self) -> Mapping[str, float]: ...


def skip_reason(
    node: StageNode, ended: Mapping[str, str], artifacts: Mapping[str, HasSummary], params: Mapping[str, Any]
) -> str | None:
    """Why the node is skipped, or None.

    Args:
        node: its dependencies have ended.
        ended: node name → state in which it ended.
        artifacts: node name → its result.
        params: of the workflow, for `when:`.

    Raises:
        UserError: the condition cannot be told.
    """
    for label, value in node.inputs.items():
        required = node.definition.inputs.get(label) == "required"
        if required and isinstance(value, str) and ended.get(value) == "skipped":
            return f"its input {label} comes from `{value}`, which was skipped"
    summaries = {name: artifact.summary for name, artifact in artifacts.items()} if node.when else {}
    return None if condition_holds(node, params, summaries) else f"`when: {node.when}` does not hold"
