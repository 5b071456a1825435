"""Three stages of one's own, complete: plain typed functions that a workflow file beside it names as `word_count:…`."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, StageContext


def collect_text(context: StageContext, package: str) -> dict[str, float]:
    """Copy the Python source of an installed package into one text file."""
    found = importlib.util.find_spec(package)
    if found is None or not found.origin:
        raise UserError(f"there is no package `{package}`", "name one of the standard library, such as `json`")
    origin = Path(found.origin)
    files = sorted(origin.parent.glob("*.py")) if origin.name == "__init__.py" else [origin]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    (context.output / "text.txt").write_text(text, encoding="utf-8")
    return {"files": len(files), "characters": len(text)}


def count_words(context: StageContext, text: Artifact, minimum_length: int = 4) -> dict[str, float]:
    """Count the words of `text` that have at least `minimum_length` letters."""
    words = re.findall(r"[A-Za-z]+", (text.path / "text.txt").read_text(encoding="utf-8"))
    counts: Counter[str] = Counter()
    for index, word in enumerate(words):
        if len(word) >= minimum_length:
            counts[word.lower()] += 1
        if index % 10_000 == 0:
            context.progress(index, len(words), f"{len(counts)} different words")
    (context.output / "counts.json").write_text(json.dumps(dict(counts.most_common()), indent=1), encoding="utf-8")
    return {"words": counts.total(), "different_words": len(counts)}


def compare_counts(context: StageContext, counts: dict[str, Artifact], top: int = 5) -> dict[str, float]:
    """One table of the most frequent words, a column per input."""
    lines = []
    for label, artifact in counts.items():
        frequent = list(json.loads((artifact.path / "counts.json").read_text(encoding="utf-8")).items())[:top]
        lines.append(f"{label}: " + ", ".join(f"{word} ({count})" for word, count in frequent))
        context.message(lines[-1])
    (context.output / "table.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"columns": len(lines)}
