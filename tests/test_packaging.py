"""The package: what pyproject.toml says of it is what the folders hold, and `import polytrope` shows and costs."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import polytrope
from polytrope.pipeline.commands.starting import TEMPLATES

ROOT = Path(__file__).parents[1]


def test_every_folder_with_modules_is_a_package_of_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    declared, named = settings["packages"], {folder: name for name, folder in settings["package-dir"].items()}
    folders = {
        named.get(folder.as_posix(), "polytrope." + ".".join(folder.parts))
        for top in ("ops", "models", "pipeline", "infra/package", "workflows")
        for path in (ROOT / top).rglob("*.py")
        for folder in [path.parent.relative_to(ROOT)]
    }
    assert set(declared) == folders | {"polytrope.infra.deepspeed"}  # configurations that `train` reads


def test_the_package_shows_its_api_and_each_name_is_what_its_module_defines() -> None:
    shown = dir(polytrope)
    assert set(shown) == {*polytrope.PLACES, "__version__", "integrations", "models", "ops", "pipeline"}
    for name, module in polytrope.PLACES.items():
        assert getattr(polytrope, name) is getattr(importlib.import_module(module), name)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert polytrope.__version__ == project["version"]
    assert not hasattr(polytrope, "absent")
    # editors and mypy see the same names as a program
    tree = ast.parse((ROOT / "infra" / "package" / "__init__.py").read_text())
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: f"{node.module}" for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == {**polytrope.PLACES, **dict.fromkeys(("integrations", "models", "ops", "pipeline"), "polytrope")}


def test_importing_polytrope_imports_nothing_else() -> None:
    program = "import sys; before = set(sys.modules); import polytrope; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["polytrope"]


PROJECTS = """
import os, sys
import polytrope
from polytrope.pipeline.commands.cli import main
from polytrope.pipeline.commands.starting import TEMPLATES
assert polytrope.__file__.startswith(sys.prefix), polytrope.__file__
for name, template in TEMPLATES.items():
    assert main(["init", name, "--template", name]) == 0
    assert main(["validate", f"{name}/workflows/{template.files[0]}"]) == 0
sys.stdout.flush()
os.chdir(name)
assert main(["init", ".", "--template", name]) == 2
"""


def test_a_wheel_in_an_environment_of_its_own_starts_checks_and_runs_projects(wheel: Path, tmp_path: Path) -> None:
    """What pip installs, beside the packages that it depends on: none of this repository's files."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, str(wheel)], check=True)
    packages = [entry for entry in sys.path if entry.endswith("site-packages")]  # without their .pth files
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(packages)}

    def run(*command: object, cwd: Path = tmp_path) -> str:
        done = subprocess.run(
            list(map(str, command)),
            cwd=cwd,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    output = run(python, "-c", PROJECTS)
    commands = dict(re.findall(r"→ cd (\S+) && polytrope run (\S+) --executor local\n", output))
    assert commands.keys() == TEMPLATES.keys()
    for name, workflow in commands.items():
        assert re.search(rf"^{name}/{workflow}: \S+, \d+ stages", output, re.MULTILINE)
        assert f"polytrope run {workflow}" in (tmp_path / name / "README.md").read_text()
        assert ".polytrope/" in (tmp_path / name / ".gitignore").read_text()
    refused = output[output.index("polytrope: ") :]
    for path in (".gitignore", "README.md", "workflows/word-count.yaml", "workflows/word_count.py"):
        assert path in refused
    assert "already there, and nothing is overwritten" in refused
    command = python.with_name("polytrope")
    assert run(command, "--version") == f"polytrope {polytrope.__version__}\n"
    project = tmp_path / "custom-stage"
    assert "7 succeeded" in run(
        command, "run", commands["custom-stage"], "--executor", "local", "--no-tracking", cwd=project
    )
