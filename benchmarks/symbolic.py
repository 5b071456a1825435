"""How many derivatives a small GPT-2 gets right: `python -m benchmarks.symbolic`, under ten minutes on one core.

Runs the workflow of docs/symbolic.md in a store: begun again, it goes on. It writes results/symbolic.json and
symbolic.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

import polytrope
from polytrope.pipeline.data.analysis_file import read_analysis
from polytrope.pipeline.data.description import read_dataset
from polytrope.pipeline.data.evaluation_file import read_evaluation

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "symbolic.md"


def workflow() -> str:
    """The one that the page shows."""
    found = re.search(r'```yaml title="symbolic.yaml"\n(.*?)```', PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert found is not None
    return found[1]


def markdown(record: Mapping[str, Any]) -> str:
    """A row per model: loss, how many of its answers are what, and how much of its linear layers is in use."""
    lines = ["| activation | loss | expressions | right | as written | utilised rank |", "|---|---|---|---|---|---|"]
    for name, row in record["models"].items():
        answers = row["answers"]
        cells = [
            f"{answers[key]} of {answers['lines']} ({100 * answers[key] / answers['lines']:.1f} %)"
            for key in ("valid", "correct", "exact")
        ]
        used = f"{100 * row['rank']['utilisation']:.0f} %"
        lines.append(f"| `{name}` | {row['loss']:.3f} | " + " | ".join([*cells, used]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=ROOT / "build" / "symbolic")
    options = parser.parse_args()
    options.store.mkdir(parents=True, exist_ok=True)
    path = options.store / "symbolic.yaml"
    path.write_text(workflow(), encoding="utf-8")
    result = polytrope.run(path, executor="local", store=options.store, tracking=False)
    evaluation = read_evaluation(result["scores"].path)
    data = read_dataset(result["lines"].path)
    analysis = read_analysis(result["layers"].path)
    models: dict[str, Any] = {}
    for label, model in evaluation.models.items():
        ranks = analysis.models[label].rank
        assert ranks is not None
        models[label] = {
            **model.model_dump(include={"loss", "parameters", "answers"}),
            "rank": ranks.model_dump() | ranks.metrics(),
        }
    record = {
        "command": "python -m benchmarks.symbolic",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "sympy": version("sympy"),
        "workflow": yaml.safe_load(workflow()),
        "splits": {name: dict(split) for name, split in data.splits.items()},
        "left_out": getattr(data, "left_out", {}),
        "models": models,
    }
    (RESULTS / "symbolic.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = markdown(record)
    (RESULTS / "symbolic.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
