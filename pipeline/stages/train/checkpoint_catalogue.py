"""The checkpoint catalogue: only complete, unaltered checkpoints are ever loaded.

Layout below `scratch/checkpoints`: one directory per checkpoint, `step-00000100/`, with the files of all ranks, and a
`manifest.json` that appears by atomic rename after every rank's files are written, hashed and on disk. A directory
without a manifest does not exist for a restart; one whose files do not match it is moved to `quarantine/`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polytrope.pipeline.support.files import hash_descriptor, replace_json, sync_directory

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its directory, step and what the manifest says beyond the files."""

    path: Path
    step: int
    details: dict[str, Any]


def checkpoint_directory(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def hash_on_disk(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, after an fsync: what is in the manifest is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        return {"bytes": os.fstat(descriptor).st_size, "sha256": hash_descriptor(descriptor)}
    finally:
        os.close(descriptor)


def files_below(directory: Path) -> list[str]:
    """Relative paths of all files, sorted, without the manifest."""
    return sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST
    )


def write_hashes(directory: Path, rank: int, files: dict[str, dict[str, Any]]) -> None:
    """Tell rank 0 that this rank's files are on disk, where no collective can (a thread writes them)."""
    replace_json(directory / f"hashes-{rank}.json", files, durable=False)


def gather_hashes(directory: Path, workers: int, timeout: float) -> list[dict[str, dict[str, Any]]]:
    """What all ranks told by `write_hashes`, once they all have.

    Raises:
        RuntimeError: a rank did not within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    gathered = []
    for rank in range(workers):
        path = directory / f"hashes-{rank}.json"
        while not path.exists():
            if time.monotonic() > deadline:
                raise RuntimeError(f"timed out: worker {rank} did not write its part of {directory.name}")
            time.sleep(0.01)
        gathered.append(json.loads(path.read_text(encoding="utf-8")))
        path.unlink()
    return gathered


def commit(directory: Path, step: int, files: dict[str, dict[str, Any]], details: dict[str, Any]) -> None:
    """Make the checkpoint exist, also after a power cut: its manifest is what counts, written last."""
    content = {"format": FORMAT, "step": step, "files": dict(sorted(files.items())), **details}
    replace_json(directory / MANIFEST, content)
    sync_directory(directory.parent)


def newest_valid(root: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose every file is as its manifest says; bad ones are moved to `quarantine/`.

    Args:
        root: the directory of checkpoints.
        report: told one line per quarantined or unfinished checkpoint.
    """
    for directory in sorted(root.glob("step-*"), reverse=True):
        if not (directory / MANIFEST).exists():
            report(f"checkpoint {directory.name} was not finished; using an older one")
            shutil.rmtree(directory, ignore_errors=True)
            continue
        try:
            content = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
            _verify(directory, content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            quarantine = root / "quarantine"
            quarantine.mkdir(exist_ok=True)
            target = quarantine / directory.name
            if target.exists():
                shutil.rmtree(target)
            directory.rename(target)
            report(f"checkpoint {directory.name} is damaged ({error}); moved to {target}, using an older one")
            continue
        return _checkpoint(directory, content)
    return None


def _checkpoint(directory: Path, content: dict[str, Any]) -> Checkpoint:
    details = {key: value for key, value in content.items() if key not in ("format", "step", "files")}
    return Checkpoint(directory, int(content["step"]), details)


def _verify(directory: Path, content: dict[str, Any]) -> None:
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']!r}")
    for name in files_below(directory):  # DeepSpeed loads the files that it finds
        if name.endswith(".pt") and name not in content["files"]:
            raise ValueError(f"{name} is not in its manifest")
    for name, expected in content["files"].items():
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise ValueError(f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}")
        if hash_on_disk(path)["sha256"] != expected["sha256"]:
            raise ValueError(f"{name} was altered")


def prune(root: Path, keep: int) -> list[Checkpoint]:
    """Delete all but the `keep` newest committed checkpoints; returns those."""
    committed = sorted(path for path in root.glob("step-*") if (path / MANIFEST).exists())
    for path in committed[: max(0, len(committed) - keep)]:
        # The manifest goes first: a kill in between leaves an unfinished directory, never a wrong one.
        (path / MANIFEST).unlink()
        shutil.rmtree(path, ignore_errors=True)
    return [_checkpoint(path, json.loads((path / MANIFEST).read_text(encoding="utf-8"))) for path in committed[-keep:]]
