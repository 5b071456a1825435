"""A real `mlflow server` that tests may kill, stop and start again, and the questions they ask it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from polytrope.pipeline.tracking.process import free_port

POLYTROPE = str(Path(sys.executable).with_name("polytrope"))
QUICK = {  # a client that notices sooner than by default that a server hangs
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "2",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class Server:
    """`mlflow server` on a free port, with its artifacts below `directory`, or at another address."""

    def __init__(self, directory: Path, backend: str | None = None, artifacts: str | None = None) -> None:
        self.directory = directory
        self.artifacts = artifacts or str(directory / "artifacts")
        self.backend = backend or f"sqlite:///{directory}/server.db"
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", self.backend, "--artifacts-destination", self.artifacts]
        with (self.directory / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--workers", "1"],
                env={**os.environ, **QUICK},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        for _ in range(1200):
            if self.answers():
                return self
            assert self.process.poll() is None, (self.directory / "server.log").read_text()[-2000:]
            time.sleep(0.1)
        raise AssertionError("the server does not start: " + (self.directory / "server.log").read_text()[-2000:])

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                return True
        except OSError:
            return False

    def signal(self, number: int) -> None:
        """To the server and its workers."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait()

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self.uri)

    def runs(self, experiment: str) -> dict[str, Run]:
        """Stage (`parent` for the workflow's) → MLflow run. Two for one stage are an error."""
        found = self.client.get_experiment_by_name(experiment)
        runs: dict[str, Run] = {}
        for run in self.client.search_runs([found.experiment_id]) if found is not None else ():
            stage = run.data.tags.get("polytrope.stage", "parent")
            assert stage not in runs, f"two runs of {stage}"
            runs[stage] = run
        return runs

    def curve(self, run: Run, name: str) -> list[tuple[int, float]]:
        """(step, value) of every stored point, by step."""
        history = self.client.get_metric_history(run.info.run_id, name)
        return sorted((point.step, point.value) for point in history)


class Postgres:
    """A PostgreSQL server of one's own (Debian package `postgresql`) that tests may kill, stop and start again."""

    def __init__(self) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if not found:
            pytest.skip("PostgreSQL is not installed (Debian package `postgresql`)")
        self.programs = found[-1].parent
        # it refuses to run as root
        self.user: dict[str, Any] = (
            {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        )
        self.directory = Path(tempfile.mkdtemp(prefix="polytrope-postgres-"))
        if self.user:
            shutil.chown(self.directory, "postgres", "postgres")
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        command = [self.programs / "initdb", "-D", self.directory / "data", "-A", "trust", "-U", "mlflow", "--no-sync"]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", **self.user)
        assert done.returncode == 0, done.stderr

    @property
    def uri(self) -> str:
        return f"postgresql://mlflow@127.0.0.1:{self.port}/postgres"

    def start(self) -> Postgres:
        with (self.directory / "log").open("ab") as log:
            place = ("-D", self.directory / "data", "-k", self.directory, "-p", str(self.port))
            self.process = subprocess.Popen(
                [self.programs / "postgres", *place, "-c", "fsync=off"],
                cwd="/",
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self.user,
            )
        ready = [self.programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port), "-U", "mlflow"]
        wait_until(lambda: subprocess.run(ready).returncode == 0, "PostgreSQL starts: " + str(self.directory / "log"))
        return self

    def signal(self, number: int) -> None:
        """To the server and its workers, which are in sessions of their own."""
        assert self.process is not None
        parent = psutil.Process(self.process.pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


def start(directory: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """`polytrope …` in `directory`, in the background."""
    return subprocess.Popen(
        [POLYTROPE, *arguments],
        cwd=directory,
        env={**os.environ, **QUICK, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def polytrope(directory: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Exit code and output of `polytrope …`."""
    process = start(directory, *arguments, environment=environment)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def wait_until(condition: Any, what: str, seconds: float = 60) -> None:
    """Wait for something that must happen."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"did not happen: {what}")


def copier(driver: int) -> psutil.Process:
    """The process of a driver that copies to MLflow."""
    for child in psutil.Process(driver).children():
        if "polytrope.pipeline.tracking.sync" in child.cmdline():
            return child
    raise AssertionError("no copying process")
