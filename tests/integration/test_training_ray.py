"""The train stage under Ray Train: the same weights as local processes, also after a worker was killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_support import make_dataset, read_events, run_training, weights_hash

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact

CHANGES = {"steps": 40, "checkpoint_every": 10, "log_every": 10}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_dataset(tmp_path_factory.mktemp("dataset") / "dataset")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, dataset: Artifact) -> Path:
    directory = tmp_path_factory.mktemp("local")
    run_training(directory, dataset, **CHANGES)
    return directory


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_a_worker_killed_under_ray_is_replaced_and_the_weights_equal_local_ones(
    tmp_path: Path, dataset: Artifact, local: Path
) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            run_training(tmp_path, dataset, executor="ray", **CHANGES)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 240
    while not (tmp_path / "scratch/checkpoints/step-00000010/manifest.json").exists():
        assert thread.is_alive(), errors
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(json.loads((tmp_path / "scratch/launch-000/worker-1.json").read_text())["pid"], signal.SIGKILL)
    thread.join()
    assert not errors
    assert weights_hash(tmp_path) == weights_hash(local)
    assert (tmp_path / "output/history.json").read_bytes() == (local / "output/history.json").read_bytes()
    assert "continuing from" in " ".join(event["text"] for event in read_events(tmp_path, "message"))


@pytest.mark.usefixtures("cluster")
def test_a_workers_error_under_ray_is_the_users_message(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    (dataset.path / "train" / "shard-000000.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"shard-000000\.tar has 0 bytes"):
        run_training(tmp_path, dataset, executor="ray", **CHANGES)
