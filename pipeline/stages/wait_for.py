"""The `wait_for` stage: wait until a file appears, then commit it, so that the event has happened once and for all.

approval:
  uses: wait_for
  with: {path: inbox/approved.json}
  resources: {cpus: 0}
  timeout: 2d
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from polytrope.pipeline.stage import StageContext, stage


class WaitForParameters(BaseModel):
    """What to wait for. How long at most: the stage's `timeout:`."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(description="a file or directory; relative to the workflow file")
    keep_content: bool = Field(True, description="copy the content into the artifact, not only its hash")
    interval: float = Field(1.0, gt=0, description="seconds between two looks")


@stage(cpu_only=True)
def wait_for(context: StageContext, parameters: WaitForParameters) -> dict[str, float]:
    """Wait until a file or directory appears and no longer changes, then keep its content and hash."""
    path = Path(parameters.path)
    context.message(f"waits for {path}")
    before: list[tuple[str, int, int]] | None = None
    while True:
        current = _snapshot(path)
        if current is not None and current == before:  # unchanged between two looks: not being written any more
            break
        before = current
        time.sleep(parameters.interval)
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    entries = []
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        data = file.read_bytes()
        entries.append({"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
        if parameters.keep_content:
            target = context.output / "content" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    (context.output / "event.json").write_text(
        json.dumps({"path": parameters.path, "files": entries}, indent=1), encoding="utf-8"
    )
    return {"files": len(entries), "bytes": sum(int(str(entry["bytes"])) for entry in entries)}


def _snapshot(path: Path) -> list[tuple[str, int, int]] | None:
    """(name, size, mtime) of all files, None if there is nothing yet."""
    try:
        items = [path] if path.is_file() else sorted(path.rglob("*"))
        found = [(str(item), item.stat().st_size, item.stat().st_mtime_ns) for item in items if item.is_file()]
    except FileNotFoundError:
        return None
    return found if path.exists() else None
