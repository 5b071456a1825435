"""The services of infra/compose.yaml without containers, all real and together, with the quickstart on them.

PostgreSQL (Debian), an S3 API server (moto), `mlflow serve` on both, a Ray head without CPUs and two nodes.
The store, its journal and its leases are in the bucket; nothing but the bucket and MLflow is asked afterwards.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow_support import Postgres, Server, wait_until
from quickstart_support import REPOSITORY, SETTINGS
from ray_support import PROGRAMS, Ray
from s3_support import Objects, S3Server, bucket_on

from polytrope.pipeline.runs.journal import RunState, fold, read
from polytrope.pipeline.store.store import Store

SHORTER = {"sequence_length": 32, "corpus_bytes": 300_000, "n_layer": 1, "steps": 30, "finetune_steps": 12}

pytestmark = pytest.mark.timeout(600)


@dataclass
class Services:
    """What a cluster has beside polytrope."""

    ray: Ray
    mlflow: Server
    store: str  # s3://…
    directory: Path

    def polytrope(self, *arguments: str) -> str:
        """Output of a command that must succeed, run like on a laptop which knows only addresses."""
        done = subprocess.run(
            [str(PROGRAMS / "polytrope"), *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def state(self, run: str) -> RunState:
        """What the bucket says of a run, seen by a machine that has no copy of anything."""
        os.environ["POLYTROPE_CACHE"] = str(self.directory / "elsewhere")  # put back by `bucket_on`'s monkeypatch
        store = Store(self.store)
        store.pull_run(run)
        return fold(read(store.run_directory(run)))


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Services]:
    for name in [name for name in os.environ if name.startswith(("RAY_", "MLFLOW_TRACKING"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    postgres = Postgres().start()
    s3 = S3Server()
    mlflow: Server | None = None
    ray: Ray | None = None
    try:
        store = bucket_on(s3, tmp_path, monkeypatch)
        Objects("s3://mlflow").client.create_bucket(Bucket="mlflow")
        mlflow = Server(tmp_path, postgres.uri, "s3://mlflow").start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow.uri)
        ray = Ray(tmp_path)
        ray.add_node()
        ray.add_node()
        wait_until(lambda: ray.nodes() == 3, "two nodes join the head")
        yield Services(ray, mlflow, store, tmp_path)
    finally:
        if ray is not None:
            ray.end()
        if mlflow is not None:
            mlflow.kill()
        s3.end()
        postgres.close()


def test_the_quickstart_on_all_services_together(services: Services) -> None:
    settings = [word for name, value in {**SETTINGS, **SHORTER}.items() for word in ("--set", f"params.{name}={value}")]
    place = ["--address", services.ray.address]
    submitted = services.polytrope(
        "submit", "workflows/quickstart.yaml", *place, "--store", services.store, "--run-id", "all", "--wait", *settings
    )
    assert "Ray job all-attempt-1" in submitted
    assert "run all succeeded" in submitted
    assert ", succeeded, attempt 1, ray executor" in services.polytrope("status", "all", *place)

    state = services.state("all")
    assert {stage.state for stage in state.stages.values()} == {"succeeded"}
    bucket = Objects(services.store)
    for stage in state.stages.values():
        assert bucket.get(f"artifacts/{stage.key}/manifest.json")
    left = [name for name in bucket.list("") if name.startswith(("leases/", "scratch/"))]
    assert left == []

    runs = services.mlflow.runs("quickstart")
    assert set(runs) == {"parent", *state.stages}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["evaluate"].data.metrics["finetuned/val_loss"] == pytest.approx(
        state.stages["evaluate"].summary["finetuned/val_loss"]
    )
    shown = {item.path for item in services.mlflow.client.list_artifacts(runs["parent"].info.run_id)}
    assert "report.html" in shown
    assert Objects("s3://mlflow").list(""), "MLflow's artifacts are in its own bucket"
    model = services.mlflow.client.get_registered_model("quickstart-gpt2")
    assert model.latest_versions

    plan = services.polytrope("plan", "workflows/quickstart.yaml", "--store", services.store, "--json", *settings)
    missing = {stage["stage"]: stage["reasons"] for stage in json.loads(plan)["stages"] if stage["action"] != "hit"}
    assert missing == {}, "another machine finds all of it"
