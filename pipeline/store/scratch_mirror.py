"""The scratch directory of a stage in a bucket: the mirror of what its newest attempt has on its machine.

An attempt leaves a mark of its own, here and in the bucket, before it changes anything. Where both are the same, the
directory here is that of the newest attempt, and further than the bucket; everywhere else the bucket is the truth.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from polytrope.pipeline.store.bucket import Bucket
from polytrope.pipeline.support.files import remove_tree, replace_file, unique_name

INTERVAL = 20.0  # seconds between two uploads of what changed
_MARK = ".attempt"


class ScratchMirror:
    """`scratch/KEY` of a bucket and the directory `here`; `mark`: a file beside it, of this machine."""

    def __init__(self, bucket: Bucket, key: str, here: Path, mark: Path) -> None:
        self.bucket, self.name, self.here, self.mark = bucket, f"scratch/{key}", here, mark
        self._sent: dict[
            str, tuple[int, int] | None
        ] = {}  # relative name → (size, time); None: in the bucket, as it is

    def exists(self) -> bool:
        return self.here.exists() or bool(self.bucket.children(self.name))

    def remove(self) -> None:
        """On both sides."""
        remove_tree(self.here)
        self.mark.unlink(missing_ok=True)
        self.bucket.remove(self.name)

    def pull(self) -> None:
        """Begin an attempt: with what the newest one left, wherever that was."""
        there = self.bucket.list(self.name)
        mark = self.bucket.get(f"{self.name}/{_MARK}")
        there.pop(f"{self.name}/{_MARK}", None)
        if mark is None or not self.mark.exists() or self.mark.read_bytes() != mark:
            remove_tree(self.here)
            self.mark.unlink(missing_ok=True)
            self.bucket.fetch([(name, self.here / name.removeprefix(f"{self.name}/")) for name in there])
            self._sent = {name: status for name in self._files() if (status := self._status(name)) is not None}
        else:
            self._sent = dict.fromkeys(name.removeprefix(f"{self.name}/") for name in there)
        own = unique_name().encode()
        self.mark.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.mark, own, durable=False)
        self.bucket.put(f"{self.name}/{_MARK}", own)

    def push(self) -> None:
        """Send what changed, then remove what is gone here: at any time one of them is whole there."""
        statuses = {name: self._status(name) for name in self._files()}
        for name, status in statuses.items():
            if status is not None and self._sent.get(name) != status:
                with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                    self.bucket.send([(self.here / name, f"{self.name}/{name}")])
                    self._sent[name] = status
        gone = [name for name in self._sent if self._status(name) is None]
        self.bucket.delete(f"{self.name}/{name}" for name in gone)
        for name in gone:
            del self._sent[name]

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """While a stage runs: from time to time, and once more if it fails."""
        self.pull()
        ended = threading.Event()

        def send() -> None:
            while not ended.wait(INTERVAL):
                with contextlib.suppress(OSError):  # the server is away: everything goes with the next one
                    self.push()

        thread = threading.Thread(target=send, name="polytrope-scratch", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            ended.set()
            thread.join()
            with contextlib.suppress(OSError):
                self.push()
            raise
        finally:
            ended.set()

    def _files(self) -> list[str]:
        return [path.relative_to(self.here).as_posix() for path in self.here.rglob("*") if path.is_file()]

    def _status(self, name: str) -> tuple[int, int] | None:
        try:
            status = (self.here / name).stat()
        except FileNotFoundError:
            return None
        return status.st_size, status.st_mtime_ns
