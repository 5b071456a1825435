"""Where a stage's output goes: its log, without the values of secrets from the first byte on."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from polytrope.pipeline.support import log_filter
from polytrope.pipeline.support.secret_values import printed_forms


@contextlib.contextmanager
def output_to(path: Path, secrets: Mapping[str, str]) -> Iterator[None]:
    """Send stdout and stderr of this process, down to the file descriptors, to the end of a file.

    Inside, `sys.stdout` and `sys.stderr` are streams of their own: a stage may close or replace them. With secrets, a
    process that hides them stands between (`log_filter`): the file never holds their values, whatever is killed.

    Raises:
        OSError: the log cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    flush_output()
    streams, saved = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        with _hidden(log, printed_forms(secrets)) as descriptor:
            try:
                for number in (1, 2):
                    os.dup2(descriptor, number)
                if descriptor != log:
                    os.close(descriptor)
                sys.stdout, sys.stderr = (
                    os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)
                    for number in (1, 2)
                )
                yield
            finally:
                flush_output()
                sys.stdout, sys.stderr = streams
                flush_output()
                for number, before in zip((1, 2), saved, strict=True):
                    os.dup2(before, number)
                    os.close(before)
    finally:
        os.close(log)


@contextlib.contextmanager
def _hidden(log: int, forms: list[tuple[bytes, bytes]]) -> Iterator[int]:
    """A descriptor to print to, whose other end is the log; the caller closes it if it is another than `log`."""
    if not forms:
        yield log
        return
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    with ours:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", log_filter.__file__, str(theirs.fileno())],
                stdin=reading,
                stdout=log,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        os.close(reading)
        pairs = [[form.hex(), name.hex()] for form, name in forms]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # killed already: seen at the end
            ours.sendall(json.dumps(pairs).encode() + b"\n")
        try:
            yield writing
        finally:
            answer = _answer(ours)
            if not answer or answer[1]:  # it ended; otherwise it waits for what the stage started
                process.wait()
    if not answer:
        raise OSError("the process that keeps secrets out of the log was killed: the log has an end missing")
    if answer[0]:
        raise OSError(answer[0], f"the log cannot be written: {os.strerror(answer[0])}")


def _answer(channel: socket.socket) -> list[int]:
    """Wait until all that was printed is in the log: [errno, whether the filter ends]; [] if it was killed."""
    answer = b""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it ended already: its answer is there to read
        channel.sendall(log_filter.END)
    with contextlib.suppress(ConnectionResetError):
        while not answer.endswith(b"\n") and (part := channel.recv(32)):
            answer += part
    return [int(word) for word in answer.split()[:2]]


def flush_output() -> None:
    """Flush stdout and stderr; they may be closed, absent, or anything that a stage put in their place."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
