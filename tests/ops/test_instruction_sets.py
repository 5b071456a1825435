"""The kernels of older machines: everything that test_numerics.py asks holds for them as well."""

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
    file = Path(__file__).with_name("test_numerics.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
