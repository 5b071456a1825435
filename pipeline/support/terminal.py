"""What a terminal can show: its width, and colours by state where somebody looks at them."""

from __future__ import annotations

import math
import os
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import TextIO

# ANSI codes by the first word of a state, an action of a plan, or a verdict.
_COLOURS = {
    "running": "1;36",
    "retrying": "33",
    "succeeded": "32",
    "cached": "32",
    "stored": "32",
    "equal": "32",
    "failed": "1;31",
    "differs": "1;31",
    "interrupted": "33",
    "cancelled": "33",
    "skipped": "2",
    "pending": "2",
    "will": "36",
    "may": "36",
}
_COLOURED = ("state", "status", "plan", "verdict")  # headers of columns
_SHORT = 12
_NARROW = 24  # of a last column
_MOST_LINES = 3  # of a cell of a narrow one
_BETWEEN = " · "  # figures: `loss 2.31 · lr 0.001`
_JOINED = "\ue000"  # a space that no line ends at; of Unicode's private area


def columns(stream: TextIO | None) -> int | None:
    """Characters per line; None where the stream is no terminal, so that whoever reads it gets whole lines."""
    return shutil.get_terminal_size().columns if stream is not None and stream.isatty() else None


def coloured(stream: TextIO | None) -> bool:
    """Whether colours are shown: on a terminal that has them, unless $NO_COLOR says otherwise (no-color.org)."""
    here = stream is not None and stream.isatty()
    return here and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def wrapped(text: str, width: int | None) -> str:
    """Every line folded between words to the width, its further lines indented.

    Words that are longer, and commands, stay whole: in back quotes, or behind a colon at the end of a line.
    """
    if width is None:
        return text
    lines = []
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())] + "  "
        lines += _folded(line, width, indent) or [""]
    return "\n".join(lines)


def _folded(line: str, width: int, indent: str = "") -> list[str]:
    """One line as several, of `width` at most unless a word or what belongs together is longer."""

    if len(line) <= width:
        return [line.rstrip()] if line.strip() else []

    def together(match: re.Match[str]) -> str:
        return match[0].replace(" ", _JOINED)

    joined = re.sub(r"`[^`]*`|(?<=: )polytrope [a-z].*", together, line)
    if _BETWEEN in joined:  # a figure stays beside its name
        joined = re.sub(r"(?<=· )[^·]+(?= ·)|(?<=· )[^·]+$|\S+ \S+(?= ·)", together, joined)
    folded = textwrap.wrap(joined, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return [part.replace(_JOINED, " ") for part in folded]


def table(rows: Sequence[Sequence[str]], width: int | None, colour: bool) -> list[str]:
    """Lines of left-aligned columns; the first row is the header.

    Where the width is not enough, the widest columns are folded between words. No word is cut: a last cell that has no
    room, or would be a tower of single words, stands below its row, and where the words of the other columns leave no
    room, each row becomes a paragraph.
    """
    painted = [index for index, name in enumerate(rows[0]) if colour and name in _COLOURED]
    every = range(len(rows[0]))
    widths = [max(len(row[column]) for row in rows) for column in every]
    below: set[int] = set()
    if width is not None:
        parts = [[_longest_part(cell) for cell in row] for row in rows]
        words = [max(row[column] for row in parts) for column in every]
        left = width - sum(size + 2 for size in words[:-1])
        tall = _MOST_LINES * left if left < _NARROW else math.inf
        below = {number for number, row in enumerate(parts) if row[-1] > left or len(rows[number][-1]) > tall}
        if below and left < _SHORT:
            return [line for row in rows[1:] for line in _paragraph(rows[0], row, width, painted)]
        widths[-1] = max(len(row[-1]) for number, row in enumerate(rows) if number not in below)
        words[-1] = max(row[-1] for number, row in enumerate(parts) if number not in below)
        while sum(widths) > width - 2 * (len(widths) - 1):
            widest = max(every, key=lambda column: widths[column] * (widths[column] > words[column]))
            widths[widest] -= 1
    lines = []
    for number, row in enumerate(rows):
        beside_row = [*row[:-1], ""] if number in below else row
        cells = [
            [cell] if width is None else _folded(cell, size) or [""]
            for cell, size in zip(beside_row, widths, strict=True)
        ]
        codes = {index: _COLOURS.get(row[index].partition(" ")[0]) for index in painted if number}
        for part in range(max(map(len, cells))):
            texts = [cell[part] if part < len(cell) else "" for cell in cells]
            line = [text.ljust(size) for text, size in zip(texts, widths, strict=True)]
            line[-1] = texts[-1]
            for index, code in codes.items():
                if texts[index]:
                    line[index] = _painted(texts[index], code) + " " * (len(line[index]) - len(texts[index]))
            lines.append("  ".join(line).rstrip())
        if number in below and width is not None:
            lines += _folded(f"    {row[-1]}", width, "    ")
    return lines


def _paragraph(header: Sequence[str], row: Sequence[str], width: int, painted: Sequence[int]) -> list[str]:
    """A row as `first` and, below it, `  name: cell` for every other cell that is not empty."""
    lines = []
    for index, (name, cell) in enumerate(zip(header, row, strict=True)):
        label = f"  {name}: " if index and name else "  " if index else ""
        code = _COLOURS.get(cell.partition(" ")[0]) if index in painted else None
        folded = _folded(label + cell, width, "    ") if cell else []
        lines += [_painted(line, code, len(label)) if number == 0 else line for number, line in enumerate(folded)]
    return lines


def _painted(text: str, code: str | None, start: int = 0) -> str:
    return text if code is None else f"{text[:start]}\x1b[{code}m{text[start:]}\x1b[0m"


def _longest_part(cell: str) -> int:
    """Characters of what is never folded: its longest word, or all of a short one such as `3 min 05 s`."""
    return len(cell) if len(cell) <= _SHORT else max(map(len, _folded(cell, 1)), default=0)
