"""A store in a directory that this machine can reach: what is written is flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.lease import LeaseDirectory
from polytrope.pipeline.store.backend import ObjectInfo
from polytrope.pipeline.support.files import create_file, remove_tree, rename, replace_file, unique_name

FOLDERS = ("artifacts", "staging", "scratch", "leases", "quarantine", "digests", "runs")
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)


class Directory:
    """A backend, see `polytrope.pipeline.store.backend`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def address(self) -> str:
        return str(self.root)

    def prepare(self) -> None:
        make_folders(self.root)
        with tempfile.NamedTemporaryFile(dir=self.root / "staging", prefix="probe.") as probe:
            probe.write(b"x" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
            self._check_links(Path(probe.name))

    def _check_links(self, probe: Path) -> None:
        link = probe.with_name(f"{probe.name}.link")
        try:
            os.link(probe, link)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            raise UserError(
                f"the store {self.root} cannot be used: its file system has no hard links, by which leases are taken",
                "use a place on another file system: `store:` in the workflow file or `--set store=DIRECTORY`",
            ) from error
        link.unlink()

    def put(self, name: str, data: bytes, *, absent: bool = False) -> bool:
        path = self.root / name
        if path.parent != self.root:
            path.parent.mkdir(exist_ok=True)
        if absent:
            return create_file(path, data)
        replace_file(path, data)
        return True

    def get(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def children(self, name: str) -> list[str]:
        try:
            return sorted(os.listdir(self.root / name))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def list(self, name: str) -> dict[str, ObjectInfo]:
        found = {}
        for current, _, files in os.walk(self.root / name):
            for file in files:
                path = Path(current, file)
                status = path.lstat()
                tag = f"{status.st_mtime_ns}-{status.st_ino}"
                found[path.relative_to(self.root).as_posix()] = ObjectInfo(status.st_size, tag, status.st_mtime)
        return dict(sorted(found.items()))

    def publish(self, directory: Path, name: str, head: str, data: bytes) -> bool:  # noqa: ARG002
        """By one rename; `head` was written, and flushed, where the stage ran."""
        try:
            rename(directory, self.root / name)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            return False
        return True

    def withdraw(self, name: str, target: str, head: str) -> bool:  # noqa: ARG002
        try:
            _make_movable(self.root / name)
            rename(self.root / name, self.root / target)
        except FileNotFoundError:
            return False
        return True

    def remove(self, name: str) -> None:
        """A half-deleted artifact is never seen: it goes to `trash/` by one rename."""
        path = self.root / name
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return
        trash = self.root / "trash"
        trash.mkdir(exist_ok=True)
        target = trash / unique_name()
        _make_movable(path)
        rename(path, target)
        remove_tree(target)

    def place(self, name: str) -> LeaseDirectory:
        return LeaseDirectory(self.root / name)


def make_folders(root: Path) -> None:
    """The directories of a store, or of this machine's copies of one."""
    for name in FOLDERS:
        (root / name).mkdir(parents=True, exist_ok=True)


def _make_movable(path: Path) -> None:
    """A directory that may not be written may not be moved to another one either."""
    mode = path.stat().st_mode
    if not mode & stat.S_IWUSR:
        path.chmod(stat.S_IMODE(mode) | stat.S_IRWXU)
