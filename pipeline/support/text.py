"""Values and names as people read them."""

from __future__ import annotations

import difflib
import math
import os
import re
import shlex
from collections.abc import Iterable


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can write it: no half of a surrogate pair, as names of files in another encoding have."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# the commands that look into a store
STORE_COMMANDS = frozenset(
    [
        "run",
        "resume",
        "status",
        "logs",
        "cancel",
        "runs",
        "diff",
        "plan",
        "explain",
        "graph",
        "gc",
        "alias",
        "export",
        "import",
        "verify",
        "ui",
        "open",
        "sync",
        "card",
        "reproduce",
    ]
)


def command(*words: str, store: str) -> str:
    """`polytrope WORDS`, to be typed as it stands; with `--store` where it would look into another store.

    Args:
        words: the command and its arguments.
        store: the address it is to work on.
    """
    default = os.environ.get("POLYTROPE_STORE", ".polytrope")
    option = () if _place(default) == _place(store) else ("--store", store)
    return shlex.join(("polytrope", *words, *option))


def _place(address: str) -> str:
    return address.rstrip("/") if "://" in address else os.path.abspath(os.path.expanduser(address))


def complete_commands(text: str, store: str, run_id: str | None = None) -> str:
    """A hint whose commands (`polytrope …` in back quotes) name their store, and `polytrope resume` its run."""
    option = command(store=store).removeprefix("polytrope")

    def complete(match: re.Match[str]) -> str:
        name, rest = match.groups()
        if name not in STORE_COMMANDS or "--store" in rest or "--address" in rest:
            return match[0]
        if name == "resume" and run_id is not None and (not rest or rest.startswith(" --")):
            rest = f" {run_id}{rest}"
        return f"`polytrope {name}{rest}{option}`"

    return re.sub(r"`polytrope ([a-z-]+)((?: [^`]*)?)`", complete, text)


def suggest(name: str, known: Iterable[str]) -> str:
    """`did you mean `x`?`, or the list of what there is."""
    names = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if close:
        return f"did you mean `{close[0]}`?"
    if not names:
        return ""
    return "there is " + ", ".join(f"`{item}`" for item in names[:20]) + (" …" if len(names) > 20 else "")


def count(number: int, noun: str, plural: str = "") -> str:
    """`1 stage`, `2 stages`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def format_duration(seconds: float) -> str:
    """`35 ms`, `0.4 s`, `12 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest:02d} min"


def metric_text(value: float) -> str:
    """Four significant digits; whole numbers as they are."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def uncommitted(dirty: bool | None) -> str:
    """What to say after a commit's hash; None: git did not tell."""
    if dirty is None:
        return ", perhaps with uncommitted changes: git did not tell"
    return " with uncommitted changes" if dirty else ""
