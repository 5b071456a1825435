"""What every step towards a GPT-2 of sums and products costs: `python -m benchmarks.private_inference`, half an hour.

Runs workflows/private-inference.yaml with five seeds, 20 trainings of the quickstart's size, in a store: begun again,
it goes on. Differences to GELU with layer norm and softmax are paired by seed. It writes
results/private_inference.json and private_inference.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polytrope
from polytrope.pipeline.data.circuit_file import CircuitRecord, read_circuit
from polytrope.pipeline.data.evaluation_file import Evaluation, read_evaluation
from polytrope.pipeline.stages.report.statistics import mean_interval

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SEEDS = [0, 1, 2, 3, 4]
BAR = 0.03  # nats per byte beyond the baseline
BASELINE = "baseline"
STEPS = {
    BASELINE: "GELU, layer norm, softmax",
    "activation": "Hermite 3 (`init: stable`), layer norm, softmax",
    "norm": "… batch norm, range penalty",
    "polynomial": "… power attention: sums and products but for one division in each attention",
}


def nats_per_byte(evaluation: Evaluation, label: str) -> float:
    """Loss of a model on the validation text.

    Raises:
        ValueError: it has none, for its training failed.
    """
    bits = evaluation.models[label].bits_per_byte
    if bits is None:
        raise ValueError(f"{label} has no loss: its training failed")
    return bits * math.log(2)


def of_seeds(evaluation: Evaluation, part: str) -> list[float]:
    """Losses of the models with this part, by seed."""
    return [nats_per_byte(evaluation, f"gpt[parts={part},seed={seed}]") for seed in SEEDS]


def compare(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Losses of each step in nats per byte, and the differences to the baseline's of the same seeds."""
    reference = of_seeds(evaluation, BASELINE)
    rows: dict[str, dict[str, Any]] = {}
    for part in STEPS:
        losses = of_seeds(evaluation, part)
        gap = mean_interval([loss - other for loss, other in zip(losses, reference, strict=True)])
        rows[part] = {
            "nats_per_byte": losses,
            "mean": mean_interval(losses).mean,
            "difference": None if part == BASELINE else {"mean": gap.mean, "half_width": gap.half_width},
        }
    return rows


def describe(circuit: CircuitRecord, exchanged: Mapping[str, float]) -> dict[str, Any]:
    """Depth, rows outside and errors of the circuit of the first seed, and its loss beside that of its model."""
    return {
        "seed": SEEDS[0],
        "depth": circuit.cost.depth,
        "levels": circuit.cost.levels,
        "depth_after": {name: layer.depth for name, layer in circuit.layers.items()},
        "largest_error_of_a_reciprocal": {division.name: division.relative_error for division in circuit.divisions},
        "rows": sum(division.inputs for division in circuit.divisions),
        "rows_outside": sum(division.outside for division in circuit.divisions),
        "nats_per_byte": dict(exchanged),
    }


def markdown(rows: Mapping[str, Mapping[str, Any]], circuit: Mapping[str, Any]) -> str:
    """The steps, and a sentence on the circuit."""
    lines = ["| model | nats per byte | beyond the first row, paired |", "|---|---|---|"]
    for part, row in rows.items():
        gap = row["difference"]
        shown = "" if gap is None else f"{gap['mean']:+.3f} ± {gap['half_width']:.3f}"
        lines.append(f"| {STEPS[part]} | {row['mean']:.3f} | {shown} |")
    losses = circuit["nats_per_byte"]
    worst = max(circuit["largest_error_of_a_reciprocal"].values())
    lines += [
        f"\nThe circuit of seed {circuit['seed']} has depth {circuit['depth']} and {circuit['levels']} levels. "
        f"Of {circuit['rows']:,} rows of held-out text, {circuit['rows_outside']} lay outside of the ranges of its "
        f"divisions; the least exact polynomial in their places is up to {100 * worst:.0f} % off. On all validation "
        f"text the circuit has {losses['circuit']:.3f} nats per byte, its model {losses['trained']:.3f}."
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=ROOT / "build" / "private-inference")
    options = parser.parse_args()
    result = polytrope.run(
        ROOT / "workflows" / "private-inference.yaml",
        overrides=[f"params.seeds={SEEDS}"],
        executor="local",
        store=options.store,
        tracking=False,
    )
    rows = compare(read_evaluation(result["evaluate"].path))
    exchanged = read_evaluation(result["circuit_loss"].path)
    losses = {name: nats_per_byte(exchanged, name) for name in exchanged.models}
    circuit = describe(read_circuit(result["circuit"].path), losses)
    record = {
        "command": "python -m benchmarks.private_inference",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seeds": SEEDS,
        "bar": BAR,
        "steps": rows,
        "circuit": circuit,
    }
    (RESULTS / "private_inference.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    text = markdown(rows, circuit)
    (RESULTS / "private_inference.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
