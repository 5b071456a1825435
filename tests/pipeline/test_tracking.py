"""Addresses of MLflow are checked without MLflow; what stages say is put into a form that MLflow accepts."""

from __future__ import annotations

import base64
import http.server
import math
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.protos import databricks_pb2
from mlflow.utils.validation import _validate_metric, _validate_param

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import RunState, StageState
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.tracking import names as mlflow_names
from polytrope.pipeline.tracking import overview as mlflow_summary
from polytrope.pipeline.tracking.cursor import Cursor
from polytrope.pipeline.tracking.process import check_port, check_tracking, free_port, tracking_uri, without_password
from polytrope.pipeline.tracking.server import is_permanent


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers every request with the server's `code`, and keeps what it was asked."""

    def do_GET(self) -> None:
        self.server.asked = (self.path, self.headers.get("Authorization"))  # type: ignore[attr-defined]
        self.send_response(self.server.code)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[Any]:
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.code = 200
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_configured_address_then_environment_then_the_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-environment")
    assert tracking_uri("http://configured", tmp_path) == "http://configured"
    assert tracking_uri(None, tmp_path) == "http://from-environment"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_server_that_answers_is_accepted_with_its_password(web: Any) -> None:
    address = f"http://me:p%40ss@127.0.0.1:{web.server_port}/prefix/"
    check_tracking(address)
    assert web.asked == ("/prefix/health", "Basic " + base64.b64encode(b"me:p@ss").decode())
    assert without_password(address) == f"http://127.0.0.1:{web.server_port}/prefix/"
    web.code = 403  # a proxy guards /health
    check_tracking(address)


@pytest.mark.parametrize("code", [500, 503])
def test_a_broken_server_is_refused_without_showing_its_password(web: Any, code: int) -> None:
    web.code = code
    with pytest.raises(UserError, match=f"error {code}") as caught:
        check_tracking(f"http://me:hidden@127.0.0.1:{web.server_port}")
    assert "hidden" not in str(caught.value)


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    port = free_port()
    with pytest.raises(UserError, match="does not answer"):
        check_tracking(f"http://127.0.0.1:{port}")
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(UserError, match="does not answer"):
        check_tracking(f"http://127.0.0.1:{silent.getsockname()[1]}")
    with pytest.raises(UserError, match=f"127.0.0.1:{port}/db does not answer") as caught:
        check_tracking(f"postgresql://me:hidden@127.0.0.1:{port}/db")
    assert "hidden" not in str(caught.value)
    with pytest.raises(UserError, match="sqlite:///"):
        check_tracking(str(tmp_path))
    with pytest.raises(UserError, match="unknown kind of address `htp`"):
        check_tracking("htp://127.0.0.1")
    check_tracking(f"sqlite:///{tmp_path}/new/mlflow.db")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_database_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch(mode=0o444)
    with pytest.raises(UserError, match="cannot be written"):
        check_tracking(f"sqlite:///{tmp_path}/mlflow.db")


def test_the_driver_does_not_import_mlflow() -> None:
    program = "import sys, polytrope.pipeline.launch.launch; assert 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_port_in_use_is_refused_by_the_name_of_who_has_it() -> None:
    port = free_port()
    check_port("127.0.0.1", port)
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(UserError, match=rf"--port {port}: is used by process {os.getpid()} \(.*pytest") as refused:
            check_port("127.0.0.1", port)
        assert re.fullmatch(r"end it, or give another one: `--port \d+`", refused.value.hint)
        assert f"--port {port}`" not in refused.value.hint
    check_port("127.0.0.1", port)
    with pytest.raises(UserError, match="--port 70000: is no port"):
        check_port("127.0.0.1", 70000)
    with pytest.raises(UserError, match=r"--host 192\.0\.2\.1 --port"):
        check_port("192.0.2.1", port)


@given(st.text(max_size=300), st.floats(), st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_whatever_a_stage_logs_is_a_metric_that_mlflow_takes(name: str, value: float, step: float | None) -> None:
    metric = Metric(mlflow_names.mlflow_name(name), mlflow_names.number(value), 1, mlflow_names.step_number(step))
    _validate_metric(metric.key, metric.value, metric.timestamp, metric.step)
    assert -(2**63) <= metric.step < 2**63
    assert not math.isinf(metric.value)


@given(st.text(max_size=300), st.text(max_size=50))
def test_whatever_a_stage_is_given_is_a_parameter_that_mlflow_takes(name: str, value: str) -> None:
    for key, text in mlflow_names.flatten({name: {"inner": value, "list": [1, None]}}).items():
        parameter = Param(mlflow_names.mlflow_name(key), text[: mlflow_names.PARAMETER_LENGTH])
        _validate_param(parameter.key, parameter.value)


def test_branches_have_readable_names() -> None:
    assert mlflow_names.mlflow_name("train[degree=3,seed=1]/val/loss") == "train.degree-3.seed-1/val/loss"
    assert mlflow_names.mlflow_name("val/loss") == "val/loss"


def response(code: int) -> requests.HTTPError:
    answer = requests.Response()
    answer.status_code = code
    return requests.HTTPError(response=answer)


@pytest.mark.parametrize(
    ("error", "permanent"),
    [
        (MlflowException("bad name", databricks_pb2.INVALID_PARAMETER_VALUE), True),
        (MlflowException("no such run", databricks_pb2.RESOURCE_DOES_NOT_EXIST), True),
        (MlflowException("connection refused"), False),
        (MlflowException("the database went away", databricks_pb2.BAD_REQUEST), False),
        (MlflowException("busy", databricks_pb2.TEMPORARILY_UNAVAILABLE), False),
        (MlflowException("token", databricks_pb2.UNAUTHENTICATED), False),
        (response(413), True),
        (response(429), False),
        (response(502), False),
        (requests.ConnectionError("refused"), False),
        (requests.exceptions.JSONDecodeError("a proxy's page", "<html>", 0), False),
        (ConnectionResetError(), False),
        (FileNotFoundError("x"), True),
    ],
)
def test_only_what_no_second_try_changes_is_given_up(error: Exception, permanent: bool) -> None:
    assert is_permanent(error) is permanent


def state_of(**summaries: dict[str, float]) -> RunState:
    stages = {name.replace("__", "["): values for name, values in summaries.items()}
    return RunState(stages={name: StageState(name, "succeeded", summary=values) for name, values in stages.items()})


def test_result_table_has_a_row_per_label() -> None:
    state = state_of(train={"loss": 1.0}, evaluate={"a/loss": 2.0, "a/perplexity": 7.4, "b/loss": 1.5})
    table = mlflow_summary.result_table(state)
    assert table == ("evaluate", ["", "loss", "perplexity"], [["a", "2", "7.4"], ["b", "1.5", ""]])
    assert mlflow_summary.result_table(state_of(train={"loss": 1.0})) == ("train", ["metric", "value"], [["loss", "1"]])
    assert mlflow_summary.result_table(RunState()) is None
    mixed = state_of(report={"a/loss": 1.0, "a/top1": 0.5, "b/loss": 2.0, "entropy": 6.0})
    assert mlflow_summary.result_table(mixed) == (
        "report",
        ["", "loss", "top1"],
        [["a", "1", "0.5"], ["b", "2", ""], ["entropy", "6", ""]],
    )


def test_branches_are_compared_by_their_axes() -> None:
    names = [
        "train[activation=gelu,seed=0]",
        "train[activation=gelu,seed=1]",
        "train[activation=relu,seed=0]",
        "report",
    ]
    stages = {name: StageState(name, "succeeded", summary={"loss": float(i)}) for i, name in enumerate(names)}
    (comparison,) = mlflow_summary.comparisons(RunState(stages=stages)).values()
    assert comparison.csv() == "activation,seed,loss\ngelu,0,0.0\ngelu,1,1.0\nrelu,0,2.0\n"
    assert mlflow_summary.draw(comparison).startswith(b"\x89PNG")


def test_description_of_a_large_run_stays_within_the_limit() -> None:
    stages = {f"train[x={i}]": StageState(f"train[x={i}]", "succeeded", summary={"loss": 1.0 * i}) for i in range(200)}
    record = {"workflow": {"name": "w", "description": "what it is"}, "environment": {}}
    children = dict.fromkeys(stages, "c" * 32)
    text = mlflow_summary.describe(RunState(stages=stages), record, "failed", "1", "p" * 32, children, 5000)
    assert len(text) <= 5000
    assert text.startswith("what it is")
    assert "**failed**" in text


def test_of_very_many_refusals_the_first_are_kept_and_the_last_line_says_that_there_are_more() -> None:
    cursor = Cursor()
    for number in (*range(50), 0):
        cursor.refuse(f"metric {number}: no")
    assert len(cursor.refused) == 50
    for number in range(50, 60):
        cursor.refuse(f"metric {number}: no")
    assert cursor.refused[-2:] == ["metric 49: no", "and more; logs/mlflow.log of the run has all"]


def test_another_run_that_cannot_be_judged_is_left_alone_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from polytrope.pipeline.tracking.process import log_file
    from polytrope.pipeline.tracking.sync import needs_copy

    store = Store(tmp_path)
    for name, record in (
        ("torn", '{"workflow": {"tra'),
        ("odd", '{"workflow": []}'),
        ("bad", '{"workflow": {"tracking": 3}}'),
    ):
        directory = store.run_directory(name)
        log_file(directory).parent.mkdir(parents=True)
        log_file(directory).touch()
        (directory / "workflow.json").write_text(record)
        caplog.clear()
        assert not needs_copy(store, directory, "sqlite:///x.db")
        assert [message.split(":")[0] for message in caplog.messages] == [
            f"run {name} cannot be looked at, so it is not completed in MLflow"
        ]
