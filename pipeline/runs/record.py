"""The status of a run as it really is: what the journal says last, and whether its driver is still alive."""

from __future__ import annotations

from pathlib import Path

from polytrope.pipeline.runs.journal import fold, read
from polytrope.pipeline.runs.lease import is_held


def run_status(directory: Path) -> str:
    """pending, running, succeeded, failed, cancelled, or interrupted: its driver is gone without having finished."""
    status = fold(read(directory)).status
    if status in ("pending", "running") and not is_held(directory):
        return "interrupted"
    return status
