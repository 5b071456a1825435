"""gc, export, import and verify: nothing that a run needs is lost, nothing damaged enters a store."""

import json
import os
import time
from pathlib import Path

import pytest
from engine_support import Place

from polytrope.pipeline.commands.cli import main
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import Journal, fold, read
from polytrope.pipeline.runs.lease import Lease
from polytrope.pipeline.store.archive import export_run, import_run
from polytrope.pipeline.store.garbage import collect_garbage
from polytrope.pipeline.store.store import Commit, Store
from polytrope.pipeline.workflow.keys import stage_key


@pytest.fixture
def store(tmp_path: Path) -> Store:
    place = Store(tmp_path / "store")
    place.create()
    return place


def artifact(store: Store, letter: str) -> str:
    """Commit an artifact; returns its key."""
    key = stage_key({"uses": letter})
    files = store.staging(key)
    (files / "data.txt").write_text(f"content of {letter}")
    store.commit(Commit(key, files, {"uses": letter}, {"x": 1.0}, letter, "r", 1.0))
    return key


def finished_run(store: Store, run_id: str, *keys: str, age: float = 0) -> Path:
    directory = store.run_directory(run_id)
    directory.mkdir()
    record = directory / "workflow.json"
    record.write_text(json.dumps({"run_id": run_id, "workflow": {"name": "demo"}}))
    journal = Journal.open(directory)
    names = [f"stage{index}" for index in range(len(keys))]
    journal.append("run_started", run_id=run_id, workflow="demo", stages=names)
    journal.append("attempt_started", run_id=run_id, stages=names, attempt=1, executor="local", host="h", pid=1)
    for name, key in zip(names, keys, strict=True):
        found = store.load(key)
        assert found is not None
        journal.append("stage_succeeded", stage=name, key=key, digest=found.digest, summary=found.summary, duration=1.0)
    journal.append("run_finished", status="succeeded", error=None)
    journal.close()
    os.utime(record, (record.stat().st_mtime - age,) * 2)
    return directory


def test_gc_removes_what_no_run_names_and_keeps_the_rest(store: Store) -> None:
    kept, lost = artifact(store, "a"), artifact(store, "b")
    finished_run(store, "one", kept)
    (Path(store.address) / "staging" / "dead.x" / "files").mkdir(parents=True)
    store.scratch(kept).mkdir(parents=True)
    preview = collect_garbage(store, dry_run=True)
    assert (preview.artifacts, len(preview.leftovers)) == ([lost], 2)
    assert store.exists(lost)
    assert collect_garbage(store).artifacts == [lost]
    assert store.keys() == [kept]
    assert store.find(kept) is not None
    assert not list((Path(store.address) / "staging").iterdir())
    assert collect_garbage(store).bytes == 0


def test_an_alias_keeps_an_artifact_when_its_run_is_forgotten(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    kept, lost = artifact(store, "a"), artifact(store, "b")
    finished_run(store, "one", kept, lost)

    def command(*words: str, code: int = 0) -> str:
        assert main([*words, "--store", store.address]) == code
        printed = capsys.readouterr()
        return printed.out + printed.err

    assert "there are no aliases" in command("alias")
    assert "best is stage0 of run one" in command("alias", "best", "one", "stage0")
    assert "best   one  stage0" in command("alias")
    command("gc", "--keep-runs", "0")
    assert store.keys() == [kept]
    assert (Path(command("alias", "best").strip()) / "data.txt").read_text() == "content of a"
    assert "did you mean `best`" in command("alias", "bst", code=2)
    assert "did you mean `best`" in command("alias", "--remove", "bst", code=2)
    store.put_alias("broken", store.get_alias("best").replace(kept.encode(), b"../../elsewhere"))
    assert "aliases/broken.json is damaged" in command("alias", "broken", code=2), "its key points outside"
    store.put_alias("broken", b"{")
    assert "aliases/broken.json is damaged" in command("gc", code=2)
    assert store.keys() == [kept], "nobody knows what the damaged one keeps"
    for name in ("broken", "best"):
        assert f"removed alias {name}" in command("alias", "--remove", name)
    command("gc")
    assert store.keys() == []


def test_an_alias_does_not_pass_another_result_off_as_its_own(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    finished_run(store, "one", artifact(store, "a"))
    assert main(["alias", "best", "one", "stage0", "--store", store.address]) == 0
    key = stage_key({"uses": "a"})
    moved = store.quarantine(key, ["replaced"])
    assert moved is not None
    old = Path(moved.replace(time.strftime("%Y"), "2001"))
    Path(moved).rename(old)
    staging = store.staging(key)
    (staging / "data.txt").write_text("another result")
    store.commit(Commit(key, staging, {"uses": "a"}, {}, "stage0", "one", 0.0))
    assert main(["alias", "best", "--store", store.address]) == 2
    assert "a forced run replaced it by another result" in capsys.readouterr().err
    collect_garbage(store)
    assert old.exists(), "what the alias named"


def test_an_alias_needs_a_result(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    lost = artifact(store, "b")
    finished_run(store, "one", artifact(store, "a"), lost)
    store.remove(f"artifacts/{lost}")
    for words, message in (
        (["a/b", "one", "stage0"], "`a/b` cannot be the name"),
        (["x", "one", "stag0"], "did you mean `stage0`"),
        (["x", "one", "stage1"], "has no intact result"),
        (["x", "one"], "the stage is missing"),
        (["x", "two", "stage0"], "there is no run `two`"),
    ):
        assert main(["alias", *words, "--store", store.address]) == 2
        assert message in capsys.readouterr().err


def test_gc_can_forget_old_runs_first(store: Store) -> None:
    old, new = artifact(store, "a"), artifact(store, "b")
    finished_run(store, "old", old, age=100)
    finished_run(store, "new", new)
    result = collect_garbage(store, keep_runs=1)
    assert (result.runs, result.artifacts) == (["old"], [old])
    assert [path.name for path in store.run_directories()] == ["new"]


def test_gc_refuses_while_a_run_is_going_on(store: Store) -> None:
    directory = finished_run(store, "one", artifact(store, "a"))
    journal = Journal.open(directory)
    journal.append("attempt_started", run_id="one", stages=["stage0"], attempt=2, executor="local", host="h", pid=1)
    lease = Lease.acquire(directory, "run one", 15.0)
    try:
        with pytest.raises(UserError, match="run one is going on"):
            collect_garbage(store)
        assert collect_garbage(store, dry_run=True).artifacts == []
    finally:
        lease.release()
        journal.close()


def test_an_exported_run_can_be_imported_elsewhere_with_the_same_digests(store: Store, tmp_path: Path) -> None:
    keys = [artifact(store, "a"), artifact(store, "b")]
    directory = finished_run(store, "one", *keys)
    assert export_run(store, directory, tmp_path / "run.tar") == 2
    other = Store(tmp_path / "other")
    assert import_run(other, tmp_path / "run.tar") == ("one", 2)
    for key in keys:
        ours, theirs = store.find(key), other.find(key, full=True)
        assert ours is not None
        assert theirs is not None
        assert ours.digest == theirs.digest
    assert fold(read(other.run_directory("one"))).status == "succeeded"
    with pytest.raises(UserError, match="run one is in"):
        import_run(other, tmp_path / "run.tar")


def test_a_damaged_artifact_is_neither_exported_nor_imported(store: Store, tmp_path: Path) -> None:
    key = artifact(store, "a")
    directory = finished_run(store, "one", key)
    export_run(store, directory, tmp_path / "run.tar")
    text = (tmp_path / "run.tar").read_bytes()
    (tmp_path / "altered.tar").write_bytes(text.replace(b"content of a", b"content of x"))
    (tmp_path / "short.tar").write_bytes(text[: len(text) // 2])
    (tmp_path / "other.tar").write_bytes(b"not a tar file" * 100)
    for name in ("altered", "short", "other"):
        with pytest.raises(UserError, match=r"damaged|cut short"):
            import_run(Store(tmp_path / name), tmp_path / f"{name}.tar")
        assert Store(tmp_path / name).keys() == []
    file = store.materialize(key) / "data.txt"
    file.chmod(0o644)
    file.write_text("content of y")
    with pytest.raises(UserError, match="is not intact"):
        export_run(store, directory, tmp_path / "again.tar")
    assert not (tmp_path / "again.tar").exists()


def test_verify_finds_damage_and_moves_it_away(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    key = artifact(store, "a")
    finished_run(store, "one", key)
    place = ["--store", store.address]
    assert main(["verify", *place]) == 0
    file = store.materialize(key) / "data.txt"
    file.chmod(0o644)
    file.write_text("content of y")
    os.utime(file, ns=(0, 0))
    assert main(["verify", *place]) == 1
    assert "data.txt: its bytes have changed" in capsys.readouterr().out
    assert not store.exists(key)
    assert len(list((Path(store.address) / "quarantine").iterdir())) == 1


def test_commands_of_an_empty_store_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--store", str(tmp_path / "none")]
    assert main(["status", *place]) == 2
    assert "there are no runs" in capsys.readouterr().err
    assert main(["runs", *place]) == 0
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("words", [["runs", "--store", ""], ["status", "--store", " "], ["runs"]])
def test_an_empty_address_is_not_the_default_store(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--store" not in words:
        monkeypatch.setenv("POLYTROPE_STORE", "")
    assert main(words) == 2
    assert "store: the address is empty" in capsys.readouterr().err


def test_what_is_opened_may_be_called_as_a_kind_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place(tmp_path)
    untracked = {"tracking": {"enabled": False}}

    def opened(*words: str) -> tuple[str, str]:
        main(["open", *words, "--print", "--store", place.store.address])
        said = capsys.readouterr()
        return said.out.strip(), said.err

    place.run({"report": {"uses": "make", "with": {"text": "a"}}}, run_id="mine", fields=untracked)
    path = Path(opened("artifact", "report")[0])
    assert (path / "text").read_text() == "a"
    place.run({"report": {"uses": "make", "with": {"text": "b"}}}, run_id="artifact", fields=untracked)
    assert (Path(opened("artifact", "artifact", "report")[0]) / "text").read_text() == "b"
    assert "run artifact has no report" in opened("artifact", "report")[1]  # there is such a run now
    for words in (["mine"], ["mine", "mlflow"]):
        out, error = opened(*words)
        assert out == ""
        assert "run mine was made without MLflow (`tracking.enabled: false`)\n  → `polytrope status mine" in error
