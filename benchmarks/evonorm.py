"""A small ConvNeXt on digits with EvoNorm and with layer norm: `python -m benchmarks.evonorm`, three minutes.

The model, data and training of workflows/convnext-digits.yaml, five seeds of each row, in a store: begun again, it goes
on. Differences to GELU behind layer norm are paired by seed. It writes results/evonorm.json and evonorm.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import polytrope
from polytrope.pipeline.data.training_file import figure_of_training
from polytrope.pipeline.stages.report.statistics import mean_interval
from polytrope.pipeline.workflow.spec import Workflow

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORKFLOW = ROOT / "workflows" / "convnext-digits.yaml"
SEEDS = [0, 1, 2, 3, 4]
BASELINE = "gelu"
HERMITE = {"name": "hermite", "degree": 3}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    BASELINE: ("layer norm, GELU", {"activation": "gelu"}),
    "hermite": ("layer norm, Hermite 3", {"activation": HERMITE}),
    "evonorm": ("`evonorm`", {"norm": "evonorm"}),
    "evonorm_hermite": ("`evonorm`, Hermite 3 in the place of x σ(v x)", {"norm": "evonorm", "activation": HERMITE}),
}


def workflow() -> Workflow:
    """The digits, and a training per row and seed."""
    file = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    train = file["stages"]["train"]
    usual = {name: value for name, value in train["with"]["model"].items() if name != "activation"}
    stages = {"digits": file["stages"]["digits"]}
    for row, (_, parts) in ROWS.items():
        given = {**train["with"], "model": {**usual, **parts}, "seed": "${matrix.seed}"}
        stages[row] = {**train, "matrix": {"seed": SEEDS}, "with": given}
    return Workflow.from_dict(
        {"name": "evonorm", "params": file["params"], "stages": stages}, directory=WORKFLOW.parent
    )


def compare(figures: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """Means, and differences to the baseline's with their 95 % intervals.

    Args:
        figures: row → figure (`loss` in nats, `accuracy`) → value of each seed.
    """
    found: dict[str, dict[str, Any]] = {}
    for row, own in figures.items():
        found[row] = {}
        for name, values in own.items():
            gap = mean_interval([a - b for a, b in zip(values, figures[BASELINE][name], strict=True)])
            difference = None if row == BASELINE else {"mean": gap.mean, "half_width": gap.half_width}
            found[row][name] = {"values": values, "mean": mean_interval(values).mean, "difference": difference}
    return found


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the rows."""
    lines = ["| model | loss | to the first row | accuracy | to the first row |", "|---|---|---|---|---|"]
    for row, found in rows.items():
        loss, right = found["loss"], found["accuracy"]
        gaps = ["", ""]
        if row != BASELINE:
            gaps[0] = f"{loss['difference']['mean']:+.4f} ± {loss['difference']['half_width']:.4f}"
            mean, half = (100 * right["difference"][name] for name in ("mean", "half_width"))
            gaps[1] = f"{mean:+.2f} ± {half:.2f}"
        lines.append(f"| {ROWS[row][0]} | {loss['mean']:.4f} | {gaps[0]} | {100 * right['mean']:.2f} % | {gaps[1]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="directory of the trainings")
    options = parser.parse_args()
    result = polytrope.run(workflow(), executor="local", store=options.store, tracking=False, display="quiet")
    figures: dict[str, dict[str, list[float]]] = {row: {"loss": [], "accuracy": []} for row in ROWS}
    for row in ROWS:
        for seed in SEEDS:
            for name, values in figures[row].items():
                value, failure = figure_of_training(result[f"{row}[seed={seed}]"].path, f"val/{name}")
                if value is None:
                    raise SystemExit(f"{row}, seed {seed}: {failure}")
                values.append(value)
    rows = compare(figures)
    content = {"command": "python -m benchmarks.evonorm", "rows": rows}
    (RESULTS / "evonorm.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "evonorm.md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
