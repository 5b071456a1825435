"""The store on S3, against a real S3 server process: commits, leases, journals, other machines, and outages."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine_stages import __file__ as stages_file
from engine_support import Place, diamond, workflow_of
from s3_support import Door, Objects, S3Server, bucket_on

from polytrope.pipeline.engine.run import run_workflow
from polytrope.pipeline.errors import RunElsewhereError, UserError
from polytrope.pipeline.runs.journal import fold, read
from polytrope.pipeline.runs.lease import Lease, LeaseHeldError, LeaseLostError
from polytrope.pipeline.store.aliases import find_alias, set_alias
from polytrope.pipeline.store.archive import export_run, import_run
from polytrope.pipeline.store.bucket import Bucket
from polytrope.pipeline.store.garbage import collect_garbage
from polytrope.pipeline.store.scratch_mirror import ScratchMirror
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.tracking.process import free_port
from polytrope.pipeline.workflow.graph import build_graph

pytest.importorskip("moto")
pytest.importorskip("boto3")


@pytest.fixture(scope="module")
def shared_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.end()


@pytest.fixture
def address(shared_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return bucket_on(shared_server, tmp_path, monkeypatch)


@pytest.fixture
def place(address: str, tmp_path: Path) -> Place:
    directory = tmp_path / "work"
    directory.mkdir()
    result = Place(directory)
    result.store = Store(address)
    return result


def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str) -> Store:
    """The same store as another machine sees it."""
    monkeypatch.setenv("POLYTROPE_CACHE", str(tmp_path / f"cache-{time.time_ns()}"))
    return Store(address)


def test_a_conditional_write_succeeds_once(address: str) -> None:
    bucket = Bucket(address)
    assert bucket.put("a", b"1", absent=True)
    assert not bucket.put("a", b"2", absent=True)
    assert bucket.put("a", b"1", absent=True), "the same bytes: an answer that was lost"
    assert bucket.get("a") == b"1"
    assert bucket.get("b") is None
    won = []
    threads = [
        threading.Thread(target=lambda i=i: won.append(bucket.put("c", str(i).encode(), absent=True))) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 7 + [True]


def test_a_run_is_computed_once_and_found_by_another_machine(
    place: Place, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = workflow_of(place.directory, diamond(place))
    first = run_workflow(workflow, build_graph(workflow), place.store, run_id="first")
    assert first.status == "succeeded"
    count = sum(place.calls.values())
    other = elsewhere(monkeypatch, tmp_path, address)
    again = run_workflow(workflow, build_graph(workflow), other, run_id="second")
    assert {stage.state for stage in again.stages.values()} == {"cached"}
    assert sum(place.calls.values()) == count
    assert {name: stage.digest for name, stage in again.stages.items()} == {
        name: stage.digest for name, stage in first.stages.items()
    }
    other.pull_runs()
    assert fold(read(other.run_directory("first"))).status == "succeeded"
    assert (other.run_directory("first") / "workflow.json").exists()
    key = first.stages["d"].key or ""
    assert other.verify(key) == []
    assert (other.materialize(key) / "text").read_text() == (place.store.materialize(key) / "text").read_text()
    left = Objects(address).list("")
    assert not [name for name in left if name.startswith(("leases/", "scratch/"))]


def test_a_run_goes_on_on_another_machine(
    place: Place, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted here after its second stage; the rest is computed there, with the inputs from the bucket."""
    stages = diamond(place)
    workflow = workflow_of(place.directory, stages)
    driver = start_driver(place, address, stages, "--inject-faults", "at:60")
    assert driver.wait(timeout=100) == -signal.SIGKILL
    before = sum(place.calls.values())
    other = elsewhere(monkeypatch, tmp_path, address)
    deadline = time.monotonic() + 60
    while True:  # the dead driver's lease ends where its process cannot be seen; here it can
        try:
            state = run_workflow(workflow, build_graph(workflow), other, run_id="mine", resume=True)
            break
        except RunElsewhereError:
            assert time.monotonic() < deadline
            time.sleep(0.5)
    assert state.status == "succeeded"
    assert state.attempt == 2
    assert before >= 1
    assert fold(read(other.run_directory("mine"))).status == "succeeded"


@pytest.mark.parametrize("flushes_left", [0, 1, 4])
def test_what_a_dead_driver_did_not_flush_is_written_again(place: Place, address: str, flushes_left: int) -> None:
    """It had committed everything, but its last journal entries are in this machine's copy only."""
    done = place.run(diamond(place), run_id="mine")
    calls = place.calls
    bucket = Objects(address)
    bucket.delete(sorted(bucket.list("runs/mine/journal/"))[flushes_left:])
    state = place.run(diamond(place), run_id="mine")
    assert state.status == "succeeded"
    assert place.calls == calls
    written = fold(read(place.store.run_directory("mine")))
    assert written.status == "succeeded"
    assert written.workflow == "test"
    assert {name: stage.digest for name, stage in written.stages.items()} == {
        name: stage.digest for name, stage in done.stages.items()
    }
    segments = b"".join(bucket.get(name) for name in sorted(bucket.list("runs/mine/journal/")))
    assert segments == (place.store.run_directory("mine") / "journal.jsonl").read_bytes()


def start_driver(place: Place, address: str, stages: dict[str, Any], *options: str) -> subprocess.Popen[bytes]:
    workflow_of(place.directory, stages)
    file = place.directory / "workflow.yaml"
    file.write_text(yaml.safe_dump({"name": "test", "stages": stages, "tracking": {"enabled": False}}))
    command = [sys.executable, "-m", "polytrope.pipeline.commands.cli", "run", str(file), "--store", address, "--quiet"]
    command += ["--executor", "local", "--run-id", "mine", *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(stages_file).parent)}
    return subprocess.Popen(command, env=environment, cwd=place.directory, stderr=subprocess.PIPE)


def test_one_driver_at_a_time_and_a_stale_one_cannot_write(address: str) -> None:
    store = Store(address)
    store.create()
    lease = Lease.acquire(store.run_lease_directory("r"), "run r", heartbeat=False)
    with pytest.raises(LeaseHeldError):
        Lease.acquire(store.run_lease_directory("r"), "run r", watch=False)
    lease.check()
    stale = store.open_journal("r", fence=1, guard=lambda: None)
    stale.append("run_started", stages=["a"])
    current = store.open_journal("r", fence=2, guard=lambda: None)
    current.append("attempt_started", stages=["a"])
    with pytest.raises(LeaseLostError):
        stale.append("run_finished", status="failed")
    store.pull_run("r")
    assert [event.type for event in read(store.run_directory("r"))] == ["run_started", "attempt_started"]
    lease.release(remove=True)
    with pytest.raises(LeaseLostError):
        lease.check()


def test_damage_in_the_bucket_is_found_and_computed_again(place: Place, address: str) -> None:
    workflow = workflow_of(place.directory, diamond(place))
    first = run_workflow(workflow, build_graph(workflow), place.store, run_id="first")
    bucket, key = Objects(address), first.stages["a"].key or ""
    (name,) = [name for name in bucket.list(f"artifacts/{key}/") if name.endswith("/text")]
    whole = bucket.get(name)
    bucket.put(name, whole[:-1])
    assert "bytes instead of" in place.store.verify(key, full=False)[0]
    bucket.put(name, bytes([whole[0] ^ 1]) + whole[1:])
    assert place.store.verify(key, full=False) == []
    assert "its bytes have changed" in place.store.verify(key, full=True)[0]
    bucket.delete([name])
    again = run_workflow(workflow, build_graph(workflow), place.store, run_id="second")
    assert again.status == "succeeded"
    assert again.stages["a"].state == "succeeded"
    assert again.stages["a"].digest == first.stages["a"].digest
    assert bucket.list("quarantine/")


def test_an_alias_is_known_everywhere_and_keeps_its_artifact(
    place: Place, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = workflow_of(place.directory, diamond(place))
    run_workflow(workflow, build_graph(workflow), place.store, run_id="first")
    alias = set_alias(place.store, "best", place.store.run_directory("first"), "a")
    other = elsewhere(monkeypatch, tmp_path, address)
    other.pull_runs()
    assert find_alias(other, "best") == alias
    assert len(collect_garbage(other, keep_runs=0).artifacts) == 3
    assert place.store.keys() == [alias.key]
    assert (other.materialize(alias.key) / "text").exists()
    other.drop_alias("best")
    assert collect_garbage(other).artifacts == [alias.key]


def test_a_run_is_exported_collected_and_imported_again(
    place: Place, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gc forgets runs, artifacts and uploads of dead attempts; what was exported comes back with the same digests."""
    workflow = workflow_of(place.directory, diamond(place))
    first = run_workflow(workflow, build_graph(workflow), place.store, run_id="first")
    changed = diamond(place)
    changed["c"]["with"]["text"] = "other"
    workflow = workflow_of(place.directory, changed)
    run_workflow(workflow, build_graph(workflow), place.store, run_id="second")
    bucket = Objects(address)
    bucket.put(f"artifacts/{first.stages['a'].key}/dead/text", b"of an attempt that was never committed")
    bucket.put(f"artifacts/{'f' * 64}/dead/text", b"another")
    only_first = sorted(first.stages[name].key or "" for name in "cd")

    other = elsewhere(monkeypatch, tmp_path, address)
    other.pull_runs()
    assert export_run(other, other.run_directory("first"), tmp_path / "first.tar") == 4
    preview = collect_garbage(other, keep_runs=1, dry_run=True)
    assert (preview.runs, preview.artifacts) == (["first"], only_first)
    assert [name.rpartition("/")[2] for name in preview.leftovers] == ["dead", "dead"]
    assert collect_garbage(other, keep_runs=1) == preview
    assert preview.bytes > 0
    assert not [name for name in bucket.list("") if any(part in name for part in ("/first/", "/dead/", *only_first))]
    assert collect_garbage(other, keep_runs=1).bytes == 0

    assert import_run(other, tmp_path / "first.tar") == ("first", 2)
    with pytest.raises(UserError, match="run first is in s3://"):
        import_run(other, tmp_path / "first.tar")
    third = elsewhere(monkeypatch, tmp_path, address)
    third.pull_runs()
    state = fold(read(third.run_directory("first")))
    assert (state.status, state.stages["d"].digest) == ("succeeded", first.stages["d"].digest)
    assert [third.verify(stage.key or "") for stage in state.stages.values()] == [[]] * 4
    assert import_run(Store(tmp_path / "disk"), tmp_path / "first.tar") == ("first", 4)


def test_gc_waits_for_a_driver_on_another_machine(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    workflow = workflow_of(place.directory, diamond(place))
    run_workflow(workflow, build_graph(workflow), place.store, run_id="first")
    lease = Lease.acquire(place.store.run_lease_directory("first"), "run first", 1.0)
    try:
        journal = place.store.open_journal("first", fence=lease.number, guard=lease.check)
        journal.append("attempt_started", stages=list(diamond(place)))
        monkeypatch.setattr("polytrope.pipeline.runs.lease._machine", lambda: "elsewhere")
        with pytest.raises(UserError, match="run first is going on"):
            collect_garbage(place.store)
    finally:
        lease.release()
    assert collect_garbage(place.store).artifacts == []


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_the_server_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Stopped for a moment: nothing happens. Killed: the driver ends with a message and leaves no process."""
    server = S3Server()
    try:
        address = bucket_on(server, tmp_path, monkeypatch)
        place = Place(tmp_path)
        stages = diamond(place)
        for name in ("a", "c"):
            stages[name]["with"]["seconds"] = 1.0
        driver = start_driver(place, address, stages)
        deadline = time.monotonic() + 60
        while not place.calls:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if how == "stopped":
            server.process.send_signal(signal.SIGSTOP)
            time.sleep(3)
            server.process.send_signal(signal.SIGCONT)
            assert driver.wait(timeout=100) == 0
            return
        server.end()
        _, errors = driver.communicate(timeout=100)
        assert driver.returncode == 2, errors
        assert b"cannot be used" in errors
        assert b"polytrope resume mine" in errors
    finally:
        server.end()


def test_addresses_and_servers_that_cannot_be_used_are_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is not `s3://bucket/prefix`"):
        Store("s3:///x")
    with pytest.raises(UserError, match="neither a directory nor"):
        Store("ftp://bucket/x")
    with pytest.raises(UserError, match="NoSuchBucket"):
        Store("s3://no-such-bucket/x").create()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError, match="cannot be used"):
        Store(address).create()
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "many")
    with pytest.raises(UserError, match="AWS_MAX_ATTEMPTS='many': expected a number"):
        Store(address).create()


def test_the_format_of_the_bucket_is_checked(address: str) -> None:
    Objects(address).put("store.json", json.dumps({"format": 99}).encode())
    with pytest.raises(UserError, match="has format 99"):
        Store(address).create()


def machine(address: str, directory: Path) -> ScratchMirror:
    """The scratch directory of a stage on one of several machines."""
    return ScratchMirror(Bucket(address), "a" * 64, directory / "scratch", directory / "marks" / "a")


def checkpoint(mirror: ScratchMirror, number: int, *, prune: int | None = None) -> None:
    path = mirror.here / f"step-{number}" / "weights"
    path.parent.mkdir(parents=True)
    path.write_text(f"of step {number}")
    if prune is not None:
        shutil.rmtree(mirror.here / f"step-{prune}")
    mirror.push()


def steps(names: Iterable[str]) -> list[str]:
    return sorted(name.split("/")[-2] for name in names if name.endswith("/weights"))


def test_the_scratch_in_the_bucket_mirrors_the_newest_attempt(address: str, tmp_path: Path) -> None:
    here, there = machine(address, tmp_path / "here"), machine(address, tmp_path / "there")
    objects = Objects(address)
    here.pull()
    checkpoint(here, 1)
    checkpoint(here, 2, prune=1)
    assert steps(objects.list("scratch/")) == ["step-2"], "what was pruned here goes there"
    there.pull()
    assert steps(map(str, there.here.rglob("*"))) == ["step-2"]
    checkpoint(there, 3, prune=2)

    again = machine(address, tmp_path / "here")  # the next attempt is where an old one was
    again.pull()
    assert steps(map(str, again.here.rglob("*"))) == ["step-3"], "newer than what lies here"
    checkpoint(again, 4)
    (again.here / "step-5").mkdir()
    (again.here / "step-5" / "weights").write_text("written after the last upload")
    same = machine(address, tmp_path / "here")
    same.pull()
    assert steps(map(str, same.here.rglob("*"))) == ["step-3", "step-4", "step-5"], "further than the bucket"
    shutil.rmtree(same.here / "step-3")
    same.push()
    assert steps(objects.list("scratch/")) == ["step-4", "step-5"]

    there.remove()
    assert objects.list("scratch/") == []
    last = machine(address, tmp_path / "here")
    last.pull()
    assert steps(map(str, last.here.rglob("*"))) == [], "its stage has been committed, or forgotten, elsewhere"


def test_a_checkpoint_that_could_not_be_sent_goes_with_the_next(
    shared_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = Door(shared_server)
    try:
        address = bucket_on(door, tmp_path, monkeypatch)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        mirror = machine(address, tmp_path)
        mirror.pull()
        door.end()
        with pytest.raises(OSError, match="8"):
            checkpoint(mirror, 1)
        door.open()
        mirror.push()
        assert steps(Objects(address).list("scratch/")) == ["step-1"]
    finally:
        door.end()


def test_a_process_forked_from_one_that_used_a_bucket_is_refused(address: str) -> None:
    """The client would hang in it for ever."""
    store = Store(address)
    store.create()
    child = os.fork()
    if child == 0:
        try:
            store.keys()
        except OSError as error:
            os._exit(0 if "forked" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_names_with_any_character_come_back(address: str, tmp_path: Path) -> None:
    bucket = Bucket(f"{address}/a b[1]%20?#")
    names = ["train[degree=3]/1.log", "x%20y", "q?z", "h#h", "ü ~*", "a::b", ".hidden"]
    for name in names:
        (tmp_path / "file").write_text(name)
        bucket.send([(tmp_path / "file", name)])
    assert sorted(bucket.list("")) == sorted(names)
    for number, name in enumerate(names):
        bucket.fetch([(name, tmp_path / str(number))])
        assert (tmp_path / str(number)).read_text() == name
    assert "x%20y" in bucket.children("")
    bucket.remove("train[degree=3]")
    assert len(bucket.list("")) == len(names) - 1


def test_keys_of_a_profile_are_used(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = "[work]\naws_access_key_id = test\naws_secret_access_key = test\n"
    (tmp_path / "credentials").write_text(keys)
    (tmp_path / "config").write_text(f"[profile work]\nendpoint_url = {os.environ['AWS_ENDPOINT_URL']}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert Bucket(address).put("a", b"1")
    assert Bucket(address).get("a") == b"1"
