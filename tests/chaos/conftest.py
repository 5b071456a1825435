"""Counts the faults of a run of the fault tests; `make chaos` keeps the figures."""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from pathlib import Path

import pytest

_faults: Counter[str] = Counter()
_failed: list[str] = []
_started = time.time()


@pytest.fixture(scope="session")
def faults() -> Counter[str]:
    """Kind of fault → how many runs had it. A run that does not end as it should fails its test."""
    return _faults


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _failed.append(report.nodeid)


def pytest_sessionfinish() -> None:
    path = os.environ.get("POLYTROPE_CHAOS_RESULTS")
    if path and _faults:
        result = {
            "command": "make chaos",
            "runs_with_faults": sum(_faults.values()),
            "runs_lost": len(_failed),
            "faults": dict(_faults),
            "failed_tests": _failed,
            "seconds": round(time.time() - _started),
            "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "system": platform.system()},
        }
        Path(path).write_text(json.dumps(result, indent=2) + "\n")
