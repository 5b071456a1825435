"""What a stage leaves is sealed: no byte is shared with a file that somebody may write, and no change goes unseen."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.store.manifest import (
    FileEntry,
    OutputChangedError,
    artifact_digest,
    build_manifest,
    check_sealed,
    file_rows,
    is_plain_path,
    parse_manifest,
    seal,
    write_manifest,
)
from polytrope.pipeline.store.store import Commit, Store
from polytrope.pipeline.support.files import hash_file, remove_tree
from polytrope.pipeline.workflow.keys import stage_key

COMPONENTS = {"uses": "m:f", "parameters": {"degree": 3}}
KEY = stage_key(COMPONENTS)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    directory = tmp_path / "output"
    (directory / "sub").mkdir(parents=True)
    (directory / "data.txt").write_text("hello")
    (directory / "sub" / "more.txt").write_text("world")
    return directory


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def manifest(entries: list[FileEntry]) -> bytes:
    return build_manifest(KEY, entries, components=COMPONENTS, summary={}, stage="s", run_id="r", duration=1.0)


def test_everything_is_read_only_and_can_be_removed(output: Path) -> None:
    seal(output)
    assert [mode(path) for path in (output, output / "sub")] == [0o555, 0o555]
    assert [mode(output / name) for name in ("data.txt", "sub/more.txt")] == [0o444, 0o444]
    remove_tree(output)
    assert not output.exists()


def test_removing_a_tree_leaves_other_names_of_its_files_alone(output: Path, tmp_path: Path) -> None:
    seal(output)
    os.link(output / "data.txt", tmp_path / "other name")
    remove_tree(output)
    assert mode(tmp_path / "other name") == 0o444


def write(path: Path) -> None:
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.write(b"HELLO")


def replace(path: Path) -> None:
    status = path.stat()
    (path.parent / "new").write_text("HELLO")
    os.utime(path.parent / "new", ns=(status.st_mtime_ns, status.st_mtime_ns))
    (path.parent / "new").replace(path)


def add(path: Path) -> None:
    (path.parent / "data.txt2").write_text("")


def allow_execution(path: Path) -> None:
    path.chmod(0o555)


@pytest.mark.parametrize("change", [write, replace, add, Path.unlink, allow_execution])
def test_any_change_after_the_seal_is_seen_by_name(output: Path, change: Callable[[Path], None]) -> None:
    """Also in the very tick of the file system's clock in which the file was written, and of the same size."""
    entries = seal(output)
    check_sealed(output, entries)
    output.chmod(0o755)
    change(output / "data.txt")
    with pytest.raises(OutputChangedError, match=r"data\.txt"):
        check_sealed(output, entries)


def test_the_time_of_a_sealed_file_is_one_that_no_later_write_can_leave(output: Path) -> None:
    last_write = (output / "data.txt").stat().st_mtime_ns
    (entry,) = [entry for entry in seal(output) if entry.path == "data.txt"]
    assert entry.mtime_ns <= last_write - 900_000_000


def test_a_file_that_is_open_for_writing_yet_is_not_the_one_that_is_kept(
    output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open(output / "data.txt", "r+b") as file, open(output / "sub" / "more.txt", "r+b") as other:
        mapped = mmap.mmap(other.fileno(), 0)
        entries = seal(output)
        file.write(b"LATER")
        file.flush()
        mapped[:5] = b"LATER"
        mapped.close()
    check_sealed(output, entries)
    assert (output / "data.txt").read_text() == "hello"
    assert (output / "sub" / "more.txt").read_text() == "world"
    assert "`data.txt` is still open for writing" in caplog.text


def test_a_thread_that_goes_on_writing_cannot_make_the_hash_wrong(output: Path) -> None:
    """It is refused by name, or what was hashed is what is there."""
    writing, ended = threading.Event(), threading.Event()

    def run() -> None:
        with open(output / "data.txt", "r+b", buffering=0) as file:
            while not ended.is_set():
                file.seek(0)
                file.write(os.urandom(200_000))
                writing.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        writing.wait()
        try:
            entries, refused = seal(output), ""
        except OutputChangedError as error:
            entries, refused = [], str(error)
        if refused:
            assert "`data.txt` changed after the stage had ended" in refused
        else:
            check_sealed(output, entries)
            assert {entry.path: entry.sha256 for entry in entries} == {
                name: hash_file(output / name) for name in ("data.txt", "sub/more.txt")
            }
    finally:
        ended.set()
        thread.join()


def test_a_hard_link_is_copied_and_the_other_name_keeps_its_permissions(output: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.csv"
    mine.write_text("a,b\n")
    mine.chmod(0o754)
    os.link(mine, output / "mine.csv")
    os.link(output / "data.txt", output / "twice.txt")
    (output / "sub").chmod(0o555)  # as `shutil.copytree` of an artifact leaves it
    entries = seal(output)
    assert (mode(mine), mode(output / "mine.csv")) == (0o754, 0o555)
    mine.write_text("changed")
    check_sealed(output, entries)
    assert (output / "mine.csv").read_text() == "a,b\n"
    assert all((output / entry.path).stat().st_nlink == 1 for entry in entries)


def test_an_output_that_became_a_link_is_refused_and_what_it_points_to_untouched(output: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    output.rename(foreign)
    output.symlink_to(foreign)
    with pytest.raises(UserError, match="was replaced by a symbolic link"):
        seal(output)
    assert (mode(foreign), mode(foreign / "data.txt")) == (0o755, 0o644)
    output.unlink()
    with pytest.raises(UserError, match="is gone"):
        seal(output)


def test_an_output_that_becomes_a_link_after_the_seal_is_not_committed(tmp_path: Path) -> None:
    place = Store(tmp_path / "store")
    place.create()
    staging = place.staging(KEY)
    (staging / "data.txt").write_text("hello")
    entries = seal(staging)
    staging.chmod(0o755)
    staging.rename(tmp_path / "elsewhere")
    staging.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="was replaced by a symbolic link"):
        place.commit(Commit(KEY, staging, COMPONENTS, {}, "s", "r", 0, entries))


def test_a_name_that_is_not_utf_8_is_refused_by_name(output: Path) -> None:
    with open(os.fsencode(output / "sub") + b"/caf\xe9", "w"):
        pass
    with pytest.raises(UserError, match=r"sub/caf\\xe9.*not UTF-8"):
        seal(output)


def test_empty_directories_are_left_out_and_that_is_said(output: Path, caplog: pytest.LogCaptureFixture) -> None:
    (output / "empty" / "inner").mkdir(parents=True)
    (output / "empty").chmod(0o555)
    seal(output)
    assert sorted(path.name for path in output.iterdir()) == ["data.txt", "sub"]
    assert "`empty` is left out" in caplog.text


def test_executable_bits_are_part_of_the_result(output: Path) -> None:
    plain = artifact_digest(file_rows(seal(output)))
    texts = {"data.txt": b"hello", "sub/more.txt": b"world"}
    lines = [f"{name}\0{len(text)}\0{hashlib.sha256(text).hexdigest()}\n" for name, text in texts.items()]
    assert plain == hashlib.sha256("".join(lines).encode()).hexdigest(), "as it was when there were no such bits"
    (output / "data.txt").chmod(0o755)
    entries = seal(output)
    assert mode(output / "data.txt") == 0o555
    stored = parse_manifest(manifest(entries), KEY)
    assert stored is not None
    assert [row.get("executable") for row in stored.files] == [True, None]
    assert stored.digest != plain
    assert parse_manifest(write_manifest(stored), KEY) == stored


def forged(data: bytes, **changes: object) -> bytes:
    """Another manifest, whose checksum is right."""
    content = {**json.loads(data), **changes}
    del content["checksum"]
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return json.dumps({**content, "checksum": checksum}).encode()


def test_a_manifest_that_contradicts_its_key_or_itself_is_none(output: Path) -> None:
    data = manifest(seal(output))
    rows = json.loads(data)["files"]
    outside = [{**rows[0], "path": "../../outside"}]
    assert parse_manifest(forged(data), KEY) is not None
    other = stage_key({"uses": "m:other"})
    assert parse_manifest(forged(data, key=other), other) is None, "the components are of another stage"
    assert parse_manifest(forged(data, components={"uses": "m:other"}), KEY) is None
    assert parse_manifest(forged(data, files=rows[:1]), KEY) is None, "the digest is of other files"
    assert parse_manifest(forged(data, files=outside, digest=artifact_digest(outside)), KEY) is None
    twice = [rows[0], rows[0]]
    assert parse_manifest(forged(data, files=twice, digest=artifact_digest(twice)), KEY) is None
    assert parse_manifest(forged(data, summary={"loss": [1]}), KEY) is None


def test_plain_paths() -> None:
    assert all(map(is_plain_path, ["a", "a/b.c", ".zarray", "a/..b", "ü/lease-1"]))
    assert not any(
        map(is_plain_path, ["", ".", "..", "/a", "a/../b", "a//b", "./a", "a/", "a\0b", "caf\udce9", None, 3])
    )
