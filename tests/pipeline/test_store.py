"""An artifact is there completely or not at all, and is never handed out when its bytes are not those committed."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.lease import Lease
from polytrope.pipeline.store import verification
from polytrope.pipeline.store.manifest import OutputChangedError, StoredArtifact, seal
from polytrope.pipeline.store.store import Commit, Store, store_error
from polytrope.pipeline.support import faults
from polytrope.pipeline.tracking.process import database_file, tracking_uri
from polytrope.pipeline.workflow.encoding import encode
from polytrope.pipeline.workflow.keys import stage_key

COMPONENTS = {"uses": "m:f"}
KEY = stage_key(COMPONENTS)


def commit(place: Store, uses: str = "m:f", text: str = "hello", **changes: object) -> StoredArtifact:
    key = stage_key({"uses": uses})
    staging = place.staging(key)
    (staging / "sub").mkdir()
    (staging / "result.txt").write_text(text)
    (staging / "sub" / "more.bin").write_bytes(b"\0" * 5000)
    values: dict[str, object] = {
        "components": {"uses": uses}, "summary": {"loss": 1.5}, "stage": "s", "run_id": "r", "duration": 2.0,
    }  # fmt: skip
    fence = changes.pop("fence", None)
    return place.commit(Commit(key, staging, **{**values, **changes}), fence)  # type: ignore[arg-type]


def files_of(place: Store) -> Path:
    return place.materialize(commit(place).key)


@pytest.fixture
def place(tmp_path: Path) -> Store:
    result = Store(tmp_path / "store")
    result.create()
    return result


def test_parameters_are_read_as_the_workflow_had_them() -> None:
    """Whatever their key encodes them as: the order of a mapping is part of it."""
    given = {"activation": {"name": "hermite", "interval": [-2, 2], "degree": 4}, "rate": math.inf, "seed": 3}
    encoded = {name: encode(value, name) for name, value in given.items()}
    assert "$mapping" in encoded["activation"]
    about = {"key": KEY, "digest": "", "summary": {}, "stage": "s", "run_id": "r", "duration": 0.0, "committed": 0.0}
    stored = StoredArtifact(components={"parameters": encoded}, **about)
    assert stored.parameters == given | {"rate": "inf"}
    assert list(stored.parameters["activation"]) == ["name", "interval", "degree"]
    assert StoredArtifact(components={}, **about).parameters == {}


def test_a_committed_artifact_is_found_with_all_it_was_committed_with(place: Store) -> None:
    committed = commit(place)
    found = Store(place.address).find(KEY)
    assert found == committed
    assert (place.materialize(KEY) / "result.txt").read_text() == "hello"
    assert (found.summary, found.stage, found.run_id, found.duration) == ({"loss": 1.5}, "s", "r", 2.0)
    assert [entry["path"] for entry in found.files] == ["result.txt", "sub/more.bin"]
    assert found.size == 5005
    assert os.listdir(Path(place.address) / "staging") == []


def test_the_digest_depends_on_the_bytes_only(place: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    other.create()
    assert commit(place, "m:g", stage="x", run_id="y").digest == commit(other, "m:h").digest
    assert commit(place, "m:i", text="hullo").digest != commit(other, "m:j").digest


def test_nothing_is_found_before_the_commit(place: Store) -> None:
    staging = place.staging(KEY)
    (staging / "result.txt").write_text("half")
    assert place.find(KEY) is None
    place.discard_staging(KEY)
    assert not staging.exists()


def test_the_files_are_read_only(place: Store) -> None:
    assert (files_of(place) / "result.txt").stat().st_mode & 0o222 == 0


def change_bytes(path: Path) -> None:
    path.chmod(0o644)
    path.write_text("hellO")


def truncate(path: Path) -> None:
    path.chmod(0o644)
    path.write_text("hell")


def remove(path: Path) -> None:
    path.parent.chmod(0o755)
    path.unlink()


def add(path: Path) -> None:
    path.parent.chmod(0o755)
    (path.parent / "extra").write_text("")


def let_it_be_executed(path: Path) -> None:
    path.chmod(0o555)


def replace_by_link(path: Path) -> None:
    path.parent.chmod(0o755)
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (change_bytes, "its bytes have changed"),
        (truncate, "has 4 bytes instead of 5"),
        (remove, "is missing"),
        (add, "extra: is not in the manifest"),
        (replace_by_link, "not a plain file"),
        (let_it_be_executed, "can now be executed"),
    ],
)
def test_a_damaged_artifact_is_not_found_and_can_be_quarantined(
    place: Store, damage: Callable[[Path], None], problem: str
) -> None:
    artifact = commit(place)
    damage(place.materialize(KEY) / "result.txt")
    assert place.find(KEY) is None
    problems = place.verify(KEY)
    assert problem in problems[0]
    moved = place.quarantine(KEY, problems)
    assert moved is not None
    assert (Path(moved) / "problems.json").exists()
    assert not place.exists(KEY)
    assert commit(place).digest == artifact.digest


def test_a_change_that_keeps_size_time_and_inode_is_seen_by_a_full_verification(place: Store) -> None:
    path = files_of(place) / "result.txt"
    status = path.stat()
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.write(b"J")
    path.chmod(0o444)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert place.find(KEY) is not None, "the digest cache trusts size, time and inode"
    assert place.find(KEY, full=True) is None


def test_a_damaged_manifest_is_no_artifact(place: Store) -> None:
    manifest = files_of(place).parent / "manifest.json"
    data = manifest.read_text()
    manifest.write_text(data.replace("1.5", "1.6"))
    assert place.find(KEY) is None
    assert place.verify(KEY) == ["manifest.json is damaged"]
    assert commit(place).summary == {"loss": 1.5}, "a commit replaces it"


def test_unchanged_files_are_hashed_once(place: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(place)
    hashed: list[Path] = []
    real = verification.hash_file

    def counting(path: Path) -> str:
        hashed.append(path)
        return real(path)

    monkeypatch.setattr(verification, "hash_file", counting)
    assert place.find(KEY) is not None
    assert hashed == []
    (Path(place.address) / "digests" / f"{KEY}.json").write_text("[damaged")
    assert place.find(KEY) is not None
    assert len(hashed) == 2
    assert place.find(KEY) is not None
    assert len(hashed) == 2
    assert place.find(KEY, full=True) is not None
    assert len(hashed) == 4


def test_a_second_commit_of_a_key_changes_nothing(place: Store) -> None:
    first = commit(place, run_id="first")
    assert commit(place, text="other", run_id="second") == first


def test_a_driver_that_lost_its_lease_commits_nothing(place: Store) -> None:
    def lost() -> None:
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        commit(place, fence=lost)
    assert place.find(KEY) is None


def test_files_that_change_after_they_were_hashed_are_refused(place: Store) -> None:
    staging = place.staging(KEY)
    (staging / "result.txt").write_text("one")
    entries = seal(staging)
    staging.chmod(0o755)
    (staging / "late.txt").write_text("two")
    with pytest.raises(OutputChangedError, match=r"late\.txt"):
        place.commit(Commit(KEY, staging, COMPONENTS, {}, "s", "r", 0, entries))


def test_a_link_in_the_output_is_refused(place: Store) -> None:
    staging = place.staging(KEY)
    (staging / "link").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="`link`, which is not a plain file"):
        seal(staging)


def test_an_error_at_any_point_of_a_commit_leaves_all_or_nothing(place: Store) -> None:
    number = 0
    while True:
        number += 1
        uses = f"m:f{number}"
        key = stage_key({"uses": uses})
        faults.start_faults(f"error:{number}:ENOSPC")
        try:
            commit(place, uses)
            break
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        finally:
            faults.start_faults(None)
        found = place.find(key, full=True)
        assert found is None or found.summary == {"loss": 1.5}
        assert commit(place, uses).digest == commit(place, "m:whole").digest
    assert number > 10, "the commit has no fault points"


@pytest.mark.parametrize("kind", ["file in its path", "unwritable"])
def test_a_store_that_cannot_be_written_is_refused_with_what_to_do(tmp_path: Path, kind: str) -> None:
    if kind == "unwritable":
        if os.geteuid() == 0:
            root = Path("/proc/polytrope-store")  # root may write everywhere but here
        else:
            (tmp_path / "locked").mkdir(mode=0o555)
            root = tmp_path / "locked" / "store"
    else:
        (tmp_path / "file").write_text("")
        root = tmp_path / "file" / "store"
    with pytest.raises(UserError, match="cannot be used") as caught:
        Store(root).create()
    assert "--set store=" in caught.value.hint


def test_reading_an_absent_store_creates_nothing(tmp_path: Path) -> None:
    absent = Store(tmp_path / "absent")
    assert absent.find(KEY) is None
    assert absent.keys() == []
    assert not (tmp_path / "absent").exists()


STRANGE = "a b[1]::c%20d?x=1#{*}"


def test_a_store_with_any_character_in_its_path_works(tmp_path: Path) -> None:
    """Brackets, `::`, `%`, `?` and the like mean something to globs, to addresses of databases and of file systems."""
    project = tmp_path / STRANGE
    project.mkdir()
    module = (
        "from polytrope.pipeline.stage import StageContext\n\ndef write(context: StageContext) -> dict[str, float]:\n"
    )
    (project / "strange_stages.py").write_text(
        module + "    (context.scratch / 'x').write_text('')\n    return {'a': 1.0}\n"
    )
    (project / "w.yaml").write_text(
        "name: w\nexecutor: local\nstages:\n  s: {uses: 'strange_stages:write', retries: 1}\n"
    )

    def polytrope(*words: str) -> str:
        command = [sys.executable, "-m", "polytrope.pipeline.commands.cli", *words]
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    polytrope("run", "w.yaml", "--no-tracking", "--run-id", "one", "--store", str(project / STRANGE))
    assert "the one stage is stored" in polytrope("plan", "w.yaml", "--store", str(project / STRANGE))
    assert "one" in polytrope("runs", "--store", str(project / STRANGE))
    assert "0 damaged" in polytrope("verify", "one", "--store", str(project / STRANGE))
    assert "removed 0 runs, 0 artifacts, 0 left-overs" in polytrope("gc", "--store", str(project / STRANGE))
    uri = tracking_uri(None, project / STRANGE)
    engine = create_engine(uri)
    with engine.connect() as connection:
        connection.execute(text("CREATE TABLE t (x INTEGER)"))
    engine.dispose()
    assert (project / STRANGE / "mlflow.db").exists()
    assert database_file(uri) == project / STRANGE / "mlflow.db"


def test_a_file_system_without_hard_links_is_refused_by_that_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: object, target: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(source), None, str(target))

    monkeypatch.setattr(os, "link", link)  # as on FAT
    with pytest.raises(UserError, match="its file system has no hard links"):
        Store(tmp_path / "store").create()


def test_a_store_that_was_renamed_meanwhile_is_not_made_again(place: Store) -> None:
    root = Path(place.address)
    root.rename(root.with_name("renamed"))
    for action in (lambda: place.staging(KEY), lambda: Lease.acquire(place.key_lease_directory(KEY), "run r")):
        with pytest.raises(FileNotFoundError) as caught:
            action()
        assert (
            "is gone: was the store renamed or removed meanwhile?" in store_error(place.address, caught.value).message
        )
    assert not root.exists()
    assert Store(root.with_name("renamed")).present


@pytest.mark.parametrize("lost", ["manifest.json", "files/result.txt", "files"])
def test_a_lost_permission_is_said_and_is_no_damage(place: Store, lost: str) -> None:
    path = files_of(place).parent / lost
    code = f"""
import os, sys
from polytrope.pipeline.store.store import Store, store_error
if os.geteuid() == 0:
    os.setuid(65534)
try:
    print(Store({place.address!r}).find({KEY!r}, full=True))
except OSError as error:
    print(store_error("X", error).message)
"""
    for parent in path.parents:
        if str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    finally:
        path.chmod(mode)
    assert done.stdout.strip() == f"the store X cannot be used: this user lacks the permission for `{path}`"
