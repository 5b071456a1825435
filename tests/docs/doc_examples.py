"""The fenced examples of the documentation, and how each kind is run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
FENCE = re.compile(r"^(?P<indent> *)```(?P<head>[^`\n]*)\n(?P<body>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)
SKIP = re.compile(r"<!-- not run: (?P<reason>[^>]+?) -->\s*\Z")
KINDS = ("python", "console", "yaml")


@dataclass(frozen=True)
class Example:
    """One fenced block. `title`: the file it is. `skipped`: why it is not run, if it says so."""

    page: str
    line: int
    kind: str
    title: str
    body: str
    skipped: str

    @property
    def place(self) -> str:
        return f"docs/{self.page}:{self.line}"


def pages() -> list[str]:
    """All pages with something to run, sorted."""
    found = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    return [page for page in found if any(not example.skipped for example in examples(page))]


def examples(page: str) -> list[Example]:
    """The blocks of a page in `KINDS`."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        kind, _, options = match["head"].strip().partition(" ")
        if kind not in KINDS:
            continue
        title = re.search(r'title="([^"]+)"', options)
        marker = SKIP.search(text[: match.start()])
        indent = match["indent"]
        body = "".join(line.removeprefix(indent) for line in match["body"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start()) + 1
        found.append(Example(page, line, kind, title[1] if title else "", body, marker["reason"] if marker else ""))
    return found


def commands(body: str) -> list[tuple[str, list[str]]]:
    """(command, lines it must print) of a console block; `…` in a line stands for anything."""
    found: list[tuple[str, list[str]]] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif line.strip():
            found[-1][1].append(line.rstrip())
    return found


def missing_line(expected: list[str], output: str) -> str | None:
    """The first expected line that does not come in the output, in order; None if all do."""
    lines = iter(output.splitlines())
    for wanted in expected:
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in wanted.split("…")))
        if not any(pattern.fullmatch(line.strip()) or pattern.match(line.strip()) for line in lines):
            return wanted
    return None
