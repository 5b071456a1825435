"""One holder at a time: taken over from the dead, never from the living, and the dispossessed cannot commit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from engine_support import forge

from polytrope.pipeline.runs import lease as leases
from polytrope.pipeline.runs.lease import HolderWatch, Lease, LeaseHeldError, LeaseLostError, current, is_held

HOLD = """
import sys, time
from pathlib import Path
from polytrope.pipeline.runs.lease import Lease
lease = Lease.acquire(Path(sys.argv[1]), "other", ttl=float(sys.argv[2]))
print(lease.number, flush=True)
time.sleep(60)
"""


def hold_elsewhere(directory: Path, ttl: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory), str(ttl)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip().isdigit()
    return process


def test_a_held_lease_is_refused_and_names_its_holder(tmp_path: Path) -> None:
    lease = Lease.acquire(tmp_path, "run one")
    with pytest.raises(LeaseHeldError, match=rf"run one \(process {os.getpid()} on"):
        Lease.acquire(tmp_path, "run two", watch=False)
    assert is_held(tmp_path)
    lease.release()
    assert not is_held(tmp_path)


def test_the_number_grows_with_every_holder(tmp_path: Path) -> None:
    numbers = []
    for _ in range(6):
        lease = Lease.acquire(tmp_path, "owner", heartbeat=False)
        numbers.append(lease.number)
        lease.release()
    assert numbers == [1, 2, 3, 4, 5, 6]
    assert len(list(tmp_path.iterdir())) <= 4


def test_a_killed_holder_is_replaced_at_once(tmp_path: Path) -> None:
    process = hold_elsewhere(tmp_path, ttl=600)
    process.kill()
    process.wait()
    assert Lease.acquire(tmp_path, "mine", watch=False).number == 2


def test_a_stopped_holder_is_replaced_after_its_time_and_finds_out(tmp_path: Path) -> None:
    process = hold_elsewhere(tmp_path, ttl=0.6)
    try:
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 30
        while True:
            try:
                mine = Lease.acquire(tmp_path, "mine", ttl=5)
                break
            except LeaseHeldError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.6)  # its heartbeat runs again
        mine.check()
        mine.release()
    finally:
        process.kill()
        process.wait()


def test_a_lease_that_was_taken_over_is_lost(tmp_path: Path) -> None:
    lease = Lease.acquire(tmp_path, "mine", heartbeat=False)
    lease.check()
    forge(tmp_path / "lease-000002", tmp_path / "lease-000001", number=2, owner="other", token="t")
    with pytest.raises(LeaseLostError, match="taken over by other"):
        lease.check()
    lease.release()
    found = current(tmp_path)
    assert found is not None
    assert found.owner == "other"


def test_a_living_holder_on_another_host_is_not_judged_by_its_clock(tmp_path: Path) -> None:
    """Its clock is an hour behind or ahead; only whether its heartbeat moves counts."""
    lease = Lease.acquire(tmp_path, "remote", ttl=0.9, heartbeat=False)
    path = tmp_path / "lease-000001"
    stop = threading.Event()

    def beat() -> None:
        number = 0
        while not stop.wait(0.05):
            number += 1
            forge(path, path, beat=number, renewed=time.time() - 3600, host="elsewhere", process="elsewhere 1 1")

    thread = threading.Thread(target=beat)
    thread.start()
    time.sleep(0.2)
    try:
        with pytest.raises(LeaseHeldError):
            Lease.acquire(tmp_path, "mine")
    finally:
        stop.set()
        thread.join()
    assert Lease.acquire(tmp_path, "mine").number == 2, "its heartbeat stands still now"
    assert lease.lost


def test_a_glance_at_a_time_is_enough_to_find_a_dead_holder(tmp_path: Path) -> None:
    Lease.acquire(tmp_path, "remote", ttl=0.3, heartbeat=False)
    path = tmp_path / "lease-000001"
    forge(path, path, renewed=0.0, host="elsewhere", process="elsewhere 1 1")
    watch = HolderWatch()
    with pytest.raises(LeaseHeldError):
        Lease.acquire(tmp_path, "mine", watch=watch)
    time.sleep(0.35)
    assert Lease.acquire(tmp_path, "mine", watch=watch).number == 2


def test_a_key_lease_lives_as_long_as_its_run(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    run = Lease.acquire(tmp_path / "runs" / "r", "run r")
    via = (tmp_path, "runs/r", run.record.token)
    key = Lease.acquire(tmp_path / "key", "run r", via=via)
    with pytest.raises(LeaseHeldError):
        Lease.acquire(tmp_path / "key", "run s", watch=False, via=(tmp_path, "runs/s", "t"))
    run.release()
    other = Lease.acquire(tmp_path / "key", "run s", watch=False, via=(tmp_path, "runs/s", "t"))
    with pytest.raises(LeaseLostError):
        key.check()
    other.release(remove=True)
    assert not (tmp_path / "key").exists()
    with pytest.raises(LeaseLostError):
        key.check()


def test_of_many_contenders_exactly_one_holds(tmp_path: Path) -> None:
    holders: list[int] = []
    inside = 0
    overlap = 0
    barrier = threading.Barrier(8)
    lock = threading.Lock()

    def contend() -> None:
        nonlocal inside, overlap
        barrier.wait()
        while True:
            try:
                lease = Lease.acquire(tmp_path / "lease", "thread", heartbeat=False, watch=False)
            except LeaseHeldError:
                time.sleep(0.001)
                continue
            with lock:
                inside += 1
                overlap = max(overlap, inside)
            lease.check()
            holders.append(lease.number)
            with lock:
                inside -= 1
            lease.release()
            return

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(holders) == list(range(1, 9))
    assert overlap == 1


def test_a_damaged_lease_holds_nothing(tmp_path: Path) -> None:
    Lease.acquire(tmp_path, "mine", heartbeat=False)
    path = tmp_path / "lease-000001"
    path.write_bytes(path.read_bytes().replace(b'"ttl": 15.0', b'"ttl": 95.0'))
    assert current(tmp_path) is None
    assert Lease.acquire(tmp_path, "other", watch=False).number == 2


def test_where_processes_are_hidden_the_heartbeat_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `hidepid=2`: /proc shows no process of another user, who is alive nevertheless."""
    holder = hold_elsewhere(tmp_path / "lease", ttl=0.6)
    gone = subprocess.Popen(["true"])
    gone.wait()
    try:
        assert leases._process_start(holder.pid, tmp_path) == ""
        assert leases._process_start(gone.pid, tmp_path) is None
        real = leases._process_start
        monkeypatch.setattr(leases, "_process_start", lambda pid: real(pid, tmp_path))
        assert is_held(tmp_path / "lease")
        with pytest.raises(LeaseHeldError):
            Lease.acquire(tmp_path / "lease", "late")
        holder.send_signal(signal.SIGSTOP)
        while is_held(tmp_path / "lease"):
            time.sleep(0.05)
        lease = Lease.acquire(tmp_path / "lease", "late")  # after its ttl, as of a holder on another host
        assert lease.number == 2
        lease.release()
    finally:
        holder.kill()
        holder.wait()
