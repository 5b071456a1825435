"""Streams that may stop taking text while there is work to do: a pipe whose reader left, a full disk, a closed one;
or that never took all of it: a terminal whose character set has no arrow."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TextIO


def let_go(stream: TextIO | None) -> None:
    """Send what is still in the stream, and all that follows, to nowhere: its last flush must not fail either."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())  # type: ignore[union-attr]
        os.close(descriptor)


def occupy_standard_descriptors() -> None:
    """Where stdin, stdout or stderr are closed, put nothing there: the next file that is opened would be it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: this one
            os.set_inheritable(descriptor, True)


def show_what_can_be_shown() -> None:
    """Print `?` for a character that the locale's encoding lacks: what a person is told must not fail on an arrow."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="replace")


class Output:
    """What a run says to a person. If nobody can hear it any more the run goes on, and stderr says so once."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        shown = text.encode(self.encoding, "replace").decode(self.encoding)  # the stream may be another program's
        self._try("write", shown)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError("closed")
        return self._stream.fileno()

    def _try(self, method: str, *arguments: str) -> None:
        if self._stream is None:
            return
        try:
            getattr(self._stream, method)(*arguments)
        except (OSError, ValueError) as error:
            let_go(self._stream)
            self._stream = None
            with contextlib.suppress(OSError, ValueError):
                print(f"polytrope: the output cannot be written any more ({error}); the run goes on", file=sys.stderr)
