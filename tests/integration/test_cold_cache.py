"""A store in a bucket, seen from a machine that has no copy of anything: the truth is in the bucket alone."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from mlflow_support import Server
from s3_support import S3Server, bucket_on

from polytrope.pipeline.commands.cli import main
from polytrope.pipeline.launch.launch import launch
from polytrope.pipeline.runs.journal import RunState, fold, read
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.workflow.spec import load_workflow

HERE = Path(__file__).parent


@dataclass
class Finished:
    address: str
    state: RunState
    mlflow: Server


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """A run that was computed on another machine while MLflow was away."""
    directory = tmp_path_factory.mktemp("cold")
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.ExitStack() as servers:
        s3 = S3Server()
        servers.callback(s3.end)
        mlflow = Server(directory)
        servers.callback(mlflow.kill)
        monkeypatch.syspath_prepend(str(HERE))
        address = bucket_on(s3, directory, monkeypatch)
        inner = {"name": "inner", "stages": {"only": {"uses": "cold_cache_stages:inner"}}}
        (directory / "inner.yaml").write_text(yaml.safe_dump(inner))
        stages = {
            "data": {"uses": "cold_cache_stages:data"},
            "train": {"uses": "cold_cache_stages:train", "inputs": {"dataset": "data"}},
            "nested": {"uses": "subworkflow", "with": {"path": "inner.yaml"}},
        }
        tracking = {"uri": mlflow.uri, "required": False}
        content = {"name": "cold", "executor": "local", "tracking": tracking, "stages": stages}
        (directory / "w.yaml").write_text(yaml.safe_dump(content))
        monkeypatch.chdir(directory)
        state = launch(load_workflow(directory / "w.yaml"), store=address, run_id="first")
        assert state.status == "succeeded", {name: stage.error for name, stage in state.stages.items()}
        (directory / "cache").rename(directory / "gone")
        mlflow.start()
        yield Finished(address, state, mlflow)


@pytest.fixture
def cold(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Finished:
    """This machine has an empty cache."""
    monkeypatch.setenv("POLYTROPE_CACHE", str(tmp_path / "empty"))
    return finished


def test_sync_sends_pages_and_data_sets(cold: Finished) -> None:
    assert main(["sync", "first", "--store", cold.address]) == 0
    train = cold.mlflow.runs("cold")["train"]
    assert "page.html" in {item.path for item in cold.mlflow.client.list_artifacts(train.info.run_id)}
    data = cold.mlflow.client.get_run(cold.mlflow.runs("cold")["data"].info.run_id)
    assert [item.dataset.name for item in data.inputs.dataset_inputs] == ["ours"]
    assert data.data.tags["polytrope.key"] == cold.state.stages["data"].key


def test_sync_says_what_it_cannot_send(cold: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    """The artifact went to quarantine: its page is missing in MLflow, and the exit code says so."""
    workflow = load_workflow("w.yaml", ["stages.train.with.note=again", "name=again"])
    cold.mlflow.kill()
    state = launch(workflow, store=cold.address, run_id="again")
    cold.mlflow.start()
    store = Store(cold.address)
    assert store.quarantine(state.stages["train"].key or "", ["on purpose"])
    assert main(["sync", "again", "--store", cold.address]) == 1
    key = state.stages["train"].key or ""
    wanted = f"artifact page.html of train: its artifact {key[:12]} is no longer in the store"
    assert wanted in capsys.readouterr().err


def test_the_card_finds_the_model_and_its_data(cold: Finished, tmp_path: Path) -> None:
    assert main(["card", "first", "--store", cold.address, "--output", str(tmp_path / "card.md")]) == 0
    text = (tmp_path / "card.md").read_text()
    assert f"Digest `{cold.state.stages['data'].digest}`" in text
    assert f"digest of the model: `{cold.state.stages['train'].digest}`" in text


def test_an_inner_run_and_its_results_are_in_the_bucket(cold: Finished) -> None:
    nested = cold.state.stages["nested"]
    store = Store(cold.address)
    store.pull_runs()
    inner = f"first-{(nested.key or '')[:12]}"
    only = fold(read(store.run_directory(inner))).stages["only"]
    assert only.state == "succeeded"
    assert (store.materialize(only.key or "") / "text").read_text() == "of the inner run"
    assert (store.materialize(nested.key or "") / "only" / "text").read_text() == "of the inner run"
    before = time.time() - 3600
    os.utime(store.run_directory(inner), (before, before))
    assert main(["runs", "--store", cold.address]) == 0
    assert (store.run_directory(inner) / "workflow.json").exists()
