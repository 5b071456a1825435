"""Nobody reads what a command prints: a run is a run all the same, and its exit code says how it ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine_support import workflow_of

from polytrope.pipeline.runs.journal import fold, read

POLYTROPE = [sys.executable, "-m", "polytrope.pipeline.commands.cli"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}


def command(place: Path, output: str, *arguments: str) -> tuple[int, str]:
    """(exit code, stderr) of a command whose output goes to a pipe without reader, a full disk, or nowhere."""
    line = [*POLYTROPE, *arguments]
    if output == "closed":
        line = ["sh", "-c", 'exec "$@" >&-', "sh", *line]
    if output == "full":
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        read_end, stdout = os.pipe()
        os.close(read_end)
    try:
        done = subprocess.run(
            line, cwd=place, env=ENVIRONMENT, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    finally:
        os.close(stdout)
    return done.returncode, done.stderr


@pytest.mark.parametrize("output", ["pipe", "full", "closed"])
@pytest.mark.parametrize(("uses", "status", "code"), [("make", "succeeded", 0), ("fail_until", "failed", 1)])
def test_a_run_goes_on_and_exits_by_its_result(tmp_path: Path, output: str, uses: str, status: str, code: int) -> None:
    last: dict[str, Any] = {"uses": uses, "retries": 0, "after": ["first"]}
    if uses == "fail_until":
        last["with"] = {"attempts": 1}
    workflow = workflow_of(tmp_path, {"first": {"uses": "make", "with": {"text": "1"}}, "last": last})
    (tmp_path / "w.yaml").write_text(yaml.safe_dump({**workflow.to_dict(), "tracking": {"enabled": False}}))
    found, errors = command(tmp_path, output, "run", "w.yaml", "--run-id", "mine", "--store", "store")
    assert found == code, errors
    state = fold(read(tmp_path / "store" / "runs" / "mine"))
    assert state.status == status
    assert state.stages["first"].state == "succeeded"
    assert ("the run goes on" in errors) == (output != "closed")
    assert "Traceback" not in errors


def test_a_command_that_only_prints_says_that_its_reader_left(tmp_path: Path) -> None:
    assert command(tmp_path, "pipe", "stages")[0] in (0, 141)  # by the size of what it prints
    for words in (["stages"], ["schema"]):
        code, errors = command(tmp_path, "full", *words)
        assert code == 1
        assert "No space left on device" in errors
        assert "unexpected" not in errors


def test_an_unexpected_error_is_told_where_no_file_can_be_written(tmp_path: Path) -> None:
    program = (
        "import resource; from polytrope.pipeline.commands.cli import _unexpected\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "try: raise KeyError('boom')\n"
        "except KeyError as error: raise SystemExit(_unexpected(error, debug=False))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("KeyError: 'boom'\n")
