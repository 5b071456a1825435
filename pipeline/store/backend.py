"""What a store asks of the place where it lies: a directory, or a bucket of an object store. Names are paths with `/`.

Every failure is an `OSError`: callers treat a server that is away like a broken disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from polytrope.pipeline.runs.lease import LeasePlace


@dataclass(frozen=True)
class ObjectInfo:
    """What a listing says of one object: bytes, a tag that changes with its content, and when it was written."""

    size: int
    tag: str
    modified: float = 0.0  # seconds since the epoch, by the server's clock


class Backend(Protocol):
    """A place for a store."""

    @property
    def address(self) -> str:
        """What `Store` was given, complete."""

    def prepare(self) -> None:
        """Make the place, and prove that it can be written."""

    def put(self, name: str, data: bytes, *, absent: bool = False) -> bool:
        """Write one file, whole or not at all. `absent`: only if there is none; False then if there is one."""

    def get(self, name: str) -> bytes | None:
        """The content of a file, None if there is none."""

    def children(self, name: str) -> list[str]:
        """What is directly below `name`, sorted; [] if there is no such thing."""

    def list(self, name: str) -> dict[str, ObjectInfo]:
        """Every file below `name` ("": all), by its whole name, sorted."""

    def publish(self, directory: Path, name: str, head: str, data: bytes) -> bool:
        """Let `name` begin to exist, in one step, with what was sent there before; False if it exists already.

        Args:
            directory: with all of it, `head` included, on this machine.
            name: `artifacts/KEY`, `runs/RUN`.
            head: the file of which a reader asks first whether `name` exists.
            data: its content.
        """

    def withdraw(self, name: str, target: str, head: str) -> bool:
        """Let `name` exist no more, in one step, and keep it as `target`; False if there is none."""

    def remove(self, name: str) -> None:
        """Remove a file, or everything below a name: out of sight first, then in pieces. Nothing happens if absent."""

    def place(self, name: str) -> LeasePlace:
        """Where a lease of this name is kept."""
