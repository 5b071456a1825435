"""Reads what stages said (`EventWriter`'s files) while they say it: for the progress display and for MLflow."""

from __future__ import annotations

import contextlib
import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from polytrope.pipeline.runs.journal import fold, read
from polytrope.pipeline.stage import NOTES
from polytrope.pipeline.support.files import safe_name


def read_notes(directory: Path, stage: str) -> list[tuple[str, str]]:
    """(attempt and line, text) of what all attempts at `stage` noted so far (`StageContext.note`), in order.

    Args:
        directory: the run's `spool` directory.
    """
    paths = [path for path in (directory / safe_name(stage)).glob(f"*/{NOTES}") if path.parent.name.isdigit()]
    notes = []
    for path in sorted(paths, key=lambda path: int(path.parent.name)):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1]):  # one that is being written waits
            with contextlib.suppress(ValueError):  # torn by a crash or a full disk
                notes.append((f"{path.parent.name}.{number}", str(json.loads(line))))
    return notes


class SpoolEvent(NamedTuple):
    """One event of one attempt at a stage. `event` holds `kind`, `time` and what belongs to the kind."""

    stage: str
    attempt: int
    event: dict[str, Any]


class SpoolReader:
    """Follows `runs/<id>/spool/<stage>/<attempt>/*.jsonl`.

    Args:
        directory: the run's `spool` directory; it need not exist yet.
        offsets: bytes already read of each file, by path relative to `directory` (a cursor saved earlier). Changed in
            place by `read_new`.
        stage: only what this one said; None: all.
        tail: of each file that is new, read about so many bytes at its end; None: all.
    """

    def __init__(
        self,
        directory: Path,
        offsets: dict[str, int] | None = None,
        stage: str | None = None,
        tail: int | None = None,
    ) -> None:
        self.directory = Path(directory)
        self._pattern = f"{'*' if stage is None else glob.escape(safe_name(stage))}/*/*.jsonl"
        self.offsets = {} if offsets is None else offsets
        self._tail = tail
        self._names = {} if stage is None else {safe_name(stage): stage}

    def read_new(self) -> Iterator[SpoolEvent]:
        """Every whole line that is new, each file in its own order, attempts in ascending order."""
        paths = [path for path in self.directory.glob(self._pattern) if path.parent.name.isdigit()]
        for path in sorted(paths, key=lambda path: (path.parts[-3], int(path.parts[-2]), path.name)):
            name = str(path.relative_to(self.directory))
            size = path.stat().st_size
            offset = self.offsets.get(name, 0 if self._tail is None else max(0, size - self._tail))
            if size <= offset:
                continue
            with path.open("rb") as file:
                file.seek(offset)
                content = file.read()
            end = content.rfind(b"\n") + 1  # a line that is being written waits for the next look
            for line in content[:end].splitlines():
                event = _decode(line)
                if event is not None:
                    yield SpoolEvent(self._stage(path.parts[-3]), int(path.parts[-2]), event)
            self.offsets[name] = offset + end

    def _stage(self, directory: str) -> str:
        """The stage whose events are in `directory`: the journal knows the names."""
        if directory not in self._names:
            self._names = {safe_name(name): name for name in fold(read(self.directory.parent)).stages}
        return self._names.get(directory, directory)


def _decode(line: bytes) -> dict[str, Any] | None:
    """A line that a killed process left torn, or that a tail begins in, is no event."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "kind" in event else None
