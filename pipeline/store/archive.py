"""A run with its artifacts as one tar file, and back.

    polytrope-run.json                   {"format", "run", "keys"}
    runs/RUN/…                           record, journal, logs, events
    artifacts/KEY/manifest.json, files/… of every finished stage

Nothing in an archive is trusted: only plain files with these names are unpacked, hashes and keys are checked before
anything enters the store, and what an imported run says of the machine it comes from (its directory, its MLflow server)
is forgotten.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import FILE_NAME, RESULT_STATES, fold, read
from polytrope.pipeline.store.manifest import MANIFEST, is_key, is_plain_path, make_read_only, write_manifest
from polytrope.pipeline.store.store import RECORD_FILE, Store, store_error
from polytrope.pipeline.support.files import remove_tree, replace_json, safe_name, unique_name

_HEADER = "polytrope-run.json"
_FORMAT = 1
_RECORD = re.compile(r"workflow(\.\d+)?\.json")
_RUN_FILE = re.compile(r"workflow(\.\d+)?\.json|journal\.jsonl|journal\.torn-\d+|(logs|spool)/.+")
_LEFT_OUT = re.compile(r"mlflow\..*|cancel\.json|graph\.svg|lease-\d+|\..*")  # of a run; older exports have them
_SMALL = 1 << 26  # bytes that a header, a manifest or a line may have


class _ArchiveError(ValueError):
    """What is wrong with an archive, as the end of a sentence."""


# -- export --------------------------------------------------------------------------------------------------------


def export_run(store: Store, directory: Path, target: Path) -> int:
    """Write `runs/RUN` and the artifacts of its finished stages to a tar file; returns the number of artifacts.

    Raises:
        UserError: an artifact is missing or damaged, or the file cannot be written.
    """
    state = fold(read(directory))
    keys = list(
        dict.fromkeys(stage.key for stage in state.stages.values() if stage.key and stage.state in RESULT_STATES)
    )
    temporary = target.with_name(f".{target.name}.{unique_name()}")
    try:
        with tarfile.open(temporary, "w") as archive:
            _add_bytes(archive, _HEADER, json.dumps({"format": _FORMAT, "run": directory.name, "keys": keys}).encode())
            for name in _run_files(directory):
                _add_bytes(archive, f"runs/{directory.name}/{name}", (directory / name).read_bytes())
            for key in keys:
                _add_artifact(archive, store, key, directory.name)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return len(keys)


def _run_files(directory: Path) -> list[str]:
    """Files of a run that an archive keeps; leases, a bucket's pieces of the journal and requests stay here."""
    found = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return [name for name in found if _RUN_FILE.fullmatch(name)]


def _add_artifact(archive: tarfile.TarFile, store: Store, key: str, run_id: str) -> None:
    problems = store.verify(key, full=False)
    artifact = None if problems else store.load(key)
    if artifact is not None:
        _add_bytes(archive, f"artifacts/{key}/{MANIFEST}", write_manifest(artifact))
        files = store.materialize(key)
        for row in artifact.files:
            with open(files / row["path"], "rb") as file:
                reader = _Hashing(file)
                _add(archive, f"artifacts/{key}/files/{row['path']}", row["size"], reader, row.get("executable", False))
            if reader.digest.hexdigest() != row["sha256"]:
                problems = [f"{row['path']}: its bytes have changed"]
                break
    if problems or artifact is None:
        raise UserError(
            f"artifact {key[:12]} of run {run_id} is not intact: {problems[0] if problems else 'it is gone'}",
            f"compute it again with `polytrope resume {run_id}`",
        )


class _Hashing(io.RawIOBase):
    """A file that is hashed as it is read: what is in an archive is what the manifest says."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        return data


def _add_bytes(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    _add(archive, name, len(data), io.BytesIO(data))


def _add(archive: tarfile.TarFile, name: str, size: int, file: Any, executable: bool = False) -> None:
    """One plain file without owner, whatever other names it has here."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o755 if executable else 0o644
    archive.addfile(entry, file)


# -- import --------------------------------------------------------------------------------------------------------


def import_run(store: Store, source: Path) -> tuple[str, int]:
    """Unpack an exported run; returns (run id, number of artifacts that were new).

    Raises:
        UserError: not such a file, damaged, holding what no export writes, or the run is in the store already.
    """
    store.create()
    with store.alone(f"import of {source.name}"):  # or a collection would remove what no run names yet
        return _import(store, source)


def _import(store: Store, source: Path) -> tuple[str, int]:
    workspace = store.local("staging") / f"import.{unique_name()}"
    try:
        with tarfile.open(source) as archive:
            run_id, keys = _read_header(archive)
            store.pull_run(run_id)
            if store.run_directory(run_id).exists():
                raise UserError(f"run {run_id} is in {store.address} already", "nothing was changed")
            _unpack(archive, workspace, run_id, keys)
        unpacked = Store(workspace)
        for key in keys:
            _check_artifact(unpacked, key)
        _check_run(unpacked.run_directory(run_id), run_id)
        new = sum(store.adopt(key, unpacked.whole(key)) for key in keys)
        store.adopt_run(run_id, unpacked.run_directory(run_id))
        return run_id, new
    except FileNotFoundError:
        raise UserError(f"there is no file `{source}`") from None
    except _ArchiveError as error:
        raise UserError(
            f"{source} is damaged, or was not written by `polytrope export`: {error}", "export it again"
        ) from None
    except (tarfile.TarError, KeyError, TypeError, ValueError, EOFError) as error:
        raise UserError(
            f"{source} is not a run exported by polytrope, or is cut short: {error}", "export it again"
        ) from None
    except OSError as error:
        raise store_error(store.address, error) from error
    finally:
        remove_tree(workspace)


def _read_header(archive: tarfile.TarFile) -> tuple[str, list[str]]:
    """(run id, keys) from the first entry."""
    member = archive.next()
    if member is None or member.name != _HEADER:
        raise _ArchiveError(f"it does not start with {_HEADER}")
    header = json.loads(_content(archive, member))
    if header["format"] != _FORMAT:
        raise UserError(f"the archive has format {header['format']}, this version reads {_FORMAT}")
    run_id, keys = header["run"], header["keys"]
    if not isinstance(run_id, str) or safe_name(run_id) != run_id or not run_id:
        raise _ArchiveError(f"`{run_id}` is no run id")
    for key in keys:
        if not is_key(key):
            raise _ArchiveError(f"`{key}` is no stage key")
    return run_id, list(dict.fromkeys(keys))


def _unpack(archive: tarfile.TarFile, workspace: Path, run_id: str, keys: list[str]) -> None:
    """Write the plain files that an archive may hold to a new directory, and refuse all others by name."""
    run, artifacts = f"runs/{run_id}/", {f"artifacts/{key}/" for key in keys}
    (workspace / run).mkdir(parents=True)
    for key in keys:
        (workspace / "artifacts" / key / "files").mkdir(parents=True)
    while (member := archive.next()) is not None:
        name = member.name
        if not is_plain_path(name):
            raise _ArchiveError(f"it holds `{name}`, which points outside")
        if member.isdir():
            continue  # older exports list them
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise _ArchiveError(f"it holds `{name}`, which is a link or a special file")
        if name.startswith(run):
            rest = name.removeprefix(run)
            if _LEFT_OUT.fullmatch(rest):
                continue
            known = _RUN_FILE.fullmatch(rest) is not None
        else:
            start = "/".join(name.split("/")[:2]) + "/"
            rest = name.removeprefix(start)
            known = start in artifacts and (rest == MANIFEST or rest.startswith("files/"))
        if not known:
            raise _ArchiveError(f"it holds `{name}`, which belongs neither to the run nor to its artifacts")
        _write(archive, member, workspace / name)


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    source = archive.extractfile(member)
    assert source is not None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as target:
            left = member.size
            while left and (block := source.read(min(left, 1 << 20))):
                left -= target.write(block)
    except (FileExistsError, NotADirectoryError):
        raise _ArchiveError(f"it holds `{member.name}` twice") from None
    if left:
        raise _ArchiveError(f"`{member.name}` is cut short")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    source = archive.extractfile(member) if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) else None
    if source is None or member.size > _SMALL:
        raise _ArchiveError(f"`{member.name}` is not a small plain file")
    return source.read()


def _check_artifact(unpacked: Store, key: str) -> None:
    """What was unpacked must be what its manifest says, and its manifest be of the key."""
    artifact = unpacked.load(key)
    if artifact is not None:
        with contextlib.suppress(OSError):  # a missing file is found below
            make_read_only(unpacked.materialize(key), artifact.files)
    problems = unpacked.verify(key)
    if problems:
        raise _ArchiveError(f"artifact {key[:12]}: {problems[0]}")


def _check_run(directory: Path, run_id: str) -> None:
    """Journal and events name only what belongs to the run; its record forgets the machine it comes from.

    A resume looks for modules of stages in the workflow's directory: of an imported run it is the one the resume is
    started in. Its MLflow server, which would be asked with values of `${env.NAME}`, is this store's own.
    """
    if not (directory / FILE_NAME).exists() or not (directory / RECORD_FILE).exists():
        raise _ArchiveError(f"it has no journal or no record of run {run_id}")
    events = read(directory)
    fold(events)
    for event in events:
        key, log = event.get("key"), event.get("log")
        if key is not None and not is_key(key):
            raise _ArchiveError(f"the journal names the key `{key}`")
        if log is not None and not (is_plain_path(log) and log.startswith("logs/")):
            raise _ArchiveError(f"the journal names the log `{log}`")
        if event.get("run_id", run_id) != run_id:
            raise _ArchiveError(f"the journal is of run `{event.get('run_id')}`")
        for run in (event.get("hit_from"), event.get("holder")):
            if run is not None and (not isinstance(run, str) or safe_name(run) != run):
                raise _ArchiveError(f"the journal names the run `{run}`")
    for said in _spool_lines(directory):
        path = said.get("path", ".")
        if not isinstance(path, str) or path.startswith("/") or ".." in path.split("/"):
            raise _ArchiveError(f"an event of a stage names the file `{path}`")
    for file in directory.iterdir():
        if _RECORD.fullmatch(file.name):
            record = json.loads(file.read_bytes())
            workflow = dict(record["workflow"])
            if "tracking" in workflow:
                workflow["tracking"] = {**workflow["tracking"], "uri": None}
            own = {"run_id": run_id, "directory": None, "source": None, "files": {}, "workflow": workflow}
            replace_json(file, {**record, **own})


def _spool_lines(directory: Path) -> Iterator[Mapping[str, Any]]:
    for path in (directory / "spool").rglob("*.jsonl"):
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):  # cut short by a crash: readers skip it too
                said = json.loads(line)
                if isinstance(said, dict):
                    yield said
