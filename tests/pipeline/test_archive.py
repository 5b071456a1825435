"""`export` writes what `import` accepts, and `import` accepts nothing else: nothing in an archive is trusted."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_support import S3Server, bucket_on

from polytrope.pipeline.commands.cli import main
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import Event, Journal, encode, read
from polytrope.pipeline.store.archive import export_run, import_run
from polytrope.pipeline.store.store import Commit, Store
from polytrope.pipeline.workflow.keys import stage_key

COMPONENTS = {"uses": "m:f"}
KEY = stage_key(COMPONENTS)
FILES = {"array.zarr/.zarray": "{}", "array.zarr/0": "abc", "lease-prices.csv": "a,b", "tool.sh": "#!/bin/sh"}


def make_run(store: Store, *, log: str = "logs/lease-prices/1.log") -> Path:
    """A finished run of one stage, whose files have names that leases and temporary files have elsewhere."""
    store.create()
    output = store.staging(KEY)
    for name, text in FILES.items():
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text(text)
    (output / "tool.sh").chmod(0o755)
    digest = store.commit(Commit(KEY, output, COMPONENTS, {}, "lease-prices", "one", 1.0)).digest
    directory = store.run_directory("one")
    for name, text in {
        "workflow.json": json.dumps({"run_id": "one", "directory": "/", "workflow": {"name": "demo"}}),
        "logs/lease-prices/1.log": "said",
        "spool/lease-prices/1/.hidden.jsonl": '{"kind": "artifact", "path": "."}\n{"kind": "model", "path": "m/"}\n',
        "lease-000001": "{}",
        "mlflow.json": "{}",
        "cancel.json": "{}",
    }.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    journal = Journal.open(directory)
    journal.append("run_started", run_id="one", workflow="demo", stages=["lease-prices"])
    journal.append("stage_started", stage="lease-prices", attempt=1, key=KEY, components=COMPONENTS, log=log)
    journal.append("stage_succeeded", stage="lease-prices", key=KEY, digest=digest, summary={}, duration=1.0)
    journal.append("run_finished", status="succeeded", error=None)
    journal.close()
    return directory


def names(path: Path) -> list[str]:
    with tarfile.open(path) as archive:
        assert all(member.isreg() for member in archive.getmembers())
        return archive.getnames()


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    export_run(store := Store(tmp_path / "store"), make_run(store), tmp_path / "run.tar")
    return tmp_path / "run.tar"


def check(store: Store) -> None:
    artifact = store.find(KEY, full=True)
    assert artifact is not None
    files = store.materialize(KEY)
    assert {name: (files / name).read_text() for name in FILES} == FILES
    assert [name for name in FILES if os.stat(files / name).st_mode & 0o777 == 0o555] == ["tool.sh"]
    assert os.stat(files / "array.zarr").st_mode & 0o777 == 0o555


def test_an_export_holds_all_of_its_artifacts_and_of_the_run_what_others_can_use(
    exported: Path, tmp_path: Path
) -> None:
    assert names(exported) == [
        "polytrope-run.json",
        *(f"runs/one/{name}" for name in ("journal.jsonl", "logs/lease-prices/1.log")),
        "runs/one/spool/lease-prices/1/.hidden.jsonl",
        "runs/one/workflow.json",
        f"artifacts/{KEY}/manifest.json",
        *(f"artifacts/{KEY}/files/{name}" for name in sorted(FILES)),
    ]
    other = Store(tmp_path / "other")
    assert import_run(other, exported) == ("one", 1)
    check(other)
    assert (other.run_directory("one") / "logs/lease-prices/1.log").read_text() == "said"


def test_all_that_is_imported_is_on_the_disk_before_it_exists(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()
    fsync, rename = os.fsync, os.rename
    seen: list[str] = []

    def flush(descriptor: int) -> None:
        fsync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def move(source: Path, target: Path) -> None:
        if Path(target).parent.name in ("artifacts", "runs"):
            waiting = [path for path in (Path(source), *Path(source).rglob("*")) if path.stat().st_ino not in flushed]
            assert waiting == []
            seen.append(Path(target).name)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "rename", move)
    import_run(Store(tmp_path / "other"), exported)
    assert seen == [KEY, "one"]


def test_hard_links_between_stores_are_exported_as_files(tmp_path: Path) -> None:
    """As `reproduce` makes them."""
    store = Store(tmp_path / "store")
    directory = make_run(store)
    shutil.copytree(store.whole(KEY), tmp_path / "linked", copy_function=os.link)
    os.link(directory / "workflow.json", directory / "workflow.1.json")
    export_run(store, directory, tmp_path / "run.tar")
    assert f"artifacts/{KEY}/files/tool.sh" in names(tmp_path / "run.tar")
    import_run(Store(tmp_path / "other"), tmp_path / "run.tar")
    check(Store(tmp_path / "other"))


@pytest.fixture
def server() -> Iterator[S3Server]:
    started = S3Server()
    yield started
    started.end()


def test_executable_bits_survive_an_object_store(
    exported: Path, tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Store(bucket_on(server, tmp_path, monkeypatch))
    import_run(bucket, exported)
    bucket.pull_runs()
    check(bucket)
    export_run(bucket, bucket.run_directory("one"), tmp_path / "again.tar")
    monkeypatch.setenv("POLYTROPE_CACHE", str(tmp_path / "cold"))
    check(Store(bucket.address))
    import_run(Store(tmp_path / "other"), tmp_path / "again.tar")
    check(Store(tmp_path / "other"))


# -- hostile archives ----------------------------------------------------------------------------------------------


class Archive:
    """The entries of an exported run, to be changed."""

    def __init__(self, path: Path) -> None:
        self.entries: list[tuple[tarfile.TarInfo, bytes]] = []
        with tarfile.open(path) as archive:
            for member in archive:
                source = archive.extractfile(member)
                self.entries.append((member, source.read() if source else b""))

    def __getitem__(self, name: str) -> bytes:
        return next(data for member, data in self.entries if member.name == name)

    def add(self, name: str, data: bytes = b"", **fields: Any) -> None:
        member = tarfile.TarInfo(name)
        for field, value in fields.items():
            setattr(member, field, value)
        self.entries.append((member, data))

    def change(self, name: str, data: bytes) -> None:
        self.entries = [(member, data if member.name == name else old) for member, old in self.entries]

    def change_json(self, name: str, **changes: object) -> None:
        self.change(name, json.dumps({**json.loads(self[name]), **changes}).encode())

    def rename(self, old: str, new: str) -> None:
        for member, _ in self.entries:
            member.name = member.name.replace(old, new)

    def log(self, type: str, **data: Any) -> None:
        """One more event of the journal, with a right checksum."""
        name = "runs/one/journal.jsonl"
        self.change(name, self[name] + encode(Event(99, 0.0, 0, type, data)))

    def write(self, path: Path) -> Path:
        with tarfile.open(path, "w") as archive:
            for member, data in self.entries:
                member.size = 0 if member.type in (tarfile.SYMTYPE, tarfile.LNKTYPE) else len(data)
                archive.addfile(member, io.BytesIO(data))
        return path


def forge_manifest(archive: Archive, **changes: object) -> None:
    """Another manifest, whose checksum is right."""
    content = {**json.loads(archive[f"artifacts/{KEY}/manifest.json"]), **changes}
    del content["checksum"]
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    archive.change(f"artifacts/{KEY}/manifest.json", json.dumps({**content, "checksum": checksum}).encode())


def climb(archive: Archive) -> None:
    archive.add("../../outside", b"x")


def climb_within(archive: Archive) -> None:
    archive.add("runs/one/logs/../../../../../outside", b"x")


def absolute(archive: Archive) -> None:
    archive.add("/outside", b"x")


def symbolic_link(archive: Archive) -> None:
    archive.add("runs/one/logs/x", type=tarfile.SYMTYPE, linkname="../../../../../outside")


def linked_directory(archive: Archive) -> None:
    archive.add(f"artifacts/{KEY}/files/d", type=tarfile.SYMTYPE, linkname="/tmp")
    archive.add(f"artifacts/{KEY}/files/d/outside", b"x")


def journal_of_another_run(archive: Archive) -> None:
    archive.entries = [entry for entry in archive.entries if entry[0].name != "runs/one/journal.jsonl"]
    archive.add("runs/one/journal.jsonl", type=tarfile.SYMTYPE, linkname="../../../runs/victim/journal.jsonl")


def hard_link(archive: Archive) -> None:
    archive.add("runs/one/logs/x", type=tarfile.LNKTYPE, linkname="runs/one/workflow.json")


def device(archive: Archive) -> None:
    archive.add("runs/one/logs/x", type=tarfile.FIFOTYPE)


def key_that_climbs(archive: Archive) -> None:
    archive.change_json("polytrope-run.json", keys=["../runs/two"])


def key_of_another_stage(archive: Archive) -> None:
    other = stage_key({"uses": "victim:train"})
    archive.change_json("polytrope-run.json", keys=[other])
    forge_manifest(archive, key=other)
    archive.rename(KEY, other)


def run_that_climbs(archive: Archive) -> None:
    archive.change_json("polytrope-run.json", run="../../one")


def another_run(archive: Archive) -> None:
    archive.add("runs/two/workflow.json", b"{}")


def artifact_without_key(archive: Archive) -> None:
    archive.add(f"artifacts/{'b' * 64}/files/x", b"x")


def file_beside_the_manifest(archive: Archive) -> None:
    archive.add(f"artifacts/{KEY}/module.py", b"x")


def module_in_the_run(archive: Archive) -> None:
    archive.add("runs/one/module.py", b"x")


def scratch(archive: Archive) -> None:
    archive.add(f"scratch/{KEY}/checkpoints/x", b"x")


def file_twice(archive: Archive) -> None:
    archive.add(f"artifacts/{KEY}/files/tool.sh", b"x")


def more_files(archive: Archive) -> None:
    archive.add(f"artifacts/{KEY}/files/more", b"x")


def manifest_that_climbs(archive: Archive) -> None:
    row = {"path": "../../../../outside", "size": 1, "sha256": "0" * 64}
    line = f"{row['path']}\0{row['size']}\0{row['sha256']}\n"
    forge_manifest(archive, files=[row], digest=hashlib.sha256(line.encode()).hexdigest())


def journal_key(archive: Archive) -> None:
    archive.log("stage_cached", stage="x", key="../../outside", digest="0", hit_from="one")


def journal_log(archive: Archive) -> None:
    archive.log("stage_failed", stage="x", attempt=1, error={}, log="../../../outside")


def journal_source(archive: Archive) -> None:
    archive.log("stage_cached", stage="x", key=KEY, digest="0", hit_from="../../outside")


def journal_of_another_id(archive: Archive) -> None:
    archive.log("attempt_started", run_id="victim", stages=[])


def journal_nonsense(archive: Archive) -> None:
    archive.log("stage_started", stage=["x"])


def event_path(archive: Archive) -> None:
    """MLflow would be sent a file of this machine."""
    archive.add("runs/one/spool/x/1/h.jsonl", b'{"kind": "artifact", "path": "../../../../../etc/passwd"}\n')


def no_journal(archive: Archive) -> None:
    archive.entries = [entry for entry in archive.entries if not entry[0].name.endswith("journal.jsonl")]


@pytest.mark.parametrize(
    ("attack", "named"),
    [
        (climb, r"\.\./\.\./outside`, which points outside"),
        (climb_within, "outside`, which points outside"),
        (absolute, "which points outside"),
        (symbolic_link, "`runs/one/logs/x`, which is a link"),
        (linked_directory, "files/d`, which is a link"),
        (journal_of_another_run, r"`runs/one/journal\.jsonl`, which is a link"),
        (hard_link, "`runs/one/logs/x`, which is a link"),
        (device, "a special file"),
        (key_that_climbs, r"`\.\./runs/two` is no stage key"),
        (key_of_another_stage, "artifact .* manifest.json is damaged"),
        (run_that_climbs, r"`\.\./\.\./one` is no run id"),
        (another_run, "`runs/two/workflow.json`, which belongs neither"),
        (artifact_without_key, "/files/x`, which belongs neither"),
        (file_beside_the_manifest, r"module\.py`, which belongs neither"),
        (module_in_the_run, r"`runs/one/module\.py`, which belongs neither"),
        (scratch, "which belongs neither"),
        (file_twice, r"tool\.sh` twice"),
        (more_files, "more: is not in the manifest"),
        (manifest_that_climbs, "manifest.json is damaged"),
        (journal_key, r"the journal names the key `\.\./\.\./outside`"),
        (journal_log, r"the journal names the log `\.\./\.\./\.\./outside`"),
        (journal_source, r"the journal names the run `\.\./\.\./outside`"),
        (journal_of_another_id, "the journal is of run `victim`"),
        (journal_nonsense, "is not a run exported by polytrope"),
        (event_path, "names the file `../../../../../etc/passwd`"),
        (no_journal, "it has no journal"),
    ],
)
def test_a_hostile_archive_is_refused_by_name_and_leaves_nothing(
    exported: Path, tmp_path: Path, attack: Callable[[Archive], None], named: str
) -> None:
    archive = Archive(exported)
    attack(archive)
    store = Store(tmp_path / "deep" / "er" / "other")
    with pytest.raises(UserError, match=named):
        import_run(store, archive.write(tmp_path / "evil.tar"))
    assert (store.keys(), store.names("runs"), store.names("staging")) == ([], [], [])
    assert not list(tmp_path.rglob("outside"))


def test_archives_of_earlier_versions_are_read(exported: Path, tmp_path: Path) -> None:
    """They list directories, and files of a run that are left out now."""
    archive = Archive(exported)
    for name in ("runs/one", "runs/one/logs", f"artifacts/{KEY}", f"artifacts/{KEY}/files"):
        archive.add(name, type=tarfile.DIRTYPE)
    for name in ("mlflow.json", "mlflow.error", "graph.svg", "cancel.json"):
        archive.add(f"runs/one/{name}", b"{}")
    store = Store(tmp_path / "other")
    import_run(store, archive.write(tmp_path / "old.tar"))
    check(store)
    assert sorted(path.name for path in store.run_directory("one").iterdir()) == [
        "journal.jsonl", "logs", "spool", "workflow.json",
    ]  # fmt: skip


def test_nothing_of_an_imported_run_is_imported_as_code_or_asked_for_secrets(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its directory would be where a resume looks for modules; here it lies in the store, where its log is."""
    store = Store(tmp_path / "other")
    archive = Archive(exported)
    proof = tmp_path / "code ran"
    archive.add("runs/one/logs/evil_module.py", f"open({str(proof)!r}, 'w')\n".encode())
    archive.change_json(
        "runs/one/workflow.json",
        directory=str(store.run_directory("one") / "logs"),
        source="/etc/passwd",
        workflow={
            "name": "demo",
            "stages": {"s": {"uses": "evil_module:f"}},
            "tracking": {"uri": "http://evil.example/${env.HOME}", "experiment": "e"},
        },
    )
    import_run(store, archive.write(tmp_path / "evil.tar"))
    record = json.loads((store.run_directory("one") / "workflow.json").read_bytes())
    assert (record["directory"], record["source"]) == (None, None)
    assert record["workflow"]["tracking"] == {"uri": None, "experiment": "e"}
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["resume", "one", "--store", store.address, "--no-tracking"]) == 2
    assert "cannot import `evil_module`" in capsys.readouterr().err
    assert not proof.exists()


def test_the_journal_of_an_imported_run_is_a_file_of_its_own(exported: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "other")
    import_run(store, exported)
    journal = store.run_directory("one") / "journal.jsonl"
    assert not journal.is_symlink()
    assert [event.type for event in read(journal.parent)][-1] == "run_finished"
