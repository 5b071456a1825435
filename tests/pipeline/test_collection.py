"""Garbage collection and what begins meanwhile: nothing that a run, an alias or an import relies on is removed."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_support import Place, diamond
from s3_support import S3Server, bucket_on

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import RunState, fold, read
from polytrope.pipeline.store.aliases import set_alias
from polytrope.pipeline.store.archive import export_run, import_run
from polytrope.pipeline.store.garbage import collect_garbage
from polytrope.pipeline.store.store import Store

COLLECT = """
import sys
from polytrope.pipeline.store.garbage import collect_garbage
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.support.faults import start_faults

start_faults("stop:before a removal")
found = collect_garbage(Store(sys.argv[1]), keep_runs=0, lease_ttl=float(sys.argv[2]))
print(len(found.artifacts))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.end()


@pytest.fixture(params=["directory", "bucket"])
def place(request: pytest.FixtureRequest, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    place = Place(tmp_path)
    if request.param == "bucket":
        place.store = Store(bucket_on(server, tmp_path, monkeypatch))
    return place


def collection_that_stops(store: Store, ttl: float) -> subprocess.Popen[str]:
    """A process that knows what it will remove, and stands still before it removes the first thing."""
    command = [sys.executable, "-c", COLLECT, store.address, str(ttl)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def in_a_thread(action: Any) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(action()))
    thread.start()
    return thread, results


def assert_whole(place: Place, state: RunState) -> None:
    assert state.status == "succeeded"
    assert [place.store.verify(stage.key or "") for stage in state.stages.values()] == [[]] * 4


def test_a_run_that_begins_meanwhile_waits(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.run(diamond(place), run_id="first")
    collection = collection_that_stops(place.store, 15.0)
    try:
        thread, results = in_a_thread(lambda: place.run(diamond(place), run_id="second"))
        time.sleep(0.5)
        assert read(place.store.run_directory("second")) == []
    finally:
        collection.send_signal(signal.SIGCONT)
    output, errors = collection.communicate(timeout=60)
    assert (collection.returncode, output.strip()) == (0, "4"), errors
    thread.join()
    assert_whole(place, results[0])
    assert "waits for polytrope gc (process" in capfd.readouterr().err
    assert place.store.names("leases") == []


def test_a_collection_that_stood_still_for_too_long_removes_nothing(place: Place) -> None:
    place.run(diamond(place), run_id="first")
    collection = collection_that_stops(place.store, 0.6)
    try:
        assert_whole(place, place.run(diamond(place), run_id="second"))
    finally:
        collection.send_signal(signal.SIGCONT)
    _, errors = collection.communicate(timeout=60)
    assert collection.returncode == 1
    assert "was taken for dead" in errors
    state = fold(read(place.store.run_directory("second")))
    assert {stage.state for stage in state.stages.values()} == {"cached"}
    assert_whole(place, state)


def test_a_killed_collection_locks_nothing(place: Place) -> None:
    place.run(diamond(place), run_id="first")
    collection = collection_that_stops(place.store, 600.0)
    collection.kill()
    collection.communicate()
    assert_whole(place, place.run(diamond(place), run_id="second"))
    assert len(collect_garbage(place.store, keep_runs=0).artifacts) == 4


def test_a_run_that_has_not_written_a_word_yet_counts(place: Place) -> None:
    """Its driver holds the lease of a run that had ended: it is about to resume it."""
    from polytrope.pipeline.runs.lease import Lease

    place.run(diamond(place), run_id="first")
    lease = Lease.acquire(place.store.run_lease_directory("first"), "run first")
    with pytest.raises(UserError, match="run first is going on"):
        collect_garbage(place.store, keep_runs=0)
    lease.release()
    assert len(collect_garbage(place.store, keep_runs=0).artifacts) == 4


def test_an_import_and_an_alias_wait_for_a_collection(place: Place, tmp_path: Path) -> None:
    state = place.run(diamond(place), run_id="first")
    export_run(place.store, place.store.run_directory("first"), tmp_path / "first.tar")
    other = Store(tmp_path / "other")
    other.create()
    with place.store.alone("polytrope gc"), other.alone("polytrope gc"):
        naming, _ = in_a_thread(lambda: set_alias(place.store, "best", place.store.run_directory("first"), "a"))
        importing, _ = in_a_thread(lambda: import_run(other, tmp_path / "first.tar"))
        time.sleep(0.4)
        assert place.store.get_alias("best") is None
        assert other.keys() == []
    naming.join()
    importing.join()
    assert place.store.get_alias("best") is not None
    assert other.keys() == sorted(stage.key or "" for stage in state.stages.values())
