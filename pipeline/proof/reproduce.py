"""Compute a recorded run again in a store of its own, compare every result, and find the first thing that differs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from polytrope.pipeline.engine.options import new_run_id
from polytrope.pipeline.engine.returned import with_stored
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.launch.environment import compare_environments
from polytrope.pipeline.launch.launch import Display, launch
from polytrope.pipeline.runs.journal import RunState, StageState, fold, read
from polytrope.pipeline.store.manifest import StoredArtifact
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.support.text import suggest
from polytrope.pipeline.workflow.graph import StageNode, build_graph
from polytrope.pipeline.workflow.keys import explain
from polytrope.pipeline.workflow.spec import Workflow

Verdict = Literal["identical", "taken over", "measured", "within tolerance", "different", "not computed", "no result"]
# What a clock or another program's load decides is not a result.
_MEASURED = re.compile(r"second|duration|(^|[/_])time|memory|throughput|latency", re.IGNORECASE)


@dataclass(frozen=True)
class Comparison:
    """One stage, then and now.

    Args:
        stage: its name.
        verdict: `taken over`: not computed again, its stored bytes were used (`--stage`). `measured`: it holds times
            or shows those of a stage before it, and nothing else that decides it differs. `no result`: then and now.
        before: digest then. after: digest now.
        files: those that differ.
        metrics: `name: then → now` of the summary metrics beyond the tolerance.
        causes: what differs in what decides the result: code, parameters, data, or the environment.
        code_or_data: the causes are not only the environment's.
        excused: the environment differs and nothing else: equality of bytes cannot be asked for.
        harmless: what differs although the result is the same.
    """

    stage: str
    verdict: Verdict
    before: str | None
    after: str | None
    files: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    code_or_data: bool = False
    excused: bool = False
    harmless: list[str] = field(default_factory=list)

    @property
    def accepted(self) -> bool:
        return self.verdict in ("identical", "taken over", "measured", "no result") or (
            self.verdict == "within tolerance" and self.excused
        )


def reproduce_run(
    store: Store,
    directory: Path,
    place: Path,
    *,
    stage: str | None = None,
    executor: str | None = None,
    tolerance: float = 1e-3,
    display: Display = "none",
) -> list[Comparison]:
    """Run a run's workflow again and compare, stage by stage in the order of the DAG.

    Args:
        store: that holds the run.
        directory: of the run; nothing is changed there.
        place: the new store; must not exist.
        stage: compute only this one, on the recorded results of those before it.
        executor: by default the recorded one.
        tolerance: relative difference of summary metrics that is accepted where bytes cannot be equal.
        display: see `launch`.

    Raises:
        UserError: nothing to reproduce, unknown stage, a place that exists, or whatever `run` refuses.
    """
    record = _record(directory)
    before = fold(read(directory))
    if not any(item.digest for item in before.stages.values()):
        raise UserError(f"run {directory.name} has no finished stage to compare with", "name another run")
    if place.exists():
        raise UserError(f"--into {place}: exists already", "name a new directory: the results must be computed anew")
    workflow = _workflow(record)
    graph = build_graph(workflow)
    done = {name: item.key for name, item in before.stages.items() if item.digest}
    grown, compared = with_stored(workflow, graph, store, done)
    if stage is not None:
        workflow, graph = grown, compared
        computed = {name for name, node in graph.items() if stage in (name, node.spec_name)}
        if not computed:
            raise UserError(f"--stage {stage}: run {directory.name} has no such stage", suggest(stage, list(graph)))
        graph = compared = _needed(graph, computed)
        _take_over(store, Store(place), before, [name for name in graph if name not in computed])
    state = launch(
        workflow,
        executor=executor or record.get("executor"),
        store=place,
        run_id=new_run_id(),
        tracking=False,
        display=display,
        overrides=record.get("overrides", []),
        graph=graph,
    )
    now = _record(Store(place).run_directory(state.run_id)).get("environment") or {}
    rows: dict[str, Comparison] = {}
    for name, node in compared.items():
        if name in state.stages:
            row = _compare(store, Store(place), name, before.stages.get(name), state, now, tolerance)
            rows[name] = _excuse_times(row, node, rows)
    return list(rows.values())


def _excuse_times(row: Comparison, node: StageNode, rows: Mapping[str, Comparison]) -> Comparison:
    """`measured` for a stage that measures times, and for one that differs only by the results of such stages."""
    if row.verdict not in ("different", "within tolerance"):
        return row
    if node.definition.options.measured:
        return row if row.code_or_data else replace(row, verdict="measured")
    times = [
        f"input {key} changed"
        for key, value in node.inputs.items()
        if isinstance(value, str) and value in rows and rows[value].verdict == "measured"
    ]
    only_times = bool(times) and all(cause.startswith(tuple(times)) for cause in row.causes)
    return replace(row, verdict="measured") if only_times and not row.metrics else row


def _record(directory: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((directory / "workflow.json").read_bytes()))
    except (OSError, ValueError) as error:
        raise UserError(f"run {directory.name}: workflow.json cannot be read: {error}") from None


def _workflow(record: Mapping[str, Any]) -> Workflow:
    directory = Path(record.get("directory") or Path.cwd())
    if not directory.is_dir():
        raise UserError(
            f"the directory {directory}, in which the run was started, is gone", "its relative paths start there"
        )
    source = record.get("source")
    return Workflow.from_dict(record["workflow"], directory=directory, source=Path(source) if source else None)


def _needed(graph: Mapping[str, StageNode], names: Iterable[str]) -> dict[str, StageNode]:
    """`names` and all they depend on, in the order of the graph."""
    wanted, waiting = set[str](), list(names)
    while waiting:
        name = waiting.pop()
        if name not in wanted:
            wanted.add(name)
            waiting += graph[name].dependencies
    return {name: node for name, node in graph.items() if name in wanted}


def _take_over(store: Store, place: Store, state: RunState, names: Iterable[str]) -> None:
    """Bring the intact artifacts of these stages into the new store."""
    place.create()
    for name in names:
        stage = state.stages.get(name)
        if stage is None or stage.key is None or store.verify(stage.key):
            continue  # gone or damaged: it is computed again
        place.copy_from(store, stage.key)


def _compare(
    store: Store,
    place: Store,
    name: str,
    old: StageState | None,
    state: RunState,
    environment: Mapping[str, Any],
    tolerance: float,
) -> Comparison:
    new = state.stages[name]
    before, after = old.digest if old else None, new.digest
    if before is not None and before == after and new.state == "cached":
        return Comparison(name, "taken over", before, after)
    then = store.load(old.key) if old and old.key else None
    recorded = _environment_of(store, then) or {}
    surroundings = compare_environments(recorded, environment) if recorded else []
    outside = [line for line in surroundings if not line.startswith("git")]
    now = place.load(new.key) if new.key else None
    if before is not None and before == after:
        return Comparison(name, "identical", before, after, harmless=_code_and_data(then, old, now) + outside)
    if old is None or before is None or after is None:
        reason = (new.error or {}).get("message") or new.reason or ""
        cause = "the run did not finish it" if before is None else f"it {new.state} this time"
        if before is None and after is None:
            return Comparison(name, "no result", None, None)  # skipped or unfinished both times
        return Comparison(name, "not computed", before, after, causes=[f"{cause}: {reason}" if reason else cause])
    causes = _code_and_data(then, old, now)
    metrics = compare_metrics(old.summary, new.summary, tolerance)
    return Comparison(
        name,
        "different" if metrics or not old.summary else "within tolerance",
        before,
        after,
        files=_different_files(then, now),
        metrics=metrics,
        causes=causes or outside or surroundings,
        code_or_data=bool(causes),
        excused=bool(outside) and not causes,
    )


def _code_and_data(then: StoredArtifact | None, old: StageState | None, now: StoredArtifact | None) -> list[str]:
    """What differs in what the stage's key is made of."""
    before = then.components if then is not None else old.components if old is not None else None
    return explain(before, now.components) if before and now is not None else []


def _environment_of(store: Store, artifact: StoredArtifact | None) -> Mapping[str, Any] | None:
    """Of the run that computed the artifact, which may be an earlier one than that which used it."""
    if artifact is None:
        return None
    try:
        environment = _record(store.run_directory(artifact.run_id)).get("environment")
    except UserError:
        return None
    return environment if isinstance(environment, dict) else None


def _different_files(then: StoredArtifact | None, now: StoredArtifact | None) -> list[str]:
    if then is None or now is None:
        return []
    old = {entry["path"]: entry["sha256"] for entry in then.files}
    new = {entry["path"]: entry["sha256"] for entry in now.files}
    return sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))


def compare_metrics(before: Mapping[str, float], after: Mapping[str, float], tolerance: float) -> list[str]:
    """Summary metrics that differ by more than `tolerance` relative to the larger one; measured times are left out."""
    lines = []
    for name in dict.fromkeys((*before, *after)):
        if _MEASURED.search(name):
            continue
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            lines.append(f"{name}: {'(none)' if old is None else old} → {'(none)' if new is None else new}")
        elif not math.isclose(old, new, rel_tol=tolerance) and not (math.isnan(old) and math.isnan(new)):
            lines.append(f"{name}: {old:.6g} → {new:.6g}")
    return lines
