"""The record of what can make a result differ: it names the commit, the change, the package, the threads."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest

from polytrope.pipeline.launch.environment import changed_versions, compare_environments, git_state, record_environment


def git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("x = 1\n")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-q", "-m", "one")
    return tmp_path


def test_git_state_tells_commit_and_change(repository: Path) -> None:
    clean = git_state(repository)
    assert clean["commit"] == git(repository, "rev-parse", "HEAD").strip()
    assert clean["dirty"] is False
    assert clean["diff"] == ""
    (repository / "a.py").write_text("x = 2\n")
    (repository / "new.py").write_text("y = 1\n")
    changed = git_state(repository)
    assert changed["dirty"] is True
    assert changed["diff"] == ""  # it may hold what nobody wants to publish
    assert "+x = 2" in git_state(repository, keep_diff=True)["diff"]
    assert "new.py" in changed["status"]
    assert changed["diff_sha256"] == hashlib.sha256(git(repository, "diff", "HEAD").encode()).hexdigest()


def test_what_git_does_not_tell_is_unknown_and_not_unchanged(repository: Path) -> None:
    clean = git_state(repository)
    (repository / ".git" / "index").write_bytes(b"no index")
    unknown = git_state(repository)
    assert unknown["commit"] == clean["commit"]
    assert (unknown["dirty"], unknown["status"], unknown["diff_sha256"]) == (None, None, None)
    (line,) = compare_environments({"git": clean}, {"git": unknown})
    assert "not known" in line


def test_what_git_says_need_not_be_utf8(repository: Path) -> None:
    (repository / "a.py").write_bytes(b"x = 'caf\xe9'\n")
    state = git_state(repository, keep_diff=True)
    assert "caf\\xe9" in state["diff"]
    json.dumps(state).encode()


def test_outside_a_repository_there_is_no_git_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) == {}


def test_the_record_is_json_and_names_packages_interpreter_and_threads(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    record = json.loads(json.dumps(record_environment(repository)))
    assert record["packages"]["numpy"] == numpy.__version__
    assert record["python"] == sys.version.split()[0]
    assert record["threads"]["OMP_NUM_THREADS"] == "3"
    assert record["usable_cores"] == len(os.sched_getaffinity(0))
    assert record["git"]["commit"]
    assert record["argv"] == sys.argv


RECORD: dict[str, Any] = {
    "git": {"commit": "a" * 40, "diff_sha256": "0", "dirty": False},
    "packages": {"numpy": "1.0", "torch": "2.0"},
    "python": "3.11.2",
    "platform": "Linux-6",
    "processor": "P",
    "usable_cores": 2,
    "threads": {"OMP_NUM_THREADS": "1"},
    "host": "one",
    "argv": ["x"],
}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"packages": {"numpy": "1.1", "torch": "2.0"}}, "package numpy: 1.0 → 1.1"),
        ({"packages": {"numpy": "1.0"}}, "package torch: 2.0 → (none)"),
        ({"threads": {"OMP_NUM_THREADS": "2"}}, "threads OMP_NUM_THREADS: 1 → 2"),
        ({"threads": {}}, "threads OMP_NUM_THREADS: 1 → (none)"),
        ({"usable_cores": 4}, "usable cores: 2 → 4"),
        ({"python": "3.12.0"}, "python: 3.11.2 → 3.12.0"),
        ({"processor": "Q"}, "processor: P → Q"),
        ({"git": {"commit": "b" * 40, "diff_sha256": "0"}}, "git commit: aaaaaaaaaa → bbbbbbbbbb"),
        ({"git": {"commit": "a" * 40, "diff_sha256": "1"}}, "git: other uncommitted changes"),
    ],
)
def test_a_difference_is_one_line(change: dict[str, Any], line: str) -> None:
    assert compare_environments(RECORD, RECORD | change) == [line]


def test_what_differs_in_every_run_is_no_difference() -> None:
    assert compare_environments(RECORD, RECORD | {"host": "two", "argv": ["y"], "platform": "Linux-6"}) == []


def test_a_resume_says_which_versions_are_others(tmp_path: Path) -> None:
    versions = {
        "workflow.json": "2.14",
        "workflow.1.json": "1.0",
        "workflow.2.json": "2.13",
        "workflow.10.json": "2.13.1",
    }
    for name, version in versions.items():
        environment = {"packages": {"torch": version, "numpy": "2"}, "python": "3.11.7", "argv": [name]}
        (tmp_path / name).write_text(json.dumps({"environment": environment}))
        if name == "workflow.json":
            assert changed_versions(tmp_path) == []  # the first attempt
    assert changed_versions(tmp_path) == ["package torch: 2.13.1 → 2.14"]
