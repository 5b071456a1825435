"""What MLflow shows of a workflow as a whole."""

from __future__ import annotations

from pathlib import Path

from polytrope.pipeline.tracking.overview import source_name


def test_the_workflow_file_is_named_without_the_path_of_a_machine(tmp_path: Path) -> None:
    file = tmp_path / "project" / "workflows" / "w.yaml"
    record = {"workflow": {"name": "w"}, "source": str(file)}
    assert source_name(record) == "w.yaml"
    (tmp_path / "project" / ".git").mkdir(parents=True)
    assert source_name(record) == "workflows/w.yaml"
    assert source_name({"workflow": {"name": "made-in-python"}, "source": None}) == "made-in-python"
