"""The record of everything beside the parameters that can make a result differ: code, packages, machine, command."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_DIFF_LIMIT = 200_000  # characters of `git diff` kept; its hash covers all of it
_ABSENT = "(none)"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def record_environment(directory: Path | None = None, *, keep_diff: bool = False) -> dict[str, Any]:
    """Git state of `directory`, package versions, interpreter, processor, thread variables and command line.

    Args:
        keep_diff: see `git_state`.
    """
    return {
        "git": git_state(directory or Path.cwd(), keep_diff=keep_diff),
        "packages": package_versions(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": processor(),
        "cpu_count": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "host": platform.node(),
        "threads": {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
        "argv": sys.argv,
    }


def compare_environments(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What of two records can make results differ, a line each; what most often does comes first."""
    lines: list[str] = []

    def compare(name: str, old: Any, new: Any) -> None:
        if old != new:
            lines.append(f"{name}: {_ABSENT if old is None else old} → {_ABSENT if new is None else new}")

    for title, field in (("package", "packages"), ("threads", "threads")):
        old, new = before.get(field) or {}, after.get(field) or {}
        for name in sorted({*old, *new}):
            compare(f"{title} {name}", old.get(name), new.get(name))
    for field in ("python", "usable_cores", "processor", "platform"):
        if field in before:  # records of older versions lack some
            compare(field.replace("_", " "), before[field], after.get(field))
    old, new = before.get("git") or {}, after.get("git") or {}
    if old.get("commit") != new.get("commit"):
        compare("git commit", str(old.get("commit"))[:10], str(new.get("commit"))[:10])
    elif None in (old.get("diff_sha256", ""), new.get("diff_sha256", "")):
        lines.append("git: whether there were other uncommitted changes is not known")
    elif old.get("diff_sha256") != new.get("diff_sha256"):
        lines.append("git: other uncommitted changes")
    return lines


def changed_versions(directory: Path) -> list[str]:
    """Packages and Python that are others than in the attempt before, a line each; [] at the first attempt.

    Args:
        directory: of the run; it holds the record of this attempt and those of the earlier ones.
    """
    earlier = sorted(directory.glob("workflow.*.json"), key=lambda path: int(path.suffixes[0][1:]))
    if not earlier:
        return []
    before, now = (
        {name: record.get(name) for name in ("packages", "python")}
        for record in (
            json.loads(path.read_bytes()).get("environment") or {}
            for path in (earlier[-1], directory / "workflow.json")
        )
    )
    return compare_environments(before, now) if before["packages"] and now["packages"] else []


def git_state(directory: Path, *, keep_diff: bool = False) -> dict[str, Any]:
    """Commit, whether the tree differs from it, in which files, and the difference's hash; {} without a repository.

    What git does not tell within 10 s is None: unknown, not unchanged.

    Args:
        keep_diff: keep the difference itself as well. It may hold what nobody wants to publish: keys in settings.
    """
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return {}
    diff = _git(directory, "diff", "HEAD")
    status = _git(directory, "status", "--porcelain")
    return {
        "commit": commit.strip(),
        "dirty": None if status is None else bool(status.strip()),
        "status": None if status is None else status[:_DIFF_LIMIT],
        "diff": (diff or "")[:_DIFF_LIMIT] if keep_diff else "",
        "diff_sha256": None if diff is None else hashlib.sha256(diff.encode(errors="surrogateescape")).hexdigest(),
    }


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    # names and content of files need not be UTF-8; what is kept must be text that every reader takes
    return result.stdout.decode(errors="backslashreplace") if result.returncode == 0 else None


def package_versions() -> dict[str, str]:
    """Name → version of every installed distribution, sorted by name."""
    versions = {item.name: item.version for item in importlib.metadata.distributions() if item.name}
    return dict(sorted(versions.items(), key=lambda pair: pair[0].lower()))


def processor() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor()
    return platform.processor()
