"""Runs on a real MLflow server that is killed, stopped, or away: complete in the end, and no point lost or doubled."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import mlflow_stages
import psutil
import pytest
import yaml
from mlflow_support import POLYTROPE, QUICK, Postgres, Server, copier, polytrope, start, wait_until

from polytrope.pipeline.tracking.process import free_port

STEPS = 40
NOTE = "mlflow.note.content"  # MLflow's tag of the description
EXPECTED = [(step, mlflow_stages.loss(step)) for step in range(STEPS)]

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server")).start()
    yield server
    server.kill()


@pytest.fixture
def project(tmp_path: Path, server: Server) -> Iterator[Path]:
    """A directory with the stages and a workflow of one training that waits for the test, and a report."""
    if not server.answers():  # a failed test left it down
        server.kill()
        server.start()
    make_project(tmp_path, server)
    yield tmp_path
    end_drivers()


def make_project(directory: Path, server: Server) -> None:
    shutil.copy(mlflow_stages.__file__, directory)
    (directory / "gates").mkdir()
    training = {"steps": STEPS, "gates": str(directory / "gates")}
    write(
        directory,
        server,
        {
            "train": {"uses": "mlflow_stages:train", "with": training},
            "report": {"uses": "mlflow_stages:report", "inputs": {"models": {"only": "train"}}},
        },
    )


def end_drivers() -> None:
    """Of a test that failed half-way."""
    for child in psutil.Process().children():
        if POLYTROPE in child.cmdline():
            child.terminate()


def write(project: Path, server: Server, stages: dict[str, object]) -> None:
    workflow = {
        "name": project.name,
        "description": "a small training",
        "executor": "local",
        "params": {"seed": 3, "nested": {"value": [1, 2]}},
        "tracking": {"uri": server.uri},
        "stages": stages,
    }
    (project / "w.yaml").write_text(yaml.safe_dump(workflow, sort_keys=False))


def pauses(*steps: int) -> tuple[str, str]:
    return "--set", f"stages.train.with.pauses={list(steps)}"


def reached(project: Path, step: int) -> None:
    wait_until((project / "gates" / f"reached-{step}").exists, f"step {step}")


def go_on(project: Path, step: int) -> None:
    (project / "gates" / str(step)).touch()


def run_directory(project: Path) -> Path:
    (directory,) = (project / ".polytrope" / "runs").iterdir()
    return directory


def ten_points_arrived(project: Path, server: Server) -> None:
    def arrived() -> bool:
        run = server.runs(project.name).get("train")
        return run is not None and len(server.curve(run, "train/loss")) == 10

    wait_until(arrived, "ten points arrive")


def assert_complete(server: Server, project: Path) -> None:
    """One parent, one run per stage, all FINISHED, every point once."""
    runs = server.runs(project.name)
    assert set(runs) == {"parent", "train", "report"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert server.curve(runs["train"], "train/loss") == EXPECTED
    assert [step for step, _ in server.curve(runs["train"], "lr")] == list(range(STEPS))
    assert server.curve(runs["parent"], "train/final_loss") == [(0, EXPECTED[-1][1])]
    assert server.curve(runs["report"], "models") == [(0, 1.0)]
    assert {item.path for item in server.client.list_artifacts(runs["parent"].info.run_id)} >= {"report.html"}


def test_returned_stages_are_runs_and_in_the_picture(project: Path, server: Server) -> None:
    report = {"uses": "mlflow_stages:report", "inputs": {"models": "more/*"}}
    write(project, server, {"more": {"uses": "mlflow_stages:more", "with": {"steps": 2}}, "report": report})
    code, output = polytrope(project, "run", "w.yaml")
    assert code == 0, output
    runs = server.runs(project.name)
    assert set(runs) == {"parent", "more", "more/train1", "more/train2", "report"}
    place = server.client.download_artifacts(runs["parent"].info.run_id, "graph.svg", str(project))
    assert "more/train2" in Path(place).read_text()


def test_a_run_is_in_mlflow_with_all_that_its_stages_said(project: Path, server: Server) -> None:
    training = {"steps": STEPS, "rate": "${matrix.rate}"}
    write(
        project,
        server,
        {
            "train": {"uses": "mlflow_stages:train", "with": training, "matrix": {"rate": [1.0, 2.0]}},
            "report": {"uses": "mlflow_stages:report", "inputs": {"models": "train"}},
            "report_slow": {"uses": "mlflow_stages:report", "inputs": {"models": {"slow": "train[rate=1.0]"}}},
        },
    )
    code, output = polytrope(project, "run", "w.yaml")
    assert code == 0, output
    assert "MLflow has not received everything" not in output
    runs = server.runs(project.name)
    assert set(runs) == {"parent", "train[rate=1.0]", "train[rate=2.0]", "report", "report_slow"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent, child = runs["parent"], runs["train[rate=2.0]"]
    assert {run.data.tags.get("mlflow.parentRunId") for run in runs.values()} == {None, parent.info.run_id}
    assert server.curve(child, "train/loss") == [(step, mlflow_stages.loss(step, 2.0)) for step in range(STEPS)]
    assert child.data.metrics["final_loss"] == 2.0 / STEPS
    assert child.data.params["rate"] == "2.0"
    assert child.data.params["parameters"] == "7"
    assert child.inputs.dataset_inputs[0].dataset.name == "numbers"
    assert child.inputs.dataset_inputs[0].dataset.digest == "d" * 36
    assert child.data.tags["polytrope.cache_hit"] == "false"
    assert len(child.data.tags["polytrope.key"]) == 64
    assert parent.data.params["seed"] == "3"
    assert parent.data.params["nested.value"] == "[1, 2]"
    assert parent.data.metrics["report/1.0/size"] > 0

    client = server.client
    shown = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"report.html", "workflow.json", "environment.json", "requirements.txt", "graph.svg", "comparison"} <= shown
    assert [item.path for item in client.list_artifacts(child.info.run_id)] == ["plots"]
    table = Path(client.download_artifacts(parent.info.run_id, "comparison/train.csv", str(project))).read_text()
    assert table.splitlines() == ["rate,final_loss,train/loss", "1.0,0.025,0.025", "2.0,0.05,0.05"]
    plot = Path(client.download_artifacts(parent.info.run_id, "comparison/train.png", str(project)))
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in Path(client.download_artifacts(parent.info.run_id, "graph.svg", str(project))).read_text()
    note = parent.data.tags[NOTE]
    assert "a small training" in note
    for page in ("report.html", "report_slow/report.html"):  # each in a folder of its own
        assert f"runs/{parent.info.run_id}/artifacts/{page}" in note
        assert "<h1>" in Path(client.download_artifacts(parent.info.run_id, page, str(project))).read_text()
    assert "| 2.0 | 0.05 | 0.05 |" in note
    assert parent.data.tags["mlflow.source.name"] == "w.yaml"
    shown_texts = [text for run in runs.values() for text in (*run.data.params.values(), run.data.tags.get(NOTE, ""))]
    assert not [text for text in shown_texts if str(project) in text]

    code, output = polytrope(project, "run", "w.yaml", "--set", "tracking.experiment=again")
    assert code == 0, output
    wait_until(lambda: {run.info.status for run in server.runs("again").values()} == {"FINISHED"}, "the second run")
    cached = server.runs("again")["train[rate=2.0]"]
    assert cached.data.tags["polytrope.cache_hit"] == "true"
    assert cached.data.tags["polytrope.source_run"] == parent.data.tags["polytrope.run_id"]
    assert cached.data.metrics["final_loss"] == 2.0 / STEPS
    assert child.info.run_id in cached.data.tags[NOTE]
    for name in ("train/loss", "lr"):  # its curves are here as well, so that runs can be compared
        assert server.curve(cached, name) == server.curve(child, name)
    assert cached.data.params == child.data.params
    shown = {item.path for item in client.list_artifacts(server.runs("again")["parent"].info.run_id)}
    assert "report.html" in shown  # the workflow's own page, although another run made it


def test_killed_server_loses_and_doubles_nothing(project: Path, server: Server) -> None:
    driver = start(project, "run", "w.yaml", *pauses(10, 20))
    reached(project, 10)
    ten_points_arrived(project, server)
    server.kill()
    go_on(project, 10)
    reached(project, 20)
    wait_until((run_directory(project) / "mlflow.error").exists, "the outage is noticed")
    go_on(project, 20)
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 0, output
    assert "MLflow has not received everything" in output
    assert f"polytrope sync {run_directory(project).name}" in output

    code, output = polytrope(project, "sync")
    assert code == 2
    assert "does not answer" in output

    server.start()
    assert server.runs(project.name)["train"].info.status == "RUNNING"
    for _ in range(2):  # the second time there is nothing left to send
        code, output = polytrope(project, "sync")
        assert code == 0, output
        assert "is complete in MLflow" in output
        assert_complete(server, project)


def test_stopped_server_loses_and_doubles_nothing(project: Path, server: Server) -> None:
    """Requests wait in its socket while the client gives up and asks again: the server will see both."""
    server.signal(signal.SIGSTOP)
    try:
        driver = start(project, "run", "w.yaml", *pauses(10, 20, 30), "--set", "tracking.required=false")
        reached(project, 10)
        directory = run_directory(project)
        wait_until((directory / "mlflow.error").exists, "the hanging server is noticed")
        server.signal(signal.SIGCONT)
        go_on(project, 10)
        reached(project, 20)
        wait_until(lambda: not (directory / "mlflow.error").exists(), "the server is back")
        server.signal(signal.SIGSTOP)
        go_on(project, 20)
        reached(project, 30)
        wait_until((directory / "mlflow.error").exists, "the hanging server is noticed again")
    finally:
        server.signal(signal.SIGCONT)
    go_on(project, 30)
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 0, output
    code, output = polytrope(project, "sync")
    assert code == 0, output
    assert_complete(server, project)


def test_killed_copying_process_is_replaced_by_sync(project: Path, server: Server) -> None:
    driver = start(project, "run", "w.yaml", *pauses(10, 20))
    reached(project, 10)
    ten_points_arrived(project, server)
    copier(driver.pid).kill()
    cursor = (run_directory(project) / "mlflow.json").read_bytes()
    go_on(project, 10)
    reached(project, 20)
    code, output = polytrope(project, "sync")
    assert code == 0, output
    assert "goes on" in output  # a live run is left RUNNING
    assert server.runs(project.name)["train"].info.status == "RUNNING"
    assert server.runs(project.name)["parent"].info.status == "RUNNING"
    # as if it had been killed between the server's commit and its own note of it
    (run_directory(project) / "mlflow.json").write_bytes(cursor)
    go_on(project, 20)
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 0, output
    assert "polytrope sync" in output
    code, output = polytrope(project, "sync")
    assert code == 0, output
    assert_complete(server, project)


def test_killed_driver_leaves_no_run_running_and_resume_reopens_the_same(project: Path, server: Server) -> None:
    driver = start(project, "run", "w.yaml", *pauses(10))
    reached(project, 10)
    wait_until(lambda: "train" in server.runs(project.name), "the stage is in MLflow")
    before = server.runs(project.name)
    children = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.communicate()
    psutil.wait_procs(children, timeout=30)
    runs = server.runs(project.name)
    assert {stage: run.info.status for stage, run in runs.items()} == {"parent": "KILLED", "train": "KILLED"}
    go_on(project, 10)
    code, output = polytrope(project, "resume")
    assert code == 0, output
    assert_complete(server, project)
    after = server.runs(project.name)
    assert {stage: after[stage].info.run_id for stage in before} == {
        stage: run.info.run_id for stage, run in before.items()
    }
    assert after["parent"].data.tags["polytrope.attempt"] == "2"


def test_next_run_repairs_what_a_dead_machine_left_running(project: Path, server: Server) -> None:
    driver = start(project, "run", "w.yaml", *pauses(10))
    reached(project, 10)
    wait_until(lambda: "train" in server.runs(project.name), "the stage is in MLflow")
    copier(driver.pid).kill()
    children = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.communicate()
    psutil.wait_procs(children, timeout=30)
    assert server.runs(project.name)["parent"].info.status == "RUNNING"
    go_on(project, 10)
    go_on(project, 30)
    other = ("--set", "stages.train.with.rate=2.0", "--set", "tracking.experiment=other-run")
    driver = start(project, "run", "w.yaml", *pauses(30), *other)
    wait_until(lambda: server.runs(project.name)["parent"].info.status == "KILLED", "the dead run is repaired")
    assert server.runs(project.name)["train"].info.status == "KILLED"
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 0, output


def test_failed_stage_says_why_until_it_is_repaired(project: Path, server: Server) -> None:
    go_on(project, 10)
    (project / "gates" / "fail").touch()
    code, output = polytrope(project, "run", "w.yaml", *pauses(10))
    assert code == 1, output
    runs = server.runs(project.name)
    assert (runs["train"].info.status, runs["parent"].info.status) == ("FAILED", "FAILED")
    assert runs["train"].data.tags["polytrope.error"] == "the corpus is gone"
    assert "`train` failed: the corpus is gone" in runs["parent"].data.tags[NOTE]
    (project / "gates" / "fail").unlink()
    code, output = polytrope(project, "resume")
    assert code == 0, output
    assert_complete(server, project)
    assert "polytrope.error" not in server.runs(project.name)["train"].data.tags


def test_stage_that_failed_and_was_left_out_is_a_failed_run_of_one_that_succeeded(
    project: Path, server: Server
) -> None:
    go_on(project, 10)
    (project / "gates" / "fail").touch()
    code, output = polytrope(project, "run", "w.yaml", *pauses(10), "--set", "stages.train.on_failure=skip")
    assert code == 0, output
    runs = server.runs(project.name)
    assert (runs["train"].info.status, runs["parent"].info.status) == ("FAILED", "FINISHED")
    assert runs["train"].data.tags["polytrope.skipped"] == "it failed (on_failure: skip): the corpus is gone"
    assert runs["train"].data.params["parameters"] == "7"  # what it said before
    assert runs["report"].data.metrics["models"] == 0


def test_unreachable_server_is_refused_at_the_start_or_written_down_for_later(project: Path, server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        code, output = polytrope(project, "run", "w.yaml", "--set", f"tracking.uri={address}")
        assert code == 2
        assert "does not answer" in output
        assert "tracking.required=false" in output
        assert not (project / ".polytrope" / "runs").exists() or not list((project / ".polytrope" / "runs").iterdir())
        code, output = polytrope(
            project, "run", "w.yaml", "--set", f"tracking.uri={address}", "--set", "tracking.required=false"
        )
        assert code == 0, output
        assert "MLflow has not received everything" in output
    # the server comes up under the address that the run was meant for
    directory = run_directory(project)
    record = (directory / "workflow.json").read_text()
    (directory / "workflow.json").write_text(record.replace(address, server.uri))
    code, output = polytrope(project, "sync", "--all")
    assert code == 0, output
    assert_complete(server, project)


def test_what_mlflow_refuses_is_named_and_the_rest_arrives(project: Path, server: Server) -> None:
    driver = start(project, "run", "w.yaml", *pauses(10))
    reached(project, 10)
    wait_until(lambda: "train" in server.runs(project.name), "the stage is in MLflow")
    server.client.delete_run(server.runs(project.name)["train"].info.run_id)
    go_on(project, 10)
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 0, output
    assert "a part was not taken" in output
    runs = server.runs(project.name)
    assert runs["report"].info.status == "FINISHED"
    assert runs["parent"].info.status == "FINISHED"
    code, output = polytrope(project, "sync")
    assert code == 1
    assert "metric train/loss" in output
    assert "train" in output


def test_runs_of_two_stores_with_one_id_are_two_runs(project: Path, server: Server) -> None:
    """Two people, two machines of a CI, or a store that was deleted: neither loses what it said."""
    write(project, server, {"train": {"uses": "mlflow_stages:train", "with": {"steps": 2, "gates": "."}}})
    for seed, store in ((1, "alice"), (2, "bob")):
        place = ("--store", store)
        code, output = polytrope(
            project, "run", "w.yaml", "--run-id", "nightly", *place, "--set", f"params.seed={seed}"
        )
        assert code == 0, output
    for store in ("alice", "bob"):  # again, without what is known of the first time
        (project / store / "runs" / "nightly" / "mlflow.json").unlink()
        code, output = polytrope(project, "sync", "nightly", "--store", store)
        assert code == 0, output
    experiment = server.client.get_experiment_by_name(project.name)
    runs = server.client.search_runs([experiment.experiment_id])
    parents = {run.info.run_id: run for run in runs if "mlflow.parentRunId" not in run.data.tags}
    assert sorted(run.data.params["seed"] for run in parents.values()) == ["1", "2"]
    children = [run for run in runs if run.info.run_id not in parents]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == set(parents)
    assert len(children) == 2


def test_odd_names_and_numbers_arrive(project: Path, server: Server) -> None:
    values = ["it's", 'a "quoted" one', "`back`"]
    stage = {"uses": "mlflow_stages:odd_names", "matrix": {"text": values}, "with": {"text": "${matrix.text}"}}
    write(project, server, {"odd": stage})
    code, output = polytrope(project, "run", "w.yaml")
    assert code == 0, output
    runs = server.runs(project.name)
    assert {run.data.metrics.get("length") for name, run in runs.items() if name != "parent"} == {4.0, 14.0, 6.0}
    run = runs["odd[text=it's]"]
    assert run.data.metrics["a/b/c"] == 1.0
    assert run.data.metrics["a-b.c.d"] > 1e308
    assert run.data.metrics["x" * 250] == 2.0
    assert [item.path for item in server.client.list_artifacts(run.info.run_id)] == ["x"]
    assert "a part was not taken" in output  # the file that the stage never wrote


def test_address_with_a_password_shows_it_nowhere(project: Path, server: Server) -> None:
    address = server.uri.replace("http://", "http://somebody:${env.MLFLOW_TEST_PASSWORD}@")
    code, output = polytrope(
        project,
        "run",
        "w.yaml",
        "--set",
        f"tracking.uri={address}",
        environment={"MLFLOW_TEST_PASSWORD": "s3cr3t-w0rd"},
    )
    assert code == 0, output
    assert_complete(server, project)
    for path in (project / ".polytrope").rglob("*"):
        if path.is_file():
            assert b"s3cr3t-w0rd" not in path.read_bytes(), path
    assert os.environ.get("MLFLOW_TEST_PASSWORD") is None


def test_registered_model_is_loaded_by_its_alias_and_served(
    project: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "it's a model"
    stage = {"uses": "mlflow_stages:make_model", "with": {"name": name}}
    write(project, server, {"model": stage})
    for _ in range(2):  # the second run has the same artifact: no second version
        code, output = polytrope(project, "run", "w.yaml")
        assert code == 0, output
    code, output = polytrope(project, "sync", "--all")
    assert code == 0, output
    version = server.client.get_model_version_by_alias(name, "champion")
    assert version.version == "1"
    assert [model.name for model in server.client.search_registered_models()] == [name]
    assert [item.version for item in server.client.get_registered_model(name).latest_versions] == ["1"]
    assert version.tags["polytrope.stage"] == "model"

    address = f"models:/{name}@champion"
    for variable, value in {**QUICK, "MLFLOW_TRACKING_URI": server.uri}.items():
        monkeypatch.setenv(variable, value)
    model = mlflow.pyfunc.load_model(address)
    options = {"max_new_tokens": 6, "seed": 1}
    expected = model.predict(["ab", "c"], params=options)
    assert [text[: len(start)] for text, start in zip(expected, ["ab", "c"], strict=True)] == ["ab", "c"]
    assert model.predict(["ab", "c"], params=options) == expected
    assert model.metadata.get_params_schema() is not None
    assert model.input_example == ["The "]

    port = free_port()
    serve = [sys.executable, "-m", "mlflow", "models", "serve", "-m", address, "--env-manager", "local"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # `serve` starts the environment's uvicorn by name
    with (project / "serve.log").open("wb") as log:
        service = subprocess.Popen(
            [*serve, "--port", str(port)],
            env={**os.environ, "PATH": path},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: service.poll() is not None or answers(f"{url}/ping"), "the model is served", 120)
        assert service.poll() is None, (project / "serve.log").read_text()[-2000:]
        question = json.dumps({"inputs": ["ab", "c"], "params": options}).encode()
        request = urllib.request.Request(f"{url}/invocations", question, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["predictions"] == expected
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(service.pid, signal.SIGTERM)
        service.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    database = Postgres()
    yield database
    database.close()


def test_database_killed_and_stopped_behind_the_server_loses_and_doubles_nothing(
    tmp_path: Path, postgres: Postgres
) -> None:
    server = Server(tmp_path, postgres.start().uri).start()
    try:
        make_project(tmp_path, server)
        driver = start(tmp_path, "run", "w.yaml", *pauses(10, 20, 30))
        reached(tmp_path, 10)
        ten_points_arrived(tmp_path, server)
        failure = run_directory(tmp_path) / "mlflow.error"
        postgres.signal(signal.SIGSTOP)
        go_on(tmp_path, 10)
        reached(tmp_path, 20)
        wait_until(failure.exists, "the hanging database is noticed")
        postgres.signal(signal.SIGCONT)
        wait_until(lambda: not failure.exists(), "the database is back")
        postgres.kill()
        go_on(tmp_path, 20)
        reached(tmp_path, 30)
        wait_until(failure.exists, "the dead database is noticed")
        postgres.start()
        go_on(tmp_path, 30)
        output, _ = driver.communicate(timeout=90)
        assert driver.returncode == 0, output
        code, output = polytrope(tmp_path, "sync")
        assert code == 0, output
        assert_complete(server, tmp_path)
    finally:
        end_drivers()
        server.kill()
