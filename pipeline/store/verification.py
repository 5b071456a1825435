"""Whether files on this machine are those of a manifest, without hashing again what was not touched.

A cache file holds a row (path, size, mtime, inode, sha256) for every file as it was when it was hashed.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.store.manifest import FileEntry, StoredArtifact, is_executable, scan
from polytrope.pipeline.support.files import hash_file, replace_file


def find_problems(artifact: StoredArtifact, files: Path, cache: Path, *, full: bool) -> list[str]:
    """What differs between an artifact and the files below `files`, a line per file; [] if nothing does.

    Args:
        artifact: what should be there.
        files: where it should be.
        cache: of its digests; it is brought up to date.
        full: hash every file, also those whose size, time and inode did not change since they were hashed last.
    """
    try:
        found = scan(files)
    except UserError as error:
        return [str(error)]
    except (FileNotFoundError, NotADirectoryError):
        return ["its files are missing"]
    known = {} if full else _read(cache)
    problems, changed = [], False
    expected = {entry["path"]: entry for entry in artifact.files}
    for name in sorted(found.keys() - expected.keys()):
        problems.append(f"{name}: is not in the manifest")
    for name, entry in expected.items():
        status = found.get(name)
        if status is None:
            problems.append(f"{name}: is missing")
        elif status.st_size != entry["size"]:
            problems.append(f"{name}: has {status.st_size} bytes instead of {entry['size']}")
        elif is_executable(status) != entry.get("executable", False):
            problems.append(f"{name}: can{' no longer' if entry.get('executable') else ' now'} be executed")
        elif known.get(name) != (status.st_size, status.st_mtime_ns, status.st_ino, entry["sha256"]):
            changed = True
            if hash_file(files / name) != entry["sha256"]:
                problems.append(f"{name}: its bytes have changed")
    if changed and not problems:
        entries = [
            FileEntry(name, status.st_size, expected[name]["sha256"], status.st_mtime_ns, status.st_ino)
            for name, status in found.items()
        ]
        keep_digests(cache, entries)
    return problems


def keep_digests(cache: Path, entries: list[FileEntry]) -> None:
    """Write the cache file; nothing for an artifact without files."""
    if not entries:
        return
    rows = [(entry.path, entry.size, entry.mtime_ns, entry.inode, entry.sha256) for entry in entries]
    with contextlib.suppress(OSError):  # a cache; a read-only store is hashed every time
        replace_file(cache, json.dumps(rows).encode(), durable=False)


def _read(cache: Path) -> dict[str, tuple[int, int, int, str]]:
    try:
        data = json.loads(cache.read_bytes())
        return {name: (size, mtime_ns, inode, digest) for name, size, mtime_ns, inode, digest in data}
    except (OSError, ValueError, TypeError):
        return {}
