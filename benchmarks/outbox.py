"""What an MLflow outage costs a training step: `python -m benchmarks.outbox` prints a table and writes JSON.

A workflow with one stage, which logs three metrics per step, runs against a real `mlflow server` on sqlite that is up,
stopped (SIGSTOP: it takes connections and never answers), killed, and against one that answers every request with 500.
Measured: the duration of each `log_metrics` call in the stage, and, after the outage and `polytrope sync`, the points
that are in MLflow: each must be there once. The bar: 1 ms per step.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from polytrope.pipeline.tracking.process import free_port

ROOT = Path(__file__).resolve().parent.parent
BAR_MILLISECONDS = 1.0
CASES = ("up", "stopped", "killed", "answering 500")
ENVIRONMENT = {
    **os.environ,
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "2",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PYTHONPATH": str(ROOT),
}


class Server:
    """`mlflow server` on sqlite."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.port = directory, free_port(0)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.directory}/server.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self.directory / "artifacts")]
        with (self.directory / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True)
        import urllib.request

        for _ in range(600):
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2),
            ):
                return
            time.sleep(0.2)
        raise SystemExit(
            "the server does not start: " + (self.directory / "server.log").read_text(encoding="utf-8")[-1000:]
        )

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)
            if number == signal.SIGKILL:
                self.process.wait()


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers everything with 500."""

    def do_GET(self) -> None:
        self.send_error(500)

    do_POST = do_PATCH = do_PUT = do_GET

    def log_message(self, *_: Any) -> None:
        """Nothing: every request is the same."""


@contextlib.contextmanager
def refusing(port: int) -> Iterator[None]:
    """A server at the port that answers every request with 500."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def polytrope(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A `polytrope` command in a process of its own."""
    command = [sys.executable, "-m", "polytrope.pipeline.commands.cli", *arguments]
    return subprocess.run(command, cwd=directory, env=ENVIRONMENT, capture_output=True, encoding="utf-8", check=False)


def measure(case: str, steps: int, step_seconds: float) -> dict[str, Any]:
    """One case: the calls' durations, and the points in MLflow after the outage."""
    from mlflow.tracking import MlflowClient

    with tempfile.TemporaryDirectory(prefix="polytrope-outbox-") as name:
        directory = Path(name)
        server = Server(directory)
        uri = f"http://127.0.0.1:{server.port}"
        stage = {"uses": "benchmarks.outbox_stages:log_steps", "with": {"steps": steps, "step_seconds": step_seconds}}
        workflow = {
            "name": "outbox",
            "executor": "local",
            "tracking": {"uri": uri, "required": False},
            "stages": {"train": stage},
        }
        (directory / "w.yaml").write_text(yaml.safe_dump(workflow), encoding="utf-8")
        try:
            server.start()
            if case == "stopped":
                server.signal(signal.SIGSTOP)
            elif case != "up":
                server.signal(signal.SIGKILL)
            with refusing(server.port) if case == "answering 500" else contextlib.nullcontext():
                done = polytrope(directory, "run", "w.yaml")
            if done.returncode:
                raise SystemExit(done.stdout + done.stderr)
            (file,) = (directory / ".polytrope" / "artifacts").glob("*/files/calls.json")
            calls = sorted(json.loads(file.read_text(encoding="utf-8")))
            if case == "stopped":
                server.signal(signal.SIGCONT)
            elif case != "up":
                server.start()
            done = polytrope(directory, "sync")
            if done.returncode:
                raise SystemExit(done.stdout + done.stderr)
            os.environ.update({"MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true"})
            client = MlflowClient(tracking_uri=uri)
            experiment = client.get_experiment_by_name("outbox")
            runs = [
                run
                for run in client.search_runs([experiment.experiment_id])
                if run.data.tags.get("polytrope.stage") == "train"
            ]
            points = [point.step for run in runs for point in client.get_metric_history(run.info.run_id, "train/loss")]
        finally:
            server.signal(signal.SIGCONT)
            server.signal(signal.SIGKILL)
    return {
        "steps": steps,
        "median_ms": statistics.median(calls) / 1e6,
        "p99_ms": calls[int(0.99 * len(calls))] / 1e6,
        "p999_ms": calls[int(0.999 * len(calls))] / 1e6,
        "maximum_ms": calls[-1] / 1e6,
        "mean_ms": statistics.fmean(calls) / 1e6,
        "points_lost": steps - len(set(points)),
        "points_doubled": len(points) - len(set(points)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000, help="of each case (default 5000)")
    parser.add_argument(
        "--step-seconds", type=float, default=0.005, help="a step takes without logging (default 0.005)"
    )
    parser.add_argument("--only", action="append", choices=CASES, help="measure this only; repeatable")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "outbox.json")
    options = parser.parse_args()
    results = {}
    for case in options.only or CASES:
        results[case] = measure(case, options.steps, options.step_seconds)
        print(f"{case}: {json.dumps(results[case])}", flush=True)
    record = {
        "command": "python -m benchmarks.outbox",
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
        "bar_ms": BAR_MILLISECONDS,
        "results": results,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    heads = ["server", "median, ms", "99 %", "99.9 %", "longest", "lost", "doubled"]
    rows = [
        [
            case,
            *(f"{figures[key]:.3f}" for key in ("median_ms", "p99_ms", "p999_ms", "maximum_ms")),
            str(figures["points_lost"]),
            str(figures["points_doubled"]),
        ]
        for case, figures in results.items()
    ]
    table = "\n".join("| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *rows))
    options.output.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
