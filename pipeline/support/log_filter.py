"""The process between a stage that knows secrets and its log: nothing of a secret is ever in the file.

`python -I -S log_filter.py CHANNEL`, stdin: the pipe that the stage and all below it print to; stdout: the log. It gets
the forms of the secrets over the channel, ends when nobody holds the pipe any more, and so outlives a killed stage for
as long as something is left to read. Only the standard library, and little of it: it starts in milliseconds.

What may be the beginning of a secret is held back until more arrives; everything else is written at once.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys

END = b"\n"  # from the stage: it has printed everything. Answered when that is in the log
_CHUNK = 1 << 16
_WHOLE_ENOUGH = 0.5  # share of a secret at the very end of the output that is hidden like the whole


class Filter:
    """Replaces forms of secrets in a stream of bytes. `forms`: (bytes as printed, what stands for them)."""

    def __init__(self, forms: list[tuple[bytes, bytes]]) -> None:
        self.forms = sorted(forms, key=lambda item: -len(item[0]))
        self.held = b""

    def feed(self, data: bytes) -> bytes:
        """What may be written now that `data` has come."""
        text = self.held + data
        end = min((len(text) - self._begun(text, form) for form, _ in self.forms), default=len(text))
        while (earlier := min((self._across(text, form, end) for form, _ in self.forms), default=end)) < end:
            end = earlier
        self.held = text[end:]
        return self._hide(text[:end])

    def finish(self) -> bytes:
        """The rest: nothing more will come."""
        text, self.held = self.held, b""
        text = self._hide(text)
        for form, name in self.forms:
            begun = self._begun(text, form)
            if begun > _WHOLE_ENOUGH * len(form):
                return text[: len(text) - begun] + name
        return text

    def _hide(self, text: bytes) -> bytes:
        for form, name in self.forms:
            text = text.replace(form, name)
        return text

    @staticmethod
    def _begun(text: bytes, form: bytes) -> int:
        """Bytes at the end of the text that may be the beginning of the form."""
        start = text.find(form[:1], max(0, len(text) - len(form) + 1))
        while start >= 0:
            if form.startswith(text[start:]):
                return len(text) - start
            start = text.find(form[:1], start + 1)
        return 0

    @staticmethod
    def _across(text: bytes, form: bytes, end: int) -> int:
        """Where a whole form begins that a cut at `end` would part."""
        start = text.find(form, max(0, end - len(form) + 1), end + len(form) - 1)
        return start if 0 <= start < end else end


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # whoever ends the stage ends what it printed with, by closing the pipe
    channel = int(sys.argv[1])
    message = b""
    while not message.endswith(b"\n"):
        part = os.read(channel, _CHUNK)
        if not part:  # the stage was killed before it printed anything
            return
        message += part
    forms = [(bytes.fromhex(form), bytes.fromhex(name)) for form, name in json.loads(message)]
    _Pump(Filter(forms), channel).run()


class _Pump:
    """From stdin to stdout, with the stage's one question. `problem`: `errno` of the first write that failed."""

    def __init__(self, stream: Filter, channel: int) -> None:
        self.stream, self.channel, self.problem = stream, channel, 0

    def run(self) -> None:
        printed, asked = select.poll(), select.poll()  # not `select.select`: the channel's number may be a large one
        printed.register(0, select.POLLIN)
        asked.register(0, select.POLLIN)
        asked.register(self.channel, select.POLLIN)
        poll = asked
        while True:
            if self.channel in [descriptor for descriptor, _ in poll.poll()]:
                poll = printed
                if os.read(self.channel, 1) == END:
                    while printed.poll(0):
                        if not self.take():
                            return self.finish()
                    self.answer(ended=False)  # something that the stage started may still print
            elif not self.take():
                return self.finish()

    def take(self) -> bool:
        """One portion; False: nobody can print any more."""
        data = os.read(0, _CHUNK)
        self.write(self.stream.feed(data) if data else b"")
        return bool(data)

    def finish(self) -> None:
        self.write(self.stream.finish())
        self.answer(ended=True)

    def write(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(1, data) :]
        except OSError as error:  # the stage is told at its end; until then it must be able to go on printing
            self.problem = self.problem or error.errno or 1

    def answer(self, *, ended: bool) -> None:
        """`errno` of what went wrong (0: nothing), and whether this process ends now."""
        try:
            os.write(self.channel, b"%d %d\n" % (self.problem, ended))
        except OSError:  # the stage is gone, or has its answer
            self.problem = 0


if __name__ == "__main__":
    main()
