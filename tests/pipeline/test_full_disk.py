"""Whenever the disk becomes full, the run says so, tries nothing again, and lets go of everything it held."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_support import FAST, workflow_of

from polytrope.pipeline.engine.run import run_workflow
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import Event
from polytrope.pipeline.runs.lease import current, liveness
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.workflow.graph import build_graph


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of so many kilobytes."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def run_on(disk: Path, directory: Path, stages: dict[str, Any]) -> str:
    """Run where there is too little space; what the run said."""
    events: list[Event] = []
    workflow, store = workflow_of(directory, stages), Store(disk / "store")
    try:
        state = run_workflow(
            workflow, build_graph(workflow), store, run_id="mine", observer=events.append, options=FAST
        )
        assert state.status == "failed"
        error = next(stage.error for stage in state.stages.values() if stage.state == "failed")
        assert error is not None
        assert error["kind"] == "store"
        said = f"{error['message']}: {error['hint']}"
    except UserError as error:
        said = str(error)
    assert "stage_retrying" not in [event.type for event in events]
    assert liveness(current(store.run_directory("mine"))) == "free", "the run's lease is left"
    assert [path for path in (disk / "store").rglob(".*") if path.is_file()] == []
    assert os.listdir(disk / "store" / "leases") == []
    assert os.listdir(disk / "store" / "staging") == []
    return said


@pytest.mark.parametrize("disk", [8, 12, 16, 20, 24, 28, 32, 40, 64, 96], indirect=True)
def test_a_disk_too_small_for_a_run(disk: Path, tmp_path: Path) -> None:
    stages = {"a": {"uses": "make"}, "s": {"uses": "fill", "with": {"kilobytes": 100}, "after": ["a"]}}
    said = run_on(disk, tmp_path, stages)
    assert "No space left on device" in said or "the disk is full" in said
    assert "free some space" in said


@pytest.mark.parametrize("disk", [300], indirect=True)
@pytest.mark.parametrize("free", [0, 4, 16, 64])
def test_a_disk_that_something_else_fills_during_a_stage(disk: Path, tmp_path: Path, free: int) -> None:
    parameters = {"ballast": str(disk / "ballast"), "free": free}
    said = run_on(disk, tmp_path, {"s": {"uses": "fill_disk_beside", "with": parameters}})
    assert "No space left on device" in said
