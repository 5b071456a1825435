"""Stages that stages returned (`stage.Stages`): read back from the artifacts, and made part of a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.executors.worker import read_returned_stages
from polytrope.pipeline.stage import RETURNED_STAGES
from polytrope.pipeline.store.manifest import StoredArtifact
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.workflow.graph import StageNode, build_graph, readers_of_returned
from polytrope.pipeline.workflow.spec import Workflow

Graph = dict[str, StageNode]
Expansion = tuple[Workflow, Graph]


def returned_stages(store: Store, artifact: StoredArtifact) -> dict[str, object] | None:
    """What was returned with this artifact; None if nothing was."""
    if all(entry["path"] != RETURNED_STAGES for entry in artifact.files):
        return None
    return read_returned_stages(store.materialize(artifact.key) / RETURNED_STAGES)


def with_returned(
    workflow: Workflow, graph: Mapping[str, StageNode], node: StageNode, stages: Mapping[str, object]
) -> tuple[Workflow, Graph]:
    """Workflow and graph with the stages that `node` returned.

    Raises:
        UserError: whatever is wrong with them, naming stage and field.
    """
    if node.branch:
        raise UserError("a stage with a matrix cannot return stages", "return them from a stage without `matrix:`")
    grown = workflow.with_stages(node.name, stages)
    return grown, build_graph(grown, known=graph)


def with_stored(
    workflow: Workflow, graph: Mapping[str, StageNode], store: Store, keys: Mapping[str, str | None]
) -> tuple[Workflow, Graph]:
    """The same for all stages whose results are stored, and for those that these returned.

    Args:
        workflow: of `graph`.
        graph: its nodes so far.
        store: the artifacts.
        keys: node name → key of its result; None: it has none.
    """
    grown = dict(graph)
    waiting = list(grown)
    while waiting:
        name = waiting.pop(0)
        key = keys.get(name)
        artifact = store.load(key) if key is not None and name not in workflow.returned else None
        stages = returned_stages(store, artifact) if artifact is not None and store.find(artifact.key) else None
        if stages is not None:
            workflow, grown = with_returned(workflow, grown, grown[name], stages)
            waiting += [further for further in grown if further.startswith(f"{name}/")]
    return workflow, grown


def expansion(
    workflow: Workflow,
    graph: Mapping[str, StageNode],
    node: StageNode,
    stages: Mapping[str, object] | None,
    admit: Callable[[Mapping[str, StageNode]], None],
) -> Expansion | None:
    """Workflow and graph with the stages that `node` returned just now; None: there is nothing new.

    Args:
        workflow: of `graph`.
        graph: its nodes so far.
        node: it has ended.
        stages: what it returned, by name; None: nothing.
        admit: refuses nodes that can never run.

    Raises:
        UserError: something is wrong with them, or there are none and others read them.
    """
    if node.name in workflow.returned:  # it came with them
        return None
    if stages is None:
        readers = readers_of_returned(workflow, [item for item in graph.values() if item.open], node.name)
        if readers:
            hint = f"return `Stages({{name: {{uses: …}}}})`, or let `{readers[0]}` read `{node.name}` itself"
            raise UserError(f"it returned no stages, but `{readers[0]}` reads some", hint)
        return None
    try:
        grown, nodes = with_returned(workflow, graph, node, stages)
        admit({name: item for name, item in nodes.items() if name not in graph})
    except UserError as error:
        raise UserError(f"the stages it returned: {error.message}", error.hint) from None
    return grown, nodes
