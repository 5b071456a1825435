"""sha256 of files' contents, remembered by path, size, time and inode: a plan does not read again what it has read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.support.files import hash_file, replace_json

CACHE_VARIABLE = "XDG_CACHE_HOME"
_SETTLED = 2.0  # seconds: a file changed so shortly before it was hashed may change again without another time
_THREADS = 8


def file_digests(paths: Sequence[Path], *, field: str) -> list[str]:
    """sha256 (hex) of the content of each file, in order.

    What was hashed before is remembered in the user's cache directory as long as path, size, modification time and
    inode are the same; files that changed a moment ago are always read.

    Args:
        paths: files.
        field: of the workflow file, for the error.

    Raises:
        UserError: a file cannot be read.
    """
    remembered = _remembered(paths)
    known = _load(remembered)
    now = time.time()
    marks: dict[str, list[int]] = {}
    digests: dict[str, str] = {}
    missing: list[Path] = []
    for path in paths:
        name = os.path.abspath(path)
        try:
            status = os.stat(path)
        except OSError as error:
            raise _unreadable(path, field, error) from error
        marks[name] = [status.st_size, status.st_mtime_ns, status.st_ino]
        entry = known.get(name)
        if entry is not None and entry[0] == marks[name]:
            digests[name] = entry[1]
        else:
            missing.append(path)
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing frees the interpreter lock
        for path, digest in zip(missing, pool.map(_hash_or_error, missing), strict=True):
            if isinstance(digest, OSError):
                raise _unreadable(path, field, digest) from digest
            digests[os.path.abspath(path)] = digest
    settled = {name: (mark, digests[name]) for name, mark in marks.items() if mark[1] / 1e9 < now - _SETTLED}
    if missing and settled:
        with contextlib.suppress(OSError):  # nothing depends on it but time
            remembered.parent.mkdir(parents=True, exist_ok=True)
            replace_json(remembered, settled, durable=False)
    return [digests[os.path.abspath(path)] for path in paths]


def combined_digest(names: Sequence[str], digests: Sequence[str]) -> str:
    """sha256 (hex) over pairs of a name and a content's digest."""
    total = hashlib.sha256()
    for name, digest in zip(names, digests, strict=True):
        total.update(json.dumps([name, digest]).encode() + b"\n")
    return total.hexdigest()


def _hash_or_error(path: Path) -> str | OSError:
    try:
        return hash_file(path)
    except OSError as error:
        return error


def _unreadable(path: Path, field: str, error: OSError) -> UserError:
    return UserError(f"{field}: cannot read {path}: {error.strerror or error}", "mend it or leave it out")


def _remembered(paths: Sequence[Path]) -> Path:
    """One file for each set of names, so that two data sets do not push each other out."""
    names = "\0".join(sorted(os.path.abspath(path) for path in paths))
    base = os.environ.get(CACHE_VARIABLE) or os.path.join(os.path.expanduser("~"), ".cache")
    name = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:32]
    return Path(base) / "polytrope" / "file-digests" / f"{name}.json"


def _load(path: Path) -> dict[str, tuple[list[int], str]]:
    try:
        content = json.loads(path.read_bytes())
        return {name: (list(map(int, mark)), str(digest)) for name, (mark, digest) in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
