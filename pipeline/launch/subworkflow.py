"""The `subworkflow` stage: run another workflow as one stage. Its file may be the output of an earlier stage, so that
a stage can decide at run time what follows (dynamic stages):

    design:                       # writes workflow.yaml below context.output
      uses: my_package.search:design
    explore:
      uses: subworkflow
      inputs: {workflow: design}
      with: {outputs: [best]}

The inner stages are committed to the same store, each under its own key: after a crash only the missing ones run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, StageContext, stage

if TYPE_CHECKING:
    from polytrope.pipeline.workflow.graph import StageNode
    from polytrope.pipeline.workflow.spec import Workflow


class SubworkflowParameters(BaseModel):
    """Which workflow, and what of it becomes this stage's artifact."""

    model_config = ConfigDict(extra="forbid")

    path: str | None = Field(None, description="the workflow file, relative to this one; not with the input `workflow`")
    file: str = Field("workflow.yaml", description="name of the file in the input `workflow`")
    set: list[str] = Field([], description="as `--set`: `params.steps=50`")
    outputs: list[str] = Field([], description="stages whose files are kept, as STAGE/…; default: those nothing reads")


def _check(parameters: SubworkflowParameters, upstream: Mapping[str, Any]) -> None:
    if (parameters.path is None) == (upstream["workflow"] is None):
        raise UserError("give either the parameter `path` or the input `workflow`")


def _fingerprint(parameters: SubworkflowParameters, directory: Path) -> dict[str, str]:
    """Everything that decides the inner results; a file that an earlier stage writes is known by its digest."""
    if parameters.path is None:
        return {}
    from polytrope.pipeline.workflow.encoding import encode
    from polytrope.pipeline.workflow.keys import key_components, stage_key

    inner, graph = _load(directory / parameters.path, parameters, directory)
    unknown: dict[str, str | dict[str, str] | None]
    components = {}
    for name, node in graph.items():
        unknown = {label: repr(value) for label, value in node.inputs.items()}
        components[name] = key_components(node, unknown)
        if node.when is not None:  # and what else decides whether there is this stage
            components[name]["when"] = [node.when, encode(inner.params, "params"), encode(node.matrix, "matrix")]
    return {"workflow": stage_key(components)}


@stage(parallel=True, cpu_only=True, check=_check, fingerprint=_fingerprint)
def subworkflow(
    context: StageContext, parameters: SubworkflowParameters, workflow: Artifact | None = None
) -> dict[str, float]:
    """Run another workflow, from a file or from the output of an earlier stage, and keep its results."""
    from polytrope.pipeline.launch.launch import launch
    from polytrope.pipeline.runs.journal import Event
    from polytrope.pipeline.store.store import Store

    path = Path(parameters.path) if workflow is None else workflow.path / parameters.file  # type: ignore[arg-type]
    inner, graph = _load(path, parameters, Path.cwd())
    store = Store(context.store)
    ended = 0

    def show(event: Event) -> None:
        nonlocal ended
        if event.stage is not None and event.type in ("stage_succeeded", "stage_cached", "stage_skipped"):
            ended += 1
            context.progress(ended, len(graph), f"{event.stage} {event.type.removeprefix('stage_')}")

    run_id = f"{context.run_id}-{context.key[:12]}"
    state = launch(
        inner, executor=context.executor, store=context.store, run_id=run_id, tracking=False, observer=show, graph=graph
    )
    if state.status != "succeeded":
        failed = [f"`{name}`: {(item.error or {}).get('message')}" for name, item in state.stages.items() if item.error]
        raise RuntimeError(f"the inner run {run_id} {state.status}: {'; '.join(failed) or state.error}")
    if lost := [name for name, item in state.stages.items() if item.left_out]:
        raise UserError(  # the key says what was to be computed, not what failed on the way
            f"the inner stage `{lost[0]}` failed and was left out ({state.stages[lost[0]].reason}), so the result of "
            f"`{context.stage}` would not be what its key says",
            f"mend it and resume; its own run is {run_id}. Where failures are to be left out, write these stages into "
            "the outer workflow",
        )
    read = {source for node in graph.values() for source in node.input_nodes}
    for name in parameters.outputs or [name for name in graph if name not in read]:
        if state.stages[name].state == "skipped":
            _say_skipped(context, name, str(state.stages[name].reason), asked=name in parameters.outputs)
            continue
        artifact = store.find(state.stages[name].key or "")
        if artifact is None:
            raise RuntimeError(f"the result of the inner stage `{name}` is no longer in the store")
        shutil.copytree(store.materialize(artifact.key), context.output / name, copy_function=shutil.copy)
        for directory, _, _ in os.walk(context.output / name):  # read-only as in the store, and more may go into it
            os.chmod(directory, 0o755)
    return {f"{name}/{key}": value for name, item in state.stages.items() for key, value in item.summary.items()}


def _say_skipped(context: StageContext, name: str, reason: str, *, asked: bool) -> None:
    """A stage that left nothing to keep. `asked`: it stands in `outputs`."""
    if asked:
        raise UserError(
            f"outputs: the inner stage `{name}` was skipped ({reason}), so there is nothing of it to keep",
            f"take `{name}` out of `outputs`, or give `{context.stage}` the same condition as `when:`",
        )
    context.note(f"the inner stage `{name}` was skipped ({reason}): nothing of it is kept")


def _load(path: Path, parameters: SubworkflowParameters, directory: Path) -> tuple[Workflow, dict[str, StageNode]]:
    from polytrope.pipeline.support.text import suggest
    from polytrope.pipeline.workflow.graph import build_graph
    from polytrope.pipeline.workflow.spec import load_workflow

    inner = load_workflow(path, parameters.set, directory=directory)
    graph = build_graph(inner)
    for name in parameters.outputs:
        if name not in graph:
            raise UserError(f"outputs: {os.path.relpath(path)} has no stage `{name}`", suggest(name, graph))
    return inner, graph
