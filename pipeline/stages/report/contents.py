"""Collects the figures of the page into one JSON-able dict: exactly what is shown, nothing else."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from polytrope.pipeline.data.analysis_file import Analysis
from polytrope.pipeline.data.converted_layers import CONVERSION_FILE, ShownConversion, read_shown_conversion
from polytrope.pipeline.data.description import UNITS
from polytrope.pipeline.data.evaluation_file import EvaluatedModel, Evaluation
from polytrope.pipeline.data.lineage import Lineage, Teacher, read_lineage
from polytrope.pipeline.data.speed_file import Speed
from polytrope.pipeline.data.training_file import read_training
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact
from polytrope.pipeline.stages.report.parameters import ReportParameters, group_of
from polytrope.pipeline.stages.report.statistics import holm, mean_interval, paired_p_value
from polytrope.pipeline.support.pages import seen

FORMAT = 1
Figures = dict[str, Any]
_ACCURACY = {"loss", "perplexity", "bits_per_byte", "r2", "top1", "top5", "calibration_error", "drift"}
_COUNTS = {"parameters", "tokens", "images", "rows", "bytes"}


def collect(
    evaluation: Evaluation,
    models: Mapping[str, Artifact],
    conversion: Artifact | None,
    parameters: ReportParameters,
    speed: Speed | None = None,
    analysis: Analysis | None = None,
) -> Figures:
    """Everything the page shows as numbers or text.

    Args:
        models: label → artifact; those with a `history.json` have curves.
        conversion: the artifact with `conversion.json`.

    Raises:
        UserError: a model that was not evaluated.
    """
    everything = evaluation.models
    for label in models:
        if label not in everything:
            raise UserError(
                f"report: the model `{label}` was not evaluated", f"evaluated were: {', '.join(everything)}"
            )
    results = {label: result for label, result in everything.items() if result.failure is None}
    baseline = parameters.baseline or next(iter(results))
    rows = [_row(label, result, parameters, models.get(label)) for label, result in results.items()]
    figures: Figures = {
        "format": FORMAT,
        "title": parameters.title,
        "description": parameters.description,
        "kind": evaluation.kind,
        "unigram_entropy": evaluation.unigram_entropy,
        "baseline": baseline,
        "table": rows,
        "failures": [
            {"label": label, "name": parameters.labels.get(label, label), "failure": result.failure}
            for label, result in everything.items()
            if result.failure is not None
        ],
        "speed": None if speed is None else speed.protocol.model_dump(),
        "analysis": [] if analysis is None else _analysis(analysis, parameters),
        "not_measured": _not_measured(results, speed, parameters),
        "training": [entry for label in models if (entry := _training(label, models[label], parameters))],
        "conversion": [] if conversion is None else _conversion(read_shown_conversion(conversion.path)),
        "converted": None if conversion is None else _label_of(conversion, models),
        "samples": {label: result.sample for label, result in results.items() if result.sample},
        "dataset": evaluation.dataset.model_dump(exclude_unset=True),
        "protocol": evaluation.protocol.model_dump(),
    }
    if speed is not None:
        for row in rows:
            row["speed"] = speed.models.get(row["label"])
    if parameters.group_by is not None:
        failed = [failure["label"] for failure in figures["failures"]]
        figures["control"] = parameters.control
        figures["groups"] = compare_groups(
            rows, parameters.group_by, baseline, evaluation.kind, failed, parameters.control
        )
    else:
        losses = {row["label"]: row["loss"] for row in rows}
        for row in rows:
            row["difference"] = row["loss"] - losses[baseline] if baseline in losses else None
    return figures


def loss_unit(figures: Mapping[str, Any]) -> str:
    """What losses are measured in: nats where something is chosen, of predicted numbers their mean square."""
    if predicts_numbers(figures):
        return "mean square per row"
    return f"nats per {unit_of(figures)}"


def unit_of(figures: Mapping[str, Any]) -> str:
    """What is scored."""
    return UNITS[figures["kind"]].removesuffix("s")


def predicts_numbers(figures: Mapping[str, Any]) -> bool:
    """Whether there are no classes to be right about."""
    return figures["kind"] == "numbers" and all(row.get("top1") is None for row in figures["table"])


def _analysis(analysis: Analysis, parameters: ReportParameters) -> list[Figures]:
    """Each model's figures by name, and why it has none, or none of some analysis."""
    rows = []
    for label, model in analysis.models.items():
        failure = model.failure or "; ".join(model.failures.values()) or None
        row: Figures = {"label": label, "name": parameters.labels.get(label, label), "failure": failure}
        rows.append({**row, "figures": model.metrics()})
    return rows


def _not_measured(
    results: Mapping[str, EvaluatedModel], speed: Speed | None, parameters: ReportParameters
) -> list[Figures]:
    """What was asked for and could not be had of a model, and why."""
    reasons = [(label, result.drift_missing) for label, result in results.items() if result.drift_missing]
    reasons += [(label, f"no speed: {why}") for label, why in ((speed and speed.failures) or {}).items()]
    return [{"label": label, "name": parameters.labels.get(label, label), "reason": why} for label, why in reasons]


def _row(label: str, result: EvaluatedModel, parameters: ReportParameters, model: Artifact | None) -> Figures:
    row: Figures = {"label": label, "name": parameters.labels.get(label, label)}
    shown = _ACCURACY if result.tokens is not None else _ACCURACY - {"perplexity"}  # of text alone
    lineage = None if model is None else read_lineage(model.path)  # not every model need be an input
    row["budget"] = None if lineage is None else budget(lineage)
    structure = [] if lineage is None else [f"from a model with {part}" for part in lineage.structure]
    if model is not None and (model.path / CONVERSION_FILE).is_file():
        structure += read_shown_conversion(model.path).structure()
    if structure:
        row["structure"] = structure
    return row | result.model_dump(include={"activation", "answers"} | shown | _COUNTS, exclude_none=True)


def _training(label: str, artifact: Artifact, parameters: ReportParameters) -> Figures | None:
    training = read_training(artifact.path)
    if training is None:
        return None
    lineage = read_lineage(artifact.path)
    made_from = {
        "total_samples": lineage.samples,
        "total_tokens": lineage.tokens,
        "lineage": [ancestor.stage for ancestor in lineage.ancestors],
        **({"teachers": "; ".join(taught_by(lineage))} if lineage.teachers else {}),
    }
    return {"label": label, "name": parameters.labels.get(label, label), **training.figures(), **made_from}


def budget(lineage: Lineage) -> str:
    """What a model and all it was made from were trained on, and its teachers, for people: `1.2 M tokens`,
    `1.2 M tokens; taught by train: 5 M tokens`."""
    return "; ".join([_seen(lineage), *(f"taught by {teacher}" for teacher in taught_by(lineage))])


def taught_by(lineage: Lineage) -> list[str]:
    """Each teacher's stage with what it was trained on, for people; of one that the model was made from, whose samples
    are among its own, that."""
    own = {ancestor.digest for ancestor in lineage.ancestors}
    return [
        f"{teacher.stage}: {'which it was made from' if teacher.digest in own else _seen(teacher)}"
        for teacher in lineage.teachers
    ]


def _seen(model: Lineage | Teacher) -> str:
    if model.unknown:
        return "trained on more than is known here" if model.samples else "trained elsewhere"
    return seen(model.samples, model.tokens)


def _label_of(conversion: Artifact, models: Mapping[str, Artifact]) -> str | None:
    return next((label for label, model in models.items() if model.digest == conversion.digest), None)


def _conversion(conversion: ShownConversion) -> list[Figures]:
    """Per layer: how far the fit is from the activation it replaces, on the inputs that occur."""
    rows: list[Figures] = []
    for layer in conversion.layers:
        curve = layer.curve
        errors = [abs(fit - target) for fit, target in zip(curve.fit, curve.target, strict=True)]
        weight = math.fsum(curve.density) or 1.0
        squares = (part * error * error for part, error in zip(curve.density, errors, strict=True))
        mean_square = math.fsum(squares) / weight
        rows.append(
            {
                "layer": layer.name,
                "target": layer.target,
                "family": layer.family,
                "degree": layer.degree,
                "interval": list(layer.interval),
                "rms_error": math.sqrt(mean_square),
                "maximum_error": max(errors),
            }
        )
    return rows


def compare_groups(
    rows: Sequence[Figures],
    axis: str,
    baseline: str,
    kind: str,
    failed: Sequence[str] = (),
    control: str | None = None,
) -> list[Figures]:
    """Mean and 95 % interval of each group's loss, and its paired difference to the baseline's and the control's.

    Pairs are branches that agree in all other axes (the same seed). Groups are in the order of their mean loss; a group
    of failures only has no `loss` and comes last.

    Args:
        rows: the table, of the models that could be evaluated.
        failed: labels of the others.
        control: a second group to compare with (`difference_to_control`); its p-values are corrected among themselves.
    """
    groups: dict[str, dict[str, Figures]] = {}
    failures = Counter(group_of(label, axis) for label in failed)
    for row in rows:
        groups.setdefault(group_of(row["label"], axis), {})[_others(row["label"], axis)] = row
    references = {"difference": ("baseline", baseline)}
    if control is not None:
        references["difference_to_control"] = ("control", control)
    for what, name in references.values():
        if name not in groups and name not in failures:
            raise UserError(f"report: `{what}: {name}` is no value of `{axis}`", f"there are: {', '.join(groups)}")
    metrics = ["loss", "bits_per_byte"] if kind == "text" else ["loss", "r2", "top1", "calibration_error"]
    result: list[Figures] = []
    for name, members in groups.items():
        entry: Figures = {
            "group": name,
            "count": len(members),
            "failed": failures[name],
            "activation": next(iter(members.values()))["activation"],
        }
        entry["parameters"] = next(iter(members.values()))["parameters"]
        done = dict.fromkeys(part for row in members.values() for part in row.get("structure", []))
        if done:
            entry["structure"] = list(done)
        budgets = dict.fromkeys(row["budget"] for row in members.values() if row.get("budget"))
        if budgets:
            entry["budgets"] = list(budgets)
        for metric in metrics:
            values = [row[metric] for row in members.values() if row.get(metric) is not None]
            if values:
                interval = mean_interval(values)
                entry[metric] = {"mean": interval.mean, "half_width": interval.half_width, "values": values}
        speeds = [row["speed"] for row in members.values() if row.get("speed")]
        if speeds:  # the same work whatever the seed: the median of all
            entry["speed"] = {key: statistics.median(speed[key] for speed in speeds) for key in speeds[0]}
        for key, (_, other) in references.items():
            reference = groups.get(other, {})
            shared = [pair for pair in members if pair in reference]
            if name != other and shared and not (key == "difference_to_control" and name == baseline):
                entry[key] = paired_difference(
                    [members[pair]["loss"] for pair in shared], [reference[pair]["loss"] for pair in shared]
                )
        result.append(entry)
    for key in references:
        tested = [entry[key] for entry in result if entry.get(key, {}).get("p_value") is not None]
        for difference, corrected in zip(tested, holm([entry["p_value"] for entry in tested]), strict=True):
            difference["holm_p_value"] = corrected
    only_failures = [{"group": name, "count": 0, "failed": failures[name]} for name in failures if name not in groups]
    return sorted(result, key=lambda entry: entry["loss"]["mean"]) + only_failures


def paired_difference(losses: Sequence[float], reference: Sequence[float]) -> Figures:
    """Of one group to another, pair by pair; `holm_p_value` waits for the other comparisons."""
    differences = [own - other for own, other in zip(losses, reference, strict=True)]
    interval = mean_interval(differences)
    return {
        "mean": interval.mean,
        "half_width": interval.half_width,
        "p_value": paired_p_value(differences),
        "holm_p_value": None,
        "pairs": len(differences),
        "values": differences,
    }


def _others(label: str, axis: str) -> str:
    """The label's axes except one: what the branches to be paired have in common."""
    inside = label.partition("[")[2].rstrip("]")
    return ",".join(part for part in inside.split(",") if not part.startswith(f"{axis}="))


def summary_metrics(figures: Figures) -> dict[str, float]:
    """The figures of the result table as metrics of the parent run."""
    metrics: dict[str, float] = {}
    names = {
        "loss": "val_loss",
        "perplexity": "perplexity",
        "bits_per_byte": "bits_per_byte",
        "r2": "r2",
        "top1": "top1",
    }
    if "groups" in figures:
        for group in figures["groups"]:
            for key in ("loss", "bits_per_byte", "r2", "top1"):
                if key in group:
                    metrics[f"{group['group']}/{names[key]}"] = group[key]["mean"]
            if group["failed"]:
                metrics[f"{group['group']}/failed"] = group["failed"]
        return metrics
    for row in figures["table"]:
        for key, name in names.items():
            if row.get(key) is not None:
                metrics[f"{row['label']}/{name}"] = row[key]
    if figures["unigram_entropy"] is not None:
        metrics["unigram_entropy"] = figures["unigram_entropy"]
    return metrics
