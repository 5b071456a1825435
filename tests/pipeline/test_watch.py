"""A run seen from another terminal: how far it is, by one source in every view, and never running when it is dead."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from dataclasses import dataclass
from pathlib import Path

import pytest

from polytrope.pipeline.commands.cli import main
from polytrope.pipeline.runs.spool import SpoolEvent
from polytrope.pipeline.runs.stage_progress import StageProgress, read_progress, said_lines
from polytrope.pipeline.stage import EventWriter

POLYTROPE = str(Path(sys.executable).with_name("polytrope"))
SLOW = '''
"""A stage that says how far it is and then waits to be let go."""
import time
from pathlib import Path
from polytrope.pipeline.stage import StageContext

def train(context: StageContext) -> dict[str, float]:
    """Ten thousand steps, of which it takes five."""
    context.progress(0, 10_000, "starting 2 workers")
    for step in range(1, 6):
        time.sleep(0.05)
        context.log_metrics({"train/loss": 2.31, "system/cpu": 1.0}, step=step)
        context.progress(step, 10_000, "loss 2.310 · 18.2k tokens/s")
    print("printed by hand")
    while not Path("go").exists():
        time.sleep(0.05)
    return {"loss": 2.31}
'''
WORKFLOW = "name: slow\nexecutor: local\ntracking: {enabled: false}\nstages:\n  train: {uses: slow_stages:train}\n"
STANDING = re.compile(r"5/10,000 · \d+ (s|min \d\d s) left · loss 2\.310 · 18\.2k tokens/s")


def progress(done: float, when: float, total: float = 100) -> dict[str, object]:
    return {"kind": "progress", "time": when, "done": done, "total": total, "message": "loss 2"}


def test_the_pace_is_of_the_steps_and_not_of_the_start() -> None:
    said = StageProgress()
    for done, when in ((0, 0.0), (10, 50.0), (20, 60.0), (30, 70.0)):  # 50 s to start, then a step a second
        said.add(progress(done, when))
    assert said.seconds_left(70.0) == 70.0
    assert said.seconds_left(75.0) == 65.0
    assert said.seconds_left(141.0) is None, "late by its pace: how long it takes is not known"
    assert said.text(75.0) == "30/100 · 1 min 05 s left · loss 2"
    assert said.text(170.0) == "30/100 · loss 2 · silent for 1 min 40 s"


def test_a_training_that_went_on_from_a_checkpoint_has_the_pace_of_what_it_does_now() -> None:
    said = StageProgress()
    for done, when in ((0, 0.0), (10, 1.0), (20, 2.0), (0, 5.0), (60, 8.0), (70, 18.0), (80, 28.0)):
        said.add(progress(done, when))
    assert said.seconds_left(28.0) == 20.0


def test_two_words_tell_no_pace() -> None:
    said = StageProgress()
    said.add(progress(0, 0.0))
    said.add(progress(50, 10.0))
    assert said.text(10.0) == "50/100 · loss 2"


def test_of_a_long_training_only_the_end_is_read(tmp_path: Path) -> None:
    directory = tmp_path / "spool" / "train" / "1"
    directory.mkdir(parents=True)
    with (directory / "host-1.jsonl").open("w") as file:
        for step in range(20_000):
            file.write(json.dumps(progress(step, float(step), 20_000)) + "\n")
            file.write(json.dumps({"kind": "metrics", "time": float(step), "step": step, "values": {"l": step}}) + "\n")
    said = read_progress(tmp_path, "train", 1)
    assert (said.done, said.seconds_left(19_999.0), said.metrics) == (19_999, 1.0, {"l": 19_999})
    assert read_progress(tmp_path, "train", 2).total == 0


def test_lines_of_several_processes_are_in_the_order_of_time() -> None:
    events = [
        SpoolEvent("train", 1, progress(2, 20.0)),
        SpoolEvent("train", 1, {"kind": "message", "time": 10.0, "text": "a"}),
    ]
    assert [line[10:] for line in said_lines(events)] == ["a\n", "2/100 · loss 2\n"]


@dataclass(frozen=True)
class Ended:
    """A command that was run in this process: less to wait for than one of its own."""

    code: int
    stdout: str
    stderr: str


class Terminal:
    """A command in a pseudo-terminal of 80 columns."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.descriptor, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}
        self.process = subprocess.Popen(
            [POLYTROPE, *arguments], cwd=directory, stdin=other, stdout=other, stderr=other, env=environment
        )
        os.close(other)
        self.text = ""

    def read(self) -> bool:
        try:
            self.text += os.read(self.descriptor, 1 << 16).decode(errors="replace")
        except OSError:  # its end
            self.process.wait(timeout=30)
            return False
        return True

    def until(self, pattern: re.Pattern[str]) -> None:
        while not pattern.search(self.plain()) and self.process.poll() is None:
            self.read()
        assert pattern.search(self.plain()), self.plain()

    def plain(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text)

    def ended(self) -> int:
        while self.read():  # its last picture may still be there when the process is not
            pass
        os.close(self.descriptor)
        return self.process.returncode


@pytest.mark.timeout(120)
def test_every_view_shows_how_far_a_stage_is_and_none_shows_a_dead_one_as_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: str) -> Ended:
        capsys.readouterr()
        code = main(arguments)
        return Ended(code, *capsys.readouterr())

    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow_stages.py").write_text(SLOW)
    (tmp_path / "w.yaml").write_text(WORKFLOW)
    run = Terminal(tmp_path, "run", "w.yaml", "--run-id", "r1")
    try:
        run.until(STANDING)
        assert all(len(line) <= 80 for line in run.plain().replace("\r", "\n").split("\n") if "/10,000" in line)

        shown = command("status").stdout
        assert STANDING.search(shown), shown
        (stage,) = json.loads(command("status", "--json").stdout)["stages"]
        assert (stage["progress"]["done"], stage["progress"]["total"]) == (5, 10_000)
        assert 0 < stage["progress"]["seconds_left"] < 10_000
        assert stage["progress"]["metrics"] == {"train/loss": 2.31}
        logs = command("logs").stdout.splitlines()
        assert logs[0] == "==> train <=="
        assert [line[10:] for line in logs[1:3]] == [
            "0/10,000 · starting 2 workers", "1/10,000 · loss 2.310 · 18.2k tokens/s",
        ]  # fmt: skip
        assert logs[-1] == "printed by hand"
        assert command("logs", "--tail", "2").stdout.splitlines()[1:] == logs[-2:]
        assert "leave one of them out" in command("status", "--watch", "--json").stderr

        watching = Terminal(tmp_path, "status", "--watch")
        watching.until(STANDING)
        left = Terminal(tmp_path, "status", "--watch")
        left.until(STANDING)
        left.process.send_signal(signal.SIGINT)  # Ctrl-C leaves the watch, not the run
        assert left.ended() == 0
        assert "run r1 is left alone; to stop it: polytrope cancel r1" in left.plain()
        assert "interrupted" not in left.plain()

        lines = subprocess.Popen(
            [POLYTROPE, "status", "-w"], cwd=tmp_path, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        assert lines.stdout is not None
        assert "train: running" in lines.stdout.readline()
    finally:
        run.process.kill()  # the driver, with nothing to say good-bye
        run.ended()
    assert watching.ended() == 1
    last_picture = watching.plain().rsplit("■", 1)[1]
    assert "interrupted" in last_picture
    assert "running" not in last_picture
    rest, _ = lines.communicate(timeout=30)
    assert lines.returncode == 1
    for view in (rest.split("\n\n", 1)[1], command("status").stdout, command("runs").stdout):
        assert "interrupted" in view
        assert "running" not in view
    assert "got to 5/10,000" in command("status").stdout
    (stage,) = json.loads(command("status", "--json").stdout)["stages"]
    assert (stage["state"], stage["progress"]) == ("interrupted", None)
    assert "running" not in command("graph", "w.yaml", "--run", "r1").stdout

    (tmp_path / "go").touch()
    assert command("resume", "-q").code == 0
    assert "succeeded" in command("status", "--watch").stdout


def test_a_tail_that_begins_inside_a_line_begins_with_the_next_one(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path / "spool" / "train" / "1")
    writer.append("metrics", step=1, values={"kind": 1.0, "x" * 300_000: 2.0})
    writer.append("message", text="the end")
    said = read_progress(tmp_path, "train", 1)
    assert (said.message, said.metrics) == ("the end", {})
