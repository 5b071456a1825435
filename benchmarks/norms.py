"""What `norm: evonorm` and `norm: rms` do to small models: `python -m benchmarks.norms --store DIRECTORY`, ten minutes.

Digits: the model, data and training of workflows/convnext-digits.yaml, five seeds of each row; differences to GELU
behind layer norm are paired by seed. Text: the last model of workflows/private-inference.yaml with `norm: rms` in the
place of batch norm, three seeds, beside the same seeds in results/private_inference.json; of the first one a circuit.
Begun again, it goes on. It writes results/norms.json and norms.md.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import polytrope
from polytrope.pipeline.data.circuit_file import read_circuit
from polytrope.pipeline.data.evaluation_file import read_evaluation
from polytrope.pipeline.data.training_file import figure_of_training
from polytrope.pipeline.stages.report.statistics import mean_interval
from polytrope.pipeline.workflow.spec import Workflow

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORKFLOWS = ROOT / "workflows"
SEEDS = [0, 1, 2, 3, 4]
TEXT_SEEDS = [0, 1, 2]
BASELINE = "gelu"
HERMITE = {"name": "hermite", "degree": 3, "init": "variance_preserving"}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    BASELINE: ("layer norm, GELU", {"activation": "gelu"}),
    "hermite": ("layer norm, Hermite 3", {"activation": HERMITE}),
    "evonorm": ("`evonorm`", {"norm": "evonorm"}),
    "evonorm_hermite": ("`evonorm`, Hermite 3 in the place of x σ(v x)", {"norm": "evonorm", "activation": HERMITE}),
}


def digits() -> Workflow:
    """The digits, and a training per row and seed."""
    file = yaml.safe_load((WORKFLOWS / "convnext-digits.yaml").read_text(encoding="utf-8"))
    train = file["stages"]["train"]
    usual = {name: value for name, value in train["with"]["model"].items() if name != "activation"}
    stages = {"digits": file["stages"]["digits"]}
    for row, (_, parts) in ROWS.items():
        given = {**train["with"], "model": {**usual, **parts}, "seed": "${matrix.seed}"}
        stages[row] = {**train, "matrix": {"seed": SEEDS}, "with": given}
    content = {"name": "norms-digits", "params": file["params"], "stages": stages}
    return Workflow.from_dict(content, directory=WORKFLOWS)


def text() -> Workflow:
    """A text, a training per seed, a circuit, and the losses of all."""
    file = yaml.safe_load((WORKFLOWS / "private-inference.yaml").read_text(encoding="utf-8"))
    stages = {name: file["stages"][name] for name in ("text", "gpt", "circuit", "evaluate")}
    matrix = stages["gpt"]["matrix"]
    last = next(part for part in matrix["parts"] if part["label"] == "polynomial")
    stages["gpt"]["matrix"] = {"parts": [{**last, "norm": "rms"}], "seed": TEXT_SEEDS}
    stages["evaluate"]["inputs"]["models"] = {
        **{f"seed {seed}": f"gpt[parts=polynomial,seed={seed}]" for seed in TEXT_SEEDS},
        "circuit": "circuit",
    }
    content = {"name": "norms-text", "params": file["params"], "stages": stages}
    return Workflow.from_dict(content, directory=WORKFLOWS)


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


def run_digits(store: Path) -> dict[str, dict[str, Any]]:
    """Losses and accuracies of all rows."""
    result = polytrope.run(digits(), executor="local", store=store, tracking=False, display="quiet")
    figures: dict[str, dict[str, list[float]]] = {row: {"loss": [], "accuracy": []} for row in ROWS}
    for row in ROWS:
        for seed in SEEDS:
            for name, values in figures[row].items():
                value, failure = figure_of_training(result[f"{row}[seed={seed}]"].path, f"val/{name}")
                if value is None:
                    raise SystemExit(f"{row}, seed {seed}: {failure}")
                values.append(value)
    return compare(figures)


def run_text(store: Path) -> dict[str, Any]:
    """Losses in nats per byte beside those of batch norm, and what the circuit costs."""
    result = polytrope.run(text(), executor="local", store=store, tracking=False, display="quiet")
    models = read_evaluation(result["evaluate"].path).models
    bits = {name: model.bits_per_byte for name, model in models.items()}
    losses = {name: None if value is None else value * math.log(2) for name, value in bits.items()}
    circuit = read_circuit(result["circuit"].path)
    before = json.loads((RESULTS / "private_inference.json").read_text(encoding="utf-8"))
    roots = [division for division in circuit.divisions if division.name.endswith("inverse_root")]
    return {
        "seeds": TEXT_SEEDS,
        "rms": [losses[f"seed {seed}"] for seed in TEXT_SEEDS],
        "batch": [before["steps"]["polynomial"]["nats_per_byte"][seed] for seed in TEXT_SEEDS],
        "circuit": losses["circuit"],
        "depth": circuit.cost.depth,
        "depth_of_batch": before["circuit"]["depth"],
        "rows": sum(root.inputs for root in roots),
        "rows_outside": sum(root.outside for root in roots),
        "roots": {root.name: [*root.measured, root.relative_error] for root in roots},
    }


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the rows of the digits."""
    lines = ["| model | loss | to the first row | accuracy | to the first row |", "|---|---|---|---|---|"]
    for row, found in rows.items():
        loss, right = found["loss"], found["accuracy"]
        gaps = ["", ""]
        if row != BASELINE:
            gaps[0] = f"{loss['difference']['mean']:+.4f} ± {loss['difference']['half_width']:.4f}"
            mean, half = (round(100 * right["difference"][name], 2) + 0.0 for name in ("mean", "half_width"))
            gaps[1] = f"{mean:+.2f} ± {half:.2f}"
        lines.append(f"| {ROWS[row][0]} | {loss['mean']:.4f} | {gaps[0]} | {100 * right['mean']:.2f} % | {gaps[1]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="directory of the trainings")
    options = parser.parse_args()
    rows = run_digits(options.store)
    (RESULTS / "norms.md").write_text(markdown(rows), encoding="utf-8")
    content = {"command": "python -m benchmarks.norms", "digits": rows, "text": run_text(options.store)}
    (RESULTS / "norms.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
