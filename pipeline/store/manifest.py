"""What an artifact is: its files with their hashes, its manifest, and how both are read and sealed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import signal
import stat
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.support.files import flush, hash_descriptor, unique_name
from polytrope.pipeline.support.text import is_unicode
from polytrope.pipeline.workflow.encoding import readable
from polytrope.pipeline.workflow.keys import stage_key

FORMAT = 1
MANIFEST = "manifest.json"
_KEY = re.compile(r"[0-9a-f]{64}")
_READ_ONLY = 0o444
_READ_ONLY_EXECUTABLE = 0o555
_SECOND = 1_000_000_000  # nanoseconds
_log = logging.getLogger("polytrope.store")


class OutputChangedError(RuntimeError):
    """The output of a stage is not what was hashed at the end of the stage, or changes while it is hashed."""


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact. `path` is relative, with `/`; `mtime_ns` and `inode` show whether it was touched."""

    path: str
    size: int
    sha256: str
    mtime_ns: int
    inode: int
    executable: bool = False


@dataclass(frozen=True)
class StoredArtifact:
    """A committed artifact. `duration` in seconds, `committed` in epoch seconds. For its files: `Store.materialize`."""

    key: str
    digest: str
    components: dict[str, Any]
    summary: dict[str, float]
    stage: str
    run_id: str
    duration: float
    committed: float
    files: tuple[dict[str, Any], ...] = ()  # as `file_rows` has them, in the order of their paths
    location: str = ""  # in an object store: below which name its files are

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry["size"] for entry in self.files)

    @property
    def parameters(self) -> dict[str, Any]:
        """What the stage was given, for reading: as the workflow file had it, not as the key encodes it."""
        return dict(readable(self.components.get("parameters") or {}))


def is_key(text: object) -> bool:
    """Whether this can be a stage key: 64 hexadecimal digits, and so a safe file name."""
    return isinstance(text, str) and _KEY.fullmatch(text) is not None


def is_plain_path(text: object) -> bool:
    """Whether this is a relative path in UTF-8 that stays below where it starts, written in one way only."""
    if not isinstance(text, str) or not text or "\0" in text or text.startswith("/"):
        return False
    if any("\ud800" <= character <= "\udfff" for character in text):  # stands for bytes that are not UTF-8
        return False
    return ".." not in text.split("/") and str(PurePosixPath(text)) == text != "."


def artifact_digest(files: Iterable[Mapping[str, Any]]) -> str:
    """sha256 over (path, size, sha256, whether it is executable) of all files: equal digests mean equal bytes."""
    digest = hashlib.sha256()
    for entry in files:
        mark = "\0x" if entry.get("executable") else ""
        digest.update(f"{entry['path']}\0{entry['size']}\0{entry['sha256']}{mark}\n".encode())
    return digest.hexdigest()


def file_rows(entries: Iterable[FileEntry]) -> list[dict[str, Any]]:
    """The files as a manifest lists them: path, size, sha256, and `executable` of those that are."""
    return [
        {"path": entry.path, "size": entry.size, "sha256": entry.sha256}
        | ({"executable": True} if entry.executable else {})
        for entry in entries
    ]


# -- sealing -----------------------------------------------------------------------------------------------------


def scan(directory: Path) -> dict[str, os.stat_result]:
    """Relative path → stat of every file below `directory`, sorted.

    Raises:
        UserError: `directory` is not a directory itself, or there is a link, a special file, or a name that is not
            UTF-8 below it: an artifact must hold its own bytes, under names that every store can keep.
    """
    return _walk(directory)[0]


def _walk(directory: Path) -> tuple[dict[str, os.stat_result], list[str]]:
    """Files as `scan` returns them, and the directories below, parents first."""
    itself = os.lstat(directory)
    if not stat.S_ISDIR(itself.st_mode):
        raise UserError(
            "the directory of the stage's output was replaced by "
            + ("a symbolic link" if stat.S_ISLNK(itself.st_mode) else "a file"),
            "copy the files into context.output instead of linking to them",
        )
    found: dict[str, os.stat_result] = {}
    directories: list[str] = []

    def walk(current: str, prefix: str) -> None:
        with os.scandir(current) as entries:
            for entry in entries:
                name = prefix + entry.name
                if not is_unicode(name):
                    raise UserError(
                        f"the stage's output holds {os.fsencode(name)!r}, whose name is not UTF-8",
                        "rename it: object stores and JSON keep names in UTF-8 only",
                    )
                if entry.is_dir(follow_symlinks=False):
                    directories.append(name)
                    walk(entry.path, f"{name}/")
                elif entry.is_file(follow_symlinks=False):
                    found[name] = entry.stat(follow_symlinks=False)
                else:
                    raise UserError(
                        f"the stage's output holds `{name}`, which is not a plain file",
                        "copy the file's content below context.output instead of linking to it",
                    )

    walk(str(directory), "")
    return dict(sorted(found.items())), directories


def seal(directory: Path) -> list[FileEntry]:
    """Hash every file below `directory`, make all of it read-only, and flush it to the disk. Runs where the stage ran.

    Afterwards no file shares its bytes with another name, and nobody can write to one without changing what `FileEntry`
    says of it. A file with further names (hard links), or open for writing yet, is replaced by a copy: the other names
    keep their permissions, and what is written through the open descriptor from now on goes nowhere. Empty directories
    are removed: not every store could keep them.

    Raises:
        UserError: see `scan`.
        OutputChangedError: somebody writes to a file while it is hashed.
    """
    try:
        found, directories = _walk(directory)
    except FileNotFoundError:
        raise UserError(
            "the directory of the stage's output is gone", "write below context.output, and let it stay"
        ) from None
    kept = {str(parent) for name in found for parent in PurePosixPath(name).parents}
    for name in ["", *directories]:
        _make_writable(directory / name)
    entries = [_seal_file(directory / name, name, status) for name, status in found.items()]
    for name in reversed(directories):
        if name in kept:
            _seal_directory(directory / name, durable=True)
        else:
            _log.warning("the empty directory `%s` is left out of the result", name)
            os.rmdir(directory / name)
    _seal_directory(directory, durable=bool(found))
    return entries


def check_sealed(directory: Path, entries: Iterable[FileEntry]) -> None:
    """What `seal` returned must still be true of every file, and there must be no other.

    Raises:
        OutputChangedError: names the files.
    """
    try:
        found = {name: _state(status) for name, status in scan(directory).items()}
    except FileNotFoundError:
        raise OutputChangedError("files went away between the stage's end and its commit") from None
    expected = {entry.path: (entry.size, entry.mtime_ns, entry.inode, entry.executable) for entry in entries}
    if found != expected:
        names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise OutputChangedError(f"files changed between the stage's end and its commit: {', '.join(names[:5])}")


def make_read_only(directory: Path, files: Iterable[Mapping[str, Any]]) -> None:
    """Permissions of an artifact's files and directories that came from elsewhere; `files` as `file_rows` has them."""
    for row in files:
        os.chmod(directory / row["path"], _READ_ONLY_EXECUTABLE if row.get("executable") else _READ_ONLY)
    for name in ["", *_walk(directory)[1]]:
        os.chmod(directory / name, _READ_ONLY_EXECUTABLE)


def is_executable(status: os.stat_result) -> bool:
    return bool(status.st_mode & stat.S_IXUSR)


def _state(status: os.stat_result) -> tuple[int, int, int, bool]:
    """What tells that a file was touched."""
    return status.st_size, status.st_mtime_ns, status.st_ino, is_executable(status)


def _seal_file(path: Path, name: str, seen: os.stat_result) -> FileEntry:
    descriptor = _open(path, name)
    try:
        status = os.fstat(descriptor)
        _unchanged(name, seen, status)
        written = _is_open_for_writing(descriptor, path.parent)
        if status.st_nlink > 1 or written:
            if written:
                _log.warning("`%s` is still open for writing; its bytes as they are now are the result", name)
            _replace_by_copy(descriptor, path)
            _unchanged(name, status, os.fstat(descriptor))
            os.close(descriptor)
            descriptor = _open(path, name)
        os.fchmod(descriptor, _READ_ONLY_EXECUTABLE if is_executable(status) else _READ_ONLY)
        flush(descriptor)  # also makes the next store into a mapped page change the time again
        # The clock of a file system ticks every few milliseconds: a write right after the hash could leave the time
        # that was recorded. No later write can leave one that is a second old.
        moment = os.fstat(descriptor).st_mtime_ns - _SECOND
        os.utime(descriptor, ns=(moment, moment))
        before = os.fstat(descriptor)
        digest = hash_descriptor(descriptor)
        _unchanged(name, before, os.fstat(descriptor))
        return FileEntry(name, before.st_size, digest, before.st_mtime_ns, before.st_ino, is_executable(before))
    finally:
        os.close(descriptor)


def _open(path: Path, name: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise _changed(name) from None
        raise


def _unchanged(name: str, before: os.stat_result, after: os.stat_result) -> None:
    if before.st_dev != after.st_dev or _state(before) != _state(after):
        raise _changed(name)


def _changed(name: str) -> OutputChangedError:
    return OutputChangedError(f"`{name}` changed after the stage had ended: a thread or process of it still writes")


def _is_open_for_writing(descriptor: int, directory: Path) -> bool:
    """Whether a writable descriptor or mapping of this file is open anywhere; False where the kernel cannot tell."""
    if _lease_refused(descriptor):  # so do network file systems, whatever is open
        with tempfile.NamedTemporaryFile(dir=directory) as probe:
            probe.file.close()
            closed = os.open(probe.name, os.O_RDONLY)
            try:
                return not _lease_refused(closed)
            finally:
                os.close(closed)
    return False


def _lease_refused(descriptor: int) -> bool:
    """Linux grants a read lease on a file that nobody can write; it is given back at once."""
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)  # not SIGIO, which would end the process
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def _replace_by_copy(descriptor: int, path: Path) -> None:
    """Put a file of its own in place of the one that is open."""
    temporary = path.with_name(f".{unique_name()}")
    try:
        with open(temporary, "xb") as target, open(descriptor, "rb", buffering=0, closefd=False) as source:
            while block := source.read(1 << 20):
                target.write(block)
            os.fchmod(target.fileno(), stat.S_IMODE(os.fstat(descriptor).st_mode))
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _open_directory(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise _changed(path.name) from None
        raise


def _make_writable(path: Path) -> None:
    """A directory copied from an artifact is read-only, and files in it may have to be replaced."""
    descriptor = _open_directory(path)
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        if mode & stat.S_IRWXU != stat.S_IRWXU:
            os.fchmod(descriptor, mode | stat.S_IRWXU)
    finally:
        os.close(descriptor)


def _seal_directory(path: Path, *, durable: bool) -> None:
    descriptor = _open_directory(path)
    try:
        os.fchmod(descriptor, _READ_ONLY_EXECUTABLE)
        if durable:
            flush(descriptor, "directory fsync")
    finally:
        os.close(descriptor)


# -- the manifest ------------------------------------------------------------------------------------------------


def build_manifest(
    key: str,
    entries: Iterable[FileEntry],
    *,
    components: Mapping[str, Any],
    summary: Mapping[str, float],
    stage: str,
    run_id: str,
    duration: float,
    location: str = "",
) -> bytes:
    """`manifest.json` of an artifact; the arguments are those of `Store.commit`."""
    files = tuple(file_rows(entries))
    digest = artifact_digest(files)
    return write_manifest(
        StoredArtifact(
            key, digest, dict(components), dict(summary), stage, run_id, duration, time.time(), files, location
        )
    )


def write_manifest(artifact: StoredArtifact) -> bytes:
    """`manifest.json` of this artifact: `parse_manifest` reads it back."""
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "key": artifact.key,
        "digest": artifact.digest,
        "stage": artifact.stage,
        "run_id": artifact.run_id,
        "duration": artifact.duration,
        "committed": artifact.committed,
        "summary": artifact.summary,
        "components": artifact.components,
        "files": list(artifact.files),
    }
    if artifact.location:
        manifest["location"] = artifact.location
    manifest["checksum"] = _checksum(manifest)
    return json.dumps(manifest, indent=1, ensure_ascii=False).encode()


def move_manifest(data: bytes, location: str) -> bytes:
    """The same manifest for files at another place of an object store."""
    content = {name: value for name, value in json.loads(data).items() if name != "checksum"}
    content["location"] = location
    content["checksum"] = _checksum(content)
    return json.dumps(content, indent=1, ensure_ascii=False).encode()


def parse_manifest(data: bytes, key: str) -> StoredArtifact | None:
    """What a manifest describes; None if it is damaged, contradicts itself or the key.

    A manifest is of `key` if its components are: `stage_key` of them gives the key. So nobody can pass the result of
    one stage off as that of another by a file's name.
    """
    try:
        content = json.loads(data)
        artifact = StoredArtifact(
            key=content["key"],
            digest=content["digest"],
            components=dict(content["components"]),
            summary={str(name): float(value) for name, value in content["summary"].items()},
            stage=str(content["stage"]),
            run_id=str(content["run_id"]),
            duration=float(content["duration"]),
            committed=float(content["committed"]),
            files=tuple(dict(row) for row in content["files"]),
            location=str(content.get("location", "")),
        )
        paths = [row["path"] for row in artifact.files]
        whole = (
            content["checksum"] == _checksum(content)
            and artifact.key == key == stage_key(artifact.components)
            and artifact.digest == artifact_digest(artifact.files)
            and all(map(is_plain_path, paths))
            and len(set(paths)) == len(paths)
        )
        return artifact if whole else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _checksum(manifest: Mapping[str, Any]) -> str:
    content = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
