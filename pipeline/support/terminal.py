"""What a terminal can show: its width, and colours by state where somebody looks at them."""

from __future__ import annotations

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
_NARROWEST = 8
_SHORT = 12
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
        joined = re.sub(r"`[^`]*`|(?<=: )polytrope [a-z].*", lambda match: match[0].replace(" ", _JOINED), line)
        folded = textwrap.wrap(joined, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        lines += [part.replace(_JOINED, " ") for part in folded] or [""]
    return "\n".join(lines)


def table(rows: Sequence[Sequence[str]], width: int | None, colour: bool) -> list[str]:
    """Lines of left-aligned columns; the first row is the header.

    Where the width is not enough, the widest columns are folded between words, and only then their words too.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    words = [max(_longest_part(row[column]) for row in rows) for column in range(len(rows[0]))]
    room = None if width is None else width - 2 * (len(widths) - 1)
    for least in (words, [_NARROWEST] * len(widths)):
        while room is not None and sum(widths) > room:
            widest = max(range(len(widths)), key=lambda column: widths[column] * (widths[column] > least[column]))
            if widths[widest] <= least[widest]:
                break
            widths[widest] -= 1
    painted = [index for index, name in enumerate(rows[0]) if colour and name in _COLOURED]
    lines = []
    for number, row in enumerate(rows):
        cells = [
            [cell] if width is None else textwrap.wrap(cell, size, break_on_hyphens=False) or [""]
            for cell, size in zip(row, widths, strict=True)
        ]
        codes = {index: _COLOURS.get(row[index].partition(" ")[0]) for index in painted if number}
        for part in range(max(map(len, cells))):
            texts = [cell[part] if part < len(cell) else "" for cell in cells]
            line = [text.ljust(size) for text, size in zip(texts, widths, strict=True)]
            line[-1] = texts[-1]
            for index, code in codes.items():
                if code is not None and texts[index]:
                    line[index] = f"\x1b[{code}m{texts[index]}\x1b[0m{' ' * (len(line[index]) - len(texts[index]))}"
            lines.append("  ".join(line).rstrip())
    return lines


def _longest_part(cell: str) -> int:
    """Characters of what is folded last: its longest word, or all of a short one such as `3 min 05 s`."""
    return len(cell) if len(cell) <= _SHORT else max(map(len, cell.split()), default=0)
