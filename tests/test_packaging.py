"""What pyproject.toml says of the packages is what the folders hold."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_folder_with_modules_is_a_package_of_the_wheel() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        "polytrope." + ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("ops", "models", "pipeline")
        for path in (ROOT / top).rglob("*.py")
    }
    assert set(declared) == folders | {"polytrope.infra.deepspeed"}  # configurations that `train` reads
