"""Training over two nodes, one of which is killed in the middle and replaced: the run ends with the right weights, and
no finished stage runs again. The nodes are two raylets, or two hosts with addresses of their own (as root).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
from two_hosts import TwoHosts, why_not

from polytrope.pipeline.runs.journal import RunState, fold, read
from polytrope.pipeline.store.store import Store

POLYTROPE = str(Path(sys.executable).with_name("polytrope"))
WORKFLOW = """\
name: nodes
tracking: {enabled: false}
stages:
  shard:
    uses: shard
    with: {name: topics, source: {kind: python, max_bytes: 300000}, tokenizer: {kind: bytes}, sequence_length: 32}
    resources: {cpus: 0.5}
  train:
    uses: train
    inputs: {dataset: shard}
    with:
      model: {architecture: gpt2, n_layer: 1, n_head: 2, n_embd: 32, dropout: 0.1, activation: hermite}
      steps: 120
      global_batch_size: 8
      validation_every: 60
      validation_samples: 8
      checkpoint_every: 10
    resources: {workers: 2, cpus: 1}
"""

pytestmark = pytest.mark.timeout(400)


class Nodes(Protocol):
    """A Ray cluster whose two CPUs are on two nodes."""

    address: str
    environment: dict[str, str]

    def command(self, *arguments: str) -> list[str]: ...
    def kill(self) -> None: ...
    def replace(self) -> None: ...


class Raylets:
    """Two raylets of this machine, beside a head without CPUs."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self._nodes: list[Any] = [self._cluster.add_node(num_cpus=1) for _ in range(2)]
        self.address = str(self._cluster.address)
        self.environment = dict(os.environ)

    def command(self, *arguments: str) -> list[str]:
        return list(arguments)

    def kill(self) -> None:
        self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)

    def replace(self) -> None:
        self._nodes.append(self._cluster.add_node(num_cpus=1))

    def close(self) -> None:
        self._cluster.shutdown()


@contextmanager
def raylets() -> Iterator[Nodes]:
    nodes = Raylets()
    try:
        yield nodes
    finally:
        nodes.close()


def drive(directory: Path, *arguments: str) -> list[str]:
    return [POLYTROPE, "run", str(directory / "w.yaml"), "--store", str(directory / "store"), "--quiet", *arguments]


def result(directory: Path) -> RunState:
    (run,) = Store(directory / "store").run_directories()
    return fold(read(run))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunState:
    """The same workflow in local processes."""
    directory = tmp_path_factory.mktemp("undisturbed")
    (directory / "w.yaml").write_text(WORKFLOW)
    subprocess.run(drive(directory, "--executor", "local"), check=True, timeout=200)
    return result(directory)


NO_HOSTS = why_not()


@pytest.mark.parametrize(
    "cluster",
    [
        pytest.param(TwoHosts, marks=pytest.mark.skipif(NO_HOSTS is not None, reason=str(NO_HOSTS))),
        pytest.param(raylets, marks=pytest.mark.chaos if NO_HOSTS is None else ()),  # the weaker of the two
    ],
)
def test_a_node_is_killed_in_the_middle_of_a_training_and_replaced(
    cluster: Callable[[], Any], tmp_path: Path, undisturbed: RunState
) -> None:
    (tmp_path / "w.yaml").write_text(WORKFLOW)
    with cluster() as nodes, (tmp_path / "driver.log").open("wb") as log:
        command = nodes.command(*drive(tmp_path, "--executor", "ray", "--ray-address", nodes.address))
        driver = subprocess.Popen(command, env=nodes.environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            scratch = wait_for_checkpoint(tmp_path, driver, seconds=200)
            places = [json.loads((scratch / f"launch-000/worker-{rank}.json").read_text())["node"] for rank in (0, 1)]
            assert places[0] != places[1], "the training does not span both nodes"
            nodes.kill()
            nodes.replace()
            assert driver.wait(timeout=250) == 0, (tmp_path / "driver.log").read_text()[-3000:]
        finally:
            driver.kill()
            driver.wait()
    state = result(tmp_path)
    assert state.stages["train"].digest == undisturbed.stages["train"].digest
    assert state.stages["shard"].digest == undisturbed.stages["shard"].digest
    (run,) = Store(tmp_path / "store").run_directories()
    events = [(event.type, event.stage) for event in read(run)]
    assert events.count(("stage_started", "shard")) == 1
    said = "\n".join(path.read_text() for path in run.rglob("*.jsonl"))
    assert "continuing from the checkpoint of step" in said


def wait_for_checkpoint(directory: Path, driver: subprocess.Popen[bytes], seconds: float) -> Path:
    """The scratch directory of the training, once a checkpoint is in it."""
    deadline = time.monotonic() + seconds
    while True:
        found = sorted((directory / "store" / "scratch").glob("*/checkpoints/step-*/manifest.json"))
        if found:
            return found[0].parents[2]
        assert driver.poll() is None, (directory / "driver.log").read_text()[-3000:]
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.02)
