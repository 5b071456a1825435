"""A real Ray cluster of several `ray start` processes on this machine, whose head and nodes tests may kill."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from mlflow_support import wait_until

from polytrope.pipeline.tracking.process import free_port

PROGRAMS = Path(sys.executable).parent


class Ray:
    """`ray start --head` without CPUs, and nodes beside it.

    Args:
        directory: for its log.
        token: what everybody must know who talks to it; None: nobody is asked.
    """

    def __init__(self, directory: Path, token: str | None = None) -> None:
        self.directory = directory
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
        self.environment = {**kept, **access, "PATH": f"{PROGRAMS}:{os.environ['PATH']}"}
        self.port, self.dashboard = free_port(), free_port()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.places: list[Path] = []
        self.start(
            "--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard}", f"--ray-client-server-port={free_port()}",
        )  # fmt: skip
        self.address = f"http://127.0.0.1:{self.dashboard}"
        wait_until(self.answers, "the Ray head starts", 90)

    def start(self, *options: str) -> None:
        command = [str(PROGRAMS / "ray"), "start", "--block", "--node-ip-address=127.0.0.1", *options]
        command += [f"--dashboard-agent-listen-port={free_port()}", f"--dashboard-agent-grpc-port={free_port()}"]
        command += ["--object-store-memory=100000000", "--disable-usage-stats"]
        # one each, as on different machines: Ray removes a job's files from it when a node no longer uses them
        self.places.append(Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp")))  # short: it holds sockets
        command += [f"--temp-dir={self.places[-1]}"]
        with (self.directory / "ray.log").open("ab") as log:
            self.processes.append(
                subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
            )

    def ask(self, path: str) -> Any:
        """The JSON answer of the dashboard."""
        token = self.environment.get("RAY_AUTH_TOKEN")
        request = urllib.request.Request(
            self.address + path, headers={"Authorization": f"Bearer {token}"} if token else {}
        )
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer)

    def answers(self) -> bool:
        assert self.processes[0].poll() is None, (self.directory / "ray.log").read_text()[-2000:]
        try:
            return bool(self.ask("/api/version"))
        except OSError:
            return False

    def add_node(self) -> None:
        self.start(f"--address=127.0.0.1:{self.port}", "--num-cpus=1")

    def nodes(self) -> int:
        """How many live, the head among them."""
        summary = self.ask("/nodes?view=summary")["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in summary)

    def kill(self, number: int) -> None:
        """The head (0) or a node with everything on it, as a machine that loses its power."""
        process = self.processes[number]
        for child in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait()

    def end(self) -> None:
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for place in self.places:
            shutil.rmtree(place, ignore_errors=True)
