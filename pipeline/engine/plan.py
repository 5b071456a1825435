"""What a run would do, stage by stage, and why: compares each stage's key with the store and with the last run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, Literal, Protocol

from polytrope.pipeline.engine.inputs import input_sources, input_values
from polytrope.pipeline.engine.schedule import Schedule
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.executors.base import Capacity, Usage
from polytrope.pipeline.runs.history import Past
from polytrope.pipeline.runs.journal import RESULT_STATES
from polytrope.pipeline.workflow.graph import StageNode, condition_holds
from polytrope.pipeline.workflow.keys import explain, key_components, stage_key

Action = Literal["hit", "run", "unknown", "skip"]
_FIRST = ("skip", "unknown", "run")  # what an upstream stage and the stage's own condition decide: the first counts


class Artifact(Protocol):
    """What a plan needs of `StoredArtifact`."""

    @property
    def digest(self) -> str: ...
    @property
    def components(self) -> Mapping[str, Any]: ...
    @property
    def summary(self) -> Mapping[str, float]: ...
    @property
    def run_id(self) -> str: ...
    @property
    def duration(self) -> float: ...


class ArtifactStore(Protocol):
    """What a plan needs of `Store`: the artifact with a key, verified (`find`) or as its manifest says (`load`)."""

    def find(self, key: str) -> Artifact | None: ...
    def load(self, key: str) -> Artifact | None: ...


@dataclass(frozen=True)
class PlannedStage:
    """One line of a plan.

    Args:
        name: of the node.
        action: hit (stored), run, skip (`when:`), unknown (depends on what an earlier stage makes).
        reasons: why, one or several short texts.
        key: None if an input is not known yet.
        predicted: seconds that the stage took last time, None if it never ran.
        repeats: it ran before with this very key, so the result is expected to be the same.
    """

    name: str
    action: Action
    reasons: list[str]
    key: str | None = None
    predicted: float | None = None
    repeats: bool = False


@dataclass(frozen=True)
class Plan:
    """All stages in order."""

    stages: dict[str, PlannedStage] = field(default_factory=dict)

    def count(self, *actions: Action) -> int:
        return sum(stage.action in actions for stage in self.stages.values())

    @property
    def to_run(self) -> list[PlannedStage]:
        """Stages that will or may run."""
        return [stage for stage in self.stages.values() if stage.action in ("run", "unknown")]

    def predicted(
        self, graph: Mapping[str, StageNode], capacity: Capacity | None = None, concurrency: int | None = None
    ) -> float | None:
        """Seconds until all stages have ended, started in order as soon as inputs and resources allow.

        Args:
            graph: the nodes.
            capacity: what running stages share; None: unlimited, which gives the longest path.
            concurrency: how many run at a time, at most.

        Returns:
            None if the duration of a stage that will run is not known.
        """
        seconds = {stage.name: 0.0 for stage in self.stages.values()}
        for stage in self.to_run:
            if stage.predicted is None:
                return None
            seconds[stage.name] = stage.predicted
        schedule, usage = Schedule(graph), Usage(capacity, concurrency)
        running: list[tuple[float, int, str]] = []  # heap of (when it ends, its place in the file, name)
        now = 0.0
        while True:
            while node := schedule.next_ready():
                if seconds[node.name] == 0.0:  # stored or skipped
                    schedule.end(node.name, "cached")
                else:
                    schedule.queue(node.name)
            while node := schedule.next_fitting(usage):
                usage.add(node.resources)
                heappush(running, (now + seconds[node.name], schedule.position(node.name), node.name))
            if not running:
                return now
            now, _, name = heappop(running)
            usage.remove(graph[name].resources)
            schedule.end(name, "succeeded")


def make_plan(
    graph: Mapping[str, StageNode],
    store: ArtifactStore,
    *,
    params: Mapping[str, Any] | None = None,
    history: Mapping[str, Iterable[Past]] | None = None,
    force: Collection[str] = (),
) -> Plan:
    """Compare every node with the store; nothing is written or started.

    Args:
        graph: from `build_graph`.
        store: the artifacts.
        params: the workflow's parameters, for `when:`.
        history: node name → its past, newest first, for the reasons and the predicted times.
        force: stage or node names that run in any case.
    """
    plan: dict[str, PlannedStage] = {}
    digests: dict[str, str] = {}
    summaries: dict[str, Mapping[str, float]] = {}
    for name, node in graph.items():
        past = list((history or {}).get(name, ()))
        predicted = next((item.duration for item in past if item.duration is not None), None)
        found = (_dependencies(node, plan, bool(past)), _condition(node, params or {}, plan, summaries))
        decided = min((item for item in found if item), key=lambda item: _FIRST.index(item[0]), default=None)
        if decided is not None:
            action, reasons = decided
            plan[name] = PlannedStage(name, action, reasons, None, predicted)
            continue
        components = key_components(node, input_values(node, digests))
        key = stage_key(components)
        artifact = store.find(key)
        if artifact is not None and name not in force and node.spec_name not in force:
            digests[name], summaries[name] = artifact.digest, artifact.summary
            plan[name] = PlannedStage(name, "hit", [f"stored by run {artifact.run_id}"], key, artifact.duration)
        else:
            reasons = ["forced"] if artifact is not None else _reasons(key, components, past, store)
            repeats = artifact is not None or any(item.key == key and item.state in RESULT_STATES for item in past)
            plan[name] = PlannedStage(name, "run", reasons, key, predicted, repeats)
    return Plan(plan)


def _dependencies(node: StageNode, plan: Mapping[str, PlannedStage], ran: bool) -> tuple[Action, list[str]] | None:
    """Whether an upstream stage that runs or is skipped decides already. `ran`: the stage has, at some time."""
    pending: list[str] = []
    for label in node.inputs:
        sources = input_sources(node, label)
        kind = node.definition.inputs[label]
        if kind == "required" and sources and plan[sources[0]].action == "skip":
            return "skip", [f"its input {label} comes from {sources[0]}, which is skipped"]
        if any(plan[source].action in ("run", "unknown") for source in sources):
            pending.append(label)
    if not pending:
        return None
    names = " and ".join(pending)
    upstream = [plan[source] for label in pending for source in input_sources(node, label)]
    if node.open and ran:
        return "unknown", [f"input {names} is what an earlier stage returns, some of it perhaps as before"]
    if any(stage.action == "run" and not stage.repeats for stage in upstream):
        return "run", [f"input {names} will be computed"]
    return "unknown", [f"input {names} will be computed again, perhaps with the same result"]


def _condition(
    node: StageNode,
    params: Mapping[str, Any],
    plan: Mapping[str, PlannedStage],
    summaries: Mapping[str, Mapping[str, float]],
) -> tuple[Action, list[str]] | None:
    if node.when is None:
        return None
    pending = [name for name in node.when_reads.values() if plan[name].action in ("run", "unknown")]
    if pending:
        return "unknown", [f"depends on `{node.when}`, known when {', '.join(pending)} has ended"]
    try:
        holds = condition_holds(node, params, summaries)
    except UserError as error:
        return "unknown", [error.message]  # the run fails this stage where it still holds then
    return None if holds else ("skip", [f"`when: {node.when}` does not hold"])


def _reasons(key: str, components: Mapping[str, Any], past: list[Past], store: ArtifactStore) -> list[str]:
    if not past:
        return ["first run"]
    same = [item for item in past if item.key == key]
    if same:
        if any(item.state in RESULT_STATES for item in same):
            return ["its artifact is missing or damaged"]
        return [f"did not finish in run {same[0].run_id} ({same[0].state})"]
    for item in past:
        before = item.components
        if before is None and item.key is not None and (artifact := store.load(item.key)) is not None:
            before = artifact.components
        if before is not None:
            return explain(before, components) or ["its key changed"]
    return [f"did not finish in run {past[0].run_id} ({past[0].state})"]
