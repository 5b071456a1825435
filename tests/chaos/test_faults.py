"""Whatever happens to a driver or its store, one `resume` later the results are those of an undisturbed run.

The short slice runs with all tests; `make chaos` runs every point and many more seeds.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from harness import (
    BUG,
    ELSEWHERE,
    USER_ERROR,
    calls,
    committed,
    digests,
    drive,
    end_of,
    in_a_process,
    kill,
    leftovers,
    messages,
    small_workflow,
    start_process,
)
from mlflow_support import Server, polytrope, start
from s3_support import Door, Objects, S3Server, bucket_on, journal_events

from polytrope.pipeline.runs.journal import fold, read
from polytrope.pipeline.support.files import remove_tree


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str | None], int]:
    """Digests of a run that nothing happened to, and the number of fault points it passed."""
    root = tmp_path_factory.mktemp("undisturbed")
    assert in_a_process(lambda: drive(root, faults=f"count:{root}/points")) == 0
    assert leftovers(root) == []
    points = int((root / "points").read_text())
    assert points > 60
    return digests(root), points


def slice_and_all(name: str, few: int, all_of_them: int) -> pytest.MarkDecorator:
    """A test for `make test`, and the long form of it for `make chaos`."""
    return pytest.mark.parametrize(
        name, [few, pytest.param(all_of_them, marks=[pytest.mark.chaos, pytest.mark.timeout(3600)])]
    )


@slice_and_all("step", 5, 1)
def test_a_crash_at_every_write_flush_and_rename(
    tmp_path: Path, undisturbed: tuple[dict[str, str | None], int], faults: Counter[str], step: int
) -> None:
    expected, total = undisturbed
    for point in range(1, total + 1, step):
        faults["driver killed at a write, flush or rename"] += 1
        root = tmp_path / str(point)
        root.mkdir()
        assert in_a_process(lambda: drive(root, faults=f"at:{point}")) == -signal.SIGKILL, point  # noqa: B023
        before, called = committed(root), calls(root)
        assert in_a_process(lambda: drive(root)) == 0, point  # noqa: B023
        assert digests(root) == expected, point
        after = committed(root)
        assert {key: after[key] for key in before} == before, f"point {point}: a stage was committed twice"
        assert sum((calls(root) - called).values()) == len(expected) - len(before), (
            f"point {point}: done work was redone"
        )
        assert leftovers(root) == [], point
        remove_tree(root)


@slice_and_all("step", 12, 1)
def test_a_crash_anywhere_among_stages_that_a_stage_returned(tmp_path: Path, faults: Counter[str], step: int) -> None:
    """They come back with the artifact of the stage that returned them, which is not called again."""
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    assert in_a_process(lambda: drive(undisturbed, faults=f"count:{undisturbed}/points", returned=True)) == 0
    expected = digests(undisturbed)
    assert set(expected) > {"first/text", "first/count[steps=2]", "first/join", "last"}
    for point in range(1, int((undisturbed / "points").read_text()) + 1, step):
        faults["driver killed among stages that a stage returned"] += 1
        root = tmp_path / str(point)
        root.mkdir()
        assert in_a_process(lambda: drive(root, faults=f"at:{point}", returned=True)) == -signal.SIGKILL, point  # noqa: B023
        before, called = committed(root), calls(root)
        assert in_a_process(lambda: drive(root, returned=True)) == 0, point  # noqa: B023
        # the artifact of `first` holds a path of this test
        assert {**digests(root), "first": None} == {**expected, "first": None}, point
        after = committed(root)
        assert {key: after[key] for key in before} == before, f"point {point}: a stage was committed twice"
        assert sum((calls(root) - called).values()) == len(expected) - len(before), point
        assert leftovers(root) == [], point
        remove_tree(root)


@slice_and_all("step", 8, 1)
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_failing_write_flush_or_rename_anywhere(
    tmp_path: Path, undisturbed: tuple[dict[str, str | None], int], faults: Counter[str], step: int, error: str
) -> None:
    """The driver says what is wrong and how to go on, and loses nothing."""
    expected, total = undisturbed
    for point in range(1, total + 1, step):
        faults[f"{error} from a write, flush or rename"] += 1
        root = tmp_path / str(point)
        root.mkdir()
        status = in_a_process(lambda: drive(root, faults=f"error:{point}:{error}"))  # noqa: B023
        assert status in (0, 1, USER_ERROR), point
        if status == 1:  # it was a flush of the stage's own
            errors = [stage.error for stage in fold(read(root / "store" / "runs" / "run")).stages.values()]
            assert "store" in [found["kind"] for found in errors if found], point
        if status == USER_ERROR:
            (message,) = messages(root)
            assert {"ENOSPC": "disk is full", "EIO": "Input/output error"}[error] in message
            assert "→" in message, "a hint what to do"
        assert in_a_process(lambda: drive(root)) == 0, point  # noqa: B023
        assert digests(root) == expected, point
        assert leftovers(root) == [], point
        remove_tree(root)


def damage(path: Path, random_: random.Random) -> str:
    """Flip a bit, cut the end off, or remove the file."""
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    kind = random_.choice(["flip", "cut", "remove"]) if data else "remove"
    if kind == "flip":
        data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
        path.write_bytes(bytes(data))
    elif kind == "cut":
        path.write_bytes(bytes(data[: random_.randrange(len(data))]))
    else:
        path.unlink()
    return f"{kind} {path.name}"


def check_damage(root: Path, expected: dict[str, str | None], seed: int) -> None:
    random_ = random.Random(seed)
    root.mkdir()
    first = drive_with_crash(root, random_)
    # A store whose format is unreadable is refused. A driver killed while it made that file leaves a second name of it.
    spared = ("store.json", ".store.json.")
    files = sorted(path for path in (root / "store").rglob("*") if path.is_file() and not path.name.startswith(spared))
    what = [damage(path, random_) for path in random_.sample(files, min(len(files), random_.randrange(1, 5)))]
    assert in_a_process(lambda: drive(root)) == 0, (seed, first, what)
    assert digests(root) == expected, (seed, what)
    remove_tree(root)


def drive_with_crash(root: Path, random_: random.Random) -> int:
    point = random_.randrange(1, 140)
    return in_a_process(lambda: drive(root, faults=f"at:{point}"))


@slice_and_all("seeds", 15, 300)
def test_damaged_files_anywhere_in_the_store(
    tmp_path: Path, undisturbed: tuple[dict[str, str | None], int], faults: Counter[str], seeds: int
) -> None:
    """Journal lines torn and flipped, artifacts and manifests cut, changed or gone, leases and caches scrambled."""
    for seed in range(seeds):
        faults["driver killed, then 1 to 4 files flipped, cut or removed"] += 1
        check_damage(tmp_path / str(seed), undisturbed[0], seed)


def test_a_driver_stopped_past_its_lease_is_replaced_and_then_gives_up(tmp_path: Path, faults: Counter[str]) -> None:
    faults["driver stopped past its lease, then continued"] += 1
    stale = start_process(lambda: drive(tmp_path, inline=False, ttl=1.0, seconds=1.5))
    wait_until(lambda: calls(tmp_path)["text"] == 1)
    family = [stale, *(child.pid for child in psutil.Process(stale).children(recursive=True))]
    os.kill(stale, signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while True:
        status = in_a_process(lambda: drive(tmp_path, inline=False, ttl=1.0, seconds=1.5))
        if status != ELSEWHERE:
            break
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert status == 0
    before = committed(tmp_path)
    os.kill(stale, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(stale, 0)[1]) == ELSEWHERE
    assert any("taken over" in message for message in messages(tmp_path))
    assert committed(tmp_path) == before
    assert fold(read(tmp_path / "store" / "runs" / "run")).status == "succeeded"
    assert end_of(family) == []


def wait_until(condition: object, seconds: float = 60) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_fifty_concurrent_runs_compute_everything_once(tmp_path: Path, faults: Counter[str]) -> None:
    faults["50 drivers of one workflow at once"] += 50
    pids = [start_process(lambda name=f"run{i}": drive(tmp_path, run_id=name)) for i in range(50)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 50
    assert calls(tmp_path) == {"text": 1, "count[steps=2]": 1, "count[steps=3]": 1, "join": 1}
    assert len({tuple(digests(tmp_path, f"run{i}").items()) for i in range(50)}) == 1
    assert leftovers(tmp_path) == []


def test_concurrent_runs_finish_the_work_of_one_that_is_killed(tmp_path: Path, faults: Counter[str]) -> None:
    faults["driver killed while others wait for its stage"] += 1
    pids = [
        start_process(lambda name=f"run{i}": drive(tmp_path, run_id=name, inline=False, seconds=0.5)) for i in range(3)
    ]
    wait_until(lambda: calls(tmp_path)["text"] == 1)
    states = {f"run{i}": fold(read(tmp_path / "store" / "runs" / f"run{i}")) for i in range(3)}
    worker = next(i for i in range(3) if states[f"run{i}"].stages["text"].state == "running")
    kill(pids[worker])
    results = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert results == [-signal.SIGKILL if i == worker else 0 for i in range(3)]
    assert in_a_process(lambda: drive(tmp_path, run_id=f"run{worker}", seconds=0.5)) == 0
    assert len({tuple(digests(tmp_path, f"run{i}").items()) for i in range(3)}) == 1


def kill_something(
    root: Path, seed: int, expected: dict[str, str | None], executor: str = "local", longest: float = 1.8
) -> None:
    """Kill the driver, or any process it started, at a random moment; resume once; nothing is lost or left."""
    random_ = random.Random(seed)
    root.mkdir()
    how: dict[str, Any] = {"inline": False, "ttl": 2.0, "seconds": 0.2, "executor": executor}
    driver = start_process(lambda: drive(root, **how))
    time.sleep(random_.uniform(0.0, longest))
    family = psutil.Process(driver).children(recursive=True) if psutil.pid_exists(driver) else []
    victims = [driver, *(child.pid for child in family)]
    kill(random_.choice(victims))
    status = os.waitstatus_to_exitcode(os.waitpid(driver, 0)[1])
    assert status in (0, 1, USER_ERROR, -signal.SIGKILL), seed
    if status == USER_ERROR:  # Ray was killed while it started
        assert "→" in messages(root)[0], seed
    assert end_of(victims) == [], f"seed {seed}: processes left behind"
    before = committed(root)
    if status != 0:
        assert in_a_process(lambda: drive(root, **how)) == 0, seed
    assert digests(root) == expected, seed
    after = committed(root)
    assert {key: after[key] for key in before} == before, f"seed {seed}: a stage was committed twice"
    remove_tree(root)


@pytest.fixture(scope="module")
def undisturbed_with_sleeps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    root = tmp_path_factory.mktemp("slow")
    assert in_a_process(lambda: drive(root, seconds=0.2)) == 0
    return digests(root)


@slice_and_all("seeds", 4, 200)
def test_random_kills(
    tmp_path: Path, undisturbed_with_sleeps: dict[str, str | None], faults: Counter[str], seeds: int
) -> None:
    for seed in range(seeds):
        faults["driver, nursery or worker killed at a random moment"] += 1
        kill_something(tmp_path / str(seed), seed, undisturbed_with_sleeps)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_random_kills_on_ray(
    tmp_path: Path, undisturbed_with_sleeps: dict[str, str | None], faults: Counter[str]
) -> None:
    """The victim is the driver, the raylet, the control service, an agent, or a worker."""
    for seed in range(12):
        faults["driver or any process of its Ray cluster killed at a random moment"] += 1
        kill_something(tmp_path / str(seed), seed, undisturbed_with_sleeps, executor="ray", longest=9.0)


@slice_and_all("seeds", 2, 40)
def test_the_s3_server_goes_away_at_random_moments(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed_with_sleeps: dict[str, str | None],
    faults: Counter[str],
    seeds: int,
) -> None:
    """Killed in the middle of anything, or stopped, and back after a moment; the driver may have to be resumed once."""
    server = S3Server()
    door = Door(server)
    try:
        for seed in range(seeds):
            faults["S3 server killed or stopped at a random moment"] += 1
            root = tmp_path / str(seed)
            root.mkdir()
            random_, address = random.Random(seed), bucket_on(door, root, monkeypatch)
            how: dict[str, Any] = {"inline": False, "ttl": 2.0, "seconds": 0.2, "store": address}
            driver = start_process(lambda: drive(root, **how))  # noqa: B023
            time.sleep(random_.uniform(0.0, 4.0))
            killed, pause = random_.random() < 0.7, random_.uniform(0.1, 3.0)
            if killed:
                door.end()
            else:
                server.process.send_signal(signal.SIGSTOP)
            time.sleep(pause)
            if killed:
                door.open()
            else:
                server.process.send_signal(signal.SIGCONT)
            status = os.waitstatus_to_exitcode(os.waitpid(driver, 0)[1])
            assert status in (0, USER_ERROR), (seed, status)
            if status == USER_ERROR:
                assert "→" in messages(root)[0], seed
            before = manifests(address)
            if status != 0:
                assert in_a_process(lambda: drive(root, **how)) == 0, seed  # noqa: B023
            after = manifests(address)
            assert {key: after[key] for key in before} == before, f"seed {seed}: a stage was committed twice"
            stages = fold(journal_events(address, "run")).stages
            assert {name: stage.digest for name, stage in stages.items()} == undisturbed_with_sleeps, seed
    finally:
        door.end()
        server.process.send_signal(signal.SIGCONT)
        server.end()


@slice_and_all("seeds", 1, 15)
def test_the_mlflow_server_goes_away_at_random_moments(tmp_path: Path, faults: Counter[str], seeds: int) -> None:
    """Killed or stopped while a run goes on, in every third seed the driver as well: MLflow has everything in the end,
    once, no run in it is left RUNNING, and the artifacts are those of a run without any tracking.
    """
    steps = 40
    for folder in ("server", "undisturbed"):
        (tmp_path / folder).mkdir()
    server = Server(tmp_path / "server").start()
    stages = {
        "curve": {"uses": "chaos_stages:curve", "matrix": {"seconds": [2.0, 3.0]},
                  "with": {"steps": steps, "seconds": "${matrix.seconds}"}},
        "join": {"uses": "chaos_stages:join", "inputs": {"parts": "curve"}, "with": {"calls": os.devnull}},
    }  # fmt: skip
    try:
        write_tracked(tmp_path / "undisturbed", stages, server)
        code, output = polytrope(tmp_path / "undisturbed", "run", "w.yaml", "--run-id", "run", "--no-tracking")
        assert code == 0, output
        expected = run_digests(tmp_path / "undisturbed" / ".polytrope")
        for seed in range(seeds):
            random_, root = random.Random(seed), tmp_path / f"seed{seed}"
            root.mkdir()
            write_tracked(root, stages, server)
            driver = start(root, "run", "w.yaml", "--run-id", "run")
            time.sleep(random_.uniform(0.0, 6.0))
            if random_.random() < 0.7:
                faults["MLflow server killed at a random moment"] += 1
                server.kill()
                time.sleep(random_.uniform(0.0, 2.0))
            else:
                faults["MLflow server stopped at a random moment"] += 1
                server.signal(signal.SIGSTOP)
                time.sleep(random_.uniform(0.5, 4.0))
            if seed % 3 == 2:
                faults["driver killed while MLflow is away"] += 1
                driver.kill()
            if server.process is not None and server.process.poll() is None:
                server.signal(signal.SIGCONT)
            else:
                server.start()
            output, _ = driver.communicate(timeout=100)
            if driver.returncode != 0:
                assert driver.returncode == -signal.SIGKILL, (seed, output)
                begun = (root / ".polytrope" / "runs" / "run" / "workflow.json").exists()
                code, output = polytrope(root, *(("resume", "run") if begun else ("run", "w.yaml", "--run-id", "run")))
                assert code == 0, (seed, output)
            code, output = polytrope(root, "sync", "run")
            assert code == 0, (seed, output)
            assert run_digests(root / ".polytrope") == expected, seed
            runs = server.runs(root.name)
            assert set(runs) == {"parent", *expected}, seed
            assert {run.info.status for run in runs.values()} == {"FINISHED"}, seed
            points = [(step, 1 / (step + 1)) for step in range(steps)]
            for name in ("curve[seconds=2.0]", "curve[seconds=3.0]"):
                assert server.curve(runs[name], "loss") == points, (seed, name)
    finally:
        if server.process is not None and server.process.poll() is None:
            server.signal(signal.SIGCONT)
        server.kill()


def write_tracked(directory: Path, stages: dict[str, Any], server: Server) -> None:
    """A workflow that sends all to the server, and the module of its stages."""
    shutil.copy(Path(__file__).with_name("chaos_stages.py"), directory)
    tracking = {"uri": server.uri, "required": False}
    workflow = {"name": directory.name, "executor": "local", "tracking": tracking, "stages": stages}
    (directory / "w.yaml").write_text(yaml.safe_dump(workflow))


def run_digests(store: Path) -> dict[str, str | None]:
    stages = fold(read(store / "runs" / "run")).stages.values()
    return {stage.name: stage.digest for stage in stages}


def manifests(address: str) -> dict[str, str]:
    """Every committed artifact of a bucket, with a tag that another commit would change."""
    return {name: tag for name, tag in Objects(address).tags("artifacts/").items() if name.endswith("/manifest.json")}


@slice_and_all("seeds", 2, 30)
def test_the_public_fault_injection_ends_in_the_same_results(
    tmp_path: Path, undisturbed: tuple[dict[str, str | None], int], faults: Counter[str], seeds: int
) -> None:
    """`polytrope run --inject-faults SEED`: the driver dies again and again; every further attempt gets further."""
    died = 0
    for seed in range(seeds):
        root = tmp_path / str(seed)
        root.mkdir()
        file = root / "workflow.yaml"
        file.write_text(yaml.safe_dump({**small_workflow(root).to_dict(), "tracking": {"enabled": False}}))
        run = [sys.executable, "-m", "polytrope.pipeline.commands.cli", "run", str(file), "--quiet"]
        run += ["--store", str(root / "store"), "--run-id", "run"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        for attempt in range(60):
            plan = ["--inject-faults", str(seed * 100 + attempt)]
            ended = subprocess.run([*run, *plan], env=environment, capture_output=True, timeout=100, check=False)
            if ended.returncode == 0:
                break
            # killed, or a stage's worker was more often than the stage is retried: then it says how to go on
            said = ended.stdout + ended.stderr
            assert ended.returncode == -signal.SIGKILL or b"polytrope resume run" in said, said
            faults["driver or worker killed by `run --inject-faults`"] += 1
            died += 1
        assert digests(root) == undisturbed[0]
        assert leftovers(root) == []
    assert died > 0


def test_a_clock_that_jumps_back_does_no_harm(
    tmp_path: Path, undisturbed: tuple[dict[str, str | None], int], faults: Counter[str]
) -> None:
    faults["clock jumped back, driver killed"] += 1

    def jumping() -> int:
        real, random_ = time.time, random.Random(1)
        time.time = lambda: real() - random_.choice([0, 3600, 86400])  # type: ignore[assignment]
        return drive(tmp_path, faults="at:70")

    assert in_a_process(jumping) == -signal.SIGKILL
    assert in_a_process(lambda: drive(tmp_path)) == 0
    assert digests(tmp_path) == undisturbed[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, as root only."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk(small_disk: Path, faults: Counter[str]) -> None:
    """The driver stops with a message, finished stages stay, and with space again the run goes on."""
    statuses = []
    for free in range(0, 200_000, 10_000):
        faults["disk full"] += 1
        root = small_disk.parent / f"root{free}"
        root.mkdir()
        (root / "store").symlink_to(small_disk / "store")
        (small_disk / "store").mkdir()
        ballast = small_disk / "ballast"
        statvfs = os.statvfs(small_disk)
        ballast.write_bytes(b"x" * max(0, statvfs.f_bavail * statvfs.f_frsize - free - 4096))
        statuses.append(in_a_process(lambda: drive(root)))  # noqa: B023
        assert statuses[-1] != BUG, free
        ballast.unlink()
        assert in_a_process(lambda: drive(root)) == 0, free  # noqa: B023
        assert None not in digests(root).values()
        remove_tree(small_disk / "store")
    assert statuses[0] != 0, "the disk was never full"
    assert statuses[-1] == 0, "the disk was always full"


def test_a_read_only_store_is_refused(small_disk: Path, faults: Counter[str]) -> None:
    faults["store read-only"] += 1
    root = small_disk.parent / "root"
    root.mkdir()
    (small_disk / "store").mkdir()
    (root / "store").symlink_to(small_disk / "store")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert in_a_process(lambda: drive(root)) == USER_ERROR
    assert "read-only file system" in messages(root)[0]
    assert "--set store=" in messages(root)[0]
