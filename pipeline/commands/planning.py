"""`polytrope plan` and `explain`: what a run would do and why, without starting anything."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Mapping

from polytrope.pipeline.commands.common import open_store, print_json, print_table, say, workflow_of
from polytrope.pipeline.engine.plan import Plan, PlannedStage, make_plan
from polytrope.pipeline.engine.returned import with_stored
from polytrope.pipeline.errors import EXIT_SUCCESS, UserError
from polytrope.pipeline.executors.base import machine_capacity
from polytrope.pipeline.runs.history import Past, stage_history
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.support.executor_table import executor_kind
from polytrope.pipeline.support.text import count, format_duration, suggest
from polytrope.pipeline.workflow.graph import StageNode, build_graph
from polytrope.pipeline.workflow.spec import Workflow

_WORDS = {"hit": "stored", "run": "will run", "skip": "skipped", "unknown": "may run"}


def plan(options: argparse.Namespace) -> int:
    """A line per stage: stored, will run, may run or skipped, and why."""
    workflow = workflow_of(options)
    store = open_store(options, workflow)
    graph, result, _ = _plan(workflow, store, options.force)
    check_stages(options.force, graph, "--force")
    here = executor_kind(workflow.executor).is_here(workflow.ray_address)
    predicted = result.predicted(graph, machine_capacity() if here else None, workflow.concurrency)
    if options.json:
        stages = [
            {"stage": stage.name, "action": stage.action, "reasons": stage.reasons, "key": stage.key,
             "predicted_seconds": stage.predicted}
            for stage in result.stages.values()
        ]  # fmt: skip
        print_json(
            {"workflow": workflow.name, "store": store.address, "predicted_seconds": predicted, "stages": stages}
        )
        return EXIT_SUCCESS
    print_table(["stage", "plan", "last time", "because"], [_row(stage) for stage in result.stages.values()])
    say(f"\n{_conclusion(result, predicted)}; store {store.address}")
    return EXIT_SUCCESS


def explain(options: argparse.Namespace) -> int:
    """Everything that changed for one stage."""
    workflow = workflow_of(options)
    store = open_store(options, workflow)
    graph, result, history = _plan(workflow, store)
    check_stages([options.stage], graph, "STAGE")
    for stage in result.stages.values():
        if options.stage in (stage.name, graph[stage.name].spec_name):
            say(f"{stage.name}: {_WORDS[stage.action]}")
            for reason in stage.reasons:
                say(f"  {reason}")
            past = history.get(stage.name)
            if past:
                say(f"  compared with run {past[0].run_id}")
            if stage.key:
                print(f"  key {stage.key}")
    return EXIT_SUCCESS


def _plan(
    workflow: Workflow, store: Store, force: Collection[str] = ()
) -> tuple[dict[str, StageNode], Plan, dict[str, list[Past]]]:
    """The graph with what stored stages returned, its plan, and the past of its stages."""
    graph = build_graph(workflow)
    while True:
        history = stage_history(store.run_directories(), workflow.name, graph)
        result = make_plan(graph, store, params=workflow.params, history=history, force=force)
        stored = {stage.name: stage.key for stage in result.stages.values() if stage.action == "hit"}
        before = len(workflow.returned)
        workflow, graph = with_stored(workflow, graph, store, stored)
        if len(workflow.returned) == before:
            return graph, result, history


def check_stages(names: Iterable[str], graph: Mapping[str, StageNode], said: str) -> None:
    """Refuse names that are neither a node nor a stage of the file; `said`: where they were given."""
    known = {name for node in graph.values() for name in (node.name, node.spec_name)}
    for name in names:
        if name not in known:
            raise UserError(f"{said} {name}: there is no stage `{name}`", suggest(name, known))


def _row(stage: PlannedStage) -> list[str]:
    seconds = "" if stage.predicted is None else format_duration(stage.predicted)
    text = "; ".join(stage.reasons[:3])
    if len(stage.reasons) > 3:
        text += f"; and {len(stage.reasons) - 3} more (`polytrope explain` lists them)"
    return [stage.name, _WORDS[stage.action], seconds, text]


def _conclusion(result: Plan, predicted: float | None) -> str:
    total, running = len(result.stages), result.count("run", "unknown")
    if not running:
        return f"{'the one stage is' if total == 1 else f'all {total} stages are'} stored: nothing to run"
    time = "" if predicted is None else f", about {format_duration(predicted)} by the last runs' times"
    return f"{running} of {count(total, 'stage')} will run{time}"
