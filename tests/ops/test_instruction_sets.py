"""The kernels of older machines: everything that test_numerics.py and test_extremes.py ask holds for them as well."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from polytrope.ops.build import X86_LEVELS, best_level


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set there")
@pytest.mark.parametrize("level", ["AVX2", "DEFAULT"])
def test_older_machines_compute_as_exactly(level: str) -> None:
    if list(X86_LEVELS).index(level) <= list(X86_LEVELS).index(best_level()):
        pytest.skip(f"this machine is no better than {level}")
    environment = os.environ | {"ATEN_CPU_CAPABILITY": level.lower()}
    files = [str(Path(__file__).with_name(name)) for name in ("test_numerics.py", "test_extremes.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
