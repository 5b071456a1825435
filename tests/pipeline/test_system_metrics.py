"""A stage that takes a while shows what the machine did, under MLflow's names for system metrics."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from polytrope.pipeline.executors.system_metrics import sampled
from polytrope.pipeline.stage import EventWriter, stage_context

POLYTROPE = str(Path(sys.executable).with_name("polytrope"))
WORKFLOW = """\
name: watched
executor: local
tracking: {enabled: false}
stages:
  slow: {uses: "watched_stages:rest", with: {seconds: 2.6}}
  quick: {uses: "watched_stages:rest", with: {seconds: 0.0}}
"""


def test_a_look_at_the_machine_that_fails_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context = stage_context(tmp_path)
    (tmp_path / "blocked").write_text("no directory")
    with sampled(replace(context, events=EventWriter(tmp_path / "blocked")), first=0.0, interval=0.01):
        time.sleep(0.1)
    assert capsys.readouterr().err.startswith("no system metrics (any more): FileExistsError: ")


def test_a_stage_logs_system_metrics_while_it_runs(tmp_path: Path) -> None:
    (tmp_path / "watched_stages.py").write_text(
        "import time\ndef rest(seconds: float) -> None:\n    time.sleep(seconds)\n"
    )
    (tmp_path / "w.yaml").write_text(WORKFLOW)
    done = subprocess.run([POLYTROPE, "run", "w.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    said = {
        path.parent.parent.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / ".polytrope").glob("runs/*/spool/*/1/*.jsonl")
    }
    (event,) = [event for event in said["slow"] if event["kind"] == "metrics"]
    assert event["step"] == 0
    assert 0 <= event["values"]["system/cpu_utilization_percentage"] <= 100
    assert event["values"]["system/system_memory_usage_megabytes"] > 10
    assert not any(event["kind"] == "metrics" for event in said.get("quick", []))
