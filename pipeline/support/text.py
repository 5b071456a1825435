"""Values and names as people read them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


def suggest(name: str, known: Iterable[str]) -> str:
    """`did you mean `x`?`, or the list of what there is."""
    names = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if close:
        return f"did you mean `{close[0]}`?"
    if not names:
        return ""
    return "there is " + ", ".join(f"`{item}`" for item in names[:20]) + (" …" if len(names) > 20 else "")


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
