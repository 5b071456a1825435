"""The Ray executor does what the local one does, and gives back everything it took."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine_support import Place, gone, start_driver, wait_for, workflow_of
from mlflow_support import wait_until
from ray_support import Ray

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.executors import check_resources
from polytrope.pipeline.executors.guard import _is_ray
from polytrope.pipeline.executors.ray import RayExecutor
from polytrope.pipeline.executors.worker import make_task
from polytrope.pipeline.runs.journal import RunState, fold, read
from polytrope.pipeline.workflow.graph import build_graph


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def ray_processes() -> set[int]:
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile: a zombie has no command line
            if any("ray" in part for part in child.cmdline()[:3]):
                found.add(child.pid)
    return found


def test_a_run_on_a_private_cluster_gives_the_same_artifacts_and_leaves_nothing(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cluster start for all that a run can meet: results, retries, lost workers, timeouts, secrets, logs."""
    stages = {
        "a": {"uses": "make", "with": {"text": "x"}},
        "b": {"uses": "join", "inputs": {"parts": ["a"]}},
        "error": {"uses": "fail_until", "retries": 1, "with": {"attempts": 1}},
        "killed": {"uses": "fail_until", "retries": 1, "with": {"attempts": 1, "how": "kill"}},
        "late": {"uses": "fail_until", "retries": 0, "timeout": 1, "with": {"attempts": 1, "how": "hang"}},
        "user": {"uses": "fail_until", "retries": 3, "with": {"attempts": 1, "how": "user"}},
        "p": {"uses": "parallel", "resources": {"workers": 2, "cpus": 1}},
        "file": {"uses": "working_directory", "with": {"file": "data.txt"}},
        "tell": {"uses": "tell_secret", "with": {"secret": "${env.TEST_TOKEN}", "there": str(tmp_path / "there")}},
    }
    monkeypatch.setenv("TEST_TOKEN", "hunter2-hunter2")
    (tmp_path / "data.txt").write_text("relative")
    state = place.run(stages, executor="ray", fields={"fail_fast": False})
    states = {name: stage.state for name, stage in state.stages.items()}
    assert states == {
        "a": "succeeded", "b": "succeeded", "error": "succeeded", "killed": "succeeded", "late": "failed",
        "user": "failed", "p": "succeeded", "file": "succeeded", "tell": "succeeded",
    }  # fmt: skip
    assert gone(list(ray_processes())), "the private cluster outlived the run"
    kinds = {name: (stage.error or {}).get("kind") for name, stage in state.stages.items() if stage.error}
    assert kinds == {"late": "timeout", "user": "user"}
    retried = {event.stage: event.get("error")["kind"] for event in place.events if event.type == "stage_retrying"}
    assert retried == {"error": "error", "killed": "worker lost"}
    log = place.store.run_directory(state.run_id) / "logs" / "error" / "2.log"
    assert log.read_text() == "this is try 2\n"
    told = (log.parents[1] / "tell" / "1.log").read_text()
    assert "in two parts: ${env.TEST_TOKEN}\nchild ${env.TEST_TOKEN}\nat the end ${env.TEST_TOKEN}\n" in told
    assert "hunter2" not in told

    local = Place(tmp_path / "elsewhere")
    local.directory.mkdir()
    (local.directory / "data.txt").write_text("relative")
    same = local.run({name: stages[name] for name in ("a", "b", "p", "file")}, executor="local")
    assert {name: stage.digest for name, stage in same.stages.items()} == {
        name: state.stages[name].digest for name in same.stages
    }


SIGNALLED = """
import json, os, signal, sys, threading, time
from pathlib import Path
from polytrope.pipeline.engine.run import run_workflow
from polytrope.pipeline.launch.launch import exit_code
from polytrope.pipeline.workflow.graph import build_graph
from polytrope.pipeline.workflow.spec import Workflow
from polytrope.pipeline.store.store import Store

moment, root, fields = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])

def end():
    os.kill(os.getpid(), signal.SIGTERM)

def observe(event):
    if moment == "before" and event.type == "attempt_started":
        end()

if moment == "during":
    import ray
    connect = ray.init
    def init(*arguments, **options):
        threading.Timer(0.2, end).start()
        return connect(*arguments, **options)
    ray.init = init
if moment == "after":
    def wait():
        while not (root / "pids").exists():
            time.sleep(0.02)
        end()
    threading.Thread(target=wait, daemon=True).start()

workflow = Workflow.from_dict(fields, directory=root)
state = run_workflow(workflow, build_graph(workflow), Store(root / "store"), run_id="mine", observer=observe)
sys.exit(exit_code(state))
"""


def signalled(place: Place, moment: str, stages: dict[str, Any], **fields: Any) -> RunState:
    """The run after a driver of it got SIGTERM before, during or after its connection to Ray."""
    workflow = workflow_of(place.directory, stages, executor="ray", **fields)
    command = [sys.executable, "-c", SIGNALLED, moment, str(place.directory), json.dumps(workflow.to_dict())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 130, done.stderr[-2000:]
    return fold(read(place.store.run_directory("mine")))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster that others started."""
    ray = Ray(tmp_path_factory.mktemp("cluster"))
    try:
        ray.add_node()
        wait_until(lambda: ray.nodes() == 2, "the node joins", 60)
        yield f"127.0.0.1:{ray.port}"
    finally:
        ray.end()


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_sigterm_cancels_a_run_on_ray_which_can_be_resumed(place: Place, cluster: str, moment: str) -> None:
    stages: dict[str, Any] = {
        "s": {"uses": "descend", "with": {"pid_file": str(place.directory / "pids"), "how": "hang"}}
    }
    state = signalled(place, moment, stages, ray_address=cluster)
    assert (state.status, state.error) == ("cancelled", "SIGTERM")
    assert {stage.state for stage in state.stages.values()} == {"cancelled"}
    if moment == "after":
        assert gone([int(pid) for pid in (place.directory / "pids").read_text().split()])
    stages = {"s": {"uses": "make"}}
    assert place.run(stages, run_id="mine", resume=True).status == "succeeded"


def test_sigterm_ends_a_private_cluster_too(place: Place) -> None:
    stages = {
        "s": {"uses": "descend", "with": {"pid_file": str(place.directory / "pids"), "how": "hang"}},
        "t": {"uses": "make", "with": {"seconds": 600}},
    }
    before = {process.pid for process in psutil.process_iter() if _is_ray(process)}
    assert signalled(place, "after", stages).status == "cancelled"
    assert gone([int(pid) for pid in (place.directory / "pids").read_text().split()])
    assert gone([process.pid for process in psutil.process_iter() if _is_ray(process) and process.pid not in before])


def test_a_stage_on_ray_leaves_no_process(place: Place, cluster: str) -> None:
    stages = {"s": {"uses": "descend", "with": {"pid_file": str(place.directory / "pids"), "how": "return"}}}
    assert place.run(stages, executor="ray", fields={"ray_address": cluster}).status == "succeeded"
    _, *pids = [int(pid) for pid in (place.directory / "pids").read_text().split()]
    assert len(pids) == 4
    assert gone(pids)


CANCELLED_AT_ITS_END = """
import sys, time
from pathlib import Path
from polytrope.pipeline.executors.ray import RayExecutor
from polytrope.pipeline.workflow.graph import build_graph
from polytrope.pipeline.workflow.spec import Workflow
from polytrope.pipeline.executors.worker import make_task

place = Path(sys.argv[1])
stages = {"s": {"uses": "engine_stages:make", "with": {"seconds": 0.01}}}
node = build_graph(Workflow.from_dict({"name": "test", "stages": stages}, directory=place))["s"]
executor = RayExecutor()
executor.prepare([node])
for number in range(1, 101):
    task = make_task(
        node, identifier=number, run_id="run", key="0" * 64, components={}, attempt=number, inputs={},
        output=place / str(number) / "files", scratch=place / "scratch", run_directory=place, name="s",
        executor="ray", directory=place, store=str(place / "store"),
    )
    executor.submit(task)
    while not (place / str(number) / "manifest.json").exists():  # the last that a stage's process does
        time.sleep(0.001)
    time.sleep(number % 10 / 1000)
    executor.cancel(number)
    while not executor.wait(0.1):
        pass
executor.close()
print("done")
"""


def test_a_stage_cancelled_at_the_moment_it_ends_harms_nobody(place: Place) -> None:
    # In a process of its own: Ray ends the one that calls `ray.cancel` on a task which was just completed.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", CANCELLED_AT_ITS_END, str(place.directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("done\n")


def test_a_cancelled_stage_that_will_not_end_is_ended_and_one_that_queues_is_forgotten(place: Place) -> None:
    stages = {
        "long": {"uses": "will_not_end", "resources": {"cpus": len(os.sched_getaffinity(0))}},
        "queued": {"uses": "make", "resources": {"cpus": 1}, "with": {"traces": str(place.directory)}},
    }
    nodes = build_graph(workflow_of(place.directory, stages))
    executor = RayExecutor()
    try:
        executor.prepare(nodes.values())
        for number, (name, node) in enumerate(nodes.items(), 1):
            executor.submit(
                make_task(
                    node,
                    identifier=number,
                    run_id="run",
                    key="0" * 64,
                    components={},
                    attempt=1,
                    inputs={},
                    output=place.directory / name / "files",
                    scratch=place.directory / name,
                    name=name,
                    run_directory=place.directory,
                    executor="ray",
                    directory=place.directory,
                    store=str(place.directory / "store"),
                )
            )
            if name == "long":  # it has all the cores before the other one asks for any
                pids = [int(pid) for pid in wait_for(place.directory / "long" / "pids").split()]
        for number in (2, 1):
            executor.cancel(number)
            ended = []
            while not ended:
                ended = executor.wait(1.0)
            ((identifier, outcome),) = ended
            assert identifier == number
            assert outcome.error is not None
            assert outcome.error.kind == "cancelled"
        assert gone(pids)
        assert place.calls["queued"] == 0
    finally:
        executor.close()


def test_a_killed_driver_takes_the_cluster_with_it_and_leaves_no_secret(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_TOKEN", "hunter2-hunter2")
    pid_file, told = place.directory / "pids", place.directory / "told"
    stages = {
        "s": {"uses": "spawn_and_hang", "with": {"pid_file": str(pid_file)}},
        "tell": {"uses": "tell_secret", "with": {"secret": "${env.TEST_TOKEN}", "there": str(told), "wait": True}},
    }
    driver = start_driver(place, stages, executor="ray")
    pids = [int(pid) for pid in wait_for(pid_file).split()]
    wait_for(told)
    pids += [child.pid for child in psutil.Process(driver.pid).children(recursive=True)]
    driver.kill()
    driver.wait()
    assert gone(pids)
    files = [path for path in Path(place.store.address).rglob("*") if path.is_file()]
    assert not [path for path in files if b"hunter2" in path.read_bytes()]
    (log,) = (path for path in files if path.parent.name == "tell")
    assert "connecting with\n${env.TEST_TOKEN}\n" in log.read_text()
    again = place.run({"s": {"uses": "make"}}, run_id="mine")
    assert (again.status, again.attempt) == ("succeeded", 2)


def test_a_run_of_cache_hits_never_imports_ray(place: Place) -> None:
    stages = {"a": {"uses": "make"}, "b": {"uses": "copy", "inputs": {"source": "a"}}}
    place.run(stages, executor="local")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from engine_support import Place\n"
        "stages = {'a': {'uses': 'make'}, 'b': {'uses': 'copy', 'inputs': {'source': 'a'}}}\n"
        "state = Place(Path(sys.argv[2])).run(stages, executor='ray')\n"
        "assert {stage.state for stage in state.stages.values()} == {'cached'}\n"
        "assert 'ray' not in sys.modules and 'torch' not in sys.modules and 'mlflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(place.directory)], check=True)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"),
        ("http://head:8265", "polytrope submit"),
        ("ray://head:10001", "polytrope submit"),
        ("head", "is not `host:port`"),
    ],
)
def test_an_address_without_a_cluster_is_refused_fast(place: Place, address: str, message: str) -> None:
    started = time.monotonic()
    fields: dict[str, Any] = {"ray_address": address}
    with pytest.raises(UserError) as caught:
        place.run({"s": {"uses": "make"}}, executor="ray", fields=fields)
    assert message in str(caught.value)
    assert time.monotonic() - started < 30
    assert not Path(place.store.address).exists()
    workflow = workflow_of(place.directory, {"s": {"uses": "make"}})
    with pytest.raises(UserError):
        check_resources(build_graph(workflow), "ray", address)
    assert place.calls == Counter()
