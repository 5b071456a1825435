"""A run with its artifacts as one tar file, and back: hashes are checked before anything enters the store."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import fold, read
from polytrope.pipeline.store.store import Store, store_error
from polytrope.pipeline.support.files import remove_tree, safe_name, unique_name

_HEADER = "polytrope-run.json"
_FORMAT = 1


def export_run(store: Store, directory: Path, target: Path) -> int:
    """Write `runs/RUN` and the artifacts of its finished stages to a tar file; returns the number of artifacts.

    Raises:
        UserError: an artifact is missing or damaged, or the file cannot be written.
    """
    state = fold(read(directory))
    keys = list(
        dict.fromkeys(
            stage.key for stage in state.stages.values() if stage.key and stage.state in ("succeeded", "cached")
        )
    )
    for key in keys:
        problems = store.verify(key)
        if problems:
            raise UserError(
                f"artifact {key[:12]} of run {directory.name} is not intact: {problems[0]}",
                f"compute it again with `polytrope resume {directory.name}`",
            )
    temporary = target.with_name(f".{target.name}.{unique_name()}")
    try:
        with tarfile.open(temporary, "w") as archive:
            header = json.dumps({"format": _FORMAT, "run": directory.name, "keys": keys}).encode()
            entry = tarfile.TarInfo(_HEADER)
            entry.size = len(header)
            archive.addfile(entry, io.BytesIO(header))
            archive.add(directory, f"runs/{directory.name}", filter=_plain)
            for key in keys:
                archive.add(store.whole(key), f"artifacts/{key}", filter=_plain)
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None
    return len(keys)


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Files and directories without owner; leases and a bucket's pieces of the journal stay here."""
    name = Path(entry.name).name
    if name.startswith(("lease-", ".")) or not (entry.isfile() or entry.isdir()):
        return None
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def import_run(store: Store, source: Path) -> tuple[str, int]:
    """Unpack an exported run; returns (run id, number of artifacts that were new).

    Raises:
        UserError: not such a file, damaged, or the run is in the store already.
    """
    store.create()
    with store.alone(f"import of {source.name}"):  # or a collection would remove what no run names yet
        return _import(store, source)


def _import(store: Store, source: Path) -> tuple[str, int]:
    workspace = store.local("staging") / f"import.{unique_name()}"
    try:
        with tarfile.open(source) as archive:
            member = archive.extractfile(_HEADER)
            header = json.loads(member.read()) if member is not None else {}
            if header.get("format") != _FORMAT:
                raise UserError(f"{source} has format {header.get('format')}, this version reads {_FORMAT}")
            run_id = str(header["run"])
            if safe_name(run_id) != run_id:
                raise ValueError(f"`{run_id}` is no run id")
            store.pull_run(run_id)
            if store.run_directory(run_id).exists():
                raise UserError(f"run {run_id} is in {store.address} already", "nothing was changed")
            archive.extractall(workspace, filter="data")
        unpacked = Store(workspace)
        for key in header["keys"]:
            problems = unpacked.verify(key)
            if problems:
                raise UserError(f"{source} is damaged: artifact {key[:12]}: {problems[0]}", "export the run again")
        new = sum(store.adopt(key, unpacked.whole(key)) for key in header["keys"])
        store.adopt_run(run_id, unpacked.run_directory(run_id))
        return run_id, new
    except FileNotFoundError:
        raise UserError(f"there is no file `{source}`") from None
    except (tarfile.TarError, KeyError, ValueError, EOFError) as error:
        raise UserError(
            f"{source} is not a run exported by polytrope, or is cut short: {error}", "export it again"
        ) from None
    except OSError as error:
        raise store_error(store.address, error) from error
    finally:
        remove_tree(workspace)
