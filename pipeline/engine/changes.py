"""Whether a run may go on as it was: what its finished stages returned, and what has changed since."""

from __future__ import annotations

from collections.abc import Mapping

from polytrope.pipeline.engine.inputs import input_sources, input_values
from polytrope.pipeline.engine.returned import with_stored
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import RESULT_STATES, RunState
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.workflow.graph import StageNode
from polytrope.pipeline.workflow.keys import explain, key_components, stage_key
from polytrope.pipeline.workflow.spec import Workflow


def check_finished(
    workflow: Workflow, graph: Mapping[str, StageNode], store: Store, state: RunState, *, allowed: bool
) -> list[str]:
    """Names of all stages of a run that goes on, with those that finished stages returned.

    Args:
        workflow: as it is now.
        graph: of the workflow.
        store: has the results.
        state: of the run so far.
        allowed: a finished stage may have changed; it is computed again.

    Raises:
        UserError: one has changed, naming it and what is other than before.
    """
    done = {name: stage.key for name, stage in state.stages.items() if stage.state in RESULT_STATES}
    try:
        _, grown = with_stored(workflow, graph, store, done)
    except UserError:
        if not allowed:
            raise
        return list(dict.fromkeys([*graph, *state.stages]))
    if not allowed:
        _refuse_changes(grown, store, state)
    return list(grown)


def _refuse_changes(graph: Mapping[str, StageNode], store: Store, state: RunState) -> None:
    digests: dict[str, str] = {}
    for name, node in graph.items():
        before = state.stages.get(name)
        if before is None or before.state not in RESULT_STATES or before.key is None:
            continue
        digests[name] = before.digest or ""
        components = key_components(node, input_values(node, digests))
        if stage_key(components) == before.key:
            continue
        stored = store.load(before.key)
        old = before.components or (stored.components if stored else {})
        unknown = {label for label in node.inputs if any(item not in digests for item in input_sources(node, label))}
        inputs = {label: old.get("inputs", {}).get(label) for label in unknown}
        if stage_key({**components, "inputs": {**components["inputs"], **inputs}}) == before.key:
            continue  # only that an input is not known to be finished: its line in the journal was damaged
        changes = explain(old, components) or ["its key changed"]
        raise UserError(
            f"run {state.run_id} cannot go on as it was: stage `{name}` is finished, but since then "
            + "; ".join(changes[:5]),
            f"`polytrope resume {state.run_id} --allow-code-change` computes it again; "
            "`polytrope run WORKFLOW` starts a new run that keeps what still fits",
        )
