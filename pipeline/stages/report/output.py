"""Write the files of the report stage: figures, plots, page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from polytrope.pipeline.data.analysis_file import Analysis, read_analysis
from polytrope.pipeline.data.circuit_file import read_circuit
from polytrope.pipeline.data.converted_layers import read_shown_conversion
from polytrope.pipeline.data.evaluation_file import Evaluation, read_evaluation
from polytrope.pipeline.data.speed_file import read_speed
from polytrope.pipeline.data.training_file import read_history, read_training
from polytrope.pipeline.stage import Artifact, StageContext
from polytrope.pipeline.stages.report.contents import Figures, collect, loss_unit, summary_metrics, unit_of
from polytrope.pipeline.stages.report.parameters import ReportParameters, group_of
from polytrope.pipeline.stages.report.report_page import build_page, name_of
from polytrope.pipeline.stages.report.statistics import mean_interval
from polytrope.pipeline.support import figures as plots


def write_report(
    context: StageContext,
    evaluation: Artifact,
    models: dict[str, Artifact],
    parameters: ReportParameters,
    others: Mapping[str, Artifact | None],
) -> dict[str, float]:
    """Write `report.json`, `plots/*.png`, `report.html`; returns the metrics of the result table.

    Args:
        others: the optional inputs `dataset`, `conversion`, `speed`, `analysis` and `circuit`.
    """
    content = read_evaluation(evaluation.path)
    conversion, speed, analysed = (others[name] for name in ("conversion", "speed", "analysis"))
    analysis = None if analysed is None else read_analysis(analysed.path)
    measured = None if speed is None else read_speed(speed.path)
    summary = collect(content, models, conversion, parameters, measured, analysis)
    circuit = others["circuit"]
    summary["circuit"] = None if circuit is None else read_circuit(circuit.path).model_dump()
    drawings = _drawings(content, summary, models, conversion, parameters)
    if analysis is not None:
        drawings |= _analysis_drawings(analysis, summary, parameters)
    pictures: dict[str, dict[str, bytes]] = {}
    (context.output / "plots").mkdir()
    for index, (name, draw) in enumerate(drawings.items()):
        context.progress(index, len(drawings) + 1, f"plot {name}")
        pictures[name] = {theme: plots.render(draw, theme) for theme in ("light", "dark")}
        (context.output / "plots" / f"{name}.png").write_bytes(pictures[name]["light"])
    inputs = _inputs(evaluation, models, others)
    page = build_page(summary, pictures, _configurations(models), inputs, parameters.command)
    (context.output / "report.html").write_text(page, encoding="utf-8")
    (context.output / "report.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    context.log_artifact("report.html", parent=True)
    context.log_artifact("report.json", parent=True)
    if drawings:
        context.log_artifact("plots", parent=True)
    context.progress(1, 1, "")
    return summary_metrics(summary)


def _drawings(
    content: Evaluation,
    summary: Figures,
    models: Mapping[str, Artifact],
    conversion: Artifact | None,
    parameters: ReportParameters,
) -> dict[str, Callable[[plots.Theme], Any]]:
    """Plot name → what draws it, in the order of the page."""
    drawings: dict[str, Callable[[plots.Theme], Any]] = {}
    unit = unit_of(summary)
    evaluated = {label: result for label, result in content.models.items() if result.failure is None}
    if "groups" in summary:
        drawings["groups"] = partial(
            plots.draw_groups,
            groups=summary["groups"],
            baseline=summary["baseline"],
            control=summary["control"],
            metric="loss",
            title=f"validation loss, {loss_unit(summary)}",
        )
    histories = {
        label: history
        for label, artifact in models.items()
        if label in evaluated and read_training(artifact.path) is not None and (history := read_history(artifact.path))
    }
    curves = _curves(histories, summary, parameters)
    if curves:
        drawings["losses"] = partial(
            plots.draw_losses,
            curves=curves,
            entropy=summary["unigram_entropy"] if unit == "token" else None,
            unit=loss_unit(summary),
        )
    gradients = _series(histories, "gradient_norm", summary, parameters)
    if gradients and "groups" in summary:
        drawings["gradients"] = partial(plots.draw_gradients, series=gradients)
    moments = _moments(histories, summary, parameters)
    if moments:
        drawings["moments"] = partial(
            plots.draw_moments, moments=moments, blocks=plots.evenly(list(moments), min(4, parameters.maximum_layers))
        )
    if conversion is not None:
        converted = [layer.model_dump() for layer in read_shown_conversion(conversion.path).layers]
        if converted:
            drawings["conversion"] = partial(
                plots.draw_conversion, layers=plots.evenly(converted, min(8, parameters.maximum_layers))
            )
    shown = _representatives(evaluated, summary, parameters)
    summary["samples"] = {label: text for label, text in summary["samples"].items() if label in shown.values()}
    records = {name: layers for name, label in shown.items() if (layers := evaluated[label].layers)}
    if records:
        density_of = summary["baseline"] if "groups" not in summary else shown.get(summary["baseline"])
        if density_of not in shown.values():
            density_of = next(iter(shown.values()))
        summary["shapes_density_of"] = density_of
        names = list(dict.fromkeys(record["name"] for entries in records.values() for record in entries))
        drawings["shapes"] = partial(
            plots.draw_shapes,
            layers=plots.evenly(names, parameters.maximum_layers),
            models=records,
            density_of=next(name for name, label in shown.items() if label == density_of),
        )
    confusion = {
        name_of(summary, label): result.confusion
        for label, result in evaluated.items()
        if result.confusion is not None and label in shown.values()
    }
    if confusion:
        drawings["confusion"] = partial(
            plots.draw_confusion, matrices=confusion, class_names=content.dataset.class_names
        )
    return drawings


def _analysis_drawings(
    analysis: Analysis, summary: Figures, parameters: ReportParameters
) -> dict[str, Callable[[plots.Theme], Any]]:
    """Of all models, or of the first repeat of each group."""
    shown = _representatives(analysis.models, summary, parameters)
    spectra, maps, accuracies = analysis.spectra(), analysis.variance_maps(), analysis.accuracies()
    return plots.analysis_drawings(
        {name: spectra[label] for name, label in shown.items() if label in spectra},
        {name: maps[label] for name, label in shown.items() if label in maps},
        {name: accuracies[label] for name, label in shown.items() if label in accuracies},
    )


def _representatives(results: Mapping[str, Any], summary: Figures, parameters: ReportParameters) -> dict[str, str]:
    """Shown name → label of the models whose shapes and samples are shown: all, or the first repeat of each group."""
    if parameters.group_by is None:
        return {name_of(summary, label): label for label in results}
    shown: dict[str, str] = {}
    for label in results:
        shown.setdefault(group_of(label, parameters.group_by), label)
    return shown


Histories = Mapping[str, Sequence[Mapping[str, Any]]]


def _curves(histories: Histories, summary: Figures, parameters: ReportParameters) -> list[plots.Curve]:
    if parameters.group_by is None:
        return [_curve(name_of(summary, label), history) for label, history in histories.items()]
    groups: dict[str, list[plots.Curve]] = {}
    for label, history in histories.items():
        name = group_of(label, parameters.group_by)
        groups.setdefault(name, []).append(_curve(name, history))
    means = [_mean_curve(curves) for curves in groups.values()]
    return means if len(means) <= 4 else [replace(curve, spread=None) for curve in means]  # bands would hide each other


def _curve(name: str, history: Sequence[Mapping[str, Any]]) -> plots.Curve:
    train = [(entry["step"], entry["train/loss"]) for entry in history if "train/loss" in entry]
    validation = [(entry["step"], entry["val/loss"]) for entry in history if entry.get("val/loss") is not None]
    return plots.Curve(
        name,
        [step for step, _ in train],
        [value for _, value in train],
        [step for step, _ in validation],
        [value for _, value in validation],
    )


def _mean_curve(curves: Sequence[plots.Curve]) -> plots.Curve:
    """Mean validation loss of repeats that were validated at the same steps."""
    steps = [step for step in curves[0].validation_steps if all(step in curve.validation_steps for curve in curves)]
    means, spread = [], []
    for step in steps:
        values = [curve.validation[list(curve.validation_steps).index(step)] for curve in curves]
        interval = mean_interval(values)
        means.append(interval.mean)
        spread.append(interval.half_width or 0.0)
    return plots.Curve(curves[0].name, [], [], steps, means, spread)


def _series(
    histories: Histories, key: str, summary: Figures, parameters: ReportParameters
) -> dict[str, tuple[list[float], list[float]]]:
    """Shown name → (steps, values) of one figure of the histories; means over the repeats of a group."""
    values: dict[str, dict[float, list[float]]] = {}
    for label, history in histories.items():
        grouped = parameters.group_by is not None
        name = group_of(label, str(parameters.group_by)) if grouped else name_of(summary, label)
        for entry in history:
            if entry.get(key) is not None:
                values.setdefault(name, {}).setdefault(entry["step"], []).append(entry[key])
    return {
        name: (list(points), [math.fsum(point) / len(point) for point in points.values()])
        for name, points in values.items()
    }


def _moments(histories: Histories, summary: Figures, parameters: ReportParameters) -> dict[str, plots.Moments]:
    """Block → its activation's input deviation and output mean square over the steps, where they were watched."""
    names = {key for history in histories.values() for entry in history for key in entry}
    blocks = sorted((key.partition("/")[2] for key in names if key.startswith("preactivation_std/")), key=int)
    return {
        f"block {int(block) + 1}": plots.Moments(
            _series(histories, f"preactivation_std/{block}", summary, parameters),
            _series(histories, f"activation_mean_square/{block}", summary, parameters),
        )
        for block in blocks
    }


def _configurations(models: Mapping[str, Artifact]) -> dict[str, Any]:
    paths = {label: artifact.path / "model.json" for label, artifact in list(models.items())[:12]}
    return {label: json.loads(path.read_bytes()) for label, path in paths.items() if path.exists()}


def _inputs(
    evaluation: Artifact, models: Mapping[str, Artifact], others: Mapping[str, Artifact | None]
) -> list[dict[str, str]]:
    entries: list[tuple[str, Artifact | None]] = [("dataset", others["dataset"]), ("evaluation", evaluation)]
    entries += [(f"model {label}", artifact) for label, artifact in models.items()]
    entries += [(name, artifact) for name, artifact in others.items() if name != "dataset"]
    return [
        {"input": name, "stage": artifact.stage, "digest": artifact.digest} for name, artifact in entries if artifact
    ]
