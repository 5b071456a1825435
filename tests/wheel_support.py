"""The wheel of this tree, built once for all tests that use it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def build_wheel(directory: Path) -> Path:
    """Built from a copy of the sources; its kernels compiled quickly, where there is a compiler."""
    copy = directory / "source"
    for name in ("ops", "models", "pipeline", "infra", "workflows"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    compiler = directory / "quick-g++"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    environment = os.environ | {"CXX": str(compiler), "POLYTROPE_CACHE": str(directory / "cache")}
    subprocess.run([*pip, "--wheel-dir", str(directory), str(copy)], check=True, timeout=280, env=environment)
    (wheel,) = directory.glob("*.whl")
    return wheel
