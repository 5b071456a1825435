"""`polytrope status`, `runs`, `logs` and `diff`: read from the files of a run, without Ray and MLflow."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from polytrope.pipeline.commands.common import (
    find_run,
    open_store,
    print_json,
    print_table,
    read_run_file,
    say,
)
from polytrope.pipeline.errors import EXIT_RUN_FAILED, EXIT_SUCCESS, UserError
from polytrope.pipeline.launch.environment import compare_environments
from polytrope.pipeline.launch.failure import failure_lines, way_on
from polytrope.pipeline.launch.progress import Progress, counts, show_event
from polytrope.pipeline.runs.journal import Event, JournalReader, RunState, StageState, fold, read
from polytrope.pipeline.runs.lease import is_held
from polytrope.pipeline.runs.record import INTERRUPTED, as_it_stands, run_state
from polytrope.pipeline.runs.spool import SpoolReader
from polytrope.pipeline.runs.stage_progress import StageProgress, read_progress, said_lines
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.support.text import command, format_duration, metric_text, suggest
from polytrope.pipeline.workflow.keys import explain

_LOOK = 0.5  # seconds between two looks at a run that goes on


def status(options: argparse.Namespace) -> int:
    """The stages of one run; exit code 1 if it failed."""
    if options.watch:
        _check_watch(options)
    if options.address:
        from polytrope.pipeline.commands import cluster

        return cluster.status(options)
    store = open_store(options)
    directory = find_run(store, options.run)
    if options.watch:
        try:
            watch(store, directory)
        except KeyboardInterrupt:  # of the watch, which changes nothing
            stop = command("cancel", directory.name, store=store.address)
            print(f"\nrun {directory.name} is left alone; to stop it: {stop}")
            return EXIT_SUCCESS
    state = run_state(directory)
    if options.json:
        print_json(_status_data(directory, state))
    else:
        _print_status(store, directory, state)
    return EXIT_RUN_FAILED if state.status in ("failed", "cancelled", INTERRUPTED) else EXIT_SUCCESS


def _check_watch(options: argparse.Namespace) -> None:
    if options.json:
        raise UserError("--watch is for people, and --json prints once", "leave one of them out")
    if options.address:
        raise UserError(
            "--watch does not work with --address",
            "`polytrope logs RUN -f --address URL` follows the driver; a store that this machine reaches can be "
            "watched: `polytrope status RUN --watch --store STORE`",
        )


def watch(store: Store, directory: Path) -> None:
    """The display of `run`, from another terminal or machine, until the run ends or its driver is gone."""
    state, journal = RunState(), JournalReader(directory)
    events = journal.read_new()
    fold(events, state)
    progress = Progress(state.stages, SpoolReader(directory / "spool"), stream=sys.stdout)
    with progress:
        state, gone = RunState(), False
        while True:
            now = time.time()
            for event in events:
                fold([event], state)
                show_event(progress, event, state, age=max(0.0, now - event.time))
            if state.done:
                break
            if gone:
                progress.interrupt()
                break
            time.sleep(_LOOK)
            gone = not is_held(directory)  # looked at first: a driver that ends meanwhile has written its end
            store.pull_run(directory.name)
            events = journal.read_new()
    print()


def _status_data(directory: Path, state: RunState) -> dict[str, Any]:
    stages = []
    for stage in state.stages.values():
        data = {key: value for key, value in asdict(stage).items() if key != "components"}
        data["progress"] = _progress(directory, stage).to_dict() if stage.state == "running" else None
        stages.append(data)
    return {
        "run_id": directory.name,
        "workflow": state.workflow,
        "status": state.status,
        "attempt": state.attempt,
        "executor": state.executor,
        "started": state.started,
        "ended": state.ended,
        "error": state.error,
        "stages": stages,
    }


def _progress(directory: Path, stage: StageState) -> StageProgress:
    return read_progress(directory, stage.name, stage.attempt)


def _print_status(store: Store, directory: Path, state: RunState) -> None:
    say(
        f"{directory.name}: {state.workflow}, {state.status}, attempt {state.attempt}, {state.executor} executor, "
        f"{_span(state)}"
    )
    print()
    print_table(["stage", "state", "time", "result"], [_stage_row(directory, stage) for stage in state.stages.values()])
    for stage in state.stages.values():
        for note in stage.notes.values():
            say(f"\n{stage.name}: {note}")
    if failures := failure_lines(state, directory, store):
        say("\n".join(("", *failures)))
    if state.status in ("failed", "cancelled", INTERRUPTED):
        say("\n".join(("", *way_on(state, directory, store))))


def _span(state: RunState) -> str:
    if state.started is None:
        return "not started"
    text = "started " + time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state.started))
    if state.duration is not None:
        text += f", {'' if state.attempt <= 1 else 'the last attempt '}took {format_duration(state.duration)}"
    return text


def _stage_row(directory: Path, stage: StageState) -> list[str]:
    seconds = stage.duration
    result = stage.reason or " · ".join(
        f"{name} {metric_text(value)}" for name, value in list(stage.summary.items())[:5]
    )
    if stage.state == "running" and stage.started is not None:
        seconds = max(0.0, time.time() - stage.started)  # its process has another clock that cannot jump
        result = _progress(directory, stage).text()
    elif stage.state == INTERRUPTED and (said := _progress(directory, stage)).total:
        result = f"got to {said.text(said.time)}"
    if stage.state == "cached" and stage.hit_from:
        result = f"{result} (from run {stage.hit_from})".strip()
    if stage.state in ("failed", "retrying") and stage.error:
        result = str(stage.error.get("message", "")).split("\n")[0]
    label = stage.state if stage.attempt <= 1 else f"{stage.state} ({stage.attempt} attempts)"
    return [stage.name, label, "" if seconds is None else format_duration(seconds), result]


def runs(options: argparse.Namespace) -> int:
    """A line per run, the newest first."""
    store = open_store(options)
    rows, data, unreadable = [], [], 0
    for directory in store.run_directories()[: options.limit]:
        try:
            state = run_state(directory)
        except UserError as error:  # of this run alone
            print(f"polytrope: {error}", file=sys.stderr)
            unreadable += 1
            continue
        stages = counts(stage.state for stage in state.stages.values())
        started = "" if state.started is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state.started))
        took = "" if state.duration is None else format_duration(state.duration)
        rows.append([directory.name, state.workflow, state.status, started, took, stages])
        data.append({**_status_data(directory, state), "stages": stages})
    if options.json:
        print_json(data)
    elif rows:
        print_table(["run", "workflow", "status", "started", "took", "stages"], rows)
    elif not unreadable:
        print(f"there are no runs in {store.address}")
    return EXIT_RUN_FAILED if unreadable else EXIT_SUCCESS


def logs(options: argparse.Namespace) -> int:
    """What the stages said and printed, in the order of the stages; with `-f` as it comes."""
    if options.address:
        from polytrope.pipeline.commands import cluster

        return cluster.logs(options)
    store = open_store(options)
    directory = find_run(store, options.run)
    journal = JournalReader(directory)
    events = journal.read_new()
    state = fold(events)
    if options.stage is not None and not any(_wanted(name, options.stage) for name in state.stages):
        raise UserError(f"run {directory.name} has no stage `{options.stage}`", suggest(options.stage, state.stages))
    shown: dict[str, int] = {}
    readers: dict[str, SpoolReader] = {}
    silent = True
    last = ""
    while True:
        store.pull_run(directory.name)
        held = is_held(directory)
        events += journal.read_new()
        state = as_it_stands(directory, fold(events), held)
        new: dict[str, str] = {}
        for name in state.stages:
            if _wanted(name, options.stage):
                reader = readers.setdefault(name, SpoolReader(directory / "spool", stage=name))
                new[name] = "".join(said_lines(reader.read_new()))
        for name, path in _log_files(directory, events, options.stage):
            new[name] = new.get(name, "") + _new_text(path, shown, partial=options.follow)
        for stage, text in new.items():
            if options.tail is not None and silent:
                text = "".join(text.splitlines(keepends=True)[-options.tail :])
            if text and stage != last and options.stage is None:
                print(f"==> {stage} <==")
            if text:
                last = stage
                sys.stdout.write(text)
        sys.stdout.flush()
        silent = silent and not any(new.values())
        if not options.follow or state.done or state.status == INTERRUPTED:
            break
        time.sleep(_LOOK)
    if silent:
        print(f"run {directory.name} has no output yet (a stage taken from the store prints nothing)", file=sys.stderr)
    return EXIT_SUCCESS


def _wanted(name: str, stage: str | None) -> bool:
    return stage is None or name == stage or name.split("[")[0] == stage


def _log_files(directory: Path, events: Iterable[Event], stage: str | None) -> Iterator[tuple[str, Path]]:
    """(stage, file) of every attempt's log, by the journal."""
    seen: set[str] = set()
    for event in events:
        log = event.get("log")
        if log and event.stage is not None and _wanted(event.stage, stage) and log not in seen:
            seen.add(log)
            if (directory / log).is_file():
                yield event.stage, directory / log


def _new_text(path: Path, shown: dict[str, int], *, partial: bool) -> str:
    """What was printed since the last look. `partial`: the rest of its last line may be yet to come."""
    start = shown.get(str(path), 0)
    with path.open("rb") as file:
        file.seek(start)
        data = file.read()
    shown[str(path)] = start + len(data)
    text = data.decode(errors="replace")
    return text if not text or text.endswith("\n") or partial else text + "\n"


def diff(options: argparse.Namespace) -> int:
    """What differs between two runs; exit code 1 if results or metrics do."""
    store = open_store(options)
    one, other = find_run(store, options.run_a), find_run(store, options.run_b)
    result = compare_runs(store, one, other)
    code = EXIT_RUN_FAILED if result["results"] or result["metrics"] else EXIT_SUCCESS
    if options.json:
        print_json({"run_a": one.name, "run_b": other.name, **result})
        return code
    print(f"{one.name} → {other.name}")
    for title, lines in result.items():
        if lines:
            print(f"\n{title}:")
            for line in lines:
                say(f"  {line}")
    if not any(result.values()):
        print("no difference")
    return code


def compare_runs(store: Store, one: Path, other: Path) -> dict[str, list[str]]:
    """Lines per group: workflow, stages (keys), results (digests), metrics, environment."""
    files = read_run_file(one), read_run_file(other)
    states = fold(read(one)), fold(read(other))
    groups: dict[str, list[str]] = {
        "workflow": _changes(files[0].get("workflow", {}), files[1].get("workflow", {})),
        "stages": [],
        "results": [],
        "metrics": [],
        "environment": compare_environments(files[0].get("environment") or {}, files[1].get("environment") or {}),
    }
    for name in dict.fromkeys((*states[0].stages, *states[1].stages)):
        left, right = states[0].stages.get(name), states[1].stages.get(name)
        if left is None or right is None:
            groups["results"].append(f"{name}: only in {(one if right is None else other).name}")
            continue
        before, after = _components(store, left), _components(store, right)
        if left.key != right.key and before and after:
            groups["stages"] += [f"{name}: {line}" for line in explain(before, after)]
        if left.digest and right.digest and left.digest != right.digest:
            groups["results"].append(f"{name}: {left.digest[:12]} → {right.digest[:12]}")
        elif bool(left.digest) != bool(right.digest):
            groups["results"].append(f"{name}: {left.state} → {right.state}")
        for metric in dict.fromkeys((*left.summary, *right.summary)):
            values = left.summary.get(metric), right.summary.get(metric)
            if values[0] != values[1] and not (values[0] != values[0] and values[1] != values[1]):
                texts = ["(none)" if value is None else metric_text(value) for value in values]
                groups["metrics"].append(f"{name}: {metric}: {texts[0]} → {texts[1]}")
    return groups


def _components(store: Store, stage: StageState) -> Mapping[str, Any] | None:
    if stage.components is not None or stage.key is None:
        return stage.components
    artifact = store.load(stage.key)
    return None if artifact is None else artifact.components


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [line.removeprefix("parameters.") for line in explain({"parameters": old}, {"parameters": new})]
