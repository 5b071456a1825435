"""The artifact store: committed directories by stage key, each with a manifest of hashes, put in place by one step.

In a directory:

    artifacts/KEY/manifest.json   what the artifact is, and path, size, sha256 of every file
    artifacts/KEY/files/          what the stage wrote, read-only
    staging/KEY.TOKEN/            an artifact in the making; never read by anybody else
    scratch/KEY/                  checkpoints of a stage that is not finished
    leases/KEY/, leases/store/    who computes this key now; who works on the store as a whole
    quarantine/                   artifacts that no longer were what their manifest says
    digests/KEY.json              (path, size, mtime, inode) → sha256, so that nothing is hashed twice
    runs/RUN/                     journal, resolved workflow, logs, events
    aliases/NAME.json             a name for an artifact, which is kept as long as the name is there

An artifact exists when `artifacts/KEY` exists: everything in it was flushed to the disk before the rename.

In a bucket (`s3://bucket/prefix`, `gs://…`, `az://…`) the same as objects, but:

    artifacts/KEY/TOKEN/…         the files of one attempt, uploaded where the stage ran
    artifacts/KEY/manifest.json   put if absent: this is the commit; names the TOKEN that counts
    runs/RUN/journal/00000001     one object per flush, put if absent

and a directory of this machine (`$POLYTROPE_CACHE`, or ~/.cache/polytrope) holds copies in the layout above; stages
read and write there, and nothing is lost with it.

No other room knows this layout: it gets a `Store`, or its address, and asks.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import FILE_NAME, Journal
from polytrope.pipeline.runs.lease import DEFAULT_TTL, Lease, LeaseHeldError, LeasePlace, current, liveness
from polytrope.pipeline.store.backend import Backend
from polytrope.pipeline.store.bucket import SCHEMES, Bucket
from polytrope.pipeline.store.directory import Directory, make_folders
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
    make_read_only,
    move_manifest,
    parse_manifest,
    seal,
)
from polytrope.pipeline.store.run_copies import RunCopies, journal_part
from polytrope.pipeline.store.scratch_mirror import ScratchMirror
from polytrope.pipeline.store.verification import find_problems, keep_digests
from polytrope.pipeline.support.files import (
    hash_file,
    is_disk_full,
    remove_tree,
    rename,
    sync_directory,
    sync_file,
    unique_name,
    write_bytes,
)
from polytrope.pipeline.support.text import is_unicode

_DIGESTS = "digests.json"  # beside a delivered manifest: what the cache will say of its files
_KEY_CHARACTERS = frozenset("0123456789abcdef")
RECORD_FILE = "workflow.json"  # of a run; a run without it never began


@dataclass(frozen=True)
class Commit:
    """What becomes the artifact of `key`.

    Args:
        key: the stage key.
        staging: what `Store.staging` returned.
        components: of the key, for `explain`.
        summary: the stage's metrics.
        stage: its name in the workflow.
        run_id: the run that computed it.
        duration: seconds the stage took.
        entries: what `seal` returned where the stage ran, its files being delivered; None: both are done by `commit`.
    """

    key: str
    staging: Path
    components: Mapping[str, Any]
    summary: Mapping[str, float]
    stage: str
    run_id: str
    duration: float
    entries: list[FileEntry] | None = None

    def manifest(self, entries: list[FileEntry], location: str = "") -> bytes:
        return build_manifest(
            self.key, entries, components=self.components, summary=self.summary, stage=self.stage,
            run_id=self.run_id, duration=self.duration, location=location,
        )  # fmt: skip


class Store:
    """The directory or bucket that holds artifacts and runs. Making a `Store` touches nothing; `create` does.

    Args:
        address: a directory, or `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`.

    Raises:
        UserError: neither of these.
    """

    def __init__(self, address: Path | str) -> None:
        self._bucket: Bucket | None = None
        backend: Backend
        scheme = re.match(r"([A-Za-z][\w+.-]+):/", str(address))  # one letter is a drive
        if scheme is not None:
            if scheme[1] not in SCHEMES or "://" not in str(address):
                ways = ", ".join(f"`{scheme}://bucket/prefix`" for scheme in SCHEMES)
                raise UserError(
                    f"store: `{address}` is neither a directory nor one of {ways}",
                    "give a directory, or such an address",
                )
            backend = self._bucket = Bucket(str(address))
            self._here = _cache_directory(backend.address)
            self._copies = RunCopies(backend, self._here)
        elif not str(address).strip():  # a variable that was not set: not the directory of the moment
            raise UserError(
                "store: the address is empty",
                "name a directory, or leave `--store`, `store:` or $POLYTROPE_STORE out: .polytrope",
            )
        else:
            self._here = Path(os.path.abspath(address))
            backend = Directory(self._here)
        self._backend = backend
        self.address = backend.address
        self._created = False

    @property
    def present(self) -> bool:
        """Whether there is a store at this address, of whatever format."""
        return self._backend.get("store.json") is not None

    def create(self) -> None:
        """Make the place and prove that it can be written.

        Raises:
            UserError: it cannot be written, or holds something else.
        """
        if self._created:
            return
        if not is_unicode(self.address):
            raise UserError(
                f"store: the path {self.address!r} is not UTF-8",
                "give another `store:`: a run records its paths in UTF-8",
            )
        try:
            make_folders(self._here)
            self._backend.prepare()
            if not self.present:
                self._backend.put("store.json", json.dumps({"format": FORMAT}, indent=2).encode() + b"\n", absent=True)
            data = self._backend.get("store.json")
        except OSError as error:
            raise store_error(self.address, error) from error
        try:
            found = json.loads(data or b"")["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.address}/store.json cannot be read: {error}", "is this a polytrope store?"
            ) from error
        if found != FORMAT:
            raise UserError(
                f"the store {self.address} has format {found}, this version reads {FORMAT}",
                "use another `store:` or the version of polytrope that made it",
            )
        self._created = True

    # -- places ------------------------------------------------------------------------------------------------

    def local(self, name: str) -> Path:
        """A file or directory of this machine that goes with the store and is no part of it: MLflow's database."""
        return self._here / name

    def run_directory(self, run_id: str) -> Path:
        """Of this machine; see `pull_run` and `push_run`."""
        return self._here / "runs" / run_id

    def run_directories(self) -> list[Path]:
        """Those of all runs that began and are known on this machine, newest first."""
        found = []
        for name in Directory(self._here).children("runs"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                found.append(((self.run_directory(name) / RECORD_FILE).stat().st_mtime, self.run_directory(name)))
        return [directory for _, directory in sorted(found, reverse=True)]

    @property
    def lease_root(self) -> LeasePlace:
        return self._backend.place("")

    def run_lease_directory(self, run_id: str) -> LeasePlace:
        return self._backend.place(f"runs/{run_id}")

    def key_lease_directory(self, key: str) -> LeasePlace:
        return self._backend.place(f"leases/{key}")

    def has_key_lease(self, key: str) -> bool:
        """Whether anything is left of a lease of this key."""
        return bool(self._backend.children(f"leases/{key}"))

    def staging(self, key: str) -> Path:
        """A new, empty directory for the files of an attempt at `key`; hand it to `commit` or `discard`."""
        place = self._here / "staging" / f"{key}.{unique_name()}"
        place.mkdir()
        (place / "files").mkdir()
        return place / "files"

    def scratch(self, key: str) -> Path:
        """The directory that survives attempts at `key` until it is committed. Created by whoever writes into it."""
        return self._here / "scratch" / key

    def has_scratch(self, key: str) -> bool:
        mirror = self._mirror(key)
        return self.scratch(key).exists() if mirror is None else mirror.exists()

    def remove_scratch(self, key: str) -> None:
        mirror = self._mirror(key)
        if mirror is None:
            remove_tree(self.scratch(key))
        else:
            mirror.remove()

    def scratch_mirrored(self, key: str) -> contextlib.AbstractContextManager[None]:
        """While a stage runs: keep its scratch directory where another machine finds it."""
        mirror = self._mirror(key)
        return contextlib.nullcontext() if mirror is None else mirror.kept()

    def _mirror(self, key: str) -> ScratchMirror | None:
        if self._bucket is None:
            return None
        return ScratchMirror(self._bucket, key, self.scratch(key), self._here / "attempts" / key)

    def discard(self, staging: Path) -> None:
        """Throw a staging directory away."""
        remove_tree(staging.parent)

    def discard_staging(self, key: str) -> None:
        """Throw away what dead attempts at `key` left. Only for the holder of the key's lease."""
        for name in os.listdir(self._here / "staging"):
            if name.startswith(f"{key}."):
                remove_tree(self._here / "staging" / name)

    # -- the store as a whole ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def alone(self, owner: str, ttl: float = DEFAULT_TTL) -> Iterator[Lease]:
        """Hold the lease of the whole store: nobody else does, and no run begins. Waits for another holder.

        Args:
            owner: what others are told that they wait for, such as `polytrope gc`.
            ttl: seconds without a heartbeat after which others go on.
        """
        lease = self._take(owner, ttl)
        try:
            yield lease
        finally:
            with contextlib.suppress(OSError):
                lease.release(remove=True)

    def _take(self, owner: str, ttl: float, *, heartbeat: bool = True) -> Lease:
        told = False
        while True:
            try:
                return Lease.acquire(self._backend.place("leases/store"), owner, ttl, heartbeat=heartbeat)
            except LeaseHeldError as error:
                if not told:
                    print(f"polytrope: waits for {error.holder.describe()}", file=sys.stderr, flush=True)
                told = True
                time.sleep(0.2)

    # -- runs ----------------------------------------------------------------------------------------------------

    def begin_run(self, run_id: str) -> None:
        """For the holder of a run's lease, before anything else: wait until nobody collects garbage, and drop from the
        journal what a dead driver wrote and did not flush.

        Whoever collects takes the store's lease and then looks for held leases of runs; a run does it the other way
        round. So at least one of two sees the other. The lease of a dead collector is taken over: should it only have
        been stopped, it finds that out before it removes anything more.
        """
        if liveness(current(self._backend.place("leases/store"))) != "free":
            self._take(f"run {run_id}", DEFAULT_TTL, heartbeat=False).release(remove=True)
        if self._bucket is not None:
            self._copies.settle_journal(run_id)

    def open_journal(self, run_id: str, *, fence: int, guard: Callable[[], None]) -> Journal:
        """The journal of a run for writing."""
        if self._bucket is not None:
            return self._copies.open_journal(run_id, fence=fence, guard=guard)
        return Journal.open(self.run_directory(run_id), fence=fence, guard=guard)

    def pull_run(self, run_id: str) -> None:
        """Bring the copy of a run on this machine up to date."""
        if self._bucket is not None:
            self._copies.pull(run_id)

    def pull_runs(self) -> None:
        """The same for all runs."""
        if self._bucket is not None:
            self._copies.pull_all()

    def push_run(self, run_id: str) -> None:
        """Upload what changed in a run's directory on this machine."""
        if self._bucket is not None:
            self._copies.push(run_id)

    def refresh_run(self, run_id: str) -> None:
        """Both, from time to time, while the run goes on."""
        if self._bucket is not None:
            self._copies.refresh(run_id)

    def drop_cancel_request(self, run_id: str, name: str) -> None:
        """Forget a request to cancel; it was meant for an earlier attempt."""
        (self.run_directory(run_id) / name).unlink(missing_ok=True)
        self._backend.remove(f"runs/{run_id}/{name}")

    # -- reading -------------------------------------------------------------------------------------------------

    def exists(self, key: str) -> bool:
        """Whether something is committed under `key`, verified or not."""
        return self._backend.get(f"artifacts/{key}/{MANIFEST}") is not None

    def load(self, key: str) -> StoredArtifact | None:
        """The artifact as its manifest describes it, unverified; None if absent or if the manifest is damaged."""
        data = self._backend.get(f"artifacts/{key}/{MANIFEST}")
        return None if data is None else parse_manifest(data, key)

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
        if not self._backend.children(f"artifacts/{key}"):
            return [f"there is no artifact {key}"]
        artifact = self.load(key)
        return ["manifest.json is damaged"] if artifact is None else self._problems(artifact, full=full)

    def keys(self) -> list[str]:
        """Keys of all committed artifacts."""
        if self._bucket is None:
            names = self._backend.children("artifacts")
        else:  # uploads of attempts that were never committed are there too
            listed = self._bucket.list("artifacts")
            names = [name.split("/")[1] for name in listed if name.endswith(f"/{MANIFEST}") and name.count("/") == 2]
        return [name for name in names if 16 <= len(name) <= 64 and _KEY_CHARACTERS.issuperset(name)]

    def materialize(self, key: str) -> Path:
        """The directory of an artifact's files on this machine, fetched and hashed if need be.

        Raises:
            UserError: the bucket does not hold what was committed.
        """
        if self._bucket is None:
            return self._files(key)
        data = self._bucket.get(f"artifacts/{key}/{MANIFEST}")
        artifact = None if data is None else parse_manifest(data, key)
        if data is None or artifact is None:
            raise _damaged(f"{self.address}/artifacts/{key}: its manifest is missing or damaged")
        local = self._files(key).parent / MANIFEST
        if local.exists() and local.read_bytes() == data and not self._problems_here(artifact, full=False):
            return self._files(key)
        make_folders(self._here)  # a stage can be the first that this machine has to do with the store
        workspace = self._here / "staging" / f"{key}.{unique_name()}"
        try:
            self._fetch(self._bucket, artifact, workspace / "files")
            (workspace / MANIFEST).write_bytes(data)
            self._keep(key, workspace)
        finally:  # nothing is left of it if it was renamed
            remove_tree(workspace)
        return self._files(key)

    def _fetch(self, bucket: Bucket, artifact: StoredArtifact, target: Path) -> None:
        target.mkdir(parents=True)
        prefix = f"artifacts/{artifact.key}/{artifact.location}"
        try:
            bucket.fetch([(f"{prefix}/{entry['path']}", target / entry["path"]) for entry in artifact.files])
        except FileNotFoundError as error:
            raise _damaged(f"{error.filename} is missing") from error
        for entry in artifact.files:
            path = target / entry["path"]
            if hash_file(path) != entry["sha256"]:
                raise _damaged(f"{self.address}/{prefix}/{entry['path']}: its bytes have changed")
        make_read_only(target, artifact.files)

    def _keep(self, key: str, directory: Path) -> None:
        """Take an artifact's directory as this machine's copy, unless another process was faster."""
        place = self._files(key).parent
        remove_tree(place)
        with contextlib.suppress(FileExistsError):
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                os.rename(directory, place)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise

    def _problems(self, artifact: StoredArtifact, *, full: bool) -> list[str]:
        """In a bucket by the sizes; `full`: by fetching and hashing."""
        if self._bucket is None:
            return self._problems_here(artifact, full=full)
        prefix = f"artifacts/{artifact.key}/{artifact.location}"
        found = {name.removeprefix(f"{prefix}/"): info.size for name, info in self._bucket.list(prefix).items()}
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
            remove_tree(self._files(artifact.key).parent)
            self.materialize(artifact.key)
        except UserError as error:
            return [error.message]
        return []

    def _problems_here(self, artifact: StoredArtifact, *, full: bool) -> list[str]:
        return find_problems(artifact, self._files(artifact.key), self._digests_file(artifact.key), full=full)

    def _files(self, key: str) -> Path:
        return self._here / "artifacts" / key / "files"

    def distrust(self, key: str) -> None:
        """Forget what is known of an artifact's files: all are hashed when it is asked for again."""
        self._digests_file(key).unlink(missing_ok=True)

    def _digests_file(self, key: str) -> Path:
        return self._here / "digests" / f"{key}.json"

    # -- writing -------------------------------------------------------------------------------------------------

    def deliver(self, output: Path, entries: list[FileEntry], manifest: bytes) -> None:
        """Called where the stage ran, before the commit: everything durable but the artifact's existence.

        So the driver, which commits for all stages, need not wait for it. In a directory: the manifest beside the
        files, flushed; in a bucket: the files, which count once the driver has put a manifest that names them.
        """
        if self._bucket is None:
            write_bytes(output.parent / MANIFEST, manifest)
            sync_directory(output.parent)
            keep_digests(output.parent / _DIGESTS, entries)
        else:
            key, _, token = output.parent.name.partition(".")
            self._bucket.send((output / entry.path, f"artifacts/{key}/{token}/{entry.path}") for entry in entries)
            check_sealed(output, entries)  # what was sent is what was hashed

    def commit(self, commit: Commit, fence: Callable[[], None] | None = None) -> StoredArtifact:
        """Turn a staging directory into the artifact of its key, atomically and durably.

        Args:
            commit: what to commit.
            fence: raises if this driver's lease is lost; called last before the artifact begins to exist.

        Returns:
            The artifact. If the key was committed already, that one; the staging directory is thrown away then.
        """
        key, attempt = commit.key, commit.staging.parent
        entries = commit.entries
        if entries is None:
            entries = seal(commit.staging)
            self.deliver(commit.staging, entries, commit.manifest(entries))
        if self._bucket is None:
            check_sealed(commit.staging, entries)
            data = _delivered(attempt, key, entries)
            with contextlib.suppress(OSError):  # a cache, and there is none for no files
                os.rename(attempt / _DIGESTS, self._digests_file(key))
        else:
            data = commit.manifest(entries, location=attempt.name.partition(".")[2])
        if fence is not None:
            fence()
        if not self._backend.publish(attempt, f"artifacts/{key}", MANIFEST, data):
            committed = self.load(key)  # somebody committed this key before: theirs counts
            if committed is not None:
                self.discard(commit.staging)
                return committed
            self.quarantine(key, ["manifest.json is damaged"])
            if not self._backend.publish(attempt, f"artifacts/{key}", MANIFEST, data):
                raise OSError(errno.EIO, f"the artifact {key} is being written by others")
        if self._bucket is not None:
            if sum(1 for path in commit.staging.rglob("*") if path.is_file()) == len(entries):  # it ran here
                (attempt / MANIFEST).write_bytes(data)
                self._keep(key, attempt)
                keep_digests(self._digests_file(key), entries)
            self.discard(commit.staging)
        stored = parse_manifest(data, key)
        assert stored is not None
        return stored

    def quarantine(self, key: str, problems: list[str]) -> str | None:
        """Move an artifact that is not what its manifest says out of the way; returns where it is now."""
        target = f"quarantine/{key}.{time.strftime('%Y%m%d-%H%M%S')}-{unique_name()}"
        if not self._backend.withdraw(f"artifacts/{key}", target, MANIFEST):  # another run was faster
            return None
        text = json.dumps({"key": key, "problems": problems, "time": time.time()}, indent=2)
        self._backend.put(f"{target}/problems.json", text.encode())
        self._digests_file(key).unlink(missing_ok=True)
        if self._bucket is not None:
            remove_tree(self._files(key).parent)
        return f"{self.address}/{target}"

    def whole(self, key: str) -> Path:
        """The directory on this machine that holds an artifact's files and its manifest, as `adopt` takes it."""
        return self.materialize(key).parent

    def copy_from(self, other: Store, key: str) -> None:
        """Take an intact artifact over from another store, without a second copy of its bytes where that can be."""
        if self.exists(key):
            return
        copy = self._here / "staging" / f"{key}.{unique_name()}"
        try:
            shutil.copytree(other.whole(key), copy, copy_function=_link)
            self.adopt(key, copy)
        finally:  # nothing is left of it if it was renamed
            remove_tree(copy)

    def adopt(self, key: str, directory: Path) -> bool:
        """Take in an artifact that was verified, from a directory as it has in a store; False: the key is here."""
        data = (directory / MANIFEST).read_bytes()
        if self.exists(key):
            return False
        if self._bucket is not None:
            location, files = unique_name(), json.loads(data)["files"]
            prefix = f"artifacts/{key}/{location}"
            self._bucket.send((directory / "files" / entry["path"], f"{prefix}/{entry['path']}") for entry in files)
            data = move_manifest(data, location)
        else:
            _flush_tree(directory)
        return self._backend.publish(directory, f"artifacts/{key}", MANIFEST, data)

    def adopt_run(self, run_id: str, directory: Path) -> None:
        """Take in the directory of a run that is not here.

        Raises:
            UserError: it is.
        """
        if self._bucket is None:
            _flush_tree(directory)
            rename(directory, self.run_directory(run_id))
            return
        # the journal first: only one process can put it; last the record by which runs are listed
        if not self._bucket.put(journal_part(run_id, 1), (directory / FILE_NAME).read_bytes(), absent=True):
            raise UserError(f"run {run_id} is in {self.address} already", "nothing was changed")
        paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != FILE_NAME]
        files = [(path, f"runs/{run_id}/{path.relative_to(directory).as_posix()}") for path in paths]
        self._bucket.send(pair for pair in files if not pair[1].endswith(f"/{RECORD_FILE}"))
        self._bucket.send(pair for pair in files if pair[1].endswith(f"/{RECORD_FILE}"))

    def put_alias(self, name: str, data: bytes) -> None:
        """Keep what an alias stands for, see `polytrope.pipeline.store.aliases`."""
        self._backend.put(f"aliases/{name}.json", data)

    def get_alias(self, name: str) -> bytes | None:
        """What was kept; None if there is no such alias."""
        return self._backend.get(f"aliases/{name}.json")

    def drop_alias(self, name: str) -> None:
        """Forget it; nothing happens if there is none."""
        self._backend.remove(f"aliases/{name}.json")

    # -- for the garbage collection: `artifacts/KEY`, `staging/NAME` and so on by their names ----------------------

    def names(self, kind: str) -> list[str]:
        """What is directly below `artifacts`, `runs`, `staging`, `scratch`, `quarantine`, `aliases` or `trash`."""
        found = set(self._backend.children(kind))
        if self._bucket is not None and kind in ("staging", "scratch", "trash"):  # these are on this machine as well
            found.update(Directory(self._here).children(kind))
        return sorted(found)

    def uncommitted(self) -> list[str]:
        """What attempts that were never committed left among the artifacts; nothing can be left so in a directory."""
        if self._bucket is None:
            return []
        attempts: dict[str, set[str]] = {}
        for name in self._bucket.list("artifacts"):
            _, key, token, *_ = name.split("/")
            attempts.setdefault(key, set()).add(token)
        found = []
        for key, tokens in sorted(attempts.items()):
            artifact = self.load(key) if MANIFEST in tokens and len(tokens) > 2 else None
            keep = {artifact.location, MANIFEST} if artifact is not None else tokens if MANIFEST in tokens else set()
            found += [f"artifacts/{key}/{token}" for token in sorted(tokens - keep)]
        return found

    def size_of(self, name: str) -> int:
        """Bytes of all files below."""
        return sum(info.size for info in self._backend.list(name).values())

    def remove(self, name: str) -> None:
        """Everything below a name, on this machine as well: a half-deleted artifact is never seen."""
        self._backend.remove(name)
        if self._bucket is not None:
            Directory(self._here).remove(name)
        if name.startswith("artifacts/"):
            self._digests_file(name.removeprefix("artifacts/")).unlink(missing_ok=True)


def _cache_directory(address: str) -> Path:
    """Where copies of a bucket are kept on this machine."""
    base = os.environ.get("POLYTROPE_CACHE") or Path.home() / ".cache" / "polytrope"
    return Path(base).absolute() / hashlib.sha256(address.encode()).hexdigest()[:16]


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def _flush_tree(directory: Path) -> None:
    """Flush files and names that were not written by a stage: what is renamed into a store must survive a power cut."""
    for folder, _, files in os.walk(directory):
        for file in files:
            sync_file(Path(folder, file))
        sync_directory(Path(folder))


def _damaged(message: str) -> UserError:
    return UserError(message, "`polytrope verify --all` sets damaged artifacts aside; the next run computes them again")


def _delivered(attempt: Path, key: str, entries: list[FileEntry]) -> bytes:
    """The manifest beside the files; it must be of this key and of these files."""
    try:
        data = (attempt / MANIFEST).read_bytes()
    except FileNotFoundError:
        data = b""
    artifact = parse_manifest(data, key)
    if artifact is None or artifact.digest != artifact_digest(file_rows(entries)):
        raise OutputChangedError("the manifest changed between the stage's end and its commit")
    return data


def store_error(address: Path | str, error: OSError) -> UserError:
    """What an `OSError` of the store means to a person."""
    where = f" `{error.filename}`" if error.filename else ""
    reasons = {
        errno.EACCES: f"this user lacks the permission for{where or ' it'}",
        errno.EPERM: f"this user lacks the permission for{where or ' it'}",
        errno.EROFS: "it is on a read-only file system",
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.ENOTDIR: f"a part of its path is a file:{where}" if where else "a part of its path is a file",
        errno.EEXIST: f"a part of its path is a file:{where}" if where else "a part of its path is a file",
        errno.ENOENT: f"{where.strip() or 'a part of it'} is gone: was the store renamed or removed meanwhile?",
        errno.EIO: f"{error.strerror}{where}",
    }
    reason = reasons.get(error.errno or 0, str(error))
    if is_disk_full(error):
        hint = (
            "free some space (`polytrope gc` removes what no run needs), or use another place: `--set store=DIRECTORY`"
        )
    else:
        hint = "use another place: `store:` in the workflow file or `--set store=DIRECTORY`"
    return UserError(f"the store {address} cannot be used: {reason}", hint)
