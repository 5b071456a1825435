"""What an artifact is: its files with their hashes, its manifest, and how both are read and sealed."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.support.files import (
    hash_file,
    sync_directory,
    sync_file,
)

FORMAT = 1


MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact. `path` is relative, with `/`; `mtime_ns` and `inode` show whether it was touched."""

    path: str
    size: int
    sha256: str
    mtime_ns: int
    inode: int


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
    files: tuple[dict[str, Any], ...] = ()  # {"path", "size", "sha256"} in the order of their paths
    location: str = ""  # in an object store: below which name its files are

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry["size"] for entry in self.files)


def artifact_digest(files: Iterable[Mapping[str, Any]]) -> str:
    """sha256 over (path, size, sha256) of all files: equal digests mean equal bytes."""
    digest = hashlib.sha256()
    for entry in files:
        digest.update(f"{entry['path']}\0{entry['size']}\0{entry['sha256']}\n".encode())
    return digest.hexdigest()


def scan(directory: Path) -> dict[str, os.stat_result]:
    """Relative path → stat of every file below `directory`, sorted.

    Raises:
        UserError: a symbolic link or a special file: an artifact must hold its own bytes.
    """
    found: dict[str, os.stat_result] = {}

    def walk(current: str, prefix: str) -> None:
        with os.scandir(current) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    walk(entry.path, f"{prefix}{entry.name}/")
                elif entry.is_file(follow_symlinks=False):
                    found[prefix + entry.name] = entry.stat(follow_symlinks=False)
                else:
                    raise UserError(
                        f"the stage's output holds `{prefix}{entry.name}`, which is not a plain file",
                        "copy the file's content below context.output instead of linking to it",
                    )

    walk(str(directory), "")
    return dict(sorted(found.items()))


def seal(directory: Path) -> list[FileEntry]:
    """Hash every file below `directory`, make it read-only, and flush all to the disk. Runs where the stage ran."""
    entries = []
    for name in scan(directory):
        path = directory / name
        digest = hash_file(path)
        os.chmod(path, stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH)
        sync_file(path)
        status = path.stat()
        entries.append(FileEntry(name, status.st_size, digest, status.st_mtime_ns, status.st_ino))
    for current, directories, files in os.walk(directory, topdown=False):
        if directories or files:
            sync_directory(Path(current))
    return entries


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
    files = [{"path": entry.path, "size": entry.size, "sha256": entry.sha256} for entry in entries]
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "key": key,
        "digest": artifact_digest(files),
        "stage": stage,
        "run_id": run_id,
        "duration": duration,
        "committed": time.time(),
        "summary": dict(summary),
        "components": dict(components),
        "files": files,
    }
    if location:
        manifest["location"] = location
    manifest["checksum"] = _checksum(manifest)
    return json.dumps(manifest, indent=1, ensure_ascii=False).encode()


def move_manifest(data: bytes, location: str) -> bytes:
    """The same manifest for files at another place of an object store."""
    content = {name: value for name, value in json.loads(data).items() if name != "checksum"}
    content["location"] = location
    content["checksum"] = _checksum(content)
    return json.dumps(content, indent=1, ensure_ascii=False).encode()


def parse_manifest(data: bytes, key: str) -> StoredArtifact | None:
    """What a manifest describes; None if it is damaged or of another key."""
    try:
        content = json.loads(data)
        if content["checksum"] != _checksum(content) or content["key"] != key:
            return None
        return StoredArtifact(
            key=key,
            digest=content["digest"],
            components=content["components"],
            summary=content["summary"],
            stage=content["stage"],
            run_id=content["run_id"],
            duration=content["duration"],
            committed=content["committed"],
            files=tuple(content["files"]),
            location=content.get("location", ""),
        )
    except (ValueError, KeyError, TypeError):
        return None


def _checksum(manifest: Mapping[str, Any]) -> str:
    content = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def file_entries(data: Iterable[Mapping[str, Any]]) -> list[FileEntry]:
    """`FileEntry` objects from their `asdict` form."""
    return [FileEntry(**entry) for entry in data]


def entry_dicts(entries: Iterable[FileEntry]) -> list[dict[str, Any]]:
    return [asdict(entry) for entry in entries]
