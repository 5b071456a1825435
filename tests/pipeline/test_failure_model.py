"""The page on failures names tests that exist, and names one for every failure and for every odd thing it is given."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_failure_of_the_page_is_held_by_a_test_that_exists() -> None:
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    page = (ROOT / "docs" / "failure-model.md").read_text()
    rows = re.findall(r"^\| .*(?<!\| held by the test) \|$", page, re.MULTILINE)
    assert len(rows) > 60
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert set(named) <= defined, row
