"""`polytrope submit` and its companions against a real Ray head and its job server; the client may vanish any time."""

import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow_support import wait_until
from ray_support import Ray

from polytrope.pipeline.launch.submit import _package_source
from polytrope.pipeline.tracking.process import free_port

TOKEN = secrets.token_hex(32)  # the head asks every client for it, as the documentation recommends
POLYTROPE = str(Path(sys.executable).with_name("polytrope"))

STAGES = '''
"""Stages of this test, found in the job's working directory."""
import time
from pathlib import Path
from polytrope.pipeline.stage import Artifact, StageContext

def make(context: StageContext, steps: int = 3) -> dict[str, float]:
    """Make a file."""
    (context.output / "x.txt").write_text("line\\n" * steps)
    print("hello from make")
    return {"lines": steps}

def wait_for_flag(context: StageContext, source: Artifact, flag: str) -> None:
    """End when the file `flag` exists."""
    while not Path(flag).exists():
        time.sleep(0.1)
    (context.output / "y.txt").write_text((source.path / "x.txt").read_text())
'''


def environment() -> dict[str, str]:
    """The head finds this interpreter as `python`; nothing of an enclosing Ray leaks in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_ADDRESS", "RAY_JOB"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**kept, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the job server of a Ray head that this module starts and stops."""
    dashboard = free_port()
    log = (tmp_path_factory.mktemp("ray") / "head.log").open("w+")
    process = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2",
            "--node-ip-address=127.0.0.1", f"--port={free_port()}", "--include-dashboard=true",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--disable-usage-stats",
            f"--dashboard-agent-listen-port={free_port()}", f"--dashboard-agent-grpc-port={free_port()}",
            f"--ray-client-server-port={free_port()}", "--object-store-memory=100000000",
        ],
        env=environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + 90
    try:
        while True:
            assert process.poll() is None, log.seek(0) or log.read()
            try:
                with urllib.request.urlopen(address + "/api/version", timeout=1):
                    break
            except urllib.error.HTTPError:
                break  # it answers, and wants the token
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.3)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    directory = tmp_path / "project"
    directory.mkdir()
    (directory / "submit_stages.py").write_text(STAGES)
    (directory / "w.yaml").write_text(
        "name: demo\ntracking: {enabled: false}\nparams: {steps: 3}\nstages:\n"
        "  make: {uses: 'submit_stages:make', with: {steps: '${params.steps}'}}\n"
        "  wait:\n    uses: submit_stages:wait_for_flag\n    inputs: {source: make}\n"
        f"    with: {{flag: {tmp_path / 'flag'}}}\n"
    )
    return directory


def polytrope(directory: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command as on a laptop."""
    return subprocess.run(
        [POLYTROPE, *arguments],
        cwd=directory,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def wait_for_log(directory: Path, head: str, run: str, text: str) -> None:
    """Until the driver of the newest attempt has printed `text`."""
    deadline = time.monotonic() + 120
    while text not in (output := polytrope(directory, "logs", run, "--address", head).stdout):
        assert time.monotonic() < deadline, output
        time.sleep(0.5)


def kill_driver(run: str) -> None:
    """SIGKILL, as a lost pod or the kernel's memory killer would."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"polytrope.pipeline.commands.cli" in words and run.encode() in words:
            os.kill(int(path.parent.name), signal.SIGKILL)


def test_a_run_is_submitted_killed_resumed_cancelled_and_finished_from_outside(
    head: str, project: Path, tmp_path: Path
) -> None:
    store = str(tmp_path / "store")
    submission = ["submit", "w.yaml", "--address", head, "--store", store, "--run-id", "r1", "--set", "params.steps=5"]
    stranger = polytrope(project, *submission, RAY_AUTH_TOKEN="0" * 64)
    assert stranger.returncode == 2
    assert "wants a token" in stranger.stderr
    submitted = polytrope(project, *submission)
    assert submitted.returncode == 0, submitted.stderr
    assert "Ray job r1-attempt-1" in submitted.stdout
    wait_for_log(project, head, "r1", "wait: running")
    again = polytrope(project, *submission)
    assert again.returncode == 3
    assert "is being driven by Ray job r1-attempt-1" in again.stderr

    kill_driver("r1")
    deadline = time.monotonic() + 60
    while "FAILED" not in (status := polytrope(project, "status", "r1", "--address", head).stdout):
        assert time.monotonic() < deadline, status
    assert ", interrupted," in status
    assert "lines 5" in status
    assert "polytrope resume r1" in status

    resumed = polytrope(project, "resume", "r1", "--address", head)
    assert resumed.returncode == 0, resumed.stderr
    assert "Ray job r1-attempt-2" in resumed.stdout
    wait_for_log(project, head, "r1", "wait: running")
    cancelled = polytrope(project, "cancel", "r1", "--address", head)
    assert cancelled.returncode == 0, cancelled.stderr
    assert "run r1 cancelled" in polytrope(project, "logs", "r1", "--address", head).stdout
    assert "hello from make" in polytrope(project, "logs", "r1", "--stage", "make", "--address", head).stdout

    (tmp_path / "flag").write_text("")
    assert polytrope(project, "resume", "r1", "--address", head).returncode == 0
    followed = polytrope(project, "logs", "r1", "-f", "--address", head)
    assert followed.returncode == 0, followed.stdout
    assert "run r1 succeeded" in followed.stdout
    assert "make: running" not in followed.stdout  # its result was kept over all attempts
    assert ", succeeded, attempt 3," in polytrope(project, "status", "r1", "--store", store).stdout


@pytest.mark.chaos
@pytest.mark.timeout(400)
def test_a_node_and_then_the_head_are_lost(project: Path, tmp_path: Path) -> None:
    """A stage moves to another node by itself; on a new head, which knows nothing, the run goes on from its store."""
    store = ["--store", str(tmp_path / "store")]
    first = Ray(tmp_path, TOKEN)
    second: Ray | None = None
    try:
        first.add_node()
        submitted = polytrope(project, "submit", "w.yaml", "--address", first.address, *store, "--run-id", "r2")
        assert submitted.returncode == 0, submitted.stderr
        wait_for_log(project, first.address, "r2", "wait: running")
        wait_until(lambda: first.nodes() == 2, "the node runs the stage")
        first.add_node()
        wait_until(lambda: first.nodes() == 3, "another node joins")
        first.kill(1)
        wait_for_log(project, first.address, "r2", "wait: retrying")
        wait_for_log(project, first.address, "r2", "wait: running (attempt 2)")
        first.kill(0)
        kill_driver("r2")
        first.kill(2)

        second = Ray(tmp_path, TOKEN)
        second.add_node()
        unknown = polytrope(project, "resume", "r2", "--address", second.address)
        assert unknown.returncode == 2
        assert "--store STORE" in unknown.stderr
        (tmp_path / "flag").write_text("")
        resumed = polytrope(project, "resume", "r2", "--address", second.address, *store)
        assert resumed.returncode == 0, resumed.stderr
        assert "Ray job r2-attempt-2" in resumed.stdout
        followed = polytrope(project, "logs", "r2", "-f", "--address", second.address)
        assert "run r2 succeeded" in followed.stdout
        assert "make: running" not in followed.stdout
    finally:
        first.end()
        if second is not None:
            second.end()


def test_what_is_sent_of_polytrope_gives_the_same_keys(tmp_path: Path) -> None:
    """Code and shipped configurations: what was computed on the cluster is a hit here, and the other way round."""
    _package_source(tmp_path)
    program = (
        "import polytrope.pipeline.workflow.keys as keys\n"
        "from polytrope.pipeline.workflow.graph import build_graph\n"
        "from polytrope.pipeline.workflow.spec import load_workflow\n"
        "assert keys.__file__.startswith({place!r}), keys.__file__\n"
        "for name, node in build_graph(load_workflow('workflows/quickstart.yaml', [])).items():\n"
        "    print(keys.stage_key(keys.key_components(node, dict.fromkeys(node.inputs))))\n"
    )
    root = Path(__file__).parents[2]
    here, there = (
        subprocess.run(
            [sys.executable, "-c", program.format(place=str(place))],
            cwd=root, env={**os.environ, **variables}, capture_output=True, text=True, check=True,
        ).stdout
        for place, variables in ((root, {}), (tmp_path, {"PYTHONPATH": str(tmp_path)}))
    )  # fmt: skip
    assert here == there
    assert len(here.split()) == 8


def test_an_address_where_nothing_answers_is_refused_at_once(project: Path, tmp_path: Path) -> None:
    refused = polytrope(
        project, "submit", "w.yaml", "--address", f"http://127.0.0.1:{free_port()}", "--store", str(tmp_path / "s")
    )
    assert refused.returncode == 2
    assert "no Ray job server answers" in refused.stderr
    relative = polytrope(project, "submit", "w.yaml", "--address", "http://127.0.0.1:1")
    assert "the store `.polytrope` would be inside the job's own directory" in relative.stderr
    assert "expected the job server's URL" in polytrope(project, "status", "--address", "head:8265").stderr
