"""What every step towards a GPT-2 of sums and products costs: `python -m benchmarks.private_inference`, half an hour.

Runs workflows/private-inference.yaml with five seeds, 20 trainings of the quickstart's size, in a store: begun again,
it goes on. Differences to GELU with layer norm and softmax are paired by seed. It writes
results/private_inference.json and private_inference.md.

With `--more-seeds 50` the last of the models alone, with the seeds 0 to 49, each with its circuit: do trainings end in
NaN, do rows leave the ranges, what do polynomials in the place of the divisions cost? One after the other, 1 to 3
minutes each; begun again, it goes on. It writes results/private_inference_seeds.json and private_inference_seeds.md
after every one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import polytrope
from polytrope.pipeline.data.circuit_file import CircuitRecord, read_circuit
from polytrope.pipeline.data.evaluation_file import Evaluation, read_evaluation
from polytrope.pipeline.data.training_file import figure_of_training
from polytrope.pipeline.launch.interface import RunFailedError
from polytrope.pipeline.stages.report.statistics import mean_interval
from polytrope.pipeline.workflow.spec import Workflow

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORKFLOW = ROOT / "workflows" / "private-inference.yaml"
SEEDS = [0, 1, 2, 3, 4]
BAR = 0.03  # nats per byte beyond the baseline
BASELINE = "baseline"
LAST = "polynomial"
STEPS = {
    BASELINE: "GELU, layer norm, softmax",
    "activation": "Hermite 3 (`init: stable`), layer norm, softmax",
    "norm": "… batch norm, range penalty",
    LAST: "… power attention: sums and products but for one division in each attention",
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


def describe(circuit: CircuitRecord, exchanged: Mapping[str, float | None]) -> dict[str, Any]:
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
        f"divisions; the least exact polynomial in their places is up to {100 * worst:.2g} % off. On all validation "
        f"text the circuit has {losses['circuit']:.3f} nats per byte, its model {losses['trained']:.3f}."
    ]
    return "\n".join(lines) + "\n"


def one_seed(seed: int) -> Workflow:
    """Of the workflow what makes the last model with this seed, its circuit, and the losses of both."""
    file = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    stages = {name: file["stages"][name] for name in ("text", "gpt", "circuit", "circuit_loss")}
    matrix = stages["gpt"]["matrix"]
    matrix["parts"] = [part for part in matrix["parts"] if part["label"] == LAST]
    matrix["seed"] = [seed]
    stages["circuit"]["inputs"]["model"] = stages["circuit_loss"]["inputs"]["models"]["trained"] = _trained(seed)
    data = {"name": f"private-inference-{seed}", "params": file["params"], "stages": stages}
    return Workflow.from_dict(data, directory=WORKFLOW.parent)


def _trained(seed: int) -> str:
    return f"gpt[parts={LAST},seed={seed}]"


def run_seed(seed: int, store: Path) -> dict[str, Any]:
    """What the last model came to with this seed.

    Raises:
        RunFailedError: for another reason than a training that diverged.
    """
    try:
        result = polytrope.run(one_seed(seed), executor="local", store=store, tracking=False, display="quiet")
        failed = None
    except RunFailedError as error:
        result, failed = error.result, error
    if failed is not None and result[_trained(seed)].digest is None:
        raise failed
    _, failure = figure_of_training(result[_trained(seed)].path, "val/loss")
    if failure is not None:
        return {"seed": seed, "failure": failure}
    if failed is not None:
        raise failed
    models = read_evaluation(result["circuit_loss"].path).models
    bits = {name: model.bits_per_byte for name, model in models.items()}
    losses = {name: None if value is None else value * math.log(2) for name, value in bits.items()}
    return {"failure": None, **describe(read_circuit(result["circuit"].path), losses), "seed": seed}


def seeds_markdown(rows: Sequence[Mapping[str, Any]], baseline: Sequence[float]) -> str:
    """A table of the trainings with several seeds, by figure.

    Args:
        rows: by seed, from 0 on.
        baseline: nats per byte of GELU with layer norm and softmax, by seed.
    """
    whole = [row for row in rows if row["failure"] is None]
    finite = [row for row in whole if row["nats_per_byte"]["circuit"] is not None]
    figures = {"trainings, those that ended in NaN": f"{len(rows)}, {len(rows) - len(whole)}"}
    if finite:
        losses = [row["nats_per_byte"]["trained"] for row in whole]
        changes = [row["nats_per_byte"]["circuit"] - row["nats_per_byte"]["trained"] for row in finite]
        errors = [max(row["largest_error_of_a_reciprocal"].values()) for row in whole]
        pairs = {row["seed"]: row["nats_per_byte"]["trained"] for row in whole if row["seed"] < len(baseline)}
        gap = mean_interval([loss - baseline[seed] for seed, loss in pairs.items()])
        within = "" if gap.half_width is None else f" ± {gap.half_width:.3f}"
        outside, of = (sum(row[name] for row in whole) for name in ("rows_outside", "rows"))
        figures |= {
            "circuits with a loss that is no number": f"{len(whole) - len(finite)}",
            "nats per byte: mean, least, most": f"{statistics.fmean(losses):.3f}, {min(losses):.3f}, {max(losses):.3f}",
            f"beyond GELU, layer norm, softmax, {len(pairs)} seeds paired": f"{gap.mean:+.3f}{within}",
            "what replaced divisions cost, nats per byte: median, farthest from 0": f"{statistics.median(changes):+.1e}"
            f", {max(changes, key=abs):+.1e}",
            "largest relative error of a model's divisions: median, worst": f"{statistics.median(errors):.1e}"
            f", {max(errors):.1e}",
            "rows of held-out text outside of the ranges": f"{outside:,} of {of:,}, in "
            f"{sum(row['rows_outside'] > 0 for row in whole)} of {len(whole)} models",
            "depth": ", ".join(str(depth) for depth in sorted({row["depth"] for row in whole})),
        }
    lines = ["| figure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in figures.items())]
    return "\n".join(lines) + "\n"


def run_seeds(count: int, store: Path) -> None:
    """The last model with the seeds 0, 1, …, one after the other; the results are written after each."""
    rows: list[dict[str, Any]] = []
    first = json.loads((RESULTS / "private_inference.json").read_text(encoding="utf-8"))
    baseline = first["steps"][BASELINE]["nats_per_byte"]
    for seed in range(count):
        rows.append(run_seed(seed, store))
        record = {"command": f"python -m benchmarks.private_inference --more-seeds {count}", "date": _today()}
        _write("private_inference_seeds", {**record, "trainings": rows}, seeds_markdown(rows, baseline))
        print(json.dumps(rows[-1]), flush=True)


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _write(name: str, record: Mapping[str, Any], text: str) -> None:
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=ROOT / "build" / "private-inference")
    parser.add_argument("--more-seeds", type=int, metavar="COUNT", help="the last model alone, with this many seeds")
    options = parser.parse_args()
    if options.more_seeds is None:
        run_steps(options.store)
    else:
        run_seeds(options.more_seeds, options.store)


def run_steps(store: Path) -> None:
    """Every step with the first seeds."""
    result = polytrope.run(
        WORKFLOW,
        overrides=[f"params.seeds={SEEDS}"],
        executor="local",
        store=store,
        tracking=False,
    )
    rows = compare(read_evaluation(result["evaluate"].path))
    exchanged = read_evaluation(result["circuit_loss"].path)
    losses = {name: nats_per_byte(exchanged, name) for name in exchanged.models}
    circuit = describe(read_circuit(result["circuit"].path), losses)
    record = {
        "command": "python -m benchmarks.private_inference",
        "date": _today(),
        "seeds": SEEDS,
        "bar": BAR,
        "steps": rows,
        "circuit": circuit,
    }
    text = markdown(rows, circuit)
    _write("private_inference", record, text)
    print(text)


if __name__ == "__main__":
    main()
