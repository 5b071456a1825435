"""The house: where things are, as CONTRIBUTING.md says, and what the rooms of pipeline/ keep to."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIPELINE = ROOT / "pipeline"


def modules() -> list[Path]:
    return [path for path in PIPELINE.rglob("*.py") if "__pycache__" not in path.parts]


def test_every_place_that_contributing_names_exists_and_every_room_is_named() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("| ") and "`" in line.split("|")[2]]
    assert len(table) >= 20
    named: set[str] = set()
    for row in table:
        places = re.findall(r"`((?:ops|models|pipeline|docs|infra|tests)/[\w/.]*)`", row.split("|")[2])
        assert places, row
        for place in places:
            assert (ROOT / place).exists(), row
        named.update(places)
    rooms = {path.name for path in PIPELINE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == {place.split("/")[1] for place in named if place.startswith("pipeline/") and place.count("/") > 1}


def test_pipeline_has_few_rooms_and_few_files_of_its_own() -> None:
    rooms = [path for path in PIPELINE.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert len(rooms) <= 13
    assert len(list(PIPELINE.glob("*.py"))) <= 4


def test_no_two_modules_of_one_name_have_different_jobs() -> None:
    roles = {"__init__.py", "parameters.py"}  # the same in each room that has one
    names = [path.name for path in modules() if path.name not in roles]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_nobody_finds_a_store_by_walking_up_from_a_path() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr == "parent"
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "parent"
    ]
    assert found == []


def test_executors_are_named_in_one_table() -> None:
    """No comparison with the name of an executor anywhere: what differs is a field of its row.

    `address` is Ray's own: its cluster on this machine is called `local` too.
    """
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Compare)
        and getattr(node.left, "id", "") != "address"
        and any(
            isinstance(item, ast.Constant) and item.value in ("ray", "local") for item in (node.left, *node.comparators)
        )
    ]
    assert found == []


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_imports_is_still_there(path: Path) -> None:
    """They are run by hand, long after what they measure was moved."""
    importlib.import_module(f"benchmarks.{path.stem}")
