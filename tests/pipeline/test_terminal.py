"""What a person sees in a terminal of 80 and of 120 columns: everything fits, states have colours."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from polytrope.pipeline.commands.cli import build_parser, main
from polytrope.pipeline.support.terminal import table, wrapped

STAGES = """\
from polytrope.pipeline.stage import Artifact, StageContext

def make(context: StageContext, lines: int = 3) -> dict[str, float]:
    context.progress(lines, lines, "written, and this is a message of several words that go on and on and on")
    return {f"a_metric_with_a_long_name_{index}": index for index in range(6)}

def fail(source: Artifact) -> None:
    raise RuntimeError("made to fail, with a reason that takes more than one line on a terminal of eighty columns")
"""
WORKFLOW = """\
name: demo
executor: local
tracking: {enabled: false}
stages:
  make_with_a_name_that_is_rather_long:
    uses: terminal_test_stages:make
    matrix: {lines: [1, 2]}
    with: {lines: "${matrix.lines}"}
  fail:
    uses: terminal_test_stages:fail
    inputs: {source: "make_with_a_name_that_is_rather_long[lines=1]"}
    retries: 0
"""
GOOD = """\
name: a-workflow-whose-name-is-long
executor: local
tracking: {enabled: false}
params: {lines: 3}
stages:
  make_with_another_name_that_is_long:
    uses: terminal_test_stages:make
    with: {lines: "${params.lines}"}
"""
STAGE = "make_with_another_name_that_is_long"
RUNS = "20261127-0412-ab12-the-first-of-two", "20261127-0413-cd34-the-second-of-two"
ALIAS = "the-best-result-of-this-november"
COMMANDS = {
    "help": ["--help"],
    "run help": ["run", "--help"],
    "stages": ["stages"],
    "stages train": ["stages", "train"],
    "validate": ["validate", "w.yaml"],
    "plan": ["plan", "w.yaml"],
    "run": ["run", "w.yaml", "--keep-going"],
    "status": ["status"],
    "runs": ["runs"],
    "plan again": ["plan", "w.yaml"],
    "refused": ["validate", "w.yaml", "--set", "stages.fail.uses=no_such_module_in_this_world:function"],
    "unknown": ["rnu"],
    "run good": ["run", "g.yaml", "--run-id", RUNS[0]],
    "run other": ["run", "g.yaml", "--run-id", RUNS[1], "--set", "params.lines=4"],
    "all runs": ["runs"],
    "explain": ["explain", "g.yaml", STAGE, "--set", "params.lines=5"],
    "diff": ["diff", *RUNS],
    "alias": ["alias", ALIAS, RUNS[0], STAGE],
    "aliases": ["alias"],
    "verify": ["verify", "--all"],
    "reproduce": ["reproduce", RUNS[0]],
    "gc": ["gc", "--dry-run", "--keep-runs", "1"],
}
FIGURES = [f"a_metric_with_a_long_name_{index} {index}" for index in range(6)]
WHOLE = {  # what a narrow terminal may neither cut nor part
    "status": ["make_with_a_name_that_is_rather_long[lines=1]", "fail"],
    "plan": ["make_with_a_name_that_is_rather_long[lines=2]", "will run"],
    "run good": [STAGE, *FIGURES, f"run {RUNS[0]} succeeded"],
    "all runs": [*RUNS, "a-workflow-whose-name-is-long"],
    "explain": [STAGE],
    "diff": [*RUNS, STAGE],
    "aliases": [ALIAS, RUNS[0], STAGE],
    "reproduce": [STAGE, "identical"],
}
PROGRAM = """\
import json, sys
from polytrope.pipeline.commands.cli import main
for name, arguments in json.loads(sys.argv[1]).items():
    print(f"<<<{name}>>>", flush=True)
    try:
        code = main(arguments)
    except SystemExit as left:
        code = left.code
    print(f"<<<code {code}>>>", flush=True)
"""


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="t") as name:
        (Path(name) / "terminal_test_stages.py").write_text(STAGES)
        (Path(name) / "w.yaml").write_text(WORKFLOW)
        (Path(name) / "g.yaml").write_text(GOOD)
        yield Path(name)


def in_terminal(place: Path, width: int, commands: dict[str, list[str]] = COMMANDS, **variables: str) -> dict[str, str]:
    """What each of the commands printed in one process with a terminal of this width."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        cwd=place,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**environment, "TERM": "xterm-256color", **variables},
    )
    os.close(follower)
    data = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # Linux says so when the last process has closed the terminal
            break
        if not part:
            break
        data += part
    os.close(leader)
    assert process.wait(60) == 0, data.decode(errors="replace")
    parts = re.split(r"<<<([\w ]+)>>>", data.decode())[1:]
    return {name: text for name, text in zip(parts[::2], parts[1::2], strict=True) if not name.startswith("code")}


def visible(text: str) -> list[str]:
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", text)]


@pytest.fixture(scope="module")
def narrow(place: Path) -> dict[str, str]:
    return in_terminal(place, 80)


@pytest.mark.parametrize(("width", "variables"), [(80, {}), (120, {"NO_COLOR": "1"})])
def test_everything_fits_the_terminal(
    place: Path, narrow: dict[str, str], width: int, variables: dict[str, str]
) -> None:
    shown = narrow if width == 80 else in_terminal(place, width, FIRST, **variables)
    assert set(shown) == set(COMMANDS if width == 80 else FIRST)
    for name, text in shown.items():
        lines = visible(text)
        assert any(lines), name
        for line in lines:
            assert len(line) <= width, (name, len(line), line)
        for whole in WHOLE.get(name, ()):
            assert any(whole in line for line in lines), (name, whole, lines)
    for name, word in (("status", "failed"), ("plan", "will run"), ("runs", "failed"), ("plan again", "stored")):
        assert word in shown[name]
        assert ("\x1b[" in shown[name]) == (not variables), name
    assert "did you mean `run`?" in shown["unknown"]
    assert "No module named" in " ".join(visible(shown["refused"]))


@pytest.mark.usefixtures("narrow")  # which made what is shown
def test_a_narrower_one_shows_all_that_a_pipe_gets(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = in_terminal(place, 40, {name: COMMANDS[name] for name in TABLES})
    monkeypatch.chdir(place)
    for name in TABLES:
        capsys.readouterr()
        main(COMMANDS[name])
        words = set(capsys.readouterr().out.split()) - {"stage", "run", "alias"}  # a paragraph needs no first header
        found = {word for line in visible(shown[name]) for word in line.split()}
        assert words
        assert words <= found | {word.removesuffix(":") for word in found}, name


FIRST = dict(list(COMMANDS.items())[:12])
TABLES = ("stages", "status", "all runs", "plan again", "aliases", "verify", "explain")


def test_help_of_each_command_fits_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    parser = build_parser()
    for name, command in parser._commands().items():
        for line in command.format_help().splitlines():
            assert len(line) <= 80, (name, line)


def test_json_is_all_that_is_printed(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    (place / "talkative_stages.py").write_text('print("a word at import")\n' + STAGES)
    (place / "w.yaml").write_text(WORKFLOW.replace("terminal_test_stages", "talkative_stages"))
    with_json = {
        name
        for name, command in build_parser()._commands().items()
        if any("--json" in action.option_strings for action in command._actions)
    }
    examples = {
        "plan": [["plan", "w.yaml", "--json"]],
        "status": [["status", "--json"]],
        "runs": [["runs", "--json"], ["runs", "--json", "--store", "empty"]],
        "diff": [["diff", RUN, RUN, "--json"]],
        "stages": [["stages", "--json"], ["stages", "train", "--json"]],
    }
    assert main(["run", "w.yaml", "--quiet", "--run-id", RUN]) == 1
    capsys.readouterr()
    assert set(examples) == with_json
    for arguments in (item for items in examples.values() for item in items):
        main(arguments)
        json.loads(capsys.readouterr().out)


RUN = "mine"


def test_a_table_is_folded_to_its_width_and_whole_where_nobody_looks() -> None:
    rows = [["stage", "because"], ["train", "one two three four five six seven"], ["x" * 30, "y"]]
    assert table(rows, None, False)[1] == f"{'train'.ljust(30)}  one two three four five six seven"
    assert table(rows, 46, False)[1:3] == [
        f"{'train'.ljust(30)}  one two three",
        f"{''.ljust(30)}  four five six",
    ]
    assert table(rows, 30, False) == [  # no word is cut
        "train",
        "  because: one two three four",
        "    five six seven",
        "x" * 30,
        "  because: y",
    ]
    path = [
        ["stage", "state", "result"],
        ["a", "failed", "not found: /a/path/that/is/long"],
        ["b", "cached", "x 1 · y 2"],
    ]
    assert table(path, 33, False) == [
        "stage  state   result",
        "a      failed",
        "    not found:",
        "    /a/path/that/is/long",
        "b      cached  x 1 · y 2",
    ]
    assert table([["state", "result"], ["cached", "loss 1.234 · rate 5.678"]], 22, False)[1:] == [
        "cached  loss 1.234 ·",
        "        rate 5.678",
    ]
    assert table([["state"], ["failed"]], None, True)[1] == "\x1b[1;31mfailed\x1b[0m"
    assert wrapped("  → one two three", 10).splitlines() == ["  → one", "    two", "    three"]
    command = "polytrope resume mine --store /a/store"
    assert wrapped(f"go on: {command}", 12).splitlines() == ["go on:", f"  {command}"]
    assert wrapped(f"see `{command}` for it", 12).splitlines() == ["see", f"  `{command}`", "  for it"]
