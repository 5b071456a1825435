"""What layers of products learn, and from how many rows: `python -m benchmarks.polynomial_networks`, a quarter hour.

Runs workflows/polynomial-networks.yaml with five seeds in a store: begun again, it goes on. Differences are paired by
seed; p-values are Student's, corrected for the number of comparisons in their table (Holm). It writes
results/polynomial_networks.json, polynomial_networks.md and polynomial_networks-rows.png.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import polytrope
from polytrope.pipeline.data.evaluation_file import Evaluation, read_evaluation
from polytrope.pipeline.data.training_file import read_training
from polytrope.pipeline.stages.report.statistics import holm, mean_interval, paired_p_value

ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / "workflows" / "polynomial-networks.yaml"
RESULTS = ROOT / "benchmarks" / "results"
SEEDS = [0, 1, 2, 3, 4]
BAR = 0.9  # R² that counts as learned
LAYERS = {
    "relu": "dense, ReLU",
    "hermite": "dense, Hermite 3",
    "quadratic": "quadratic, ReLU",
    "pade": "Padé, ReLU",
    "kan": "KAN of Hermite 3",
    "pi": "Π of degree 3",
}
ALONE = {
    "coefficients": "coefficients, of each block",
    "coefficients_per_channel": "coefficients, of each channel",
    "norms": "norms",
    "head": "the last layer",
    "everything": "everything",
}
LEARNS = {
    "continued": "everything, linear layers",
    "everything": "everything",
    "both": "coefficients and products",
    "multiplicative": "products",
    "coefficients": "coefficients",
}
Values = list[float | None]  # by seed; None where the training diverged


def difference(values: Sequence[float | None], reference: Sequence[float | None]) -> dict[str, Any] | None:
    """The mean paired difference with its 95 % interval; None where a training has no figure."""
    pairs = [(a, b) for a, b in zip(values, reference, strict=True) if a is not None and b is not None]
    if len(pairs) < len(values):
        return None
    differences = [a - b for a, b in pairs]
    interval = mean_interval(differences)
    return {"mean": interval.mean, "half_width": interval.half_width, "p_value": paired_p_value(differences)}


def compared(rows: Mapping[str, Mapping[str, Any]], figure: str, baseline: str) -> dict[str, dict[str, Any]]:
    """The rows with their `difference` to the baseline's, and its p-value corrected for all of them."""
    found = {name: difference(row[figure], rows[baseline][figure]) for name, row in rows.items() if name != baseline}
    tested = {name: gap for name, gap in found.items() if gap is not None and gap["p_value"] is not None}
    corrected = dict(zip(tested, holm([gap["p_value"] for gap in tested.values()]), strict=True))
    return {
        name: {**row, "difference": None if found.get(name) is None else {**found[name], "holm": corrected.get(name)}}
        for name, row in rows.items()
    }


def of_trainings(paths: Sequence[Path]) -> dict[str, Any]:
    """Accuracies and losses on all validation images, by seed, and how many parameters learned."""
    trainings = [read_training(path) for path in paths]
    assert all(training is not None for training in trainings)
    figures = [{} if training.failure is not None else training.metrics() for training in trainings if training]
    return {
        "parameters": trainings[0].parameters,
        "learned": trainings[0].trainable_parameters or trainings[0].parameters,
        "accuracy": [one.get("val/accuracy") for one in figures],
        "loss": [one.get("val/loss") for one in figures],
    }


def of_rows(evaluation: Evaluation, labels: Sequence[str]) -> Values:
    """R² on the held-out rows, by seed."""
    return [evaluation.models[label].r2 for label in labels]


def above(rows: Mapping[str, Any], bar: float) -> int | None:
    """The fewest rows with which R² is above the bar with every seed; None: with none."""
    enough = [int(count) for count, values in rows.items() if all(r2 is not None and r2 > bar for r2 in values)]
    return min(enough, default=None)


def gather(result: polytrope.RunResult, params: Mapping[str, Any]) -> dict[str, Any]:
    """All figures of a run."""
    seeds = params["seeds"]

    def paths(stage: str, axis: str = "") -> list[Path]:
        return [result[f"{stage}[{axis}seed={seed}]"].path for seed in seeds]

    def groups(stage: str, axis: str, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Of the values of an axis that the run has."""
        there = [name for name in names if f"{stage}[{axis}={name},seed={seeds[0]}]" in result.stages]
        return {name: of_trainings(paths(stage, f"{axis}={name},")) for name in there}

    images = groups("convnext", "feedforward", [entry["label"] for entry in params["feedforwards"]])
    alone = groups("alone", "learns", ALONE)
    tuned = {"continued": of_trainings(paths("continued")), **groups("tuned", "learns", LEARNS)}
    whole, fewer = (read_evaluation(result[stage].path) for stage in ("evaluate_regression", "evaluate_samples"))
    upgrade = read_evaluation(result["evaluate_upgrade"].path)
    drift = upgrade.models["quadratic"].drift
    assert drift is not None
    training_rows = {
        str(rows): int(result[f"fewer[rows={rows}]"].metrics["train/rows"]) for rows in params["fewer_rows"]
    }
    all_rows = int(result["polynomials"].metrics["train/rows"])
    numbers: dict[str, dict[str, Any]] = {}
    for name in LAYERS:
        labels = [f"regression[layers={name},seed={seed}]" for seed in seeds]
        if labels[0] not in whole.models:
            continue
        r2 = {}
        for rows, count in training_rows.items():
            smaller = [f"samples[layers={name},rows={rows},seed={seed}]" for seed in seeds]
            if smaller[0] in fewer.models:
                r2[str(count)] = of_rows(fewer, smaller)
        r2[str(all_rows)] = of_rows(whole, labels)
        numbers[name] = {"parameters": whole.models[labels[0]].parameters, "r2": r2, "whole": r2[str(all_rows)]}
        numbers[name]["above"] = above(r2, BAR)
    return {
        "images": compared(images, "loss", "mlp"),
        "alone": alone,
        "baseline": of_trainings(paths("baseline")),
        "tuned": compared(tuned, "loss", "continued"),
        "drift": {"kl_divergence": drift.kl_divergence, "agreement": drift.agreement},
        "numbers": compared(numbers, "whole", "relu"),
        "held_out": {"images": upgrade.protocol.samples, "rows": whole.protocol.samples},
    }


def _mean(values: Values, form: str, scale: float = 1.0) -> str:
    known = [scale * value for value in values if value is not None]
    if len(known) < len(values):
        return f"{len(values) - len(known)} of {len(values)} diverged"
    return format(math.fsum(known) / len(known), form)


def _r2(values: Values) -> str:
    text = _mean(values, ".3f")
    return "below 0" if text.startswith("-") else text


def plus_minus(gap: Mapping[str, Any]) -> str:
    """A difference with its interval."""
    return f"{gap['mean']:+.3f} ± {gap['half_width']:.3f}"


def _gap(row: Mapping[str, Any]) -> tuple[str, str]:
    gap = row["difference"]
    if gap is None or gap["half_width"] is None:
        return "", ""
    return plus_minus(gap), "< 0.001" if gap["holm"] < 0.001 else f"{gap['holm']:.3f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)] + [""]


def markdown(record: Mapping[str, Any]) -> str:
    """The tables."""
    numbers, images, tuned = record["numbers"], record["images"], record["tuned"]
    counts = list(numbers["relu"]["r2"])
    lines = [f"R² on {record['held_out']['rows']:,} held-out rows, by the number of training rows:\n"]
    lines += _table(
        [
            "layers",
            "parameters",
            *(f"{int(count):,}" for count in counts),
            f"above {BAR} from",
            "beyond the first",
            "p",
        ],
        [
            [
                LAYERS[name],
                f"{row['parameters']:,}",
                *(_r2(row["r2"][count]) if count in row["r2"] else "" for count in counts),
                "" if row["above"] is None or len(row["r2"]) == 1 else f"{row['above']:,}",
                *_gap(row),
            ]
            for name, row in numbers.items()
        ],
    )
    lines += [f"Digits, from random weights ({record['held_out']['images']} held-out images):\n"]
    lines += _table(
        ["layers", "parameters", "accuracy, %", "loss", "beyond the first", "p"],
        [
            [name, f"{row['parameters']:,}", _mean(row["accuracy"], ".1f", 100), _mean(row["loss"], ".3f"), *_gap(row)]
            for name, row in images.items()
        ],
    )
    first = record["baseline"]
    lines += ["Digits, from random weights with linear layers, where some parameters alone learn:\n"]
    lines += _table(
        ["what learns", "parameters", "accuracy, %", "loss"],
        [
            [ALONE[name], f"{row['learned']:,}", _mean(row["accuracy"], ".1f", 100), _mean(row["loss"], ".3f")]
            for name, row in {**record["alone"], "everything": images["mlp"]}.items()
        ],
    )
    lines += [
        f"Digits, from one checkpoint of linear layers ({_mean(first['accuracy'], '.1f', 100)} %, loss "
        f"{_mean(first['loss'], '.3f')}), which became quadratic with the same function:\n"
    ]
    lines += _table(
        ["what learns then", "parameters", "accuracy, %", "loss", "beyond the first", "p"],
        [
            [
                LEARNS[name],
                f"{row['learned']:,}",
                _mean(row["accuracy"], ".1f", 100),
                _mean(row["loss"], ".3f"),
                *_gap(row),
            ]
            for name, row in tuned.items()
        ],
    )
    return "\n".join(lines)


def digest_of(record: Mapping[str, Any]) -> str:
    """What the picture says that it shows."""
    return hashlib.sha256(json.dumps(record["numbers"], sort_keys=True).encode()).hexdigest()


def draw(record: Mapping[str, Any], path: Path) -> None:
    """R² against the number of training rows: means, and every seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    axes.axhline(BAR, color="grey", linewidth=0.8, linestyle=":")
    for number, (name, row) in enumerate(record["numbers"].items()):
        colour = f"C{number}"
        counts = [int(count) for count in row["r2"]]
        known = [[value for value in values if value is not None] for values in row["r2"].values()]
        for count, values in zip(counts, known, strict=True):
            axes.plot([count] * len(values), [max(0.0, value) for value in values], ".", color=colour, ms=4, alpha=0.5)
        means = [max(0.0, math.fsum(values) / len(values)) if values else math.nan for values in known]
        axes.plot(counts, means, "-o", color=colour, markersize=4, label=LAYERS[name])
    axes.set_xscale("log")
    ticks = [int(count) for count in record["numbers"]["relu"]["r2"]]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("training rows")
    axes.set_ylabel("R² on held-out rows (below 0: 0)")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Software": None, "Source": digest_of(record)})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=ROOT / "build" / "polynomial-networks")
    options = parser.parse_args()
    params = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["params"] | {"seeds": SEEDS}
    result = polytrope.run(WORKFLOW, overrides=[f"params.seeds={SEEDS}"], store=options.store, tracking=False)
    record = {
        "command": "python -m benchmarks.polynomial_networks",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "params": params,
        **gather(result, params),
    }
    text = json.dumps(record, indent=1)
    (RESULTS / "polynomial_networks.json").write_text(text + "\n", encoding="utf-8")
    record = json.loads(text)
    (RESULTS / "polynomial_networks.md").write_text(markdown(record), encoding="utf-8")
    draw(record, RESULTS / "polynomial_networks-rows.png")
    print(markdown(record))


if __name__ == "__main__":
    main()
