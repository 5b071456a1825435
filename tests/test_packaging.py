"""The package: what pyproject.toml says of it is what the folders hold, and `import polytrope` shows and costs."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import polytrope

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
