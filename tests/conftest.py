"""What all tests share: a quiet, offline, explicit environment, and the rule that no test leaves a process behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from quickstart_support import Run, run_quickstart
from wheel_support import build_wheel

os.environ.update(
    {
        "OMP_NUM_THREADS": "1",  # explicit, so that no figure depends on the machine
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "TOKENIZERS_PARALLELISM": "false",
    }
)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell's background job: the tests' processes inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long forms run only when they are asked for (`make chaos`)."""
    if "chaos" in config.getoption("-m"):
        return
    long = [item for item in items if item.get_closest_marker("chaos")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture(autouse=True, scope="session")
def no_process_is_left_behind() -> Iterator[None]:
    """Whatever a test starts, it stops, also when it fails."""
    yield
    left = [
        process for process in psutil.Process().children(recursive=True) if process.status() != psutil.STATUS_ZOMBIE
    ]
    # multiprocessing's own helpers end with the interpreter
    left = [p for p in left if not any("multiprocessing" in part for part in p.cmdline())]
    _, alive = psutil.wait_procs(left, timeout=10)
    assert not alive, "processes left behind: " + ", ".join(" ".join(process.cmdline())[:120] for process in alive)


@pytest.fixture(scope="session")
def local_quickstart(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The small quickstart, run once on this machine by processes for all tests that look at it."""
    return run_quickstart(tmp_path_factory.mktemp("quickstart") / "store", "local")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))
