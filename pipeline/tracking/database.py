"""MLflow's sqlite database: made whole under another name and put in place, so that no half of one is ever left."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
from pathlib import Path
from urllib.parse import unquote

from polytrope.pipeline.support.files import unique_name

_SQLITE = "sqlite:///"


def ensure_database(uri: str, busy: Path | None = None) -> None:
    """Make the database of a `sqlite:///` address if there is none; other addresses are left alone.

    One that MLflow's migrations left half made (a killed process of an older version) and that holds no run is put
    aside, and made anew.

    Args:
        uri: MLflow's tracking URI.
        busy: this file is there while a database is being made: whoever waits for this process knows that it works.
    """
    if not uri.startswith(_SQLITE):
        return
    path = database_file(uri)
    if path.exists() and not _is_half_made(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if busy is not None:
        busy.touch()
    try:
        if path.exists():
            path.rename(path.with_name(f"{path.name}.half-made-{unique_name()}"))
        _create(path)
    finally:
        if busy is not None:
            busy.unlink(missing_ok=True)


def database_file(uri: str) -> Path:
    """The file behind a `sqlite:///` address."""
    return Path(unquote(uri.removeprefix(_SQLITE).partition("?")[0]))


def database_uri(path: Path) -> str:
    """The `sqlite:///` address of a file."""
    return _SQLITE + str(path).replace("%", "%25").replace("?", "%3F")  # as in every URL


def _create(path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{unique_name()}")
    try:
        _migrate(temporary)
        # another process may have been faster: a link, where there are such, never replaces what is there
        try:
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        except OSError:
            if not path.exists():
                os.rename(temporary, path)
    finally:
        for suffix in ("", "-journal", "-wal", "-shm"):
            temporary.with_name(temporary.name + suffix).unlink(missing_ok=True)


def _migrate(path: Path) -> None:
    """Let MLflow write its schema."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(database_uri(path), (path.parent / "mlflow-artifacts").absolute().as_uri())
    store.engine.dispose()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _is_half_made(path: Path) -> bool:
    """Whether MLflow began to make this database and did not end: it is not of the newest version, and has no run."""
    from mlflow.store.db.utils import _get_latest_schema_revision

    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            tables = {row[0] for row in connection.execute("select name from sqlite_master where type = 'table'")}
            if "alembic_version" in tables:
                version = connection.execute("select version_num from alembic_version").fetchone()
                if version is not None and version[0] == _get_latest_schema_revision():
                    return False
            return "runs" not in tables or connection.execute("select count(*) from runs").fetchone()[0] == 0
    except sqlite3.DatabaseError:
        return False  # not MLflow's, or locked: MLflow says what is wrong


if __name__ == "__main__":
    ensure_database(sys.argv[1])
