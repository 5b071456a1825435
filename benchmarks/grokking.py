"""Which activation learns addition modulo 31 first: `python -m benchmarks.grokking`, 17 minutes on two busy cores.

Runs workflows/grokking.yaml, 66 trainings, in a store: begun again, it goes on. It writes results/grokking.json and
grokking.md; the page of the documentation draws its figure from the first.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import polytrope
from polytrope.pipeline.data.analysis_file import Analysis, read_analysis

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORKFLOW = ROOT / "workflows" / "grokking.yaml"
NAMES = {  # Hermite polynomials as the workflow says: variance-preserving, without tangents
    "square": "degree 2",
    "hermite3": "degree 3",
    "fourier5": "`fourier5`",
    "tropical5": "`tropical5`",
    "tropical_rational6": "`tropical_rational6`",
    "rational5": "`rational5`",
    "polyrelu2": "`polyrelu2`",
    "gelu": "GELU",
    "relu": "ReLU",
    "tanh": "tanh",
}
FIGURES = (
    "memorised_step",
    "generalised_step",
    "test_accuracy",
    "concentration",
    "effective_frequencies",
    "margin_share",
    "kernel_drift",
)


def of_seeds(analysis: Analysis, seeds: Sequence[int], stage: str, **axes: Any) -> dict[str, list[float | None]]:
    """Figures of the models with these values of the axes, by seed; None: it has no such figure, or failed."""
    found: dict[str, list[float | None]] = {name: [] for name in FIGURES}
    for seed in seeds:
        label = f"{stage}[{','.join(f'{axis}={value}' for axis, value in {**axes, 'seed': seed}.items())}]"
        metrics = analysis.models[label].metrics()
        for name in FIGURES:
            found[name].append(metrics.get(f"modular/{name}"))
    return {name: values for name, values in found.items() if any(value is not None for value in values)}


def rank(row: Mapping[str, Any]) -> tuple[int, float]:
    """How many seeds have not learned the rule, then the mean step of those that have."""
    steps = row.get("generalised_step", [])
    known = [step for step in steps if step is not None]
    return len(row["test_accuracy"]) - len(known), statistics.fmean(known) if known else -mean(row["test_accuracy"])


def mean(values: Sequence[float | None]) -> float:
    """Of those that there are."""
    return statistics.fmean(value for value in values if value is not None)


def steps(row: Mapping[str, Any], name: str) -> str:
    """One per seed."""
    values = row.get(name, [None] * len(row["test_accuracy"]))
    return ", ".join("–" if value is None else f"{value:,.0f}" for value in values)


def markdown(record: Mapping[str, Any]) -> str:
    """Activations, the first to learn first; steps by scale; slopes."""
    lines = [
        "| activation | 99 % of the training pairs | 99 % of the others | others right | concentration | frequencies "
        "| margin | drift |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = record["activations"]
    for name in sorted(rows, key=lambda name: rank(rows[name])):
        row = rows[name]
        margin = f"{100 * mean(row['margin_share']):.0f} %" if "margin_share" in row else ""
        lines.append(
            f"| {NAMES[name]} | {steps(row, 'memorised_step')} | {steps(row, 'generalised_step')} "
            f"| {100 * mean(row['test_accuracy']):.1f} % | {mean(row['concentration']):.2f} "
            f"| {mean(row['effective_frequencies']):.1f} | {margin} | {mean(row['kernel_drift']):.1f} |"
        )
    shown = list(next(iter(record["scales"].values())))
    lines += ["", "| α | " + " | ".join(f"{NAMES[name]} | drift" for name in shown) + " |"]
    lines += ["|---|" + "---|---|" * len(shown)]
    for scale, found in record["scales"].items():
        cells = [
            f"{steps(found[name], 'generalised_step')} | {mean(found[name]['kernel_drift']):.2g}" for name in shown
        ]
        lines.append(f"| {scale} | " + " | ".join(cells) + " |")
    slopes = [
        f"{NAMES[name]} {found['slope']:.2f} ± {found['slope_error']:.2f}" for name, found in record["width"].items()
    ]
    widths, draws = record["width"]["relu"]["widths"], record["width"]["relu"]["draws"]
    lines += [
        "",
        f"Slope of the variance of the tangent kernel against the width, {widths[0]} to {widths[-1]}, {draws} draws "
        f"each: {', '.join(slopes)}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=ROOT / "build" / "grokking")
    options = parser.parse_args()
    result = polytrope.run(WORKFLOW, executor="local", store=options.store, tracking=False)
    content = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    seeds, axes = content["params"]["seeds"], content["stages"]["scales"]["matrix"]
    analysis, width = (read_analysis(result[name].path) for name in ("analysis", "kernels"))
    rows = {name: of_seeds(analysis, seeds, "bases", activation=name) for name in NAMES}
    shown = [entry if isinstance(entry, str) else entry["label"] for entry in axes["activation"]]
    scales = {
        f"{scale:g}": {
            name: rows[name] if scale == 1.0 else of_seeds(analysis, seeds, "scales", activation=name, scale=scale)
            for name in shown
        }
        for scale in sorted([*axes["scale"], 1.0])
    }
    curves = {name: analysis.models[f"bases[activation={name},seed={seeds[0]}]"].modular for name in NAMES}
    record = {
        "command": "python -m benchmarks.grokking",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seeds": seeds,
        "params": content["params"],
        "activations": rows,
        "scales": scales,
        "curves": {name: found.curve.model_dump() for name, found in curves.items() if found and found.curve},
        "width": {name: found.width.model_dump() for name, found in width.models.items() if found.width},
    }
    (RESULTS / "grokking.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = markdown(record)
    (RESULTS / "grokking.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
