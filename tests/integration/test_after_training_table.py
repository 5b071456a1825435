"""The table's rows are those of the report of the run that was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from benchmarks import after_training_table

STAGE = """
import json
from polytrope.pipeline.stage import Artifact, StageContext

def write(context: StageContext, name: str, before: Artifact | None = None) -> None:
    rows = [{"name": name, "loss": 1.5, "other": 2}]
    (context.output / "report.json").write_text(json.dumps({"table": rows}))
"""


def test_the_rows_are_of_this_runs_report_and_no_newer_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "table_stages.py").write_text(STAGE, encoding="utf-8")
    report = {"uses": "table_stages:write", "with": {"name": "asked for"}}
    later = {"uses": "table_stages:write", "inputs": {"before": "report"}, "with": {"name": "newer"}}
    workflow = tmp_path / "table.yaml"
    workflow.write_text(yaml.safe_dump({"name": "table", "stages": {"report": report, "later": later}}), "utf-8")
    monkeypatch.setattr(after_training_table, "WORKFLOW", str(workflow))
    (row,) = after_training_table.run(str(tmp_path / "store"))
    assert (row["name"], row["loss"]) == ("asked for", 1.5)
    assert set(row) == set(after_training_table.KEPT)
