"""The examples of the documentation run, page by page and in order, in a folder with the repository's workflows.

Python is executed, a workflow is loaded and its graph built, shell commands must end with 0 and print what stands below
them. A block with a `title` is written to that file first. A block is left out only where the page says
`<!-- not run: reason -->` above it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from doc_examples import Example, commands, examples, missing_line, pages

from polytrope import load_workflow
from polytrope.pipeline.workflow.graph import build_graph

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory like the repository's: `workflows/`, and commands of this environment on the path."""
    shutil.copytree(ROOT / "workflows", tmp_path / "workflows", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy(ROOT / "workflows" / "word_count.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("POLYTROPE_STORE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:  # stages that a page defined
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("page", pages())
def test_examples_of_page_run(page: str, folder: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "documentation"}
    for example in examples(page):
        if example.title:
            (folder / example.title).write_text(example.body)
        if not example.skipped:
            _run(example, folder, namespace)


def _run(example: Example, folder: Path, namespace: dict[str, Any]) -> None:
    hint = f"mend {example.place}, or mark it: <!-- not run: reason -->"
    if example.kind == "yaml":
        path = folder / (example.title or "example.yaml")
        path.write_text(example.body)
        assert build_graph(load_workflow(path)), hint
    elif example.kind == "python":
        # a title names a module for the stages of the page; running it as well finds its errors here
        exec(compile("\n" * example.line + example.body, example.place, "exec"), namespace)
    else:
        for command, expected in commands(example.body):
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=folder,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=120,
            )
            assert done.returncode == 0, f"$ {command}\n{done.stdout}\n{hint}"
            wanted = missing_line(expected, done.stdout)
            assert wanted is None, f"$ {command}\n{done.stdout}\ndid not print: {wanted}\n{hint}"


def test_a_wrong_output_is_found() -> None:
    output = "a: will run\nb: stored by x\n"
    assert missing_line(["a: will run", "b: …x"], output) is None
    assert missing_line(["b: …x", "a: will run"], output) == "a: will run"
    assert missing_line(["c"], output) == "c"


def test_the_readme_is_short_before_more_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split("\n# More\n")[0].split()) <= 900
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(targets) > 20
    for target in targets:
        name, _, anchor = target.partition("#")
        page = ROOT / (name or "README.md")
        assert page.is_file(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}, (
                target
            )
