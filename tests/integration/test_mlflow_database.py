"""MLflow's database in the store: never half made, and one thing that it does not take holds back nothing else."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from mlflow_support import copier, polytrope

from polytrope.pipeline.tracking.database import ensure_database

pytestmark = pytest.mark.timeout(240)

STAGES = """
import os
from polytrope.pipeline.stage import StageContext


def good(context: StageContext) -> dict[str, float]:
    context.log_metrics({"loss": 1.0}, step=1)
    return {"fine": 1.0}


def odd(context: StageContext) -> dict[str, float]:
    context.log_params({"file": os.fsdecode(b"caf\\xe9.txt"), "zero": "a\\0b", "long": "x" * 7000})
    context.log_metrics({"acc@1": 1.0, "acc_1": 2.0, "top[k=1]": 3.0, "top.k-1": 4.0}, step=1)
    context.log_metrics({"x" * 260: 5.0, "x" * 255: 6.0}, step=1)
    for step in range(20):
        context.log_metrics({"bad": 0.5, "curve": float(step)}, step=step)
    (context.output / "page.html").write_text("page")
    context.log_artifact("page.html", parent=True)
    return {"done": 1.0}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("MLFLOW")]:
        monkeypatch.delenv(name)
    (tmp_path / "said.py").write_text(STAGES)
    stages = {name: {"uses": f"said:{name}"} for name in ("good", "odd")}
    (tmp_path / "w.yaml").write_text(yaml.safe_dump({"name": "w", "executor": "local", "stages": stages}))
    return tmp_path


def runs(project: Path) -> dict[str, Run]:
    client = MlflowClient(tracking_uri=uri(project))
    experiment = client.get_experiment_by_name("w")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    return {run.data.tags.get("polytrope.stage", "parent"): run for run in found}


def uri(project: Path) -> str:
    return f"sqlite:///{project}/.polytrope/mlflow.db"


def points(project: Path, run: Run, name: str) -> list[tuple[int, float]]:
    history = MlflowClient(tracking_uri=uri(project)).get_metric_history(run.info.run_id, name)
    return sorted((item.step, item.value) for item in history)


def statuses(project: Path) -> dict[str, str]:
    return {name: run.info.status for name, run in runs(project).items()}


def test_what_the_database_and_the_artifact_store_do_not_take_is_listed_and_all_else_arrives(project: Path) -> None:
    ensure_database(uri(project))
    with sqlite3.connect(project / ".polytrope/mlflow.db") as connection:
        refusal = "begin select raise(abort, 'this value cannot be held'); end"
        connection.execute(f"create trigger refuse before insert on metrics when new.key = 'bad' {refusal}")
    connection.close()
    place = project / "artifacts"
    place.write_text("not a directory")
    client = MlflowClient(tracking_uri=uri(project))
    client.create_experiment("w", artifact_location=(place / "here").as_uri())

    code, output = polytrope(project, "run", "w.yaml", "--run-id", "r")
    assert code == 0, output
    assert "MLflow has not received everything: a part was not taken" in output
    code, output = polytrope(project, "sync", "r")
    assert code == 1, output
    assert "metric bad = 0.5 at step 3: " in output
    assert "artifact page.html of odd: " in output
    assert set(statuses(project).values()) == {"FINISHED"}
    run = runs(project)["odd"]
    assert points(project, run, "curve") == [(step, float(step)) for step in range(20)]
    assert points(project, runs(project)["good"], "loss") == [(1, 1.0)]
    assert "bad" not in run.data.metrics
    assert run.data.params["file"] == "caf\\udce9.txt"
    assert run.data.params["zero"] == "a\\x00b"
    assert run.data.params["long"].endswith("x … (cut)")
    assert len(run.data.params["long"]) == 6000
    values = {name: value for name, value in run.data.metrics.items() if name not in ("curve", "done")}
    assert sorted(values.values()) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert (values["acc_1"], values["top.k-1"]) == (1.0, 3.0)  # the first of two keeps the short name

    place.unlink()
    code, output = polytrope(project, "sync", "r")
    assert code == 1
    assert "page.html" not in output
    there = place / "here" / runs(project)["parent"].info.run_id / "artifacts"
    assert (there / "odd/page.html").read_text() == "page"
    assert "said:odd" in (there / "workflow.json").read_text()


def test_a_copier_killed_while_it_makes_the_database_leaves_no_half_of_it(project: Path) -> None:
    command = [str(Path(sys.executable).parent / "polytrope"), "run", "w.yaml", "--run-id", "first", "-q"]
    driver = subprocess.Popen(command, cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    busy = project / ".polytrope/runs/first/mlflow.busy"
    temporary: list[Path] = []
    while not temporary or temporary[0].stat().st_size < 100_000:  # in the middle of the migrations
        assert driver.poll() is None
        time.sleep(0.005)
        temporary = [
            path for path in (project / ".polytrope").glob(".mlflow.db.*") if not path.name.endswith("-journal")
        ]
    assert busy.exists()
    copier(driver.pid).kill()
    driver.wait(60)
    assert not (project / ".polytrope/mlflow.db").exists()
    code, output = polytrope(project, "sync", "first")
    assert code == 0, output
    assert set(statuses(project).values()) == {"FINISHED"}


def test_a_database_that_was_left_half_made_is_made_anew_and_one_with_runs_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    with sqlite3.connect(path) as connection:
        connection.execute("create table alembic_version (version_num varchar(32))")
        connection.execute("insert into alembic_version values ('451aebb31d03')")
        connection.execute("create table runs (run_uuid varchar(32))")
    connection.close()
    ensure_database(f"sqlite:///{path}")
    client = MlflowClient(tracking_uri=f"sqlite:///{path}")
    client.create_run("0")
    assert len(list(tmp_path.glob("mlflow.db.half-made-*"))) == 1
    inode = path.stat().st_ino
    with sqlite3.connect(path) as connection:
        connection.execute("update alembic_version set version_num = '451aebb31d03'")  # of an older MLflow, with a run
    connection.close()
    ensure_database(f"sqlite:///{path}")
    assert path.stat().st_ino == inode
