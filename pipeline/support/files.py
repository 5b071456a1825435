"""Durable files: written, flushed to the disk, and put in place by one rename, so that a reader never sees a half."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from polytrope.pipeline.support.faults import fault_point

_BLOCK = 1 << 20


def unique_name() -> str:
    """A name that no other process uses, on any host."""
    return f"{os.getpid()}-{secrets.token_hex(6)}"


def safe_name(name: str) -> str:
    """A stage name as a file name: `train[degree=3]` → `train[degree=3]`, with `/` and control characters replaced."""
    text = "".join(
        character if character.isprintable() and character not in '/\\:*?"<>|' else "_" for character in name
    )
    if text == name and len(text.encode()) <= 150 and not text.startswith("."):
        return text
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:12]  # different names stay different
    return f"{text.lstrip('.')[:100].encode()[:100].decode(errors='ignore')}-{digest}"


def is_disk_full(error: BaseException) -> bool:
    """Whether there was no space left, on the disk or in a quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def flush(descriptor: int, what: str = "fsync") -> None:
    """Flush an open file's content, or an open directory's names, to the disk. `what`: its name as a fault point."""
    fault_point(f"before {what}")
    os.fsync(descriptor)
    fault_point(f"after {what}")


def sync_directory(path: Path) -> None:
    """Flush the names in a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        flush(descriptor, "directory fsync")
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename and flush the directory of the new name. The target must not exist, or be a file that is replaced."""
    fault_point("before rename")
    os.rename(source, target)
    fault_point("after rename")
    sync_directory(target.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a new file and flush its content (not its name: `sync_directory`)."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_all(descriptor, data)
        flush(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """`os.write` until everything is written (a full disk can take a part)."""
    fault_point("before write")
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    fault_point("after write")


def replace_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Put `data` in place of the file at `path`: old or new, never mixed. `durable`: also after a power cut."""
    temporary = path.with_name(f".{path.name}.{unique_name()}")
    try:
        if durable:
            write_bytes(temporary, data)
            rename(temporary, path)
        else:
            temporary.write_bytes(data)
            os.rename(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def create_file(path: Path, data: bytes, *, durable: bool = True) -> bool:
    """Write a file that does not exist, whole or not at all (by `link`, atomic on NFS as well); False if it exists.

    `durable`: also after a power cut.
    """
    temporary = path.with_name(f".{path.name}.{unique_name()}")
    try:
        if durable:
            write_bytes(temporary, data)
        else:
            temporary.write_bytes(data)
        os.link(temporary, path)
        if durable:
            sync_directory(path.parent)
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return True


def replace_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """As `replace_file`, with `value` as JSON in UTF-8; lone surrogates are escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    replace_file(path, text.encode(errors="backslashreplace") + b"\n", durable=durable)


def hash_file(path: Path) -> str:
    """sha256 (hex) of a file's content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return hash_descriptor(descriptor)
    finally:
        os.close(descriptor)


def hash_descriptor(descriptor: int) -> str:
    """sha256 (hex) of an open file's content, from its beginning."""
    digest = hashlib.sha256()
    os.lseek(descriptor, 0, os.SEEK_SET)
    while block := os.read(descriptor, _BLOCK):
        digest.update(block)
    return digest.hexdigest()


def remove_tree(path: Path) -> None:
    """Remove a directory, also where its content is read-only. Nothing happens if it does not exist."""

    def make_writable(function: Callable[[str], Any], name: str, _error: Any) -> None:
        with contextlib.suppress(FileNotFoundError):
            for directory in (os.path.dirname(name), name):  # a file may have other names, which keep its permissions
                mode = os.lstat(directory).st_mode
                if stat.S_ISDIR(mode):
                    os.chmod(directory, stat.S_IMODE(mode) | stat.S_IRWXU)
            if function in (os.open, os.scandir, os.listdir):  # the directory itself could not be read
                shutil.rmtree(name, onerror=make_writable)
            else:
                function(name)

    if os.path.lexists(path):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path, onerror=make_writable)
