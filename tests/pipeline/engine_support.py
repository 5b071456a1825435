"""A place to run workflows in, in this process or by a driver of its own, and what its tests wait for."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from polytrope.pipeline.engine.options import RunOptions
from polytrope.pipeline.engine.run import run_workflow
from polytrope.pipeline.runs import lease as leases
from polytrope.pipeline.runs.journal import Event, RunState
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.workflow.graph import build_graph
from polytrope.pipeline.workflow.spec import Workflow

FAST = RunOptions(retry_delay=0.01)


def workflow_of(directory: Path, stages: dict[str, Any], **fields: Any) -> Workflow:
    for spec in stages.values():
        if ":" not in spec["uses"]:
            spec["uses"] = f"engine_stages:{spec['uses']}"
    return Workflow.from_dict({"name": "test", "executor": "local", **fields, "stages": stages}, directory=directory)


class Place:
    """A store, a trace of all stage calls, and the events of the last run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = Store(directory / "store")
        self.events: list[Event] = []

    def run(self, stages: dict[str, Any], options: RunOptions = FAST, **arguments: Any) -> RunState:
        fields = arguments.pop("fields", {})
        workflow = workflow_of(self.directory, stages, **fields)
        self.events = []
        return run_workflow(
            workflow, build_graph(workflow), self.store, options=options, observer=self.events.append, **arguments
        )

    @property
    def calls(self) -> Counter[str]:
        path = self.directory / "calls"
        return Counter(path.read_text().splitlines() if path.exists() else [])

    def types(self, stage: str) -> list[str]:
        return [event.type for event in self.events if event.stage == stage]

    def text(self, state: RunState, stage: str) -> str:
        key = state.stages[stage].key
        assert key is not None
        artifact = self.store.find(key, full=True)
        assert artifact is not None
        return (self.store.materialize(key) / "text").read_text()


def diamond(place: Place, text: str = "x") -> dict[str, Any]:
    traces = {"traces": str(place.directory)}
    return {
        "a": {"uses": "make", "with": {"text": text, **traces}},
        "b": {"uses": "copy", "inputs": {"source": "a"}, "with": traces},
        "c": {"uses": "make", "with": {"text": "c", **traces}},
        "d": {"uses": "join", "inputs": {"parts": ["b", "c"]}, "with": traces},
    }


DRIVER = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from polytrope.pipeline.engine.options import RunOptions
from polytrope.pipeline.engine.run import run_workflow
from polytrope.pipeline.workflow.graph import build_graph
from polytrope.pipeline.workflow.spec import Workflow
from polytrope.pipeline.store.store import Store
root = Path({root!r})
workflow = Workflow.from_dict(json.loads({workflow!r}), directory=root)
options = RunOptions(lease_ttl=1)
state = run_workflow(workflow, build_graph(workflow), Store(root / "store"), run_id="mine", options=options)
sys.exit({{"succeeded": 0, "failed": 1, "cancelled": 130}}[state.status])
"""


def start_driver(place: Place, stages: dict[str, Any], **fields: Any) -> subprocess.Popen[bytes]:
    workflow = workflow_of(place.directory, stages, **fields)
    code = DRIVER.format(
        tests=str(Path(__file__).parent), root=str(place.directory), workflow=json.dumps(workflow.to_dict())
    )
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 30
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)
    return path.read_text()


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        if not any(is_running(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def forge(path: Path, base: Path, **changes: Any) -> None:
    """Write a lease as another host would have."""
    record = json.loads(base.read_bytes())
    del record["checksum"]
    temporary = path.with_name("forged")
    temporary.write_bytes(leases._encode(leases.LeaseRecord(**{**record, **changes})))
    temporary.rename(path)
