"""A stored result is of the inputs in its key: they must be what their manifests say until the stage has ended."""

from __future__ import annotations

import contextlib
import os

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.support.files import hash_file

Mark = tuple[int, int, int, int]  # size, times of content and of anything else (ns), inode


class InputCheck:
    """Made when the stage starts; `repeat` when it has ended. Bytes are read only of files that were touched meanwhile.

    Args:
        store, key: where the artifact is.
        label: the input's name.
        artifact: as the stage gets it.

    Raises:
        UserError: names the input, the file, and what is wrong with it.
    """

    def __init__(self, store: Store, key: str, label: str, artifact: Artifact) -> None:
        self._store, self._key, self._label, self._artifact = store, key, label, artifact
        self._before = _marks(artifact)
        stored = store.load(self._key)
        if stored is None or stored.digest != artifact.digest:
            raise self._refusal("was removed or replaced after this stage was planned", [], "resume the run")
        self._digests = {entry["path"]: entry["sha256"] for entry in stored.files}
        if store.address == str(store.local("")):  # else it has just been compared on its way to this machine
            problems = store.verify(self._key, full=False)
            if problems:
                again = f"`polytrope resume` computes `{artifact.stage}` again"
                raise self._refusal("is not what its manifest says", problems, again)

    def repeat(self) -> None:
        after = _marks(self._artifact)
        problems = []
        for name in sorted(self._before.keys() | after.keys()):
            if name not in self._digests:
                problems += [f"{name}: was added"] if name in after else []
            elif name not in after:
                problems.append(f"{name}: is gone")
            elif after[name] != self._before.get(name) and self._has_changed(name):
                problems.append(f"{name}: its bytes have changed")
        if problems:
            self._store.distrust(self._key)
            raise self._refusal(
                "changed while the stage ran, so its result cannot be kept",
                problems,
                "inputs are read-only: a stage copies what it edits below context.output or context.scratch; "
                f"`polytrope resume` computes `{self._artifact.stage}` again",
            )

    def _has_changed(self, name: str) -> bool:
        path = self._artifact.path / name
        try:
            return path.is_symlink() or hash_file(path) != self._digests[name]
        except OSError:
            return True

    def _refusal(self, what: str, problems: list[str], hint: str) -> UserError:
        files = "; ".join([*problems[:3], *([f"and {len(problems) - 3} more"] if len(problems) > 3 else [])])
        return UserError(
            f"the input `{self._label}` (of stage `{self._artifact.stage}`) {what}{': ' if files else ''}{files}", hint
        )


def _marks(artifact: Artifact) -> dict[str, Mark]:
    """Relative path → mark of everything below that is no directory."""
    found: dict[str, Mark] = {}

    def walk(directory: str, prefix: str) -> None:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    walk(entry.path, f"{prefix}{entry.name}/")
                else:
                    status = entry.stat(follow_symlinks=False)
                    found[prefix + entry.name] = (
                        status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
                    )  # fmt: skip

    with contextlib.suppress(FileNotFoundError):  # what is not there will be missed
        walk(str(artifact.path), "")
    return found
