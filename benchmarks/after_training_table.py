"""The table that workflows/after-training.yaml ends with: `python -m benchmarks.after_training_table`.

It runs the workflow in the store (four minutes on two cores; what is there already is not made again) and writes the
size, speed and loss of every model to results/after_training_table.json and .md. Losses are those of one seed; speeds
are of this machine, with whatever else ran on it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from benchmarks.recipe import RESULTS, ROOT
from benchmarks.recipe_tables import table
from polytrope.pipeline.runs.journal import fold, read
from polytrope.pipeline.store.store import Store

WORKFLOW = "workflows/after-training.yaml"
KEPT = ("name", "structure", "parameters", "loss", "difference", "budget", "speed")


def run(store: str) -> list[dict[str, Any]]:
    """Rows of the table of this run's report, in its order."""
    run_id = f"after-training-table-{time.strftime('%Y%m%d-%H%M%S')}"
    command = [sys.executable, "-m", "polytrope.pipeline.commands.cli", "run", WORKFLOW, "--store", store]
    subprocess.run([*command, "--run-id", run_id, "--executor", "local", "--no-tracking"], cwd=ROOT, check=True)
    opened = Store(store)
    key = fold(read(opened.run_directory(run_id))).stages["report"].key
    assert key is not None  # the run has ended
    content = json.loads((opened.materialize(key) / "report.json").read_text(encoding="utf-8"))
    return [{key: row.get(key) for key in KEPT} for row in content["table"]]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Size, speed and loss, and what was done."""
    heads = ["model", "what was done", "parameters", "tokens per second", "loss", "Δ", "trained on"]
    lines = []
    for row in rows:
        speed = "–" if row["speed"] is None else f"{row['speed']['forward_throughput']:,.0f}"
        done = ", ".join(row["structure"] or []) or "–"
        name = row["name"].replace("[", ": ").replace("]", "").replace("way=", "").replace("by=", "")
        cells = [name, done, f"{row['parameters']:,}", speed, f"{row['loss']:.3f}", f"{row['difference']:+.3f}"]
        lines.append([*cells, row["budget"]])
    return "\n".join(table(heads, lines)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="build/after-training", help="default build/after-training")
    options = parser.parse_args()
    rows = run(options.store)
    content = {"command": "python -m benchmarks.after_training_table", "workflow": WORKFLOW, "rows": rows}
    path = RESULTS / "after_training_table.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
