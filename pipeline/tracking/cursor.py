"""How far the copy of a run in MLflow is: the run's `mlflow.json`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pydantic import BaseModel, ConfigDict, ValidationError

from polytrope.pipeline.support.files import replace_file

CURSOR_FILE = "mlflow.json"
_MOST_REFUSALS = 50  # that are kept


class Shown(BaseModel):
    """Something that a stage wants to be seen, as it said so in `event`: a file (`artifact`), a data set or a model."""

    attempt: int
    event: dict[str, Any]

    @property
    def kind(self) -> str:
        """`artifact`, `dataset` or `model`."""
        return str(self.event["kind"])

    @property
    def name(self) -> str:
        """For messages: `artifact report.html`."""
        return f"{self.kind} {self.event.get('path') or self.event.get('name')}"


class Postponed(BaseModel):
    """A file that could not be sent while everything else could; later passes try again.

    Args:
        what: for messages: `artifact report.html of train`.
        name: of a file about the run as a whole; None: it is what a stage showed.
        stage, key, cached, shown: the stage, its artifact, whether that was taken from the store, what it showed.
        reason: why it could not be sent.
    """

    what: str
    name: str | None = None
    stage: str = ""
    key: str = ""
    cached: bool = False
    shown: Shown | None = None
    reason: str = ""


class Cursor(BaseModel):
    """What has been sent of a run, and where to.

    Args:
        server: `server_name` of the tracking URI.
        experiment, parent: MLflow's ids of the experiment and of the workflow's run.
        children: stage → MLflow run.
        events: journal events that have been sent.
        closed: `events` at the time when the copy was complete.
        spool: bytes read of each spool file.
        pending: stage → what it wants to be seen, until it has committed.
        postponed: what could not be sent.
        names: MLflow run → name there → the name that a stage gave, so that two never become one.
        ended, failed: stages that have an end in MLflow, that failed.
        refused: what MLflow will never take, a line each.
    """

    model_config = ConfigDict(validate_assignment=True)

    server: str = ""
    experiment: str | None = None
    parent: str | None = None
    children: dict[str, str] = {}
    events: int = 0
    closed: int | None = None
    spool: dict[str, int] = {}
    pending: dict[str, list[Shown]] = {}
    postponed: list[Postponed] = []
    names: dict[str, dict[str, str]] = {}
    ended: list[str] = []
    failed: list[str] = []
    refused: list[str] = []

    def refuse(self, line: str) -> None:
        """Note what the server will never take, each thing once; of very many the first, and that there are more."""
        if line not in self.refused and len(self.refused) <= _MOST_REFUSALS:
            full = len(self.refused) == _MOST_REFUSALS
            self.refused.append("and more; logs/mlflow.log of the run has all" if full else line)

    @property
    def complete(self) -> bool:
        """Whether the copy was closed and nothing has come since."""
        return self.closed is not None and self.closed == self.events and not self.postponed

    def save(self, run_directory: Path) -> None:
        """Write `mlflow.json`, durably."""
        replace_file(run_directory / CURSOR_FILE, self.model_dump_json(indent=1).encode())


def server_name(uri: str) -> str:
    """Tells servers apart without keeping their passwords."""
    parsed = urlparse(uri)
    place = f"{parsed.scheme}://{parsed.netloc.rpartition('@')[2]}{parsed.path}"
    return hashlib.sha256(place.encode(errors="surrogateescape")).hexdigest()[:16]


def read_cursor(run_directory: Path, uri: str) -> Cursor:
    """What has been sent of a run to this server; an empty cursor if nothing, or if the file is of another server."""
    try:
        content = (run_directory / CURSOR_FILE).read_bytes()
        cursor = Cursor.model_validate_json(content)
    except (FileNotFoundError, ValidationError):  # of an older version: the server is asked what it has
        return Cursor(server=server_name(uri))
    return cursor if cursor.server == server_name(uri) else Cursor(server=server_name(uri))
