"""What a stage prints of a secret is never in its log, at no moment and whatever is killed."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import psutil
import pytest
from engine_support import Place, gone, start_driver, wait_for

from polytrope.pipeline.runs.journal import fold, read
from polytrope.pipeline.support.log_filter import Filter
from polytrope.pipeline.support.secret_values import secret_forms

SECRET = 'p"ä55 wörd/with%all\\of+it'
FORMS = {SECRET, repr(SECRET)[1:-1], json.dumps(SECRET)[1:-1], quote(SECRET), quote_plus(SECRET), SECRET[:-2]}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("TEST_TOKEN", SECRET)
    return Place(tmp_path)


def telling(place: Place, **parameters: Any) -> dict[str, Any]:
    there = str(place.directory / "there")
    return {
        "s": {
            "uses": "tell_secret",
            "retries": 0,
            "with": {"secret": "${env.TEST_TOKEN}", "there": there, **parameters},
        }
    }


def log(place: Place) -> str:
    (path,) = (place.directory / "store").glob("runs/*/logs/s/1.log")
    return path.read_text(encoding="utf-8")


def nowhere(place: Place) -> bool:
    files = [path for path in (place.directory / "store").rglob("*") if path.is_file()]
    return not any(form.encode() in path.read_bytes() for form in FORMS for path in files)


NAME = "${env.TEST_TOKEN}"
HIDDEN = f"in every form\nconnecting with\n{NAME}\n'{NAME}'\n" + f'{{"token": "{NAME}"}}\n{NAME}\n{NAME}\n'
PARTS = f"in two parts: {NAME}\nchild {NAME}\nat the end {NAME}"


def test_the_log_of_a_stage_that_ends_has_every_word_but_the_secret(place: Place) -> None:
    state = place.run(telling(place, first="in every form"))
    assert state.status == "succeeded"
    assert log(place) == HIDDEN + PARTS + "\n"
    assert nowhere(place)


def test_a_secret_is_in_no_file_while_its_stage_runs_or_after_both_were_killed(place: Place) -> None:
    stages = telling(place, first="in every form", wait=True)
    driver = start_driver(place, stages)
    stage = int(wait_for(place.directory / "there"))
    assert nowhere(place)
    log_filters = [child for child in psutil.Process(driver.pid).children(recursive=True) if is_filter(child)]
    assert len(log_filters) == 1
    assert SECRET not in " ".join(log_filters[0].cmdline())
    os.kill(stage, signal.SIGKILL)
    assert driver.wait() is not None
    assert gone([log_filters[0].pid])
    assert fold(read(place.store.run_directory("mine"))).status == "failed"
    assert log(place) == HIDDEN + PARTS + NAME  # also what was cut short
    assert nowhere(place)


def test_a_killed_driver_leaves_a_whole_log_without_the_secret(place: Place) -> None:
    driver = start_driver(place, telling(place, first="in every form", wait=True))
    wait_for(place.directory / "there")
    below = [child.pid for child in psutil.Process(driver.pid).children(recursive=True)]
    driver.kill()
    driver.wait()
    assert gone(below)
    assert log(place) == HIDDEN + PARTS + NAME
    assert nowhere(place)


def is_filter(process: psutil.Process) -> bool:
    return any(part.endswith("log_filter.py") for part in process.cmdline())


def test_a_stage_without_secrets_has_no_filter(place: Place) -> None:
    driver = start_driver(
        place,
        {
            "s": {
                "uses": "tell_secret",
                "with": {"secret": "open", "there": str(place.directory / "there"), "wait": True},
            }
        },
    )
    wait_for(place.directory / "there")
    assert not any(is_filter(child) for child in psutil.Process(driver.pid).children(recursive=True))
    assert "connecting with\nopen\n" in log(place)
    driver.kill()
    driver.wait()


PEM = (
    "-----BEGIN KEY-----\n"
    + "\n".join("MIIEvQIBADANBg" + "kqhkiG9w0BAQ"[:number] for number in (3, 9, 12))
    + "\nAQAB\n-----END KEY-----\n"
)


@pytest.mark.parametrize(
    "secrets", [{"A": "secretab", "B": "abX"}, {"A": "aab"}, {"A": "abcd", "B": "abcdefgh"}, {"KEY": PEM}]
)
def test_however_the_output_is_cut_what_is_written_is_the_same(secrets: dict[str, str]) -> None:
    forms = [(form.encode(), f"<{name}>".encode()) for form, name in secret_forms(secrets).items()]
    value = "".join(secrets.values())
    text = f"{value} aaab {value[1:]}abab{value} abcdef {value}ab secretabX -----BEGIN {value}.\n".encode()
    whole = Filter(forms)
    expected = whole.feed(text) + whole.finish()
    assert not any(form in expected for form, _ in forms)
    numbers = random.Random(1)
    for _ in range(60):
        pieces, stream, rest = [], Filter(forms), text
        while rest:
            size = numbers.choice([1, 1, 2, 3, 7, 40])
            pieces.append(stream.feed(rest[:size]))
            rest = rest[size:]
        pieces.append(stream.finish())
        assert b"".join(pieces) == expected


def test_what_cannot_be_the_beginning_of_a_secret_is_written_at_once() -> None:
    stream = Filter([(b"hunter2", b"<T>")])
    assert stream.feed(b"loss 1.25 (no newline)") == b"loss 1.25 (no newline)"
    assert stream.feed(b" hunt") == b" "
    assert stream.feed(b"ing") == b"hunting"
    assert stream.feed(b" with hunter") == b" with "
    assert stream.finish() == b"<T>"  # most of it


def test_a_log_that_cannot_be_written_fails_the_stage_with_the_reason() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    from polytrope.pipeline.executors.stage_output import output_to

    with pytest.raises(OSError, match="No space left"), output_to(Path("/dev/full"), {"T": SECRET}):
        print("x")
