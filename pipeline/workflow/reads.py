"""Data files that a stage declares (`reads:` in a workflow file, `@stage(reads=…)`): their content is in its key."""

from __future__ import annotations

import functools
import glob
import os
from collections.abc import Iterable
from pathlib import Path

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.support.files import hash_file
from polytrope.pipeline.support.text import is_unicode


def read_digests(patterns: Iterable[str], directory: Path, prefix: str = "") -> dict[str, str]:
    """Path (as written, or below a directory or glob) → sha256 of each file.

    Args:
        patterns: files, directories (all files below) and globs (`**` for any depth), relative to `directory`.
        directory: where they start.
        prefix: of the names in the result.

    Raises:
        UserError: no such file, or one that cannot be read.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        paths = sorted(_paths(pattern, directory))
        if not paths:
            raise UserError(f"reads: there is no file `{pattern}` in {directory}")
        for path in paths:
            found[f"{prefix}{_name(path, pattern, directory)}"] = _digest(path)
    return dict(sorted(found.items()))


def _paths(pattern: str, directory: Path) -> set[Path]:
    written = directory / pattern
    named = [written] if written.exists() else map(Path, glob.iglob(str(written), recursive=True, include_hidden=True))
    files: set[Path] = set()
    for path in named:
        if path.is_dir():
            files.update(Path(root, name) for root, _, names in os.walk(path, followlinks=True) for name in names)
        else:
            files.add(path)
    return files


def _name(path: Path, pattern: str, directory: Path) -> str:
    name = (path if os.path.isabs(pattern) else path.relative_to(directory)).as_posix()
    if not is_unicode(name):
        raise UserError(f"reads: the name {name!r} is not valid UTF-8", "rename the file")
    return name


def _digest(path: Path) -> str:
    try:
        status = path.stat()
        return _hash(str(path), (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino))
    except OSError as error:
        raise UserError(f"reads: {path} cannot be read: {error.strerror or error}") from None


@functools.lru_cache(maxsize=65536)
def _hash(path: str, _mark: tuple[int, ...]) -> str:
    return hash_file(Path(path))
