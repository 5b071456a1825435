"""MLflow as the driver sees it: an address to check, and a child process that copies journal and spool to it.

The driver never imports MLflow: a server that is slow, hangs or is away costs the run nothing.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import http.client
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlparse

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.tracking.cursor import CURSOR_FILE
from polytrope.pipeline.tracking.database import database_file, database_uri
from polytrope.pipeline.workflow.references import resolve_environment
from polytrope.pipeline.workflow.spec import TrackingSpec

# The copying process has its own patience: short requests, tried again for ever by itself, not by MLflow's client.
CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
# Exit codes of the copying process: all sent; failed (the reason is in `error_file`); all sent of a run that goes on;
# another process copies this run; all sent but for what MLflow refused.
EXIT_SENT, EXIT_FAILED, EXIT_UNFINISHED, EXIT_BUSY, EXIT_REFUSED = 0, 1, 3, 4, 5
_CHECK_SECONDS = 1.8  # for all of `check_tracking`, names looked up included
_FAILING_SECONDS = 2.0  # that a finished run waits for a server that is failing
_LONGEST_WAIT = 120.0  # seconds that a finished run waits for a server that goes on taking
_LONGEST_MIGRATION = 900.0  # seconds; no machine is so slow
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_START = "start it with `mlflow server --host 127.0.0.1`"


def error_file(run_directory: Path) -> Path:
    """Holds why MLflow could not be reached, while that is so."""
    return run_directory / "mlflow.error"


def busy_file(run_directory: Path) -> Path:
    """Is there while the copying process makes MLflow's database, which nobody may interrupt."""
    return run_directory / "mlflow.busy"


def log_file(run_directory: Path) -> Path:
    """What the copying process printed."""
    return run_directory / "logs" / "mlflow.log"


def tracking_uri(uri: str | None, store: Path) -> str:
    """The MLflow tracking URI: as configured, else MLFLOW_TRACKING_URI, else a sqlite file in the store."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or database_uri(store.absolute() / "mlflow.db")


def check_tracking(uri: str) -> None:
    """Refuse an address that cannot work, in less than two seconds and without importing MLflow.

    Raises:
        UserError: unknown scheme, directory that is not writable, server that does not answer.
    """
    found: list[UserError | None] = []

    def check() -> None:
        try:
            _check(uri)
            found.append(None)
        except UserError as error:
            found.append(error)

    thread = threading.Thread(target=check, daemon=True)  # looking up a name has no time limit of its own
    thread.start()
    thread.join(_CHECK_SECONDS)
    if not found:
        raise UserError(f"MLflow at {_public(uri)} does not answer within {_CHECK_SECONDS:g} s", _START)
    if found[0] is not None:
        raise found[0]


def _check(uri: str) -> None:
    parsed = urlparse(uri)
    if parsed.scheme in ("http", "https"):
        try:
            with urllib.request.urlopen(_health_request(uri), timeout=1.5):
                return
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return  # something answers there; a proxy may guard /health
            raise UserError(
                f"MLflow at {_public(uri)} answers with error {error.code}", "look at the server's log"
            ) from error
        except (urllib.error.URLError, OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise UserError(f"MLflow at {_public(uri)} does not answer: {reason}", _START) from error
    elif parsed.scheme == "sqlite":
        path = database_file(uri)
        target = path if path.exists() else next(parent for parent in path.absolute().parents if parent.exists())
        if not os.access(target, os.W_OK):
            raise UserError(f"MLflow's database {path} cannot be written", "choose another `tracking.uri`")
    elif kind := next((kind for kind in _DATABASE_PORTS if parsed.scheme.startswith(kind)), None):
        try:
            address = (parsed.hostname or "localhost", parsed.port or _DATABASE_PORTS[kind])
            socket.create_connection(address, timeout=1.5).close()
        except (OSError, ValueError) as error:
            raise UserError(
                f"MLflow's database {_public(uri)} does not answer: {error}", "start the database"
            ) from error
    elif parsed.scheme in ("", "file"):
        raise UserError(
            f"MLflow {uri}: its file store is deprecated and refuses to start", "use sqlite:///path/to/mlflow.db"
        )
    elif parsed.scheme != "databricks" and "+" not in parsed.scheme:  # MLflow plugins may bring schemes of their own
        raise UserError(
            f"MLflow {_public(uri)}: unknown kind of address `{parsed.scheme}`",
            "use http://HOST:PORT, sqlite:///FILE or postgresql://USER@HOST/DATABASE",
        )


def _health_request(uri: str) -> urllib.request.Request:
    """Of /health; a name and password in the address become a header, as MLflow's client does it."""
    request = urllib.request.Request(f"{without_password(uri).rstrip('/')}/health")
    if pair := _credentials(uri):
        request.add_header("Authorization", "Basic " + base64.b64encode(":".join(pair).encode()).decode())
    return request


def _credentials(uri: str) -> tuple[str, str] | None:
    """Name and password of an http address."""
    parsed = urlparse(uri)
    if parsed.scheme not in ("http", "https") or not parsed.username:
        return None
    return unquote(parsed.username), unquote(parsed.password or "")


def without_password(uri: str) -> str:
    """An http address without name and password: MLflow would print them. Others are left as they are."""
    return _public(uri) if _credentials(uri) else uri


def _public(uri: str) -> str:
    """The address without its password."""
    parsed = urlparse(uri)
    return parsed._replace(netloc=parsed.netloc.rpartition("@")[2]).geturl()


def _environment(uri: str, experiment: str | None) -> dict[str, str]:
    """Of the copying process. By environment, not by argument: an address can hold a password."""
    name_and_password = _credentials(uri)
    secrets = dict(zip(("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"), name_and_password or (), strict=False))
    return {
        **CLIENT_SETTINGS,
        **os.environ,
        **secrets,
        "MLFLOW_TRACKING_URI": without_password(uri),
        "POLYTROPE_EXPERIMENT": experiment or "",
    }


def start_sync(store: Store, run_directory: Path, tracking: TrackingSpec) -> subprocess.Popen[bytes]:
    """Start the process that copies a run to MLflow while it goes on. It ends by itself after the run.

    Its standard input is a pipe that nobody writes to: it closes with this process, whatever ends it.
    """
    uri = resolve_environment(tracking_uri(tracking.uri, store.local("")), os.environ)
    log_file(run_directory).parent.mkdir(exist_ok=True)
    with log_file(run_directory).open("ab") as log:
        return subprocess.Popen(
            [*_command(store, run_directory), "--follow"],
            env=_environment(uri, tracking.experiment),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the driver; this process still has to tell MLflow about it
        )


def wait_for_sync(process: subprocess.Popen[bytes], run_directory: Path, seconds: float) -> str | None:
    """Wait until MLflow has received everything, then end the process: `polytrope sync` does the rest.

    Not longer than `seconds` without progress, and not for a server that is failing.

    Returns:
        None if all is there, else what is wrong.
    """
    cursor, failure = run_directory / CURSOR_FILE, error_file(run_directory)
    start = moved = time.monotonic()
    stamp = 0.0
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return _verdict(process.wait(0.1), run_directory)
            now = time.monotonic()
            with contextlib.suppress(FileNotFoundError):
                if (latest := cursor.stat().st_mtime) != stamp:
                    stamp, moved = latest, now
            if now - start > _FAILING_SECONDS and failure.exists():
                return _first(failure)
            if busy_file(run_directory).exists() and now - start < _LONGEST_MIGRATION:
                moved = now
                continue
            if now - moved > seconds or now - start > _LONGEST_WAIT:
                return "it is slow"
    finally:
        process.kill()
        process.wait()
        if process.stdin:
            process.stdin.close()


def failed_sync(process: subprocess.Popen[bytes], run_directory: Path, seconds: float) -> str | None:
    """Wait a moment for MLflow and leave the process to end by itself; what is known to have gone wrong, else None."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return _verdict(process.wait(seconds), run_directory)
    return _first(error_file(run_directory)) or None


def _verdict(code: int, run_directory: Path) -> str | None:
    """What an exit code of the copying process says."""
    return {EXIT_SENT: None, EXIT_REFUSED: "a part was not taken"}.get(code, f"see {log_file(run_directory)}")


def known_failure(run_directory: Path) -> str:
    """Why MLflow has not taken a run so far; "" if nothing is known."""
    return _first(error_file(run_directory), 500)


def _first(file: Path, length: int = 160) -> str:
    try:
        text = file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
    return text if len(text) <= length else text[: length - 1] + "…"


def _command(store: Store, run_directory: Path) -> list[str]:
    return [sys.executable, "-m", "polytrope.pipeline.tracking.sync", str(run_directory), "--store", store.address]


def sync_now(store: Store, run_directory: Path, uri: str, experiment: str | None) -> tuple[int, str]:
    """Bring MLflow up to date with a run: (one of the exit codes above, why it failed)."""
    process = subprocess.run(
        _command(store, run_directory),
        env=_environment(uri, experiment),
        check=False,
    )
    return process.returncode, known_failure(run_directory) if process.returncode == EXIT_FAILED else ""


def server_command(uri: str, artifact_root: Path, host: str, port: int) -> list[str]:
    """The command line of an MLflow server on a tracking database."""
    return [
        *(sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port)),
        *("--backend-store-uri", uri, "--default-artifact-root", str(artifact_root), "--workers", "1"),
    ]


def running_server(uri: str) -> str | None:
    """http address of an MLflow server on this machine that shows a tracking database.

    None: there is none among the processes that this user may look at.
    """
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "mlflow" in words and "server" in words and uri in words:
            options = dict(itertools.pairwise(words))
            if "--host" in options and "--port" in options:
                return f"http://{options['--host']}:{options['--port']}"
    return None


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def check_port(host: str, port: int) -> None:
    """Refuse a port that cannot be listened on.

    Raises:
        UserError: says which process has it, as far as this user may know.
    """
    if not 0 < port < 65536:
        raise UserError(f"--port {port}: is no port", "give one from 1024 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server itself: a closed one is no use
            server.bind(address)
            server.listen()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise UserError(f"--host {host} --port {port}: cannot be listened on: {error}", "give others") from None
        raise UserError(
            f"--port {port}: is used by {_listener(port)}", f"end it, or give another one: `--port {free_port()}`"
        ) from None


def _listener(port: int) -> str:
    """`process 4711 (python -m http.server …)`."""
    import psutil

    with contextlib.suppress(psutil.Error):  # some systems show connections to root only
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if listens and connection.pid is not None:
                command = " ".join(psutil.Process(connection.pid).cmdline())
                return f"process {connection.pid} ({command[:100]}{'…' if len(command) > 100 else ''})"
    return "a process of another user"
