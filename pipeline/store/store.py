"""The artifact store: committed directories by stage key, each with a manifest of hashes, put in place by one rename.

    STORE/artifacts/KEY/manifest.json   what the artifact is, and path, size, sha256 of every file
    STORE/artifacts/KEY/files/          what the stage wrote, read-only
    STORE/staging/KEY.TOKEN/            an artifact in the making; never read by anybody else
    STORE/scratch/KEY/                  checkpoints of a stage that is not finished
    STORE/leases/KEY/                   who computes this key now
    STORE/quarantine/                   artifacts that no longer were what their manifest says
    STORE/digests/KEY.json              (path, size, mtime, inode) → sha256, so that nothing is hashed twice
    STORE/runs/RUN/                     journal, resolved workflow, logs, events
    STORE/aliases/NAME.json             a name for an artifact, which is kept as long as the name is there

An artifact exists when `artifacts/KEY` exists: everything in it was flushed to the disk before the rename.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import Journal
from polytrope.pipeline.runs.lease import LeasePlace
from polytrope.pipeline.store.manifest import (
    FORMAT,
    MANIFEST,
    FileEntry,
    OutputChangedError,
    StoredArtifact,
    artifact_digest,
    build_manifest,
    check_sealed,
    file_rows,
    is_executable,
    parse_manifest,
    scan,
    seal,
)
from polytrope.pipeline.support.files import (
    hash_file,
    remove_tree,
    rename,
    replace_file,
    replace_json,
    sync_directory,
    unique_name,
    write_bytes,
)

_DIGESTS = "digests.json"  # beside a delivered manifest: what the cache will say of its files
_KEY = re.compile(r"[0-9a-f]{16,64}")


class Store:
    """The directory that holds artifacts and runs. Making a `Store` touches nothing; `create` does."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(os.path.abspath(root))
        self.artifacts = self.root / "artifacts"
        self.runs = self.root / "runs"
        self.address = str(self.root)
        self._created = False

    def create(self) -> None:
        """Make the directories and prove that they can be written.

        Raises:
            UserError: the place cannot be written, or holds something else.
        """
        if self._created:
            return
        try:
            for name in ("artifacts", "staging", "scratch", "leases", "quarantine", "digests", "runs"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root / "staging") as probe:
                probe.write(b"x" * 4096)
                probe.flush()
                os.fsync(probe.fileno())
            description = self.root / "store.json"
            if not description.exists():
                replace_json(description, {"format": FORMAT})
        except OSError as error:
            raise store_error(self.root, error) from error
        try:
            found = json.loads(description.read_bytes())["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{description} cannot be read: {error}", "is this a polytrope store?") from error
        if found != FORMAT:
            raise UserError(
                f"the store {self.root} has format {found}, this version reads {FORMAT}",
                "use another `store:` or the version of polytrope that made it",
            )
        self._created = True

    # -- places ------------------------------------------------------------------------------------------------

    def run_directory(self, run_id: str) -> Path:
        return self.runs / run_id

    @property
    def lease_root(self) -> LeasePlace:
        return self.root

    def run_lease_directory(self, run_id: str) -> LeasePlace:
        return self.run_directory(run_id)

    def key_lease_directory(self, key: str) -> LeasePlace:
        return self.root / "leases" / key

    def has_key_lease(self, key: str) -> bool:
        """Whether anything is left of a lease of this key."""
        return (self.root / "leases" / key).exists()

    def staging(self, key: str) -> Path:
        """A new, empty directory for the files of an attempt at `key`; hand it to `commit` or `discard`."""
        place = self.root / "staging" / f"{key}.{unique_name()}"
        place.mkdir(parents=True)
        (place / "files").mkdir()
        return place / "files"

    def scratch(self, key: str) -> Path:
        """The directory that survives attempts at `key` until it is committed. Created by whoever writes into it."""
        return self.root / "scratch" / key

    def has_scratch(self, key: str) -> bool:
        return self.scratch(key).exists()

    def remove_scratch(self, key: str) -> None:
        remove_tree(self.scratch(key))

    def discard(self, staging: Path) -> None:
        """Throw a staging directory away."""
        remove_tree(staging.parent)

    def discard_staging(self, key: str) -> None:
        """Throw away what dead attempts at `key` left. Only for the holder of the key's lease."""
        for name in os.listdir(self.root / "staging"):
            if name.startswith(f"{key}."):
                remove_tree(self.root / "staging" / name)

    # -- what a store elsewhere does, and one on a disk need not -------------------------------------------------

    def settle_journal(self, run_id: str) -> None:
        """Drop from a run's journal what a dead driver wrote and did not flush; for the holder of its lease."""

    def open_journal(self, run_id: str, *, fence: int, guard: Callable[[], None]) -> Journal:
        """The journal of a run for writing."""
        return Journal.open(self.run_directory(run_id), fence=fence, guard=guard)

    def pull_run(self, run_id: str) -> None:
        """Bring the copy of a run on this machine up to date."""

    def pull_runs(self) -> None:
        """The same for all runs."""

    def push_run(self, run_id: str) -> None:
        """Upload what changed in a run's directory on this machine."""

    def refresh_run(self, run_id: str) -> None:
        """Both, from time to time, while the run goes on."""

    def drop_cancel_request(self, run_id: str, name: str) -> None:
        """Forget a request to cancel; it was meant for an earlier attempt."""
        (self.run_directory(run_id) / name).unlink(missing_ok=True)

    def materialize(self, key: str) -> Path:
        """The directory of an artifact's files, on this machine."""
        return self.artifacts / key / "files"

    def deliver(self, output: Path, entries: list[FileEntry], manifest: bytes) -> None:
        """Called where the stage ran, before the commit: put the manifest beside its files, flushed to the disk.

        So the driver, which commits for all stages, need not wait for these flushes.
        """
        write_bytes(output.parent / MANIFEST, manifest)
        sync_directory(output.parent)
        self._cache_digests(output.parent / _DIGESTS, entries)

    def scratch_mirrored(self, _key: str) -> contextlib.AbstractContextManager[None]:
        """While a stage runs: keep its scratch directory where another machine finds it."""
        return contextlib.nullcontext()

    def adopt(self, key: str, directory: Path) -> bool:
        """Take in an artifact that was verified, from a directory as it has in a store; False: the key is here."""
        if self.exists(key):
            return False
        rename(directory, self.artifacts / key)
        return True

    def adopt_run(self, run_id: str, directory: Path) -> None:
        """Take in the directory of a run that is not here."""
        rename(directory, self.run_directory(run_id))

    def put_alias(self, name: str, data: bytes) -> None:
        """Keep what an alias stands for, see `polytrope.pipeline.store.aliases`."""
        (self.root / "aliases").mkdir(exist_ok=True)
        replace_file(self.root / "aliases" / f"{name}.json", data)

    def get_alias(self, name: str) -> bytes | None:
        """What was kept; None if there is no such alias."""
        try:
            return (self.root / "aliases" / f"{name}.json").read_bytes()
        except FileNotFoundError:
            return None

    def drop_alias(self, name: str) -> None:
        """Forget it; nothing happens if there is none."""
        (self.root / "aliases" / f"{name}.json").unlink(missing_ok=True)

    # -- for the garbage collection: `artifacts/KEY`, `staging/NAME` and so on by their names ----------------------

    def names(self, kind: str) -> list[str]:
        """What is directly below `artifacts`, `runs`, `staging`, `scratch`, `quarantine`, `aliases` or `trash`."""
        try:
            return sorted(os.listdir(self.root / kind))
        except FileNotFoundError:
            return []

    def uncommitted(self) -> list[str]:
        """Names of what dead attempts left among the artifacts; in a directory nothing can be left there."""
        return []

    def size_of(self, name: str) -> int:
        """Bytes of all files below."""
        walk = os.walk(self.root / name)
        return sum(os.lstat(os.path.join(root, file)).st_size for root, _, files in walk for file in files)

    def remove(self, name: str) -> None:
        """Out of sight by one rename, then deleted: a half-deleted artifact is never seen."""
        trash = self.root / "trash"
        trash.mkdir(exist_ok=True)
        target = trash / unique_name()
        rename(self.root / name, target)
        remove_tree(target)
        if name.startswith("artifacts/"):
            (self.root / "digests" / f"{name.removeprefix('artifacts/')}.json").unlink(missing_ok=True)

    # -- reading -----------------------------------------------------------------------------------------------

    def exists(self, key: str) -> bool:
        """Whether something is committed under `key`, verified or not."""
        return (self.artifacts / key / MANIFEST).is_file()

    def load(self, key: str) -> StoredArtifact | None:
        """The artifact as its manifest describes it, unverified; None if absent or if the manifest is damaged."""
        try:
            data = (self.artifacts / key / MANIFEST).read_bytes()
        except OSError:
            return None
        return parse_manifest(data, key, self.artifacts / key / "files")

    def find(self, key: str, *, full: bool = False) -> StoredArtifact | None:
        """The committed artifact of `key` if it is intact, else None. Changes nothing but the digest cache.

        Args:
            key: the stage key.
            full: hash every file, also those whose size, time and inode did not change since they were hashed last.
        """
        artifact = self.load(key)
        return None if artifact is None or self._problems(artifact, full=full) else artifact

    def verify(self, key: str, *, full: bool = True) -> list[str]:
        """What is wrong with the artifact of `key`, a line per file; [] if it is intact."""
        if not (self.artifacts / key).exists():
            return [f"there is no artifact {key}"]
        artifact = self.load(key)
        return ["manifest.json is damaged"] if artifact is None else self._problems(artifact, full=full)

    def keys(self) -> list[str]:
        """Keys of all committed artifacts."""
        try:
            return sorted(name for name in os.listdir(self.artifacts) if _KEY.fullmatch(name))
        except FileNotFoundError:
            return []

    def _problems(self, artifact: StoredArtifact, *, full: bool) -> list[str]:
        try:
            found = scan(artifact.path)
        except (OSError, UserError) as error:
            return [str(error)]
        known = {} if full else self._cached_digests(artifact.key)
        problems, changed = [], False
        expected = {entry["path"]: entry for entry in artifact.files}
        for name in sorted(found.keys() - expected.keys()):
            problems.append(f"{name}: is not in the manifest")
        for name, entry in expected.items():
            status = found.get(name)
            if status is None:
                problems.append(f"{name}: is missing")
            elif status.st_size != entry["size"]:
                problems.append(f"{name}: has {status.st_size} bytes instead of {entry['size']}")
            elif is_executable(status) != entry.get("executable", False):
                problems.append(f"{name}: can{' no longer' if entry.get('executable') else ' now'} be executed")
            elif known.get(name) != (status.st_size, status.st_mtime_ns, status.st_ino, entry["sha256"]):
                changed = True
                if hash_file(artifact.path / name) != entry["sha256"]:
                    problems.append(f"{name}: its bytes have changed")
        if changed and not problems:
            self._cache_digests(
                self._digests_file(artifact.key),
                [
                    FileEntry(name, status.st_size, expected[name]["sha256"], status.st_mtime_ns, status.st_ino)
                    for name, status in found.items()
                ],
            )
        return problems

    def _digests_file(self, key: str) -> Path:
        return self.root / "digests" / f"{key}.json"

    def _cached_digests(self, key: str) -> dict[str, tuple[int, int, int, str]]:
        try:
            data = json.loads(self._digests_file(key).read_bytes())
            return {name: (size, mtime_ns, inode, digest) for name, size, mtime_ns, inode, digest in data}
        except (OSError, ValueError, TypeError):
            return {}

    def _cache_digests(self, path: Path, entries: list[FileEntry]) -> None:
        if not entries:
            return
        rows = [(entry.path, entry.size, entry.mtime_ns, entry.inode, entry.sha256) for entry in entries]
        with contextlib.suppress(OSError):  # a cache; a read-only store is hashed every time
            replace_file(path, json.dumps(rows).encode(), durable=False)

    # -- writing -----------------------------------------------------------------------------------------------

    def commit(
        self,
        key: str,
        staging: Path,
        *,
        components: Mapping[str, Any],
        summary: Mapping[str, float],
        stage: str,
        run_id: str,
        duration: float,
        fence: Callable[[], None] | None = None,
        entries: list[FileEntry] | None = None,
    ) -> StoredArtifact:
        """Turn a staging directory into the artifact of `key`, atomically and durably.

        Args:
            key: the stage key.
            staging: what `staging` returned.
            components: of the key, for `explain`.
            summary: the stage's metrics.
            stage: its name in the workflow.
            run_id: the run that computed it.
            duration: seconds the stage took.
            fence: raises if this driver's lease is lost; called last before the rename.
            entries: what `seal` returned where the stage ran, its manifest being delivered; None: both are done here.

        Returns:
            The artifact. If the key was committed already, that one; the staging directory is thrown away then.
        """
        if entries is None:
            entries = seal(staging)
            manifest = build_manifest(
                key, entries, components=components, summary=summary, stage=stage, run_id=run_id, duration=duration
            )
            self.deliver(staging, entries, manifest)
        check_sealed(staging, entries)
        artifact = self._delivered(key, staging, entries)
        with contextlib.suppress(OSError):  # a cache, and there is none for no files
            os.rename(staging.parent / _DIGESTS, self._digests_file(key))
        if fence is not None:
            fence()
        try:
            rename(staging.parent, self.artifacts / key)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            committed = self.load(key)  # somebody committed this key before: theirs counts
            if committed is None:
                self.quarantine(key, ["manifest.json is damaged"])
                rename(staging.parent, self.artifacts / key)
            else:
                self.discard(staging)
                return committed
        return artifact

    def _delivered(self, key: str, staging: Path, entries: list[FileEntry]) -> StoredArtifact:
        """What the manifest beside the files says; it must be of this key and of these files."""
        try:
            data = (staging.parent / MANIFEST).read_bytes()
        except FileNotFoundError:
            data = b""
        artifact = parse_manifest(data, key, self.artifacts / key / "files")
        if artifact is None or artifact.digest != artifact_digest(file_rows(entries)):
            raise OutputChangedError("the manifest changed between the stage's end and its commit")
        return artifact

    def quarantine(self, key: str, problems: list[str]) -> Path | None:
        """Move an artifact that is not what its manifest says out of the way; returns where it is now."""
        target = self.root / "quarantine" / f"{key}.{time.strftime('%Y%m%d-%H%M%S')}-{unique_name()}"
        try:
            rename(self.artifacts / key, target)
        except FileNotFoundError:  # another run was faster
            return None
        replace_json(target / "problems.json", {"key": key, "problems": problems, "time": time.time()}, durable=False)
        with contextlib.suppress(FileNotFoundError):
            self._digests_file(key).unlink()
        return target


def store_error(root: Path | str, error: OSError) -> UserError:
    """What an `OSError` of the store means to a person."""
    reasons = {
        errno.EACCES: "it may not be written by this user",
        errno.EPERM: "it may not be written by this user",
        errno.EROFS: "it is on a read-only file system",
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.ENOTDIR: "a part of its path is a file",
        errno.EEXIST: "a part of its path is a file",
    }
    reason = reasons.get(error.errno or 0, str(error))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = (
            "free some space (`polytrope gc` removes what no run needs), or use another place: `--set store=DIRECTORY`"
        )
    else:
        hint = "use another place: `store:` in the workflow file or `--set store=DIRECTORY`"
    return UserError(f"the store {root} cannot be used: {reason}", hint)
