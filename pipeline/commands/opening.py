"""`polytrope open`: the result of a run on the screen: its report, its page in MLflow, its card, or a stage's files."""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from polytrope.pipeline.commands.common import find_run, open_store
from polytrope.pipeline.commands.services import mlflow_place, serve, tracking_address, was_tracked
from polytrope.pipeline.errors import EXIT_SUCCESS, UserError
from polytrope.pipeline.launch.launch import REPORT, report_stages
from polytrope.pipeline.runs.journal import RunState, fold, read
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.support.text import command, suggest


@dataclass(frozen=True)
class _Run:
    store: Store
    directory: Path
    state: RunState
    stage: str | None


def open_result(options: argparse.Namespace) -> int:
    """Print where it is, and open it where there is a browser; `--print`: only print."""
    store = open_store(options)
    run, what, stage = _parse(options.words, {directory.name for directory in store.run_directories()})
    directory = find_run(store, run)
    found = _Run(store, directory, fold(read(directory)), stage)
    if what is None:
        what = "report" if report_stages(found.state, store) else "mlflow"
    if what == "mlflow":
        return _open_mlflow(found, options)
    path = _PATHS[what](found)
    print(path)
    if not options.print:
        _show(path.absolute().as_uri())
    return EXIT_SUCCESS


def _parse(words: list[str], runs: Collection[str]) -> tuple[str | None, str | None, str | None]:
    """[RUN] [KIND [STAGE]] → run, kind, stage; runs and stages may be called `report`, too."""
    kinds = ("report", "mlflow", "card", "artifact")
    rest = list(words)
    is_run = rest[:1] and (rest[0] not in kinds or (rest[0] in runs and len(rest) > 1 and rest[1] in kinds))
    run = rest.pop(0) if is_run else None
    what = rest.pop(0) if rest else None
    if what is not None and what not in kinds:
        raise UserError(f"open: there is no `{what}` of a run to open", suggest(what, kinds))
    stage = rest.pop(0) if rest else None
    if rest or (what == "mlflow" and stage):
        raise UserError(
            f"open: `{rest[0] if rest else stage}` is one word too many", "polytrope open [RUN] [WHAT [STAGE]]"
        )
    if what == "artifact" and stage is None:
        raise UserError("open artifact: the stage is missing", "`polytrope open [RUN] artifact STAGE`")
    return run, what, stage


def _report(run: _Run) -> Path:
    stages = report_stages(run.state, run.store)
    if not stages:
        raise UserError(f"run {run.directory.name} has no report", "a `report` stage makes one")
    if run.stage is not None and run.stage not in stages:
        raise UserError(f"open report: `{run.stage}` made none in run {run.directory.name}", suggest(run.stage, stages))
    return _files(run, run.stage or stages[-1]) / REPORT


def _card(run: _Run) -> Path:
    from polytrope.pipeline.proof.card import write_card

    output = run.store.local("cards") / f"{run.directory.name}.html"
    write_card(run.store, run.directory, output, run.stage)
    return output


def _artifact(run: _Run) -> Path:
    done = [name for name, stage in run.state.stages.items() if stage.key and stage.digest]
    if run.stage not in done:
        raise UserError(
            f"open artifact: run {run.directory.name} has no result of `{run.stage}`", suggest(run.stage or "", done)
        )
    return _files(run, run.stage)


def _files(run: _Run, stage: str) -> Path:
    return run.store.materialize(run.state.stages[stage].key or "")


_PATHS: dict[str, Callable[[_Run], Path]] = {"report": _report, "card": _card, "artifact": _artifact}


def _open_mlflow(run: _Run, options: argparse.Namespace) -> int:
    """On the run's server, or on one that shows its database already; else on one that is started for it."""
    from polytrope.pipeline.tracking.process import free_port, running_server

    if not was_tracked(run.directory):
        status = command("status", run.directory.name, store=run.store.address)
        raise UserError(
            f"run {run.directory.name} was made without MLflow (`tracking.enabled: false`)", f"`{status}` shows it"
        )
    address = tracking_address(run.store, run.directory)
    is_server = address.startswith(("http://", "https://"))
    running = None if is_server else running_server(address)
    if options.print and not is_server and running is None:  # before anything is sent
        raise UserError(
            "no MLflow server shows this run now", f"`{command('ui', run.directory.name, store=run.store.address)}`"
        )
    place = mlflow_place(run.store, run.directory)
    server = place.server or running
    if server is not None:
        print(f"{server}{place.page}")
        if not options.print:
            _show(f"{server}{place.page}")
        return EXIT_SUCCESS
    return serve(run.store, place, "127.0.0.1", free_port(), ready=_show)


def _show(address: str) -> None:
    """In a browser of this desktop, or the one that $BROWSER names; where there is none, the printed line has to do."""
    desktop = sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    if desktop or os.environ.get("BROWSER"):
        webbrowser.open(address)
