"""The store on S3 (`store: s3://bucket/prefix`): the same artifacts, runs and leases as objects.

    artifacts/KEY/TOKEN/…          the files of one attempt, uploaded where the stage ran
    artifacts/KEY/manifest.json    put if absent: this is the commit; names the TOKEN that counts
    runs/RUN/journal/00000001      one object per flush, put if absent: of two drivers only one can go on
    runs/RUN/lease-000001, leases/KEY/lease-000001
    runs/RUN/workflow.json, logs/, spool/; scratch/KEY/; quarantine/

A directory of this machine (`$POLYTROPE_CACHE`, or ~/.cache/polytrope) holds copies in the layout of a store on a disk;
stages read and write there, and nothing is lost with it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import FILE_NAME, Journal
from polytrope.pipeline.runs.lease import LeaseLostError
from polytrope.pipeline.store.manifest import (
    FORMAT,
    MANIFEST,
    FileEntry,
    StoredArtifact,
    build_manifest,
    check_sealed,
    make_read_only,
    move_manifest,
    parse_manifest,
    seal,
)
from polytrope.pipeline.store.objects import Bucket, ObjectDirectory
from polytrope.pipeline.store.store import Store, store_error
from polytrope.pipeline.support.files import hash_file, remove_tree, replace_file, unique_name

_SCRATCH_INTERVAL = 20.0  # seconds between two uploads of what changed in a stage's scratch directory
_START_TIME = 600.0  # seconds that a run may take from its directory to its first object
_REFRESH_INTERVAL = 5.0  # seconds between two looks for what others wrote into a run


def cache_directory(address: str) -> Path:
    """Where copies of a remote store are kept on this machine."""
    base = os.environ.get("POLYTROPE_CACHE") or Path.home() / ".cache" / "polytrope"
    return Path(base) / hashlib.sha256(address.encode()).hexdigest()[:16]


class ObjectStore(Store):
    """A store whose truth is in a bucket; `root` is this machine's copy."""

    def __init__(self, address: str) -> None:
        self.bucket = Bucket(address)
        super().__init__(cache_directory(self.bucket.address))
        self.address = self.bucket.address
        self._pushed: dict[str, tuple[int, int]] = {}  # local file → (size, time) as uploaded
        self._pulled: dict[str, str] = {}  # object → tag as downloaded
        self._refreshed = 0.0

    def create(self) -> None:
        super().create()
        try:
            if not self.bucket.put("store.json", json.dumps({"format": FORMAT}).encode() + b"\n", absent=True):
                found = json.loads(self.bucket.get("store.json") or b"{}").get("format")
                if found != FORMAT:
                    raise UserError(
                        f"the store {self.address} has format {found}, this version reads {FORMAT}",
                        "use another `store:` or the version of polytrope that made it",
                    )
        except OSError as error:
            raise store_error(self.address, error) from error

    # -- leases and journals -----------------------------------------------------------------------------------

    @property
    def lease_root(self) -> ObjectDirectory:
        return ObjectDirectory(self.bucket)

    def run_lease_directory(self, run_id: str) -> ObjectDirectory:
        return self.lease_root / f"runs/{run_id}"

    def key_lease_directory(self, key: str) -> ObjectDirectory:
        return self.lease_root / f"leases/{key}"

    def has_key_lease(self, key: str) -> bool:
        return bool(self.key_lease_directory(key).names())

    def settle_journal(self, run_id: str) -> None:
        self._pull_journal(run_id, exactly=True)

    def open_journal(self, run_id: str, *, fence: int, guard: Callable[[], None]) -> Journal:
        """The journal of a run for writing; every flush is an object that only one driver can put."""
        numbers = self._pull_journal(run_id, exactly=True)
        next_number = (numbers[-1] if numbers else 0) + 1

        def put(data: bytes) -> None:
            nonlocal next_number
            if not self.bucket.put(_segment(run_id, next_number), data, absent=True):
                raise LeaseLostError(f"the journal of run {run_id} was taken over by another driver")
            next_number += 1

        return Journal.open(self.run_directory(run_id), fence=fence, guard=guard, sink=put)

    def _pull_journal(self, run_id: str, *, exactly: bool = False) -> list[int]:
        """Bring the copy of a journal up to date; returns the numbers of its objects.

        Args:
            run_id: the run.
            exactly: drop what only the copy has: a driver died before it was flushed.
        """
        names = list(self.bucket.list(f"runs/{run_id}/journal/"))
        path = self.run_directory(run_id) / FILE_NAME
        parts = self.run_directory(run_id) / ".journal"
        self.bucket.download([(name, target) for name in names if not (target := parts / Path(name).name).exists()])
        data = b"".join((parts / Path(name).name).read_bytes() for name in names)
        local = path.read_bytes() if path.exists() else b""
        if local != data if exactly else not local.startswith(data):
            replace_file(path, data)
        return [int(Path(name).name) for name in names]

    # -- runs --------------------------------------------------------------------------------------------------

    def pull_run(self, run_id: str) -> None:
        """Copy what the bucket knows of a run and this machine does not."""
        self._pull(f"runs/{run_id}/")
        if self.run_directory(run_id).is_dir():
            self._pull_journal(run_id)

    def pull_runs(self) -> None:
        """The same for all runs."""
        found = self._pull("runs/")
        for run_id in found:
            self._pull_journal(run_id)
        for run_id in set(super().names("runs")) - found:  # collected on another machine, unless it is just starting
            if time.time() - self.run_directory(run_id).stat().st_mtime > _START_TIME:
                remove_tree(self.run_directory(run_id))

    def _pull(self, prefix: str) -> set[str]:
        """Copy the changed files of runs except their journals; returns the ids of all runs that were listed."""
        wanted, runs = [], set()
        for name, info in self.bucket.list(prefix).items():
            run_id, _, rest = name.removeprefix("runs/").partition("/")
            runs.add(run_id)
            path = self.root / name
            if rest.startswith("journal/") or (self._pulled.get(name) == info.tag and path.exists()):
                continue
            if path.exists() and path.stat().st_size >= info.size and rest.startswith(("logs/", "spool/")):
                continue  # written here, and further than what was uploaded
            wanted.append((name, path, info.modified))
            self._pulled[name] = info.tag
        self.bucket.download([(name, path) for name, path, _ in wanted])
        for _, path, modified in wanted:  # runs are sorted by these times; and what came from there need not go back
            os.utime(path, (modified, modified))
            self._pushed[str(path)] = _mark(path)
        return runs

    def push_run(self, run_id: str) -> None:
        """Upload what changed in a run's directory here: its record, logs and metrics; and forget what is gone."""
        directory = self.run_directory(run_id)
        changed = []
        for path in directory.rglob("*"):
            relative = path.relative_to(directory)
            first = relative.parts[0]
            if first.startswith((".", "journal.", "lease-")) or path.name.startswith(".") or not path.is_file():
                continue
            if self._pushed.get(str(path)) != (mark := _mark(path)):
                self._pushed[str(path)] = mark
                changed.append((path, f"runs/{run_id}/{relative.as_posix()}"))
        self.bucket.upload(changed)
        gone = [Path(name) for name in self._pushed if name.startswith(f"{directory}/") and not os.path.exists(name)]
        self.bucket.delete(path.relative_to(self.root).as_posix() for path in gone)
        for path in gone:
            del self._pushed[str(path)]

    def refresh_run(self, run_id: str) -> None:
        """From time to time, for the driver: upload logs and metrics, see what workers and `cancel` wrote."""
        if time.monotonic() - self._refreshed < _REFRESH_INTERVAL:
            return
        self._refreshed = time.monotonic()
        self.push_run(run_id)
        self._pull(f"runs/{run_id}/")

    def drop_cancel_request(self, run_id: str, name: str) -> None:
        super().drop_cancel_request(run_id, name)
        self.bucket.delete([f"runs/{run_id}/{name}"])

    # -- artifacts ---------------------------------------------------------------------------------------------

    def exists(self, key: str) -> bool:
        return self.bucket.get(f"artifacts/{key}/manifest.json") is not None

    def load(self, key: str) -> StoredArtifact | None:
        data = self.bucket.get(f"artifacts/{key}/manifest.json")
        return None if data is None else parse_manifest(data, key, self.artifacts / key / "files")

    def verify(self, key: str, *, full: bool = True) -> list[str]:
        if not self.exists(key):
            return [f"there is no artifact {key}"]
        artifact = self.load(key)
        return ["manifest.json is damaged"] if artifact is None else self._problems(artifact, full=full)

    def keys(self) -> list[str]:
        names = self.bucket.list("artifacts/")
        return [name.split("/")[1] for name in names if name.endswith("/manifest.json") and name.count("/") == 2]

    def _problems(self, artifact: StoredArtifact, *, full: bool) -> list[str]:
        """By the sizes in the bucket; `full`: by downloading and hashing."""
        prefix = f"artifacts/{artifact.key}/{artifact.location}/"
        found = {name.removeprefix(prefix): info.size for name, info in self.bucket.list(prefix).items()}
        problems = []
        for entry in artifact.files:
            size = found.get(entry["path"])
            if size is None:
                problems.append(f"{entry['path']}: is missing")
            elif size != entry["size"]:
                problems.append(f"{entry['path']}: has {size} bytes instead of {entry['size']}")
        if problems or not full:
            return problems
        try:
            remove_tree(self.artifacts / artifact.key)
            self.materialize(artifact.key)
        except UserError as error:
            return [error.message]
        return []

    def materialize(self, key: str) -> Path:
        """The directory of an artifact's files on this machine, downloaded and hashed if need be.

        Raises:
            UserError: the bucket does not hold what was committed.
        """
        data = self.bucket.get(f"artifacts/{key}/manifest.json")
        artifact = None if data is None else parse_manifest(data, key, self.artifacts / key / "files")
        hint = "`polytrope verify --all` sets damaged artifacts aside; the next run computes them again"
        if data is None or artifact is None:
            raise UserError(f"{self.address}/artifacts/{key}: its manifest is missing or damaged", hint)
        place = self.artifacts / key
        local = place / MANIFEST
        if local.exists() and local.read_bytes() == data and not super()._problems(artifact, full=False):
            return artifact.path
        workspace = self.root / "staging" / f"{key}.{unique_name()}"
        (workspace / "files").mkdir(parents=True)
        prefix = f"artifacts/{key}/{artifact.location}/"
        try:
            self.bucket.download(
                [(prefix + entry["path"], workspace / "files" / entry["path"]) for entry in artifact.files]
            )
            for entry in artifact.files:
                path = workspace / "files" / entry["path"]
                if hash_file(path) != entry["sha256"]:
                    raise UserError(f"{self.address}/{prefix}{entry['path']}: its bytes have changed", hint)
            make_read_only(workspace / "files", artifact.files)
            (workspace / MANIFEST).write_bytes(data)
            remove_tree(place)
            place.parent.mkdir(exist_ok=True)
            os.rename(workspace, place)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        finally:  # nothing is left of it if it was renamed
            remove_tree(workspace)
        return artifact.path

    def deliver(self, output: Path, entries: list[FileEntry], manifest: bytes) -> None:  # noqa: ARG002
        """Send what a stage wrote, where it ran. It counts once the driver has put a manifest that names it."""
        key, _, token = output.parent.name.partition(".")
        self.bucket.upload([(output / entry.path, f"artifacts/{key}/{token}/{entry.path}") for entry in entries])
        check_sealed(output, entries)  # what was sent is what was hashed

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
        """As of a store on a disk; `entries` are those of files that `deliver` has sent."""
        if entries is None:
            entries = seal(staging)
            self.deliver(staging, entries, b"")
        data = build_manifest(
            key, entries, components=components, summary=summary, stage=stage, run_id=run_id, duration=duration,
            location=staging.parent.name.partition(".")[2],
        )  # fmt: skip
        if fence is not None:
            fence()
        if not self.bucket.put(f"artifacts/{key}/manifest.json", data, absent=True):
            committed = self.load(key)  # somebody committed this key before: theirs counts
            if committed is not None:
                self.discard(staging)
                return committed
            self.quarantine(key, ["manifest.json is damaged"])
            if not self.bucket.put(f"artifacts/{key}/manifest.json", data, absent=True):
                raise OSError(errno.EIO, f"the artifact {key} is being written by others")
        if sum(1 for path in staging.rglob("*") if path.is_file()) == len(entries):  # it ran here: keep the copy
            (staging.parent / MANIFEST).write_bytes(data)
            remove_tree(self.artifacts / key)
            with contextlib.suppress(OSError):
                os.rename(staging.parent, self.artifacts / key)
                self._cache_digests(self._digests_file(key), entries)
        self.discard(staging)
        stored = parse_manifest(data, key, self.artifacts / key / "files")
        assert stored is not None
        return stored

    def quarantine(self, key: str, problems: list[str]) -> Path | None:
        data = self.bucket.get(f"artifacts/{key}/manifest.json")
        if data is None:  # another run was faster
            return None
        name = f"quarantine/{key}.{time.strftime('%Y%m%d-%H%M%S')}-{unique_name()}"
        self.bucket.put(f"{name}/manifest.json", data)
        self.bucket.put(f"{name}/problems.json", json.dumps({"key": key, "problems": problems}).encode())
        self.bucket.delete([f"artifacts/{key}/manifest.json"])
        remove_tree(self.artifacts / key)
        return Path(name)

    def put_alias(self, name: str, data: bytes) -> None:
        self.bucket.put(f"aliases/{name}.json", data)

    def get_alias(self, name: str) -> bytes | None:
        return self.bucket.get(f"aliases/{name}.json")

    def drop_alias(self, name: str) -> None:
        self.bucket.delete([f"aliases/{name}.json"])

    # -- import and garbage collection -------------------------------------------------------------------------

    def adopt(self, key: str, directory: Path) -> bool:
        data = (directory / MANIFEST).read_bytes()
        location, files = unique_name(), json.loads(data)["files"]
        if self.exists(key):
            return False
        prefix = f"artifacts/{key}/{location}/"
        self.bucket.upload([(directory / "files" / entry["path"], prefix + entry["path"]) for entry in files])
        return self.bucket.put(f"artifacts/{key}/{MANIFEST}", move_manifest(data, location), absent=True)

    def adopt_run(self, run_id: str, directory: Path) -> None:
        """The journal first: only one process can put it; then the rest, last the record by which runs are listed."""
        if not self.bucket.put(_segment(run_id, 1), (directory / FILE_NAME).read_bytes(), absent=True):
            raise UserError(f"run {run_id} is in {self.address} already", "nothing was changed")
        paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != FILE_NAME]
        files = [(path, f"runs/{run_id}/{path.relative_to(directory).as_posix()}") for path in paths]
        self.bucket.upload([pair for pair in files if not pair[1].endswith("/workflow.json")])
        self.bucket.upload([pair for pair in files if pair[1].endswith("/workflow.json")])

    def names(self, kind: str) -> list[str]:
        found = {name.split("/")[1] for name in self.bucket.list(f"{kind}/")}
        if kind in ("staging", "scratch", "trash"):  # these are on this machine as well
            found.update(super().names(kind))
        return sorted(found)

    def uncommitted(self) -> list[str]:
        """Files that were uploaded by attempts which were never committed."""
        attempts: dict[str, set[str]] = {}
        for name in self.bucket.list("artifacts/"):
            _, key, token, *_ = name.split("/")
            attempts.setdefault(key, set()).add(token)
        found = []
        for key, tokens in sorted(attempts.items()):
            artifact = self.load(key) if MANIFEST in tokens and len(tokens) > 2 else None
            keep = {artifact.location, MANIFEST} if artifact is not None else tokens if MANIFEST in tokens else set()
            found += [f"artifacts/{key}/{token}" for token in sorted(tokens - keep)]
        return found

    def size_of(self, name: str) -> int:
        return sum(info.size for info in self.bucket.list(f"{name}/").values())

    def remove(self, name: str) -> None:
        """The manifest first: a half-deleted artifact is never seen. This machine's copy goes too."""
        objects = list(self.bucket.list(f"{name}/"))
        self.bucket.delete([item for item in objects if item.endswith(f"/{MANIFEST}")])
        self.bucket.delete([item for item in objects if not item.endswith(f"/{MANIFEST}")])
        if (self.root / name).exists():
            super().remove(name)

    # -- scratch -----------------------------------------------------------------------------------------------

    def has_scratch(self, key: str) -> bool:
        return self.scratch(key).exists() or bool(self.bucket.list(f"scratch/{key}/"))

    def remove_scratch(self, key: str) -> None:
        super().remove_scratch(key)
        self.bucket.delete(self.bucket.list(f"scratch/{key}/"))

    @contextlib.contextmanager
    def scratch_mirrored(self, _key: str) -> Iterator[None]:
        """While a stage runs: bring its checkpoints here if another machine wrote them, and send those that come."""
        key, directory = _key, self.scratch(_key)
        if not directory.exists():
            names = self.bucket.list(f"scratch/{key}/")
            self.bucket.download([(name, directory / name.removeprefix(f"scratch/{key}/")) for name in names])
        ended = threading.Event()
        sent: dict[Path, tuple[int, int]] = {}

        def send() -> None:
            while not ended.wait(_SCRATCH_INTERVAL):
                with contextlib.suppress(OSError):
                    self._push_scratch(key, sent)

        thread = threading.Thread(target=send, name="polytrope-scratch", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                self._push_scratch(key, sent)
            raise
        finally:
            ended.set()

    def _push_scratch(self, key: str, sent: dict[Path, tuple[int, int]]) -> None:
        directory = self.scratch(key)
        changed = []
        for path in directory.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if path.is_file() and sent.get(path) != (status.st_size, status.st_mtime_ns):
                    sent[path] = (status.st_size, status.st_mtime_ns)
                    changed.append((path, f"scratch/{key}/{path.relative_to(directory).as_posix()}"))
        self.bucket.upload(changed)


def _mark(path: Path) -> tuple[int, int]:
    """Changes when the file does."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _segment(run_id: str, number: int) -> str:
    return f"runs/{run_id}/journal/{number:08d}"
