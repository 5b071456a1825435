"""What a person may ask of one attempt at a run, and the names that go with it."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import Event
from polytrope.pipeline.runs.lease import DEFAULT_TTL
from polytrope.pipeline.support.files import safe_name
from polytrope.pipeline.workflow.graph import StageNode

Observer = Callable[[Event], None]
CANCEL_FILE = "cancel.json"  # in the run's directory: a request to cancel


@dataclass(frozen=True)
class RunOptions:
    """What a person may ask of one attempt.

    Args:
        force: stage or node names that are computed even if their result is stored.
        start_from: like `force` for this stage and everything that depends on it.
        verify: hash every stored artifact again before it is used.
        allow_code_change: resume although the code, parameters or inputs of a finished stage changed.
        faults: a fault plan, see `polytrope.pipeline.support.faults`.
        retry_delay: seconds before the first retry; doubled for every further one.
        lease_ttl: seconds without heartbeat after which another driver may take the run over.
        record: kept in the run's `workflow.json`: argv, overrides, environment record.
    """

    force: frozenset[str] = frozenset()
    start_from: str | None = None
    verify: bool = False
    allow_code_change: bool = False
    faults: str | None = None
    retry_delay: float = 1.0
    lease_ttl: float = DEFAULT_TTL
    record: Mapping[str, Any] = field(default_factory=dict)


def cancelled_by(directory: Path) -> str | None:
    """Who asked for the end of the run in this directory; None: nobody."""
    try:
        return str(json.loads((directory / CANCEL_FILE).read_text(encoding="utf-8")).get("by", "polytrope cancel"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError):  # it is being written, or by hand
        return "polytrope cancel"


def new_run_id() -> str:
    """Sortable by time, unique: `20261123-174501-3f9a2c`."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def checked_run_id(given: str | None) -> str:
    """The id of a run; None: a new one.

    Raises:
        UserError: it cannot be the name of the run's directory.
    """
    if given is None:
        return new_run_id()
    if not given or safe_name(given) != given:
        raise UserError(f"`{given}` cannot be a run id", "use letters, digits, `-` and `_`")
    return given


def check_names(graph: Mapping[str, StageNode], options: RunOptions) -> None:
    """Refuse options that name a stage which can never be there.

    Raises:
        UserError: naming it, and the stages that there are.
    """
    known = _stage_names(graph)
    for name in unknown_names(graph, options):
        if name.partition("/")[0] not in known:  # `split/part` may be known later
            raise UserError(f"there is no stage `{name}`", f"stages are {', '.join(sorted(known)[:20])}")


def unknown_names(graph: Mapping[str, StageNode], options: RunOptions) -> list[str]:
    """Stages that the options name and the graph does not have."""
    start = {options.start_from} if options.start_from else set()
    return sorted((options.force | start) - _stage_names(graph))


def forced_names(graph: Mapping[str, StageNode], options: RunOptions) -> set[str]:
    """Names of the nodes that are computed in any case."""
    forced = {name for name, node in graph.items() if name in options.force or node.spec_name in options.force}
    start = options.start_from
    behind = {name for name, node in graph.items() if start in (name, node.spec_name)} if start else set()
    for name, node in graph.items():
        if behind.intersection(node.dependencies):
            behind.add(name)
    return forced | behind


def _stage_names(graph: Mapping[str, StageNode]) -> set[str]:
    return {name for node in graph.values() for name in (node.name, node.spec_name)}
