"""What is generated for the site says what the code says: every stage, parameter, command, option and public name."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

from polytrope.pipeline.commands.cli import build_parser
from polytrope.pipeline.commands.workflow_files import parameter_rows
from polytrope.pipeline.stage import BUILTIN_STAGES, load_stage

GENERATOR = Path(__file__).parents[2] / "docs" / "generator"


@pytest.fixture(autouse=True)
def generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator's modules are importable, as mkdocs makes them for its hooks."""
    monkeypatch.syspath_prepend(str(GENERATOR))


def test_every_parameter_of_every_stage_is_listed() -> None:
    from reference_pages import stages_page

    sections = dict(part.split("\n", 1) for part in stages_page().split("\n## ")[1:])
    for name in BUILTIN_STAGES:
        for path, kind, default, description in parameter_rows(load_stage(name).parameters_model):
            assert f"| `{path}` |" in sections[name], f"{name}: {path}"
            assert description or kind == default, f"stage {name}: parameter {path} has no description"


def test_every_option_of_every_command_is_listed() -> None:
    from reference_pages import commands_page

    sections = dict(part.split("\n", 1) for part in commands_page().split("\n## ")[1:])
    parser = build_parser()
    choices = next(item for item in parser._actions if isinstance(item, argparse._SubParsersAction)).choices
    assert set(sections) == set(choices)
    for name, command in choices.items():
        command.complete()
        for action in command._actions:
            if action.dest not in ("help", "debug"):
                for option in action.option_strings:
                    assert option in sections[name], f"{name} {option}"
    assert "`--target-error X`" in sections["convert"]


def test_public_functions_are_listed_with_their_docstrings() -> None:
    from reference_pages import python_page

    page = python_page()
    for name in (
        "polytrope.pipeline.workflow.spec.load_workflow",
        "polytrope.pipeline.stage.StageContext",
        "polytrope.ops.Hermite",
        "polytrope.ops.functional.fourier",
        "polytrope.ops.interpolate.fit",
        "polytrope.models.surgery.find_activations",
    ):
        assert f"{{ #{name} }}" in page
    assert "The member of a family that is closest to" in page


def test_moments_in_the_tables_are_those_of_the_modules() -> None:
    from tables import moments, slopes

    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in moments("hermite", "3").splitlines()]
    assert rows[2] == ["3", "1.000", "1.000", "0.920", "0.920"]  # torchortho: 2.5 / e
    heads, _, row, *_ = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in slopes("hermite", "3").splitlines()
    )
    assert heads == ["degree", *(f"slope, `{init}`" for init in ("stable", "variance_preserving", "torchortho"))]
    assert row == ["3", "0.235", "1.765", "1.623"]


def test_a_plot_is_drawn_from_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    import plots

    assert plots._family("piecewise_linear").count("<path") > 10
    monkeypatch.setitem(plots.FAMILIES, "piecewise_linear", ({"degree": 99}, ()))
    with pytest.raises(ValueError, match="degree"):
        plots._family("piecewise_linear")
    sys.modules.pop("plots")


def test_comparisons_are_tables_for_people() -> None:
    from tables import RESULTS, engine, kernels

    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in kernels().splitlines() if line.startswith("|")]
    measured = json.loads((RESULTS / "ops-cpu.json").read_text())["rows"]
    assert len(rows) - 2 == len(measured) / 2, "both types in one row"
    hermite = next(row for row in rows if row[0] == "hermite 8")
    wide, narrow = (row for row in measured if row["config"] == {"name": "hermite", "degree": 8})
    assert hermite[3] == f"{wide['times_gelu']:.2f} / {narrow['times_gelu']:.2f}"
    assert hermite[6] == f"{wide['faster_than_torchortho']:,.0f}"
    peers = json.loads((RESULTS / "engine.json").read_text())["results"]["peers"]
    assert f"| Metaflow | {peers['metaflow_ms_per_task']:.1f} | {peers['metaflow_times_slower']:.1f} |" in engine()
    page = kernels() + engine()
    assert "_ms" not in page
    assert "_seconds" not in page
    assert len(page.splitlines()) < 45
