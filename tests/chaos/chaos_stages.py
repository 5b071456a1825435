"""The small DAG that the fault tests run: text → three parts (one of them with a checkpoint) → a join."""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from pathlib import Path
from typing import Any

from polytrope.pipeline.stage import Artifact, StageContext, Stages


def write(context: StageContext, text: str, calls: str, seconds: float = 0.0) -> dict[str, float]:
    called(calls, context)
    time.sleep(seconds)
    (context.output / "text").write_text(text)
    (context.output / "more").mkdir()
    (context.output / "more" / "bytes").write_bytes(text.encode() * 100)
    return {"length": float(len(text))}


def count(context: StageContext, source: Artifact, steps: int, calls: str, seconds: float = 0.0) -> dict[str, float]:
    """Adds up in steps, and goes on from its newest checkpoint."""
    called(calls, context)
    path = context.scratch / "step"
    done = newest_step(path)
    for step in range(done, steps):
        time.sleep(seconds / steps)
        temporary = context.scratch / f"step.{os.getpid()}"
        temporary.write_text(f"{step + 1} {zlib.crc32(str(step + 1).encode())}")
        temporary.rename(path)
    total = steps * len((source.path / "text").read_text())
    (context.output / "text").write_text(str(total))
    return {"total": float(total)}


def curve(context: StageContext, steps: int, seconds: float) -> dict[str, float]:
    """Says a point per step, goes on from its newest checkpoint, and says that one's point again."""
    path = context.scratch / "step"
    for step in range(max(0, newest_step(path) - 1), steps):
        context.log_metrics({"loss": 1 / (step + 1)}, step=step)
        time.sleep(seconds / steps)
        temporary = context.scratch / f"step.{os.getpid()}"
        temporary.write_text(f"{step + 1} {zlib.crc32(str(step + 1).encode())}")
        temporary.rename(path)
    (context.output / "text").write_text(str(steps))
    return {"steps": float(steps)}


def newest_step(path: Path) -> int:
    """What a checkpoint says, if it is what was written."""
    with contextlib.suppress(OSError, ValueError):
        text, checksum = path.read_text().split()
        if zlib.crc32(text.encode()) == int(checksum):
            return int(text)
    return 0


def join(context: StageContext, parts: dict[str, Artifact], calls: str) -> None:
    called(calls, context)
    (context.output / "text").write_text("+".join((parts[name].path / "text").read_text() for name in sorted(parts)))


def return_stages(context: StageContext, stages: dict[str, Any], calls: str) -> Stages:
    called(calls, context)
    return Stages(stages)


def called(calls: str, context: StageContext) -> None:
    with open(Path(calls), "a") as file:
        file.write(f"{context.stage}\n")
