"""What pyproject.toml says of the packages is what the folders hold."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_folder_with_modules_is_a_package_of_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    declared, named = settings["packages"], {folder: name for name, folder in settings["package-dir"].items()}
    folders = {
        named.get(folder.as_posix(), "polytrope." + ".".join(folder.parts))
        for top in ("ops", "models", "pipeline")
        for path in (ROOT / top).rglob("*.py")
        for folder in [path.parent.relative_to(ROOT)]
    }
    assert set(declared) == folders | {"polytrope.infra.deepspeed"}  # configurations that `train` reads
